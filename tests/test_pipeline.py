"""InstructPix2Pix called from Python: the negative prompt, half precision, and what is refused."""
from pathlib import Path

import pytest
import torch
from checkpoints import tiny
from pictures import colors, levels_apart
from PIL import Image

from ip2p import InstructPix2Pix

ROOT = Path(__file__).parent.parent
PICTURE = colors(64, 64)


@pytest.fixture(scope="module")
def editor():
    return InstructPix2Pix(tiny("sd1"))


@pytest.fixture(scope="module")
def maker():
    return InstructPix2Pix(tiny("sd1", in_channels=4))


@pytest.mark.parametrize("kind", ["edit", "generate"])
def test_guidance_leads_away_from_the_negative_prompt(editor, maker, kind):
    """Away from the prompt itself there is nowhere to go, so that any scale gives what the scale 1 does."""
    given = dict(prompts="make it night", steps=4, progress=False)
    make = lambda scale, words: (editor.edit(PICTURE, **given, cfg_text=scale, negative_prompt=words) if kind == "edit" else
                                 maker.generate(**given, cfg_text=scale, negative_prompt=words))[0]
    plain, rain, itself = (make(7.5, words) for words in ("", "rain", "make it night"))
    assert levels_apart(plain, rain).mean() > 3 and levels_apart(plain, itself).mean() > 3
    assert levels_apart(itself, make(1.0, "make it night")).max() <= 1                   # rounding


