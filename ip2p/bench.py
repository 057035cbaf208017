"""How fast: medians of repeats that take turns, each program in a process of its own, and how far their results differ.

    python -m ip2p.bench edit                               # whole edits, against diffusers' pipeline with the same weights
    python -m ip2p.bench edit --full-size --dtype bf16 --compile
    python -m ip2p.bench growth                             # an edit against pictures, steps, size and processes
    python -m ip2p.bench train --batch-size 16              # optimiser steps, against those of diffusers' training script
    python -m ip2p.bench pairs                              # drawing pairs, against diffusers with maps written out
    python -m ip2p.bench start                              # from the command line to the first picture

Each ends with a Markdown table. Of options that take several values, `edit` measures all combinations, `growth` changes one
at a time, the others at their first, and the rest take the first. --full-size is Stable Diffusion 1.5 with random weights:
nothing is downloaded. `edit`, `train` and `pairs` need diffusers: pip install -e ".[bench]". Memory is in GB of 1e9 bytes: on
a GPU what torch allocated at most; on a CPU the most that a process had in memory, libraries and mapped weights included
(Linux).
"""
import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
import torch

from .bench_programs import (draw_by_diffusers, draw_by_ip2p, edit_by_diffusers, edit_by_ip2p, export,
                             multiply_as_much, train_by_diffusers, train_by_ip2p)
from .command_line import DEVICE, WEIGHTS, Parser, exit_status
from .distributed import DTYPES, usable_device
from .sides import Side, side_by_side, take_turns
from .tables import decimal, print_table


@contextmanager
def exported(args, editor=True):
    """(folder, side of its pictures): the model as a diffusers folder, which both programs open."""
    with tempfile.TemporaryDirectory() as folder:
        with side_by_side(args.device, export=(export, args, folder, editor)) as sides:
            _, _, own_size = sides["export"]()
        yield folder, own_size


def machine(args):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else f"{cores} CPU cores"
    others = [f"{name} {version(name)}" for name in ("torch", "diffusers") if importlib.util.find_spec(name)]
    model = "Stable Diffusion 1.5's size" if args.full_size else Path(args.model or "the shipped model").name
    return f"{model}, {args.dtype}, {where}, {torch.get_num_threads()} threads, {', '.join(others)}, {args.repeats} repeats"


def gigabytes(peak):
    return "not measured" if peak is None else decimal(peak / 1e9, 2)


# ---- edits, against diffusers

def bench_edit(args):
    """Whole edits, from picture to picture, by programs that have the same weights, noise, steps and precision; and matrix
    products of as many operations."""
    print(machine(args), flush=True)
    with exported(args) as (folder, own_size):
        common = folder, args.device, args.dtype
        programs = {"ip2p": (edit_by_ip2p, *common), "diffusers": (edit_by_diffusers, *common)}
        if args.compile:
            programs |= {f"{name}, compiled": (*program, True) for name, program in programs.items()}
        if args.low_memory:
            programs["ip2p, low memory"] = (edit_by_ip2p, *common, False, True)
        programs["matrix products"] = (multiply_as_much, *common)
        rows, peers = [], [name for name in programs if name.startswith(("diffusers", "matrix"))]
        with side_by_side(args.device, **programs) as sides:
            for B, size, steps, scale in product(args.batch_size, args.size or [own_size], args.steps, args.cfg_image):
                timed = take_turns(sides, args.repeats, pictures=B, size=size, steps=steps, cfg_text=args.cfg_text,
                                   cfg_image=scale)
                for name, t in timed.items():
                    edited = t.results[-1]                                      # None of matrix products
                    rows.append([f"{B} x {size} x {size}, {steps} steps, guidance {args.cfg_text:g} and {scale:g}", name,
                                 decimal(t.seconds, 3), decimal(B / t.seconds, 3), decimal(t.first, 1),
                                 "" if edited is None else gigabytes(t.peak),
                                 *(decimal(timed[peer].seconds / t.seconds, 2) for peer in peers),
                                 "" if edited is None else differences(edited, timed["diffusers"].results[-1])])
                    print(*rows[-1], sep="  ", flush=True)
    print_table(["edit", "by", "s", "edits/s", "first, s", "GB", *(f"x {peer}" for peer in peers),
                 "differs by at most (mean), of 255"], rows)


