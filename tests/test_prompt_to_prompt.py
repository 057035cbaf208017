"""Prompt-to-Prompt on the values, against the published way: every attention map made, edited, and multiplied with the values.

The references below are slow and plain. They know prompts of clean words with single spaces, as the original does.
"""
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ip2p import InstructPix2Pix
from ip2p.attention import attend
from ip2p.checkpoint import Parts
from ip2p.images import to_images
from ip2p.prompt_to_prompt import (ControlledRun, LocalBlend, prompt_to_prompt, refinement_mapper,
                                   replacement_mapper, share_self_attention, word_tokens)
from ip2p.samplers import ddim_step, ddim_steps
from ip2p.text import TextConfig, TextEncoder, Tokenizer
from ip2p.unet import UNet, UNetConfig
from ip2p.vae import AutoencoderKL, VAEConfig

TOKENIZERS = {"CLIP": cache(Tokenizer),
              "miniature": cache(lambda: Tokenizer(TextConfig(vocab_size=2 * 256 + 2 + 2048, context_length=32)))}


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture
def clip():
    return TOKENIZERS["CLIP"]()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(x, reference):
    return ((x - reference).norm() / reference.norm()).item()


# ---- the mappers, as published

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


SAME_COUNT = [                                        # pairs of as many words
    ("a cat", "a cat"),
    ("a cat", "a dog"),
    ("a photo of lasagne on a table", "a photo of pizza on a table"),
    ("a photo of pizza on a table", "a photo of lasagne on a table"),
    ("a hippopotamus in a cathedral", "a squirrel in a castle"),
    ("a squirrel in a castle", "a hippopotamus in a cathedral"),
    ("lasagne and a cat", "pizza and a dog"),
    ("pizza", "lasagne"),
    ("lasagne", "pizza"),
    ("a tyrannosaurus eats cappuccino", "a fox eats lasagne"),
    ("a tyrannosaurus eats cappuccino", "the fox likes pizza"),
    ("the fox likes pizza", "a tyrannosaurus eats cappuccino"),
    ("a marshmallow and a lollipop", "a lollipop and a marshmallow"),
    ("a Cat on a mat", "a cat on a mat"),
    ("A photo of a House", "a painting of a house"),
    ("a cat, a dog", "a fox, a tyrannosaurus"),
    ("a cat, a dog", "a cat a dog"),
    ("a cat a dog.", "a cat, a dog"),
    ("a 1920s car", "a 2050 car"),
    ("a van-gogh painting", "a stormtrooper painting"),
    ("two red cubes beside three green cones", "three green cones beside two red cubes"),
    ("a silly-looking cat", "a 3D cat"),
]
OTHER_COUNT = [
    ("a cat", "a fluffy cat"),
    ("a fluffy cat", "a cat"),
    ("a photo of a house on a mountain", "a photo of a house on a mountain at fall"),
    ("a photo of a house", "a watercolour of a big old house in winter"),
    ("a cat", "a a cat"),
    ("a cat cat", "cat a cat a cat"),
    ("", "a cat"),
    ("a cat", ""),
    ("", ""),
    ("a red car", "blue lasagne"),
    ("cappuccino", "a cup of cappuccino with a marshmallow"),
    ("a fox, a dog and a squirrel", "A squirrel, a fox and a tyrannosaurus."),
]


def random_pairs(count, same_count, seed):
    """Sentences of easy and hard words with some replaced, and with some added or dropped unless `same_count`."""
    rng = np.random.default_rng(seed)
    words = ("a the cat dog fox red tiny on of and lasagne hippopotamus cappuccino cathedral snowy squirrel crowd lion pizza "
             "it's well-lit Lego 42 sky, robot.").split()
    for _ in range(count):
        source = list(rng.choice(words, rng.integers(1, 7)))
        target = [rng.choice(words) if rng.random() < 0.4 else word for word in source]
        if not same_count:
            target = [w for word in target for w in ([word], [word, rng.choice(words)], [])[rng.choice(3, p=[0.6, 0.2, 0.2])]]
        yield " ".join(source), " ".join(target)


def fits(tokenizer, *prompts):
    """Whether the original is defined for them."""
    return all(len(tokenizer.encode(prompt)) + 2 <= tokenizer.config.context_length for prompt in prompts)


def test_replacement_equals_the_slow_walk(tokenizer):
    for source, target in [*SAME_COUNT, *random_pairs(150, True, seed=0)]:
        if fits(tokenizer, source, target):
            mapper = replacement_mapper(source, target, tokenizer)
            assert torch.equal(mapper, slow_replacement(source, target, tokenizer)), (source, target)


def test_refinement_equals_the_slow_recursion(tokenizer):
    for source, target in [*SAME_COUNT, *OTHER_COUNT, *random_pairs(60, True, seed=1), *random_pairs(60, False, seed=2)]:
        if fits(tokenizer, source, target):
            (indices, alphas), expected = refinement_mapper(source, target, tokenizer), slow_refinement(source, target, tokenizer)
            assert indices.dtype == torch.int64 and torch.equal(indices, expected[0]), (source, target)
            assert torch.equal(alphas, expected[1]), (source, target)


