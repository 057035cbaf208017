"""What is timed side by side does the same, and a table says so when it does not."""
import math
import re
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ip2p import InstructPix2Pix, bench, bench_programs
from ip2p.checkpoint import Parts
from ip2p.command_line import exit_status
from ip2p.sides import side_by_side, take_turns
from ip2p.text import TextConfig, TextEncoder
from ip2p.unet import UNet, UNetConfig
from ip2p.vae import AutoencoderKL, VAEConfig

def tiny_model(in_channels, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = (UNet(UNetConfig(in_channels, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                                 attention_levels=(True, True), context_dim=32, num_heads=2, norm_groups=8)),
                 AutoencoderKL(VAEConfig(channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4)),
                 TextEncoder(TextConfig(vocab_size=514 + 200, context_length=16, width=32, layers=2, heads=2)))
    return InstructPix2Pix(Parts(*(part.eval().requires_grad_(False) for part in parts), "eps", 32, {}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A diffusers folder of a tiny editor, and one of another."""
    found = [tmp_path_factory.mktemp("bench") / name for name in ("one", "other")]
    for seed, folder in enumerate(found):
        tiny_model(8, seed).save(folder, "diffusers")
    return found


@pytest.mark.parametrize("control", ["self-attention", "cross-attention"])
def test_maps_and_values_draw_the_same_pairs(control, tmp_path):
    """diffusers' loop, sampler and maps against ours: apart by rounding in float32, 2e-6 when written; and the other control
    is seen."""
    pytest.importorskip("diffusers")
    tiny_model(4).save(tmp_path, "diffusers")
    told = SimpleNamespace(device="cpu", dtype="fp32", batch_size=4, size=32, steps=4)
    ours, theirs = (make(tmp_path, told) for make in (bench_programs.draw_by_ip2p, bench_programs.draw_by_diffusers))
    other, = {"self-attention", "cross-attention"} - {control}
    values = ours(control)
    assert values.shape == (8, 3, 32, 32) and np.abs(values - theirs(control)).max() < 1e-5
    assert np.abs(values - theirs(other)).max() > 1e-2


def test_both_edits_are_the_same_and_other_weights_are_seen(folders):
    pytest.importorskip("diffusers")
    settings = dict(pictures=2, size=32, steps=3, cfg_text=5.0, cfg_image=1.5)
    ours, theirs = (make(folders[0], "cpu", "fp32")(**settings)
                    for make in (bench_programs.edit_by_ip2p, bench_programs.edit_by_diffusers))
    other = bench_programs.edit_by_ip2p(folders[1], "cpu", "fp32")(**settings)
    largest = [int(bench.differences(edited, theirs).split()[0]) for edited in (ours, other)]
    assert ours.shape == (2, 32, 32, 3) and largest[0] <= 1 and largest[1] > 20     # one: rounding to bytes


def test_operations_are_counted(folders):
    """Of Stable Diffusion 1.5's size at 512 x 512, as counted by hand in TFLOP: 0.803 an evaluation of the UNet, 1.12 to encode
    and 2.51 to decode, which three evaluations in each of 20 steps make 51.8."""
    with torch.device("meta"):
        parts = UNet(UNetConfig(in_channels=8)), AutoencoderKL(), TextEncoder()
    model = InstructPix2Pix(Parts(*parts, "eps", 512, {}))
    one, two, guided = (bench_programs.count_operations(model, 1, 512, steps, 1, scale) / 1e12
                        for steps, scale in ((1, 1), (2, 1), (1, 1.5)))
    assert two - one == pytest.approx(0.803, rel=5e-3) and one == pytest.approx(1.12 + 2.51 + 0.803, rel=1e-2)
    assert guided + 19 * 3 * (two - one) == pytest.approx(51.8, rel=5e-3)
    multiply = bench_programs.multiply_as_much(folders[0], "cpu", "fp32")
    assert multiply(pictures=2, size=32, steps=3, cfg_text=5.0, cfg_image=1.5) is None


def test_both_trainings_are_the_same_and_other_weights_are_seen(folders):
    """Losses of five steps, each of which depends on the updates before it: float32's rounding apart, and half precision's
    (2 ** -11, the spacing of its numbers) where latents and text are cached in it."""
    pytest.importorskip("diffusers")
    told = SimpleNamespace(device="cpu", dtype="fp32", batch_size=8, size=32, checkpointing=True, compile=False)
    theirs = bench_programs.train_by_diffusers(folders[0], told)
    losses = np.array([theirs() for _ in range(5)])
    for folder, cached, least, most in ((folders[0], False, 0, 1e-5), (folders[0], True, 0, 2 ** -11),
                                        (folders[1], False, 1e-2, 1)):
        step = bench_programs.train_by_ip2p(folder, told, cached)
        apart = np.abs(np.array([step() for _ in range(5)]) / losses - 1).max()
        assert least <= apart < most, (folder.name, cached, apart)


@pytest.mark.parametrize("flags, complaint", [
    (["--device", "nonsense"], "--device nonsense cannot be used here"),
    (["--device", "cpu", "--model", "nothing.safetensors"], "nothing.safetensors: no such file or folder"),
    (["--device", "cpu", "--model", "MODEL", "--steps", "0", "--repeats", "1"], "steps must be in 1..1000, got 0")])
def test_what_cannot_work_is_one_line(flags, complaint, folders, capfd):
    flags = [str(folders[0]) if flag == "MODEL" else flag for flag in flags]
    assert bench.main(["growth", *flags]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"ip2p.bench: {complaint}") and said.count("\n") == 1


def test_a_start_that_fails_says_what_sample_py_said(tmp_path, monkeypatch, capfd):
    (tmp_path / "page.safetensors").write_text("<!doctype html>")
    monkeypatch.chdir(tmp_path)                                 # a path from here, though sample.py runs elsewhere
    assert bench.main(["start", "--device", "cpu", "--model", "page.safetensors", "--repeats", "1"]) == 2
    said = capfd.readouterr().err
    assert f"{tmp_path}/page.safetensors: a web page saved" in said and said.count("\n") == 1


def allocating():
    def run(megabytes):
        return len(np.ones(megabytes << 17))                   # 8 bytes each
    return run


def wanting():
    def run():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    return run


def test_memory_that_lacks_in_a_program_is_said_as_elsewhere(capfd):
    with side_by_side("cpu", one=(wanting,)) as sides:
        assert exit_status("x.py", lambda: take_turns(sides, 1), "less") == 2
    assert capfd.readouterr().err == "x.py: out of memory; try less\n"


def test_memory_is_of_the_call_not_of_those_before():
    with side_by_side("cpu", one=(allocating,)) as sides:
        peaks = [take_turns(sides, 1, megabytes=m)["one"].peak for m in (0, 256, 0)]
    if peaks[0] is None:
        pytest.skip("needs Linux")
    before, during, after = (peak / 2 ** 20 for peak in peaks)
    assert abs(during - before - 256) < 16 and abs(after - before) < 16          # in MiB; the allocator keeps a little


@contextmanager
def in_this_process(device, **programs):
    """Stands in for `side_by_side`, without the time that new processes take to start."""
    def side(make, *args):
        run = make(*args)
        return lambda **settings: (len(programs), 1e9, run(**settings))
    yield {name: side(*program) for name, program in programs.items()}


@pytest.mark.parametrize("kind, flags, rows", [
    ("edit", ["--cfg-image", "1.5", "1", "--compile", "--low-memory"], 12), ("train", ["--dtype", "bf16"], 3), ("pairs", [], 4),
    ("growth", ["--steps", "1", "4", "--workers", "1"], 5 + 4), ("start", [], 5)])
def test_every_kind_ends_with_its_table(kind, flags, rows, folders, tmp_path, capsys, monkeypatch):
    if kind in ("edit", "train", "pairs"):
        pytest.importorskip("diffusers")
    if kind == "pairs":
        tiny_model(4).save(tmp_path / "model", "diffusers")
    monkeypatch.setattr(bench, "side_by_side", in_this_process)
    monkeypatch.setattr(torch, "compile", lambda program, **_: program)
    model = tmp_path / "model" if kind == "pairs" else folders[0]
    bench.main([kind, "--model", str(model), "--batch-size", "2", "--size", "32", "--steps", "1", "--repeats", "1",
                "--device", "cpu", *flags])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "--:" not in line]
    lines = [line for line in lines if "import diffusers" not in line]         # only where that can be imported by itself
    assert len(lines) == rows + (2 if kind == "growth" else 1)
    numbers = [float(n) for line in lines for n in re.findall(r"(?<=\| )(?:-?[\d.]+(?:e-\d+)?|nan|inf)(?= )", line)]
    assert len(numbers) >= 2 * rows and all(map(math.isfinite, numbers))


def test_programs_that_memory_does_not_hold_together_run_alone(folders, capsys, monkeypatch):
    """The stand-in's seconds are the number of programs at once."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(bench, "side_by_side", in_this_process)
    given = ["--model", str(folders[0]), "--batch-size", "2", "--size", "32", "--repeats", "1", "--device", "cpu"]
    for flags, rate in (([], "0.667"), (["--alone"], "2")):
        bench.main(["train", *given, *flags])
        rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 x 32")]
        assert len(rows) == 3 and all(row[2].startswith(rate) for row in rows), rows
