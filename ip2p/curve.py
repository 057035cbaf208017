"""The paper's figure: how far a picture follows its edit against how much of it stays, by CLIP (InstructPix2Pix, Sec. 4).

Three methods over what each trades the one for the other by: the editor over image guidance, SDEdit over its strength,
Prompt-to-Prompt with DDIM inversion over the share of the steps with the source's attention. The last two are told what
the pictures show before and after the edit, the editor only the instruction.
"""
import math
import statistics
from pathlib import Path

import torch
from PIL import ImageOps
from tqdm import tqdm

from .clip_filter import ClipSimilarity
from .data import find_pairs, prompt_texts, read_json
from .images import open_image, to_images, to_pixels
from .inversion import invert, sdedit
from .pipeline import InstructPix2Pix
from .tables import decimal, print_table, write_rows
from .tensorfiles import replacing
from .world import KINDS, SIZE, World

METHODS = {"ip2p": ("InstructPix2Pix", "image guidance"), "sdedit": ("SDEdit", "strength"),      # name and setting
           "p2p": ("Prompt-to-Prompt, DDIM inversion", "share of the steps"), "data": ("true edits", "")}


def evaluate_curve(args):
    """CLIP's direction similarity (does the picture change as its caption does?) against its image similarity (is it still
    the same picture?), each method at each of its settings. A row, and a point of the plot, is the mean over all edits."""
    plt = import_pyplot() if args.plot else None
    editor, base = (InstructPix2Pix.load(path, args.device, args.dtype) for path in (args.model, args.base))
    editor.check_edits()
    base.check_makes_pictures()
    judge, size = ClipSimilarity.load(args.clip, args.device), base.parts.image_size
    pictures, instructions, captions, edited = (data_edits if args.data else world_edits)(args, size)
    batches = [slice(i, i + args.batch_size) for i in range(0, len(captions), args.batch_size)]
    text, base_text = (model.own_settings["cfg_text"] if args.cfg_text is None else args.cfg_text
                       for model in (editor, base))
    print(f"{len(captions)} edits, text guidance {text:g} and {base_text:g}", flush=True)

    def ip2p(b, before, cfg_image):
        made = editor.edit(to_images(before), instructions[b], steps=args.steps, cfg_text=text, cfg_image=cfg_image,
                           seed=args.seed, size=size, progress=False)
        return torch.stack([to_pixels(p, size, size) for p in made])

    def by_sdedit(b, before, strength):
        made = [sdedit(base, image, caption, strength=strength, steps=args.steps, cfg_text=base_text, seed=args.seed,
                       progress=False) for image, caption in zip(to_images(before), edited[b])]
        return torch.stack([to_pixels(p, size, size) for p in made])

    inverted = {}                                                            # the noise of each batch, made once

    def p2p(b, before, share):
        if b.start not in inverted:
            z = base.encode(before) * base.vae.config.scale_factor
            inverted[b.start] = invert(base, z, captions[b], args.steps, progress=False)[-1]
        n = len(captions[b])
        return base.draw_pairs(captions[b], edited[b], [args.seed] * n, [share] * n, [base_text] * n, steps=args.steps,
                               sampler="ddim", control="cross-attention", x_T=inverted[b.start])[1]

    def point(method, value, draw):
        scores = []
        for b in batches:
            before = pictures(b, 0)
            scores += judge(before, draw(b, before, value), captions[b], edited[b])
        mean = lambda name: statistics.fmean(s[f"clip_sim_{name}"] for s in scores)
        return dict(method=method, value=value, sim_direction=mean("dir"), sim_image=mean("image"), sim_0=mean("0"),
                    sim_1=mean("1"), count=len(scores), steps=args.steps)

    runs = [("ip2p", ip2p, v) for v in args.cfg_image] + [("sdedit", by_sdedit, v) for v in args.strengths] \
        + [("p2p", p2p, v) for v in args.shares]
    rows = [point("data", None, lambda b, *_: pictures(b, 1))]
    for method, draw, value in tqdm(runs, desc="points", dynamic_ncols=True):
        rows.append(point(method, value, draw))
        write_rows(args.json, rows)
    print_table(["method", "setting", "direction", "image"],
                [[METHODS[row["method"]][0], setting_of(row), decimal(row["sim_direction"], 3), decimal(row["sim_image"], 3)]
                 for row in rows])
    if args.plot:
        plot(plt, rows, args.plot)


# ---- edits: (pictures, instructions, captions, edited captions); pictures(b, 0) are those before the edits of a slice b, and
#      pictures(b, 1) those after: pixels (B, 3, size, size) in [-1, 1], drawn or read when asked for, as all take much memory

def world_edits(args, size):
    """Held-out edits of the miniature world, all kinds in turn."""
    if size != SIZE:
        raise ValueError(f"{args.base} makes pictures of {size} pixels, the miniature world's have {SIZE}: give --data")
    world = World(args.device)
    edits = [world.edit(args.seed, i, "combinations", KINDS[i % len(KINDS)]) for i in range(args.count)]

    def pictures(b, k):
        return world.render([(e.source, e.target)[k] for e in edits[b]])

    return pictures, *([getattr(e, name) for e in edits] for name in ("instruction", "caption", "edited_caption"))


def data_edits(args, size):
    """The first pair of each of the last prompts of a data set, of the tenth that training holds back, cropped square."""
    pairs = find_pairs(args.data)
    pairs = [pairs[i][0] for i in range(max(math.floor(0.9 * len(pairs)), len(pairs) - args.count), len(pairs))]
    texts = []
    for *_, prompt in pairs:
        if not isinstance(prompt, Path):
            raise ValueError(f"{args.data}: a data set without captions; needed folders with a prompt.json each")
        texts.append(prompt_texts(read_json(prompt), prompt))
    captions, instructions, edited = map(list, zip(*texts))

    def pictures(b, k):
        return torch.stack([to_pixels(ImageOps.fit(open_image(pair[k]), (size, size)), size, size) for pair in pairs[b]])

    return pictures, instructions, captions, edited


# ---- the figure

def setting_of(row):
    return "" if row["value"] is None else f"{row['value']:g}"


def import_pyplot():
    """matplotlib's pyplot, drawing to files. ValueError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot takes matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def plot(plt, rows, path):
    """A line for each method, its first and last setting beside their points."""
    figure, axes = plt.subplots(figsize=(7, 5), dpi=120)
    for method, (name, setting) in METHODS.items():
        points = [row for row in rows if row["method"] == method]
        x, y = ([row[key] for row in points] for key in ("sim_image", "sim_direction"))
        axes.plot(x, y, marker="o" if setting else "*", label=f"{name} ({setting})" if setting else name)
        labelled = [*zip(points, x, y)]
        for row, *place in labelled[:1] + labelled[1:][-1:]:
            axes.annotate(setting_of(row), place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="CLIP image similarity: still the same picture", ylabel="CLIP direction similarity: changed as asked")
    axes.grid(alpha=.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)
