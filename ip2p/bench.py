"""How fast, side by side in one run: medians over repeats that take turns, and the largest difference of the results.

    python -m ip2p.bench pairs                              # drawing pairs, against attention maps written out
    python -m ip2p.bench pairs --full-size --size 256 --batch-size 1 --steps 1
"""
import argparse
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import torch

from . import pipeline
from .checkpoint import Parts
from .pipeline import InstructPix2Pix
from .prompt_to_prompt import ControlledRun
from .text import TextEncoder
from .unet import UNet
from .vae import AutoencoderKL


class MaterializedRun(ControlledRun):
    """The same controls as published code has them: on the attention maps, which are all in memory."""

    def __call__(self, q, k, v, heads, is_cross):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))       # (B, heads, tokens, C / heads)
        maps = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)                                # (B, heads, pixels, tokens)
        if not is_cross and self.shares_self and q.shape[2] <= self.most_pixels:
            maps = maps[self.self_rows]
        if is_cross and self.crossing is not None:
            rows, source, from_source, own = self.crossing
            borrowed = maps[source] @ from_source.to(maps.dtype)[:, None]
            maps = (maps * own.to(maps.dtype)[:, None].mT).index_add(0, rows, borrowed)
        return (maps @ v).transpose(1, 2).flatten(2)


def bench_pairs(args):
    """Pairs a second of `draw_pairs`, controlled on the values and on the maps; decoding is in both."""
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[args.dtype]
    if args.full_size:                                                     # Stable Diffusion 1.5, random weights
        torch.manual_seed(0)
        with torch.device(args.device):
            parts = [part.eval().requires_grad_(False).to(dtype) for part in (UNet(), AutoencoderKL(), TextEncoder())]
        model = InstructPix2Pix(Parts(*parts, "eps", 512, {}))
    else:
        model = InstructPix2Pix.load(args.model, args.device, dtype)
    B = args.batch_size
    texts = ["a red car in a city"] * B, ["a red car in a city at night"] * B

    def draw(run):
        with patch.object(pipeline, "ControlledRun", run):
            began = time.perf_counter()
            pixels = model.draw_pairs(*texts, list(range(B)), [0.5] * B, [3.0] * B, steps=args.steps, control=control, size=args.size)
            return time.perf_counter() - began, torch.cat(pixels)          # on the CPU: the device is done

    print(f"{B} pairs of {args.size or model.parts.image_size} pixels, {args.steps} steps, {args.dtype}, {args.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for control in ("self-attention", "cross-attention"):
        times, results = {ControlledRun: [], MaterializedRun: []}, {}
        for repeat in range(args.repeats + 1):                             # the first warms up
            for run in times:
                seconds, results[run] = draw(run)
                if repeat:
                    times[run].append(seconds)
        values, maps = (B / statistics.median(t) for t in times.values())
        print(f"{control:16} values {values:.3f} pairs/s, maps {maps:.3f} pairs/s, ratio {values / maps:.2f}, "
              f"largest difference {(results[ControlledRun] - results[MaterializedRun]).abs().max():.1e} of 2", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m ip2p.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pairs"], help="what to measure")
    parser.add_argument("--model", default=str(Path(__file__).parent.parent / "weights" / "mini-sd.safetensors"),
                        help="a text-to-image checkpoint (default: weights/mini-sd.safetensors)")
    parser.add_argument("--full-size", action="store_true", help="Stable Diffusion 1.5 with random weights instead (default: off)")
    parser.add_argument("--size", type=int, help="side of the pictures (default: the model's own)")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs drawn at a time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of the sampler (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    bench_pairs(parser.parse_args())
