"""Fine-tuning a Stable Diffusion into an editor, as a command, on a small one with random weights: what it learns from, how
it is stopped and goes on, shared out and cached; and that diffusers opens the result."""
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from ip2p import InstructPix2Pix, finetune, presets
from ip2p.checkpoint import Parts, load_checkpoint, save_checkpoint
from ip2p.clip_filter import import_open_clip
from ip2p.data import PairedDataset
from ip2p.distributed import locked
from ip2p.run_folder import list_checkpoints
from ip2p.text import TextConfig, TextEncoder
from ip2p.unet import UNet, UNetBlock, UNetConfig
from ip2p.vae import AutoencoderKL, VAEConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Stable Diffusion 1's shape: 4 latent channels, f = 8, 77 tokens of CLIP's."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(4, 4, 32, (1, 2), 1, (True, False), context_dim=64, num_heads=8))
    vae, text = AutoencoderKL(VAEConfig(32, (1, 1, 1, 1), 1)), TextEncoder(TextConfig(width=64, layers=1, heads=1))
    save_checkpoint(Parts(unet, vae, text, "eps", 32, {}), path := tmp_path_factory.mktemp("base") / "sd.safetensors")
    return path


def write_pairs(path, count=12, broken=()):
    """A data set whose edits turn a gray ramp red."""
    ramp = np.linspace(0, 200, 32)[None, :, None].repeat(32, 0).repeat(3, 2)
    for i in range(count):
        (path / f"{i:07d}").mkdir(parents=True)
        prompt = dict(caption="a", edit=f"make it red, {i % 3}", output="b")
        (path / f"{i:07d}" / "prompt.json").write_text(json.dumps(prompt))
        for side in (0, 1):
            picture = Image.fromarray((ramp + 4 * i + np.array([40 * side, 0, 0])).clip(0, 255).astype(np.uint8))
            picture.save(path / f"{i:07d}" / f"1_{side}.jpg", quality=95)
    (path / "seeds.json").write_text(json.dumps([[f"{i:07d}", ["1"]] for i in range(count)]))
    for i in broken:
        (path / f"{i:07d}" / "1_1.jpg").write_bytes(b"no picture")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture
def command(base, pairs, tmp_path):
    """The command with these flags beside what all tests need."""
    def make(*flags, out="run", data=pairs, start=("--base", base)):
        usual = ("--data", data, "--out", tmp_path / out, "--cache", tmp_path / "cache", "--size", 32, "--lr", 1e-3,
                 "--steps", 40, "--batch-size", 4, "--accumulate", 2, "--score-examples", 2, "--device", "cpu")
        return [str(x) for x in (*start, *usual, *flags)]
    return make


def run(argv):
    """Status, standard output and error."""
    with redirect_stdout(StringIO()) as said, redirect_stderr(StringIO()) as complaint:
        code = train.run_command(argv)
    return code, said.getvalue(), complaint.getvalue()


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "edit" / "metrics.jsonl").read_text().splitlines()]


def weights(folder, name="ip2p.safetensors"):
    """All numbers of the result."""
    unet = load_checkpoint(folder / name).unet
    if unet.config.in_channels == 4:
        unet.widen(8)
    return torch.cat([p.flatten() for p in unet.parameters()])


# ---- what is learned, and what comes of it

def test_the_papers_run_opens_in_diffusers_and_edits_alike(base, command, tmp_path):
    """The preset's own settings but for size, on a few pairs; then our exporter, and one edit there and here."""
    code, said, complaint = run(command("--preset", "paper"))
    assert code == 0, complaint
    record = json.loads(said.splitlines()[-1])
    assert record["steps"] == 40 and record["finished"] and 0 < record["held_out_loss"] < 2
    for setting in "preset=paper optimizer=adamw warmup=0 cooldown=0.0 clip_norm=0.0 ema_decay=0.9996 views=0".split():
        assert setting in said
    assert not (tmp_path / "cache").exists() and Image.open(tmp_path / "run/edit/sheet-final.png").width == 9 * 38
    assert json.loads((tmp_path / "run/edit/settings.json").read_text())["base"] == str(base)
    ours = InstructPix2Pix.load(tmp_path / "run" / "ip2p.safetensors")
    before = load_checkpoint(base)
    assert ours.parts.metadata["held_out_loss"] == record["held_out_loss"] and ours.parts.parameterization == "eps"
    assert all(torch.equal(p, q) for p, q in zip(ours.text.parameters(), before.text.parameters()))          # frozen
    assert not ours.unet.input_blocks[0][0].weight[:, 4:].eq(0).all()

    ours.save(tmp_path / "folder", layout="diffusers")
    import_open_clip()
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "folder", safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    picture = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    x_T = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    settings = dict(num_inference_steps=5, guidance_scale=4.0, image_guidance_scale=1.5)
    theirs = theirs("make it red", picture, latents=x_T, **settings).images[0]
    mine, = ours.edit(picture, "make it red", steps=5, cfg_text=4.0, cfg_image=1.5, x_T=x_T, size=32, progress=False)
    assert np.abs(np.asarray(theirs, int) - np.asarray(mine, int)).max() <= 1          # of 255: they round down, we do not