def by_hand(tokenizer, diagonal, **shares):
    """A mapper with ones where `diagonal` says, {target: source}, and `shares` by "i_j": weight."""
    mapper = torch.zeros(tokenizer.config.context_length, tokenizer.config.context_length)
    for j, i in diagonal.items():
        mapper[i, j] = 1
    for place, weight in shares.items():
        i, j = map(int, place[1:].split("_"))
        mapper[i, j] = weight
    return mapper


def test_replacement_by_hand(clip):
    """CLIP reads lasagne as two tokens and hippopotamus as three; pizza, cat and dog are one each. Behind the last change
    each position maps to itself, and it ends when the source's tokens do: the last column stays empty where it is longer."""
    def expected(first, **shares):
        return by_hand(clip, first, **shares)

    assert torch.equal(replacement_mapper("a cat", "a cat", clip), torch.eye(77))
    assert torch.equal(replacement_mapper("a cat", "a dog", clip), torch.eye(77))
    rest = {j: j for j in range(77)}
    one_to_two = {j: i for j, i in rest.items() if j not in (2, 3)}
    assert torch.equal(replacement_mapper("a pizza here", "a lasagne here", clip), expected(one_to_two, _2_2=0.5, _2_3=0.5))
    two_to_one = {j: i for j, i in rest.items() if j not in (2, 76)}
    assert torch.equal(replacement_mapper("a lasagne here", "a pizza here", clip), expected(two_to_one, _2_2=1, _3_2=1))
    both = {0: 0, 2: 3, 3: 4, 4: 5, **{j: j for j in range(5, 76)}}              # "and", "a", "dog" of "pizza and a dog"
    assert torch.equal(replacement_mapper("lasagne and a cat", "pizza and a dog", clip), expected(both, _1_1=1, _2_1=1))
    third = {0: 0, 1: 1, **{j: j for j in range(5, 77)}}
    assert torch.equal(replacement_mapper("a lasagne", "a hippopotamus", clip),
                       expected(third, **{f"_{i}_{j}": 1 / 3 for i in (2, 3) for j in (2, 3, 4)}))


@pytest.mark.parametrize("source, target, first", [
    ("a cat", "a fluffy cat", [0, 1, -1, 2, 3]),
    ("a fluffy cat", "a cat", [0, 1, 3, 4]),
    ("a red car", "a blue car", [0, 1, -1, 3, 4]),
    ("a cat", "a a cat", [0, 1, -1, 2, 3]),              # the later of two equal words is the new one
    ("a cat", "lasagne", [0, -1, -1, 3]),
    ("", "a cat", [0, -1, -1, 1]),
    ("a lasagne", "a big lasagne.", [0, 1, -1, 2, 3, -1, 4])])
def test_refinement_by_hand(clip, source, target, first):
    indices, alphas = refinement_mapper(source, target, clip)
    assert indices.tolist() == first + list(range(len(first), 77))
    assert alphas.tolist() == [float(i != -1) for i in first] + [1.0] * (77 - len(first))


@pytest.mark.parametrize("source, target, diagonal, shares", [
    ("a cat", "a big red cat", {0: 0, 1: 1, 4: 2, 5: 3}, {}),                           # start, a, cat, end
    ("a big red cat", "a cat", {0: 0, 1: 1, 2: 4, 3: 5}, {}),
    ("a red cat sits", "a red dog sits here", {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 6: 5}, {}),
    ("A cat, sits", "a cat, sits here", {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 6: 5}, {}),
    ("CAT here", "a cat  here", {0: 0, 2: 1, 3: 2, 4: 3}, {}),
    ("lasagne sits", "a pizza sits", {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}, {}),                # two tokens by two
    ("pizza sits", "a lasagne sits", {0: 0, 4: 2, 5: 3}, {f"_1_{j}": 1 / 3 for j in (1, 2, 3)}),
    ("", "a cat", {0: 0, 3: 1}, {}),
    ("a cat", "", {0: 0, 1: 3}, {}),
    ("", "", {0: 0, 1: 1}, {})])
def test_replacement_of_prompts_of_different_length_by_hand(clip, source, target, diagonal, shares):
    """What the original refuses: words are matched, whatever their case; a new word has no counterpart; the end keeps to
    the end, and the padding to the padding."""
    mapper = replacement_mapper(source, target, clip)
    end = len(clip.encode(target)) + 2
    assert torch.equal(mapper[:, :end], by_hand(clip, diagonal, **shares)[:, :end])
    padding = mapper[:, end:]
    assert (padding.sum(0) == 1).all() and (padding.argmax(0) >= len(clip.encode(source)) + 2).all()


def words_of(count):
    """So many different words, one CLIP token each."""
    return [f"{a} {b}" for a, b in product("red blue green big old tiny wet dry hot cold".split(), "cat dog fox car".split())][:count]


@pytest.mark.parametrize("source, target", [("x" * 400, "a cat"), ("a cat", "x" * 400), ("cat " * 100, "dog " * 90),
                                            ("cat " * 100, "lasagne " * 100), ("lasagne " * 100, "cat " * 100), ("", "cat " * 100),
                                            ("cat " * 100, ""), ("日本 naïve café 🦊", "the cat"), ("\t\n", "a cat\n\tsits ")])
