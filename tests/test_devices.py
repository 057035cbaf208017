"""Everything runs on a GPU: each command once, and what lies between pixels and pixels with the numbers that a CPU gives. The GPU
is one in name (`pretended_gpu.py`), which refuses what a GPU refuses."""
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import chain
from pathlib import Path

import pytest
import torch
from checkpoints import randomised
from PIL import Image

from ip2p import InstructPix2Pix, evaluate, finetune, lessons
from ip2p.checkpoint import Parts
from ip2p.clip_filter import ClipSimilarity, Thresholds, calibrate
from ip2p.distributed import choose_device
from ip2p.guidance import instruct_denoiser, text_denoiser
from ip2p.images import to_pixels
from ip2p.inversion import invert, null_text
from ip2p.prompt_to_prompt import CONTROLS, ControlledRun, LocalBlend, control_pairs, prompt_to_prompt
from ip2p.samplers import SAMPLERS
from ip2p.tensorfiles import read_state_dict
from ip2p.text import TextConfig, TextEncoder
from ip2p.unet import UNet, UNetConfig
from ip2p.vae import AutoencoderKL, VAEConfig
from ip2p.world import World

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import make_data  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402

PROMPTS = ["a fox", "a car", "a red fox", "a blue car"]
EXAMPLES = ROOT / "ip2p/assets/examples"


@pytest.mark.parametrize("wrong, words", [
    (lambda x: x + torch.ones(3), "same device"), (lambda x: torch.cat([x, torch.ones(3)]), "same device"),
    (lambda x: torch.nn.Linear(3, 3)(x), "same device"), (lambda x: torch.ones(3)[x.long()], "indexed tensor"),
    (lambda x: x.numpy(), "numpy"), (lambda x: torch.randn(3, generator=torch.Generator(), device=x.device), "generator")])
def test_the_pretended_gpu_refuses(gpu, wrong, words):
    x = torch.ones(3, device="cuda")
    with pytest.raises((RuntimeError, TypeError), match=words):
        wrong(x)
    assert str((2 * x).device) == str(torch.nn.Linear(3, 3).to("cuda")(x).device) == "cuda:0" and x.cpu().is_cpu


@pytest.mark.parametrize("wait", [lambda x: x[[0, 2]], lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.sum().item(),
                                  lambda x: torch.tensor([1.0], device=x.device), lambda x: x.cpu()])
def test_the_pretended_gpu_counts_what_waits_for_it(gpu, wait):
    x = torch.ones(3, device="cuda")
    before = gpu.crossings
    wait(x + 1)
    assert gpu.crossings == before + 1


# ---- the pipeline, and that it gives what it gives on a CPU

def make_model(in_channels, device="cpu", parameterization="v"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = (UNet(UNetConfig(in_channels, 4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, context_dim=32,
                                  attention_levels=(True, True), num_heads=2, norm_groups=8)),
                  AutoencoderKL(VAEConfig(channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4)),
                  TextEncoder(TextConfig(vocab_size=514 + 200, context_length=16, width=32, layers=2, heads=2)))
    return InstructPix2Pix(Parts(*(randomised(model, i).to(device) for i, model in enumerate(models)), parameterization, 32, {}))


def pixels(pictures):
    return torch.stack([to_pixels(p, 32, 32) for p in pictures])


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.5), ("euler-ancestral", 1.0)])
def test_an_edit(gpu, sampler, eta, parameterization):
    """Six steps, of which five are replays of a graph."""
    picture = Image.open(EXAMPLES / "fox.png").resize((32, 32))
    edits = [pixels(make_model(8, device, parameterization).edit(picture, PROMPTS[:2], steps=6, sampler=sampler, eta=eta, progress=False))
             for device in ("cpu", "cuda")]
    assert (edits[0] - edits[1]).abs().max() <= 2 / 255 + 1e-6


@pytest.mark.parametrize("sampler", ["ddim", "euler-ancestral"])
def test_steps_need_nothing_of_the_cpu(gpu, sampler):
    """What is moved, before and after, does not grow with the steps; noise would, so it is drawn on the device here."""
    model, counts = make_model(8, "cuda"), []
    latents = torch.zeros(2, 4, 8, 8, device="cuda")
    contexts = [model.encode_text(PROMPTS[:2]), model.encode_text(["", ""])]
    for steps in (2, 4):
        before = gpu.crossings
        denoise = instruct_denoiser(model.predict, *contexts, latents, 3.0, 1.5, model.read_text)
        SAMPLERS[sampler](denoise, latents, steps, model.alphas_cumprod, float(sampler != "ddim"), torch.randn_like)
        counts.append(gpu.crossings - before)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", [*CONTROLS, "words"])
