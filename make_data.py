"""Make training pairs as the paper does: captions -> edits -> pairs -> filter.

    python make_data.py                                # from the shipped models, offline, into data/
    python make_data.py --model v1-5-pruned-emaonly.safetensors --prompts-file edits.jsonl --out pairs

A language model writes an instruction and an edited caption for each caption; each caption pair is drawn --n-samples times
with different seeds, shares of attention and guidance; CLIP keeps the best. Stopped in any way, it goes on when the command
is repeated. OUT holds a folder for each prompt: prompt.json, {seed}_0.jpg and {seed}_1.jpg of what is kept, with scores in
metadata.jsonl; samples.jsonl has the scores of all that was drawn, rest/ such pictures as are stored without being kept.
"""
import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from ip2p.command_line import DEVICE, PARAMETERIZATION, SEEDS, WEIGHTS, Parser, exit_status, make_writable, named_path, within
from ip2p.data import (find_pictures, keep_pictures, list_seeds, list_tables, prompt_texts, read_json, read_jsonl, write_file,
                       write_rows, write_sheet)
from ip2p.distributed import DTYPES, choose_device, locked
from ip2p.features import hash_weights
from ip2p.images import open_image, to_images, to_pixels
from ip2p.prompt_to_prompt import CONTROLS
from ip2p.stages import is_miniature

PAPER = dict(clip="ViT-L-14:openai", control="self-attention", steps=100, n_samples=100)
MINIATURE = dict(clip=str(WEIGHTS / "mini-clip.safetensors"), control="local-blend", steps=20, n_samples=8)
SHOWN = 24                                                     # the first prompts keep all pictures, for the sheet


def main(args):
    """The exit status: 0, or 1 if --check finds something. ValueError for what can be put right."""
    if args.check:
        return check(args)
    args.device, args.dtype, args.torch_dtype = choose_device(args.device, args.dtype)
    if args.calibrate:
        return calibrate(args)
    check_folder(args)
    args.scratch = args.out / ".shard-{}-of-{}.tmp".format(*args.shard)      # everything unfinished is in here
    with holding(args.scratch):
        if args.filter_only:
            done = filter_pairs(args)
        else:
            prompts = read_prompts(args) if args.prompts_file or args.pairs_only else None
            if args.captions:
                check_captions(args.captions)
            tools = None if args.edits_only else load_tools(args)         # what cannot work ends here, before edits are written
            if prompts is None:
                write_edits(args)
            if args.edits_only:
                return 0
            done = draw_prompts(args, read_prompts(args) if prompts is None else prompts, *tools)

    seeds = read_json(args.out / "seeds.json")
    print("{prompts} prompts, {samples} pairs in {seconds:.0f} s, {rate:.2f} pairs/s; {kept} kept ({share:.0%})".format(
        **done, rate=done["samples"] / done["seconds"], share=done["kept"] / max(1, done["samples"])))
    print(f"{args.out} holds {sum(len(found) for _, found in seeds)} pairs of {len(seeds)} prompts; see its sheet.png")
    if seeds:
        print(f"python train.py --stage edit --data {args.out}")
    elif args.pairs_only:
        print(f"python make_data.py --filter-only --out {args.out}")
    else:
        print(f"none passed: their scores are in {args.out}/*/samples.jsonl, and --filter-only takes other thresholds")
    return 0


def check_folder(args):
    """Create OUT. ValueError if that cannot be, if it holds nothing to filter, or a data set in another layout, which the
    seeds.json of this one would hide."""
    out = args.out
    if args.filter_only and not any(out.glob("*/prompt.json")):
        raise ValueError(f"{out} holds no pairs to filter")
    make_writable(out, f"--out {out}")
    ours = [out / "edits.jsonl", out / "edits.rejected.jsonl", *map(Path, filter(None, (args.prompts_file, args.captions)))]
    others = [path for path in (*list_tables(out), *sorted(out.glob("*.jsonl"))) if path not in ours]
    if others and not args.filter_only and not any((out / name).exists() for name in ("seeds.json", "settings.json", "edits.json")):
        raise ValueError(f"{out} holds other data, {others[0].name}: give another --out")


@contextmanager
def holding(scratch):
    """An empty folder for this run alone, removed after the block. ValueError if another run holds it."""
    scratch.mkdir(exist_ok=True)
    with locked(scratch, f"{scratch.parent}: another run is at work there, on the same shard"):
        try:
            for leftover in scratch.iterdir():
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield
        finally:
            shutil.rmtree(scratch)