@pytest.mark.parametrize("name", ["mini-ip2p-fast", "mini-ip2p"])
def test_an_edit_in_half_precision_is_much_the_same(name):
    """The shipped editors by their own settings, in bf16 and in float32: on average less than 1.8 of 255 apart (measured
    with other weights: 0.6 to 0.9)."""
    fox, file = Image.open(ROOT / "ip2p/assets/examples/fox.png"), ROOT / f"weights/{name}.safetensors"
    models = (InstructPix2Pix.load(file, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    edits = [model.edit(fox, "make it night", progress=False)[0] for model in models]
    assert 0 < levels_apart(*edits).mean() < 1.8


def test_convolutions_of_bf16_are_laid_out_for_amx(monkeypatch):
    """Channels last where the CPU has AMX, which makes a copy of the weights, and so not with low memory. Either gives the
    same picture but for the order of additions: 0.27 of 255 apart on average (measured)."""
    file = ROOT / "weights/mini-ip2p-fast.safetensors"
    load = lambda amx, **how: (monkeypatch.setattr("ip2p.pipeline.has_amx", lambda: amx), InstructPix2Pix.load(file, **how))[1]
    half = dict(dtype=torch.bfloat16)
    models = load(False, **half), load(True, **half)
    weights = [model.unet.input_blocks[0][0].weight for model in (*models, load(True), load(True, **half, low_memory=True))]
    assert [w.is_contiguous(memory_format=torch.channels_last) for w in weights] == [False, True, False, False]
    plain, tiled = (model.edit(Image.open(ROOT / "ip2p/assets/examples/fox.png"), "make it night", progress=False)[0]
                    for model in models)
    assert levels_apart(plain, tiled).mean() < 0.5


# ---- what is refused

@pytest.mark.parametrize("wrong, words", [
    (dict(images=[PICTURE] * 3, prompts=["make it night", "make it rain"]), "as many instructions as pictures, .* got 2 and 3"),
    (dict(prompts=[]), "got 0 and 1"), (dict(images=[]), "got 1 and 0"),
    (dict(images=Image.new("RGB", (64, 3))), "sides of at least 8 pixels .* got 64x3"),
    (dict(images=[PICTURE, colors(64, 32)], x_T=torch.zeros(2, 4, 16, 16)), "x_T needs pictures of one size"),
    (dict(prompts=["make it night", " "], x_T=torch.zeros(2, 4, 16, 16)), "x_T needs pictures of one size, each with an instr"),
    (dict(prompts=" ", x_T=torch.zeros(1, 4, 16, 16)), "x_T needs .*, each with an instr"),
    (dict(size=0), "size must be at least 1, got 0"),
    (dict(x_T=torch.zeros(1, 4, 8, 8)), r"x_T must be \(1, 4, 16, 16\), got \(1, 4, 8, 8\)"),
    (dict(steps=0), "steps must be in 1..1000, got 0"), (dict(steps=1001), "1..1000, got 1001"),
    (dict(sampler="heun"), "one of ddim, euler-ancestral, got 'heun'"), (dict(num_images=0), "num_images .* got 0"),
    (dict(cfg_text=float("nan")), "cfg_text must be a finite number, got nan"),
    (dict(cfg_image=float("inf")), "cfg_image must be a finite number, got inf")])
def test_edit_refuses(editor, wrong, words):
    with pytest.raises(ValueError, match=words):
        editor.edit(**dict(images=PICTURE, prompts="make it night", steps=1, progress=False) | wrong)


@pytest.mark.parametrize("wrong, words", [
    (dict(size=(60, 64)), "multiples of 8, got 60x64"), (dict(size=-8), "multiples of 8, got -8x-8"),
    (dict(size=0), "multiples of 8, got 0x0"),
    (dict(x_T=torch.zeros(1, 4, 8, 8)), r"x_T must be \(1, 4, 16, 16\), got \(1, 4, 8, 8\)"),
    (dict(cfg_text=float("nan")), "cfg_text must be a finite number, got nan"), (dict(steps=0), "1..1000, got 0")])
def test_generate_refuses(maker, wrong, words):
    with pytest.raises(ValueError, match=words):
        maker.generate(**dict(prompts="a fox", steps=1, progress=False) | wrong)


@pytest.mark.parametrize("wrong, words", [
    *((dict([(name, [1])]), "2 captions need as many") for name in ("edited_captions", "seeds", "shares", "cfg_text")),
    (dict(size=60), "multiples of 8, got 60x60"), (dict(shares=[0.5, 1.5]), r"0..1, got \[0.5, 1.5, 0.5, 1.5\]"),
    (dict(steps=0), "1..1000, got 0"), (dict(sampler="heun"), "got 'heun'")])
def test_draw_pairs_refuses(maker, wrong, words):
    texts = dict(captions=["a fox", "a cat"], edited_captions=["a red fox", "a red cat"])
    with pytest.raises(ValueError, match=words):
        maker.draw_pairs(**texts | dict(seeds=[0, 1], shares=[0.5, 0.5], cfg_text=[3.0, 3.0], steps=1) | wrong)


@pytest.mark.parametrize("low_memory", [False, True])
def test_numbers_that_overflow_are_no_black_picture(low_memory):
    parts = tiny("sd1")
    torch.nn.init.constant_(parts.vae.decoder.conv_in.bias, 1e38)
    model = InstructPix2Pix(parts, low_memory=low_memory)
    with pytest.raises(ValueError, match="not finite in float32; use bfloat16 .*--dtype bf16"):
        model.edit(PICTURE, "make it night", steps=1, progress=False)


def test_nothing_asked_for_is_nothing_made(editor, maker):
    assert editor.edit([], []) == maker.generate([]) == []


def test_a_model_of_the_other_kind_is_refused(editor, maker):
    with pytest.raises(ValueError, match="takes 4 channels, an editor's 8; .* `generate`"):
        maker.edit(PICTURE, "make it night")
    for make in (lambda: editor.generate("a fox"), lambda: editor.draw_pairs(["a fox"], ["a cat"], [0], [0.5], [3.0])):
        with pytest.raises(ValueError, match=r"edits pictures \(use edit\)"):
            make()


def test_what_is_not_said_is_the_models_own(maker, monkeypatch):
    monkeypatch.setitem(maker.parts.metadata, "cfg_text", 3.0)
    monkeypatch.setitem(maker.parts.metadata, "sample_steps", 3)
    given = dict(prompts="a fox", progress=False)
    own, same, other = (maker.generate(**given, **more)[0].tobytes()
                        for more in ({}, dict(steps=3, cfg_text=3.0), dict(steps=3, cfg_text=7.5)))
    assert own == same != other