def test_steps_under_a_control_need_nothing_of_the_cpu(gpu, kind):
    """What they borrow is there with the first."""
    model, crossings = make_model(4, "cuda"), []
    latents, contexts = torch.zeros(4, 4, 8, 8, device="cuda"), [model.encode_text(PROMPTS), model.encode_text([""] * 4)]
    control = prompt_to_prompt(model.tokenizer, PROMPTS[::2] * 2, 4, local_blend=LocalBlend(("fox",) * 4)) if kind == "words" else \
        control_pairs(model.tokenizer, PROMPTS[:2], PROMPTS[2:], [0.7, 0.4], 4, kind)
    run = ControlledRun(control, 8, 8, "cuda")

    def after_step(x):
        x = run.after_step(x)
        crossings.append(gpu.crossings)
        return x

    denoise = text_denoiser(run.predicting(model.predict), *contexts, 3.0, model.read_text)
    SAMPLERS["ddim"](denoise, latents, 4, model.alphas_cumprod, after_step=after_step)
    assert len(crossings) == 4 and crossings[0] == crossings[3] > 0


@pytest.mark.parametrize("sampler", ["ddim", "euler-ancestral"])
def test_pictures_with_controls(gpu, sampler):
    pictures = []
    for model in (make_model(4), make_model(4, "cuda")):
        control = prompt_to_prompt(model.tokenizer, PROMPTS[::2] * 2, 4, mode="refine", cross_replace_steps=0.8, self_replace_steps=0.2,
                                   equalizer={"red": 3}, local_blend=LocalBlend(("fox",) * 4))
        drawn = pixels(model.generate(PROMPTS[::2] * 2, steps=4, sampler=sampler, control=control, progress=False))
        pairs = [model.draw_pairs(PROMPTS[:2], PROMPTS[2:], [1, 2], [0.3, 0.6], [3.0, 4.0], steps=4, sampler=sampler, control=kind)
                 for kind in CONTROLS]
        pictures.append(torch.cat([drawn, *chain(*pairs)]))
    assert (pictures[0] - pictures[1]).abs().max() <= 2 / 255 + 1e-6


def test_inversion_in_low_memory(gpu):
    """The UNet comes to the device for it, and goes."""
    z, found = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for device, sparing in (("cpu", False), ("cuda", True)):
        model = InstructPix2Pix(make_model(4).parts, device, low_memory=sparing)
        latents = invert(model, z.to(device), ["a fox"], 3, progress=False)
        nulls = null_text(model, latents, "a fox", inner_steps=1, progress=False)
        assert all(p.is_cpu for p in model.unet.parameters())
        found.append(torch.cat([x.cpu().flatten() for x in latents + nulls]))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)


# ---- the commands

def run(command, *flags):
    with redirect_stdout(StringIO()) as said, redirect_stderr(StringIO()) as complaint:
        code = command([*map(str, flags)])
    assert not code, complaint.getvalue()
    return said.getvalue()


@pytest.mark.parametrize("flags", [
    ("--prompt", "make it night", "--num-images", 2), ("--prompt", "make it night", "--low-memory"),
    ("--prompt", "make it night", "--model", ROOT / "weights/mini-ip2p.safetensors", "--steps", 6),
    ("--prompt", "make it night", "--grid", "--cfg-text", 1, 2, "--cfg-image", 1, 1.5),
    ("--prompt", "a blue fox", "--method", "sdedit", "--steps", 4),
    ("--prompt", "a blue fox", "--source-prompt", "a fox", "--method", "p2p", "--steps", 2, "--blend", "fox", "fox"),
    ("--prompt", "a blue fox", "--source-prompt", "a fox", "--method", "null-text", "--steps", 1)],
    ids=["edit", "low memory", "guided", "grid", "sdedit", "p2p", "null-text"])
def test_sample(gpu, flags, tmp_path):
    run(sample.run, "--image", EXAMPLES / "fox.png", "--output", tmp_path / "out", *flags)
    assert len(list(tmp_path.glob("out/*.png"))) == (2 if "--num-images" in flags else 1)


LITTLE = "--steps 2 --batch-size 2 --block 4 --score-examples 1".split()


