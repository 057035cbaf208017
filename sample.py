"""Edit pictures as you say.

    python sample.py --image ip2p/assets/examples/fox.png --prompt "make it night"
    python sample.py --image ip2p/assets/examples/ --prompt "make it night" --grid --cfg-text 3 5 7.5 --cfg-image 1 1.5 2
    python sample.py --method p2p --image fox.png --source-prompt "a fox in a meadow" --prompt "a fox in a meadow at night"

The second makes sheets that show what the two guidance scales do. The third edits with a text-to-image model, by inversion
and Prompt-to-Prompt: prompts then say what the pictures shall show. Every prompt is applied to every picture; results are
PNG files in outputs/ that record, as JSON in their text chunk "ip2p", what is needed to make them again.
"""
import json
import re
import signal
import sys
from contextlib import contextmanager, nullcontext
from itertools import chain, count, islice, product
from pathlib import Path

from ip2p.command_line import (DEVICE, PARAMETERIZATION, SEEDS, WEIGHTS, Parser, complaint, exit_status, make_writable, named_path,
                               within)

EDITOR = WEIGHTS / "mini-ip2p-fast.safetensors", "path/to/instruct-pix2pix-00-22000.safetensors or --model timbrooks/instruct-pix2pix"
BASE = WEIGHTS / "mini-sd.safetensors", "path/to/v1-5-pruned-emaonly.safetensors"
METHODS = {"ip2p": EDITOR, "sdedit": BASE, "p2p": BASE, "null-text": BASE}            # the model of each, and the public one
OWN_FLAGS = {("grid", "cfg_image", "negative_prompt", "sampler"): ["ip2p"], ("strength",): ["sdedit"],
             ("source_prompt", "cross_steps", "self_steps", "blend"): ["p2p", "null-text"]}
