"""The miniature world: the same examples always, held-out parts never in training, and edits that change what they say."""
import os
import random
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from ip2p import world_words as words
from ip2p.world import CONDITIONS, KINDS, SIZE, SPLITS, World, is_held_out

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world():
    torch.set_num_threads(1)
    return World()


def combinations(scene):
    return [(thing.noun, scene.place, thing.color) for thing in scene.things]


def changed(a, b):
    return {field.name for field in fields(a) if getattr(a, field.name) != getattr(b, field.name)}


def sample(world, count, split="train"):
    return [world.edit(3, i, split, kind) for kind in KINDS for i in range(count)]


def as_pattern(template):
    """A regular expression for what a template can become, any words in its slots."""
    return re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(template)) + r"\.?", re.IGNORECASE)


def test_examples_depend_only_on_seed_index_and_split(world):
    again = World()
    backwards = {i: again.edit(5, i) for i in reversed(range(20))}
    for i in range(20):
        assert world.edit(5, i) == backwards[i]
        assert world.caption(5, i) == again.caption(5, i) and world.scene(5, i) == world.caption(5, i)[0]
    assert world.scene(5, 0) != world.scene(6, 0) and world.edit(5, 0) != world.edit(6, 0)


def test_rendering_does_not_depend_on_the_batch(world):
    scenes = [world.scene(1, i) for i in range(40)]
    scenes += [replace(scenes[i], style=style) for i, style in enumerate(words.STYLES)]
    batch = world.render(scenes)
    assert batch.shape == (45, 3, SIZE, SIZE) and batch.dtype == torch.float32
    assert batch.min() >= -1 and batch.max() <= 1                       # false for NaN as well
    assert torch.equal(batch, torch.cat([world.render([scene]) for scene in scenes]))
    assert torch.equal(batch[7:20], world.render(scenes[7:20]))
    pixels, captions = world.pictures(1, 7, 13)
    assert torch.equal(pixels, batch[7:20]) and captions == [world.caption(1, i)[1] for i in range(7, 20)]


def test_global_random_state_is_untouched(world):
    python, pytorch = random.getstate(), torch.get_rng_state()
    World().pairs(0, 0, 4)
    for style in words.STYLES:
        world.render([replace(world.scene(0, 0), style=style)])
    assert random.getstate() == python and torch.equal(torch.get_rng_state(), pytorch)


def test_held_out_combinations_are_a_tenth_and_spare_every_noun_and_place():
    for subset in ("core", "all"):
        world = World(subset=subset)
        every = [(n, p, c) for n in world.nouns for p in world.homes[n] for c in ("", *world.colors)]
        assert .09 < len(world.held_out) / len(every) < .11
        assert all(any(not is_held_out(noun, place, "") for place in world.homes[noun]) for noun in world.nouns)
        assert all(sum(not is_held_out(noun, place, "") for noun in world.natives[place]) > 1 for place in world.places)


def test_held_out_combinations_are_never_in_train_and_always_in_combinations(world):
    held = lambda scene: any(is_held_out(*combination) for combination in combinations(scene))
    for split in ("train", "phrasings"):
        assert not any(held(world.scene(2, i, split)) for i in range(1500))
        assert not any(held(edit.source) or held(edit.target) for edit in sample(world, 200, split))
    assert all(held(world.scene(2, i, "combinations")) for i in range(200))
    assert all(held(edit.target) for edit in sample(world, 20, "combinations"))


def test_held_out_phrasings_are_disjoint_from_training(world):
    for key, (train, held_out) in words.INSTRUCTIONS.items():
        assert len(held_out) >= 2 and not set(train + words.ALONE.get(key, [])) & set(held_out)
    forms = [{f(text) for opening, sentence in half for text in [opening + sentence] for f in (str, words.without_when)}
             for half in words.CAPTIONS]
    assert not forms[0] & forms[1]
    assert "make it night" in [t.format(time="night") for t in words.INSTRUCTIONS["time"][0] if "{at}" not in t and "{old}" not in t]
    for split in SPLITS:                                                # what is drawn comes from the right half
        for kind in KINDS:
            patterns = [as_pattern(t) for key, halves in words.INSTRUCTIONS.items() if key.split()[0] == kind
                        for t in halves[split == "phrasings"] + (words.ALONE.get(key, []) if split != "phrasings" else [])]
            for i in range(30):
                edit = world.edit(4, i, split, kind)
                assert any(p.fullmatch(edit.instruction) for p in patterns), edit.instruction
                start = re.match(r"(an image of|here we see)|.* there is ", edit.caption, re.IGNORECASE)
                assert bool(start) == (split == "phrasings") or edit.source.style, edit.caption