# ---- captions to edits

def check_captions(file):
    """ValueError if a file of captions has none, or none that can be read."""
    from ip2p.edits import read_captions
    if next(read_captions(file), None) is None:
        raise ValueError(f"{file}: holds no captions")


def write_edits(args):
    """OUT/edits.jsonl, by the language model. Of several shards the first writes, the others wait for edits.json. ValueError
    if OUT holds edits made otherwise, or if the model wrote none."""
    from ip2p.edits import EditWriter, generate_edits, read_captions, rejected_path, world_captions
    from ip2p.world import World
    from ip2p.world_reader import read
    settings = dict(num_captions=args.num_captions, captions=args.captions or "the world's", gpt=Path(args.gpt).name,
                    seed=args.seed)
    growing = hash_beginning(args.captions) if args.captions else {}
    path = args.out / "edits.json"

    def is_written():
        """Whether edits.json was written with these settings."""
        return path.exists() and (settings | growing).items() <= read_json(path).items()

    old = read_json(path) if path.exists() else settings
    if changed := [f"{k} was {old.get(k)}, now {v}" for k, v in settings.items() if k != "num_captions" and old.get(k) != v]:
        raise ValueError(f"{args.out} holds edits made with other settings ({'; '.join(changed)}): give another --out")
    known = {name: old[name] for name in growing if name in old}
    if known and known != hash_beginning(args.captions, known["captions_bytes"]):
        raise ValueError(f"{args.out} holds edits of what {args.captions} was before it changed; new captions may only follow "
                         f"the old ones: give another --out")
    if args.shard[0] and not is_written():
        print(f"waiting for {path}, which shard 0/{args.shard[1]} writes", flush=True)
        while not is_written():
            time.sleep(1)
    if is_written():
        return
    world, edits = World(), args.out / "edits.jsonl"

    def admit(output):
        """No held-out scene may be learned from."""
        scene = read(output)
        return scene is None or not world.holds_out(scene)
    captions = read_captions(args.captions) if args.captions else world_captions(world, args.seed)
    report = generate_edits(EditWriter.load(args.gpt, args.device), captions, edits, seed=args.seed, count=args.num_captions,
                            admit=None if args.captions else admit)
    if not report["accepted"]:
        raise ValueError(f"--captions {args.captions}: {args.gpt} wrote an edit for none of its {report['tried']} captions; what "
                         f"it wrote is in {rejected_path(edits)}")
    write_file(path, json.dumps(settings | growing | report, indent=1, ensure_ascii=False), args.scratch)
    print(f"{report['accepted']} edits of {report['tried']} captions, {report['instructions']} different instructions; "
          f"kinds: {report['kinds']}")


def hash_beginning(path, size=None):
    """A hash of a file's first bytes, all if size is None, and how many these are."""
    with open(path, "rb") as file:
        beginning = file.read(size)
    return dict(captions_bytes=len(beginning), captions_sha256=hashlib.sha256(beginning).hexdigest())


# ---- edits to pairs

def load_tools(args):
    """(model, judge, limits): what draws, what scores, None with --pairs-only, and what has to be passed. Sets what was not
    given on the command line."""
    from ip2p.clip_filter import ClipSimilarity
    from ip2p.pipeline import InstructPix2Pix
    model = InstructPix2Pix.load(args.model, args.device, args.torch_dtype, args.vae, parameterization=args.parameterization)
    model.check_makes_pictures()
    choose_settings(args, model.parts.metadata)
    limits = choose_thresholds(args)
    told = {k: v for k, v in vars(args).items() if v not in (None, False) and k not in ("scratch", "torch_dtype")}
    print(" ".join(f"{k}={v}" for k, v in told.items()), limits, flush=True)
    return model, None if args.pairs_only else ClipSimilarity.load(args.clip, args.device), limits


