"""Every stage of train.py at tiny size, as commands, and what it refuses."""
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from ip2p.checkpoint import load_vae, save_vae
from ip2p.scorer import load_scorer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All stages of the miniature, a few steps each, one from the other, as commands."""
    out, records = tmp_path_factory.mktemp("runs"), {}
    for stage, size in (("vae", 2), ("clip", 4), ("base", 2), ("scorer", 2), ("edit", 2), ("distill", 2)):
        flags = ("--data", "world") if stage in ("edit", "distill") else ()
        code, records[stage] = command("--stage", stage, "--out", out, "--steps", 2, "--batch-size", size, *flags)
        assert code == 0, records[stage]
    return out, records


def command(*flags):
    """Runs train.py on little. Returns its status, and the record that it printed last or what it complained of."""
    with redirect_stdout(StringIO()) as said, redirect_stderr(StringIO()) as complaint:
        code = train.run_command([*map(str, flags), *"--block 4 --reuse 1 --device cpu --score-examples 1".split()])
    return code, complaint.getvalue() if code else json.loads(said.getvalue().strip().splitlines()[-1])


def test_every_stage_runs_and_says_what_it_did(trained):
    out, records = trained
    assert {p.name for p in out.glob("*.safetensors")} == set(train.RESULTS.values()) - {"mini-gpt.safetensors"}
    for stage, record in records.items():
        assert record["stage"] == stage and record["steps"] == 2 and "commit" in record
        settings = json.loads((out / stage / "settings.json").read_text())
        assert settings["steps"] == 2 and settings["ema_decay"] and settings["device"] == "cpu"
        assert record["data"] == "ip2p.world, core"
    assert records["vae"]["psnr"] > 5 and set(records["edit"]["psnr"]) == {"edit", "unedited", "autoencoder"}


def test_the_trained_editor_edits(trained):
    from ip2p import InstructPix2Pix
    model = InstructPix2Pix.load(trained[0] / "mini-ip2p.safetensors")
    picture, = model.edit(Image.new("RGB", (128, 128), "green"), "make it night", steps=2, progress=False)
    assert picture.size == (128, 128) and model.parts.metadata["stage"] == "edit"


def test_trains_on_a_data_set_and_from_a_base(trained, tmp_path):
    """A folder in the published layout; and a base trained further, for more steps than were first asked for."""
    out, _ = trained
    for i in range(3):
        folder = tmp_path / "data" / f"{i:07d}"
        folder.mkdir(parents=True)
        (folder / "prompt.json").write_text(json.dumps(dict(caption="a fox", edit="make it red", output="a red fox")))
        for side in (0, 1):
            Image.new("RGB", (128, 128), (80 * i, 200 * side, 0)).save(folder / f"5_{side}.jpg")
    (tmp_path / "data" / "seeds.json").write_text(json.dumps([[f"{i:07d}", ["5"]] for i in range(3)]))
    edit = ("--batch-size", 2, "--base", out / "mini-sd.safetensors", "--out", tmp_path / "runs", "--steps", 2,
            "--cache", tmp_path / "cache")
    code, record = command(*edit, "--data", tmp_path / "data")
    assert code == 0 and record["data"] == "data" and record["steps"] == 2, record
    settings = (tmp_path / "runs/edit/settings.json").read_text()
    code, line = command(*edit, "--data", "world")                     # the same run on other data
    assert code == 2 and "other settings (data, pairs)" in line and line.count("\n") == 1
    assert (tmp_path / "runs/edit/settings.json").read_text() == settings
    code, line = command(*edit, "--data", f"{tmp_path / 'data'}/")     # another name of the same
    assert code == 0, line
    start = out / "mini-sd.safetensors"
    base = ("--batch-size", 2, "--stage", "base", "--init", start, "--out", out, "--seed", 1, "--steps")
    code, line = command(*base, 2)
    assert code == 2 and "other settings (init, seed)" in line       # the first run is still there
    (out / "base").rename(out / "first")
    for steps in (1, 3):
        code, record = command(*base, steps)
        assert code == 0 and record["steps"] == steps and record["init"]["stage"] == "base", record


def test_a_scorer_is_trained_further(trained, tmp_path):
    first = trained[0] / "mini-scorer.safetensors"
    further = "--stage", "scorer", "--init", first, "--batch-size", 2, "--steps", 1
    code, record = command(*further, "--out", tmp_path, "--lr", 1e-9)
    assert code == 0 and record["init"]["stage"] == "scorer" and "nouns" not in record["init"], record
    a, b = (load_scorer(path).state_dict() for path in (first, tmp_path / first.name))
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=1e-6) for name in a)
    code, line = command(*further, "--out", tmp_path / "other", "--subset", "all")
    assert code == 2 and "reads 48 nouns, not the" in line


def test_a_base_goes_on_from_a_base_alone_and_with_its_own_autoencoder(trained, tmp_path):
    shutil.copy(trained[0] / "vae.safetensors", tmp_path)
    further = "--stage", "base", "--out", tmp_path, "--batch-size", 2, "--steps", 1, "--init"
    code, line = command(*further, trained[0] / "mini-ip2p.safetensors")
    assert code == 2 and "not the miniature's text-to-image model, which takes 16 channels" in line and line.count("\n") == 1
    code, record = command(*further, trained[0] / "mini-sd.safetensors")
    assert code == 0 and record["init"]["stage"] == "base", record
    vae = load_vae(tmp_path / "vae.safetensors")
    vae.quant_conv.bias += 1
    save_vae(vae, tmp_path / "vae.safetensors")
    code, line = command(*further, trained[0] / "mini-sd.safetensors")
    assert code == 2 and "holds a run with other settings (vae)" in line


def test_two_processes_share_out_the_scenes_and_the_steps(trained, tmp_path):
    """torchrun: a block of scenes drawn by both, and the losses of one process to 1e-5 of themselves."""
    command = "train.py --stage base --steps 2 --batch-size 32 --block 160 --reuse 1 --score-examples 1 --dtype fp32 --device cpu"
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        for name in ("vae", "mini-clip"):
            shutil.copy(trained[0] / f"{name}.safetensors", out)
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                               *command.split(), "--out", str(out)], cwd=ROOT, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        record = json.loads(done.stdout.splitlines()[-1])
        row = json.loads((out / "base" / "metrics.jsonl").read_text())
        found[processes] = row["loss"], row["grad_norm"], record["held_out_loss"]
    assert found[2] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("flags, complaint", [
    ("--steps 0", "--steps must be at least 1, got 0"),
    ("--data world --batch-size 64 --block 32", "--block must be at least 64, got 32"),
    ("--batch-size 6 --accumulate 4", "--batch-size 6 cannot be shared out between 4 parts"),
    ("--stage clip --batch-size 8 --accumulate 4", "--stage clip learns in one process and one part"),
    ("--lr nan", "--lr must be a finite number"),
    ("--minutes nan", "--minutes must be a finite number, not below zero, got nan"),
    ("--ema-decay 1", "--ema-decay must be in 0..1, and below 1, got 1.0"),
    ("--warmup -5", "--warmup must be a finite number, not below zero, got -5"),
    ("--clip-norm -1", "--clip-norm must be a finite number, not below zero, got -1"),
    ("--dropout 0.5", "--dropout must be in 0..1/3, got 0.5"),
    ("--views -1", "--views must be at least 0, got -1"),
    ("--size 100", "--size must be a multiple of 32, got 100"),
    ("--size 0", "--size must be a multiple of 32, got 0"),
    ("--size -128", "--size must be a multiple of 32, got -128"),
    ("--cooldown 3", "--cooldown is a share of the steps, in 0..1, got 3.0"),
    ("--init weights/mini-ip2p.safetensors --data world --out weights", "the result would take its place; give another --out"),
    ("--max-resize 100", "--max-resize must be at least --size, 128, got 100"),
    ("--preset nothing", "argument --preset: invalid choice: 'nothing'"),
    ("--device nonsense", "--device nonsense cannot be used here"),
    ("--stage base", "vae.safetensors is missing: train --stage vae with the same --out first"),
    ("--out /proc/runs", "--out /proc/runs: cannot be written"),
    ("--base missing.safetensors", "missing.safetensors: no such file"),
    ("--base weights/mini-ip2p.safetensors", "to go on from an editor, give it as --init"),
    ("--init weights/mini-sd.safetensors", "to fine-tune a text-to-image model into one, give it as --base"),
    ("--init a --base b", "--base is widened into an editor, --init is an editor already: give one of the two"),
    ("--data /nowhere", "/nowhere: not a data set"),
    ("--stage all --init weights/mini-ip2p.safetensors", "--init is for a stage alone"),
    ("--stage vae --data pairs", "--stage vae learns from the toy world, not from --data pairs"),
    ("--data world --size 64", "--size 64: the toy world's pictures are 128 x 128"),
    ("--seed 99999999999999999999", "argument --seed: must be in 0.."),
    ("--stage all --train-text", "--train-text is for a stage alone"),
    ("--stage all --views 0", "--stage all needs --views of at least 1"),
    ("--stage distill --data world --train-text", "--train-text is for --stage edit"),
    ("--stage distill --data world --scale-image-latents", "--scale-image-latents is for --stage edit"),
])
def test_bad_settings_get_one_line(flags, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    try:
        code = train.run_command(["--out", str(tmp_path / "runs"), *flags.split()])
    except SystemExit as stopped:                                     # argparse's own
        code = stopped.code
    said = capsys.readouterr().err
    assert code == 2 and complaint in said and said.count("\n") == 1


def test_all_stages_are_for_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.run_command(["--stage", "all", "--out", str(tmp_path / "runs")]) == 2
    assert "--stage all runs in one process" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_help_explains_every_flag():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for action in vars(train.parse([])):
        assert f"--{action.replace('_', '-')}" in done.stdout
    for preset in train.PRESETS:
        assert preset in done.stdout
