"""What is timed side by side does the same."""
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from ip2p import InstructPix2Pix, bench, pipeline
from ip2p.checkpoint import Parts
from ip2p.text import TextConfig, TextEncoder
from ip2p.unet import UNet, UNetConfig
from ip2p.vae import AutoencoderKL, VAEConfig


@pytest.mark.parametrize("control", ["self-attention", "cross-attention"])
def test_maps_and_values_draw_the_same_pairs(control):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = (UNet(UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(True, True),
                                 context_dim=32, num_heads=2, norm_groups=8)),
                 AutoencoderKL(VAEConfig(channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4)),
                 TextEncoder(TextConfig(vocab_size=514 + 200, context_length=16, width=32, layers=2, heads=2)))
    model = InstructPix2Pix(Parts(*(part.eval().requires_grad_(False) for part in parts), "eps", 32, {}))
    draw = lambda: torch.cat(model.draw_pairs(["a fox", "a car"], ["a red fox", "a car at night"], [1, 2], [0.5, 0.9], [3.0, 5.0],
                                              steps=4, control=control))
    values, calls = draw(), []

    class Counted(bench.MaterializedRun):
        def __call__(self, *args):
            calls.append(args[-1])
            return super().__call__(*args)

    with patch.object(pipeline, "ControlledRun", Counted):
        maps = draw()
    assert (values - maps).abs().max() < 1e-4 and set(calls) == {True, False}


def test_bench_prints_both_rates(capsys):
    weights = Path(__file__).parent.parent / "weights"
    bench.bench_pairs(SimpleNamespace(full_size=False, model=weights / "mini-sd.safetensors", device="cpu", dtype="fp32", size=64,
                                      batch_size=1, steps=1, repeats=1))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("ratio" in line and "largest difference" in line for line in lines[1:])
