"""A small classifier that reads pictures of the miniature world: what is there, its colour, size and position, and the
place, condition and style. It has learned from the world's drawings alone and knows nothing of CLIP, captions or
instructions, so it can judge what was made with them (`truth.py`).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tensorfiles import read_state_dict, write_state_dict
from .world import COLORLESS, CONDITIONS, SIZES, Scene, World
from .world_art import blur
from .world_words import STYLES

CONDITION_NAMES = tuple(dict.fromkeys(name for names in CONDITIONS.values() for name in names))
STYLE_NAMES = ("", *STYLES)
NEAR = .1                        # a thing this close to where it should be, as a fraction of the picture, is there


# ---- what is read

@dataclass(frozen=True)
class Seen:
    """A thing in a picture."""
    color: str
    size: str
    x: float                    # the middle of its box, in fractions of the picture
    y: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows, as the scorer reads it or as the world knows it (`read_scene`)."""
    place: str
    condition: str
    style: str
    things: dict                # noun -> Seen


def read_scene(world: World, scene: Scene) -> Reading:
    """The truth about a scene."""
    things = {}
    for thing in scene.things:
        x, y, _, h = world.box(thing)
        things[thing.noun] = Seen(thing.color, thing.size, x, y - h / 2)
    return Reading(scene.place, scene.condition, scene.style, things)


def same_color(world: World, noun: str, a: str, b: str) -> bool:
    """Whether a thing looks the same in both colours: a painted one may be like its own colours, which are ""."""
    return a == b or not (a and b) and world.alike(world.sprites[noun], a or b)


def near(a: Seen, b: Seen) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) < NEAR


# ---- the network

class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Scorer(nn.Module):
    """Pixels (B, 3, 128, 128) in [-1, 1] to logits: place (B, P), condition (B, 9), style (B, 6), things (B, N) that a noun
    is there; and for each noun, supposing that it is: color (B, N, 12), size (B, N, 3) and position (B, N, 2) in [0, 1].

    nouns, places, colors: their names. Each noun has a map over 8 x 8 cells that says where it is.
    """

    def __init__(self, nouns, places, colors, widths=(32, 64, 160)):
        super().__init__()
        self.nouns, self.places, self.colors = list(nouns), list(places), ["", *colors]
        a, b, c = widths
        self.conv_in = nn.Conv2d(3, a, 8, stride=4, padding=2)
        self.trunk = nn.Sequential(Block(a), nn.Conv2d(a, b, 3, stride=2, padding=1), Block(b), Block(b), nn.Conv2d(
            b, c, 3, stride=2, padding=1), Block(c), Block(c), nn.GroupNorm(8, c), nn.SiLU())
        self.maps = nn.Conv2d(c, len(self.nouns), 1)
        nn.init.constant_(self.maps.bias, -8.)                       # at first nothing is there
        self.scene = nn.Linear(c, len(self.places) + len(CONDITION_NAMES) + len(STYLE_NAMES))
        self.thing = nn.Sequential(nn.Linear(c, 128), nn.SiLU(), nn.Linear(128, len(self.colors) + len(SIZES) + 2))
        nn.init.zeros_(self.thing[-1].weight)
        nn.init.zeros_(self.thing[-1].bias)
        side = (torch.arange(8) + .5) / 8
        self.register_buffer("cells", torch.cartesian_prod(side, side).flip(1), persistent=False)     # (64, 2), x first

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.trunk(self.conv_in(pixels))
        maps = self.maps(features).flatten(2).float()                # (B, N, 64)
        shares = maps.softmax(-1)
        names = ("place", "condition", "style")
        scene = self.scene(features.mean((2, 3))).float()
        scene = scene.split([len(self.places), len(CONDITION_NAMES), len(STYLE_NAMES)], 1)
        thing = self.thing(shares.to(features.dtype) @ features.flatten(2).mT).float()
        color, size, offset = thing.split([len(self.colors), len(SIZES), 2], -1)      # from the map's centre to the thing's
        position = shares @ self.cells + offset
        return dict(zip(names, scene), things=maps.logsumexp(-1), color=color, size=size, position=position)

    @torch.no_grad()
    def read(self, pixels: Tensor) -> list[Reading]:
        """What each picture (B, 3, 128, 128) in [-1, 1] shows."""
        readings = []
        for batch in pixels.split(64):
            out = self(batch.to(self.cells.device))
            there, position = (out["things"] > 0).cpu(), out["position"].cpu()
            place, condition, style, color, size = (out[name].argmax(-1).tolist() for name in
                                                    ("place", "condition", "style", "color", "size"))
            for i in range(len(batch)):
                things = {self.nouns[n]: Seen(self.colors[color[i][n]], list(SIZES)[size[i][n]], *position[i, n].tolist())
                          for n in there[i].nonzero().flatten().tolist()}
                readings.append(Reading(self.places[place[i]], CONDITION_NAMES[condition[i]], STYLE_NAMES[style[i]], things))
        return readings