def test_any_prompts_give_sensible_maps(tokenizer, source, target):
    M = tokenizer.config.context_length
    mapper, (indices, alphas) = replacement_mapper(source, target, tokenizer), refinement_mapper(source, target, tokenizer)
    assert mapper.shape == (M, M) and ((0 <= mapper) & (mapper <= 1)).all() and mapper[0, 0] == 1
    assert (mapper.sum(1) <= M).all() and indices[0] == 0
    assert indices.shape == (M,) and ((-1 <= indices) & (indices < M)).all() and torch.equal(alphas, (indices >= 0).float())
    ids = tokenizer([source, target])
    end = min(len(tokenizer.encode(target)) + 2, M)
    for j in range(end):
        assert indices[j] == -1 or ids[0, indices[j]] == ids[1, j]


def test_words_keep_their_maps_in_prompts_beyond_the_context(clip):
    """80 different tokens; a word added at the front shifts each by one, a word replaced shifts none."""
    source = " ".join(words_of(40))
    ids, longer = clip([source, "new " + source])
    assert torch.equal(replacement_mapper(source, source, clip), torch.eye(77))
    assert torch.equal(replacement_mapper(source, source.replace("red cat", "old cat"), clip), torch.eye(77))
    indices, _ = refinement_mapper(source, "new " + source, clip)
    assert indices[:3].tolist() == [0, -1, 1] and torch.equal(ids[indices[2:76]], longer[2:76])
    mapper = replacement_mapper(source, "new " + source, clip)
    assert mapper[:, 1].sum() == 0, "the new word has a counterpart"
    assert (mapper[:, 2:76].sum(0) == 1).all() and torch.equal(ids[mapper[:, 2:76].argmax(0)], longer[2:76])


@pytest.mark.parametrize("prompt, words, positions", [
    ("a cat on a mat", "cat", [2]), ("a cat on a mat", "a", [1, 4]), ("a lasagne here", "lasagne", [2, 3]),
    ("A Cat on a mat", "cat", [2]), ("a cat on a mat", "CAT", [2]), ("a cat on a mat", "mat", [5]),
    ("a red cat and a red dog", "red cat", [2, 3]), ("a red cat", "cat red", []), ("a cattle", "cat", []), ("a cat", "", []),
    ("", "cat", []), ("  a   cat ", "cat", [2]), ("cat " * 100, "cat", list(range(1, 76)))])
def test_word_tokens_by_hand(clip, prompt, words, positions):
    assert word_tokens(prompt, words, clip) == positions


def test_words_are_found_beside_punctuation(clip):
    """The comma is the third token of "a cat, here.", the dot the fifth."""
    assert 2 in word_tokens("a cat, here.", "cat", clip) and 4 in word_tokens("a cat, here.", "here", clip)
    assert set(word_tokens("a cat, here.", "cat", clip)) <= {2, 3} and word_tokens("a (cat) here", "here", clip) == [5]


# ---- the controls, as published

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
T = 5
CASES = {
    "replace": dict(prompts=["a photo of lasagne on a table", "a photo of pizza on a table"], mode="replace"),
    "replace, one token by many": dict(prompts=["a pizza and a cat", "a hippopotamus and a squirrel"], mode="replace"),
    "refine": dict(prompts=["a cat sits", "a fluffy cat sits here"]),
    "refine that drops and swaps": dict(prompts=["a fluffy cat sits here", "a dog sits"], cross_replace_steps=0.5),
    "reweight": dict(prompts=["a snowy crowd on a street"] * 2, mode="reweight", equalizer={"snowy": 3, "crowd": -1}),
    "replace and reweight": dict(prompts=["a pizza on a table", "a lasagne on a table"], mode="replace", equalizer={"lasagne": 4}),
    "refine and reweight": dict(prompts=["a cat sits", "a fluffy cat sits"], equalizer={"fluffy": 5, "cat": -2}),
    "per-word steps": dict(prompts=["a squirrel eats a burger", "a lion eats a lasagne"], mode="replace",
                           cross_replace_steps={"default_": 1.0, "lion": 0.4, "lasagne": (0.2, 0.6)}),
    "per-word steps, no default": dict(prompts=["a cat sits", "a fluffy cat sits"], cross_replace_steps={"cat": 0.3}),
    "a word that comes late": dict(prompts=["a cat sits", "a dog sits"], mode="replace",
                                   cross_replace_steps={"dog": (0.5, 1), "default_": 0.3}, equalizer={"sits": 2}),
    "intervals": dict(prompts=["a cat sits", "a dog sits"], mode="replace", cross_replace_steps=(0.3, 0.7), self_replace_steps=(0.2, 0.8)),
    "self alone": dict(prompts=["a cat sits", "a dog sits"], mode="replace", cross_replace_steps=0.0, self_replace_steps=0.6),
    "self in small layers": dict(prompts=["a cat", "a dog"], cross_replace_steps=0, self_replace_steps=1, self_side=8, most_pixels=64),
    "cross alone": dict(prompts=["a cat sits", "a dog sits"], cross_replace_steps=1, self_replace_steps=0),
    "three targets": dict(prompts=["a cat sits", "a dog sits", "a fluffy cat sits", "a cat eats lasagne"], equalizer={"cat": 2},
                          cross_replace_steps=[0, 0.3, {"default_": 0.9, "cat": 0.5}, (0.2, 1)], self_replace_steps=[0, 0.2, 0.7, 0.0]),
    "three targets, replaced": dict(prompts=["a cat eats pizza", "a dog eats pizza", "a cat eats lasagne", "the cat likes rice"],
                                    mode="replace"),
    "two sources": dict(prompts=["a cat sits", "a hippopotamus", "a dog sits", "a big hippopotamus"], source=[0, 1, 0, 1],
                        cross_replace_steps=[0, 0, 0.4, 0.9], self_replace_steps=[0, 0, 0.8, 0.3]),
    "sources behind targets": dict(prompts=["a dog sits", "a cat sits", "a tiny cat", "a cat"], source=[1, 1, 3, 3], equalizer={"a": 2}),
}


