"""Pictures of every kind in: any mode, any orientation, any damage."""
import struct

import numpy as np
import pytest
from pictures import colors
from PIL import Image, ImageCms, ImageFont

from ip2p.images import open_image, to_rgb, wrap

UPRIGHT = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,      # EXIF 2.3, section 4.6.4
           5: lambda a: np.swapaxes(a, 0, 1), 6: lambda a: np.rot90(a, -1),
           7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2), 8: lambda a: np.rot90(a)}


@pytest.mark.parametrize("name", ["x.png", "x.tif"])                         # Pillow itself turns the second
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = colors(24, 16)
    picture.save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as opened:
        for upright in (open_image(tmp_path / name), to_rgb(opened)):
            assert np.array_equal(np.asarray(upright), UPRIGHT[orientation](np.asarray(picture)))


@pytest.mark.parametrize("exif", [b"garbage1", b"Exif\0\0II*\0"])
@pytest.mark.parametrize("name", ["x.png", "x.webp"])
def test_damaged_exif_says_nothing(tmp_path, name, exif):
    colors(24, 16).save(tmp_path / name, exif=exif, lossless=True)
    assert open_image(tmp_path / name).tobytes() == colors(24, 16).tobytes()


def test_lack_of_memory_is_not_laid_on_the_picture(tmp_path, monkeypatch):
    def lack(*_):
        raise MemoryError
    colors(24, 16).save(tmp_path / "x.png")
    monkeypatch.setattr("ip2p.images.to_rgb", lack)
    with pytest.raises(MemoryError):
        open_image(tmp_path / "x.png")


@pytest.mark.parametrize("tag", [0x0100, 0x011A, 0x0128, 0x0213])         # a width, resolution, its unit, and where colours lie
def test_a_turned_picture_with_another_tag_that_is_wrong(tmp_path, tag):
    """Text in the place of a number: it is turned all the same, once."""
    entries = sorted([struct.pack("<HHII", 0x0112, 3, 1, 6), struct.pack("<HHI4s", tag, 2, 4, b"bad")], key=lambda e: e[1::-1])
    picture = colors(24, 16)
    picture.info["exif"] = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(entries) + bytes(4)
    for turned in (to_rgb(picture), to_rgb(to_rgb(picture))):
        assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(picture), -1))


@pytest.mark.parametrize("most", [1, 255])
def test_floats(tmp_path, most):
    """In 0..1 or in 0..255."""
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(ramp * most).save(tmp_path / "x.tif")
    assert np.abs(np.asarray(open_image(tmp_path / "x.tif"))[..., 0].astype(int) - 255 * ramp).max() <= 1


def test_what_is_not_a_number_is_black():
    picture = to_rgb(Image.fromarray(np.array([[np.nan, 0.5], [0.0, 1.0]], np.float32)))
    assert np.asarray(picture)[..., 0].tolist() == [[0, 127], [0, 255]]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_gray(tmp_path, suffix):
    ramp = (np.arange(256) * 257).astype(np.uint16).reshape(16, 16)                      # 0..65535
    Image.fromarray(ramp).save(tmp_path / f"x{suffix}")
    got = np.asarray(open_image(tmp_path / f"x{suffix}"))
    assert np.array_equal(got, np.repeat(np.arange(256).reshape(16, 16, 1), 3, 2))


@pytest.mark.parametrize("suffix, tolerance", [(".tif", 0), (".jpg", 3)])
def test_cmyk(tmp_path, suffix, tolerance):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / f"x{suffix}")          # red
    got = np.asarray(open_image(tmp_path / f"x{suffix}")).astype(int)
    assert np.abs(got - [255, 0, 0]).max() <= tolerance


