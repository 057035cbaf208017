"""Every command in the README, at small size, and what the README says of the files."""
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines() if line.strip()]
TRAIN = "--steps 2 --batch-size 2 --score-examples 2 --device cpu"
FEW_PAIRS = "--n-samples 2 --steps 2 --clip-threshold -1 --clip-dir-threshold -1 --clip-img-threshold -1"
SMALLER = {              # the longest beginning of a command says what makes it small
    "python sample.py": "--steps 2", "python train.py": f"{TRAIN} --block 4 --reuse 1",
    "python train.py --base": f"{TRAIN} --accumulate 1 --views 1 --size 64", "torchrun": f"{TRAIN} --accumulate 1 --size 64",
    "python train.py --init": f"{TRAIN} --accumulate 1 --views 1 --size 64",
    "python train.py --stage distill --init": f"{TRAIN} --accumulate 1 --views 1 --size 64 --block 4 --reuse 1",
    "python -m ip2p.evaluate edits": "--count 20 --steps 1", "python -m ip2p.evaluate pictures": "--count 4 --steps 1",
    "python -m ip2p.evaluate curve": "--count 2 --steps 2 --cfg-image 1.5 --strengths 0.5 --shares 0.5",
    "python -m ip2p.evaluate pairs": "--count 2 --steps 2 --shares 0.5",
    "python -m ip2p.bench": "--batch-size 1 --steps 1 --repeats 1 --size 64",
    "python make_data.py": f"--num-captions 3 {FEW_PAIRS}",
    "python make_data.py --model": f"{FEW_PAIRS} --clip weights/mini-clip.safetensors --out drawn",
    "python -m pytest": "--collect-only"}
ELSEWHERE = {"python train.py --stage all --data world": "test_train_all.py"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that looks like a clone, with small stand-ins for the public checkpoints, a data set and a photograph."""
    from ip2p.checkpoint import Parts, save_checkpoint
    from ip2p.text import TextConfig, TextEncoder
    from ip2p.unet import UNet, UNetConfig
    from ip2p.vae import AutoencoderKL, VAEConfig
    folder = tmp_path_factory.mktemp("clone")
    for name in ("sample.py", "train.py", "make_data.py", "ip2p", "weights", "tests", "pyproject.toml", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    torch.manual_seed(0)
    for name, channels in (("instruct-pix2pix-00-22000", 8), ("v1-5-pruned-emaonly", 4)):
        parts = Parts(UNet(UNetConfig(channels, 4, 32, (1, 2), 1, (True, False), context_dim=64, num_heads=8)),
                      AutoencoderKL(VAEConfig(32, (1, 1, 1, 1), 1)), TextEncoder(TextConfig(width=64, layers=1, heads=1)),
                      "eps", 64, {})
        save_checkpoint(parts, folder / f"{name}.safetensors")
    (folder / "pairs").mkdir()
    with open(folder / "pairs/pairs.jsonl", "w") as rows:
        for i in range(20):
            for name, color in (("before", (12 * i, 0, 0)), ("after", (0, 0, 12 * i))):
                Image.new("RGB", (80, 64), color).save(folder / f"pairs/{i}-{name}.png")
            rows.write(json.dumps(dict(input_image=f"{i}-before.png", edited_image=f"{i}-after.png", edit="make it blue")) + "\n")
    Image.new("RGB", (96, 64), "green").save(folder / "photo.jpg")
    (folder / "edits.jsonl").write_text(json.dumps(dict(caption="a fox", edit="make it night", output="a fox at night")) + "\n")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_runs(command, folder):
    command = re.sub(r"^pip install .* && ", "", command.split("  #")[0].strip())
    if command in ELSEWHERE:
        assert (ROOT / "tests" / ELSEWHERE[command]).exists()
        return
    known = [start for start in SMALLER if command.startswith(start)]
    assert known or command.startswith("python -m ip2p.world"), f"a README command that this test does not know: {command}"
    if command.startswith("torchrun"):
        command = command.replace("torchrun --nproc-per-node 8", "python -m torch.distributed.run --nproc-per-node 2")
    words = shlex.split(command)[1:] + shlex.split(SMALLER[max(known, key=len)] if known else "")
    done = subprocess.run([sys.executable, *words], cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if words[0] == "sample.py":
        written = [line for line in done.stdout.splitlines() if line.endswith(".png")]
        assert written and all((folder / path).exists() for path in written)
        assert "outputs/fox-make-it-night.png" in written or "make it night" not in command or "--grid" in command


def test_readme_python_runs(folder, monkeypatch):
    """All blocks in a row, as the later use the earlier; in float32 on the CPU, and in two steps where they say 50."""
    monkeypatch.chdir(folder)
    code, names = "\n".join(re.findall(r"```python\n(.*?)```", README, re.S)), {}
    for large, small in (('"cuda"', '"cpu"'), (r"\bfloat16\b", "float32"), (r"\b50\b", "2")):
        code, found = re.subn(large, small, code)
        assert found, large
    exec(code, names)
    assert names["picture"].size == (64, 48) and names["source"].size == names["edited"].size == (64, 64)
    assert (folder / "folder/model_index.json").exists()


def test_file_guide_names_every_module_once():
    guide = README.split("### What is in the files, in reading order\n")[1].split("\n## ")[0]
    named = [name for row in guide.splitlines() if row.startswith("|") for name in re.findall(r"(\w+\.py)`", row.split("|")[1])]
    files = [p.name for p in [*(ROOT / "ip2p").glob("*.py"), *ROOT.glob("*.py")] if p.name != "__init__.py"]
    assert sorted(named) == sorted(files)


def test_pictures_in_the_readme_exist():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / p).exists() for p in pictures)