def draw_prompts(args, prompts, model, judge, limits):
    """Draw a folder of OUT for each of this shard's prompts without one."""
    begin_or_continue(args, limits, model)
    prompts = [(name, prompt) for name, prompt in prompts if not is_done(args.out / name, prompt)]

    done = Counter(prompts=0, samples=0, kept=0)
    bar = tqdm(total=len(prompts) * args.n_samples, unit="pair", dynamic_ncols=True)
    with finishing(args, done), bar:
        for name, prompt in prompts:
            folder = args.scratch / name
            (folder / "rest").mkdir(parents=True)
            write_file(folder / "prompt.json", json.dumps(prompt, ensure_ascii=False), args.scratch)
            rows = draw_prompt(model, judge, folder, prompt, args, limits, bar)
            write_rows(folder / "samples.jsonl", rows, args.scratch)
            kept = keep_best(args, folder, rows, limits) if judge else []
            if not stores_all(args, name):
                shutil.rmtree(folder / "rest")
            os.replace(folder, args.out / name)                      # now it is whole
            done.update(prompts=1, samples=len(rows), kept=len(kept))
            bar.set_postfix(kept=done["kept"])
    return done


def read_prompts(args):
    """[(folder's name, prompt)] of this shard's lines; ValueError, naming the line, if any line is no prompt."""
    file, (shard, shards) = Path(args.prompts_file or args.out / "edits.jsonl"), args.shard
    if args.pairs_only and not file.exists():
        raise ValueError(f"{file}: no such file; --pairs-only needs a --prompts-file, or --edits-only before it")
    prompts, number = [], 0
    for number, prompt in islice(read_jsonl(file), None if args.prompts_file or args.pairs_only else args.num_captions):
        prompt_texts(prompt, f"{file}:{number}")
        if (number - 1) % shards == shard:
            prompts.append((f"{number - 1:07d}", prompt))
    if not number:
        raise ValueError(f"{file}: holds no prompts")
    return prompts