WRITTEN = (".png", ".jpg", ".jpeg", ".webp")
LONGEST = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500}                             # side of a picture in such a file
READ = (*WRITTEN, ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm")           # what is taken from a folder


def main(args):
    """The exit status: 2 if a picture could not be read, else 0. ValueError for what can be put right."""
    from tqdm import tqdm
    from ip2p.distributed import choose_device
    from ip2p.grid import grid_sheet
    from ip2p.pipeline import InstructPix2Pix

    # Find out what cannot work, before anything slow.
    paths = list_pictures(args.image)
    bad = []
    pictures = open_pictures(paths, bad)
    first = list(islice(pictures, 1))
    if not first:
        return 2
    folder, file = check_output(args.output, paths, len(paths) * len(args.prompt) * args.num_images)
    side = max(first[0][1].size)
    longest = LONGEST.get(file.suffix.lower()) if file else None
    if longest and side > longest and not (args.keep_model_size or args.grid):
        raise ValueError(f"--output {file}: such a file holds sides of up to {longest} pixels, and the result has {side}; write .png")

    # Load the model. It may know the settings that suit it.
    miniature, public = METHODS[args.method]
    if args.model is None:
        args.model = str(miniature)
        print(f"model: the miniature, which knows only the toy world it was trained on; for photographs, pass --model {public}")
    args.device, args.dtype, dtype = choose_device(args.device, args.dtype)
    model = InstructPix2Pix.load(args.model, args.device, dtype, args.vae, parameterization=args.parameterization,
                                 ema=not args.no_ema, low_memory=args.low_memory)
    if args.method == "ip2p" and not model.is_editor:
        raise ValueError(f"{args.model}: not an editor: its UNet takes {model.unet.config.in_channels} channels, "
                         f"InstructPix2Pix's {2 * model.vae.config.z_channels}")
    if args.method != "ip2p" and model.is_editor:
        raise ValueError(f"{args.model}: an editor: --method {args.method} needs a text-to-image model")
    own = model.own_settings
    cfg_text, cfg_image = args.cfg_text or [own["cfg_text"]], args.cfg_image or [own["cfg_image"]]
    settings = dict(steps=args.steps or own["sample_steps"], size=args.size or model.parts.image_size)
    if args.method == "ip2p":
        edit = model.edit
        settings |= dict(negative_prompt=args.negative_prompt, sampler=args.sampler, eta=0.0 if args.sampler == "ddim" else 1.0)
        record = settings | dict(cfg_image=cfg_image if args.grid else cfg_image[0])
    else:
        edit = TextEditor(model, args).edit
        names = ["strength"] if args.method == "sdedit" else ["source_prompt", "cross_steps", "self_steps", "blend"]
        record = settings | {name: getattr(args, name) for name in names}
    record |= dict(method=args.method, cfg_text=cfg_text if args.grid else cfg_text[0],
                   model=name_of(args.model), vae=args.vae and name_of(args.vae),
                   parameterization=args.parameterization, dtype=args.dtype) | ({"no_ema": True} if args.no_ema else {})
    print(" ".join(f"{k}={v!r}" for k, v in record.items()), f"seed={args.seed} device={args.device}", flush=True)
    note_prompts(model.tokenizer, args)
    if args.compile:
        import torch
        model.unet.forward = torch.compile(model.unet.forward)

    # Edit a batch at a time, and save its results before the next.
    jobs = ((*picture, prompt) for picture in chain(first, pictures) for prompt in args.prompt)
    scales = list(product(cfg_image, cfg_text))
    total = len(paths) * len(args.prompt) * args.num_images * len(scales)
    one_call = total <= args.batch_size and len(scales) == 1               # shows its steps; several count pictures
    with tqdm(total=total, unit="picture", disable=one_call) as bar:
        for batch, seeds in calls(jobs, args):
            _, images, prompts = zip(*batch)
            results = []                                                   # by scale, then by job and seed
            for image_scale, text_scale in scales:
                results.append(edit(images, prompts, cfg_text=text_scale, cfg_image=image_scale, seed=seeds[0],
                                    num_images=len(seeds), progress=one_call, **settings))
                bar.update(len(results[-1]))
            made = [(*job, seed) for job in batch for seed in seeds]
            for (path, image, prompt, seed), cells in zip(made, zip(*results)):                       # cells: one a scale
                if not args.keep_model_size:
                    cells = [restore_size(cell, image, shrink=args.grid) for cell in cells]
                result = grid_sheet(image, cells, prompt, cfg_text, cfg_image) if args.grid else cells[0]
                words = [path.stem, prompt]
                if args.grid:
                    words.append("grid")
                if args.num_images > 1:
                    words.append(str(seed))
                with nullcontext(file) if file else new_file(folder, words) as target:
                    save(result, target, dict(image=path.name, prompt=prompt, seed=seed) | record)
                bar.write(str(target))
    return 2 if bad else 0


class TextEditor:
    """Editing with a text-to-image model, one picture at a time, by the same call as `InstructPix2Pix.edit`."""

    def __init__(self, model, args):
        self.model, self.args = model, args
        self.picture = self.inverted = None            # the last one: its prompts come in a row, so it is inverted once

    def edit(self, images, prompts, *, steps, cfg_text, seed, num_images, size, progress, **_):
        from ip2p.inversion import InvertedPicture, sdedit
        from ip2p.prompt_to_prompt import LocalBlend, prompt_to_prompt
        args, results = self.args, []
        null_text = args.method == "null-text"                             # its authors' settings are its own
        blend = LocalBlend(tuple(args.blend), start=0.2 if null_text else 0.0) if args.blend else None
        for image, prompt in zip(images, prompts):
            if args.method == "sdedit":
                results += [sdedit(self.model, image, prompt, strength=args.strength, steps=steps, cfg_text=cfg_text,
                                   seed=seed + i, size=size, progress=progress) for i in range(num_images)]
                continue
            texts = [args.source_prompt, prompt]
            control = prompt_to_prompt(self.model.tokenizer, texts, steps, cross_replace_steps=args.cross_steps,
                                       mode="replace" if len(texts[0].split()) == len(prompt.split()) else "refine",
                                       self_replace_steps=args.self_steps,
                                       self_side=32 if null_text else 16, local_blend=blend)
            if image is not self.picture:
                self.inverted = InvertedPicture(self.model, image, args.source_prompt, optimize=null_text,
                                                steps=steps, cfg_text=cfg_text, size=size, progress=progress)
                self.picture = image
            results.append(self.inverted.edit([prompt], control, progress=progress)[1])
        return results


def list_pictures(images):
    """Paths of the files named, and of the pictures in the folders named."""
    paths = []
    for path in images:
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.glob("[!.]*") if p.suffix.lower() in READ and p.is_file())
        if not found:
            raise ValueError(f"{path}: a folder without pictures ({', '.join(READ)})")
        paths += found
    return paths


def open_pictures(paths, bad):
    """(path, picture) of those that can be read. The others are reported, and listed in `bad`."""
    from tqdm import tqdm
    from ip2p.images import open_image
    for path in paths:
        try:
            yield path, open_image(path)
        except ValueError as error:
            bad.append(path)
            tqdm.write(f"sample.py: {complaint(error)}", file=sys.stderr)


def name_of(path):
    """What a record says of a file or folder: its name; and of an id on the hub, all."""
    return Path(path).name if Path(path).exists() else path


