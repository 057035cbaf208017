"""Train an InstructPix2Pix editor, and every model it needs.

    python train.py                                   # fine-tune weights/mini-sd.safetensors on data/, made first if need be
    python train.py --data world                      # the same on the toy world's true pairs
    python train.py --base v1-5-pruned-emaonly.safetensors --data pairs --preset 24gb          # Stable Diffusion on one card
    torchrun --nproc-per-node 8 train.py --base v1-5-pruned-emaonly.safetensors --data pairs   # the paper's run
    python train.py --stage distill                   # from a trained editor one that needs 2 evaluations, not 60
    python train.py --stage all --data world          # the miniature from nothing, all that is in weights/, into runs/

Each stage trains in a folder of its own below --out. Stopped by --minutes, Ctrl-C, SIGTERM or worse, it goes on when the
command is repeated. --preset sets defaults that flags override:

{presets}
"""
import argparse
import json
import math
import os
import signal
import sys
from pathlib import Path

import torch

from ip2p import InstructPix2Pix, distributed
from ip2p.checkpoint import load_checkpoint
from ip2p.command_line import DEVICE, PARAMETERIZATION, SEEDS, WEIGHTS, Parser, exit_status, make_writable, named_path
from ip2p.distill import train_distill
from ip2p.finetune import train_edit
from ip2p.learn_edits import TRIPLES, train_edits
from ip2p.miniature import train_base, train_clip, train_scorer, train_vae
from ip2p.presets import ABOUT_PRESETS, PRESETS, defaults
from ip2p.run_folder import list_checkpoints
from ip2p.stages import is_miniature
from ip2p.tensorfiles import read_state_dict
from ip2p.world import SIZE, World


# ---- what the command does

FROM_NOTHING = {"vae": train_vae, "clip": train_clip, "base": train_base, "scorer": train_scorer, "edits": train_edits}
FROM_A_MODEL = {"edit": train_edit, "distill": train_distill}
RESULTS = {"vae": "vae.safetensors", "clip": "mini-clip.safetensors", "base": "mini-sd.safetensors",
           "scorer": "mini-scorer.safetensors", "edits": "mini-gpt.safetensors", "edit": "mini-ip2p.safetensors",
           "distill": "mini-ip2p-fast.safetensors"}
MADE_FROM = {"edit": "base", "distill": "edit"}
EDITORS = "ip2p.safetensors", RESULTS["edit"]              # an editor made of Stable Diffusion, and the miniature's


def main(args):
    """One stage. Returns its record; None in processes other than the first."""
    args.device = distributed.usable_device(args.device)
    base = open_base(args) if args.stage in FROM_A_MODEL else None
    if base:
        settle(args, base)
    elif args.data not in (None, "world"):
        raise ValueError(f"--stage {args.stage} learns from the toy world, not from --data {args.data}")
    else:
        args.data = "world"
    if not (args.dtype or distributed.has_bf16(args.device)):
        args.dtype = "fp32"
    for name, value in defaults(args).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    distributed.start(args.device)
    check(args)
    make_writable(args.out, f"--out {args.out}")
    distributed.say(" ".join(f"{k}={v}" for k, v in vars(args).items() if v is not None))
    if base and is_miniature(base.metadata):
        make_small_data(args)
    args.layout = torch.channels_last if args.device.startswith("cuda") else torch.contiguous_format
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")          # TF32: with PyTorch 1.11, that of the original, it was so by default
    args.autocast = lambda: torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.dtype == "bf16")
    torch.manual_seed(args.seed)                  # initial weights
    record = FROM_A_MODEL[args.stage](args, base) if base else FROM_NOTHING[args.stage](args, World(args.device, args.subset))
    if record:
        print(json.dumps(record), flush=True)
    return record


def open_base(args):
    """The model that the editor starts from, widened if it is none yet."""
    if args.init and args.base:
        raise ValueError("--base is widened into an editor, --init is an editor already: give one of the two")
    if args.stage == "distill":
        if args.base:
            raise ValueError(f"--stage distill starts from an editor: give {args.base} as --init if it is one")
        here = [path for name in EDITORS if (path := args.out / name).exists()]
        args.init = args.init or (here[0] if here else WEIGHTS / RESULTS["edit"])
    if args.init:
        if args.stage == "edit" and args.init.resolve() in [(args.out / name).resolve() for name in EDITORS]:
            raise ValueError(f"--init {args.init}: the result would take its place; give another --out")
        base = load_checkpoint(args.init, parameterization=args.parameterization)
        if base.unet.config.cond_dim:
            raise ValueError(f"--init {args.init}: is distilled already; give the editor that it was distilled from")
        if base.unet.config.in_channels != 2 * base.vae.config.z_channels:
            raise ValueError(f"--init {args.init}: no editor, its UNet takes {base.unet.config.in_channels} channels; to "
                             f"fine-tune a text-to-image model into one, give it as --base")
    else:
        here = args.out / RESULTS["base"]
        args.base = args.base or (here if here.exists() else WEIGHTS / here.name)
        base = load_checkpoint(args.base, parameterization=args.parameterization)
        if base.unet.config.in_channels != base.vae.config.z_channels:
            raise ValueError(f"--base {args.base}: no text-to-image model, its UNet takes {base.unet.config.in_channels} "
                             f"channels; to go on from an editor, give it as --init")
        base.unet.widen(2 * base.vae.config.z_channels)
    return base


