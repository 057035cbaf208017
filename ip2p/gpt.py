"""GPT-2 (Radford et al. 2019): the language model that writes edits.

Submodules carry the names in the public checkpoints, whose matrices are (in, out).
"""
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tensorfiles import read_state_dict, write_state_dict


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257
    context_length: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12


class Conv1D(nn.Module):
    """A linear layer with its weight stored as (in, out), as OpenAI's TensorFlow code left it."""

    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim_in, dim_out).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(dim_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Cache:
    """Keys and values of the tokens so far, (B, heads, context_length, C / heads) a layer, for generating one by one."""

    def __init__(self, config: GPTConfig, batch_size: int, like: Tensor):
        shape = (config.layers, 2, batch_size, config.heads, config.context_length, config.width // config.heads)
        self.keys_values, self.length = like.new_empty(shape), 0

    def extend(self, layer, k, v):
        end = self.length + k.shape[2]
        stored = self.keys_values[layer]
        stored[0, :, :, self.length:end], stored[1, :, :, self.length:end] = k, v
        return stored[0, :, :, :end], stored[1, :, :, :end]


class Attention(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.heads = c.heads
        self.c_attn = Conv1D(c.width, 3 * c.width)
        self.c_proj = Conv1D(c.width, c.width)

    def forward(self, x, cache, layer):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.c_attn(x).chunk(3, dim=-1))
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        # Token i of this call may look at all before it, and at itself.
        Q, K = q.shape[2], k.shape[2]
        mask = torch.ones(Q, K, dtype=torch.bool, device=x.device).tril(K - Q) if 1 < Q < K else None
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=Q == K)
        return self.c_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.c_fc = Conv1D(c.width, 4 * c.width)
        self.c_proj = Conv1D(4 * c.width, c.width)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.attn, self.mlp = Attention(c), MLP(c)

    def forward(self, x, cache, layer):
        x = x + self.attn(self.ln_1(x), cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig = GPTConfig()):
        super().__init__()
        self.config = c = config
        self.wte, self.wpe = nn.Embedding(c.vocab_size, c.width), nn.Embedding(c.context_length, c.width)
        self.h = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.ln_f = nn.LayerNorm(c.width)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """ids: (B, N) int64, which continue what `cache` holds. Returns the logits of each next token, (B, N, vocab_size).
        ValueError if they do not fit the context."""
        start = 0 if cache is None else cache.length
        N = ids.shape[1]
        if start + N > self.config.context_length:
            raise ValueError(f"{start + N} tokens are more than the context's {self.config.context_length}")
        x = self.wte(ids) + self.wpe.weight[start:start + N]
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        if cache is not None:
            cache.length += N
        return self.ln_f(x) @ self.wte.weight.T


@torch.no_grad()
def generate(model: GPT, prompt: list[int], max_tokens: int, *, stop: Callable[[list[int]], bool] | None = None,
             temperature: float = 0.7, top_p: float = 1.0, frequency_penalty: float = 0.1,
             generator: torch.Generator | None = None) -> list[int]:
    """Tokens that continue `prompt`, until `stop` of them is true, there are `max_tokens`, or the context is full.

    temperature: 0 takes the likeliest token. top_p: sample among the likeliest tokens that hold this much probability.
    frequency_penalty: taken from a token's logit for every time that it was generated (OpenAI's definition). The defaults
    are those of the paper's code. generator: on the CPU, where tokens are drawn.
    """
    device = model.wte.weight.device
    cache, ids, out = Cache(model.config, 1, model.wte.weight), torch.tensor([prompt], device=device), []
    counts = torch.zeros(model.config.vocab_size)
    room = min(max_tokens, model.config.context_length - len(prompt))
    while len(out) < room:
        logits = model(ids, cache)[0, -1].float().cpu() - frequency_penalty * counts
        token = pick(logits, temperature, top_p, generator)
        out.append(token)
        if stop is not None and stop(out):
            break
        counts[token] += 1
        ids = torch.tensor([[token]], device=device)
    return out


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> int:
    """One token by its logits, (vocab_size,): the likeliest at temperature 0, else drawn from the nucleus (Holtzman et al.
    2019): the fewest likeliest tokens whose probabilities reach `top_p`."""
    if temperature == 0:
        return int(logits.argmax())
    probs, order = (logits / temperature).softmax(0).sort(descending=True)
    probs = probs * (probs.cumsum(0) - probs < top_p)
    return int(order[torch.multinomial(probs, 1, generator=generator)])


def load_gpt(path: str | Path, device=None) -> tuple[GPT, dict]:
    """A GPT-2 from a file (.safetensors or .bin; names with or without `transformer.`), and the file's record.

    Sizes are read from the tensors; heads are 64 wide, as in all four public models, unless the record says otherwise.
    Raises ValueError, naming the file, if a key is missing, unknown or misshapen.
    """
    tensors, record = read_state_dict(path)
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    unused = (".attn.bias", ".attn.masked_bias", "lm_head.weight")              # masks; and wte.weight once more
    tensors = {name: t for name, t in tensors.items() if not name.endswith(unused)}
    try:
        (vocab_size, width), context_length = tensors["wte.weight"].shape, len(tensors["wpe.weight"])
    except KeyError as error:
        raise ValueError(f"{path}: not a GPT-2: it lacks {error.args[0]}") from None
    layers = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
    heads = record.get("gpt", {}).get("heads", width // 64)
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size, context_length, width, layers, heads))
    wanted = {name: t.shape for name, t in model.state_dict().items()}
    wrong = sorted(wanted.keys() ^ tensors.keys()) or [name for name in wanted if wanted[name] != tensors[name].shape]
    if wrong:
        raise ValueError(f"{path}: missing, unknown or misshapen keys: {len(wrong)} ({', '.join(wrong[:3])}...)")
    model.load_state_dict({n: t.to(device=device, dtype=torch.float32) for n, t in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False), record


def save_gpt(model: GPT, path: str | Path, record: dict, dtype=None):
    """Write a GPT-2 as safetensors under the public names, with its record and sizes in the metadata. dtype: see
    `cast`."""
    write_state_dict(path, model.state_dict(), {**record, "gpt": asdict(model.config)}, dtype)
