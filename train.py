"""Train an InstructPix2Pix editor, and every model it needs.

    python train.py --stage edit --steps 20000        # fine-tune weights/mini-sd.safetensors into an editor
    python train.py --stage edit --data data          # the same on pairs that make_data.py drew
    python train.py --stage vae --minutes 30          # or from nothing: vae, clip, base, edit, each from the one before
    python train.py --stage edits                     # the language model of make_data.py, by itself

Each stage trains on the miniature world, in a folder of its own below --out. Stopped by --minutes, Ctrl-C or SIGTERM, it
goes on when the command is repeated.
"""
import argparse
import json
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from ip2p import InstructPix2Pix
from ip2p.checkpoint import load_checkpoint, load_vae, save_checkpoint
from ip2p.data import PairedDataset
from ip2p.evaluate import FIXED, psnr
from ip2p.guidance import dropout_masks
from ip2p.images import contact_sheet, save_image, to_images, to_pixels
from ip2p.learn_edits import TRIPLES, train_edits
from ip2p.miniature import reconstruct, train_base, train_clip, train_vae
from ip2p.stages import Pool, diffusion_loss, draw_timesteps, encode, history, run
from ip2p.text import Tokenizer
from ip2p.training import seeded
from ip2p.world import KINDS, World

WEIGHTS = Path(__file__).parent / "weights"

# What is drawn anew is harder to learn than what is changed, and comes twice as often.
LESSONS = KINDS + ("object", "place", "add")


def train_edit(args, world):
    """The editor: the base widened by image latents, conditionings dropped at random, on the world's true pairs or on those
    that `make_data.py` drew."""
    base = load_checkpoint(args.base, in_channels=2 * load_vae(args.base).config.z_channels)
    unet, vae, text = base.unet.requires_grad_(True), base.vae, base.text.requires_grad_(True)
    model = nn.ModuleDict(dict(unet=unet, text=text)).to(args.device, memory_format=args.layout)
    vae.to(args.device)
    tokenizer = Tokenizer(text.config)
    drawn = open_pairs(args.data, base.image_size, args.seed) if args.data else None

    def draw(start, count, split="train"):
        if drawn and split == "train":
            before, after, instructions = zip(*map(drawn, range(start, start + count)))
            before, after = torch.stack(before).to(args.device), torch.stack(after).to(args.device)
        else:
            before, after, edits = world.pairs(args.seed + 3, start, count, split, LESSONS if split == "train" else None)
            instructions = [e.instruction for e in edits]
        x0 = encode(vae, after, args) * vae.config.scale_factor
        return encode(vae, before, args), x0, list(instructions)                  # image latents are not scaled

    pool = Pool(draw, args)

    def loss_fn(step, batch=None, dropout=0.05, timesteps=args.timesteps):
        rng = seeded(args.seed, step)
        image_latents, x0, instructions = batch or pool.batch(step)
        drop_text, drop_image = dropout_masks(len(x0), dropout, rng)
        t, noise = draw_timesteps(timesteps, len(x0), rng), torch.randn(x0.shape, generator=rng)
        ids = tokenizer(["" if d else i for i, d in zip(instructions, drop_text)]).to(args.device)
        image_latents = image_latents.masked_fill(drop_image.to(args.device)[:, None, None, None], 0)
        with args.autocast():
            loss = diffusion_loss(unet, x0, text(ids), t.to(args.device), noise.to(args.device), base.parameterization,
                                  image_latents)
        return loss, {}

    editor = InstructPix2Pix(replace(base, metadata={}))

    def sheet(path, per_kind=3):
        cells = []
        for kind in KINDS:
            before, _, edits = world.pairs(args.seed, 0, per_kind, "combinations", kind)
            pictures = to_images(before)
            edited = editor.edit(pictures, [e.instruction for e in edits], cfg_text=args.cfg_text, cfg_image=args.cfg_image,
                                 progress=False)
            for a, b, e in zip(pictures, edited, edits):
                cells += [(a, e.caption), (b, e.instruction)]
        save_image(contact_sheet(cells, columns=2 * per_kind), path)

    record = run(args, model, loss_fn, sheet)
    sheet(args.out / "edit" / "sheet-final.png", per_kind=min(6, args.score_examples))
    with torch.no_grad():
        loss, _ = loss_fn(0, draw(0, args.score_examples, "combinations"), dropout=0, timesteps="uniform")
    record["held_out_loss"] = round(loss.item(), 4)
    record |= dict(cfg_text=args.cfg_text, cfg_image=args.cfg_image, base=history(base.metadata))
    record |= score_edits(editor, world, args)
    together = args.base.resolve().parent == args.out.resolve()          # then the autoencoder is stored once
    save_checkpoint(editor.parts, args.out / "mini-ip2p.safetensors", metadata=record, dtype=torch.float16,
                    shared={"vae": args.base.name} if together else None)
    return record