def settle(args, base):
    """Sets what was not given and follows from the model: the preset, the data, the scales, the size."""
    small = is_miniature(base.metadata)
    args.preset = args.preset or ("miniature" if small else "paper")
    if not (args.data or small):
        raise ValueError(f"{args.init or args.base} needs --data DIR: pairs to learn from, as make_data.py draws them")
    args.data = args.data or "data"
    model = InstructPix2Pix(base)
    if args.stage == "distill":
        args.cfg_text, args.cfg_image = (model.own_settings[name] if getattr(args, name) is None else getattr(args, name)
                                         for name in ("cfg_text", "cfg_image"))
    if args.data == "world":
        if args.size not in (None, SIZE):
            raise ValueError(f"--size {args.size}: the toy world's pictures are {SIZE} x {SIZE}")
        args.size = SIZE
    if args.size is None:
        args.size = PRESETS[args.preset].get("size", base.image_size)
    if args.size < 1 or args.size % model.size_multiple:
        raise ValueError(f"--size must be a multiple of {model.size_multiple}, got {args.size}")


def make_small_data(args):
    """Draw a small data set into data/ if that is empty and no other was asked for; finish one that was stopped."""
    folder, unfinished = Path("data"), Path("data/.unfinished")
    nothing = not folder.exists() or unfinished.exists() or not any(folder.iterdir())
    if args.data == "data" and distributed.rank() == 0 and nothing:
        print("no data set in data/: drawing a small one, of 24 captions, which takes a few minutes (python make_data.py draws "
              "a larger one; --data world learns from the toy world's true pairs)", flush=True)
        folder.mkdir(exist_ok=True)
        unfinished.touch()
        make_pairs(args, "--out", "data", "--num-captions", 24, "--n-samples", 4)
        unfinished.unlink()
    distributed.wait_for_all()


def make_pairs(args, *flags):
    import make_data
    status = make_data.run([*map(str, flags), "--device", args.device, "--shard", "0/1"])
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise ValueError("make_data.py could not draw the pairs, see above")