def compare(unet, control, book, height, width, branches=2, tolerance=1e-5):
    """Runs both over all steps, each from fresh latents. Returns in which steps the control mattered."""
    R, M = len(book.source), 77 if control.own is None else control.own.shape[1]
    run = ControlledRun(control, height, width)
    predict = run.predicting(unet)
    context = noise(R * branches, M, unet.config.context_dim, seed=99)
    mattered = []
    for step in range(len(control.self_steps)):
        book.step = step
        x, t = noise(R * branches, 4, height, width, seed=step), torch.full((R * branches,), 900 - 100 * step)
        ours, theirs, plain = predict(x, t, context), unet(x, t, context, book), unet(x, t, context)
        assert relative_error(ours, theirs) < tolerance, step
        mattered.append(relative_error(theirs, plain) > 1e-3)
    return mattered


@pytest.mark.parametrize("case", CASES)
def test_controls_equal_edited_maps(case, tokenizer):
    case = CASES[case]
    control = prompt_to_prompt(tokenizer, num_steps=T, **{k: v for k, v in case.items() if k != "most_pixels"})
    book = textbook(tokenizer, num_steps=T, **case)
    mattered = compare(UNET(), control, book, 8, 12)
    targets = [row for row, source in enumerate(book.source) if row != source]
    expected = (book.self_on[:, targets].any(1) | book.alpha[:T, targets].flatten(1).any(1)).tolist()
    assert mattered == expected and any(mattered)


def test_controls_equal_edited_maps_without_guidance_and_at_other_sizes(clip):
    for case, height, width, branches in [("replace", 8, 8, 1), ("two sources", 12, 8, 1), ("replace and reweight", 16, 24, 2)]:
        assert any(compare(UNET(), prompt_to_prompt(clip, num_steps=T, **CASES[case]), textbook(clip, num_steps=T, **CASES[case]),
                           height, width, branches))


def published_generator(source, shares, num_steps):
    """Every self-attention map in both halves, while p > i / (steps - 1)."""
    on = torch.tensor([[p > i / (num_steps - 1) for p in shares] for i in range(num_steps)])
    return Textbook(source, on, both_halves=True)


def test_shared_self_attention_equals_copied_maps():
    for source, shares in [([0, 0], [0.4, 0.4]), ([0, 1, 0, 1], [0.1, 0.9, 0.1, 0.9]), ([0, 0, 0], [0.0, 1.0, 0.2])]:
        mattered = compare(UNET(), share_self_attention(source, shares, T), published_generator(source, shares, T), 8, 12)
        assert mattered == [max(shares) > i / (T - 1) for i in range(T)]


def test_the_unconditional_half_is_left_alone(clip):
    """But for InstructPix2Pix's own control."""
    R, unet, x, context = 2, UNET(), noise(4, 4, 8, 8), noise(4, 77, 24)
    t = torch.full((4,), 500)
    plain = unet(x, t, context)
    for control, shared in [(prompt_to_prompt(clip, ["a cat", "a dog"], 3), False), (share_self_attention([0, 0], [0.9, 0.9], 3), True)]:
        out = ControlledRun(control, 8, 8).predicting(unet)(x, t, context)
        assert torch.allclose(out[[0, R]], plain[[0, R]], atol=1e-5)                # the source's
        assert relative_error(out[1], plain[1]) > 1e-3
        assert (relative_error(out[R + 1], plain[R + 1]) > 1e-3) == shared


@pytest.mark.parametrize("height, width, shares", [
    (64, 64, {64 * 64: False, 32 * 32: False, 16 * 16: True, 8 * 8: True}),          # as published
    (64, 96, {32 * 48: False, 16 * 24: True}), (96, 96, {48 * 48: False, 24 * 24: True}),
    (32, 32, {32 * 32: False, 16 * 16: True}), (16, 16, {16 * 16: True})])
def test_which_layers_share_self_attention(clip, height, width, shares):
    def is_shared(side, pixels):
        run = ControlledRun(prompt_to_prompt(clip, ["a cat", "a dog"], 3, self_side=side), height, width)
        q, k, v = (noise(2, pixels, 4, seed=i) for i in range(3))
        out = run.predicting(lambda x, t, context, control: control(q, k, v, 2, False))(q, None, None)
        copied = torch.allclose(out, attend(q[[0, 0]], k[[0, 0]], v, 2), atol=1e-6)
        assert copied or torch.allclose(out, attend(q, k, v, 2), atol=1e-6)
        return copied

    for pixels, shared in shares.items():
        assert is_shared(16, pixels) == shared and is_shared(None, pixels)
        if 4 * pixels < height * width:
            assert is_shared(32, 4 * pixels) == shared