def profile_with(*exchanged):
    """The profile of sRGB as a file holds it, in which the places of two of its tags are exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    table, rest = profile[128:132 + 12 * int.from_bytes(profile[128:132], "big")], {}
    for name, other in zip(exchanged, exchanged[::-1]):
        rest[name] = table.index(other)
    for name, place in rest.items():
        profile = profile[:128 + place] + name + profile[132 + place:]
    return profile


def test_colours_are_those_that_the_profile_means(tmp_path):
    """Of a space whose red is sRGB's green and the other way round; whatever else a file holds in a profile's place is ignored."""
    picture = colors(24, 16)
    red, green, blue = picture.split()
    exchanged = Image.merge("RGB", (green, red, blue))
    opaque = picture.copy()
    opaque.putalpha(255)
    for name in ("x.png", "x.tif", "x.webp"):
        for image in (picture, opaque):
            image.save(tmp_path / name, icc_profile=profile_with(b"rXYZ", b"gXYZ"), lossless=True)
            got = open_image(tmp_path / name)
            assert np.abs(np.asarray(got).astype(int) - np.asarray(exchanged)).max() <= 1
            assert to_rgb(got).tobytes() == got.tobytes()                                # not a second time
        for profile in (profile_with(), b"no profile", profile_with()[:200]):
            picture.save(tmp_path / name, icc_profile=profile, lossless=True)
            assert open_image(tmp_path / name).tobytes() == picture.tobytes()
    palette = picture.quantize(16)
    palette.save(tmp_path / "x.png", icc_profile=profile_with(b"rXYZ", b"gXYZ"))
    red, green, blue = palette.convert("RGB").split()
    assert np.abs(np.asarray(open_image(tmp_path / "x.png")).astype(int) - np.asarray(Image.merge("RGB", (green, red, blue)))).max() <= 1


def test_transparency_is_laid_over_white(tmp_path):
    for mode, color in (("RGBA", (0, 0, 0, 51)), ("LA", (0, 51))):                       # a fifth of black
        Image.new(mode, (16, 16), color).save(tmp_path / "x.png")
        assert np.abs(np.asarray(open_image(tmp_path / "x.png")).astype(int) - 204).max() <= 1
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.paste(0, (0, 0, 8, 16))
    palette.save(tmp_path / "x.png", transparency=0)
    assert set(open_image(tmp_path / "x.png").getdata()) == {(255, 255, 255), (200, 100, 50)}
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "x.png", transparency=(0, 0, 255))
    assert set(open_image(tmp_path / "x.png").getdata()) == {(255, 255, 255)}


def test_palette_gray_and_one_bit(tmp_path):
    picture = colors(16, 16).quantize(16)
    for image in (picture, colors(16, 16).convert("L"), colors(16, 16).convert("1")):
        image.save(tmp_path / "x.png")
        got = open_image(tmp_path / "x.png")
        assert got.mode == "RGB" and got.tobytes() == image.convert("RGB").tobytes()


def test_damaged_pictures_never_give_a_traceback(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in (".png", ".jpg", ".gif", ".webp", ".tif", ".bmp"):
        colors(24, 16).save(tmp_path / f"x{suffix}")
        whole = np.frombuffer((tmp_path / f"x{suffix}").read_bytes(), np.uint8)
        for _ in range(30):
            damaged = whole[:rng.integers(1, len(whole) + 1)].copy()
            damaged[rng.integers(0, len(damaged), 3)] = rng.integers(0, 256, 3)
            (tmp_path / "y").write_bytes(damaged.tobytes())
            try:
                assert open_image(tmp_path / "y").mode == "RGB"
            except ValueError as error:
                assert str(tmp_path / "y") in str(error)


@pytest.mark.parametrize("width", [40, 64, 128, 300])
def test_lines_are_no_wider_than_they_may_be(width):
    font = ImageFont.load_default(10)
    text = "turn the panda bear into the fox that it was in a forest in the early morning, and make it rain"
    lines = wrap(text, font, width)
    assert len(lines) <= 3 and all(font.getlength(line) <= width for line in lines)
    words = " ".join(lines).removesuffix(" ...").split()
    assert words == text.split()[:len(words)] and (len(words) == len(text.split())) == (width == 300)
