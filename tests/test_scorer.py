"""The scorer: its labels are what pictures show, its loss is the formula, and its accuracy is counted right."""
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ip2p.scorer import (CONDITION_NAMES, STYLE_NAMES, Reading, Scorer, Seen, build_scorer, load_scorer, near, read_scene,
                         same_color, save_scorer, score_scorer, scorer_loss, soften)
from ip2p.world import COLORLESS, SIZES, World

SHIPPED = Path(__file__).parent.parent / "weights" / "mini-scorer.safetensors"
ATTRIBUTES = ("things", "color", "size", "position", "place", "condition", "style")


@pytest.fixture(scope="module")
def world():
    torch.set_num_threads(1)
    return World()


class Oracle:
    """Reads the truth of the scenes that score_scorer draws, as `spoil` leaves it."""

    def __init__(self, world, spoil=lambda reading: reading):
        self.readings = iter([spoil(read_scene(world, world.scene(0, i, "combinations"))) for i in range(80)])

    def read(self, pixels):
        return [next(self.readings) for _ in pixels]


def small_scorer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Scorer(["fox", "car", "bear"], ["sea", "moon"], ["red", "blue"], widths=(8, 8, 16))


def test_a_things_position_is_the_middle_of_what_it_paints(world):
    scenes = [scene for i in range(40) if not (scene := world.scene(1, i)).style and len(scene.things) == 2]
    side = (torch.arange(128) + .5) / 128
    for scene in scenes:
        for thing in scene.things:
            if thing.mode != "fly":                                      # the others have shadows or foam at their foot
                continue
            rest = replace(scene, things=tuple(t for t in scene.things if t != thing))
            painted = (world.render([scene]) - world.render([rest])).abs().amax((0, 1)) > .05
            middle = [(side[painted.any(d)].min() + side[painted.any(d)].max()).item() / 2 for d in (0, 1)]
            assert near(Seen("", "", *middle), read_scene(world, scene).things[thing.noun]), (thing, middle)
    assert any(thing.mode == "fly" for scene in scenes for thing in scene.things)


def test_colors_are_the_same_where_paint_is_like_the_things_own(world):
    for a, b, same in (("", "orange", True), ("blue", "blue", True), ("", "blue", False), ("orange", "red", False)):
        assert same_color(world, "fox", a, b) == same_color(world, "fox", b, a) == same
    for kind in ("color", "add"):                                        # every colour asked for is another one
        for i in range(60):
            edit = world.edit(2, i, kind=kind)
            old, new = ({t.noun: t.color for t in scene.things} for scene in (edit.source, edit.target))
            changed = [noun for noun in old if noun in new and not same_color(world, noun, old[noun], new[noun])]
            assert len(changed) == (kind == "color")


def test_loss_is_the_formula():
    scorer, pixels = small_scorer(), torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    readings = [Reading("moon", "night", "", {"car": Seen("blue", "", .3, .4), "fox": Seen("", "tiny", .6, .7)}),
                Reading("sea", "fog", COLORLESS[0], {"bear": Seen("", "huge", .1, .9)})]
    with torch.no_grad():
        out, loss = scorer(pixels), scorer_loss(scorer, pixels, readings).item()
    log = lambda name, at, index: math.log(math.exp(out[name][at][index]) / sum(math.exp(v) for v in out[name][at].tolist()))
    scene = sum(log("place", i, scorer.places.index(r.place)) + log("condition", i, CONDITION_NAMES.index(r.condition))
                + log("style", i, STYLE_NAMES.index(r.style)) for i, r in enumerate(readings)) / 2
    there = sum(math.log(1 / (1 + math.exp((-1 if noun in r.things else 1) * out["things"][i, n].item())))
                for i, r in enumerate(readings) for n, noun in enumerate(scorer.nouns)) / 2
    things = [(i, scorer.nouns.index(noun), seen) for i, r in enumerate(readings) for noun, seen in r.things.items()]
    color = sum(log("color", (i, n), scorer.colors.index(s.color)) for i, n, s in things[:2]) / 2     # the sketch has none
    size = sum(log("size", (i, n), list(SIZES).index(s.size)) for i, n, s in things) / 3
    off = sum(abs(out["position"][i, n, k].item() - at) for i, n, s in things for k, at in enumerate((s.x, s.y))) / 6
    assert loss == pytest.approx(4 * off - scene - there - color - size, rel=1e-5)