def test_steps_of_the_published_generator():
    """Of 100 steps, on at step i if p > i / 99: p = 0.1, 0.5 and 0.9 share the first 10, 50 and 90."""
    steps = share_self_attention([0, 0, 0, 0], [0.0, 0.1, 0.5, 0.9], 100).self_steps
    assert torch.equal(steps, torch.arange(100)[:, None] < torch.tensor([0, 10, 50, 90]))
    assert share_self_attention([0, 0], [0.5, 0.5], 1).self_steps.tolist() == [[True, True]]


def test_steps_of_prompt_to_prompt_by_hand(clip):
    """50 steps: 0.8 of 51 is 40.8, 0.4 of 50 is 20; of 51, 0.4 is 20.4. "lion" is the second token, as "squirrel" is."""
    prompts = ["a squirrel eats a burger", "a lion eats a burger"]
    control = prompt_to_prompt(clip, prompts, 50, mode="replace", cross_replace_steps={"default_": 0.8, "lion": 0.4})
    assert control.cross_steps.shape == (50, 2, 77) and control.self_steps.shape == (50, 2)
    lasts = [20 if token == 2 else 40 for token in range(77)]
    assert torch.equal(control.cross_steps[:, 1], (torch.arange(50)[:, None] < torch.tensor(lasts)).float())
    assert torch.equal(control.self_steps[:, 1], torch.arange(50) < 20)
    assert not control.cross_steps[:, 0].any()
    control = prompt_to_prompt(clip, prompts, 50, mode="replace", cross_replace_steps=1, self_replace_steps=1)    # integers
    assert control.cross_steps[:, 1].all() and control.self_steps[:, 1].all()


def test_a_new_word_keeps_its_own_map_in_replacement(clip):
    """"a cat" to "a big cat", which the original refuses: start, a, cat and end from the source, big from the target."""
    control = prompt_to_prompt(clip, ["a cat", "a big cat"], T, mode="replace", cross_replace_steps=1.0, self_replace_steps=0)
    mapper = by_hand(clip, {0: 0, 1: 1, 3: 2, **{j: min(j - 1, 76) for j in range(4, 77)}})

    def edit(row, base, own):
        new = torch.einsum("hpw,wn->hpn", base, replacement_mapper("a cat", "a big cat", clip))
        new[..., 2] = own[..., 2]
        return new

    book = Textbook([0, 0], torch.zeros(T, 2, dtype=torch.bool), edit, torch.ones(T, 2, 77))
    assert torch.equal(replacement_mapper("a cat", "a big cat", clip)[:, :5], mapper[:, :5])
    assert all(compare(UNET(), control, book, 8, 8))


@pytest.mark.parametrize("case", ["replace and reweight", "refine and reweight", "two sources"])
def test_controls_in_bfloat16(case, clip):
    unet, case = make_unet().bfloat16(), CASES[case]
    R = len(case["prompts"])
    x, t, context = noise(2 * R, 4, 16, 16), torch.full((2 * R,), 500), noise(2 * R, 77, 24)
    blend = LocalBlend(tuple(p.split()[-1] for p in case["prompts"]))
    control = prompt_to_prompt(clip, num_steps=T, local_blend=blend, **case)
    run = ControlledRun(control, 16, 16)
    out = run.predicting(unet)(x.bfloat16(), t, context.bfloat16())
    expected = ControlledRun(control, 16, 16).predicting(UNET())(x, t, context)
    assert out.dtype == torch.bfloat16 and relative_error(out.float(), expected) < 0.1
    assert run.after_step(x[:R]).dtype == torch.float32


# ---- LocalBlend, as published

class SlowBlend:
    """Averages stored maps of the layers with so many pixels over heads and layers, sums them over steps, and pastes."""

    def __init__(self, tokenizer, prompts, source, height, width, scale, words, subtract=None, threshold=0.3, start=0.0, num_steps=T):
        self.shape, self.scale, self.threshold, self.start = (height, width), scale, threshold, int(start * num_steps)
        self.source, self.maps, self.steps = source, 0, 0
        self.marks, self.less = (chosen and [[p for word, at in zip(prompt.split(" "), word_positions(prompt, tokenizer))
                                              if word in wanted.split(" ") for p in at] for prompt, wanted in zip(prompts, chosen)]
                                 for chosen in (words, subtract))

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


BLENDS = {
    "full resolution": (16, 16, 1, "replace", dict(words=("lasagne", "pizza"))),
    "half": (32, 32, 2, "replace", dict(words=("lasagne", "pizza"), threshold=0.5)),
    "not square": (32, 48, 2, "refine", dict(words=("cat", "cat"), threshold=0.6)),
    "upright": (24, 16, 1, "refine and reweight", dict(words=("cat", "fluffy cat"), threshold=0.4)),
    "quarter": (64, 64, 4, "replace", dict(words=("lasagne", "pizza"), threshold=0.5)),
    "subtract": (16, 16, 1, "replace", dict(words=("lasagne", "pizza"), subtract=("photo", "table"), threshold=0.4)),
    "start": (16, 16, 1, "refine", dict(words=("cat", "cat"), start=0.4)),
    "start rounds down": (16, 16, 1, "refine", dict(words=("cat", "cat"), start=0.55)),
    "several targets": (16, 16, 1, "three targets", dict(words=("cat", "dog", "fluffy cat", "lasagne"), threshold=0.5)),
    "several sources": (16, 16, 1, "two sources", dict(words=("cat", "hippopotamus", "dog", "big"), threshold=0.5)),
}


