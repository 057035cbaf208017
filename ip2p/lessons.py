"""What editors learn from, and are looked at and scored with: pairs of the toy world, or of a data set."""
import torch

from . import distributed
from .checkpoint import save_checkpoint
from .data import PairedDataset
from .features import CachedPairs, LivePairs
from .images import contact_sheet, save_image, to_images, to_pixels
from .stages import latent_moments, to_device
from .tensorfiles import small_dtype
from .text import Tokenizer
from .truth import FIXED, is_fixed, psnr, through
from .world import KINDS

# How many of 27 lessons are of each kind: drawing things anew is harder to learn than changing the light.
SHARES = dict(object=4, time=1, weather=1, season=1, place=3, color=3, add=3, remove=4, size=5, style=2)
LESSONS = tuple(kind for kind, share in SHARES.items() for _ in range(share))


def encoders(args, vae, text, world):
    """Three functions: from pictures to image latents and targets, from texts to contexts, and from the numbers of the toy
    world's edits to image latents, targets and instructions."""
    tokenizer = Tokenizer(text.config)

    def encode_pairs(before, after):
        with args.autocast():
            latents = latent_moments(vae, to_device(torch.cat([before, after]), args.device))
        return latents[:len(before), 0], latents[len(before):]

    def encode_text(texts):
        return text(to_device(tokenizer(texts), args.device))

    def world_pairs(start, count, split="train"):
        before, after, edits = world.pairs(args.seed + 3, start, count, split, LESSONS if split == "train" else None)
        return *encode_pairs(before, after), [e.instruction for e in edits]

    return encode_pairs, encode_text, world_pairs


def open_data(args):
    """The training pairs of a data set, and those held out for sheets and scores: the validation split's."""
    largest = args.max_resize or args.size
    data = PairedDataset(args.data, min_resize_res=args.size, max_resize_res=largest, crop_res=args.size, seed=args.seed)
    held_out = data.split("val", flip_prob=0)
    if not len(data):
        raise ValueError(f"{args.data}: a tenth of the prompts is held back, and of {len(data.pairs)} that leaves none")
    data.whole_example(0, 0)                                             # complains here rather than in a worker
    try:
        held_out.whole_example(0, 0)
    except ValueError:
        few = "too few prompts to hold some back" if not len(held_out) else "no validation pairs that can be read"
        held_out = data.split("train", flip_prob=0)
        distributed.say(f"{args.data} has {few}: sheets and scores are of training pairs")
    return data, held_out


def open_pairs(args, data, encode_pairs, encode_text, weights):
    """What a step learns from, cached or not."""
    if not args.views:
        return LivePairs(data, encode_pairs, steps=args.steps, batch_size=args.batch_size, workers=args.workers,
                         parts=distributed.own_rows(args.batch_size, args.accumulate),
                         skipped=args.out / args.stage / "skipped.txt")
    def open_cache():
        with torch.no_grad():
            return CachedPairs(data, args.cache, args.views, encode_pairs, None if args.train_text else encode_text,
                               batch_size=args.batch_size, weights=weights[:1] if args.train_text else weights,
                               told=dict(dtype=args.dtype), workers=args.workers)
    pairs = open_cache() if distributed.rank() == 0 else None                # the first fills it, the others find it full
    distributed.wait_for_all()
    pairs = pairs or open_cache()
    distributed.say(f"{pairs.folder}: {args.views} views of each of {len(data)} prompts, encoded once")
    return pairs


def data_batches(data, encode_pairs, count, size):
    for start in range(0, count, size):
        before, after, instructions = zip(*(data.whole_example(0, i)[0] for i in range(start, min(start + size, count))))
        yield *encode_pairs(torch.stack(before), torch.stack(after)), list(instructions)


def save_sheet(path, editor, world, held_out, args, count, per_kind):
    """Edits of held-out pictures: `count` of the data set `held_out`, or `per_kind` of each kind of the toy world's where that
    is None."""
    cells = data_cells(editor, held_out, count, args) if held_out else world_cells(editor, world, per_kind, args)
    save_image(contact_sheet(cells, columns=9 if held_out else 2 * per_kind), path)


def world_cells(editor, world, per_kind, args):
    """Held-out scenes of each kind of edit: a picture with its caption, then the edit with its instruction."""
    cells = []
    for kind in KINDS:
        before, _, edits = world.pairs(args.seed, 0, per_kind, "combinations", kind)
        pictures = to_images(before)
        edited = editor.edit(pictures, [e.instruction for e in edits], cfg_text=args.cfg_text, cfg_image=args.cfg_image,
                             progress=False)
        for a, b, e in zip(pictures, edited, edits):
            cells += [(a, e.caption), (b, e.instruction)]
    return cells


def data_cells(editor, data, count, args):
    """The first pairs of a data set: a picture, the edit with its instruction, and what the data set has for it."""
    cells = []
    for i in range(min(count, len(data))):
        (before, after, instruction), _ = data.whole_example(0, i)
        before, after = to_images(torch.stack([before, after]))
        edited, = editor.edit(before, instruction, cfg_text=args.cfg_text, cfg_image=args.cfg_image, size=args.size,
                              progress=False)
        cells += [(before, ""), (edited, instruction), (after, "(the data set's)")]
    return cells


def score_edits(editor, world, args):
    """PSNR in dB against the true edited picture, where the instruction fixes it, on held-out scenes: of the edit, of the
    unedited picture, and of the true picture after the autoencoder, which is the most an edit can reach."""
    scores = {"edit": [], "unedited": [], "autoencoder": []}
    for kind in FIXED:
        before, after, edits = world.pairs(args.seed, 100, -(-args.score_examples // 32), "combinations", kind)
        fixed = [i for i, edit in enumerate(edits) if is_fixed(edit)]
        if not fixed:
            continue
        before, after, edits = before[fixed], after[fixed], [edits[i] for i in fixed]
        edited = editor.edit(to_images(before), [e.instruction for e in edits], cfg_text=args.cfg_text,
                             cfg_image=args.cfg_image, progress=False)
        edited = torch.stack([to_pixels(p, 128, 128) for p in edited]).to(after)
        for name, x in (("edit", edited), ("unedited", before), ("autoencoder", through(editor.vae, after))):
            scores[name].append(psnr(x, after))
    return {"psnr": {name: round(float(torch.cat(values).mean()), 2) for name, values in scores.items()}}


def save_editor(editor, name, record, args, world, held_out, small, start, shared):
    """Draw a trained editor's last sheet, score it if it is the miniature's (`small`), write it as OUT/name.safetensors, the
    miniature's as mini-name, and say what to do with it. Returns its record.

    start: the file it was made from; if the miniature's lies in OUT too, the parts `shared`, {part: file}, are stored once.
    """
    save_sheet(args.out / args.stage / "sheet-final.png", editor, world, held_out, args, count=24,
               per_kind=min(6, args.score_examples))
    if small:
        record |= score_edits(editor, world, args)
    path = args.out / f"{'mini-' * small}{name}.safetensors"
    beside = small and start.resolve().parent == args.out.resolve()
    save_checkpoint(editor.parts, path, metadata=record, dtype=small_dtype if small else None, shared=shared if beside else None)
    distributed.say(f"wrote {path}; to edit with it: python sample.py --model {path} --image PICTURE --prompt INSTRUCTION")
    return record
