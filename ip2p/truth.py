"""Edits and pictures held against the miniature world's own truth: was done what was asked, and is all else as it was?

The scorer (`scorer.py`) reads the edited picture; what it should read is the true target scene. *Asked* is what differs
between source and target, *kept* what does not. An edit is right if all that was asked for is there and all else is kept.
"""
import os
import re
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Callable

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .images import contact_sheet, save_image, to_images, to_pixels
from .pipeline import InstructPix2Pix
from .scorer import Reading, load_scorer, near, read_scene, same_color
from .tables import decimal, percent, print_table, write_rows
from .world import COLORLESS, KINDS, SIZE, Edit, World
from .world_reader import read

HELD_OUT = ("combinations", "phrasings")
FIXED = ("time", "weather", "season", "color", "remove", "size", "style")        # kinds whose truth an instruction may fix
ATTRIBUTES = ("things", "color", "size", "position", "place", "condition", "style")
SHOWN = 2                                                               # edits of each kind on a sheet


def psnr(x, y, where=None):
    """Peak signal-to-noise ratio in dB, (B,), of pixels (B, 3, H, W) in [-1, 1]; where: (B, 1, H, W) bool, of these only."""
    where = torch.ones_like(x[:, :1]) if where is None else where.float()
    mse = ((x - y).square().mean(1, keepdim=True) * where).flatten(1).sum(1) / where.flatten(1).sum(1)
    return 10 * (4 / mse).log10()


def unchanged(before: Tensor, after: Tensor) -> Tensor:
    """Where a true edit leaves the picture (B, 3, H, W) as it was: (B, 1, H, W) bool."""
    return (before - after).abs().amax(1, keepdim=True) < 0.02


# ---- edits

def is_fixed(edit: Edit) -> bool:
    """Whether the picture and the instruction leave one true result: not so where rain or snow comes, as its streaks may fall
    anywhere, where what a style hid comes back, and in kinds that draw something anew."""
    falls = edit.kind == "weather" and edit.target.condition in ("rain", "snow")
    return edit.kind in FIXED and not falls and not (edit.kind == "style" and edit.source.style)


def judge_edit(world: World, edit: Edit, reading: Reading) -> tuple[dict[str, bool], dict[str, bool]]:
    """What was asked for and what was to be kept, by attribute, and whether the reading of the edited picture says so.

    things: those asked for have come or gone; those to be kept are there, and no others. What is gone was neither painted
    nor resized; nothing more is said of it. What cannot be known is not judged: colours and the condition, where source or
    target is in a style without colour; where a thing is to stand that was added; how large one is to be that takes the
    place of a tiny or huge one.
    """
    return _judge(world, edit.kind, read_scene(world, edit.source), read_scene(world, edit.target), reading)


def judge_pair(world: World, edit: Edit, before: Reading, after: Reading) -> tuple[dict[str, bool], dict[str, bool]]:
    """As `judge_edit`, of two pictures drawn from an edit's captions: to be kept is what the first one is read to show, and
    a thing that grows or takes another's place is to stand as far from where it was as in the edit's own scenes."""
    source, target = read_scene(world, edit.source), read_scene(world, edit.target)
    gone = source.things.keys() - target.things.keys()
    things = {noun: seen for noun, seen in before.things.items() if noun not in source.things}
    for noun, new in target.things.items():
        was = noun if noun in source.things else next(iter(gone), None)          # what it was, or what stood in its place
        if was in before.things:
            seen, old = before.things[was], source.things[was]
            same = {name: getattr(seen, name) for name in ("color", "size")
                    if noun == was and getattr(old, name) == getattr(new, name)}
            things[noun] = replace(new, x=seen.x + new.x - old.x, y=seen.y + new.y - old.y, **same)
        elif noun not in source.things:
            things[noun] = new
    changed = {name: getattr(target, name) for name in ("place", "condition", "style")
               if getattr(source, name) != getattr(target, name)}
    wanted = replace(before, things=things, **changed)
    return _judge(world, edit.kind, before, wanted, after)