def run_blend(tokenizer, height, width, scale, case, blend, num_steps=T):
    """A sampler in small: both start each step from the same latents. Yields ours, the reference's and the unblended."""
    unet = UNET({1: (True, True), 2: (False, True), 4: (False, True, True)}[scale])
    R, source = len(case["prompts"]), case.get("source") or [0] * len(case["prompts"])
    control = prompt_to_prompt(tokenizer, num_steps=num_steps, local_blend=LocalBlend(**blend), **case)
    run, book = ControlledRun(control, height, width), textbook(tokenizer, num_steps=num_steps, **case)
    slow = SlowBlend(tokenizer, case["prompts"], source, height, width, scale, num_steps=num_steps, **blend)
    x, context = noise(R, 4, height, width), noise(2 * R, tokenizer.config.context_length, 24, seed=99)
    for step in range(num_steps):
        t = torch.full((2 * R,), 900 - 100 * step)
        book.step, book.cross_maps = step, []
        unet(x.repeat(2, 1, 1, 1), t, context, book)
        eps = run.predicting(unet)(x.repeat(2, 1, 1, 1), t, context)[:R]
        moved = x - 0.3 * eps + 0.1 * noise(*x.shape, seed=step)
        x = run.after_step(moved)
        yield x, slow(moved, book.cross_maps), moved, source


@pytest.mark.parametrize("name", BLENDS)
def test_local_blend_equals_the_stored_maps(name, clip):
    height, width, scale, case, blend = BLENDS[name]
    steps, begin = (T if scale == 1 else 2), int(blend.get("start", 0) * T)
    for step, (ours, theirs, moved, source) in enumerate(run_blend(clip, height, width, scale, CASES[case], blend, steps)):
        assert torch.allclose(ours, theirs, atol=1e-5), step
        kept = (ours == moved).all(1)
        for row in range(len(source)):
            assert kept[row].all() == (step < begin or row == source[row]), "the mask covers everything"
            assert kept[row].any(), "the mask covers nothing"


@pytest.mark.parametrize("side", range(16, 136, 8))
def test_local_blend_reads_a_level_that_unets_have(side, clip):
    """16 x 16 for 64 x 64, and a half or a quarter of the side, or all of it, at any other size."""
    control = prompt_to_prompt(clip, ["a cat", "a dog"], 1, local_blend=LocalBlend(("cat", "dog")))
    for height, width in ((side, side), (side, 128), (96, side)):
        pixels = ControlledRun(control, height, width).blend_pixels
        assert pixels * 16 >= height * width and height * width / pixels in (1, 4, 16), (height, width)
    assert ControlledRun(control, 64, 64).blend_pixels == 256 and ControlledRun(control, 64, 96).blend_pixels == 384


@pytest.mark.parametrize("height, width", [(48, 48), (56, 40)])
def test_local_blend_at_other_picture_sizes(height, width, clip):
    """384 x 384 and 448 x 320 pixels of Stable Diffusion."""
    blend = LocalBlend(("cat", "dog"), threshold=0.5)
    run = ControlledRun(prompt_to_prompt(clip, ["a cat", "a dog"], 1, local_blend=blend), height, width)
    run.predicting(UNET((False, True, True)))(noise(4, 4, height, width), torch.full((4,), 500), noise(4, 77, 24))
    x = noise(2, 4, height, width)
    kept = (run.after_step(x) == x).all(1)
    assert kept[0].all() and 0 < kept[1].float().mean() < 1


# ---- no maps

class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(x):
                self.numel = max(self.numel, x.numel())
        return out


WATCHED = {"no control": None, **{name: CASES[name] for name in ("replace", "refine and reweight", "reweight", "per-word steps", "two sources")},
           "LocalBlend": dict(prompts=["a cat sits", "a dog sits"], self_side=None,
                              local_blend=LocalBlend(("cat", "dog"), subtract=("sits", "sits"))),
           "shared": "shared", "textbook": dict(prompts=["a cat sits", "a dog sits"])}


@pytest.mark.parametrize("name", WATCHED)
def test_no_attention_map_is_made(name, clip):
    """256 pixels of 32 channels in 8 heads. Within attention nothing is larger than the queries, and a row's map of
    8 x 256 pixels x 77 tokens would be. Without, no more memory is in use than without control."""
    unet, case, side = UNET((True, True), 24, 8), WATCHED[name], 16
    R = len(case["prompts"]) if isinstance(case, dict) else 2
    x, t, context = noise(2 * R, 4, side, side), torch.full((2 * R,), 500), noise(2 * R, 77, 24)
    if name == "textbook":
        attention = textbook(clip, num_steps=T, **case)
        predict = lambda *args: unet(*args, attention)          # noqa: E731
    elif case is None:
        predict, attention = unet, lambda q, k, v, heads, is_cross: attend(q, k, v, heads)
    else:
        attention = ControlledRun(share_self_attention([0, 0], [0.9, 0.9], T) if case == "shared" else
                                  prompt_to_prompt(clip, num_steps=T, **case), side, side)
        predict = attention.predicting(unet)
    within, whole, plain = Largest(), Largest(), Largest()

    def watched(*args):
        with within:
            return attention(*args)

    with plain:
        unet(x, t, context)
    with whole:
        predict(x, t, context)
        if isinstance(attention, ControlledRun):
            attention.after_step(x[:R])
    unet(x, t, context, watched)
    queries, one_map = 2 * R * side ** 2 * 32, 8 * side ** 2 * 77
    assert queries < one_map
    if name == "textbook":
        assert within.numel >= 2 * R * 8 * side ** 4 and whole.numel > plain.numel
    else:
        assert within.numel <= queries and whole.numel <= plain.numel