def check_output(output, paths, results):
    """(folder, file) to write to; the file is None where names are to be made. ValueError if nothing can be written."""
    folder = file = output
    if folder.is_dir() or folder.suffix.lower() not in READ:
        file = None
    elif file.suffix.lower() not in WRITTEN:
        raise ValueError(f"--output {output}: pictures are written as {', '.join(WRITTEN)}")
    elif results > 1:
        raise ValueError(f"--output {output} is one file, but there will be {results} pictures: give a folder")
    elif file.exists() and file.samefile(paths[0]):
        raise ValueError(f"--output {output} is the picture to edit: give another name")
    elif file.exists() and not is_result(file):
        raise ValueError(f"--output {output}: is there already, and only a .png of this script's would be replaced: give another "
                         f"name")
    else:
        folder = file.parent
    make_writable(folder, f"--output {output}")
    return folder, file


def is_result(file):
    """Whether a picture has the record that `save` writes."""
    from PIL import Image
    try:
        with Image.open(file) as picture:
            return "ip2p" in picture.info
    except OSError:                                                        # no picture
        return False


def note_prompts(tokenizer, args):
    """Warn of prompts that are cut short or change nothing."""
    room = tokenizer.config.context_length - 2                 # the start and end tokens take two places
    for prompt in [*args.prompt, args.negative_prompt, args.source_prompt or ""]:
        tokens = tokenizer.encode(prompt)
        if len(tokens) > room:
            print(f"note: a prompt of {len(tokens)} tokens is longer than the model reads; its first {room} are kept: "
                  f"{' '.join(prompt.split())[:40]}...", file=sys.stderr)
    if args.method == "ip2p" and not all(prompt.strip() for prompt in args.prompt):
        print("note: an empty prompt gives the picture back, as it comes out of the autoencoder", file=sys.stderr)


def calls(jobs, args):
    """(jobs, seeds) of every call of the model, each for at most --batch-size results: the jobs times the seeds."""
    seeds = range(args.seed, args.seed + args.num_images)
    seeds_a_call = min(args.num_images, args.batch_size)
    jobs_a_call = args.batch_size // seeds_a_call
    while batch := list(islice(jobs, jobs_a_call)):
        for start in range(0, args.num_images, seeds_a_call):
            yield batch, seeds[start:start + seeds_a_call]


def restore_size(result, image, shrink):
    """The result with its input's proportions, and at its input's size unless it is for a sheet, which stays smaller."""
    from PIL import Image
    long = max(result.size if shrink else image.size)
    return result.resize([max(1, round(side * long / max(image.size))) for side in image.size], Image.Resampling.LANCZOS)


@contextmanager
def new_file(folder, words):
    """A path like folder/fox-make-it-night.png, with a number where that one is taken. It is there, and empty, from the first,
    so that no other process takes it; and gone again if the block fails."""
    name = re.sub(r"\W+", "-", "-".join(words[1:]).lower())
    name = f"{words[0]}-{name}".encode(errors="ignore")[:180].decode(errors="ignore").strip("-") or "picture"
    names = chain([name], (f"{name}-{i}" for i in count(2)))
    for path in (folder / f"{name}.png" for name in names):
        try:
            path.open("x").close()
            break
        except FileExistsError:
            continue
    try:
        yield path
    except BaseException:
        path.unlink()
        raise


def save(picture, path, record):
    from PIL.PngImagePlugin import PngInfo
    from ip2p.images import save_image
    options = dict(quality=95)
    if path.suffix.lower() == ".png":
        options = dict(pnginfo=PngInfo())
        options["pnginfo"].add_text("ip2p", json.dumps(record))
    save_image(picture, path, **options)


def run(argv=None):
    """The command; returns its exit status."""
    args = parse(argv)
    return exit_status("sample.py", lambda: main(args), "--low-memory, a smaller --size or --batch-size, or --dtype bf16")


