"""The latent UNet of Stable Diffusion (Rombach et al. 2022, arXiv:2112.10752), any width, depth and channel count.

InstructPix2Pix is this UNet with eight input channels: the noisy latents and, beside them, the image latents.
Submodules carry the names in the public checkpoints (below their prefix `model.diffusion_model.`).
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import BasicTransformerBlock, SpatialTransformer


@dataclass(frozen=True)
class UNetConfig:
    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)                      # one entry per resolution
    num_res_blocks: int = 2                                           # per level going down; one more going up
    attention_levels: tuple[bool, ...] = (True, True, True, False)    # which resolutions have transformers
    transformer_depth: int = 1
    context_dim: int = 768
    num_heads: int | None = 8                                         # Stable Diffusion 1: 8 heads of growing width
    head_channels: int | None = None                                  # Stable Diffusion 2: heads of 64 channels
    linear_proj: bool = False
    norm_groups: int = 32
    cond_dim: int | None = None                                       # a distilled editor: see `UNet.forward`

    def heads(self, channels: int) -> int:
        """Attention heads of a transformer `channels` wide."""
        return self.num_heads if self.head_channels is None else channels // self.head_channels


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """[cos | sin] features of timesteps (DDPM; Ho et al. 2020).

    t: (B,), integers or fractions in 0..999. Returns (B, dim) float32.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    args = t.float()[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=1)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, emb_dim, groups):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, c_out))
        # nn.Identity stands in for the original's dropout of 0, so that the next layer keeps its public number
        self.out_layers = nn.Sequential(nn.GroupNorm(groups, c_out), nn.SiLU(), nn.Identity(),
                                        nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNetBlock(nn.Sequential):
    """Layers in a row, each given what it needs: ResBlocks the timestep, transformers the text and the control."""

    recompute = False            # gradient checkpointing: keep only the input, and recompute the rest for the gradients

    def forward(self, x, emb, context, control):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.run, x, emb, context, control, use_reentrant=False, preserve_rng_state=False)
        return self.run(x, emb, context, control)

    def run(self, x, emb, context, control):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, control)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = c = config
        emb_dim = 4 * c.model_channels
        self.time_embed = nn.Sequential(nn.Linear(c.model_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        if c.cond_dim:
            self.cond_proj = nn.Linear(c.cond_dim, c.model_channels, bias=False)

        def res(c_in, c_out):
            return ResBlock(c_in, c_out, emb_dim, c.norm_groups)

        def transformer(channels):
            return SpatialTransformer(channels, c.context_dim, c.heads(channels), c.transformer_depth, c.linear_proj,
                                      c.norm_groups)

        widths = [c.model_channels * m for m in c.channel_mult]
        width = c.model_channels
        self.input_blocks = nn.ModuleList([UNetBlock(nn.Conv2d(c.in_channels, width, 3, padding=1))])
        skips = [width]                                   # widths of the features kept for the way up
        for level, level_width in enumerate(widths):
            for _ in range(c.num_res_blocks):
                layers = [res(width, level_width)]
                width = level_width
                if c.attention_levels[level]:
                    layers.append(transformer(width))
                self.input_blocks.append(UNetBlock(*layers))
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(UNetBlock(Downsample(width)))
                skips.append(width)

        self.middle_block = UNetBlock(res(width, width), transformer(width), res(width, width))

        self.output_blocks = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for i in range(c.num_res_blocks + 1):
                layers = [res(width + skips.pop(), level_width)]
                width = level_width
                if c.attention_levels[level]:
                    layers.append(transformer(width))
                if level > 0 and i == c.num_res_blocks:
                    layers.append(Upsample(width))
                self.output_blocks.append(UNetBlock(*layers))

        self.out = nn.Sequential(nn.GroupNorm(c.norm_groups, width), nn.SiLU(),
                                 nn.Conv2d(width, c.out_channels, 3, padding=1))

    def widen(self, in_channels: int):
        """Widen the input to `in_channels`, for the image latents (InstructPix2Pix, Sec. 3.2). The new weights are zero, so at
        first they change nothing."""
        conv = self.input_blocks[0][0]
        new = conv.weight.new_zeros(conv.out_channels, in_channels - conv.in_channels, *conv.kernel_size)
        conv.weight = nn.Parameter(torch.cat([conv.weight, new], dim=1), requires_grad=conv.weight.requires_grad)
        conv.in_channels, self.config = in_channels, replace(self.config, in_channels=in_channels)

    def recompute_blocks(self, recompute: bool):
        """Turn gradient checkpointing on or off: training computes the blocks again for their gradients, to save memory."""
        for block in self.modules():
            if isinstance(block, UNetBlock):
                block.recompute = recompute

    def read_text(self, context: Tensor) -> dict:
        """{layer: keys and values of `context`, (B, M, context_dim)} for every cross-attention layer: all that the text is to
        the UNet. Given to `forward` in place of `context`, they are computed once and not at every step."""
        blocks = (m for m in self.modules() if isinstance(m, BasicTransformerBlock))
        return {block.attn2: block.attn2.keys_and_values(context) for block in blocks}

    def forward(self, x: Tensor, t: Tensor, context: Tensor | dict, control: Callable | None = None,
                condition: Tensor | None = None) -> Tensor:
        """The model's prediction: eps, or v if it was trained to predict v.

        x: (B, in_channels, h, w) latents, h and w multiples of 2 ** (levels - 1); t: (B,), or (1,) for all, timesteps in
        0..999, which may be fractions; context: (B, M, context_dim), or what `read_text` makes of it; control: called in
        place of `attend` in every attention layer; condition: (B, n) numbers about as large as timesteps, given to a
        distilled editor, each embedded like a timestep, in cond_dim / n features. Returns (B, out_channels, h, w).
        """
        dtype = self.time_embed[0].weight.dtype
        emb = timestep_embedding(t, self.config.model_channels).to(dtype)
        if self.config.cond_dim:
            B, n = condition.shape
            features = timestep_embedding(condition.flatten(), self.config.cond_dim // n).view(B, -1)
            emb = emb + self.cond_proj(features.to(dtype))
        emb = self.time_embed(emb)
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context, control)
            skips.append(x)
        x = self.middle_block(x, emb, context, control)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context, control)
        return self.out(x)