def open_pairs(path, size, seed):
    """The training pairs of a data set as a function of their number, epoch after epoch, at a side of `size`."""
    pairs = PairedDataset(path, min_resize_res=size, max_resize_res=size, crop_res=size, seed=seed)
    if not len(pairs):
        raise ValueError(f"{path}: a tenth of the prompts is held back, and of {len(pairs.pairs)} that leaves none")
    order = lru_cache(2)(pairs.order)
    return lambda n: pairs.example(n // len(pairs), order(n // len(pairs))[n % len(pairs)])


def score_edits(editor, world, args):
    """PSNR in dB against the true edited picture, where the instruction fixes it, on held-out scenes: of the edit, of the
    unedited picture, and of the true picture after the autoencoder, which is the most an edit can reach."""
    scores = {"edit": [], "unedited": [], "autoencoder": []}
    for kind in FIXED:
        before, after, edits = world.pairs(args.seed, 100, -(-args.score_examples // 32), "combinations", kind)
        edited = editor.edit(to_images(before), [e.instruction for e in edits], cfg_text=args.cfg_text,
                             cfg_image=args.cfg_image, progress=False)
        edited = torch.stack([to_pixels(p, 128, 128) for p in edited]).to(after)
        for name, x in (("edit", edited), ("unedited", before), ("autoencoder", reconstruct(editor.vae, after))):
            scores[name].append(psnr(x, after))
    return {"psnr": {name: round(float(torch.cat(values).mean()), 2) for name, values in scores.items()}}


DEFAULTS = {         # what made the shipped weights, on two CPU cores, but for the base: README; a GPU has time for more
    "vae": dict(steps=3400, batch_size=16, ema_decay=0.999),
    "clip": dict(steps=260, batch_size=128, ema_decay=0.99),
    "base": dict(steps=2300, batch_size=96, ema_decay=0.998, reuse=4, timesteps="logit-normal"),
    "edit": dict(steps=1800, batch_size=48, ema_decay=0.998, reuse=5, timesteps="uniform"),
    "edits": dict(steps=3500, batch_size=32, ema_decay=0.995, pretrain_steps=300),
}


STAGES = {"vae": train_vae, "clip": train_clip, "base": train_base, "edit": train_edit, "edits": train_edits}


def main(args):
    for name, value in DEFAULTS[args.stage].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(args)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.base is None and args.stage == "edit":
        here = args.out / "mini-sd.safetensors"
        args.base = here if here.exists() else WEIGHTS / here.name
    print(" ".join(f"{k}={v}" for k, v in vars(args).items()), flush=True)
    args.layout = torch.channels_last if args.device.startswith("cuda") else torch.contiguous_format      # 1.3 x on a CPU
    args.autocast = lambda: torch.autocast(args.device.split(":")[0], torch.bfloat16) if args.dtype == "bf16" else nullcontext()
    torch.manual_seed(args.seed)                  # initial weights
    record = STAGES[args.stage](args, World(args.device, args.subset))
    print(json.dumps(record), flush=True)


def check(args):
    """ValueError for settings that cannot work."""
    for name, least in (("steps", 1), ("batch_size", 2), ("pretrain_steps", 0), ("block", args.batch_size), ("reuse", 1),
                        ("score_examples", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not 8 <= args.crop <= 128 or args.crop % 8:
        raise ValueError(f"--crop must be a multiple of 8 up to 128, got {args.crop}")
    for name in ("lr", "cooldown", "cfg_text", "cfg_image"):
        if not math.isfinite(getattr(args, name)) or getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number, not below zero, got {getattr(args, name)}")
    for stage, name in (("vae", "vae.safetensors"), ("clip", "mini-clip.safetensors")):
        if args.stage == "base" and not (args.out / name).exists():
            raise ValueError(f"{args.out / name} is missing: train --stage {stage} with the same --out first")
    try:
        torch.ones(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} cannot be used here ({str(error).splitlines()[0]})") from None


def run_command(argv=None):
    """main, with one line on stderr for whatever the user can put right. Returns the exit status."""
    try:
        main(parse(argv))
        return 0
    except (ValueError, OSError) as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, default="edit", help="what to train (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimiser steps in all; may be changed when resuming (default: the stage's own)")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; repeat the command to go on")
    parser.add_argument("--batch-size", type=int, help="examples a step (default: the stage's own)")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW; Muon's is 20 times as much (default: %(default)s)")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon", help="default: %(default)s")
    parser.add_argument("--warmup", type=int, default=100, help="steps of rising learning rate (default: %(default)s)")
    parser.add_argument("--cooldown", type=float, default=0.3, help="last share of the steps, with falling learning rate "
                        "(default: %(default)s)")
    parser.add_argument("--ema-decay", type=float, help="of the averaged weights (default: the stage's own)")
    parser.add_argument("--base", type=Path, help="edit: the text-to-image checkpoint to start from (default: OUT/mini-sd."
                        "safetensors if there is one, else weights/mini-sd.safetensors); edits: public GPT-2 weights to start from")
    parser.add_argument("--triples", type=Path, nargs="+", default=TRIPLES, help="edits: jsonl files of {input or caption, edit, "
                        "output} (default: the 700 shipped)")
    parser.add_argument("--pretrain-steps", type=int, help="edits: how many of the steps go to captions, before the triples "
                        "(default: 300; none with --base)")
    parser.add_argument("--verbatim", action="store_true", default=None, help="edits: learn the triples only as they are written")
    parser.add_argument("--data", help="edit: a data set, as make_data.py writes it or in any layout that ip2p/data.py "
                        "reads (default: the world's true pairs)")
    parser.add_argument("--init", type=Path, help="base: the text-to-image checkpoint to train further, made with the same autoencoder")
    parser.add_argument("--cfg-text", type=float, default=3.0, help="text guidance of sheets and scores, kept as the model's "
                        "own default (default: %(default)s)")
    parser.add_argument("--cfg-image", type=float, default=1.5, help="likewise for image guidance (default: %(default)s)")
    parser.add_argument("--block", type=int, default=4096, help="base, edit: examples drawn and encoded at a time (default: %(default)s)")
    parser.add_argument("--reuse", type=int, help="base, edit: times that each is learned from (default: the stage's own)")
    parser.add_argument("--timesteps", choices=("uniform", "logit-normal"), help="base, edit: how they are drawn (default: the stage's own)")
    parser.add_argument("--crop", type=int, default=64, help="vae: side of the crops (default: %(default)s)")
    parser.add_argument("--subset", choices=("core", "all"), default="core", help="nouns and places of the world (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--sheet-minutes", type=float, default=10.0, help="minutes between sample sheets (default: %(default)s)")
    parser.add_argument("--score-examples", type=int, default=512, help="held-out examples that the result is scored on; "
                        "edit: pictures are drawn in full for a sixth of as many (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the arithmetic; weights stay float32 (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command())