# ---- what must hold of whole pictures

@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(VAEConfig(channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4)).eval()
        text = TextEncoder(TextConfig(vocab_size=2 * 256 + 2 + 2048, context_length=32, width=24, layers=2, heads=2)).eval()
    for part in (vae, text):
        part.requires_grad_(False)
    return InstructPix2Pix(Parts(UNET(), vae, text, "eps", 32, {}))


def arrays(pictures):
    return np.stack([np.asarray(picture, dtype=int) for picture in pictures])


def generate(model, prompts, control=None, **settings):
    return arrays(model.generate(prompts, **dict(steps=T, cfg_text=3.0, seed=5, size=(48, 32), control=control, progress=False) | settings))


def test_control_for_no_step_is_no_control(model):
    prompts = ["a red cat", "a blue dog sits"]
    plain = generate(model, prompts)
    for mode in ("replace", "refine"):
        control = prompt_to_prompt(model.tokenizer, prompts, T, mode=mode, cross_replace_steps=0, self_replace_steps=0, equalizer={"dog": 3})
        assert np.array_equal(generate(model, prompts, control), plain)
    assert np.array_equal(generate(model, prompts, share_self_attention([0, 0], [0, 0], T)), plain)


@pytest.mark.parametrize("make", [
    lambda tok, prompts: prompt_to_prompt(tok, prompts, T, cross_replace_steps=1, self_replace_steps=1, equalizer={"dog": 4}),
    lambda tok, prompts: prompt_to_prompt(tok, prompts, T, local_blend=LocalBlend(("cat", "dog"), threshold=0.8)),
    lambda tok, prompts: share_self_attention([0, 0], [0.9, 0.9], T)], ids=["refine", "blend", "shared"])
def test_the_source_is_drawn_as_ever(make, model):
    prompts = ["a red cat", "a blue dog"]
    plain, controlled = generate(model, prompts), generate(model, prompts, make(model.tokenizer, prompts))
    assert np.abs(controlled[0] - plain[0]).max() <= 1 and np.abs(controlled[0] - generate(model, prompts[:1])[0]).max() <= 1
    assert np.abs(controlled[1] - plain[1]).mean() > 1


def test_equal_prompts_give_equal_pictures(model):
    prompts = ["a red cat"] * 3
    for mode, sampler in product(("replace", "refine", "reweight"), ("ddim", "euler-ancestral")):
        control = prompt_to_prompt(model.tokenizer, prompts, T, mode=mode, cross_replace_steps=1, self_replace_steps=1)
        pictures = generate(model, prompts, control, sampler=sampler)
        assert np.abs(pictures - pictures[:1]).max() <= 1
        assert np.abs(pictures - generate(model, prompts, sampler=sampler)).max() <= 1


def test_control_without_guidance(model):
    """At a scale of 1 the one evaluation is conditional, and controlled as the conditional half of two is."""
    prompts = ["a red cat", "a blue dog"]
    control = prompt_to_prompt(model.tokenizer, prompts, T)
    near, at = (generate(model, prompts, control, cfg_text=scale) for scale in (1 + 1e-6, 1.0))
    assert np.abs(near - at).max() <= 1
    assert np.abs(at[1] - generate(model, prompts, cfg_text=1.0)[1]).mean() > 1


# ---- pairs

PAIR = dict(captions=["a red cat on a table", "a big dog", "a red cat on a table"],
            edited_captions=["a blue cat on a table", "a big dog in the snow", "a fox"], seeds=[3, 11, 4], shares=[0.3, 0.9, 0.6],
            cfg_text=[2.0, 4.0, 3.0])


def draw(model, only=slice(None), **settings):
    settings = dict(steps=T) | {k: v[only] for k, v in PAIR.items()} | settings
    return torch.stack(model.draw_pairs(**settings), 1)                                  # (B, 2, 3, side, side)


@pytest.mark.parametrize("control", ["self-attention", "cross-attention"])
def test_a_pair_does_not_depend_on_its_batch(control, model):
    together = draw(model, control=control)
    assert together.shape == (3, 2, 3, 32, 32) and together.dtype == torch.float32 and together.abs().max() <= 1
    for i in range(3):
        assert torch.allclose(together[i], draw(model, slice(i, i + 1), control=control)[0], atol=2e-4)
    chosen = [2, 0]
    assert torch.allclose(draw(model, control=control, **{k: [v[i] for i in chosen] for k, v in PAIR.items()}), together[chosen], atol=2e-4)
    for name, other in dict(seeds=100, shares=0.05, cfg_text=9.0).items():
        changed = draw(model, control=control, **{name: [PAIR[name][0], other, PAIR[name][2]]})
        assert torch.allclose(changed[[0, 2]], together[[0, 2]], atol=2e-4)
        assert (changed[1, 1] - together[1, 1]).abs().mean() > 1e-3, name
        assert torch.allclose(changed[1, 0], together[1, 0], atol=2e-4) == (name == "shares")         # the source borrows nothing


