"""The training loop, and every stage of train.py at tiny size."""
import argparse
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from torch import nn

from ip2p.muon import orthogonalize
from ip2p.stages import Pool
from ip2p.training import EMA, fit, lr_scale, seeded

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402


def make_run(folder, steps, minutes=None, stop_after=None):
    """A small regression. `stop_after` raises KeyboardInterrupt's signal in the middle, as Ctrl-C would."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4))

    def loss_fn(step):
        if step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        x = torch.randn(32, 8, generator=seeded(0, step))
        return (model(x) - x[:, :4] ** 2).square().mean(), {}

    result = fit(model, loss_fn, folder, steps=steps, minutes=minutes, lr=1e-2, optimizer="muon", warmup=5, cooldown=0.3,
                 config=dict(steps=steps))
    return model.state_dict(), result


def test_resume_equals_uninterrupted_run(tmp_path):
    whole, result = make_run(tmp_path / "whole", 40)
    assert result["finished"] and result["step"] == 40
    _, first = make_run(tmp_path / "parts", 40, stop_after=17)
    assert not first["finished"] and first["step"] == 18
    parts, second = make_run(tmp_path / "parts", 40)
    assert second["finished"]
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_folder_with_other_settings_is_refused(tmp_path):
    make_run(tmp_path, 4)
    with pytest.raises(ValueError, match="other settings .steps."):
        make_run(tmp_path, 6)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="the loss became nan"):
        fit(model, lambda step: (model(torch.full((1, 2), float("nan"))).sum(), {}), tmp_path, steps=20)


def test_checkpoints_load_with_weights_only(tmp_path):
    make_run(tmp_path, 4)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert {"model", "ema", "opt", "step", "config"} <= set(saved)


def test_ema_follows_the_published_warm_up():
    """decay_n = min(decay, (1 + n) / (10 + n)), by a scalar recurrence."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    ema, expected = EMA(model, 0.5), 0.0
    for n in range(1, 20):
        nn.init.constant_(model.weight, float(n))
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert ema.weights["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_learning_rate_rises_and_falls():
    assert lr_scale(0, 100, 10, 0.2) == pytest.approx(0.1)
    assert lr_scale(50, 100, 10, 0.2) == 1.0
    assert lr_scale(90, 100, 10, 0.2) == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_muon_updates_are_nearly_orthogonal(shape):
    """All singular values land in 0.6 .. 1.3, and the singular vectors stay: u v^T of the exact decomposition."""
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = orthogonalize(m)
    s = torch.linalg.svdvals(x)
    assert s.min() > 0.3 and s.max() < 1.3
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    assert torch.cosine_similarity((u @ v).flatten(), x.flatten(), dim=0) > 0.95


def test_pool_batches_depend_on_the_step_alone():
    """Whatever came before, so that a resumed run sees what it would have seen; each example `reuse` times a block."""
    args = argparse.Namespace(batch_size=3, block=8, reuse=2, seed=0)

    def draw(start, count):
        return torch.arange(start, start + count), [f"caption {i}" for i in range(start, start + count)]

    pool, seen = Pool(draw, args), []
    for step in range(12):
        numbers, captions = pool.batch(step)
        fresh_numbers, fresh_captions = Pool(draw, args).batch(step)
        assert torch.equal(numbers, fresh_numbers) and captions == fresh_captions
        assert captions == [f"caption {i}" for i in numbers.tolist()]
        seen += numbers.tolist()
    assert sorted(seen) == sorted(2 * list(range(18)))            # blocks of 6 (two batches of 3), twice each


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All stages, a few steps each, one from the other, as commands."""
    out, records = tmp_path_factory.mktemp("runs"), {}
    for stage, size in (("vae", 2), ("clip", 4), ("base", 2), ("edit", 2)):
        code, records[stage] = command("--stage", stage, "--out", out, "--steps", 2, "--batch-size", size)
        assert code == 0, records[stage]
    return out, records


def command(*flags):
    """Runs train.py on little. Returns its status, and the record that it printed last or what it complained of."""
    with redirect_stdout(StringIO()) as said, redirect_stderr(StringIO()) as complaint:
        code = train.run_command([*map(str, flags), "--block", "4", "--reuse", "1", "--device", "cpu", "--score-examples", "2"])
    return code, complaint.getvalue() if code else json.loads(said.getvalue().strip().splitlines()[-1])


def test_every_stage_runs_and_says_what_it_did(trained):
    out, records = trained
    assert {p.name for p in out.glob("*.safetensors")} == {"vae.safetensors", "mini-clip.safetensors", "mini-sd.safetensors",
                                                          "mini-ip2p.safetensors"}
    for stage, record in records.items():
        assert record["stage"] == stage and record["steps"] == 2 and "commit" in record
    assert records["vae"]["psnr"] > 5 and set(records["edit"]["psnr"]) == {"edit", "unedited", "autoencoder"}


def test_the_trained_editor_edits(trained):
    from PIL import Image

    from ip2p import InstructPix2Pix
    model = InstructPix2Pix.load(trained[0] / "mini-ip2p.safetensors")
    picture, = model.edit(Image.new("RGB", (128, 128), "green"), "make it night", steps=2, progress=False)
    assert picture.size == (128, 128) and model.parts.metadata["stage"] == "edit"


def test_trains_on_a_data_set_and_from_a_base(trained, tmp_path):
    """A folder in the published layout; and a base trained further, for more steps than were first asked for."""
    from PIL import Image
    out, _ = trained
    for i in range(3):
        folder = tmp_path / "data" / f"{i:07d}"
        folder.mkdir(parents=True)
        (folder / "prompt.json").write_text(json.dumps(dict(caption="a fox", edit="make it red", output="a red fox")))
        for side in (0, 1):
            Image.new("RGB", (128, 128), (80 * i, 200 * side, 0)).save(folder / f"5_{side}.jpg")
    (tmp_path / "data" / "seeds.json").write_text(json.dumps([[f"{i:07d}", ["5"]] for i in range(3)]))
    edit = ("--batch-size", 2, "--stage", "edit", "--base", out / "mini-sd.safetensors", "--out", tmp_path / "runs", "--steps", 2)
    code, record = command(*edit, "--data", tmp_path / "data")
    assert code == 0 and record["data"] == "data" and record["steps"] == 2, record
    code, line = command(*edit)                                        # the same run on other data
    assert code == 2 and "other settings (data)" in line and line.count("\n") == 1
    base = ("--batch-size", 2, "--stage", "base", "--init", out / "mini-sd.safetensors", "--out", out, "--seed", 1, "--steps")
    code, line = command(*base, 2)
    assert code == 2 and "other settings (seed)" in line             # the first run is still there
    (out / "base").rename(out / "first")
    for steps in (1, 3):
        code, record = command(*base, steps)
        assert code == 0 and record["steps"] == steps and record["init"]["stage"] == "base", record


@pytest.mark.parametrize("flags, complaint", [
    ("--steps 0", "--steps must be at least 1, got 0"),
    ("--batch-size 64 --block 32", "--block must be at least 64, got 32"),
    ("--lr nan", "--lr must be a finite number"),
    ("--device nonsense", "--device nonsense cannot be used here"),
    ("--stage base", "vae.safetensors is missing: train --stage vae with the same --out first"),
    ("--base missing.safetensors", "missing.safetensors: no such file"),
])
def test_bad_settings_get_one_line(flags, complaint, tmp_path):
    done = subprocess.run([sys.executable, "train.py", "--out", str(tmp_path / "runs"), *flags.split()], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert complaint in done.stderr and done.stderr.count("\n") == 1


def test_help_explains_every_flag():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for flag in ("--stage", "--out", "--steps", "--minutes", "--batch-size", "--lr", "--optimizer", "--seed", "--device"):
        assert flag in done.stdout