def test_reading_says_what_the_logits_say():
    scorer = small_scorer()
    out = dict(place=torch.tensor([[0., 3.]]), condition=torch.eye(9)[3:4], style=torch.eye(6)[:1],
               things=torch.tensor([[-2., 1., -.1]]), color=torch.eye(3)[None, [0, 2, 1]], size=torch.eye(3)[None],
               position=torch.tensor([[[0., 0], [.25, .75], [1, 1]]]))
    scorer.forward = lambda pixels: out
    reading, = scorer.read(torch.zeros(1, 3, 128, 128))
    assert reading == Reading("moon", "night", "", {"car": Seen("blue", "tiny", .25, .75)})


def test_a_few_pictures_can_be_learned(world):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scorer = build_scorer(world)
    scenes = [world.scene(5, i) for i in range(4)]
    pixels, truth = world.render(scenes), [read_scene(world, s) for s in scenes]
    adam = torch.optim.Adam(scorer.parameters(), lr=2e-3)
    for step in range(40):
        adam.zero_grad()
        scorer_loss(scorer, pixels, truth).backward()
        adam.step()
    for reading, true in zip(scorer.read(pixels), truth):
        assert replace(reading, things={}) == replace(true, things={}) and reading.things.keys() == true.things.keys()
        for noun, seen in reading.things.items():
            assert (seen.color, seen.size) == (true.things[noun].color, true.things[noun].size)


def test_softened_pictures_are_close_repeatable_and_each_on_its_own(world):
    pixels = world.render([world.scene(0, i) for i in range(4)])
    kept, soft = pixels.clone(), soften(pixels, torch.Generator().manual_seed(1))
    assert torch.equal(soft, soften(pixels, torch.Generator().manual_seed(1))) and torch.equal(pixels, kept)
    assert soft.min() >= -1 and soft.max() <= 1
    change = (soft - pixels).abs().mean((1, 2, 3))
    assert (change > .001).all() and (change < .25).all() and change.unique().numel() == 4


def test_accuracy_counts_each_attribute_alone(world):
    assert score_scorer(Oracle(world), world, 80) == dict.fromkeys(ATTRIBUTES, 1.0)
    of_things = lambda **new: lambda r: replace(r, things={noun: replace(seen, **new) for noun, seen in r.things.items()})
    other = lambda noun, color: next(c for c in world.colors if not same_color(world, noun, c, color))
    repaint = lambda r: replace(r, things={n: replace(seen, color=other(n, seen.color)) for n, seen in r.things.items()})
    spoils = dict(place=lambda r: replace(r, place="nowhere"), condition=lambda r: replace(r, condition="noon"),
                  style=lambda r: replace(r, style="comic"), size=of_things(size="vast"), color=repaint,
                  position=of_things(x=2.),
                  things=lambda r: replace(r, things=r.things | {"unheard of": Seen("", "", 0, 0)}))
    for name, spoil in spoils.items():
        assert score_scorer(Oracle(world, spoil), world, 80) == dict.fromkeys(ATTRIBUTES, 1.0) | {name: 0.0}


def test_a_saved_scorer_reads_the_same(world, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scorer = build_scorer(world)
    scorer.half().float()                                                # rounded as in the file
    save_scorer(scorer, tmp_path / "s.safetensors", {"minutes": 3})
    again, pixels = load_scorer(tmp_path / "s.safetensors"), world.render([world.scene(0, i) for i in range(2)])
    assert again.colors == scorer.colors and again.places == scorer.places and again.nouns == scorer.nouns
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(again(pixels).values(), scorer(pixels).values()))
    assert (tmp_path / "s.safetensors").stat().st_size < 3 * 2 ** 20
    with pytest.raises(ValueError, match="not a scorer"):
        load_scorer(SHIPPED.parent / "mini-clip.safetensors")


@pytest.mark.skipif(not SHIPPED.exists(), reason="no trained scorer")
def test_the_shipped_scorer_reads_held_out_scenes(world):
    scores = score_scorer(load_scorer(SHIPPED), world, 128, seed=1)
    assert all(scores[name] > (.93 if name == "things" else .95) for name in ATTRIBUTES), scores