def train_all(args, argv):
    """Every stage in turn, each from those before it, and a table of what they scored. What is finished is left alone."""
    if distributed.launched() > 1:
        raise ValueError("--stage all runs in one process; torchrun is for a stage at a time: base, edit, distill")
    for name in ("base", "init", "train_text", "scale_image_latents"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is for a stage alone; --stage all makes each model from those before it")
    if args.views == 0:
        raise ValueError("--stage all needs --views of at least 1: distillation learns from the cache")
    records = {stage: read_state_dict(path)[1] if (path := args.out / name).exists() else {} for stage, name in RESULTS.items()}
    for stage, source in MADE_FROM.items():
        if not records[source].get("finished") and (records[stage] or list_checkpoints(args.out / stage)):
            raise ValueError(f"{args.out}: its {stage} was begun without its {source}, which is yet to be made: give another "
                             f"--out, or remove {args.out / RESULTS[stage]} and {args.out / stage}")
    rows = []
    for stage, record in records.items():
        if not record.get("finished"):
            own = parse([*argv, "--stage", stage])
            if stage in FROM_NOTHING:
                own.data = None
            elif own.data is None:
                own.data = str(draw_own_pairs(args) if stage == "edit" else args.out / "data")
            record = main(own)
            if not record["finished"]:
                print("stopped by --minutes; repeat the command to go on")
                return
        scores = {k: v for k, v in record.items() if k in ("psnr", "accuracy_1_of_100", "held_out_loss", "training_loss", "scores")}
        rows.append(f"| {stage} | {record['minutes']} | {record['steps']} x {record['batch_size']} | {json.dumps(scores)} |")
    print("| stage | minutes | steps x batch | held-out score |\n|---|--:|--:|---|", *rows, sep="\n", flush=True)


def draw_own_pairs(args):
    """OUT/data, drawn and judged by the models in OUT."""
    out, clip = args.out / "data", args.out / RESULTS["clip"]
    if "thresholds" not in read_state_dict(clip)[1]:
        make_pairs(args, "--calibrate", "--clip", clip)
    make_pairs(args, "--out", out, "--num-captions", args.num_captions, "--clip", clip,
               "--model", args.out / RESULTS["base"], "--gpt", args.out / RESULTS["edits"])
    return out


def check(args):
    """ValueError for settings that cannot work."""
    minimum = dict(steps=1, batch_size=1 if args.stage in FROM_A_MODEL else 2, accumulate=1, pretrain_steps=0,
                   reuse=1, score_examples=1, views=int(args.stage == "distill"), keep=1, workers=0,
                   num_captions=1, block=args.batch_size if args.stage == "distill" or args.data == "world" else 1)
    for name, least in minimum.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    for name in ("lr", "warmup", "cooldown", "clip_norm", "cfg_text", "cfg_image", "minutes", "save_minutes", "sheet_minutes"):
        if (value := getattr(args, name)) is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number, not below zero, got {value}")
    if not 8 <= args.crop <= 128 or args.crop % 8:
        raise ValueError(f"--crop must be a multiple of 8 up to 128, got {args.crop}")
    if args.cooldown > 1:
        raise ValueError(f"--cooldown is a share of the steps, in 0..1, got {args.cooldown}")
    if not 0 <= args.ema_decay < 1:
        raise ValueError(f"--ema-decay must be in 0..1, and below 1, got {args.ema_decay}")
    if not 0 <= args.dropout <= 1 / 3:
        raise ValueError(f"--dropout must be in 0..1/3, got {args.dropout}")
    if args.stage in FROM_A_MODEL and args.max_resize is not None and args.max_resize < args.size:
        raise ValueError(f"--max-resize must be at least --size, {args.size}, got {args.max_resize}")
    parts = args.accumulate * distributed.processes()
    if args.batch_size % parts:
        raise ValueError(f"--batch-size {args.batch_size} cannot be shared out between {parts} parts (--accumulate x "
                         f"processes)")
    if parts > 1 and args.stage not in ("base", *FROM_A_MODEL):
        raise ValueError(f"--stage {args.stage} learns in one process and one part; --accumulate and torchrun are for the "
                         f"diffusion models")
    for name in ("train_text", "scale_image_latents"):
        if args.stage == "distill" and getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is for --stage edit: a distilled editor has its teacher's text "
                             f"encoder, and takes the latents that editors take")
    for stage in ("vae",) if args.init else ("vae", "clip"):
        if args.stage == "base" and not (args.out / RESULTS[stage]).exists():
            raise ValueError(f"{args.out / RESULTS[stage]} is missing: train --stage {stage} with the same --out first")


