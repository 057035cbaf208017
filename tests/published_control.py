"""Prompt-to-Prompt as published, slow and plain: every attention map made, edited, and multiplied with the values.

These references know prompts of clean words with single spaces, as the original does.
"""
from functools import cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from ip2p.unet import UNet, UNetConfig


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the mappers

def word_positions(prompt, tokenizer):
    """Positions of each word's tokens: a word ends where the letters of decoded tokens add up to its length."""
    words = prompt.split(" ")
    positions, letters = [[]], 0
    for position, token in enumerate(tokenizer.encode(prompt), start=1):
        positions[-1].append(position)
        letters += len(tokenizer.bpe.decode([token]).strip())
        if letters >= len(words[len(positions) - 1]):
            positions.append([])
            letters = 0
    return positions[:-1]


def slow_replacement(source, target, tokenizer):
    """A walk down the diagonal that goes around each changed word, and off it for good where their lengths differ."""
    M = tokenizer.config.context_length
    changed = [(x, y) for x, y, a, b in zip(word_positions(source, tokenizer), word_positions(target, tokenizer),
                                            source.split(" "), target.split(" ")) if a != b]
    mapper, i, j = np.zeros((M, M), np.float32), 0, 0
    while max(i, j) < M:
        if changed and changed[0][0][0] == i:
            x, y = changed.pop(0)
            if len(x) == len(y):
                for a, b in zip(x, y):
                    mapper[a, b] = 1
            else:
                for a, b in product(x, y):
                    mapper[a, b] = 1 / len(y)
            i, j = i + len(x), j + len(y)
        else:
            mapper[i if changed else j, j] = 1
            i, j = i + 1, j + 1
    return torch.from_numpy(mapper)


def slow_refinement(source, target, tokenizer):
    """Needleman and Wunsch's best alignment as a recursion over beginnings of the two prompts."""
    M = tokenizer.config.context_length
    x, y = ([tokenizer.start, *tokenizer.encode(prompt), tokenizer.end] for prompt in (source, target))

    @cache
    def best(i, j):
        if 0 in (i, j):
            return 0
        return max(best(i, j - 1), best(i - 1, j), best(i - 1, j - 1) + (1 if x[i - 1] == y[j - 1] else -1))

    def aligned(i, j):
        if j == 0:
            return []
        if i == 0 or best(i, j) == best(i, j - 1):
            return [*aligned(i, j - 1), -1]
        if best(i, j) == best(i - 1, j):
            return aligned(i - 1, j)
        return [*aligned(i - 1, j - 1), i - 1]

    indices = torch.tensor(aligned(len(x), len(y)) + list(range(len(y), M)))
    return indices, torch.tensor([0.0 if i == -1 else 1.0 for i in indices.tolist()])


def by_hand(tokenizer, diagonal, **shares):
    """A mapper with ones where `diagonal` says, {target: source}, and `shares` by "i_j": weight."""
    mapper = torch.zeros(tokenizer.config.context_length, tokenizer.config.context_length)
    for j, i in diagonal.items():
        mapper[i, j] = 1
    for place, weight in shares.items():
        i, j = map(int, place[1:].split("_"))
        mapper[i, j] = weight
    return mapper


# ---- the controls

class Textbook:
    """Takes the place of `attend` with maps softmax(q k^T / sqrt(d)), edited as published, for one step at a time.

    edit(row, base, own): a row's new cross maps (heads, pixels, tokens). alpha: (T, R, M). self_on: (T, R).
    """

    def __init__(self, source, self_on, edit=None, alpha=None, most_pixels=float("inf"), both_halves=False):
        self.source, self.self_on, self.edit, self.alpha = source, self_on, edit, alpha
        self.most_pixels, self.both_halves, self.step, self.cross_maps = most_pixels, both_halves, 0, []

    def __call__(self, q, k, v, heads, is_cross):
        q, k, v = (x.reshape(*x.shape[:2], heads, -1).permute(0, 2, 1, 3) for x in (q, k, v))
        maps = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)                  # (B, heads, Q, K)
        edited, R = maps.clone(), len(self.source)
        for first in range(0, len(q) if self.both_halves else 1, R):
            for row, source in enumerate(self.source):
                own, base = maps[first + row], maps[first + source]
                if row == source:
                    continue
                if is_cross and self.edit is not None:
                    alpha = self.alpha[self.step, row]
                    edited[first + row] = self.edit(row, base, own) * alpha + own * (1 - alpha)
                elif not is_cross and self.self_on[self.step, row] and q.shape[2] <= self.most_pixels:
                    edited[first + row] = base
        if is_cross:
            self.cross_maps.append(edited[:R])
        return (edited @ v).permute(0, 2, 1, 3).flatten(2)


def interval(bound, count):
    first, last = bound if isinstance(bound, tuple) else (0, bound)
    return slice(int(first * count), int(last * count))


