"""A miniature world: captioned 128 x 128 scenes, and edits of them with the true result, endless and deterministic.

It stands in for LAION, and for what nobody has: the right answer to an editing instruction. A scene is plain data
(`Scene`), drawn from a random stream of its own that (split, seed, index) names, and rendered in batches on the
device: backdrop crop, contact shadow, lit sprite, foam at a waterline, weather, style. The words are in
`world_words.py`, the filters in `world_art.py`.

    python -m ip2p.world OUT_DIR                # contact sheets of scenes and of every kind of edit
"""
import json
import random
import sys
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F

from . import world_words as words
from .command_line import Parser, exit_status, make_writable
from .distributed import usable_device
from .images import contact_sheet, save_image, to_images
from .world_art import FILTERS, recolor, smooth, tiles

SIZE = 128
KINDS = ("object", "time", "weather", "season", "place", "color", "add", "remove", "size", "style")
SPLITS = ("train", "combinations", "phrasings")
SIZES = {"": 1., "tiny": .55, "huge": 1.5}
CONDITIONS = {"time": ("day", "sunset", "dawn", "night"), "weather": ("day", "rain", "snow", "fog"),
              "season": ("day", "autumn", "winter")}
COLORLESS = ("pencil sketch", "black and white photo")      # styles in which a thing is given no colour
ASSETS = Path(__file__).parent / "assets" / "world"


@dataclass(frozen=True)
class Thing:
    noun: str
    mode: str                   # stand, fly, float or swim
    x: float                    # centre, as a fraction of the picture
    y: float                    # foot or waterline
    height: float               # before the size word
    flip: bool = False
    color: str = ""             # "": its own colours
    size: str = ""              # a key of SIZES


@dataclass(frozen=True)
class Scene:
    place: str
    condition: str
    variant: int                # the same layout in every condition of the place
    crop: int                   # left edge in the backdrop, pixels
    flip: bool
    things: tuple               # of Thing, as a caption names them
    tile: tuple                 # which rain or snow, and its corner
    style: str = ""
    backdrop_color: str = ""    # of a studio


@dataclass(frozen=True)
class Edit:
    kind: str
    instruction: str
    caption: str
    edited_caption: str
    source: Scene
    target: Scene


