"""How fast, side by side in one run: medians over repeats that take turns, and the largest difference of the results.

    python -m ip2p.bench edit --full-size                   # an edit, against diffusers' pipeline with the same weights
    python -m ip2p.bench pairs                              # drawing pairs, against attention maps written out
    python -m ip2p.bench pairs --full-size --size 256 --batch-size 1 --steps 1
"""
import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from . import pipeline
from .checkpoint import Parts
from .pipeline import InstructPix2Pix
from .prompt_to_prompt import ControlledRun
from .text import TextEncoder, import_open_clip
from .unet import UNet, UNetConfig
from .vae import AutoencoderKL

WEIGHTS = Path(__file__).parent.parent / "weights"


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


def open_model(args, editor):
    """The shipped model, or one of Stable Diffusion 1.5's size with random weights."""
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[args.dtype]
    if not args.full_size:
        return InstructPix2Pix.load(args.model or WEIGHTS / f"mini-{'ip2p' if editor else 'sd'}.safetensors", args.device, dtype)
    torch.manual_seed(0)
    with torch.device(args.device):
        parts = UNet(UNetConfig(in_channels=8 if editor else 4)), AutoencoderKL(), TextEncoder()
    return InstructPix2Pix(Parts(*(part.eval().requires_grad_(False).to(dtype) for part in parts), "eps", 512, {}))


def take_turns(runs, repeats):
    """({name: median seconds}, {name: result}) of functions that return when their result is on the CPU. The first round
    warms up and is not counted."""
    times, results = {name: [] for name in runs}, {}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            results[name] = run()
            if repeat:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(t) for name, t in times.items()}, results


def bench_edit(args):
    """Seconds of whole edits, from picture to picture, by `InstructPix2Pix.edit` and by diffusers' pipeline."""
    import_open_clip()                                                     # before diffusers: see its docstring
    import diffusers
    model = open_model(args, editor=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder, "diffusers")
        theirs = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, torch_dtype=model.dtype).to(args.device)
    theirs.set_progress_bar_config(disable=True)
    B, side = args.batch_size, args.size or model.parts.image_size
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(B)]
    x_T = torch.randn(B, model.vae.config.z_channels, *[side // model.vae.config.downsampling] * 2)
    prompts = ["make it night"] * B

    def ours():
        edited = model.edit(pictures, prompts, steps=args.steps, cfg_text=args.cfg_text, cfg_image=args.cfg_image, size=side,
                            x_T=x_T, progress=False)
        return np.stack(edited)

    def diffusers_own():
        edited = theirs(prompts, pictures, num_inference_steps=args.steps, guidance_scale=args.cfg_text,
                        image_guidance_scale=args.cfg_image, latents=x_T.to(args.device, model.dtype), output_type="pil").images
        return np.stack(edited)

    print(f"{B} x {side} x {side} pixels, {args.steps} steps, guidance {args.cfg_text:g} and {args.cfg_image:g}, {args.dtype}, "
          f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, diffusers {diffusers.__version__}")
    seconds, pictures_out = take_turns({"ip2p": ours, "diffusers": diffusers_own}, args.repeats)
    difference = np.abs(pictures_out["ip2p"].astype(int) - pictures_out["diffusers"].astype(int)).max()
    print(f"ip2p {seconds['ip2p']:.3f} s, diffusers {seconds['diffusers']:.3f} s, ratio {seconds['diffusers'] / seconds['ip2p']:.2f}, "
          f"largest difference {difference} of 255", flush=True)


def bench_pairs(args):
    """Pairs a second of `draw_pairs`, controlled on the values and on the maps; decoding is in both."""
    model = open_model(args, editor=False)
    B = args.batch_size
    texts = ["a red car in a city"] * B, ["a red car in a city at night"] * B

    def draw(run, control):
        with patch.object(pipeline, "ControlledRun", run):
            return torch.cat(model.draw_pairs(*texts, list(range(B)), [0.5] * B, [3.0] * B, steps=args.steps, control=control,
                                              size=args.size))

    print(f"{B} pairs of {args.size or model.parts.image_size} pixels, {args.steps} steps, {args.dtype}, {args.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for control in ("self-attention", "cross-attention"):
        runs = {run: partial(draw, run, control) for run in (ControlledRun, MaterializedRun)}
        seconds, results = take_turns(runs, args.repeats)
        values, maps = (B / seconds[run] for run in runs)
        print(f"{control:16} values {values:.3f} pairs/s, maps {maps:.3f} pairs/s, ratio {values / maps:.2f}, "
              f"largest difference {(results[ControlledRun] - results[MaterializedRun]).abs().max():.1e} of 2", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m ip2p.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["edit", "pairs"], help="what to measure")
    parser.add_argument("--model", help="a checkpoint (default: weights/mini-ip2p.safetensors or mini-sd.safetensors)")
    parser.add_argument("--full-size", action="store_true", help="Stable Diffusion 1.5 with random weights instead (default: off)")
    parser.add_argument("--size", type=int, help="side of the pictures (default: the model's own)")
    parser.add_argument("--batch-size", type=int, help="edits or pairs at a time (default: 1 or 8)")
    parser.add_argument("--steps", type=int, help="of the sampler (default: 20 or 10)")
    parser.add_argument("--cfg-text", type=float, default=7.5, help="edit: default: %(default)s")
    parser.add_argument("--cfg-image", type=float, default=1.5, help="edit: default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    args = parser.parse_args()
    args.batch_size, args.steps = args.batch_size or dict(edit=1, pairs=8)[args.what], args.steps or dict(edit=20, pairs=10)[args.what]
    dict(edit=bench_edit, pairs=bench_pairs)[args.what](args)
