"""Scores: by the truth, where the miniature world knows the edited picture, and by CLIP.

    python -m ip2p.evaluate edits            # is done what was asked, and nothing else? by kind, on held-out scenes
    python -m ip2p.evaluate pictures         # do pictures made from captions show what these say?
    python -m ip2p.evaluate curve            # the paper's figure: ours, SDEdit and Prompt-to-Prompt, by CLIP
    python -m ip2p.evaluate pairs            # what the share of attention does to drawn pairs, for each control
"""
import sys
from functools import partial
from itertools import count, islice, product
from pathlib import Path

import torch
from tqdm import tqdm

from .clip_filter import ClipSimilarity, Thresholds
from .command_line import DEVICE, SEEDS, WEIGHTS, Parser, exit_status, make_writable, within
from .curve import evaluate_curve
from .distributed import DTYPES, usable_device
from .images import contact_sheet, save_image, to_images
from .inversion import invert
from .pipeline import InstructPix2Pix
from .prompt_to_prompt import CONTROLS
from .scorer import load_scorer, read_scene
from .tables import decimal, percent, print_table, write_rows
from .truth import FIXED, evaluate_edits, evaluate_pictures, is_fixed, judge_pair, psnr, through, unchanged
from .world import World


# ---- pairs

def evaluate_pairs(args):
    """For each control and share of the steps: the share of drawn pairs that CLIP keeps, the share that are right, and how
    close a pair comes to the true one.

    The first two are of pairs drawn freely, as `make_data.py` does it. Right: the scorer sees the things and the place of
    the caption in the first picture, in the second what was asked for, and all else of the first. For the third the true
    source picture is inverted (DDIM under its caption), both pictures are drawn from that noise, and the edited one is
    compared with the true edited picture: all over, and outside of what truly changed. Only edits of which there is one
    true result.
    """
    model, world = InstructPix2Pix.load(args.model, args.device, args.dtype), World(args.device)
    scorer = load_scorer(args.scorer, args.device)
    judge, thresholds = ClipSimilarity.load(args.clip, args.device), Thresholds.of(args.clip)
    cfg_text = model.own_settings["cfg_text"]
    print(f"cfg_text={cfg_text}", thresholds, flush=True)

    # The true pairs, and the noise that leads back to their sources.
    edits = (world.edit(args.seed, i, "combinations", FIXED[i % len(FIXED)]) for i in count())
    examples = list(islice(filter(is_fixed, edits), args.count))
    before, after = (world.render([getattr(e, which) for e in examples]).cpu() for which in ("source", "target"))
    captions, edited = [e.caption for e in examples], [e.edited_caption for e in examples]
    same = unchanged(before, after)
    batches = [range(i, min(i + args.batch_size, args.count)) for i in range(0, args.count, args.batch_size)]
    scale = model.vae.config.scale_factor
    x_T = torch.cat([invert(model, scale * model.encode(before[list(b)]), captions[b.start:b.stop], args.steps, progress=False)[-1]
                     for b in tqdm(batches, desc="inversion")])
    floor = through(model.vae, after)

    rows = []
    for control, share in tqdm(list(product(args.controls, args.shares)), desc="controls"):
        scores, verdicts, drawn = [], [], []
        for b in batches:
            texts = captions[b.start:b.stop], edited[b.start:b.stop]
            settings = [args.seed + i for i in b], [share] * len(b), [cfg_text] * len(b)
            draw = partial(model.draw_pairs, *texts, *settings, control=control, steps=args.steps)
            pairs = draw()
            scores += judge(*pairs, *texts)
            verdicts += [_verdict(world, examples[i], *readings) for i, *readings in zip(b, *map(scorer.read, pairs))]
            drawn.append(torch.stack(draw(x_T=x_T[list(b)], sampler="ddim")))
        source, target = torch.cat(drawn, 1)
        outside = same.flatten(1).float().mean(1) > 0.2                    # something stays
        asked, preserved, right = (sum(column) / args.count for column in zip(*verdicts))
        rows.append(dict(control=control, share=share, kept=sum(map(thresholds.passed_by, scores)) / len(scores),
                         asked=asked, preserved=preserved, right=right,
                         sim_dir=sum(s["clip_sim_dir"] for s in scores) / len(scores),
                         sim_image=sum(s["clip_sim_image"] for s in scores) / len(scores),
                         source_psnr=float(psnr(source, before).mean()), psnr=float(psnr(target, after).mean()),
                         psnr_outside=float(psnr(target, after, same)[outside].mean())))
        if args.sheet and share in (args.shares[0], args.shares[len(args.shares) // 2], args.shares[-1]):
            cells = [cell for i in range(min(12, args.count)) for cell in zip(
                to_images(torch.stack([before[i], after[i], source[i], target[i]])),
                (captions[i], edited[i], f"{control} {share:g}", ""))]
            save_image(contact_sheet(cells), args.sheet / f"{control}-{share:g}.png")

    limits = dict(unedited=float(psnr(before, after).mean()), autoencoder=float(psnr(floor, after).mean()))
    print_table(["control", "share", "CLIP keeps", "direction", "image", "asked", "rest kept", "right", "source, dB", "edited, dB",
                 "unchanged part, dB"], [
        [r["control"], f"{r['share']:.1f}", percent(r["kept"]), f"{r['sim_dir']:.2f}", f"{r['sim_image']:.2f}",
         *(percent(r[name]) for name in ("asked", "preserved", "right")),
         *(decimal(r[name]) for name in ("source_psnr", "psnr", "psnr_outside"))] for r in rows])
    print(f"The unedited picture: {limits['unedited']:.1f} dB; the true one through the autoencoder: "
          f"{limits['autoencoder']:.1f} dB.")
    write_rows(args.json, [row | limits for row in rows])


def _verdict(world, edit, before, after):
    """Of a pair's two readings: is done what was asked, is all else kept, and are both so of a first picture as captioned?"""
    asked, preserved = (all(group.values()) for group in judge_pair(world, edit, before, after))
    true = read_scene(world, edit.source)
    return asked, preserved, asked and preserved and true.things.keys() <= before.things.keys() and true.place == before.place


# ---- the command line

def check(args):
    """ValueError for settings that cannot work."""
    for name, least in (("count", 1 if args.what in ("pairs", "curve") else 2), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    for name in ("json", "plot", "sheet"):
        if path := getattr(args, name, None):
            folder = path if name == "sheet" else path.parent
            make_writable(folder, f"--{name} {path}")                     # or it ends here, not after the work
            if folder != path and path.is_dir():
                raise ValueError(f"--{name} {path}: is a folder, needed the name of a file")
    args.device = usable_device(args.device)


def run_command(argv=None):
    """The command; returns its exit status."""
    args = parse(argv)

    def command():
        check(args)
        print(" ".join(f"{k}={v}" for k, v in vars(args).items() if k != "run"), flush=True)
        args.dtype = DTYPES[args.dtype]
        args.run(args)

    return exit_status("ip2p.evaluate", command, "a smaller --batch-size, or --dtype bf16")


def parse(argv=None):
    parser = Parser(prog="python -m ip2p.evaluate", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, help="what to score")
    editor, base, clip, scorer = (str(WEIGHTS / f"mini-{name}.safetensors") for name in ("ip2p", "sd", "clip", "scorer"))

    def command(name, run, summary, count, of_what):
        sub = commands.add_parser(name, description=run.__doc__, help=summary)
        sub.set_defaults(run=run)
        flag = sub.add_argument
        flag("--count", type=int, default=count, help=f"{of_what} (default: %(default)s)")
        flag("--batch-size", type=int, default=16, help="pictures made at a time (default: %(default)s)")
        flag("--seed", type=SEEDS, default=0, help="of the examples and the noise (default: %(default)s)")
        flag("--json", type=Path, help="a file for the rows, as jsonl (default: none)")
        flag("--device", **DEVICE)
        flag("--dtype", choices=DTYPES, default="fp32", help="of the models; bf16 is faster (default: %(default)s)")
        return flag

    steps, scale, share = within(int, 1, 1000), within(float, -1000, 1000), within(float, 0, 1)
    several = dict(type=steps, nargs="+", help="of the sampler; several give a row each (default: the model's own, else 20)")

    flag = command("edits", evaluate_edits, "is done what was asked, and nothing else?", 1000,
                   "edits, half of each held-out split, the same number of each kind")
    flag("--model", nargs="+", default=[editor],
         help="editors of the miniature world; several give a row each (default: weights/mini-ip2p.safetensors)")
    flag("--scorer", default=scorer, help="what reads the pictures (default: weights/mini-scorer.safetensors)")
    flag("--steps", **several)
    flag("--cfg-text", type=scale, help="text guidance (default: each model's own)")
    flag("--cfg-image", type=scale, help="image guidance (default: each model's own)")
    flag("--sheet", type=Path, help="a folder for sheets of the first and the worst edits (default: none)")

    flag = command("pictures", evaluate_pictures, "do pictures show what their captions say?", 1000,
                   "captions, half of each held-out split")
    flag("--model", default=base,
         help="a text-to-image model of the miniature world (default: weights/mini-sd.safetensors)")
    flag("--scorer", default=scorer, help="what reads the pictures (default: weights/mini-scorer.safetensors)")
    flag("--steps", **several)
    flag("--cfg-text", type=scale, help="text guidance (default: the model's own)")

    flag = command("curve", evaluate_curve, "the paper's figure", 100, "edits for each point")
    flag("--model", default=editor, help="an editor (default: weights/mini-ip2p.safetensors)")
    flag("--base", default=base, help="a text-to-image model, for the other methods (default: weights/mini-sd.safetensors)")
    flag("--clip", default=clip, help="what judges (default: weights/mini-clip.safetensors)")
    flag("--data", type=Path, help="a data set as make_data.py writes it, of which the last --count prompts are taken, "
         "as far as training holds them back: the last tenth "
         "(default: held-out edits of the miniature world)")
    flag("--cfg-text", type=scale, help="text guidance of all methods (default: each model's own, else 7.5)")
    flag("--cfg-image", type=scale, nargs="+", default=[1, 1.2, 1.4, 1.6, 1.8, 2, 2.2],
         help="image guidance of the editor (default: 1 to 2.2)")
    flag("--strengths", type=share, nargs="+", default=[.3, .4, .5, .6, .7, .8, .9], help="of SDEdit (default: .3 to .9)")
    flag("--shares", type=share, nargs="+", default=[0, .2, .4, .6, .8, 1],
         help="of the steps in which Prompt-to-Prompt uses the source's attention (default: 0 to 1)")
    flag("--steps", type=steps, default=20, help="of the sampler (default: %(default)s)")
    flag("--plot", type=Path, help="a PNG file for the figure; takes matplotlib (default: none)")

    flag = command("pairs", evaluate_pairs, "what the share of attention does to drawn pairs", 96,
                   "pairs for each row")
    flag("--model", default=base,
         help="a text-to-image model of the miniature world (default: weights/mini-sd.safetensors)")
    flag("--clip", default=clip, help="the filter (default: weights/mini-clip.safetensors)")
    flag("--scorer", default=scorer, help="what reads the pictures (default: weights/mini-scorer.safetensors)")
    flag("--controls", choices=CONTROLS, nargs="+", default=CONTROLS, help="what is shared (default: all)")
    flag("--shares", type=share, nargs="+", default=[i / 10 for i in range(1, 10)],
         help="of the steps (default: .1 to .9)")
    flag("--steps", type=steps, default=20, help="of the sampler (default: %(default)s)")
    flag("--sheet", type=Path, help="a folder for contact sheets (default: none)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command())
