"""make_data.py on models of random weights and five prompts: the fixtures and helpers of its tests."""
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ip2p.checkpoint import Parts, save_checkpoint
from ip2p.clip_filter import build_clip, save_clip
from ip2p.data import read_jsonl
from ip2p.text import TextConfig, TextEncoder
from ip2p.unet import UNet, UNetConfig
from ip2p.vae import AutoencoderKL, VAEConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                                  # where `python make_data.py` finds sample.py
spec = importlib.util.spec_from_file_location("make_data", ROOT / "make_data.py")
make_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_data)

PROMPTS = [{"caption": "a fox in the snow", "edit": "make it rain", "output": "a fox in the rain", "url": "http://x"},
           {"input": "a boat", "edit": "add a café", "output": "a boat and a café"},
           {"caption": "a cat", "edit": "make it a dog", "output": "a dog"},
           {"caption": "a hill", "edit": "make it night", "output": "a hill at night"},
           {"caption": "a road", "edit": "as a sketch", "output": "a sketch of a road"}]
METADATA = {"seed", "p2p_threshold", "cfg_scale", "clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image"}
LOOSE = ["--clip-threshold", "-1", "--clip-dir-threshold", "-1", "--clip-img-threshold", "-1"]


# ---- models of random weights, and the command

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(UNetConfig(in_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                               attention_levels=(True, True), context_dim=32, num_heads=2, norm_groups=8))
        vae = AutoencoderKL(VAEConfig(channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4))
        text = TextEncoder(TextConfig(vocab_size=514 + 200, context_length=16, width=32, layers=2, heads=2))
        save_checkpoint(Parts(unet, vae, text, "eps", 32, {"cfg_text": 2.0}), folder / "sd.safetensors")
        config = dict(embed_dim=24, vision_cfg=dict(image_size=32, patch_size=16, width=32, layers=1, head_width=16),
                      text_cfg=dict(context_length=16, vocab_size=514 + 200, width=32, heads=2, layers=1))
        clip = build_clip(config)
        for p in clip.parameters():
            torch.nn.init.normal_(p, std=0.3)
        save_clip(clip, config, folder / "clip.safetensors", {})
    lines = (json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in PROMPTS)
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def flags(models, out, *more):
    return [*map(str, ("--model", models / "sd.safetensors", "--clip", models / "clip.safetensors", "--prompts-file",
                       models / "prompts.jsonl", "--out", out, "--device", "cpu", "--steps", 2, "--n-samples", 3,
                       "--max-out-samples", 2, "--batch-size", 2, *LOOSE, *more))]


@pytest.fixture
def cli(models, tmp_path, capsys):
    """Runs make_data.py on five prompts; later flags replace earlier ones. Returns its status, stdout, stderr."""
    def run(*more, out=tmp_path / "out"):
        try:
            code = make_data.run(flags(models, out, *more))
        except SystemExit as end:                              # argparse's
            code = end.code
        text = capsys.readouterr()
        return SimpleNamespace(code=code, out=text.out, err=text.err)
    return run


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """What one uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert make_data.run(flags(models, out)) == 0
    return out


def tree(path):
    """All files and folders below a folder, hidden ones too, with their bytes."""
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def rows(file):
    return [row for _, row in read_jsonl(file)]