def textbook(tokenizer, prompts, num_steps, mode="refine", cross_replace_steps=0.8, self_replace_steps=0.4, equalizer=None, source=None,
             most_pixels=256, **_):
    """What the original makes of the arguments of `prompt_to_prompt`; lists go with the prompts."""
    R, M = len(prompts), tokenizer.config.context_length
    source = source or [0] * R
    alpha, self_on, factors = torch.zeros(num_steps + 1, R, M), torch.zeros(num_steps, R, dtype=torch.bool), torch.ones(R, M)
    for row, prompt in enumerate(prompts):
        def tokens(word):
            return [p for w, at in zip(prompt.split(" "), word_positions(prompt, tokenizer)) if w == word for p in at]

        cross, self_ = (x[row] if isinstance(x, list) else x for x in (cross_replace_steps, self_replace_steps))
        cross = dict(cross) if isinstance(cross, dict) else {"default_": cross}
        alpha[interval(cross.pop("default_", 1.0), num_steps + 1), row] = 1
        for word, bound in cross.items():
            alpha[:, row, tokens(word)] = 0
            alpha[interval(bound, num_steps + 1), row, tokens(word)] = 1
        self_on[interval(self_, num_steps), row] = True
        for word, factor in (equalizer or {}).items():
            factors[row, tokens(word)] = factor

    def edit(row, base, own):
        pair = prompts[source[row]], prompts[row], tokenizer
        if mode == "replace":
            base = torch.einsum("hpw,wn->hpn", base, slow_replacement(*pair).to(base.dtype))
        elif mode == "refine":
            indices, alphas = slow_refinement(*pair)
            base = base[..., indices] * alphas + own * (1 - alphas)
        return base * factors[row]

    return Textbook(source, self_on, edit, alpha, most_pixels)


def published_generator(source, shares, num_steps):
    """Every self-attention map in both halves, while p > i / (steps - 1)."""
    on = torch.tensor([[p > i / (num_steps - 1) for p in shares] for i in range(num_steps)])
    return Textbook(source, on, both_halves=True)


# ---- LocalBlend

class SlowBlend:
    """Averages stored maps of the layers with so many pixels over heads and layers, sums them over steps, and pastes."""

    def __init__(self, tokenizer, prompts, source, height, width, scale, words=None, subtract=None, threshold=0.3, start=0.0, *, num_steps):
        self.shape, self.scale, self.threshold, self.start = (height, width), scale, threshold, int(start * num_steps)
        self.source, self.maps, self.steps = source, 0, 0
        self.marks, self.less = (chosen and [[p for word, at in zip(prompt.split(" "), word_positions(prompt, tokenizer))
                                              if word in wanted.split(" ") for p in at] for prompt, wanted in zip(prompts, chosen)]
                                 for chosen in (words, subtract))
        if words is None:                                                                # what has no counterpart in the other prompt
            self.marks = [sorted({p for a, b in zip(source, range(len(prompts))) for old, new in ((a, b), (b, a)) if new == row
                                  for p in (slow_refinement(prompts[old], prompts[new], tokenizer)[1] == 0).nonzero()[:, 0].tolist()})
                          for row in range(len(prompts))]

    def mask(self, marks, pool):
        rows = []
        for maps, tokens in zip(self.maps, marks):
            m = maps[:, tokens].sum(1).reshape(self.shape[0] // self.scale, self.shape[1] // self.scale)
            if pool:
                around = F.pad(m, (1, 1, 1, 1), value=-torch.inf)
                m = torch.stack([around[dy:dy + len(m), dx:dx + m.shape[1]] for dy in range(3) for dx in range(3)]).amax(0)
            m = m.repeat_interleave(self.scale, 0).repeat_interleave(self.scale, 1)
            rows.append(m / m.max() > self.threshold)
        return torch.stack([a | rows[s] for a, s in zip(rows, self.source)])[:, None]

    def __call__(self, x, cross_maps):
        pixels = self.shape[0] * self.shape[1] // self.scale ** 2
        layers = [maps.mean(1) for maps in cross_maps if maps.shape[2] == pixels]         # (R, pixels, tokens)
        assert layers
        self.maps, self.steps = self.maps + torch.stack(layers).mean(0), self.steps + 1
        if self.steps <= self.start:
            return x
        mask = self.mask(self.marks, pool=True)
        if self.less:
            mask = mask & ~self.mask(self.less, pool=False)
        base = x[self.source]
        return base + mask * (x - base)


# ---- a UNet to control

@torch.no_grad()
def make_unet(levels=(True, True), context_dim=24, heads=2, in_channels=4):
    """Random weights, with attention that is sharp and that matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(UNetConfig(in_channels=in_channels, model_channels=32, channel_mult=(1, 2, 2)[:len(levels)], num_res_blocks=1,
                               attention_levels=levels, context_dim=context_dim, num_heads=heads, norm_groups=8)).eval()
    for name, weight in unet.named_parameters():
        if "to_q" in name or "to_k" in name or "to_out" in name:
            weight *= 3
    return unet.requires_grad_(False)


UNET = cache(make_unet)
