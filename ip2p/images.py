"""Pictures between files, PIL and tensors: any mode to RGB, sizes that a model can take, pixels in [-1, 1]."""
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

from .tensorfiles import replacing

UPRIGHT = dict(zip(range(2, 9), (Image.Transpose[name] for name in (                      # by EXIF's orientation
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"))))
MAX_ASPECT = 16                  # beyond this a picture is a line once its long side fits a model


def open_image(path: str | Path) -> Image.Image:
    """A picture file as RGB, upright. An animation gives its first frame.

    Raises ValueError, naming the file, if it is missing, not a picture, cut short, or of an impossible shape.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                               # of odd metadata, or that a picture is large
            with Image.open(path) as image:
                image = to_rgb(image)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such picture") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a picture that Pillow can read") from None
    except MemoryError:
        raise
    except Exception as error:                        # Pillow's decoders raise all kinds
        raise ValueError(f"{path}: cannot be read ({error})") from None
    try:
        check_shape(image)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return image


def check_shape(image: Image.Image):
    """ValueError unless both sides have 8 pixels or more and differ by at most 16 times."""
    if min(image.size) < 8 or max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"a picture needs sides of at least 8 pixels that differ by at most {MAX_ASPECT} times, "
                         f"got {image.width}x{image.height}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright by its EXIF tag, in sRGB, 8 bits a channel, transparency laid over white."""
    image.load()                                                          # a TIFF turns itself here, and forgets its tag
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:                                                     # a damaged EXIF says nothing; the pixels are good
        turn = None
    if turn is not None:
        image = image.transpose(turn)
        for name in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):             # where it is turned already
            image.info.pop(name, None)
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))                         # NaN to black
        image = Image.fromarray((values * (255 if values.max() <= 1 else 1)).clip(0, 255).astype(np.uint8))
    if image.mode.startswith("I"):                                        # 16 bits of gray
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return in_srgb(image.convert("RGB") if image.mode == "P" else image, profile)


def in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """As RGB, in the colours that a picture's own profile means, such as a telephone's Display P3."""
    if profile:
        try:
            image = ImageCms.profileToProfile(image, BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
            image.info.pop("icc_profile", None)
        except ImageCms.PyCMSError:                                       # damaged, or of another kind of picture
            pass
    return image.convert("RGB")


def model_size(width: int, height: int, size: int, multiple: int) -> tuple[int, int]:
    """The (width, height) at which a model sees a picture: the long side is `size`, the short side follows, both rounded
    to the nearest multiple of `multiple` and never zero. Integer arithmetic throughout. ValueError for a size below 1."""
    def nearest(numerator, denominator):
        """The multiple nearest to a fraction, at least one."""
        return max(1, (2 * numerator + denominator * multiple) // (2 * denominator * multiple)) * multiple

    if size < 1:
        raise ValueError(f"the size must be at least 1, got {size}")
    long = nearest(size, 1)
    short = nearest(min(width, height) * long, max(width, height))
    return (long, short) if width >= height else (short, long)


def to_pixels(image: Image.Image, width: int, height: int) -> Tensor:
    """An RGB picture, resized, as (3, height, width) float32 in [-1, 1]."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1], overshoot allowed, as PIL pictures."""
    pixels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def wrap(text: str, font, width: int, most: int = 3) -> list[str]:
    """Lines no wider than `width`, unless a word is; what does not fit in `most` of them is left out, and "..." says so."""
    lines, fits = [""], lambda line: font.getlength(line) <= width
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if fits(longer) or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < most:
            lines.append(word)
        else:
            kept = lines[-1].split(" ")
            while len(kept) > 1 and not fits(f"{' '.join(kept)} ..."):
                kept.pop()
            lines[-1] = f"{' '.join(kept)} ..."
            break
    return lines


def contact_sheet(cells: list[tuple[Image.Image, str]], columns: int = 8, lines: int = 3) -> Image.Image:
    """Pictures of one size, row by row, each with up to `lines` lines of text below it."""
    font, (width, height), label = ImageFont.load_default(10), cells[0][0].size, 12 * lines + 6
    page = Image.new("RGB", (columns * (width + 6), -(-len(cells) // columns) * (height + label)), "white")
    draw = ImageDraw.Draw(page)
    for k, (picture, text) in enumerate(cells):
        x, y = k % columns * (width + 6) + 3, k // columns * (height + label) + 2
        page.paste(picture, (x, y))
        draw.text((x, y + height), "\n".join(wrap(text, font, width, lines)), fill=0, font=font, spacing=0)
    return page


def save_image(image: Image.Image, path: str | Path, **options):
    """Write a picture under a temporary name, then rename it. The format follows the suffix; options are Pillow's."""
    format = Image.registered_extensions()[Path(path).suffix.lower()]
    with replacing(path) as temporary:
        image.save(temporary, format=format, **options)
