"""Less memory for more time, and the same results up to rounding.

An autoencoder's memory is that of its feature maps at full resolution: each has 128 MiB for a 512 x 512 picture in
float32, or twice that, and plain code holds several. Here what lies between two of them is worked in strips of rows, for
one picture after another. A strip is given the rows beside it, and group norm the statistics of the whole map, so there
are no seams to hide.
Weights wait where there is room and visit the device for as long as they are used.
"""
from contextlib import contextmanager
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vae import AutoencoderKL, DiagonalGaussian, ResnetBlock

ROWS = 32          # of a strip
BESIDE = 2         # rows above and below that a strip is given: more than a 3 x 3 convolution sees, and even, for Downsample


@contextmanager
def visiting(part: nn.Module, device):
    """Within the block `part` has its weights on `device`; then it has its own again, which never moved. They stay the same
    parameters, or torch.compile would compile anew for every visit."""
    home = []                                            # in the order of _apply, by which `to` too goes through a module
    part._apply(lambda weight: home.append(weight.detach()) or weight)
    try:
        yield part.to(device)
    finally:
        weights = iter(home)
        part._apply(lambda _: next(weights))


def in_strips(layer: Callable, x: Tensor, in_place=False) -> Tensor:
    """layer(x) for a layer whose rows depend on rows at most BESIDE away, however much it enlarges or shrinks a map.
    x: (B, C, H, W), H even where the layer halves it. in_place: x takes the result, of its own shape.
    What the layer's own padding does to the rows beside a strip is cut off."""
    H, out = x.shape[2], x if in_place else None
    above = x[:, :, :0]                                                  # the rows above a strip: none above the first
    for top in range(0, H, ROWS):
        bottom = min(top + ROWS, H)
        strip = torch.cat([above, x[:, :, top:bottom + BESIDE]], 2)
        y = layer(strip)
        scale = y.shape[2] / strip.shape[2]                              # 2 for Upsample, 0.5 for Downsample
        if out is None:
            layout = torch.channels_last if y.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
            out = torch.empty(*y.shape[:2], int(H * scale), y.shape[3], dtype=y.dtype, device=y.device, memory_format=layout)
        start = int(above.shape[2] * scale)
        above = x[:, :, bottom - BESIDE:bottom].clone()                  # as they are before they are overwritten
        rows = out[:, :, int(top * scale):int(bottom * scale)]
        rows.copy_(y[:, :, start:start + rows.shape[2]])
    return out


def norm_silu_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, in_place=False) -> Tensor:
    """conv(silu(norm(x))). x: (B, C, H, W), which takes the result if in_place."""
    groups = [torch.var_mean(group.float(), (1, 2, 3), correction=0) for group in x.chunk(norm.num_groups, 1)]
    var, mean = (torch.stack(s, 1).repeat_interleave(x.shape[1] // norm.num_groups, 1) for s in zip(*groups))      # (B, C)
    scale = (var + norm.eps).rsqrt() * norm.weight
    shift = norm.bias - mean * scale
    scale, shift = scale[:, :, None, None], shift[:, :, None, None]
    return in_strips(lambda rows: conv(F.silu((rows * scale).add_(shift), inplace=True).to(x.dtype)), x, in_place)


def encode(vae: AutoencoderKL, pixels: Tensor) -> DiagonalGaussian:
    """`vae.encode(pixels)`, without gradients."""
    e = vae.encoder
    moments = []
    for picture in pixels.split(1):
        x = _levels(e.down, in_strips(e.conv_in, picture))
        moments.append(vae.quant_conv(norm_silu_conv(e.norm_out, e.conv_out, e.mid(x))))
    return DiagonalGaussian(torch.cat(moments))


def decode(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """`vae.decode(z)`, without gradients."""
    d = vae.decoder
    pictures = []
    for one in z.split(1):
        x = _levels(reversed(d.up), d.mid(d.conv_in(vae.post_quant_conv(one))))
        pictures.append(norm_silu_conv(d.norm_out, d.conv_out, x))
    return torch.cat(pictures)


def _levels(levels, x):
    for level in levels:
        for layer in level.layers():
            x = _resnet_block(layer, x) if isinstance(layer, ResnetBlock) else in_strips(layer, x)
    return x


def _resnet_block(block, x):
    h = norm_silu_conv(block.norm1, block.conv1, x)
    h = norm_silu_conv(block.norm2, block.conv2, h, in_place=True)
    for rows, skipped in zip(h.split(ROWS, 2), x.split(ROWS, 2)):
        rows += block.nin_shortcut(skipped)
    return h