def run_command(argv=None):
    """The command; returns its exit status: 0 too after Ctrl-C or SIGTERM, as all that is needed to go on is saved."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)

    def command():
        if args.stage == "all":
            train_all(args, argv)
        else:
            main(args)

    status = exit_status("train.py", command, "more parts (--accumulate), --checkpointing, --offload or a smaller --preset",
                         "repeat the command to go on", status_if_stopped=0)
    if status and distributed.processes() > 1:         # the others wait for this one, and leaving them properly would wait for
        sys.stdout.flush()                             # them: torchrun ends them when it is gone
        sys.stderr.flush()
        os._exit(status)
    distributed.end()
    return status


def parse(argv=None):
    parser = Parser(prog="train.py", description=__doc__.format(presets=ABOUT_PRESETS))
    flag, switch = parser.add_argument, argparse.BooleanOptionalAction
    stages, own = [*FROM_NOTHING, *FROM_A_MODEL, "all"], "(default: the stage's or the preset's own)"
    flag("--stage", choices=stages, default="edit", help="what to train (default: %(default)s)")
    flag("--out", type=named_path, default=Path("runs"), help="folder of the runs (default: %(default)s)")
    flag("--seed", type=SEEDS, default=0, help="of initial weights, noise and examples (default: %(default)s)")
    flag("--steps", type=int, help=f"optimiser steps in all; may be changed when resuming {own}")
    flag("--minutes", type=float, help="stop a stage after so many minutes; repeat the command to go on (default: never)")
    flag("--batch-size", type=int, help=f"examples a step, over all parts and processes {own}")
    flag("--accumulate", type=int, help=f"base, edit, distill: parts in which a process goes through its share of them {own}")
    flag("--lr", type=float, help=f"of AdamW; Muon's is 20 times as much {own}")
    flag("--optimizer", choices=("adamw", "muon"), help=f"what updates the weights {own}")
    flag("--warmup", type=int, help=f"steps of rising learning rate {own}")
    flag("--cooldown", type=float, help=f"last share of the steps, with falling learning rate {own}")
    flag("--clip-norm", type=float, help=f"the gradient's norm at most, 0 for any {own}")
    flag("--ema-decay", type=float, help=f"of the averaged weights, a step {own}")
    flag("--dtype", choices=("bf16", "fp32"), help="of the arithmetic; weights stay float32 "
         "(default: fp32 in the paper's run and on GPUs before Ampere, else bf16)")
    flag("--timesteps", choices=("uniform", "logit-normal"), help="base, edit: how they are drawn; logit-normal: until the "
         f"second half of the cool-down {own}")
    flag("--score-examples", type=int, default=512, help="held-out examples that the result is scored on; edit: pictures "
         "are drawn in full for a fifth of as many (default: %(default)s)")
    flag("--cfg-text", type=float, help=f"text guidance of sheets and scores, kept as the model's own default {own}")
    flag("--cfg-image", type=float, help=f"likewise for image guidance {own}")
    flag("--sheet-minutes", type=float, default=10.0, help="minutes between sample sheets (default: %(default)s)")
    flag("--save-minutes", type=float, help=f"minutes between checkpoints {own}")
    flag("--keep", type=int, default=2, help="how many checkpoints (default: %(default)s)")
    flag("--device", **DEVICE)

    editor = parser.add_argument_group("the editor")
    flag = editor.add_argument
    flag("--base", type=Path, help="the text-to-image checkpoint to start from (default: OUT/mini-sd.safetensors if there "
         "is one, else weights/mini-sd.safetensors); edits: public GPT-2 weights to start from")
    flag("--init", type=Path, help="an editor to go on from, in place of --base; distill: the editor to learn from (default: "
         "OUT's, ip2p.safetensors or mini-ip2p.safetensors, else weights/mini-ip2p.safetensors); base: the text-to-image checkpoint "
         "to train further, made with the same autoencoder; scorer: the one to train further")
    flag("--parameterization", **PARAMETERIZATION)
    flag("--data", help="a data set, as make_data.py writes it or in any layout that ip2p/data.py reads, or `world` for the "
         "toy world's true pairs (default: data, made if there is none)")
    flag("--preset", choices=PRESETS, help="see above (default: miniature if the base is one, else paper)")
    flag("--size", type=int, help="side of the pictures while training (default: 256; the miniature's own)")
    flag("--max-resize", type=int, help="resize the shorter side to a random number from --size to this, then crop "
         "(default: --size)")
    flag("--views", type=int, help=f"views of each prompt (one of its pairs, mirrored or not, cropped) to encode once and "
         f"cache on disk, which epochs use in turn; 0 encodes a new one in each epoch {own}")
    flag("--cache", type=Path, default=Path("runs/cache"), help="folder of that cache, and of the texts' (default: %(default)s)")
    beside = min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if torch.cuda.is_available() else 0
    flag("--workers", type=int, default=beside, help="processes that decode pictures beside the main one (default: %(default)s; "
         "where there is a GPU as many as cores, up to 8)")
    flag("--dropout", type=float, default=0.05, help="share of examples that lose the text alone; as many lose both, as "
         "many the image alone (default: %(default)s)")
    flag("--image-dropout", action=switch, default=True, help="whether image latents are dropped at all (default: yes)")
    flag("--train-text", action=switch, help=f"whether the text encoder learns too {own}")
    flag("--target", choices=("sample", "mode"), help=f"which of a picture's possible latents are to be learned {own}")
    flag("--scale-image-latents", action=switch, default=False, help="learn from image latents scaled as the noisy ones "
         "are, for an --init that did; the result takes unscaled ones like any other (default: no)")
    flag("--checkpointing", action=switch, help=f"compute the UNet's blocks again for their gradients, to save memory {own}")
    flag("--offload", action=switch, help=f"keep the optimiser's state and the averaged weights in the CPU's memory {own}")
    flag("--compile", action="store_true", help="torch.compile the UNet (default: no)")
    flag("--freeze", nargs="*", metavar="NAME", help="distill: weights of the UNet whose names begin so stay the teacher's "
         f"{own}")

    small = parser.add_argument_group("the miniature")
    flag = small.add_argument
    flag("--subset", choices=("core", "all"), default="core", help="nouns and places of the world (default: %(default)s)")
    flag("--block", type=int, help=f"base, scorer, edit: scenes drawn at a time; distill: edits {own}")
    flag("--reuse", type=int, help=f"base, scorer, edit, distill: times that each is learned from {own}")
    flag("--crop", type=int, default=64, help="vae: side of the crops (default: %(default)s)")
    flag("--num-captions", type=int, default=1000, help="all: captions to draw pairs of (default: %(default)s)")
    flag("--triples", type=Path, nargs="+", default=TRIPLES, help="edits: jsonl files of {input or caption, edit, output} "
         "(default: the 700 shipped)")
    flag("--pretrain-steps", type=int, help="edits: how many of the steps go to captions, before the triples (default: 300; "
         "none with --base)")
    flag("--verbatim", action="store_true", default=None, help="edits: learn the triples only as they are written")
    return parser.parse_args(argv)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)            # as Ctrl-C
    sys.exit(run_command())