def choose_settings(args, own):
    """What was not given on the command line: the paper's, or the miniature's if the model says that it is one."""
    args.miniature = is_miniature(own)
    for name, value in (MINIATURE if args.miniature else PAPER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    usual = own.get("cfg_text", 7.5)                                 # the paper's guidance is once to twice the usual
    args.min_cfg = usual if args.min_cfg is None else args.min_cfg
    args.max_cfg = max(2 * usual, args.min_cfg) if args.max_cfg is None else args.max_cfg
    for what in ("p2p", "cfg"):
        low, high = getattr(args, f"min_{what}"), getattr(args, f"max_{what}")
        if low > high:
            raise ValueError(f"--min-{what} {low} is above --max-{what} {high}")


def choose_thresholds(args):
    """Those given on the command line, else those that go with the CLIP."""
    from ip2p.clip_filter import Thresholds
    given = dict(caption=args.clip_threshold, direction=args.clip_dir_threshold, image=args.clip_img_threshold)
    given = {name: value for name, value in given.items() if value is not None}
    return Thresholds(**given) if len(given) == 3 else replace(Thresholds.of(args.clip), **given)


def begin_or_continue(args, limits, model):
    """Store the settings that determine the pairs as OUT/settings.json; ValueError if OUT was begun with something else."""
    drawn = ("seed", "steps", "n_samples", "min_p2p", "max_p2p", "min_cfg", "max_cfg", "control", "sampler", "dtype", "miniature",
             "parameterization")
    new = {name: getattr(args, name) for name in drawn} | {"model": Path(args.model).name, "vae": args.vae and Path(args.vae).name}
    new["weights"] = hash_weights(model.unet.out)[:16]
    new |= {"filter": None} if args.pairs_only else filter_settings(args, limits)
    path = args.out / "settings.json"
    if not path.exists():
        write_file(path, json.dumps(new, indent=1), args.scratch)
    old = read_json(path)
    if changed := [f"{k} was {old.get(k)}, now {new.get(k)}" for k in old | new if old.get(k) != new.get(k)]:
        raise ValueError(f"{args.out} was begun with other settings ({'; '.join(changed)}): repeat its command, change the "
                         f"filter with --filter-only, or give another --out")


def filter_settings(args, limits):
    return {"filter": dict(clip=name_of(args.clip), max_out_samples=args.max_out_samples) | asdict(limits)}


def name_of(clip):
    """What a CLIP is stored as, so that it is found again from anywhere: the shipped one by its name, files by whole paths."""
    from ip2p.clip_filter import is_named
    architecture, colon, weights = clip.partition(":") if is_named(clip) else ("", "", clip)
    whole = str(Path(weights).resolve()) if Path(weights).is_file() else weights
    return Path(whole).name if whole == MINIATURE["clip"] else architecture + colon + whole


def is_done(folder, prompt):
    if folder.exists() and read_json(folder / "prompt.json") != prompt:
        raise ValueError(f"{folder} was made of another prompt than line {int(folder.name) + 1} now has; give another --out")
    return folder.exists()


def draw_prompt(model, judge, folder, prompt, args, limits, bar):
    """Draw a prompt's pairs into folder/rest, without those that will not be kept. Returns a row for each of them all."""
    caption, _, edited = prompt_texts(prompt, folder)
    rng = random.Random(f"{args.seed}/{folder.name}")
    rows = [dict(seed=seed, p2p_threshold=rng.uniform(args.min_p2p, args.max_p2p),
                 cfg_scale=rng.uniform(args.min_cfg, args.max_cfg)) for seed in rng.sample(range(2 ** 32), args.n_samples)]
    for start in range(0, len(rows), args.batch_size):
        batch = rows[start:start + args.batch_size]
        settings = ([row[key] for row in batch] for key in ("seed", "p2p_threshold", "cfg_scale"))
        pixels = model.draw_pairs([caption] * len(batch), [edited] * len(batch), *settings, steps=args.steps,
                                  sampler=args.sampler, control=args.control)
        for k in range(2):
            for row, picture in zip(batch, to_images(pixels[k])):
                picture.save(folder / "rest" / f"{row['seed']}_{k}.jpg", quality=100, subsampling=0)
        if judge:
            score(judge, folder, batch, caption, edited)
        for row in batch:
            if not (stores_all(args, folder.name) or limits.passed_by(row)):
                for picture in find_pictures(folder, row):
                    picture.unlink()
        bar.update(len(batch))
    return rows


def stores_all(args, name):
    return args.keep_all or args.pairs_only or int(name) < SHOWN


# ---- pairs to those that are kept

def score(judge, folder, rows, caption, edited):
    """Add CLIP's four similarities to rows, of the pictures as they are stored."""
    by_size = {}
    for row in rows:
        pictures = [open_image(path) for path in find_pictures(folder, row)]
        by_size.setdefault(tuple(p.size for p in pictures), []).append((row, *pictures))
    for group in by_size.values():
        own, *pictures = zip(*group)
        before, after = (torch.stack([to_pixels(p, *p.size) for p in column]) for column in pictures)
        for row, scores in zip(own, judge(before, after, [caption] * len(own), [edited] * len(own))):
            row.update(scores)


def keep_best(args, folder, rows, limits):
    from ip2p.clip_filter import keep
    kept = keep([row for row in rows if find_pictures(folder, row)], limits, args.max_out_samples)
    keep_pictures(folder, rows, kept, args.scratch)
    return kept


def filter_pairs(args):
    """Apply thresholds to what was drawn before. It is scored first if it has no scores, or if a --clip was given."""
    from ip2p.clip_filter import SCORES, ClipSimilarity
    path = args.out / "settings.json"
    settings = read_json(path) if path.exists() else {}              # the published set has none
    told = settings.get("filter") or {}
    rescore = args.clip is not None or told.get("scoring", False)    # the latter: rescoring was begun and not finished
    if args.clip is None:                                            # the CLIP that gave the scores there are
        clip = told.get("clip") or (MINIATURE if settings.get("miniature") else PAPER)["clip"]
        args.clip = MINIATURE["clip"] if clip == Path(MINIATURE["clip"]).name else clip            # stored by its name alone
    judge = ClipSimilarity.load(args.clip, args.device) if rescore else None
    limits, done, gone = choose_thresholds(args), Counter(prompts=0, samples=0, kept=0), 0
    print(f"out={args.out} clip={args.clip} max_out_samples={args.max_out_samples}", limits, flush=True)
    if settings:                                                     # a filter that was begun has to be ended
        begun = filter_settings(args, limits)["filter"] | dict(scoring=rescore)
        write_file(path, json.dumps(settings | {"filter": begun}, indent=1), args.scratch)

    prompts = sorted(args.out.glob("*/prompt.json"))[args.shard[0]::args.shard[1]]
    with finishing(args, done):
        for file in tqdm(prompts, unit="prompt", dynamic_ncols=True):
            folder, (caption, _, edited) = file.parent, prompt_texts(read_json(file), file)
            rows = read_samples(folder)
            new = [row for row in rows if (rescore or not row.keys() >= set(SCORES)) and find_pictures(folder, row)]
            for start in range(0, len(new), args.batch_size):
                judge = judge or ClipSimilarity.load(args.clip, args.device)
                score(judge, folder, new[start:start + args.batch_size], caption, edited)
            write_rows(folder / "samples.jsonl", rows, args.scratch)
            kept = keep_best(args, folder, rows, limits)
            gone += sum(limits.passed_by(row) for row in rows if not find_pictures(folder, row))
            done.update(prompts=1, samples=len(rows), kept=len(kept))
    if settings:
        write_file(path, json.dumps(settings | filter_settings(args, limits), indent=1), args.scratch)
    if gone:
        print(f"{gone} more would pass, but their pictures were not stored; --keep-all does that when pairs are drawn")
    return done


def read_samples(folder):
    """The rows of a prompt's pairs, one for each, though a list of the published kind may have some twice; of pairs that no
    list has, the seed alone."""
    rows = {}
    file = next((p for p in (folder / "samples.jsonl", folder / "metadata.jsonl") if p.exists()), None)
    for number, row in read_jsonl(file) if file else ():
        if not isinstance(row.get("seed"), (int, str)):
            raise ValueError(f"{file}:{number}: a pair without its seed, a number or a text")
        rows[row["seed"]] = row
    for seed in sorted(path.name.removesuffix("_0.jpg") for path in folder.glob("*_0.jpg")):
        if seed not in map(str, rows):
            rows[seed] = dict(seed=int(seed) if seed.isdigit() else seed)
    return list(rows.values())


@contextmanager
def finishing(args, done):
    """However the block ends, its seconds are added to what was done, and seeds.json and the sheet are brought up to date.
    Of several shards one writes at a time: so the last to do so sees everything."""
    began = time.monotonic()
    try:
        yield
    finally:
        done["seconds"] = time.monotonic() - began
        with locked(args.out):
            write_file(args.out / "seeds.json", json.dumps(list_seeds(args.out)), args.scratch)
            write_sheet(args.out, args.scratch)


# ---- other commands

def check(args):
    from ip2p.check_data import check_dataset
    problems = check_dataset(args.check)
    print("\n".join(problems) or f"{args.check}: nothing is wrong")
    return 1 if problems else 0


def calibrate(args):
    """Thresholds for a CLIP of the miniature, stored in its file, from which they are read whenever it is used."""
    from ip2p.clip_filter import ClipSimilarity, calibrate, is_named, store_thresholds
    from ip2p.world import World
    clip = args.clip or MINIATURE["clip"]
    thresholds, explanation = calibrate(ClipSimilarity.load(clip, args.device), World(args.device))
    print(f"{explanation}\n{thresholds}")
    if is_named(clip):
        print("not stored, as this is no file of ours: pass them as --clip-threshold and so on")
    else:
        store_thresholds(clip, thresholds)
        print(f"stored in {clip}")
    return 0


def run(argv=None):
    """The command; returns its exit status."""
    args = parse(argv)
    return exit_status("make_data.py", lambda: main(args), "a smaller --batch-size, or --dtype bf16", "repeat the command to go on")


def shard(text):
    """An argparse type: "i/n", shard i of n, counted from 0."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise argparse.ArgumentTypeError(f"needed i/n with 0 <= i < n, got {text}")
    return int(i), int(n)


def parse(argv=None):
    p = Parser(prog="make_data.py", description=__doc__)
    flag, share, scale, cosine = p.add_argument, within(float, 0, 1), within(float, -1000, 1000), within(float, -1, 1)
    flag("--out", type=named_path, default=Path("data"), help="the data set's folder (default: %(default)s)")
    flag("--model", default=str(WEIGHTS / "mini-sd.safetensors"), help="a text-to-image model: a file, a diffusers folder "
         "or an id on the Hugging Face hub (default: weights/mini-sd.safetensors)")
    flag("--vae", help="a file or folder with another autoencoder, as the paper's (default: the model's own)")
    flag("--parameterization", **PARAMETERIZATION)
    flag("--gpt", help="what writes edits: a file of ours, or GPT-2 fine-tuned with train.py (default: "
         "weights/mini-gpt.safetensors)")
    flag("--captions", help="a text file with a caption a line, or .jsonl or .csv (default: the toy world's, without end)")
    flag("--num-captions", type=within(int, 1, 10 ** 9), help="edits to have written; may be raised later (default: 100)")
    flag("--prompts-file", help="edits that are there already: a .jsonl of {caption, edit, output}, or with input for "
         "caption (default: have them written)")
    flag("--steps", type=within(int, 1, 1000), help="of the sampler (default: 20 for the miniature, else 100)")
    flag("--n-samples", type=within(int, 1, 10 ** 5), help="pairs drawn of each prompt (default: 8 for the miniature, "
         "else 100)")
    flag("--max-out-samples", type=within(int, 0, 10 ** 5), default=4, help="most kept of each (default: %(default)s)")
    flag("--min-p2p", type=share, default=0.1, help="share of steps with shared attention, at least (default: %(default)s)")
    flag("--max-p2p", type=share, default=0.9, help="and at most (default: %(default)s)")
    flag("--min-cfg", type=scale, help="guidance, at least (default: the model's usual, 7.5 for Stable Diffusion)")
    flag("--max-cfg", type=scale, help="and at most (default: twice the model's usual)")
    flag("--control", choices=CONTROLS, help="what the two pictures share: self-attention, as in the paper; cross-attention, "
         "and self-attention half as long; or both and, with local-blend, all that lies away from the words that differ "
         "(default: local-blend for the miniature, else self-attention)")
    flag("--sampler", choices=("euler-ancestral", "ddim"), default="euler-ancestral", help="default: %(default)s")
    flag("--clip", help="what judges: a CLIP file of ours, or open_clip's name and its weights, a tag or a file, such as "
         "ViT-L-14-quickgelu:weights.pt (default: weights/mini-clip.safetensors for the miniature, else ViT-L-14:openai)")
    flag("--clip-threshold", type=cosine, help="each picture with its caption, at least (default: what --calibrate stored "
         "in the CLIP's file, else the paper's 0.2)")
    flag("--clip-dir-threshold", type=cosine, help="change of pictures with change of captions (default: likewise, or 0.2)")
    flag("--clip-img-threshold", type=cosine, help="the two pictures with each other (default: likewise, or 0.7)")
    flag("--keep-all", action="store_true", help="store the pictures of rejected pairs too, in rest/, so that --filter-only "
         f"can take any thresholds later, not just stricter ones (default: of the first {SHOWN}, for the sheet)")
    flag("--edits-only", action="store_true", help="stop after OUT/edits.jsonl")
    flag("--pairs-only", action="store_true", help="draw from --prompts-file or OUT/edits.jsonl, and store all, unfiltered")
    flag("--filter-only", action="store_true", help="apply thresholds to what OUT holds, without drawing; a --clip scores "
         "it anew")
    flag("--check", type=Path, metavar="DIR", help="list what is wrong with a data set, in any layout that train.py reads; "
         "exit status 0 if nothing is, 1 if something is")
    flag("--calibrate", action="store_true", help="find thresholds for a CLIP of the miniature from pairs known to be right "
         "or wrong, show how, and store them in its file")
    flag("--shard", type=shard, default=f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}", metavar="I/N",
         help="do every N-th prompt from the I-th, counted from 0, beside others in the same OUT (default: torchrun's rank)")
    flag("--seed", type=SEEDS, default=0, help="of edits, noise and settings (default: %(default)s)")
    flag("--batch-size", type=within(int, 1, 10000), default=8, help="pairs drawn at a time (default: %(default)s)")
    flag("--device", **DEVICE)
    flag("--dtype", choices=DTYPES, help="of weights and arithmetic (default: on cuda bf16, or fp16 before Ampere; else fp32)")
    args = p.parse_args(argv)
    if sum((args.edits_only, args.pairs_only, args.filter_only, args.calibrate, args.check is not None)) > 1:
        p.error("--edits-only, --pairs-only, --filter-only, --check and --calibrate exclude one another")
    if args.edits_only and args.prompts_file:
        p.error("--edits-only writes edits, and --prompts-file names some that are there already: give one of the two")
    for name, value in dict(captions=None, gpt=str(WEIGHTS / "mini-gpt.safetensors"), num_captions=100).items():
        if args.prompts_file and getattr(args, name) is not None:
            p.error(f"--{name.replace('_', '-')} is for edits that are yet to be written, and --prompts-file names some that "
                    f"are there already: give one of the two")
        if not args.prompts_file and getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)            # as Ctrl-C: drop the prompt in hand, and end well
    sys.exit(run())
