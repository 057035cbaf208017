"""CLIP's tokenizer and text encoder, which turn a prompt into the `context` of the UNet's cross-attention.

The byte pairs are open_clip's. Stable Diffusion 1 takes the last layer of OpenAI's ViT-L/14 (quick GELU), Stable Diffusion 2 the
last layer but one of OpenCLIP's ViT-H/14 (exact GELU), each followed by the final layer norm.
"""
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend


@lru_cache
def tokenizer_module():
    """open_clip's tokenizer alone, a file that needs nothing of the rest."""
    path = Path(importlib.util.find_spec("open_clip").origin).with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("ip2p.open_clip_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int = 49408
    context_length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    quick_gelu: bool = True          # OpenAI's models; OpenCLIP's use the exact GELU
    skip_last: int = 0               # layers left out at the end: 1 for "penultimate"
    pad_with_end: bool = True        # pad with the end token (Hugging Face), or with 0 (OpenAI, OpenCLIP)
    projection_dim: int | None = None    # CLIP's own projection, carried along where a checkpoint has it; unused here

    def __post_init__(self):
        if not 0 <= self.skip_last < self.layers:
            raise ValueError(f"skip_last must be in 0..{self.layers - 1}, got {self.skip_last}")


class Tokenizer:
    """CLIP's byte-pair encoding (lower-cased, 49,408 tokens), or its first `vocab_size` tokens' worth of it. Tokens that were
    added by textual inversion are not supported."""

    def __init__(self, config: TextConfig = TextConfig()):
        self.config = config
        self.bpe = bpe = tokenizer_module().SimpleTokenizer(context_length=config.context_length)
        size = min(config.vocab_size, len(bpe.encoder))
        num_merges = size - 2 * 256 - 2                      # a token a byte, each also word-final, and start and end
        if num_merges != len(bpe.bpe_ranks):
            merges = list(bpe.bpe_ranks)[:num_merges]        # in order of rank
            tokens = list(bpe.encoder)[:2 * 256 + num_merges] + ["<start_of_text>", "<end_of_text>"]
            bpe.bpe_ranks = dict(zip(merges, range(num_merges)))
            bpe.encoder = {token: i for i, token in enumerate(tokens)}
        self.start, self.end = size - 2, size - 1

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without start and end, of any length."""
        return self.bpe.encode(text)

    def __call__(self, texts: list[str]) -> Tensor:
        """(B, context_length) int64 ids: start, text, end, padding. Longer texts lose their end, not the end token."""
        length = self.config.context_length
        ids = torch.full((len(texts), length), self.end if self.config.pad_with_end else 0)
        for row, text in zip(ids, texts):
            tokens = [self.start, *self.encode(text)[:length - 2], self.end]
            row[:len(tokens)] = torch.tensor(tokens)
        return ids


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """A layer of CLIP's text transformer: causal self-attention, then two linear layers; each normalised first and added on."""

    def __init__(self, width, heads, quick_gelu):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)                  # only holds the weights, by their public names; `forward` computes it
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU() if quick_gelu else nn.GELU(),
                                      c_proj=nn.Linear(4 * width, width)))

    def forward(self, x):
        qkv = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)
        x = x + self.attn.out_proj(attend(*qkv.chunk(3, dim=-1), self.attn.num_heads, causal=True))
        return x + self.mlp.c_proj(self.mlp.gelu(self.mlp.c_fc(self.ln_2(x))))


class TextEncoder(nn.Module):
    """The text tower of CLIP, by the names in OpenCLIP's checkpoints (below their prefix `cond_stage_model.model.`)."""

    def __init__(self, config: TextConfig = TextConfig()):
        super().__init__()
        self.config = c = config
        # Uniform: drawing normal numbers on the meta device, where loading builds models, imports all of torch's compiler.
        self.token_embedding = nn.Embedding.from_pretrained(torch.empty(c.vocab_size, c.width).uniform_(-0.03, 0.03), freeze=False)
        self.positional_embedding = nn.Parameter(torch.empty(c.context_length, c.width).uniform_(-0.02, 0.02))
        blocks = [ResidualAttentionBlock(c.width, c.heads, c.quick_gelu) for _ in range(c.layers)]
        self.transformer = nn.ModuleDict(dict(resblocks=nn.ModuleList(blocks)))
        self.ln_final = nn.LayerNorm(c.width)
        if c.projection_dim is not None:
            self.text_projection = nn.Parameter(torch.zeros(c.width, c.projection_dim))

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, M) int64, M <= context_length. Returns the context, (B, M, width)."""
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]
        for block in self.transformer.resblocks[:self.config.layers - self.config.skip_last]:
            x = block(x)
        return self.ln_final(x)
