"""Attention and transformer blocks of the latent UNet (Rombach et al. 2022, arXiv:2112.10752).

`attend` is the one place where queries, keys and values meet the hardware; everything else is linear layers. A `control`
that travels through a call, such as Prompt-to-Prompt's, takes its place: control(q, k, v, heads, is_cross).
"""
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(C / heads)) v, head by head.

    q: (B, Q, C); k, v: (B, K, C). causal: no token sees later ones. Returns (B, Q, C).
    PyTorch's fused kernels never hold all logits, and keep them in float32 (Stable Diffusion 2.1's overflow float16). On a CPU,
    and on CUDA by PyTorch's source, they take every head of this project, even the autoencoder's of 512 channels, provided
    that each token's channels are adjacent in memory, which those of a transposed feature map are not. Two cases go without
    these kernels, and hold few logits at a time too, unless gradients need them all:
    - bfloat16 on a CPU: plain products of a few heads or queries at a time are up to four times as fast backward, and twice
      forward unless the CPU has AMX. Their logits are bfloat16: a relative error of 0.5 to 1%, not 0.2%.
    - other devices: the queries go in chunks, except for texts (`causal`), which are short.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))     # (B, heads, tokens, C / heads)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and (
            q.requires_grad or not (has_amx() or torch.compiler.is_compiling())):       # many products take long to compile
        out = attend_by_products(q, k, v, causal)
    elif causal or q.device.type in ("cpu", "cuda"):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    else:
        out = attend_in_chunks(q, k, v)
    return out.transpose(1, 2).flatten(2)


@cache
def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles, as Intel's do since 2023; False in versions of PyTorch that cannot tell."""
    return hasattr(torch.cpu, "get_capabilities") and torch.cpu.get_capabilities().get("amx_bf16", False)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, most: int = 2 ** 20) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (B, heads, tokens, d), at most `most` logits at a time, which is what a core's cache holds,
    but at least those of one query."""
    shape, Q, K = q.shape, q.shape[2], k.shape[2]
    q, k, v = (x.flatten(0, 1) for x in (q * shape[3] ** -0.5, k, v))
    if causal:
        mask = torch.full((Q, K), float("-inf"), dtype=q.dtype).triu(1)
    # Whole heads, as many as fit; or where not even one does, some of its queries. Either way the parts join in order.
    heads, queries = max(1, most // (Q * K)), max(1, min(Q, most // K))
    parts = []
    for some_q, some_k, some_v in zip(q.split(heads), k.split(heads), v.split(heads)):
        for start in range(0, Q, queries):
            logits = some_q[:, start:start + queries] @ some_k.mT
            if causal:
                logits = logits + mask[start:start + queries]
            parts.append(logits.softmax(-1).to(v.dtype) @ some_v)
    return torch.cat([part.flatten(0, 1) for part in parts]).view(shape)


def attend_in_chunks(q: Tensor, k: Tensor, v: Tensor, most: int = 2 ** 26) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (B, heads, tokens, d), for devices that may write the logits out: at most `most` logits at
    a time, but at least those of one query."""
    chunk = max(1, most // (k.shape[0] * k.shape[1] * k.shape[2]))
    return torch.cat([F.scaled_dot_product_attention(some, k, v) for some in q.split(chunk, dim=2)], dim=2)


class CrossAttention(nn.Module):
    """Multi-head attention from x to context; self-attention when there is no context."""

    def __init__(self, query_dim, context_dim=None, heads=8):
        super().__init__()
        if not heads or query_dim % heads:
            raise ValueError(f"{query_dim} channels cannot be shared out among {heads} heads")
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(context_dim, query_dim, bias=False)
        self.to_v = nn.Linear(context_dim, query_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(query_dim, query_dim))     # a Sequential for its public name, to_out.0

    def keys_and_values(self, context):
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, context: Tensor | dict | None = None, control: Callable | None = None) -> Tensor:
        """x: (B, N, query_dim); context: (B, M, context_dim), or a dict of its keys and values by layer (`UNet.read_text`).
        Returns (B, N, query_dim)."""
        is_cross = context is not None
        q = self.to_q(x)
        k, v = context[self] if isinstance(context, dict) else self.keys_and_values(context if is_cross else x)
        if control is not None:
            return self.to_out(control(q, k, v, self.heads, is_cross))
        return self.to_out(attend(q, k, v, self.heads))


class GEGLU(nn.Module):
    """Gated linear unit with the exact GELU as its gate (Shazeer 2020)."""

    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        # nn.Identity stands in for the original's dropout of 0, so that the next layer keeps its public number
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention over pixels, cross-attention to text, feed-forward; each normalised first and added on."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.attn1 = CrossAttention(dim, heads=heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, context, control=None):
        x = x + self.attn1(self.norm1(x), control=control)
        x = x + self.attn2(self.norm2(x), context, control)
        return x + self.ff(self.norm3(x))


def project(layer: nn.Linear | nn.Conv2d, tokens: Tensor) -> Tensor:
    """A linear layer of tokens (B, N, C), or a 1x1 convolution, which is one."""
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map.

    linear_proj: the projections are stored as Linear layers (Stable Diffusion 2) rather than as 1x1 convolutions (1.x).
    """

    def __init__(self, channels, context_dim, heads, depth=1, linear_proj=False, groups=32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)     # not the 1e-5 of the UNet's other norms

        def projection():
            return nn.Linear(channels, channels) if linear_proj else nn.Conv2d(channels, channels, 1)

        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(channels, context_dim, heads) for _ in range(depth))
        self.proj_out = projection()

    def forward(self, x: Tensor, context: Tensor | dict, control: Callable | None = None) -> Tensor:
        """x: (B, C, H, W); context: (B, M, context_dim), or what `UNet.read_text` makes of it. Returns (B, C, H, W)."""
        H, W = x.shape[2:]
        h = project(self.proj_in, self.norm(x).flatten(2).mT)     # (B, H*W, C)
        for block in self.transformer_blocks:
            h = block(h, context, control)
        return x + project(self.proj_out, h).mT.unflatten(2, (H, W))