def test_train_all_and_make_data(gpu, tmp_path, monkeypatch):
    """Every stage from nothing, with the data that the editor learns from."""
    monkeypatch.setitem(make_data.MINIATURE, "steps", 2)
    monkeypatch.setattr(Thresholds, "of", lambda clip: Thresholds(-1, -1, -1))
    make_pairs = train.make_pairs

    def make_few(args, *flags):                          # edits by a language model that can write some
        if "--calibrate" not in flags:
            make_pairs(args, *flags, "--num-captions", 3, "--n-samples", 2, "--gpt", ROOT / "weights/mini-gpt.safetensors")

    monkeypatch.setattr(train, "make_pairs", make_few)
    said = run(train.run_command, "--stage", "all", "--out", tmp_path, "--cache", tmp_path / "cache", *LITTLE)
    assert "device=cuda" in said and {p.name for p in tmp_path.glob("*.safetensors")} == set(train.RESULTS.values())


@pytest.mark.parametrize("flags", [(), ("--preset", "12gb", "--accumulate", 2, "--size", 128, "--timesteps", "uniform")],
                         ids=["miniature", "12gb"])
def test_training_learns_the_same_as_on_a_cpu(gpu, flags, tmp_path):
    """The held-out loss, of four decimals, to 2e-4: convolutions on channels last add up in another order."""
    losses = []
    for device in ("cpu", "cuda"):
        run(train.run_command, "--data", "world", "--out", tmp_path / device, "--dtype", "fp32", "--device", device, *LITTLE, *flags)
        losses.append(read_state_dict(tmp_path / device / "mini-ip2p.safetensors")[1]["held_out_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


@pytest.fixture
def unscored(monkeypatch):
    """Editors are trained, but nothing is drawn with them, nor scored."""
    for module in (lessons, finetune):
        monkeypatch.setattr(module, "save_sheet", lambda *args, **settings: None)
    monkeypatch.setattr(lessons, "score_edits", lambda *args: {})


def test_a_text_encoder_that_learns_stays_on_the_gpu(gpu, unscored, tmp_path):
    """With cached pairs and --offload the parts that rest wait in the CPU's memory."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (128, 128), (60 * i, 0, 0)).save(folder / f"{i}.png")
    row = dict(input_image="0.png", edited_image="1.png", edit="make it red")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row | dict(input_image=f"{i}.png")) + "\n" for i in range(4)))
    run(train.run_command, "--preset", "12gb", "--dtype", "fp32", "--train-text", "--data", folder, "--out", tmp_path,
        "--cache", tmp_path / "cache", *LITTLE, "--accumulate", 1, "--size", 128)
    assert (tmp_path / "mini-ip2p.safetensors").exists()


def test_no_step_of_training_waits_for_the_gpu(gpu, unscored, tmp_path, monkeypatch):
    """Nothing is read from it but when the loss is logged or saved: in 12 steps as often as in 3. (Clipping groups gradients
    by where they really are, which here is the CPU; on a GPU it waits for nothing.)"""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda weights, most: torch.ones((), device="cuda"))
    reads = []
    for steps in (3, 12):
        before = gpu.reads
        run(train.run_command, "--data", "world", "--out", tmp_path / str(steps), "--device", "cuda", *LITTLE, "--steps", steps,
            "--reuse", 8)
        reads.append(gpu.reads - before)
    assert reads[0] == reads[1] > 0


@pytest.mark.parametrize("supported, dtype", [(True, "bf16"), (False, "fp16")])
def test_half_precision_is_the_gpus_own(gpu, supported, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    assert choose_device("cuda", None)[1] == dtype and choose_device("cuda", "fp32")[1] == "fp32"


@pytest.mark.parametrize("supported, dtype", [(True, "bf16"), (False, "fp32")])
def test_training_keeps_to_what_the_gpu_has(gpu, supported, dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    seen = []
    monkeypatch.setitem(train.FROM_A_MODEL, "edit", lambda args, base: seen.append(args.dtype))
    run(train.run_command, "--data", "world", "--out", tmp_path, "--device", "cuda")
    run(train.run_command, "--data", "world", "--out", tmp_path, "--device", "cuda", "--dtype", "bf16")
    assert seen == [dtype, "bf16"]


@pytest.mark.parametrize("what", ["edits", "pictures", "pairs", "curve"])
def test_evaluate(gpu, what, tmp_path):
    few = {"edits": ("--steps", 1), "pictures": ("--steps", 1), "pairs": ("--steps", 2, "--shares", 0.5),
           "curve": ("--steps", 2, "--cfg-image", 1.5, "--strengths", 0.5, "--shares", 0.5)}[what]
    run(evaluate.run_command, what, "--count", 10 if what == "edits" else 2, *few)


def test_calibration(gpu):
    found = [calibrate(ClipSimilarity.load(ROOT / "weights/mini-clip.safetensors", device), World(device), count=4)
             for device in ("cpu", "cuda")]
    assert found[0] == found[1]