def _judge(world, kind, old, new, reading):
    asked, kept = {}, {}

    def note(attribute, changed, right):
        group = asked if changed else kept
        group[attribute] = group.get(attribute, True) and right

    colorless = old.style in COLORLESS or new.style in COLORLESS
    for name in ("place", "style") if colorless else ("place", "condition", "style"):
        note(name, getattr(old, name) != getattr(new, name), getattr(reading, name) == getattr(new, name))
    for noun in old.things.keys() | new.things.keys():
        note("things", (noun in old.things) != (noun in new.things), (noun in reading.things) == (noun in new.things))
    note("things", False, reading.things.keys() <= old.things.keys() | new.things.keys())

    resized = kind == "object" and any(t.size for noun, t in old.things.items() if noun not in new.things)
    for noun, true in new.things.items():
        seen, was = reading.things.get(noun), old.things.get(noun)
        if not seen:
            for name in ("color", "size"):
                if was and getattr(was, name) != getattr(true, name):
                    note(name, True, False)
            continue
        if not colorless:
            note("color", not was or was.color != true.color, same_color(world, noun, seen.color, true.color))
        if was or not resized:
            note("size", not was or was.size != true.size, seen.size == true.size)
        if was or kind != "add":
            note("position", False, near(seen, true) or bool(was) and near(seen, was))      # growing may move its middle
    return asked, kept


@dataclass
class Verdict:
    """An edited picture and what there is to say of it."""
    split: str
    edit: Edit
    picture: Image.Image
    reading: Reading
    asked: dict                 # attribute -> right
    kept: dict
    distance: dict              # psnr, and where the truth is fixed inside and outside of what truly changes; dB

    @property
    def success(self):
        return all(self.asked.values())

    @property
    def preserved(self):
        return all(self.kept.values())

    @property
    def right(self):
        return self.success and self.preserved