@pytest.mark.parametrize("control", ["self-attention", "cross-attention"])
def test_pairs_without_shared_steps_are_pictures_of_their_captions(control, model):
    pairs = draw(model, shares=[0.0] * 3, control=control)
    for i, pair in enumerate(pairs):
        for pixels, caption in zip(pair, (PAIR["captions"][i], PAIR["edited_captions"][i])):
            alone = generate(model, caption, sampler="euler-ancestral", seed=PAIR["seeds"][i], cfg_text=PAIR["cfg_text"][i], size=32)
            assert np.abs(arrays(to_images(pixels[None])) - alone).max() <= 1


@pytest.mark.parametrize("control", ["self-attention", "cross-attention"])
def test_equal_captions_make_equal_pictures(control, model):
    """The noise of either is the same, at the start and on the way."""
    pairs = draw(model, edited_captions=PAIR["captions"], control=control)
    assert torch.allclose(pairs[:, 0], pairs[:, 1], atol=2e-4)


def test_pairs_from_given_noise(model):
    x_T = torch.cat([noise(1, 4, 8, 8, seed=seed) for seed in PAIR["seeds"]])
    assert torch.equal(draw(model, x_T=x_T, sampler="ddim"), draw(model, sampler="ddim"))
    assert not torch.allclose(draw(model, x_T=x_T.flip(0), sampler="ddim"), draw(model, sampler="ddim"), atol=0.01)


@pytest.mark.parametrize("control", ["self-attention", "cross-attention"])
def test_a_pair_is_drawn_as_published(control, model):
    """The textbook control in a sampler written out, u + s (c - u), with the whole batch in one UNet call."""
    i, tokenizer = 1, model.tokenizer
    texts, share, scale = [PAIR["captions"][i], PAIR["edited_captions"][i]], PAIR["shares"][i], PAIR["cfg_text"][i]
    book = published_generator([0, 0], [share, share], T) if control == "self-attention" else textbook(
        tokenizer, texts, T, cross_replace_steps=share, self_replace_steps=share / 2)
    context = model.text(tokenizer([*texts, "", ""]))
    x = noise(1, 4, 8, 8, seed=PAIR["seeds"][i]).repeat(2, 1, 1, 1)
    for book.step, (t, a_t, a_prev) in enumerate(ddim_steps(T, model.alphas_cumprod)):
        c, u = model.unet(x.repeat(2, 1, 1, 1), t.expand(4), context, book).chunk(2)
        x = ddim_step(x, u + scale * (c - u), a_t, a_prev)
    expected = model.vae.decode(x / model.vae.config.scale_factor).clamp(-1, 1)
    assert torch.allclose(draw(model, control=control, sampler="ddim")[i], expected, atol=5e-4)


# ---- what cannot be done

PROMPTS = ["a cat on a mat", "a dog on a mat"]


@pytest.mark.parametrize("options, message", [
    (dict(mode="swap"), "swap"), (dict(cross_replace_steps=1.5), "1.5"), (dict(cross_replace_steps=-0.1), "-0.1"),
    (dict(cross_replace_steps=(0.2, 1.2)), "1.2"), (dict(cross_replace_steps={"dog": 2}), "2"), (dict(self_replace_steps=1.01), "1.01"),
    (dict(self_replace_steps=(-1, 1)), "-1"), (dict(equalizer={"fox": 2}), "fox"), (dict(cross_replace_steps={"fox": 0.4}), "fox"),
    (dict(local_blend=LocalBlend(("cat", "cat"))), "cat"), (dict(local_blend=LocalBlend(("cat",))), "got 1"),
    (dict(local_blend=LocalBlend(("cat", "dog"), subtract=("mat", "fox"))), "fox")])
def test_impossible_settings_are_refused_in_one_line(options, message, clip):
    with pytest.raises(ValueError, match=message) as error:
        prompt_to_prompt(clip, PROMPTS, 10, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [dict(cross_replace_steps=[0.5]), dict(self_replace_steps=[0.5] * 3), dict(source=[0]),
                                     dict(source=[0, 2]), dict(source=[0, -3])])
def test_settings_for_other_numbers_of_prompts_are_refused(options, clip):
    with pytest.raises(ValueError):
        prompt_to_prompt(clip, PROMPTS, 10, **options)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_shared_steps_outside_of_0_to_1_are_refused(share):
    with pytest.raises(ValueError, match=str(share)):
        share_self_attention([0, 0], [share, share], 10)


def test_generate_refuses_a_control_for_something_else(model):
    control = prompt_to_prompt(model.tokenizer, PROMPTS, T)
    for prompts, settings in [(PROMPTS[:1], {}), (PROMPTS * 2, {}), (PROMPTS, dict(num_images=2)), (PROMPTS, dict(steps=T + 1)),
                              (PROMPTS, dict(steps=T - 1))]:
        with pytest.raises(ValueError) as error:
            generate(model, prompts, control, **settings)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cross"):
        draw(model, control="replace")


def test_local_blend_needs_a_layer_to_look_at(clip):
    control = prompt_to_prompt(clip, PROMPTS, 2, local_blend=LocalBlend(("cat", "dog")))
    run = ControlledRun(control, 16, 16)
    run.predicting(UNET((False, True)))(noise(2, 4, 16, 16), torch.full((2,), 500), noise(2, 77, 24))
    with pytest.raises(ValueError, match="256"):
        run.after_step(noise(2, 4, 16, 16))