def differences(a, b):
    """Largest and mean absolute difference of two arrays of pixels."""
    apart = np.abs(a.astype(int) - b.astype(int))
    return f"{apart.max()} ({apart.mean():.3f})"


# ---- how the cost of an edit grows

def bench_growth(args):
    """Seconds of an edit against one quantity at a time, with the exponent p of seconds ~ quantity ** p by least squares."""
    print(machine(args), flush=True)
    rows, laws = [], []
    with exported(args) as (folder, own_size):
        sizes = args.size or [own_size, own_size // 2, own_size * 3 // 2, own_size * 2]
        values = dict(pictures=args.batch_size, steps=args.steps, size=sizes)
        base = {name: found[0] for name, found in values.items()} | dict(cfg_text=args.cfg_text, cfg_image=args.cfg_image[0])
        program = edit_by_ip2p, folder, args.device, args.dtype
        for name, found in values.items():
            with side_by_side(args.device, ip2p=program) as sides:         # a new one: a CPU's keeps memory of earlier calls
                for value in sorted(set(found)):
                    now = base | {name: value}
                    timed = take_turns(sides, args.repeats, **now)["ip2p"]
                    rows.append([name, value, timed.seconds, now["pictures"], timed.peak])
        for count in sorted(set(args.workers)):
            rows.append(["processes", count, edits_in_processes(program, args, base, count), max(args.workers), None])
    for name in dict.fromkeys(row[0] for row in rows):
        _, value, seconds, _, peak = zip(*(row for row in rows if row[0] == name))
        more = slope(value, [p and p / 1e9 for p in peak], 3) if name == "pictures" else ""
        laws.append([name, str(value[0]), str(value[-1]), slope(np.log(value), np.log(seconds).tolist(), 2), more])
    print_table(["", "s", "edits/s", "GB"],
                [[f"{name} {value}", decimal(seconds, 3), decimal(edits / seconds, 3), gigabytes(peak)]
                 for name, value, seconds, edits, peak in rows])
    print_table(["seconds against", "from", "to", "exponent", "GB for each more"], laws)
    print(f"\nWhat does not grow: {base['pictures']} picture of {base['size']}, {base['steps']} steps. Processes share out "
          f"{max(args.workers)} such edits, and the threads.")


def edits_in_processes(program, args, settings, count):
    """Median seconds in which `count` processes at once make max(args.workers) edits."""
    make, *given = program
    sides = [Side(make, *given, device=args.device, threads=max(1, torch.get_num_threads() // count)) for _ in range(count)]
    times = []
    for _ in range(args.repeats + 1):
        began = time.perf_counter()
        for start in range(0, max(args.workers), count):
            busy = sides[:max(args.workers) - start]
            for side in busy:
                side.begin(**settings)
            for side in busy:
                side.finish()
        times.append(time.perf_counter() - began)
    for side in sides:
        side.end()
    return statistics.median(times[1:])


def slope(x, y, digits):
    """Of the straight line through points by least squares; "" for a single one, or where something was not measured."""
    return decimal(np.polyfit(x, y, 1)[0], digits) if len(x) > 1 and None not in y else ""


# ---- pairs, against attention maps written out

def bench_pairs(args):
    """Pairs a second, controlled on the values and, by diffusers, on the maps; text encoder and decoder are in both."""
    print(machine(args), flush=True)
    rows = []
    with exported(args, editor=False) as (folder, own_size):
        told = argparse.Namespace(device=args.device, dtype=args.dtype, batch_size=args.batch_size[0], steps=args.steps[0],
                                  size=(args.size or [own_size])[0])
        programs = dict(ip2p=(draw_by_ip2p, folder, told), diffusers=(draw_by_diffusers, folder, told))
        with side_by_side(args.device, **programs) as sides:
            for control in ("self-attention", "cross-attention"):
                timed = take_turns(sides, args.repeats, control=control)
                apart = np.abs(timed["ip2p"].results[-1] - timed["diffusers"].results[-1])
                for name, t in timed.items():
                    rows.append([f"{told.batch_size} x {told.size} x {told.size}, {told.steps} steps, {control}", name,
                                 decimal(told.batch_size / t.seconds, 3), gigabytes(t.peak),
                                 decimal(timed["diffusers"].seconds / t.seconds, 2), f"{apart.max():.1e} ({apart.mean():.1e})"])
                    print(*rows[-1], sep="  ", flush=True)
    print_table(["pairs", "by", "pairs/s", "GB", "x diffusers", "differ by at most (mean), of 2"], rows)


# ---- training

def bench_train(args):
    """Optimiser steps on the same pairs, noise and timesteps, each program with the averaged weights and AdamW's state."""
    print(machine(args), flush=True)
    with exported(argparse.Namespace(**vars(args) | dict(dtype="fp32"))) as (folder, own_size):
        told = argparse.Namespace(device=args.device, dtype=args.dtype, batch_size=args.batch_size[0],
                                  size=(args.size or [own_size])[0], checkpointing=args.checkpointing, compile=args.compile)
        programs = {"ip2p, cached latents and text": (train_by_ip2p, folder, told, True),
                    "ip2p": (train_by_ip2p, folder, told, False), "diffusers": (train_by_diffusers, folder, told)}
        timed = {}
        for together in ([{name: program} for name, program in programs.items()] if args.alone else [programs]):
            with side_by_side(args.device, **together) as sides:
                timed |= take_turns(sides, args.repeats)
    theirs, B = timed["diffusers"], told.batch_size
    rows = [[f"{B} x {told.size} x {told.size}" + " checkpointed" * args.checkpointing, name, decimal(B / t.seconds, 3),
             gigabytes(t.peak), decimal(theirs.seconds / t.seconds, 2), f"{t.results[0]:.5f}, {t.results[-1]:.5f}",
             f"{max(abs(a / b - 1) for a, b in zip(t.results, theirs.results)):.1e}"] for name, t in timed.items()]
    print_table(["step", "by", "examples/s", "GB", "x diffusers", "loss, first and last", "differs by at most, relative"],
                rows)


# ---- from the command line to the first picture

def bench_start(args):
    """Seconds of whole processes, from files that are in the system's cache."""
    print(machine(args), flush=True)
    model = args.model or str(WEIGHTS / "mini-ip2p.safetensors")
    model = str(Path(model).resolve()) if Path(model).exists() else model         # sample.py runs in its own folder
    sample = [sys.executable, "sample.py", "--model", model, "--image", "ip2p/assets/examples/fox.png", "--prompt",
              "make it night", "--device", args.device, "--dtype", args.dtype]
    with tempfile.TemporaryDirectory() as folder:
        commands = {"import torch": [sys.executable, "-c", "import torch"],
                    "import what sample.py needs": [sys.executable, "-c", "import tqdm, ip2p.grid, ip2p.pipeline"]}
        theirs = [sys.executable, "-c", "from diffusers import StableDiffusionInstructPix2PixPipeline"]
        if not subprocess.run(theirs, capture_output=True).returncode:
            commands["import diffusers' pipeline"] = theirs
        commands |= {f"sample.py --steps {n}": [*sample, "--output", f"{folder}/{n}.png", "--steps", str(n)]
                     for n in (1, *args.steps)}
        times = {name: [] for name in commands}
        for _ in range(args.repeats + 1):
            for name, command in commands.items():
                began = time.perf_counter()
                made = subprocess.run(command, cwd=WEIGHTS.parent, capture_output=True, text=True)
                if made.returncode:
                    raise ValueError(f"{name}: {(made.stderr.strip().splitlines() or ['no word of why'])[-1]}")
                times[name].append(time.perf_counter() - began)
    times = {name: statistics.median(found[1:]) for name, found in times.items()}
    with side_by_side(args.device, ip2p=(edit_by_ip2p, model, args.device, args.dtype)) as sides:
        settings = dict(pictures=1, size=None, steps=1, cfg_text=args.cfg_text, cfg_image=args.cfg_image[0])
        own = take_turns(sides, args.repeats, **settings)["ip2p"].seconds
    rows = [[name, decimal(seconds, 2), decimal(seconds / times["import torch"], 2)] for name, seconds in times.items()]
    for name, seconds in (("that edit alone, in a process that has made one", own),
                          ("sample.py --steps 1 without it", times["sample.py --steps 1"] - own)):
        rows.append([name, decimal(seconds, 2), decimal(seconds / times["import torch"], 2)])
    print_table(["", "s", "x import torch"], rows)


# ---- what the command does

KINDS = {"edit": (bench_edit, [1], [20]), "growth": (bench_growth, [1, 2, 4, 8, 16, 32], [5, 10, 20, 40]),
         "train": (bench_train, [16], [0]), "pairs": (bench_pairs, [8], [10]), "start": (bench_start, [1], [20])}


def main(argv=None):
    p = Parser(prog="python -m ip2p.bench", description=__doc__)
    flag = p.add_argument
    flag("what", choices=KINDS, nargs="?", default="edit", help="what to measure (default: %(default)s)")
    flag("--model", help="a checkpoint (default: weights/mini-ip2p.safetensors; pairs: mini-sd.safetensors)")
    flag("--full-size", action="store_true", help="Stable Diffusion 1.5 with random weights instead (default: off)")
    flag("--size", type=int, nargs="+", help="side of the pictures (default: the model's own; growth: others too)")
    flag("--batch-size", type=int, nargs="+",
         help="pictures, pairs or examples at a time (default: 1; train 16, pairs 8, growth 1 2 4 8 16 32)")
    flag("--steps", type=int, nargs="+", help="of the sampler (default: 20; pairs 10; growth 5 10 20 40)")
    flag("--cfg-text", type=float, default=7.5, help="text guidance (default: %(default)s)")
    flag("--cfg-image", type=float, nargs="+", default=[1.5, 1.0],
         help="edit: 1 saves one of three evaluations (default: 1.5 1)")
    flag("--workers", type=int, nargs="+", default=[1, 2, 4], help="growth: processes that share out edits (default: 1 2 4)")
    flag("--checkpointing", action="store_true",
         help="train: compute the UNet's blocks again for their gradients (default: off)")
    flag("--alone", action="store_true",
         help="train: one program after the other, where memory does not hold them together (default: in turns)")
    flag("--low-memory", action="store_true", help="edit: with as little memory as sample.py --low-memory too (default: off)")
    flag("--compile", action="store_true", help="edit: with torch.compile too; train: with it only (default: off)")
    flag("--repeats", type=int, default=7, help="calls of each that count, after one that does not (default: %(default)s)")
    flag("--device", **DEVICE)
    flag("--dtype", choices=DTYPES, default="fp32",
         help="of weights and arithmetic; train: of the arithmetic, on float32 weights (default: %(default)s)")
    args = p.parse_args(argv)
    if args.repeats < 1:
        p.error(f"--repeats must be at least 1, got {args.repeats}")
    if args.what == "train" and args.dtype == "fp16":
        p.error("train measures fp32 and bf16: fp16 would need its losses scaled")
    bench, batch_size, steps = KINDS[args.what]
    args.batch_size, args.steps = args.batch_size or batch_size, args.steps or steps

    def command():
        args.device = usable_device(args.device)
        try:
            bench(args)
        except ImportError as error:
            raise ValueError(f'{error}; pip install -e ".[bench]"') from None

    return exit_status("ip2p.bench", command, "a smaller --size or --batch-size, or --dtype bf16")


if __name__ == "__main__":
    sys.exit(main())
