"""Prompt-to-Prompt (Hertz et al. 2022, arXiv:2208.01626): pictures of two prompts that agree where the prompts do.

The picture of a target prompt borrows attention maps M_s from that of its source, drawn beside it from the same noise.
Every control is linear in the maps, so it acts on the values V, by ordinary fused attention, and no map is ever stored:

    replace      M_s R V                       R (source tokens x target tokens): `replacement_mapper`
    refine       M_s A V + M_t diag(1 - a) V   A[i, j] = a_j where target token j aligns with i: `refinement_mapper`
    reweight     token j's share of either, times c_j
    blend        token by token, alpha_j of the above and 1 - alpha_j of the target's own M_t, by the step
    self         M_s V, that is attention(q_source, k_source, v_target)
    a word's map, for LocalBlend: attention to values that are 1 at the word's tokens and 0 elsewhere

InstructPix2Pix's own generator shares self-attention alone, in the unconditional halves too: `share_self_attention`.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attend
from .text import Tokenizer
from .word_alignment import refinement_mapper, replacement_mapper, word_tokens

# ---- what is borrowed, and when


@dataclass(frozen=True)
class LocalBlend:
    """Confine the edit to where certain words are: elsewhere the target's latents become its source's, after every step.

    words: for each prompt, the word or words whose maps count, its source's among them; None: what a prompt and its source
    do not have in common (`refinement_mapper`). The maps are averaged over heads, summed over layers and steps so far,
    widened by 3 x 3 and divided by their maximum; they count above `threshold`, in the source or in the target. subtract:
    words whose places are left out, by their maps without widening. start: from this share of the steps on.
    """
    words: tuple[str, ...] | None = None
    subtract: tuple[str, ...] | None = None
    threshold: float = 0.3
    start: float = 0.0


@dataclass(frozen=True)
class AttentionControl:
    """What each of R prompts, drawn as one batch in T steps, borrows from its source. Fractions of steps are in [0, 1].

    source: (R,) int64, the row that a row borrows from; its own number if it is a source.
    self_steps: (T, R) bool, when it takes its source's self-attention.
    from_source: (R, M, M) and own: (R, M): its new map of token j is sum_i M_s[i] from_source[i, j] + M_t[j] own[j];
    cross_steps: (T, R, M), the share (alpha) of the new map in each token's. All three None: cross-attention stays as it is.
    self_side: self-attention is borrowed in layers of up to this many by as many pixels, and of more in proportion where
    latents are larger than 64 x 64; None: in all. unconditional: whether the unconditional prediction borrows too.
    blend: keeps the change to where words are; blend_tokens: 1 at these words' tokens, (R, M), and at those of the words
    that it subtracts, if any.
    """
    source: Tensor
    self_steps: Tensor
    from_source: Tensor | None = None
    own: Tensor | None = None
    cross_steps: Tensor | None = None
    self_side: int | None = None
    unconditional: bool = False
    blend: LocalBlend | None = None
    blend_tokens: tuple[Tensor, Tensor | None] = (None, None)


def share_self_attention(source: Sequence[int], shares: Sequence[float], num_steps: int) -> AttentionControl:
    """InstructPix2Pix's own control: all self-attention from the source while share > i / (num_steps - 1), i = 0, 1, ...

    source: the row that each row borrows from. shares: one for each row. arXiv:2211.09800, Sec. 3.1.2, where they are
    drawn from U(0.1, 0.9) and called p.
    """
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"shares of the steps must be in 0..1, got {list(shares)}")
    done = torch.arange(num_steps) / max(1, num_steps - 1)
    return AttentionControl(torch.tensor(source), done[:, None] < torch.tensor(shares)[None], unconditional=True)


def prompt_to_prompt(tokenizer: Tokenizer, prompts: Sequence[str], num_steps: int, *, mode: str = "refine",
                     cross_replace_steps=0.8, self_replace_steps=0.4, equalizer: dict[str, float] | None = None,
                     local_blend: LocalBlend | None = None, source: Sequence[int] | None = None,
                     self_side: int | None = 16) -> AttentionControl:
    """Prompt-to-Prompt's controls, in any combination.

    prompts: R of them, the first the source of all others unless `source` names each one's.
    mode: "replace" (words stand for words), "refine" (words are added), or "reweight" (prompts are alike).
    cross_replace_steps: the share of the steps, from the first, in which the source's maps are used; or (from, to); or
    a dict of these by word of the target, "default_" for all others. self_replace_steps: a share or (from, to), of
    self-attention. Either may be a list with an entry for each prompt. As published, the former counts num_steps + 1.
    equalizer: factors on the maps of words of the target, such as {"snowy": 3, "crowd": -1}.
    self_side: 16 as published, 32 in null-text inversion: see `AttentionControl`.
    Raises ValueError for an unknown mode, a share outside [0, 1], or a word that no target has.
    """
    if mode not in ("replace", "refine", "reweight"):
        raise ValueError(f"mode must be replace, refine or reweight, got {mode!r}")
    R, M, T = len(prompts), tokenizer.config.context_length, num_steps
    source = [0] * R if source is None else list(source)
    crossing = cross_replace_steps if isinstance(cross_replace_steps, list) else [cross_replace_steps] * R
    sharing = self_replace_steps if isinstance(self_replace_steps, list) else [self_replace_steps] * R
    if any(len(x) != R for x in (source, crossing, sharing)) or not all(0 <= s < R for s in source):
        raise ValueError(f"source and lists of steps need an entry for each of {R} prompts, sources in 0..{R - 1}")
    from_source, own, cross_steps = torch.zeros(R, M, M), torch.ones(R, M), torch.zeros(T, R, M)
    self_steps = torch.zeros(T, R, dtype=torch.bool)
    targets = [r for r in range(R) if source[r] != r]
    for r in targets:
        a, b = prompts[source[r]], prompts[r]
        if mode == "refine":
            indices, alphas = refinement_mapper(a, b, tokenizer)
            from_source[r, indices, torch.arange(M)], own[r] = alphas, 1 - alphas
        elif mode == "replace":
            mapper, new = replacement_mapper(a, b, tokenizer)
            from_source[r], own[r] = mapper, new.float()
        else:
            from_source[r], own[r] = torch.eye(M), 0
        for word, factor in (equalizer or {}).items():
            tokens = word_tokens(b, word, tokenizer)
            from_source[r, :, tokens] *= factor
            own[r, tokens] *= factor
        bounds = crossing[r] if isinstance(crossing[r], dict) else {"default_": crossing[r]}
        for word, bound in {"default_": (0, 1), **bounds}.items():                # the default first, which words override
            tokens = list(range(M)) if word == "default_" else word_tokens(b, word, tokenizer)
            begin, end = _interval(bound, T + 1)
            cross_steps[:, r, tokens] = 0
            cross_steps[begin:end, r, tokens] = 1
        begin, end = _interval(sharing[r], T)
        self_steps[begin:end, r] = True
    named = [*(equalizer or {})]
    for bounds in crossing:
        if isinstance(bounds, dict):
            named += [word for word in bounds if word != "default_"]
    for word in named:
        if not any(word_tokens(prompts[r], word, tokenizer) for r in targets):
            raise ValueError(f"no edited prompt has the word {word!r}: {'; '.join(prompts[r] for r in targets)}")
    return AttentionControl(torch.tensor(source), self_steps, from_source, own, cross_steps, self_side, blend=local_blend,
                            blend_tokens=_blend_tokens(local_blend, prompts, source, tokenizer) if local_blend else (None, None))


CONTROLS = ("self-attention", "cross-attention", "local-blend")


def control_pairs(tokenizer: Tokenizer, captions: Sequence[str], edited_captions: Sequence[str], shares: Sequence[float],
                  num_steps: int, kind: str = "self-attention") -> AttentionControl:
    """The control for B captions and their B edited captions, drawn as one batch: each edited one borrows from its caption.

    kind: one of `CONTROLS`: "self-attention", the published generator's: the share of the steps is its p; "cross-attention",
    Prompt-to-Prompt's refinement for that share of the steps, with self-attention for half of it; "local-blend", the same with
    the change kept to where the words are that differ, from a fifth of the steps on, as in null-text inversion. ValueError for
    another kind or a share outside [0, 1].
    """
    if kind not in CONTROLS:
        raise ValueError(f"control must be one of {', '.join(CONTROLS)}, got {kind!r}")
    source, shares = list(range(len(captions))) * 2, list(shares) * 2
    if kind == "self-attention":
        return share_self_attention(source, shares, num_steps)
    return prompt_to_prompt(tokenizer, [*captions, *edited_captions], num_steps, cross_replace_steps=shares,
                            self_replace_steps=[share / 2 for share in shares], source=source,
                            local_blend=LocalBlend(start=0.2) if kind == "local-blend" else None)


def _interval(bound, count):
    """(first, end) of `count` steps, of a share or a pair of shares."""
    begin, end = bound if isinstance(bound, (tuple, list)) else (0, bound)
    if not 0 <= begin <= end <= 1:
        raise ValueError(f"shares of the steps must be in 0..1, the first no greater than the second, got {bound}")
    return int(begin * count), int(end * count)


def _blend_tokens(blend, prompts, source, tokenizer):
    def marked(words):
        words = [words] * len(prompts) if isinstance(words, str) else words
        if len(words) != len(prompts):
            raise ValueError(f"LocalBlend needs words for each of {len(prompts)} prompts, got {len(words)}")
        marks = torch.zeros(len(prompts), tokenizer.config.context_length)
        for row, prompt, word in zip(marks, prompts, words):
            tokens = word_tokens(prompt, word, tokenizer)
            if not tokens:
                raise ValueError(f"LocalBlend: {word!r} is not in the prompt {prompt!r}")
            row[tokens] = 1
        return marks

    words = _differences(prompts, source, tokenizer) if blend.words is None else marked(blend.words)
    return words, None if blend.subtract is None else marked(blend.subtract)


def _differences(prompts, source, tokenizer):
    """(R, M), 1 at the tokens that a prompt lacks of its source, and at those that its source lacks."""
    marks = torch.zeros(len(prompts), tokenizer.config.context_length)
    for r, s in enumerate(source):
        for a, b in ((s, r), (r, s)):
            marks[b] = torch.maximum(marks[b], 1 - refinement_mapper(prompts[a], prompts[b], tokenizer)[1])
    return marks


# ---- at work


class ControlledRun:
    """An `AttentionControl` on its way through one run of a sampler: called in the place of `attend` by every attention
    layer, and once after each step. The batch holds the R prompts, conditional first, once a branch of guidance."""

    def __init__(self, control: AttentionControl, height: int, width: int, device="cpu"):
        """height, width: of the latents."""
        self.control, self.height, self.width, self.device = control, height, width, device
        self.source, self.step = control.source.to(device), -1
        self.blend_tokens = [tokens if tokens is None else tokens.to(device) for tokens in control.blend_tokens]
        self.most_pixels = float("inf")
        if control.self_side is not None:
            self.most_pixels = control.self_side ** 2 * max(1, height * width / 64 ** 2)
        # LocalBlend reads maps at a quarter of the latents' side, 16 x 16 in the original; for small latents, at a half or all.
        side = max(height, width)
        self.blend_pixels = height * width // (4 if side >= 64 else 2 if side >= 32 else 1) ** 2
        self.maps = [0, 0]                                         # of the blend's words, and of those it subtracts

    def predicting(self, predict):
        """`predict(x, t, context)`, controlled: each call is the next step."""
        def controlled(x, t, context):
            self._begin_step(branches=len(x) // len(self.control.source))
            return predict(x, t, context, self)
        return controlled

    def _begin_step(self, branches):
        self.step += 1
        if self.step == 0:                                         # all is on the device before the first: no step waits for it
            self.plans = [self._plan(i, branches) for i in range(len(self.control.self_steps))]
        self.self_rows, self.crossing = self.plans[self.step]

    def _plan(self, i, branches):
        """For step i: whose queries and keys each row uses in self-attention, and what `_cross` needs; None for its own."""
        c, R = self.control, len(self.control.source)
        own, crossing = torch.arange(R), None
        borrowed = torch.where(c.self_steps[i], c.source, own)
        self_rows = torch.cat([R * branch + (borrowed if branch == 0 or c.unconditional else own) for branch in range(branches)])
        self_rows = None if torch.equal(self_rows, torch.arange(R * branches)) else self_rows.to(self.device)
        if c.cross_steps is not None and (alpha := c.cross_steps[i]).any():
            rows = alpha.any(1).nonzero()[:, 0]
            own = torch.ones(R * branches, alpha.shape[1])
            own[:R] = c.own * alpha + 1 - alpha
            from_source = c.from_source[rows] * alpha[rows, None]
            crossing = [x.to(self.device) for x in (rows, c.source[rows], from_source, own[:, :, None])]
        return self_rows, crossing

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, is_cross: bool) -> Tensor:
        """Attention under the control of this step; shapes as in `attend`."""
        if not is_cross:
            if self.self_rows is None or q.shape[1] > self.most_pixels:
                return attend(q, k, v, heads)
            return attend(q[self.self_rows], k[self.self_rows], v, heads)
        if self.control.blend and q.shape[1] == self.blend_pixels:
            self._look_at_words(q, k, heads)
        return self._cross(q, k, v, heads)

    def _cross(self, q, k, v, heads):
        if self.crossing is None:
            return attend(q, k, v, heads)
        rows, source, from_source, own = self.crossing
        out = attend(q, k, v * own.to(v.dtype), heads)                                      # M_t diag(own) V
        borrowed = attend(q[source], k[source], from_source.to(v.dtype) @ v[rows], heads)   # M_s (from_source V)
        return out.index_add(0, rows, borrowed)

    def _look_at_words(self, q, k, heads):
        """Add the words' maps, averaged over heads, to those so far: (R, pixels)."""
        for i, tokens in enumerate(self.blend_tokens):
            if tokens is not None:
                indicator = torch.zeros_like(k)                    # 1 at the words: every channel becomes its head's map of them
                indicator[:len(tokens)] = tokens.to(k)[:, :, None]
                self.maps[i] = self.maps[i] + self._cross(q, k, indicator, heads)[:len(tokens)].float().mean(2)

    def after_step(self, x: Tensor) -> Tensor:
        """The latents of a step, (R, z, h, w), as LocalBlend leaves them."""
        if self.control.blend is None or self.step < int(self.control.blend.start * len(self.control.self_steps)):
            return x
        if not torch.is_tensor(self.maps[0]):
            raise ValueError(f"LocalBlend needs cross-attention on {self.blend_pixels} pixels, and this UNet has none")
        mask = self._mask(self.maps[0], widen=True)
        if self.control.blend.subtract is not None:
            mask = mask & ~self._mask(self.maps[1], widen=False)
        return torch.where(mask, x, x[self.source])

    def _mask(self, maps, widen):
        """Where the words are, in the source's picture or in the target's: (R, 1, height, width) bool."""
        scale = round((self.height * self.width / self.blend_pixels) ** 0.5)
        maps = maps.unflatten(1, (self.height // scale, self.width // scale))[:, None]
        if widen:
            maps = F.max_pool2d(maps, 3, stride=1, padding=1)
        maps = F.interpolate(maps, (self.height, self.width))
        mask = maps > self.control.blend.threshold * maps.amax((2, 3), keepdim=True)
        return mask | mask[self.source]