class World:
    """Scenes, captions and edits by (seed, index), and their pictures.

    subset: "core" (48 nouns, 10 places) or "all" (173 nouns, 18 places). A tenth of the combinations of noun, place
    and colour is held out: absent from the splits "train" and "phrasings", present in every example (an edit's target)
    of "combinations". The split "phrasings" uses only templates of captions and instructions that the others never do.
    """

    def __init__(self, device="cpu", subset="core"):
        if subset not in ("core", "all"):
            raise ValueError(f"subset must be 'core' or 'all', got {subset!r}")
        self.device = torch.device(device)
        self.index = json.loads((ASSETS / "backdrops.json").read_text())
        self.art = json.loads((ASSETS / "sprites.json").read_text())
        self.colors, self.backdrops = self.art["colors"], self.index["backdrops"]
        self.sprites = {sprite["noun"]: sprite for sprite in self.art["sprites"]}
        self.number = {noun: i for i, noun in enumerate(self.sprites)}
        self.at = {}                                                    # (place, condition) -> backdrops by variant
        for i, back in enumerate(self.backdrops):
            self.at.setdefault((back["place"], back["condition"]), []).append(i)
        chosen = lambda item: item["core"] or subset == "all"
        self.places = {name: place["conditions"] for name, place in self.index["places"].items() if chosen(place)}
        self.homes = {noun: [place for place in sprite["places"] if place in self.places]
                      for noun, sprite in self.sprites.items() if chosen(sprite)}
        self.nouns = list(self.homes)
        self.natives = {place: [noun for noun in self.nouns if place in self.homes[noun]] for place in self.places}
        self.held_out = {(noun, place, color) for noun in self.nouns for place in self.homes[noun]
                         for color in ("", *self.colors) if is_held_out(noun, place, color)}

    # Examples

    def scene(self, seed, index, split="train"):
        """The scene of an example."""
        return self.caption(seed, index, split)[0]

    def caption(self, seed, index, split="train"):
        """(Scene, caption) of an example."""
        rng = stream("scene", split, seed, index)
        while True:
            scene = self._draft(rng)
            if scene and self._admits(split, scene):
                return scene, words.caption(scene, words.phrasing(rng, split == "phrasings"))

    def edit(self, seed, index, split="train", kind=None):
        """The `Edit` of an example; kind: one of KINDS, a tuple of them to draw it from, or None to draw it from all."""
        among = (kind,) if isinstance(kind, str) else kind or KINDS
        if not set(among) <= set(KINDS):
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        rng = stream(kind if isinstance(kind, str) else "edit", split, seed, index)
        kind, held_out = among[0] if isinstance(kind, str) else rng.choice(among), split == "phrasings"
        while True:
            source, target, which = self._revise(rng, kind)
            if source and target and self._admits(split, target, source):
                mention = "color" if kind == "color" else "when" if kind in CONDITIONS else ""
                phrasing = words.phrasing(rng, held_out, mention)
                return Edit(kind, words.instruction(rng, kind, source, target, which, held_out),
                            words.caption(source, phrasing), words.caption(target, phrasing), source, target)

    def pictures(self, seed, start, count, split="train"):
        """Examples start .. start + count - 1: pixels (B, 3, 128, 128) in [-1, 1], and a list of captions."""
        scenes, captions = zip(*(self.caption(seed, i, split) for i in range(start, start + count)))
        return self.render(scenes), list(captions)

    def pairs(self, seed, start, count, split="train", kind=None):
        """Edits start .. start + count - 1: source and target pixels (B, 3, 128, 128) in [-1, 1], a list of `Edit`."""
        edits = [self.edit(seed, i, split, kind) for i in range(start, start + count)]
        return self.render([e.source for e in edits]), self.render([e.target for e in edits]), edits

    # Drawing lots

    def _draft(self, rng, count=None, conditions=None, plain=False):
        """A random scene, or None where the dice do not fit; conditions: two of them must be possible in its place."""
        if rng.random() < .6:                                           # nouns evenly, or places evenly
            noun = rng.choice(self.nouns)
            place = rng.choice(self.homes[noun])
        else:
            place = rng.choice(list(self.places))
            noun = rng.choice(self.natives[place])
        options = [c for c in self.places[place] if not conditions or c in conditions]
        if conditions and len(options) < 2:
            return None
        condition = rng.choice(options) if rng.random() < .75 or "day" not in options else "day"
        count = count or (2 if rng.random() < .3 else 1)
        nouns = [noun, rng.choice(self.natives[place])][:count]
        variant = rng.randrange(len(self.at[place, condition]))
        back = self.backdrops[self.at[place, condition][variant]]
        styled = rng.random() < .1 and not plain and not back["overlay"]    # streaks of rain would drown the strokes
        style = rng.choice(list(words.STYLES)) if styled else ""
        things = self._arrange(rng, [self._thing(rng, noun, back, count, style) for noun in nouns])
        return Scene(place, condition, variant, rng.randint(*back["crop_x"]), rng.random() < .5, tuple(things),
                     (rng.randrange(8), rng.randrange(33), rng.randrange(33)), style, back.get("color", ""))

    def _thing(self, rng, noun, back, count, style="", y=None):
        """One of `count` things on a backdrop, at y or somewhere in its range there; x is still to be arranged."""
        sprite, mode = self.sprites[noun], self.sprites[noun]["places"][back["place"]]
        y = rng.uniform(*back["base"][mode]) if y is None else y
        height = sprite["height"] * nearness(back, mode, y) * rng.uniform(.92, 1.12) * (.85 if count == 2 else 1.)
        painted = sprite["recolor"] and style not in COLORLESS and rng.random() < .25
        color = rng.choice(list(self.colors)) if painted else ""
        size = rng.choice(("tiny", "huge")) if rng.random() < .1 else ""
        return Thing(noun, mode, .5, y, height, sprite["flip"] and rng.random() < .5, color, size)

    def _arrange(self, rng, things):
        """Give one thing a place near the middle, or sometimes beside it, and two a half each."""
        if len(things) == 1:
            x = rng.uniform(.36, .64) if rng.random() < .7 else rng.uniform(.2, .8)
            return [replace(things[0], x=x)]
        widths = [self.box(thing)[2] for thing in things]
        slack = max(.98 - sum(widths), 0.)
        left = .01 + slack * rng.uniform(.15, .4)
        right = left + widths[0] + slack * rng.uniform(.2, .45)
        things = [replace(things[0], x=left + widths[0] / 2), replace(things[1], x=right + widths[1] / 2)]
        return things if rng.random() < .5 else [things[1], things[0]]

    def box(self, thing):
        """(x, y, w, h) as drawn, in fractions of the picture: centre, lower edge (or waterline), width, height."""
        sprite = self.sprites[thing.noun]
        h = thing.height * SIZES[thing.size]
        w = h * sprite["w"] / sprite["h"]
        return min(max(thing.x, w / 2 + .01), .99 - w / 2), max(thing.y, h + .02), w, h

    def _admits(self, split, *scenes):
        """Whether scenes look right and belong to the split; for "combinations" the first must hold a held-out one."""
        for scene in scenes:
            boxes = [self.box(thing) for thing in scene.things]
            if any(w > .94 or not .11 < h < .9 or y > .98 for _, y, w, h in boxes):
                return False
            if any(thing.color and thing.color == scene.backdrop_color for thing in scene.things):
                return False
            if len(boxes) == 2:
                (a, _, w, _), (b, _, v, _) = boxes
                if scene.things[0].noun == scene.things[1].noun or abs(a - b) < (w + v) / 2 - .04:
                    return False
        held = [self.holds_out(scene) for scene in scenes]
        return held[0] if split == "combinations" else not any(held)

    def holds_out(self, scene):
        """Whether a scene has a combination of thing, place and colour that is kept from training."""
        return any((thing.noun, scene.place, thing.color) in self.held_out for thing in scene.things)

    def _revise(self, rng, kind):
        """A scene, the scene edited (either may be None: the dice do not fit), and the index of the thing concerned."""
        count = {"add": 2, "remove": 2}.get(kind)
        source = self._draft(rng, count, CONDITIONS.get(kind), plain=kind in (*CONDITIONS, "color", "style"))
        if source is None or kind == "style" and self._back(source)["overlay"]:
            return None, None, 0
        which, target = rng.randrange(len(source.things)), None
        thing, sprite = source.things[which], self.sprites[source.things[which].noun]
        swap = lambda new: replace(source, things=tuple(new if i == which else t for i, t in enumerate(source.things)))
        if kind == "object":
            noun = rng.choice(self.natives[source.place])
            new = self._thing(rng, noun, self._back(source), len(source.things), source.style, thing.y)
            if noun != thing.noun and new.mode == thing.mode:
                target = swap(replace(new, x=thing.x, size=""))
        elif kind in CONDITIONS:
            others = [c for c in self.places[source.place] if c in CONDITIONS[kind] and c != source.condition]
            target = replace(source, condition=rng.choice(others))
        elif kind == "place":
            target = self._move(rng, source)
        elif kind == "color":
            color = "" if rng.random() < .1 else rng.choice(list(self.colors))
            visible = thing.color and color or not self.alike(sprite, thing.color or color)
            if sprite["recolor"] and color != thing.color and visible:
                target = swap(replace(thing, color=color))
        elif kind == "add":
            which, source, target = 1, replace(source, things=source.things[:1]), source
        elif kind == "remove":
            target = replace(source, things=(source.things[1 - which],))
        elif kind == "size":
            target = swap(replace(thing, size=rng.choice([size for size in SIZES if size != thing.size])))
        elif kind == "style":
            target = replace(source, style=rng.choice(list(words.STYLES)))
            if rng.random() < .25:
                source, target = target, source
        return source, target, which

    def _move(self, rng, source):
        """The scene's things in another place under the same condition, or None where there is none."""
        places = [place for place, conditions in self.places.items()
                  if place != source.place and source.condition in conditions
                  and all(place in self.homes[thing.noun] for thing in source.things)]
        if not places:
            return None
        place = rng.choice(places)
        variant = rng.randrange(len(self.at[place, source.condition]))
        back = self.backdrops[self.at[place, source.condition][variant]]
        things = [self._put(thing, self._back(source), back) for thing in source.things]
        return replace(source, place=place, variant=variant, crop=rng.randint(*back["crop_x"]), things=tuple(things),
                       backdrop_color=back.get("color", ""))

    def _put(self, thing, old, new):
        """A thing of one backdrop on another: where it was, or the nearest that it can be there, and as large for that."""
        mode = self.sprites[thing.noun]["places"][new["place"]]
        low, high = new["base"][mode]
        y = min(max(thing.y, low), high)
        return replace(thing, mode=mode, y=y, height=thing.height * nearness(new, mode, y) / nearness(old, thing.mode, thing.y))

    def alike(self, sprite, color):
        """Whether a colour is close to the sprite's own, so that painting it would change little."""
        if not color or sprite["hue"] is None:
            return color in ("", "white")
        hue, saturation, _ = self.colors[color]
        return saturation > .3 and abs((hue - sprite["hue"] + .5) % 1 - .5) < .06

    def _back(self, scene):
        return self.backdrops[self.at[scene.place, scene.condition][scene.variant]]

    # Pictures

    @cached_property
    def _atlas(self):
        """Backdrops (N, 3, 128, 176) uint8; sprites, sharp and soft (N, 2, 4, 104, 104); overlays (2, 8, 4, 160, 160)."""
        margin, tile, cell = self.index["margin"], self.index["overlay"]["tile"], self.art["cell"]
        h, w = self.index["height"] + 2 * margin, self.index["width"] + 2 * margin
        backs = tiles(ASSETS / self.index["image"], "RGB", h, w).flatten(0, 1)[:len(self.backdrops)]
        backs = backs[..., margin:-margin, margin:-margin].contiguous()
        cells = tiles(ASSETS / self.art["image"], "RGBA", cell, cell).flatten(0, 1)[:len(self.sprites)].float() / 255
        soft = F.avg_pool2d(F.avg_pool2d(cells, 2, 1, padding=1), 2, 1)         # [1 2 1] both ways, for drawing small
        over = tiles(ASSETS / self.index["overlay"]["image"], "RGBA", tile, tile).float() / 255
        return tuple(t.to(self.device) for t in (backs, torch.stack([cells, soft], 1), over))

    @cached_property
    def _light(self):
        """Per backdrop (N, 14): ambient, desaturate, haze, foam, shadow strength and shift."""
        rgba = lambda layer: (*layer["color"], layer["strength"]) if layer else (0.,) * 4
        shade = lambda layer: (layer["strength"], layer["dx"]) if layer else (0., 0.)
        return torch.tensor([(*b["ambient"], b["desaturate"], *rgba(b["haze"]), *rgba(b["foam"]), *shade(b["shadow"]))
                             for b in self.backdrops], device=self.device)

    @cached_property
    def _form(self):
        """Per sprite (N, 4): height in the atlas, sunken part, hue (-1: gray) and brightness."""
        return torch.tensor([(s["h"], s["sink"], -1. if s["hue"] is None else s["hue"], s["lum"])
                             for s in self.sprites.values()], device=self.device)

    @torch.no_grad()
    def render(self, scenes):
        """Scenes to pixels (B, 3, 128, 128), float32 in [-1, 1]; a row does not depend on the others."""
        backs, _, over = self._atlas
        numbers = [self.at[s.place, s.condition][s.variant] for s in scenes]
        cols = torch.arange(SIZE)[None] + torch.tensor([s.crop for s in scenes])[:, None]
        cols = torch.where(torch.tensor([s.flip for s in scenes])[:, None], cols.flip(1), cols).to(self.device)
        img = torch.take_along_dim(backs[torch.tensor(numbers, device=self.device)], cols[:, None, None], 3).float() / 255
        for k in range(max(len(s.things) for s in scenes)):             # from back to front
            on = [j for j, s in enumerate(scenes) if len(s.things) > k]
            things = [sorted(scenes[j].things, key=lambda thing: thing.y)[k] for j in on]
            rows = torch.tensor(on, device=self.device)
            img[rows] = self._place(img[rows], things, [numbers[j] for j in on], [scenes[j].flip for j in on])
        wet = [j for j, i in enumerate(numbers) if self.backdrops[i]["overlay"]]
        if wet:
            kinds = [self.index["overlay"]["rows"][self.backdrops[numbers[j]]["overlay"]] for j in wet]
            n, top, left = torch.tensor([scenes[j].tile for j in wet], device=self.device).unbind(1)
            side, rows = torch.arange(SIZE, device=self.device), torch.tensor(wet, device=self.device)
            layer = over[torch.tensor(kinds, device=self.device), n]
            layer = torch.take_along_dim(layer, (top[:, None] + side)[:, None, :, None], 2)
            layer = torch.take_along_dim(layer, (left[:, None] + side)[:, None, None], 3)
            img[rows] = torch.lerp(img[rows], layer[:, :3], layer[:, 3:])
        for style in sorted({s.style for s in scenes if s.style}):
            rows = torch.tensor([j for j, s in enumerate(scenes) if s.style == style], device=self.device)
            img[rows] = FILTERS[style](img[rows].clamp(0, 1))
        return img.clamp(0, 1) * 2 - 1

    def _place(self, img, things, backs, flips):
        """Draw one thing into each picture (B, 3, 128, 128) in [0, 1], lit as its backdrop is."""
        dev = self.device
        pose = torch.tensor([(*self.box(t), 1 - 2 * t.flip, 1 - 2 * flip, t.mode == "stand",
                              t.mode in ("float", "swim")) for t, flip in zip(things, flips)]).to(dev)
        x, y, w, h, mirror, turned, stands, afloat = pose[:, :, None, None].unbind(1)           # (B, 1, 1)
        numbers = torch.tensor([self.number[thing.noun] for thing in things], device=dev)
        tall, sink, hue, lum = self._form[numbers].unbind(1)
        light = self._light[torch.tensor(backs, device=dev)]
        ambient, desaturate, haze, foam, shadow, shift = light[:, :, None, None].split((3, 1, 4, 4, 1, 1), 1)
        scale = h * SIZE / tall[:, None, None]
        art = self._atlas[1][numbers, (scale[:, 0, 0] < .62).long()]
        rgb, alpha = art[:, :3], art[:, 3:]
        coloured = [j for j, thing in enumerate(things) if thing.color]
        if coloured:
            rows = torch.tensor(coloured, device=dev)
            target = torch.tensor([self.colors[things[j].color] for j in coloured], device=dev)
            rgb = rgb.index_copy(0, rows, recolor(rgb[rows], hue[rows], lum[rows], target))
        rgb = torch.lerp(rgb, rgb.mean(1, keepdim=True), desaturate) * ambient
        rgb = torch.lerp(rgb, haze[:, :3], haze[:, 3:])
        foam_color, foam = foam[:, :3], foam[:, 3:] * afloat[:, None]
        wet = foam[:, 0] > 0
        low = y + wet * sink[:, None, None] * h                         # its foot: under water when it floats
        side = (torch.arange(SIZE, device=dev) + .5) / SIZE
        X, Y = side[None, None, :], side[None, :, None]
        half = self.art["cell"] / 2
        u = (X - x) * SIZE / scale * mirror / half
        v = ((Y - low) * SIZE / scale + self.art["baseline"]) / half - 1
        grid = torch.stack(torch.broadcast_tensors(u, v), -1)
        out = F.grid_sample(torch.cat([rgb * alpha, alpha], 1), grid, align_corners=False)
        out = out * torch.where(wet, smooth(.006, -.002, Y - y), 1.)[:, None]
        d = ((X - x - shift[:, 0] * turned * w) / (.46 * w)) ** 2 + ((Y - y + .004) / (.085 * w).clamp(min=.012)) ** 2
        dark = torch.exp(-1.3 * d.clamp(max=20))                        # the clamp keeps out denormals, which are slow
        img = img * (1 - shadow * stands[:, None] * dark[:, None])
        img = img * (1 - out[:, 3:]) + out[:, :3]
        floating = [j for j, thing in enumerate(things) if thing.mode in ("float", "swim")]
        if floating:
            rows = torch.tensor(floating, device=dev)
            x, y, w = x[rows], y[rows], w[rows]
            d = ((X - x) / (.5 * w)) ** 6 + ((Y - y + .003 * torch.sin(X * 90 + 7 * x)) / .013) ** 2
            line = foam[rows] * torch.exp(-d.clamp(max=30))[:, None]
            img = img.index_copy(0, rows, torch.lerp(img[rows], foam_color[rows], line))
        return img


