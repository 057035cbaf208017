"""What the miniature world does to pixels: cut an atlas into tiles, recolour a sprite, imitate a medium."""
import torch
import torch.nn.functional as F
from PIL import Image


def tiles(path, mode, h, w):
    """The cells of an atlas as (rows, columns, channels, h, w) uint8."""
    image = Image.open(path).convert(mode)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height // h, h, image.width // w, w, len(mode)).permute(0, 2, 4, 1, 3)


def smooth(a, b, x):
    """A smooth step from 0 at a to 1 at b."""
    t = ((x - a) / (b - a)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def recolor(rgb, hue, lum, target):
    """Paint the part of sprites (B, 3, h, w) that has their main hue (gray ones, hue -1: all but the darkest).

    hue, lum: (B,) of the sprites. target: (B, 3) hue, saturation, value; hues are in 0..1.
    """
    hue, lum, h0, s0, v0 = (x.view(-1, 1, 1) for x in (hue, lum, *target.unbind(1)))
    r, g, b = rgb.unbind(1)
    v, chief = rgb.max(1)
    d = v - rgb.amin(1)
    e = d.clamp(min=1e-6)
    h = torch.where(chief == 0, (g - b) / e % 6, torch.where(chief == 1, (b - r) / e + 2, (r - g) / e + 4)) / 6
    near = smooth(.16, .09, ((h - hue + .5) % 1 - .5).abs())
    near = near * smooth(.12, .30, d / v.clamp(min=1e-6)) * smooth(.08, .2, v)
    mask = torch.where(hue < 0, smooth(.12, .3, v) * .95, near)
    rel = ((.3 * r + .55 * g + .15 * b) / lum.clamp(min=.05)).clamp(.25, 1.9)
    sat, val = (s0 * (1.25 - .35 * rel.clamp(max=1.6))).clamp(0, 1), (v0 * rel ** .8).clamp(0, 1)
    k = (torch.tensor([5., 3., 1.], device=rgb.device).view(1, 3, 1, 1) + h0[:, None] * 6) % 6       # HSV to RGB
    paint = val[:, None] * (1 - sat[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.lerp(rgb, paint, mask[:, None])


# Styles: filters of pictures (B, 3, 128, 128) in [0, 1].

def gray(img):
    """Brightness, (B, 1, h, w)."""
    return .3 * img[:, :1] + .59 * img[:, 1:2] + .11 * img[:, 2:]


def blur(img, radius, times=2):
    """A box filter, `times` over."""
    for _ in range(times):
        img = F.avg_pool2d(F.pad(img, (radius,) * 4, mode="replicate"), 2 * radius + 1, 1)
    return img


def paper(device, grain):
    """Fixed texture (1, 1, 128, 128) around 0, the same on every device."""
    noise = torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(7))
    return (blur(noise, grain) * (2 * grain + 1)).to(device)


def dabs(img, side):
    """Kuwahara's filter: each pixel takes the mean of the flattest of the four squares at whose corner it lies."""
    padded = F.pad(img, (side - 1,) * 4, mode="replicate")
    mean = F.avg_pool2d(padded, side, 1)
    spread = (F.avg_pool2d(padded ** 2, side, 1) - mean ** 2).sum(1, keepdim=True)
    a, b = slice(0, -side + 1), slice(side - 1, None)
    quads = [(..., y, x) for y in (a, b) for x in (a, b)]
    best = torch.stack([spread[q] for q in quads]).argmin(0, keepdim=True)
    return torch.take_along_dim(torch.stack([mean[q] for q in quads]), best, 0)[0]


def pencil(img):
    """Strokes where the tone drops, hatching where it is dark, on warm paper."""
    tone = gray(img)
    ratio = (img + .1) / (blur(img, 3) + .1)            # a stroke: darker than its surroundings, in any channel
    lines = (ratio.amin(1, keepdim=True) + .04).clamp(0, 1) ** 3
    side = torch.arange(128, device=img.device)
    hatch = ((side[:, None] + side[None]) % 5 < 2) * (.62 - tone).clamp(0, .5)
    sheet = .97 - .8 * (1 - lines) - hatch - .12 * (1 - tone) + .02 * paper(img.device, 1)
    return sheet.clamp(.08, 1) * torch.tensor([1., .99, .965], device=img.device).view(1, 3, 1, 1)


def oil(img):
    """Flat dabs of colour with the relief of thick paint, lit from one corner."""
    img = dabs(img, 4)
    img = torch.lerp(gray(img), img, 1.2)
    relief = gray(img) + .05 * paper(img.device, 1)
    light = F.pad(relief[..., 1:, 1:] - relief[..., :-1, :-1], (1, 0, 1, 0))
    return ((img - .5) * 1.1 + .5 + .45 * light.clamp(-.2, .2)).clamp(0, 1)


def watercolor(img):
    """Pale washes with darker edges, on grained paper with a white rim."""
    soft = dabs(img, 4)
    edges = (blur(soft, 1) - soft).abs().mean(1, keepdim=True)
    wash = .25 + .75 * torch.lerp(gray(soft), soft, 1.25).clamp(0, 1) ** .8 - 1.2 * edges + .035 * paper(img.device, 2)
    side = (torch.arange(128, device=img.device) + .5) / 128
    rim = torch.minimum(side, 1 - side)
    rim = torch.minimum(rim[:, None], rim[None]) + .012 * paper(img.device, 4)
    return torch.lerp(torch.full_like(img, .98), wash.clamp(0, 1), smooth(.015, .055, rim))


def pixels(img):
    """Squares of 4 x 4 in few colours."""
    img = F.avg_pool2d(torch.lerp(gray(img), img, 1.25), 4)
    img = (img.clamp(0, 1) * 6).round() / 6
    return img.repeat_interleave(4, 2).repeat_interleave(4, 3)


def monochrome(img):
    """Gray, with more contrast, grain, and darker corners."""
    side = (torch.arange(128, device=img.device) + .5) / 128 * 2 - 1
    vignette = 1 - .16 * (side[:, None] ** 2 + side[None] ** 2)
    return (smooth(-.1, 1.1, gray(img)) * vignette + .012 * paper(img.device, 1)).clamp(0, 1).expand_as(img)


FILTERS = {"pencil sketch": pencil, "oil painting": oil, "watercolor": watercolor, "pixel art": pixels,
           "black and white photo": monochrome}