def build_scorer(world: World) -> Scorer:
    """A scorer of the world's nouns, places and colours, with fresh weights."""
    return Scorer(world.nouns, world.places, world.colors)


# ---- learning and its measure

def soften(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1], each a little blurred, noisy, darker or paler by chance, as an autoencoder's are.
    rng: a CPU generator."""
    blurred, noise, gain, shift = (torch.rand(4, len(pixels), 1, 1, 1, generator=rng)).to(pixels)
    x = torch.lerp(pixels, blur(pixels, 1, 1), blurred)
    grain = torch.randn(pixels.shape, generator=rng).to(pixels)
    return (x * (.9 + .2 * gain) + .1 * (shift - .5) + .06 * noise * grain).clamp(-1, 1)


def scorer_loss(scorer: Scorer, pixels: Tensor, readings: list[Reading]) -> Tensor:
    """Cross-entropies of all that is said of the pictures, plus the mean distance of positions. readings: the truth
    (`read_scene`). Colours are not asked of pictures without any."""
    out, device = scorer(pixels), pixels.device
    index = lambda names, values: torch.tensor([names.index(v) for v in values], device=device)
    rows, nouns, seen = zip(*((i, scorer.nouns.index(noun), thing) for i, r in enumerate(readings)
                              for noun, thing in r.things.items()))
    rows, nouns = torch.tensor(rows, device=device), torch.tensor(nouns, device=device)
    there = torch.zeros_like(out["things"])
    there[rows, nouns] = 1
    of_things = {name: out[name][rows, nouns] for name in ("color", "size", "position")}
    colored = torch.tensor([r.style not in COLORLESS for r in readings for _ in r.things], device=device).float()
    color = F.cross_entropy(of_things["color"], index(scorer.colors, [s.color for s in seen]), reduction="none")
    position = torch.tensor([(s.x, s.y) for s in seen], device=device)
    return (F.cross_entropy(out["place"], index(scorer.places, [r.place for r in readings]))
            + F.cross_entropy(out["condition"], index(CONDITION_NAMES, [r.condition for r in readings]))
            + F.cross_entropy(out["style"], index(STYLE_NAMES, [r.style for r in readings]))
            + F.binary_cross_entropy_with_logits(out["things"], there, reduction="sum") / len(readings)
            + (color * colored).sum() / colored.sum().clamp(min=1)
            + F.cross_entropy(of_things["size"], index(list(SIZES), [s.size for s in seen]))
            + 4 * (of_things["position"] - position).abs().mean())


def compare(world: World, reading: Reading, truth: Reading) -> dict[str, list[bool]]:
    """By attribute, whether a reading says the truth: once for each picture, and for each thing that is there and seen as to
    its color, size and position. "things": exactly those that are there are seen. Colours and the condition are not asked
    of pictures without colour."""
    found = dict(things=[reading.things.keys() == truth.things.keys()], color=[], size=[], position=[],
                 place=[reading.place == truth.place], condition=[], style=[reading.style == truth.style])
    colored = truth.style not in COLORLESS
    if colored:
        found["condition"].append(reading.condition == truth.condition)
    for noun in truth.things.keys() & reading.things.keys():
        seen, true = reading.things[noun], truth.things[noun]
        found["size"].append(seen.size == true.size)
        found["position"].append(near(seen, true))
        if colored:
            found["color"].append(same_color(world, noun, seen.color, true.color))
    return found


def score_scorer(scorer: Scorer, world: World, count: int = 512, seed: int = 0) -> dict[str, float]:
    """Accuracy by attribute on `count` drawings of the split "combinations"."""
    found = {}
    for start in range(0, count, 64):
        scenes = [world.scene(seed, i, "combinations") for i in range(start, min(start + 64, count))]
        for reading, scene in zip(scorer.read(world.render(scenes)), scenes):
            for name, values in compare(world, reading, read_scene(world, scene)).items():
                found.setdefault(name, []).extend(values)
    return {name: round(sum(values) / max(1, len(values)), 4) for name, values in found.items()}


# ---- files

def save_scorer(scorer: Scorer, path, metadata: dict):
    """Write a scorer as float16 safetensors, with its names and what is known of it in the metadata."""
    config = dict(nouns=scorer.nouns, places=scorer.places, colors=scorer.colors[1:])
    write_state_dict(path, scorer.state_dict(), {"scorer": config, **metadata}, torch.float16)


def load_scorer(path, device=None) -> Scorer:
    """A scorer that `save_scorer` wrote, in float32 and eval mode. ValueError if the file is another kind."""
    tensors, record = read_state_dict(path)
    if "scorer" not in record:
        raise ValueError(f"{path}: not a scorer (its metadata has no \"scorer\")")
    scorer = Scorer(**record["scorer"])
    scorer.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return scorer.eval().requires_grad_(False).to(device or "cpu")