def judge_edits(world: World, scorer, make: Callable, count: int, batch_size=16, seed=0, name="") -> list[Verdict]:
    """Verdicts on `count` held-out edits of each split, the same number of each kind (rounded up).

    make(before, after, edits, seeds) -> the edited pictures, (B, 3, 128, 128) in [-1, 1] as before and after are. It is
    given the true result so that the truth itself can be judged. seeds: of each picture's noise.
    """
    verdicts, each = [], -(-count // len(KINDS))
    batches = [(split, kind, range(i, min(i + batch_size, each))) for split in HELD_OUT for kind in KINDS
               for i in range(0, each, batch_size)]
    with tqdm(total=each * len(KINDS) * len(HELD_OUT), desc=name, unit="edit", dynamic_ncols=True) as bar:
        for split, kind, numbers in batches:
            before, after, edits = world.pairs(seed, numbers.start, len(numbers), split, kind)
            edited = make(before, after, edits, [seed + i for i in numbers]).to(after)
            whole, same = psnr(edited, after), unchanged(before, after)
            parts = dict(inside=psnr(edited, after, ~same), outside=psnr(edited, after, same))
            readings, large = scorer.read(edited), same.flatten(1).float().mean(1) > 0.2       # something stays
            for i, (edit, picture) in enumerate(zip(edits, to_images(edited))):
                distance = {"psnr": whole[i].item()}
                if is_fixed(edit):
                    distance |= {k: v[i].item() for k, v in parts.items() if k == "inside" or large[i]}
                verdicts.append(Verdict(split, edit, picture, readings[i], *judge_edit(world, edit, readings[i]), distance))
            bar.update(len(edits))
    return verdicts


def summarize(verdicts: list[Verdict]) -> dict:
    """Shares of edits that are right, successful and preserving, preservation by attribute among those in which it was
    judged, and mean distances in dB: of those whose truth is fixed (a perfect picture counts as 100 dB)."""
    mean = lambda values: sum(values) / len(values) if values else None
    distances = lambda name: [min(v.distance[name], 100.) for v in verdicts if name in v.distance and is_fixed(v.edit)]
    return dict(count=len(verdicts), right=mean([v.right for v in verdicts]), success=mean([v.success for v in verdicts]),
                preserved=mean([v.preserved for v in verdicts]),
                kept={name: mean([v.kept[name] for v in verdicts if name in v.kept]) for name in ATTRIBUTES},
                **{name: mean(distances(name)) for name in ("psnr", "inside", "outside")})


def evaluate_edits(args):
    """For each model and number of steps: the share of held-out edits that are right, by split, kind and attribute, and the
    distance to the truth; beside the true edits, these through the autoencoder, and the unedited pictures."""
    world, scorer = World(args.device), load_scorer(args.scorer, args.device)
    models = {os.path.relpath(path): InstructPix2Pix.load(path, args.device, args.dtype) for path in args.model}
    for model in models.values():
        model.check_edits()
    vae = next(iter(models.values())).vae
    makers = {"true edit": lambda before, after, *_: after,
              "true edit, autoencoder": lambda before, after, *_: through(vae, after),
              "unedited": lambda before, *_: before}
    settings = {}
    for path, model in models.items():
        own = model.own_settings
        scales = dict(cfg_text=own["cfg_text"] if args.cfg_text is None else args.cfg_text,
                      cfg_image=own["cfg_image"] if args.cfg_image is None else args.cfg_image)
        for steps in args.steps or [own["sample_steps"]]:
            name = f"{path}, {steps} steps"
            settings[name] = dict(steps=steps, **scales)
            makers[name] = partial(edit_pixels, model, settings[name])
            print(name, settings[name], flush=True)

    rows = []
    for name, make in makers.items():
        verdicts = judge_edits(world, scorer, make, args.count // 2, args.batch_size, args.seed, name)
        for split, kind in product((*HELD_OUT, "both"), (*KINDS, "all")):
            some = [v for v in verdicts if split in (v.split, "both") and kind in (v.edit.kind, "all")]
            rows.append(dict(edited_by=name, split=split, kind=kind, **summarize(some), **settings.get(name, {})))
        write_rows(args.json, rows)
        if args.sheet:
            write_sheets(args.sheet, name, verdicts, world)

    found = {(row["edited_by"], row["split"], row["kind"]): row for row in rows}
    find = lambda name, split="both", kind="all": found[name, split, kind]
    print(f"\n{find('unedited')['count']} edits. Right: all that was asked for, and all else kept. "
          f"PSNR in dB, of {', '.join(FIXED)}, where there is one true result.")
    print_table(["edited by", "right", *HELD_OUT, "asked", "kept", "PSNR", "changed part", "unchanged part"], [
        [name, percent((row := find(name))["right"]), *(percent(find(name, split)["right"]) for split in HELD_OUT),
         percent(row["success"]), percent(row["preserved"]), *(decimal(row[k]) for k in ("psnr", "inside", "outside"))]
        for name in makers])
    for what, title in (("right", "right"), ("success", "asked"), ("preserved", "kept")):
        print_table([title, *KINDS], [[name, *(percent(find(name, kind=kind)[what]) for kind in KINDS)] for name in makers])
    for what, title in (("inside", "changed part, dB"), ("outside", "unchanged part, dB")):
        print_table([title, *FIXED], [[name, *(decimal(find(name, kind=kind)[what]) for kind in FIXED)] for name in makers])
    print_table(["kept", *ATTRIBUTES], [[name, *(percent(find(name)["kept"][a]) for a in ATTRIBUTES)] for name in makers])


@torch.no_grad()
def through(vae, pixels):
    """Pictures (B, 3, H, W) in [-1, 1] as an autoencoder gives them back."""
    weight = next(vae.parameters())
    return torch.cat([vae.decode(vae.encode(x.to(weight)).mode()).to(pixels).clamp(-1, 1) for x in pixels.split(16)])


def noise(model, seeds):
    """What a sampler starts from for each seed, (B, z, h, w) for 128 x 128 pictures."""
    shape = model.latent_shape(1, SIZE)[1:]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def edit_pixels(model, settings, before, after, edits, seeds):
    pictures = model.edit(to_images(before), [e.instruction for e in edits], x_T=noise(model, seeds), size=SIZE,
                          progress=False, **settings)
    return torch.stack([to_pixels(p, SIZE, SIZE) for p in pictures])


def write_sheets(folder, name, verdicts, world):
    """Two sheets, a row for each kind: the first edits, and the worst: not right, and furthest from the true picture."""
    for which, rank in (("first", lambda v: 0), ("worst", lambda v: (v.right, v.distance["psnr"]))):
        cells = []
        for kind in KINDS:
            for v in sorted((v for v in verdicts if v.edit.kind == kind), key=rank)[:SHOWN]:
                before, after = to_images(world.render([v.edit.source, v.edit.target]))
                faults = [f"{word} {attribute}" for word, group in (("not", v.asked), ("lost", v.kept))
                          for attribute, right in group.items() if not right]
                verdict = f"{', '.join(faults) or 'right'}; seen: {describe(v.reading)}"
                cells += [(before, f"{kind}: {v.edit.instruction}"), (v.picture, verdict), (after, "the true edit")]
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        save_image(contact_sheet(cells, columns=3 * SHOWN, lines=4), folder / f"{stem}-{which}.png")


def describe(reading: Reading) -> str:
    things = [" ".join(filter(None, (seen.size, seen.color, noun))) for noun, seen in reading.things.items()]
    return ", ".join(filter(None, (" and ".join(things) or "nothing", reading.place, reading.condition, reading.style)))


# ---- pictures from text

def judge_picture(world: World, scene, caption: str, reading: Reading) -> dict[str, list[bool]]:
    """By attribute, whether a picture shows what its caption says, once for each thing where it is said of things.

    object: a thing named is there. things: all those named, and no others. What the caption leaves out is not judged (a
    thing without a named colour has its own, unless it was painted), nor colours and the condition in styles without colour.
    """
    true, told = read_scene(world, scene), read(caption)
    colorless = true.style in COLORLESS
    found = dict(object=[noun in reading.things for noun in true.things],
                 things=[reading.things.keys() == true.things.keys()], place=[reading.place == true.place],
                 style=[reading.style == true.style], color=[], size=[])
    if told.condition and not colorless:
        found["condition"] = [reading.condition == true.condition]
    for thing in told.things:
        seen = reading.things.get(thing.noun)
        if seen and not colorless and thing.color == true.things[thing.noun].color:
            found["color"].append(same_color(world, thing.noun, seen.color, thing.color))
        if seen:
            found["size"].append(seen.size == thing.size)
    return found


def evaluate_pictures(args):
    """How often pictures made from held-out captions show what these say, by attribute, beside the pictures that the
    captions were written for."""
    world, scorer = World(args.device), load_scorer(args.scorer, args.device)
    model = InstructPix2Pix.load(args.model, args.device, args.dtype)
    cfg_text = model.own_settings["cfg_text"] if args.cfg_text is None else args.cfg_text
    print(f"{args.model}, cfg_text={cfg_text:g}", flush=True)

    def drawn(scenes, captions, seeds, steps):
        pictures = model.generate(captions, steps=steps, cfg_text=cfg_text, x_T=noise(model, seeds), size=SIZE,
                                  progress=False)
        return torch.stack([to_pixels(p, SIZE, SIZE) for p in pictures])

    makers = {"true picture": lambda scenes, *_: world.render(scenes),
              "true picture, autoencoder": lambda scenes, *_: through(model.vae, world.render(scenes))}
    makers |= {f"drawn, {steps} steps": partial(drawn, steps=steps) for steps in args.steps or [20]}
    names, rows = ("object", *ATTRIBUTES), []
    for name, make in makers.items():
        for split in tqdm(HELD_OUT, desc=name):
            found = {}
            for start in range(0, args.count // 2, args.batch_size):
                numbers = range(start, min(start + args.batch_size, args.count // 2))
                scenes, captions = zip(*(world.caption(args.seed, i, split) for i in numbers))
                pixels = make(scenes, list(captions), [args.seed + i for i in numbers])
                for scene, caption, reading in zip(scenes, captions, scorer.read(pixels)):
                    for key, values in judge_picture(world, scene, caption, reading).items():
                        found.setdefault(key, []).extend(values)
            rows.append(dict(picture=name, split=split, **{k: sum(found[k]) / len(found[k]) for k in names if found.get(k)}))
        write_rows(args.json, rows)
    shown = [name for name in names if any(name in row for row in rows)]
    print_table(["picture", "captions", *shown],
                [[row["picture"], row["split"], *(percent(row.get(k)) for k in shown)] for row in rows])
