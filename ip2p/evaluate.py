"""Scores that do not guess: the miniature world knows the true edited picture.

    python -m ip2p.evaluate pairs            # what the share of attention does to drawn pairs, for both controls
"""
import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from .clip_filter import ClipSimilarity, Thresholds
from .guidance import text_denoiser
from .images import contact_sheet, save_image, to_images
from .pipeline import InstructPix2Pix
from .samplers import ddim_invert
from .tensorfiles import replacing
from .world import World

WEIGHTS = Path(__file__).parent.parent / "weights"
FIXED = ("time", "weather", "season", "color", "remove", "size")       # kinds whose instruction fixes the true picture
CONTROLS = ("self-attention", "cross-attention")


def psnr(x, y, where=None):
    """Peak signal-to-noise ratio in dB, (B,), of pixels (B, 3, H, W) in [-1, 1]; where: (B, 1, H, W) bool, of these only."""
    where = torch.ones_like(x[:, :1]) if where is None else where.float()
    mse = ((x - y).square().mean(1, keepdim=True) * where).flatten(1).sum(1) / where.flatten(1).sum(1)
    return 10 * (4 / mse).log10()


def evaluate_pairs(args):
    """For each control and share of the steps: the share of drawn pairs that CLIP keeps, and how close a pair comes to the
    true one.

    The first is of pairs drawn freely, as `make_data.py` does it. For the second the true source picture is inverted (DDIM
    under its caption), both pictures are drawn from that noise, and the edited one is compared with the true edited
    picture: all over, and outside of what truly changed. Kinds of edits whose instruction fixes the true picture only.
    """
    model, world = InstructPix2Pix.load(args.model, args.device), World(args.device)
    judge, thresholds = ClipSimilarity.load(args.clip, args.device), Thresholds.of(args.clip)
    cfg_text = model.parts.metadata.get("cfg_text", 7.5)
    print(" ".join(f"{k}={v}" for k, v in vars(args).items()), f"cfg_text={cfg_text}", thresholds, flush=True)

    # The true pairs, and the noise that leads back to their sources.
    examples = [world.edit(args.seed, i, "combinations", FIXED[i % len(FIXED)]) for i in range(args.count)]
    before, after = (world.render([getattr(e, which) for e in examples]) for which in ("source", "target"))
    captions, edited = [e.caption for e in examples], [e.edited_caption for e in examples]
    same = (before - after).abs().amax(1, keepdim=True) < 0.02
    batches = [range(i, min(i + args.batch_size, args.count)) for i in range(0, args.count, args.batch_size)]
    with torch.no_grad():
        z = torch.cat([model.vae.encode(before[list(b)]).mode() for b in batches]) * model.vae.config.scale_factor
        context, null = model.encode_text(captions), model.encode_text([""])
        x_T = torch.cat([ddim_invert(text_denoiser(model.predict, context[list(b)], null, 1.0), z[list(b)], args.steps,
                                     model.alphas_cumprod)[-1] for b in tqdm(batches, desc="inversion")])
        floor = torch.cat([model.decode(model.vae.encode(after[list(b)]).mode() * model.vae.config.scale_factor) for b in batches])

    rows = []
    for control, share in tqdm(list(product(args.controls, args.shares)), desc="controls"):
        scores, drawn = [], []
        for b in batches:
            texts = captions[b.start:b.stop], edited[b.start:b.stop]
            settings = [args.seed + i for i in b], [share] * len(b), [cfg_text] * len(b)
            draw = partial(model.draw_pairs, *texts, *settings, control=control, steps=args.steps)
            scores += judge(*draw(), *texts)
            drawn.append(torch.stack(draw(x_T=x_T[list(b)], sampler="ddim")))
        source, target = torch.cat(drawn, 1)
        outside = same.flatten(1).float().mean(1) > 0.2                    # something stays
        rows.append(dict(control=control, share=share, kept=sum(map(thresholds.passed_by, scores)) / len(scores),
                         sim_dir=sum(s["clip_sim_dir"] for s in scores) / len(scores),
                         sim_image=sum(s["clip_sim_image"] for s in scores) / len(scores),
                         source_psnr=float(psnr(source, before).mean()), psnr=float(psnr(target, after).mean()),
                         psnr_outside=float(psnr(target, after, same)[outside].mean())))
        if args.sheet and share in (args.shares[0], args.shares[len(args.shares) // 2], args.shares[-1]):
            cells = [cell for i in range(min(12, args.count)) for cell in zip(
                to_images(torch.stack([before[i], after[i], source[i], target[i]])),
                (captions[i], edited[i], f"{control} {share:g}", ""))]
            save_image(contact_sheet(cells), args.sheet / f"{control}-{share:g}.png")

    limits = dict(unedited=float(psnr(before, after).mean()), autoencoder=float(psnr(floor.cpu(), after).mean()))
    print("| control | share | kept | direction | image | source, dB | edited, dB | unchanged part, dB |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for r in rows:
        print(f"| {r['control']} | {r['share']:.1f} | {r['kept']:.0%} | {r['sim_dir']:.2f} | {r['sim_image']:.2f} | "
              f"{r['source_psnr']:.1f} | {r['psnr']:.1f} | {r['psnr_outside']:.1f} |")
    print(f"The unedited picture: {limits['unedited']:.1f} dB; the true one through the autoencoder: {limits['autoencoder']:.1f} dB.")
    if args.json:
        with replacing(args.json) as temporary:
            Path(temporary).write_text("".join(json.dumps(row | limits) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m ip2p.evaluate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pairs"], help="what to score")
    parser.add_argument("--model", default=str(WEIGHTS / "mini-sd.safetensors"), help="a text-to-image model of the miniature "
                        "world (default: weights/mini-sd.safetensors)")
    parser.add_argument("--clip", default=str(WEIGHTS / "mini-clip.safetensors"), help="the filter (default: weights/mini-clip.safetensors)")
    parser.add_argument("--controls", choices=CONTROLS, nargs="+", default=CONTROLS, help="default: both")
    parser.add_argument("--shares", type=float, nargs="+", default=[i / 10 for i in range(1, 10)], help="of the steps (default: .1 to .9)")
    parser.add_argument("--count", type=int, default=96, help="pairs for each row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="pairs drawn at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--sheet", type=Path, help="a folder for contact sheets (default: none)")
    parser.add_argument("--json", type=Path, help="a file for the rows, as jsonl (default: none)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    evaluate_pairs(parser.parse_args())