def parse(argv=None):
    p = Parser(prog="sample.py", description=__doc__)
    flag, scale = p.add_argument, within(float, -1000, 1000)
    flag("--image", type=named_path, nargs="+", required=True, help="pictures to edit: files, or folders of them (no default)")
    flag("--prompt", nargs="+", required=True, help="instructions, each for every picture (no default)")
    flag("--model", help="a .safetensors or .ckpt file, a diffusers folder, or an id on the Hugging Face hub (default: "
         "weights/mini-ip2p-fast.safetensors, the distilled miniature; weights/mini-sd.safetensors for other methods)")
    flag("--vae", help="a file or folder with another autoencoder (default: the model's own)")
    flag("--parameterization", **PARAMETERIZATION)
    flag("--no-ema", action="store_true", help="leave a checkpoint's averaged weights alone, for merges of models that still "
         "hold those of one of the models (default: take them)")
    flag("--output", type=named_path, default="outputs", help="a folder, where results get names like fox-make-it-night.png that are not taken "
         "yet; or a .png, .jpg or .webp file, for a single result, which replaces nothing but such a .png (default: %(default)s)")
    flag("--steps", type=within(int, 1, 1000), help="of the sampler (default: the model's own, else 20)")
    flag("--sampler", choices=("ddim", "euler-ancestral"), default="ddim", help="default: %(default)s")
    flag("--cfg-text", type=scale, nargs="+", help="how much to follow the instruction (default: the model's own, else 7.5)")
    flag("--cfg-image", type=scale, nargs="+", help="how much to keep of the picture (default: the model's own, else 1.5)")
    flag("--negative-prompt", default="", help="what to lead away from (default: nothing)")
    flag("--seed", type=SEEDS, default=0, help="of the noise (default: %(default)s)")
    flag("--num-images", type=within(int, 1, 10000), default=1, help="results of each picture and instruction, with this seed "
         "and the next ones (default: %(default)s)")
    flag("--size", type=within(int, 8, 8192), help="long side of the picture in the model, where both sides are multiples "
         "of what the model asks, 64 for Stable Diffusion's; what that stretches is undone (default: the model's own)")
    flag("--keep-model-size", action="store_true", help="leave results at that size (default: as large as the input)")
    flag("--grid", action="store_true", help="a labelled sheet of each picture and instruction: --cfg-text and --cfg-image "
         "may be several scales, all of which are combined (default: off)")
    flag("--batch-size", type=within(int, 1, 10000), default=8, help="results made at a time (default: %(default)s)")
    flag("--device", **DEVICE)
    flag("--dtype", choices=("fp32", "fp16", "bf16"),
         help="of weights and arithmetic (default: on cuda bf16, or fp16 before Ampere; else fp32)")
    flag("--low-memory", action="store_true", help="the model's parts on the device in turn, the autoencoder in strips, guidance "
         "one branch after another: less memory, more time, the same picture up to rounding (default: off)")
    flag("--method", choices=METHODS, default="ip2p", help="how to edit: by InstructPix2Pix in one pass; or with a text-to-image "
         "model, by SDEdit, by Prompt-to-Prompt after DDIM inversion, or after null-text inversion (default: %(default)s)")
    flag("--source-prompt", help="p2p, null-text: what the picture shows; prompts then say what it shall show (no default)")
    flag("--strength", type=within(float, 0, 1), default=0.75, help="sdedit: share of the steps that are drawn again (default: %(default)s)")
    flag("--cross-steps", type=within(float, 0, 1), default=0.8, help="p2p, null-text: share of the steps with the source's "
         "cross-attention (default: %(default)s)")
    flag("--self-steps", type=within(float, 0, 1), default=0.4, help="p2p, null-text: likewise of self-attention (default: %(default)s)")
    flag("--blend", nargs=2, metavar=("SOURCE_WORD", "WORD"), help="p2p, null-text: leave the picture as it is except where "
         "these words of the two prompts are (default: off)")
    flag("--compile", action="store_true", help="torch.compile the UNet: slow to start, then faster (default: off)")
    args = p.parse_args(argv)
    if args.seed + args.num_images > 2 ** 63:
        p.error(f"--seed {args.seed} leaves no seeds for --num-images {args.num_images}: they end at {2 ** 63 - 1}")
    if args.grid and args.num_images > 1:
        p.error(f"--grid makes one picture of each scale, so --num-images must be 1, got {args.num_images}")
    for names, methods in OWN_FLAGS.items():
        for name in names:
            if getattr(args, name) != p.get_default(name) and args.method not in methods:
                p.error(f"--{name.replace('_', '-')} goes with --method {' or '.join(methods)}, got --method {args.method}")
    if args.method in ("p2p", "null-text"):
        if not (args.source_prompt or "").strip():
            p.error(f"--method {args.method} needs --source-prompt, what the picture shows")
        if args.num_images > 1:
            p.error(f"--method {args.method} draws no random numbers, so --num-images must be 1, got {args.num_images}")
    for name, scales in (("--cfg-text", args.cfg_text), ("--cfg-image", args.cfg_image)):
        if scales and len(scales) > 1 and not args.grid:
            p.error(f"{name} takes several scales only with --grid, got {len(scales)}")
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)            # as Ctrl-C: nothing half written is left
    sys.exit(run())
