"""Prompt-to-Prompt on the values, against the published way: every attention map made, edited, and multiplied with the values."""
import math

import pytest
import torch
from checkpoints import relative_error
from published_control import UNET, SlowBlend, Textbook, by_hand, make_unet, noise, published_generator, textbook
from torch.utils._python_dispatch import TorchDispatchMode

from ip2p.attention import attend
from ip2p.prompt_to_prompt import ControlledRun, LocalBlend, prompt_to_prompt, share_self_attention
from ip2p.word_alignment import replacement_mapper

pytestmark = pytest.mark.usefixtures("no_gradients")

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
        new = torch.einsum("hpw,wn->hpn", base, replacement_mapper("a cat", "a big cat", clip)[0])
        new[..., 2] = own[..., 2]
        return new

    book = Textbook([0, 0], torch.zeros(T, 2, dtype=torch.bool), edit, torch.ones(T, 2, 77))
    assert torch.equal(replacement_mapper("a cat", "a big cat", clip)[0][:, :5], mapper[:, :5])
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


# ---- LocalBlend

BLENDS = {
    "full resolution": (16, 16, 1, "replace", dict(words=("lasagne", "pizza"))),
    "half": (32, 32, 2, "replace", dict(words=("lasagne", "pizza"), threshold=0.5)),
    "not square": (32, 48, 2, "refine", dict(words=("cat", "cat"), threshold=0.6)),
    "upright": (24, 16, 1, "refine and reweight", dict(words=("cat", "fluffy cat"), threshold=0.4)),
    "quarter": (64, 64, 4, "replace", dict(words=("lasagne", "pizza"), threshold=0.5)),
    "subtract": (16, 16, 1, "replace", dict(words=("lasagne", "pizza"), subtract=("photo", "table"), threshold=0.4)),
    "start": (16, 16, 1, "refine", dict(words=("cat", "cat"), start=0.4)),
    "start rounds down": (16, 16, 1, "refine", dict(words=("cat", "cat"), start=0.55)),
    "what differs": (16, 16, 1, "refine", dict(threshold=0.5)),
    "what differs of several": (16, 16, 1, "two sources", dict(threshold=0.6)),
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
    for latents, blend in (((64, 64), (16, 16)), ((64, 96), (16, 24)), ((64, 48), (16, 12)), ((40, 64), (10, 16))):
        assert ControlledRun(control, *latents).blend_pixels == math.prod(blend)


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


def test_local_blend_needs_a_layer_to_look_at(clip):
    control = prompt_to_prompt(clip, PROMPTS, 2, local_blend=LocalBlend(("cat", "dog")))
    run = ControlledRun(control, 16, 16)
    run.predicting(UNET((False, True)))(noise(2, 4, 16, 16), torch.full((2,), 500), noise(2, 77, 24))
    with pytest.raises(ValueError, match="256"):
        run.after_step(noise(2, 4, 16, 16))