@pytest.mark.parametrize("image_dropout", [True, False])
def test_the_loss_is_the_formula(base, pairs, command, tmp_path, monkeypatch, image_dropout):
    """The first step's, written out: a posterior sample, unscaled image latents, one uniform draw for both conditionings."""
    seen = []
    monkeypatch.setattr(finetune, "diffusion_loss", lambda *args: seen.append([a for a in args[1:]]) or args[0](
        torch.cat([args[1], args[6]], 1), args[3], args[2]).square().mean())
    flags = "--preset", "paper", "--dropout", 0.3, "--image-dropout" if image_dropout else "--no-image-dropout"
    assert run(command("--steps", 1, "--accumulate", 1, "--batch-size", 16, *flags))[0] == 0
    x0, context, t, noise, parameterization, image_latents = seen[0]
    parts, data = load_checkpoint(base), PairedDataset(pairs, min_resize_res=32, max_resize_res=32, crop_res=32)
    order = [data.order(0), data.order(1)]
    chosen = [data.example(n // len(data), order[n // len(data)][n % len(data)]) for n in range(16)]
    before, after = (torch.stack([example[k] for example in chosen]) for k in (0, 1))
    model = InstructPix2Pix(parts)
    rng = finetune.seeded(0, 0)
    r, expected_t = torch.rand(16, generator=rng), torch.randint(0, 1000, (16,), generator=rng)
    expected_noise, spread = (torch.randn(16, 4, 4, 4, generator=rng) for _ in range(2))
    with torch.no_grad():
        a, b = parts.vae.encode(before), parts.vae.encode(after)
        texts = model.encode_text([text if not drop else "" for (*_, text), drop in zip(chosen, r < 0.6)])
    dropped = (0.3 <= r) & (r < 0.9)
    expected = a.mean * ~(dropped & image_dropout)[:, None, None, None]
    assert 2 < dropped.sum() < 16
    assert torch.equal(t, expected_t) and torch.equal(noise, expected_noise) and parameterization == "eps"
    torch.testing.assert_close(image_latents, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(x0, 0.18215 * (b.mean + (b.logvar / 2).exp() * spread), rtol=0, atol=1e-5)
    torch.testing.assert_close(context, texts, rtol=0, atol=1e-5)


def test_training_on_scaled_image_latents_gives_an_editor_of_unscaled_ones(base, command, tmp_path):
    """Its first layer then sees what it saw: the trained weights times 0.18215, in place of the latents."""
    assert run(command("--scale-image-latents", "--steps", 3))[0] == 0
    saved = torch.load(list_checkpoints(tmp_path / "run/edit")[-1], weights_only=True)["ema"]["unet.input_blocks.0.0.weight"]
    result = load_checkpoint(tmp_path / "run" / "ip2p.safetensors").unet.input_blocks[0][0].weight
    assert torch.equal(result[:, :4], saved[:, :4]) and saved[:, 4:].abs().max() > 0
    torch.testing.assert_close(result[:, 4:], 0.18215 * saved[:, 4:], rtol=1e-6, atol=0)
    assert run(command("--steps", 3, out="plain"))[0] == 0
    assert not torch.equal(weights(tmp_path / "plain"), weights(tmp_path / "run"))


def test_a_base_may_predict_something_else_than_its_file_says(base, command, tmp_path):
    """Told that it predicts v, it learns v, and the result says so; that of another run is not gone on with."""
    for kind in ("eps", "v"):
        assert run(command("--steps", 1, "--parameterization", kind, out=kind))[0] == 0
        assert load_checkpoint(tmp_path / kind / "ip2p.safetensors").parameterization == kind
    assert losses(tmp_path / "eps") != losses(tmp_path / "v")
    code, _, complaint = run(command("--steps", 2, out="v"))
    assert code == 2 and "parameterization" in complaint and complaint.count("\n") == 1


def test_an_editor_is_trained_on(command, tmp_path):
    """--init goes on from its weights, those for the image too, and does not widen it again."""
    assert run(command("--steps", 20))[0] == 0
    start = tmp_path / "run" / "ip2p.safetensors"
    code, said, complaint = run(command("--steps", 1, "--lr", 1e-9, out="second", start=("--init", start)))
    assert code == 0, complaint
    torch.testing.assert_close(weights(tmp_path / "second"), weights(tmp_path / "run"), rtol=0, atol=1e-7)
    assert json.loads(said.splitlines()[-1])["base"]["steps"] == 20


def test_what_is_stored_once_is_found_by_editors_of_editors(base, command, tmp_path):
    """A miniature beside its base, then one from that: the autoencoder of both is in the base's file."""
    (tmp_path / "run").mkdir()
    start = tmp_path / "run" / "mini-sd.safetensors"
    save_checkpoint(load_checkpoint(base), start, metadata=dict(data="ip2p.world"))
    few = "--preset", "miniature", "--no-train-text", "--steps", 1, "--lr", 1e-4
    for start in (start, tmp_path / "run" / "first.safetensors"):
        code, _, complaint = run(command(*few, start=("--base" if "sd" in start.name else "--init", start)))
        assert code == 0, complaint
        made = load_checkpoint(tmp_path / "run" / "mini-ip2p.safetensors")
        assert made.metadata["shared"] == {"vae": "mini-sd.safetensors"}
        (tmp_path / "run" / "mini-ip2p.safetensors").rename(tmp_path / "run" / "first.safetensors")
        shutil.rmtree(tmp_path / "run" / "edit")


def test_distilling_begins_with_the_scales_and_the_editor_at_hand(base, tmp_path):
    editor = load_checkpoint(base)
    editor.unet.widen(8)
    save_checkpoint(editor, tmp_path / "ip2p.safetensors", metadata=dict(cfg_text=5.0, cfg_image=1.2))
    args = train.parse(["--stage", "distill", "--data", "world", "--out", str(tmp_path)])
    train.settle(args, train.open_base(args))
    assert (args.init, args.cfg_text, args.cfg_image) == (tmp_path / "ip2p.safetensors", 5.0, 1.2)


def test_a_model_that_is_no_miniature_needs_data(base):
    code, _, complaint = run(["--base", str(base), "--device", "cpu"])
    assert code == 2 and "needs --data DIR" in complaint and complaint.count("\n") == 1


# ---- the same numbers, however they are computed

def test_checkpointing_and_offloading_change_no_number(command, tmp_path):
    for name, flags in (("plain", ["--no-checkpointing"]), ("recomputed", ["--checkpointing", "--offload"])):
        assert run(command("--dtype", "fp32", "--steps", 6, *flags, out=name))[0] == 0
    assert torch.equal(weights(tmp_path / "plain"), weights(tmp_path / "recomputed"))


def test_compiling_changes_no_loss(command, tmp_path, monkeypatch):
    """The whole UNet as one traced program, with its gradients; without the C++ that it would become, which takes minutes."""
    traced, compile_model = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: traced.append(model) or compile_model(model, backend="aot_eager", fullgraph=True))
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        assert run(command("--dtype", "fp32", "--steps", 20, "--no-checkpointing", *flags, out=name))[0] == 0
    assert [type(model).__name__ for model in traced] == ["UNet"]
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=1e-5)


def test_what_is_cached_is_what_would_be_encoded(command, tmp_path):
    """Losses of 40 steps, of 16 epochs with as many views; half precision is the difference."""
    for views in (0, 16):
        assert run(command("--views", views, "--dtype", "fp32", out=f"{views}"))[0] == 0
    np.testing.assert_allclose(losses(tmp_path / "16"), losses(tmp_path / "0"), rtol=1e-3)
    assert len(losses(tmp_path / "0")) == 2 and (tmp_path / "0/edit/loss.png").exists()


@pytest.mark.parametrize("views", [0, 2])
def test_pictures_that_cannot_be_read_are_skipped_and_counted(command, tmp_path, views):
    data = write_pairs(tmp_path / "pairs", broken=(2, 5))
    code, said, complaint = run(command("--views", views, "--steps", 8, data=data))
    assert code == 0, complaint
    assert json.loads(said.splitlines()[-1])["skipped"] == 2 and "2 pairs were skipped" in said
    for i in (2, 5):
        assert said.count(f"{i:07d}/1_1.jpg: not a picture that Pillow can read") == 1


def test_two_processes_learn_what_one_does(base, command, tmp_path):
    """torchrun, of the same global batch: the loss at every logged step to 1e-4 of itself; and weights that are as far apart
    as 1% of the way they went. (Adam's steps do not shrink with the gradient, so it makes rounding errors larger.)"""
    flags = ("--dtype", "fp32", "--views", 1)
    assert run(command(*flags, out="one"))[0] == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run([*torchrun, *command(*flags, out="two")], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count('"held_out_loss"') == done.stdout.count("stage=edit") == 1          # only the first speaks
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    one, two, start = weights(tmp_path / "one"), weights(tmp_path / "two"), weights(base.parent, base.name)
    assert 0 < (one - start).norm() and (two - one).norm() < 0.01 * (one - start).norm()


def test_the_error_of_one_process_ends_all(command, tmp_path):
    """The others would wait for its gradients."""
    script = tmp_path / "failing.py"
    script.write_text("import os, sys, train\nfrom ip2p import finetune\nlosses, loss = [], finetune.diffusion_loss\n"
                      "def fail_at_the_third(*args):\n"
                      "    losses.append(loss(*args))\n"
                      "    if len(losses) == 3 and os.environ['RANK'] == '1':\n"
                      "        raise ValueError('the second has no room')\n"
                      "    return losses[-1]\n"
                      "finetune.diffusion_loss = fail_at_the_third\nsys.exit(train.run_command())\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*torchrun, *command("--dtype", "fp32", "--views", 1)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode and "train.py: the second has no room" in done.stderr


# ---- stopped, and going on

def in_child(argv, limit=None):
    """The command in a process of its own, forked to spare it the imports; limit: the largest file it may write."""
    def child():
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())                          # its own is shared, and stays locked by what is killed
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with open(argv[argv.index("--out") + 1] + ".log", "a") as log, redirect_stdout(log), redirect_stderr(log):
            code = train.run_command(argv)
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def end(process):
    process.join(120)
    return process.exitcode


def test_killed_at_any_moment_a_repeated_command_ends_in_the_same_numbers(command, tmp_path):
    """SIGKILL while it encodes, between checkpoints, and while it writes them; then left alone. Bit for bit."""
    flags = ("--views", 2, "--save-minutes", 0)
    assert end(in_child(command(*flags, out="whole"))) == 0
    argv, folder = command(*flags, "--cache", tmp_path / "other", out="killed"), tmp_path / "killed/edit"
    moments = [lambda: any((tmp_path / "other").glob("*/latents.f16")), lambda: len(list_checkpoints(folder)) > 0,
               lambda: list(folder.glob(".step-*.tmp")), lambda: int(list_checkpoints(folder)[-1].stem[5:]) > 25]
    for moment in moments:
        process = in_child(argv)
        while not moment() and process.is_alive():
            time.sleep(0.001)
        process.kill()
        assert end(process) == -9, "it ended before it was killed"
    assert end(in_child(argv)) == 0
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_sigterm_saves_and_exits_with_0(command, tmp_path):
    assert end(in_child(command(out="whole"))) == 0
    argv, folder = command("--save-minutes", 60, out="stopped"), tmp_path / "stopped/edit"
    process = in_child(argv)
    while not re.search(r"edit: +[1-9]", Path(f"{tmp_path}/stopped.log").read_text() if folder.exists() else ""):
        time.sleep(0.01)
    process.terminate()
    assert end(process) == 0
    saved, = list_checkpoints(folder)
    assert 0 < int(saved.stem[5:]) < 40 and not (tmp_path / "stopped/ip2p.safetensors").exists()
    said = Path(f"{tmp_path}/stopped.log").read_text()
    assert f"train.py: stopped at step {int(saved.stem[5:])}; repeat the command to go on" in said
    assert end(in_child(argv)) == 0
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(command, tmp_path):
    """As a limit on the size of files, a little below that of a checkpoint."""
    assert end(in_child(command("--steps", 10))) == 0
    first, = list_checkpoints(tmp_path / "run/edit")
    before, log = first.read_bytes(), Path(f"{tmp_path}/run.log")
    said = log.stat().st_size
    assert end(in_child(command("--steps", 20), limit=len(before) - 1000)) == 2
    complaint = [line for line in log.read_text()[said:].splitlines() if line.startswith("train.py:")]
    assert len(complaint) == 1 and "step-0000020.pt: cannot be written (File too large)" in complaint[0]
    assert f"{first} holds the last good state" in complaint[0]
    assert [p.name for p in (tmp_path / "run/edit").glob("*step*")] == [first.name] and first.read_bytes() == before
    assert end(in_child(command("--steps", 20))) == 0


def test_a_second_run_in_the_same_folder_is_refused(command, tmp_path):
    (tmp_path / "run" / "edit").mkdir(parents=True)
    (tmp_path / "run" / "edit" / ".step-0000003.pt.1.tmp").touch()                 # what the first is writing
    with locked(tmp_path / "run" / "edit"):
        code, _, complaint = run(command())
    assert code == 2 and f"{tmp_path / 'run/edit'}: another run is at work there" in complaint
    assert len(list((tmp_path / "run" / "edit").iterdir())) == 1


# ---- presets

def test_memory_of_the_presets_is_what_the_parameters_make_it():
    """4 bytes each for weight, gradient and average, 8 for AdamW; the rest as stated where the presets stand."""
    with torch.device("meta"):
        unet = UNet(UNetConfig(in_channels=8))
    count = sum(p.numel() for p in unet.parameters())
    copies = 2 * sum(p.numel() for p in unet.parameters() if p.ndim > 1)
    GB, told = 1e9, dict(re.findall(r"^  (\w+) .*?([\d.]+) GB", presets.ABOUT_PRESETS, re.M))
    assert count == 859_532_484
    rows = {name: p["batch_size"] / p["accumulate"] for name, p in presets.PRESETS.items()}
    assert float(told["paper"]) == pytest.approx(20 * count / GB + 0.8 + rows["paper"] / 8 * (0.14 + 0.2), abs=0.1)
    assert float(told["24gb"]) == pytest.approx((20 * count + copies) / GB + 0.8 + rows["24gb"] * 0.09, abs=0.1)
    assert float(told["12gb"]) == pytest.approx((8 * count + copies) / GB + rows["12gb"] * 0.09, abs=0.1)
    assert float(told["24gb"]) < 24 and float(told["12gb"]) < 12
    distilling = {name: presets.defaults(train.parse(["--stage", "distill", "--preset", name])) for name in told}
    assert {name for name, settings in distilling.items() if settings["offload"]} == {"12gb"}


@pytest.mark.parametrize("bf16, inputs, largest, everything", [(True, 0.011, 0.040, 0.31), (False, 0.022, 0.057, 0.47)])
def test_activations_of_the_presets_are_as_stated(monkeypatch, bf16, inputs, largest, everything):
    """GB of an example, counted over the tensors that autograd would keep of a full-size forward pass, without memory for
    any of them. As on a GPU: norms in float32, attention by the fused kernel."""
    def fused(q, k, v, heads):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def in_float32(forward):
        def wrapped(self, x):
            with torch.autocast("cpu", enabled=False):
                return forward(self, x.float())
        return wrapped

    run, taken = UNetBlock.run, []

    def counted(self, x, *others):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.untyped_storage(): None}) or t, lambda t: t):
            y = run(self, x, *others)
        taken.append((x.untyped_storage(), list(kept)))
        return y

    monkeypatch.setattr("ip2p.attention.attend", fused)
    monkeypatch.setattr(UNetBlock, "run", counted)
    for norm in (torch.nn.GroupNorm, torch.nn.LayerNorm):
        monkeypatch.setattr(norm, "forward", in_float32(norm.forward))
    sums = []
    for batch in (1, 2):                                             # what grows with the batch is no weight
        taken.clear()
        with FakeTensorMode():
            unet = UNet(UNetConfig(in_channels=8))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                unet(torch.empty(batch, 8, 32, 32), torch.zeros(batch), torch.empty(batch, 77, 768))
        whole = {storage._cdata: storage.nbytes() for _, kept in taken for storage in kept}
        blocks = [sum({s._cdata: s.nbytes() for s in kept}.values()) for _, kept in taken]
        sums.append((sum(x.nbytes() for x, _ in taken), blocks, sum(whole.values())))
    (x1, blocks1, whole1), (x2, blocks2, whole2) = sums
    assert (x2 - x1) / 1e9 == pytest.approx(inputs, abs=5e-4)
    assert max(b - a for a, b in zip(blocks1, blocks2)) / 1e9 == pytest.approx(largest, abs=5e-4)
    assert (whole2 - whole1) / 1e9 == pytest.approx(everything, abs=5e-3)


def test_the_papers_average_is_taken_four_times_a_step():
    """0.9999 after each of 4 parts, of which only the last changes the weights: 0.9996 once."""
    average = 0.0
    for _ in range(4):
        average = 0.9999 * average + 0.0001
    assert average == pytest.approx(1 - presets.PAPER["ema_decay"], rel=1e-3)
    assert presets.PAPER["accumulate"] == 4 and math.isclose(presets.PAPER["batch_size"] / 8 / 4, 32)
