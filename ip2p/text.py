"""CLIP's tokenizer and text encoder, which turn a prompt into the `context` of the UNet's cross-attention.

Both are open_clip's. Stable Diffusion 1 takes the last layer of OpenAI's ViT-L/14 (quick GELU), Stable Diffusion 2 the
last layer but one of OpenCLIP's ViT-H/14 (exact GELU), each followed by the final layer norm.
"""
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def import_open_clip():
    """open_clip, imported where it is first needed: it takes longer than torch itself.

    Of torchvision it needs only Python code, but a torchvision built for another torch (a CUDA wheel beside a CPU torch)
    fails on import for want of its compiled operators. Declaring those two is enough to go on without them.
    """
    try:
        import open_clip
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        import_open_clip.keep = library                      # its declarations last as long as it does
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import open_clip
    return open_clip


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


class Tokenizer:
    """CLIP's byte-pair encoding (lower-cased, 49,408 tokens), or its first `vocab_size` tokens' worth of it."""

    def __init__(self, config: TextConfig = TextConfig()):
        self.config = config
        self.bpe = bpe = import_open_clip().SimpleTokenizer(context_length=config.context_length)
        num_merges = config.vocab_size - 2 * 256 - 2         # a token a byte, each also word-final, and start and end
        if num_merges != len(bpe.bpe_ranks):
            merges = list(bpe.bpe_ranks)[:num_merges]        # in order of rank
            tokens = list(bpe.encoder)[:2 * 256 + num_merges] + ["<start_of_text>", "<end_of_text>"]
            bpe.bpe_ranks = dict(zip(merges, range(num_merges)))
            bpe.encoder = {token: i for i, token in enumerate(tokens)}
            bpe.decoder = {i: token for i, token in enumerate(tokens)}
        self.start, self.end = config.vocab_size - 2, config.vocab_size - 1

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


class TextEncoder(nn.Module):
    """The text tower of CLIP, by the names in OpenCLIP's checkpoints (below their prefix `cond_stage_model.model.`)."""

    def __init__(self, config: TextConfig = TextConfig()):
        super().__init__()
        self.config = c = config
        open_clip = import_open_clip()
        self.token_embedding = nn.Embedding(c.vocab_size, c.width)
        self.positional_embedding = nn.Parameter(torch.empty(c.context_length, c.width))
        nn.init.normal_(self.positional_embedding, std=0.01)
        gelu = open_clip.transformer.QuickGELU if c.quick_gelu else nn.GELU
        self.transformer = open_clip.transformer.Transformer(c.width, c.layers, c.heads, act_layer=gelu)
        self.ln_final = nn.LayerNorm(c.width)
        if c.projection_dim is not None:
            self.text_projection = nn.Parameter(torch.zeros(c.width, c.projection_dim))

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, M) int64, M <= context_length. Returns the context, (B, M, width)."""
        M = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:M]
        causal = torch.full((M, M), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        blocks = self.transformer.resblocks
        for block in blocks[:len(blocks) - self.config.skip_last]:
            x = block(x, attn_mask=causal)
        return self.ln_final(x)