def test_an_edit_changes_only_the_fact_it_names(world):
    for edit in sample(world, 60):
        source, target = edit.source, edit.target
        assert source != target and edit.caption != edit.edited_caption, edit
        if edit.kind in CONDITIONS:
            assert changed(source, target) == {"condition"}
            assert {source.condition, target.condition} <= set(CONDITIONS[edit.kind])
        elif edit.kind == "style":
            assert changed(source, target) == {"style"}
        elif edit.kind == "place":
            assert {"place"} <= changed(source, target) <= {"place", "variant", "crop", "things", "backdrop_color"}
            for a, b in zip(source.things, target.things):
                assert changed(a, b) <= {"mode", "y", "height"}
                backdrop = world.backdrops[world.at[target.place, target.condition][target.variant]]
                low, high = backdrop["base"][b.mode]
                assert b.y == pytest.approx(min(max(a.y, low), high)) and .6 < b.height / a.height < 1.6
        else:
            assert changed(source, target) == {"things"}
            more, fewer = sorted((source.things, target.things), key=len, reverse=True)
            if edit.kind in ("add", "remove"):
                assert len(more) == 2 and len(fewer) == 1 and fewer[0] in more and (more is target.things) == (edit.kind == "add")
            else:
                (a, b), = [(a, b) for a, b in zip(source.things, target.things) if a != b]
                allowed = {"object": {"noun", "height", "flip", "color", "size"}, "color": {"color"}, "size": {"size"}}
                assert changed(a, b) <= allowed[edit.kind] and len(source.things) == len(target.things)


def test_every_kind_of_edit_is_visible(world):
    for kind in KINDS:
        source, target, edits = world.pairs(6, 0, 12, kind=kind)
        assert ((source - target).abs().flatten(1).amax(1) > .1).all(), kind


def test_removing_a_thing_leaves_the_rest_of_the_picture(world):
    source, target, edits = world.pairs(8, 0, 24, kind="remove")
    columns = (torch.arange(SIZE) + .5) / SIZE
    for before, after, edit in zip(source, target, edits):
        gone, = set(edit.source.things) - set(edit.target.things)
        x, _, w, _ = world.box(gone)
        far = (columns - x).abs() > 1.6 * w + .06                       # its shadow, and the reach of a style's filter
        assert torch.equal(before[..., far], after[..., far])
        near = (columns - x).abs() < .2 * w
        assert (before[..., near] - after[..., near]).abs().max() > .05


def test_things_are_in_the_frame_and_apart(world):
    for edit in sample(world, 60):
        for scene in (edit.source, edit.target):
            boxes = [world.box(thing) for thing in scene.things]
            for x, y, w, h in boxes:
                assert x - w / 2 >= 0 and x + w / 2 <= 1 and y - h >= 0 and y <= 1
            if len(boxes) == 2:
                (a, _, w, _), (b, _, v, _) = boxes
                assert abs(a - b) > (w + v) / 2 - .05


def test_articles_are_right():
    world = World(subset="all")
    for noun, sprite in world.sprites.items():
        assert words.article(noun) == sprite["article"], noun
    sentences = [text for i in range(1500) for text in (world.caption(9, i)[1], world.edit(9, i).instruction)]
    sentences += [world.edit(9, i, split).edited_caption for i in range(200) for split in SPLITS]
    for text in sentences:
        assert not re.search(r"\ba (?:[aeio]|u(?!ni)|hour)", text, re.IGNORECASE), text
        assert not re.search(r"\ban (?:[^aeiouh]|h(?!our)|uni)", text, re.IGNORECASE), text
        assert not re.search(r"  | ,|,,|^,|,\.?$|[{}]|\ban? (?:a|an|the)\b", text), text


def test_captions_of_an_edit_share_their_wording(world):
    for i in range(40):
        edit = world.edit(10, i, kind="color")
        (old, new), = [(a.color, b.color) for a, b in zip(edit.source.things, edit.target.things) if a != b]
        shorten = lambda text, color: re.sub(r"\ban?\b", "a", re.sub(rf"\b{color} ", "", text) if color else text, flags=re.IGNORECASE)
        other = {thing.color for thing in edit.source.things} & {thing.color for thing in edit.target.things} - {""}
        if not other & {old, new}:
            assert shorten(edit.caption, old).lower() == shorten(edit.edited_caption, new).lower()


@pytest.mark.parametrize("flags, words", [(["FILE"], "File exists"), (["FOLDER", "--device", "abacus"], "--device abacus cannot be used")])
def test_the_command_that_cannot_work_is_one_line(tmp_path, flags, words):
    (tmp_path / "FILE").touch()
    done = subprocess.run([sys.executable, "-m", "ip2p.world", *flags], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_unknown_names_are_refused(world):
    with pytest.raises(ValueError, match="split"):
        world.scene(0, 0, "test")
    with pytest.raises(ValueError, match="kind"):
        world.edit(0, 0, kind="sound")
    with pytest.raises(ValueError, match="subset"):
        World(subset="half")