def nearness(back, mode, y):
    """How large a thing at y looks on a backdrop: what stands or floats near its horizon is small."""
    return min(max((y - back["horizon"]) / (.88 - back["horizon"]), .72), 1.1) if mode in ("stand", "float") else 1.


def stream(what, split, seed, index):
    """A random stream of its own for each: nothing else is drawn from or disturbed."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return random.Random(f"{what}/{split}/{seed}/{index}")


def is_held_out(noun, place, color):
    """A tenth of all combinations, by a hash that never changes."""
    return zlib.crc32(f"{noun}/{place}/{color}".encode()) % 10 == 0


# Contact sheets

def main(args):
    args.device = usable_device(args.device)
    world, out = World(args.device, args.subset), Path(args.out)
    make_writable(out, str(out))
    pixels, captions = world.pictures(args.seed, 0, 96)
    save_image(contact_sheet(list(zip(to_images(pixels), captions)), columns=12), out / "scenes.png")
    for split in SPLITS:
        cells = []
        for kind in KINDS:
            before, after, edits = world.pairs(args.seed, 0, 10, split, kind)
            for before, after, edit in zip(to_images(before), to_images(after), edits):
                cells += [(before, edit.caption), (after, f"[{edit.instruction}] {edit.edited_caption}")]
        save_image(contact_sheet(cells, columns=10, lines=5), out / f"edits-{split}.png")
    print(f"wrote {out}/scenes.png and edits of the splits {', '.join(SPLITS)}")


if __name__ == "__main__":
    parser = Parser(prog="python -m ip2p.world", description="Contact sheets of the miniature world.")
    parser.add_argument("out", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="which scenes (default 0)")
    parser.add_argument("--subset", choices=("core", "all"), default="core", help="nouns and places to use (default core)")
    parser.add_argument("--device", default="cpu", help="where to render (default cpu)")
    args = parser.parse_args()
    sys.exit(exit_status("ip2p.world", lambda: main(args), "--device cpu"))
