"""AutoencoderKL: the autoencoder between pixels and latents (Rombach et al. 2022, arXiv:2112.10752).

Submodules carry the names in the public checkpoints (below their prefix `first_stage_model.`).
"""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend, project


@dataclass(frozen=True)
class VAEConfig:
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)     # one entry a resolution; the first is full resolution
    num_res_blocks: int = 2                          # in the encoder; the decoder has one more a level
    z_channels: int = 4
    in_channels: int = 3
    norm_groups: int = 32
    scale_factor: float = 0.18215                    # brings Stable Diffusion's latents to unit variance

    def __post_init__(self):
        if not self.scale_factor > 0:
            raise ValueError(f"scale_factor must be positive, got {self.scale_factor}")

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.channel_mult) - 1)


class DiagonalGaussian:
    """What the encoder returns: a normal distribution for every latent value.

    moments: (B, 2 z, h, w), mean and log variance.
    """

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)

    def mode(self) -> Tensor:
        """The mean, (B, z, h, w)."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """A sample, made from standard normal noise (B, z, h, w)."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL divergence from the standard normal in nats, summed over a picture's latent, (B,)."""
        return 0.5 * (self.mean ** 2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


def group_norm(channels, groups):
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = group_norm(c_in, groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out, groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x).flatten(2).mT                        # (B, H*W, C)
        q, k, v = (project(layer, h) for layer in (self.q, self.k, self.v))
        h = attend(q, k, v, heads=1).mT.unflatten(2, x.shape[2:])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))     # pads right and bottom only, unlike the UNet's Downsample


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks at one resolution, and the way to the next: the encoder adds `downsample` to it, the decoder `upsample`."""

    def __init__(self, widths, groups):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:]))

    def layers(self):
        """The blocks, then `downsample` or `upsample` if there is one, for the caller to go through: a `forward` would hold its
        argument, a map at full resolution, until its last layer is done."""
        blocks, *resize = self.children()
        return [*blocks, *resize]


class Mid(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        widths = [c.channels * m for m in c.channel_mult]
        self.conv_in = nn.Conv2d(c.in_channels, c.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([c.channels] + widths, widths)):
            level = Level([before] + [width] * c.num_res_blocks, c.norm_groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Mid(widths[-1], c.norm_groups)
        self.norm_out = group_norm(widths[-1], c.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            for layer in level.layers():
                x = layer(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        widths = [c.channels * m for m in c.channel_mult]
        self.conv_in = nn.Conv2d(c.z_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], c.norm_groups)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):                                # up.0 is full resolution and runs last
            before = widths[min(i + 1, len(widths) - 1)]
            level = Level([before] + [width] * (c.num_res_blocks + 1), c.norm_groups)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(widths[0], c.norm_groups)
        self.conv_out = nn.Conv2d(widths[0], c.in_channels, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for layer in level.layers():
                x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def encode(self, pixels: Tensor) -> DiagonalGaussian:
        """pixels: (B, 3, H, W) in [-1, 1], sides multiples of `config.downsampling`. Returns the distribution of
        the (unscaled) latents; ValueError for other sides."""
        f, (H, W) = self.config.downsampling, pixels.shape[2:]
        if H % f or W % f:
            raise ValueError(f"height and width must be multiples of {f}, got {H}x{W}")
        return DiagonalGaussian(self.quant_conv(self.encoder(pixels)))

    def decode(self, z: Tensor) -> Tensor:
        """z: (B, z, h, w), unscaled latents. Returns pixels (B, 3, H, W), in [-1, 1] but for overshoot."""
        return self.decoder(self.post_quant_conv(z))
