"""The evaluation's definitions, by an oracle that reads the truth; its numbers by slow loops; its commands at tiny size."""
import json
import math
import os
import statistics
import sys
from dataclasses import replace
from itertools import count, islice
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ip2p import InstructPix2Pix, evaluate
from ip2p.checkpoint import Parts, save_checkpoint
from ip2p.clip_filter import ClipSimilarity, Thresholds, build_clip, save_clip
from ip2p.images import to_images, to_pixels
from ip2p.evaluate import WEIGHTS
from ip2p.inversion import InvertedPicture, invert, sdedit
from ip2p.prompt_to_prompt import prompt_to_prompt
from ip2p.scorer import Seen, build_scorer, load_scorer, near, read_scene, save_scorer
from ip2p.text import TextConfig, TextEncoder
from ip2p.truth import (ATTRIBUTES, FIXED, Verdict, edit_pixels, is_fixed, judge_edit, judge_edits, judge_pair, judge_picture, psnr,
                        summarize, unchanged)
from ip2p.unet import UNet, UNetConfig
from ip2p.vae import AutoencoderKL, VAEConfig
from ip2p.world import COLORLESS, KINDS, World
from ip2p.world_art import FILTERS

SPLITS = ("combinations", "phrasings")


@pytest.fixture(scope="module")
def world():
    torch.set_num_threads(1)
    return World()


@pytest.fixture(scope="module")
def files(world, tmp_path_factory):
    """An editor, a text-to-image model, a CLIP and a scorer: small, of the right shapes, with random weights."""
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(VAEConfig(channels=8, channel_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=4))
        text = TextEncoder(TextConfig(vocab_size=514 + 200, context_length=32, width=32, layers=1, heads=2))
        for name, channels in (("editor", 8), ("base", 4)):
            unet = UNet(UNetConfig(in_channels=channels, model_channels=32, channel_mult=(1, 1), num_res_blocks=1,
                                   attention_levels=(True, True), context_dim=32, num_heads=2, norm_groups=8))
            parts = Parts(unet, vae, text, "eps", 128, {})
            save_checkpoint(parts, folder / f"{name}.safetensors", metadata=dict(cfg_text=2.0))
        config = dict(embed_dim=16, vision_cfg=dict(image_size=32, patch_size=16, width=32, layers=1, head_width=16),
                      text_cfg=dict(context_length=32, vocab_size=514 + 200, width=32, heads=2, layers=1))
        save_clip(build_clip(config), config, folder / "clip.safetensors", {})
        save_scorer(build_scorer(world), folder / "scorer.safetensors", {})
    return folder


class Oracle:
    """Reads the truth of the scenes that it was shown last."""

    def __init__(self, world):
        self.world = world

    def shows(self, which):
        """What makes the pictures of the edits' source or target, and lets the oracle know."""
        def make(before, after, edits, seeds):
            self.scenes = [getattr(edit, which) for edit in edits]
            return dict(source=before, target=after)[which]
        return make

    def read(self, pixels):
        assert len(pixels) == len(self.scenes)
        return [read_scene(self.world, scene) for scene in self.scenes]


# ---- edits

def test_true_edits_are_right_and_unedited_pictures_only_preserved(world):
    oracle = Oracle(world)
    true, unedited = (judge_edits(world, oracle, oracle.shows(which), 60, batch_size=4) for which in ("target", "source"))
    assert len(true) == len(unedited) == 120
    assert {(v.split, v.edit.kind) for v in true} == {(split, kind) for split in SPLITS for kind in KINDS}
    assert all(v.asked and v.kept for v in true)
    assert [(v.success, v.preserved, v.right) for v in true] == [(True, True, True)] * 120
    assert [(v.success, v.preserved, v.right) for v in unedited] == [(False, True, False)] * 120
    summary = summarize(true)
    assert (summary["right"], summary["success"], summary["preserved"]) == (1, 1, 1) and summary["psnr"] == 100
    assert summary["kept"] == dict.fromkeys(ATTRIBUTES, 1.0)
    expected = dict(object={"things", "color", "size"}, time={"condition"}, weather={"condition"}, season={"condition"},
                    place={"place"}, color={"color"}, add={"things", "color", "size"}, remove={"things"}, size={"size"},
                    style={"style"})
    assert all(v.asked.keys() <= expected[v.edit.kind] for v in true)


def spoiled(reading, attribute, noun, world):
    """The reading with one thing wrong."""
    seen = reading.things.get(noun)
    with_thing = lambda new: replace(reading, things=reading.things | {noun: new})
    if attribute == "things":
        return replace(reading, things={n: s for n, s in reading.things.items() if n != noun})
    if attribute == "color":
        green = world.sprites[noun]["hue"] is not None and abs(world.sprites[noun]["hue"] - .36) < .1
        return with_thing(replace(seen, color="pink" if green or seen.color == "green" else "green"))
    if attribute == "size":
        return with_thing(replace(seen, size="huge" if seen.size != "huge" else "tiny"))
    if attribute == "position":
        return with_thing(replace(seen, x=seen.x + .4))
    others = dict(place=("sea", "city"), condition=("fog", "day"), style=("", "pixel art"))[attribute]
    return replace(reading, **{attribute: next(other for other in others if other != getattr(reading, attribute))})


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_wrong_attribute_lowers_its_own_figure_alone(world, attribute):
    tried = {"asked": 0, "kept": 0}
    for kind in KINDS:
        for i in range(6):
            edit = world.edit(1, i, "combinations", kind)
            old, new = read_scene(world, edit.source).things, read_scene(world, edit.target)
            asked, kept = judge_edit(world, edit, new)
            for noun in new.things:
                was_there, wrong = noun in old, judge_edit(world, edit, spoiled(new, attribute, noun, world))
                changed = {(group, a) for group, found in zip(("asked", "kept"), wrong) for a in found if not found[a]}
                if attribute == "things":
                    undone = {("asked", a) for a in ("color", "size")
                              if was_there and getattr(old[noun], a) != getattr(new.things[noun], a)}
                    expected = {("kept" if was_there else "asked", attribute)} | undone
                elif attribute in ("place", "style", "condition"):
                    expected = {(group, attribute) for group, all in (("asked", asked), ("kept", kept)) if attribute in all}
                elif attribute == "position":
                    expected = set() if kind == "add" and not was_there else {("kept", attribute)}
                else:
                    colorless = attribute == "color" and {edit.source.style, edit.target.style} & set(COLORLESS)
                    replaces_odd_size = attribute == "size" and kind == "object" and not was_there and any(
                        t.size for t in edit.source.things if t not in edit.target.things)
                    this = was_there and getattr(old[noun], attribute) == getattr(new.things[noun], attribute)
                    expected = set() if colorless or replaces_odd_size else {("kept" if this else "asked", attribute)}
                assert changed == expected, (edit, noun)
                for group, _ in changed:
                    tried[group] += 1
    assert tried["kept"] and (tried["asked"] or attribute == "position"), tried


def test_what_is_asked_for_must_come_and_what_must_go_be_gone(world):
    for kind in ("object", "remove", "add"):
        edit = world.edit(2, 0, "combinations", kind)
        old, new = read_scene(world, edit.source), read_scene(world, edit.target)
        both = replace(new, things=old.things | new.things)
        asked, kept = judge_edit(world, edit, both)
        assert asked["things"] == (kind == "add") and all(kept.values())
    stranger = replace(both, things=both.things | {"unheard of": Seen("", "", .5, .5)})
    asked, kept = judge_edit(world, edit, stranger)
    assert all(asked.values()) and [a for a, right in kept.items() if not right] == ["things"]


def test_colors_and_conditions_are_not_judged_without_color(world):
    edits = [world.edit(3, i, "combinations", "style") for i in range(80)]
    assert any(e.source.style in COLORLESS for e in edits) and any(e.target.style in COLORLESS for e in edits)
    for edit in edits:
        asked, kept = judge_edit(world, edit, read_scene(world, edit.target))
        judged = not {edit.source.style, edit.target.style} & set(COLORLESS)
        assert ("condition" in kept) == ("color" in kept) == judged


def test_a_drawn_pair_is_judged_by_its_own_first_picture(world):
    """What a first picture shows beyond its scene is to be kept, and the rest is judged as an edit of the scene is."""
    moved = lambda reading, dx: replace(reading, things={n: replace(s, x=s.x + dx) for n, s in reading.things.items()})
    for kind in KINDS:
        for i in range(12):
            edit = world.edit(7, i, "combinations", kind)
            old, new = (read_scene(world, scene) for scene in (edit.source, edit.target))
            right = judge_edit(world, edit, new)
            assert judge_pair(world, edit, old, new) == right and all(right[0].values()) and all(right[1].values())
            assert judge_pair(world, edit, old, old) == judge_edit(world, edit, old)
            assert judge_pair(world, edit, moved(old, .3), moved(new, .3)) == right
            if kind != "add":
                assert not judge_pair(world, edit, moved(old, .3), moved(new, 0))[1]["position"]
            stranger = {"unheard of": Seen("", "", .5, .5)}
            more, less = replace(old, things=old.things | stranger), judge_pair(world, edit, replace(old, things=stranger), new)
            assert not judge_pair(world, edit, more, new)[1]["things"]
            assert all(judge_pair(world, edit, more, replace(new, things=new.things | stranger))[1].values())
            assert not less[1]["things"]
            if "place" not in right[0] and kind not in ("time", "weather", "season"):
                elsewhere = dict(place="elsewhere", condition="some time")
                assert judge_pair(world, edit, replace(old, **elsewhere), replace(new, **elsewhere)) == right
                assert not judge_pair(world, edit, replace(old, **elsewhere), new)[1]["place"]


def test_a_thing_that_grows_may_stay_where_it_was_or_stand_where_the_truth_has_it(world):
    edits = [world.edit(4, i, "combinations", "size") for i in range(60)]
    moved = 0
    for edit in edits:
        old, new = (read_scene(world, scene).things for scene in (edit.source, edit.target))
        noun, = [n for n in new if new[n].size != old[n].size]
        moved += not near(old[noun], new[noun])
        for at in (old[noun], new[noun]):
            reading = replace(read_scene(world, edit.target), things=new | {noun: replace(new[noun], x=at.x, y=at.y)})
            assert all(judge_edit(world, edit, reading)[1].values())
    assert moved


def test_a_fixed_edit_has_one_true_result(world):
    """Where rain and snow fall is drawn anew: if the picture before is the same, so is that after, unless the edit brings
    them (snow that turns into rain counts as not fixed too). And a style that is given is a filter of the picture."""
    falls = 0
    for kind in FIXED:
        for i in range(40):
            edit = world.edit(3, i, "combinations", kind)
            others = [replace(scene, tile=(7 - scene.tile[0], *scene.tile[1:])) for scene in (edit.source, edit.target)]
            before, after, before_2, after_2 = world.render([edit.source, edit.target, *others])
            undone = kind == "style" and bool(edit.source.style)
            differs = torch.equal(before, before_2) and not torch.equal(after, after_2)
            turns = kind == "weather" and {edit.source.condition, edit.target.condition} == {"rain", "snow"}
            assert is_fixed(edit) == (not differs and not undone and not turns), edit
            if kind == "style" and not undone:
                filtered = FILTERS[edit.target.style]((before[None] + 1) / 2) * 2 - 1
                assert (filtered[0] - after).abs().mean() < 1e-4                     # of 2; a gray level is 8e-3
            falls += differs
    assert falls and not any(is_fixed(world.edit(3, 0, "combinations", kind)) for kind in ("object", "place", "add"))


def test_psnr_is_a_slow_loop_inside_and_outside(world):
    g = torch.Generator().manual_seed(0)
    before, after, edits = world.pairs(0, 0, 3, "combinations", "remove")
    edited = (after + .2 * torch.randn(after.shape, generator=g)).clamp(-1, 1)
    oracle = Oracle(world)

    def make(b, a, these, seeds):
        oracle.scenes = [e.target for e in these]
        return edited if these == edits else a

    found = [v for v in judge_edits(world, oracle, make, 30, batch_size=3) if v.edit in edits]
    assert [v.edit for v in found] == edits
    same = unchanged(before, after)
    for i, v in enumerate(found):
        errors = {True: [], False: []}
        for row in range(128):
            for column in range(128):
                still = max(abs(before[i, c, row, column].item() - after[i, c, row, column].item()) for c in range(3)) < .02
                assert still == same[i, 0, row, column].item()
                errors[still] += [(edited[i, c, row, column] - after[i, c, row, column]).item() ** 2 for c in range(3)]
        decibels = lambda values: 10 * math.log10(4 / statistics.fmean(values))
        assert v.distance["inside"] == pytest.approx(decibels(errors[False]), abs=1e-3)
        assert v.distance["outside"] == pytest.approx(decibels(errors[True]), abs=1e-3)
        assert v.distance["psnr"] == pytest.approx(decibels(errors[True] + errors[False]), abs=1e-3)
        break                                                             # a slow loop
    assert torch.equal(psnr(edited, after), psnr(edited, after, torch.ones_like(same)))


def test_summary_is_the_mean_by_hand():
    verdict = lambda kind, asked, kept, **distances: Verdict(
        "", SimpleNamespace(kind=kind), None, None, asked, kept, distances)
    rows = [verdict("time", {"condition": True}, {"things": True, "place": True}, psnr=20., inside=10.),
            verdict("size", {"size": True}, {"things": False, "place": True}, psnr=30., inside=20., outside=40.),
            verdict("place", {"place": False}, {"things": True}, psnr=3.),
            verdict("remove", {"things": True}, {"place": True, "color": False}, psnr=math.inf, inside=30., outside=20.)]
    summary = summarize(rows)
    assert summary.pop("kept") == dict.fromkeys(ATTRIBUTES) | {"things": 2 / 3, "place": 1.0, "color": 0.0}
    assert summary == dict(count=4, right=.25, success=.75, preserved=.5, psnr=50.0, inside=20.0, outside=30.0)


def test_each_edit_has_its_own_noise_as_sample_py_makes_it(world, files):
    model, settings = InstructPix2Pix.load(files / "editor.safetensors"), dict(steps=2, cfg_text=2.0, cfg_image=1.5)
    before, after, edits = world.pairs(0, 0, 2, "phrasings", "object")
    both = edit_pixels(model, settings, before, after, edits, [5, 6])
    for picture, image, edit, seed in zip(to_images(both), to_images(before), edits, (5, 6)):
        alone, = model.edit(image, edit.instruction, seed=seed, progress=False, **settings)
        assert (to_pixels(alone, 128, 128) - to_pixels(picture, 128, 128)).abs().max() <= 2.01 / 255       # one gray level


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*words):
    return evaluate.run_command([str(word) for word in words])


def test_edits_command_makes_tables_rows_and_sheets(files, tmp_path, capsys):
    models = [files / "editor.safetensors", tmp_path / "other.safetensors"]
    models[1].symlink_to(models[0])
    assert run("edits", "--count", 2, "--model", *models, "--scorer", files / "scorer.safetensors", "--steps", 2, 1,
               "--cfg-image", 1, "--json", tmp_path / "rows.jsonl", "--sheet", tmp_path / "sheets", "--device", "cpu") == 0
    rows, out = rows_of(tmp_path / "rows.jsonl"), capsys.readouterr().out
    names = ["true edit", "true edit, autoencoder", "unedited",
             *(f"{os.path.relpath(m)}, {steps} steps" for m in models for steps in (2, 1))]
    assert list(dict.fromkeys(r["edited_by"] for r in rows)) == names and len(rows) == 7 * 3 * 11
    for name in names:
        assert out.count(f"\n| {name} | ") == 7
        own = {(r["split"], r["kind"]): r for r in rows if r["edited_by"] == name}
        assert [own[split, "all"]["count"] for split in ("combinations", "phrasings", "both")] == [10, 10, 20]
        for figure in ("right", "success", "preserved"):                   # the parts make up the whole
            mean = statistics.fmean(own[split, kind][figure] for split in SPLITS for kind in KINDS)
            assert own["both", "all"][figure] == pytest.approx(mean)
        assert own["both", "object"]["psnr"] is None and own["both", "time"]["psnr"] > 0
    assert all(a["psnr"] == b["psnr"] for a, b in zip(rows[99:132], rows[165:198]))                # the same model, 2 steps
    assert rows[-1]["steps"] == 1 and rows[-1]["cfg_text"] == 2 and rows[-1]["cfg_image"] == 1
    sheets = sorted(p.name for p in (tmp_path / "sheets").iterdir())
    assert len(sheets) == 14 and sum(name.endswith("-worst.png") for name in sheets) == 7
    assert Image.open(tmp_path / "sheets" / "unedited-first.png").width == 6 * 134


# ---- pictures

def test_pictures_are_judged_by_what_their_captions_say(world):
    said = dict(color=0, condition=0)
    for split in SPLITS:
        for i in range(60):
            scene, caption = world.caption(5, i, split)
            truth = read_scene(world, scene)
            found = judge_picture(world, scene, caption, truth)
            assert all(all(values) for values in found.values()) and len(found["object"]) == len(scene.things)
            wrong = judge_picture(world, scene, caption, replace(truth, place="nowhere", condition="noon", things={
                noun: spoiled(truth, "color", noun, world).things[noun] for noun in truth.things}))
            assert wrong["place"] == [False] and all(wrong["things"] + wrong["size"] + wrong["style"])
            dropped = any(thing.color and thing.color not in caption.lower().split() for thing in scene.things)
            assert len(wrong["color"]) == (0 if scene.style in COLORLESS else len(scene.things) - sum(
                bool(t.color) for t in scene.things) * dropped) and not any(wrong["color"])
            assert wrong.get("condition", [False]) == [False]
            said["color"] += dropped
            said["condition"] += scene.condition != "day" and "condition" not in wrong
    assert all(said.values())                                              # some captions leave a colour or a condition out
    missing = judge_picture(world, scene, caption, replace(truth, things={}))
    assert not any(missing["object"] + missing["things"]) and missing["color"] == missing["size"] == []


def test_pictures_command(files, tmp_path, capsys):
    assert run("pictures", "--count", 6, "--model", files / "base.safetensors", "--scorer", files / "scorer.safetensors",
               "--steps", 1, 2, "--batch-size", 2, "--dtype", "bf16", "--json", tmp_path / "rows.jsonl",
               "--device", "cpu") == 0
    rows = rows_of(tmp_path / "rows.jsonl")
    names = ("true picture", "true picture, autoencoder", "drawn, 1 steps", "drawn, 2 steps")
    assert [(r["picture"], r["split"]) for r in rows] == [(name, split) for name in names for split in SPLITS]
    assert all(0 <= r["object"] <= 1 and 0 <= r["place"] <= 1 for r in rows)
    assert capsys.readouterr().out.count("\n| drawn, 1 steps | phrasings | ") == 1


# ---- the curve

CURVE = ["--cfg-image", 1, 2, "--strengths", 0, 1, "--shares", .5, "--steps", 2, "--batch-size", 2, "--device", "cpu"]


def curve(files, *words):
    return run("curve", "--model", files / "editor.safetensors", "--base", files / "base.safetensors",
               "--clip", files / "clip.safetensors", *CURVE, *words)


def test_curve_points_are_means_of_each_method_by_itself(world, files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert curve(files, "--count", 3, "--json", tmp_path / "rows.jsonl", "--plot", tmp_path / "c.png", "--cfg-text", 3) == 0
    rows = {(r["method"], r["value"]): r for r in rows_of(tmp_path / "rows.jsonl")}
    assert [*rows] == [("data", None), ("ip2p", 1), ("ip2p", 2), ("sdedit", 0), ("sdedit", 1), ("p2p", .5)]
    assert Image.open(tmp_path / "c.png").size == (840, 600)
    editor, base = (InstructPix2Pix.load(files / f"{name}.safetensors") for name in ("editor", "base"))
    judge = ClipSimilarity.load(files / "clip.safetensors")
    edits = [world.edit(0, i, "combinations", KINDS[i]) for i in range(3)]
    before = [to_images(world.render([e.source]))[0] for e in edits]

    def by_itself(e, image, method, value):
        texts, settings = [e.caption, e.edited_caption], dict(steps=2, cfg_text=3.0, progress=False)
        if method == "ip2p":
            return editor.edit(image, e.instruction, cfg_image=value, **settings)[0]
        if method == "sdedit":
            return sdedit(base, image, e.edited_caption, strength=value, **settings)
        if method == "p2p":
            control = prompt_to_prompt(base.tokenizer, texts, 2, cross_replace_steps=value, self_replace_steps=value / 2)
            inverted = InvertedPicture(base, image, e.caption, optimize=False, **settings)
            return inverted.edit([e.edited_caption], control, progress=False)[1]
        return to_images(world.render([e.target]))[0]

    for (method, value), row in rows.items():
        results = [by_itself(e, image, method, value) for e, image in zip(edits, before)]
        scores = [judge(to_pixels(a, 128, 128)[None], to_pixels(b, 128, 128)[None], [e.caption], [e.edited_caption])[0]
                  for e, a, b in zip(edits, before, results)]
        for name, key in (("sim_direction", "clip_sim_dir"), ("sim_image", "clip_sim_image"), ("sim_1", "clip_sim_1")):
            mean = statistics.fmean(s[key] for s in scores)
            assert row[name] == pytest.approx(mean, abs=.01), (method, value, name)             # results have 8 bits
    assert rows["sdedit", 0] != rows["sdedit", 1] and rows["ip2p", 1] != rows["ip2p", 2]
    assert capsys.readouterr().out.count("| InstructPix2Pix | ") == 2


def test_curve_of_a_data_set_takes_its_last_prompts(files, tmp_path, capsys):
    colors = ["red", "green", "blue"]
    for i, color in enumerate(colors):
        folder = tmp_path / "data" / f"{i:07}"
        folder.mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (160, 128), color if k else "white").save(folder / f"7_{k}.jpg")
        prompt = dict(caption="a wall", edit=f"make it {color}", output=f"a {color} wall")
        (folder / "prompt.json").write_text(json.dumps(prompt))
    seeds = [[f"{max(i - 17, 0):07}", ["7"]] for i in range(20)]                 # of which training holds back two
    (tmp_path / "data" / "seeds.json").write_text(json.dumps(seeds))
    assert curve(files, "--count", 3, "--data", tmp_path / "data", "--json", tmp_path / "rows.jsonl") == 0
    row, judge = rows_of(tmp_path / "rows.jsonl")[0], ClipSimilarity.load(files / "clip.safetensors")
    flat = lambda color: to_pixels(Image.new("RGB", (128, 128), color), 128, 128)[None]
    scores = [judge(flat("white"), flat(c), ["a wall"], [f"a {c} wall"])[0] for c in colors[1:]]
    mean = statistics.fmean(s["clip_sim_dir"] for s in scores)
    assert row["count"] == 2 and row["sim_direction"] == pytest.approx(mean, abs=.02)           # of JPEG files
    listed = tmp_path / "listed.jsonl"
    listed.write_text(json.dumps(dict(input_image="a.png", edited_image="b.png", edit_prompt="make it red")))
    assert curve(files, "--count", 2, "--data", listed) == 2
    assert "without captions" in capsys.readouterr().err


def clean_latents(model, pixels):
    return model.encode(pixels) * model.vae.config.scale_factor


def test_pairs_are_measured_each_by_itself(world, tmp_path):
    """With the shipped base and CLIP, as random ones have no thresholds."""
    sheets, control = tmp_path / "new" / "sheets", "cross-attention"
    assert run("pairs", "--count", 3, "--steps", 2, "--shares", 0.5, "--controls", control, "--batch-size", 2, "--sheet", sheets,
               "--json", tmp_path / "rows.jsonl") == 0
    assert [p.name for p in sheets.iterdir()] == [f"{control}-0.5.png"]
    row, = rows_of(tmp_path / "rows.jsonl")
    base, clip = InstructPix2Pix.load(WEIGHTS / "mini-sd.safetensors"), WEIGHTS / "mini-clip.safetensors"
    judge, limits, found = ClipSimilarity.load(clip), Thresholds.of(clip), []
    edits = (world.edit(0, i, "combinations", FIXED[i % len(FIXED)]) for i in count())
    scorer = load_scorer(WEIGHTS / "mini-scorer.safetensors")
    for seed, e in enumerate(islice(filter(is_fixed, edits), 3)):
        before, after = (world.render([scene]) for scene in (e.source, e.target))
        texts, settings = ([e.caption], [e.edited_caption]), ([seed], [0.5], [base.own_settings["cfg_text"]])
        noise = invert(base, clean_latents(base, before), [e.caption], 2, progress=False)[-1]
        scores, = judge(*base.draw_pairs(*texts, *settings, steps=2, control=control), *texts)
        drawn = [scorer.read(picture)[0] for picture in base.draw_pairs(*texts, *settings, steps=2, control=control)]
        asked, preserved = (all(group.values()) for group in judge_pair(world, e, *drawn))
        as_captioned = drawn[0].place == e.source.place and {t.noun for t in e.source.things} <= set(drawn[0].things)
        source, target = base.draw_pairs(*texts, *settings, steps=2, control=control, sampler="ddim", x_T=noise)
        decibels = lambda a, b: -10 * math.log10((a - b).square().mean() / 4)
        found.append(dict(kept=limits.passed_by(scores), sim_dir=scores["clip_sim_dir"], sim_image=scores["clip_sim_image"],
                          asked=asked, preserved=preserved, right=asked and preserved and as_captioned,
                          source_psnr=decibels(source, before), psnr=decibels(target, after), unedited=decibels(before, after),
                          autoencoder=decibels(base.decode(clean_latents(base, after)).clamp(-1, 1), after)))
    for name in found[0]:
        assert row[name] == pytest.approx(statistics.fmean(f[name] for f in found), rel=1e-4), name


# ---- what users get wrong

@pytest.mark.parametrize("words, message", [
    (["edits", "--count", 0], "--count must be at least 2, got 0"),
    (["pictures", "--batch-size", 0], "--batch-size must be at least 1, got 0"),
    (["edits", "--device", "abacus"], "--device abacus cannot be used"),
    (["edits", "--model", "nowhere.safetensors"], "nowhere.safetensors"),
    (["edits", "--scorer", "CLIP"], "not a scorer"),
    (["edits", "--steps", 1, 0], "must be in 1..1000, got 0"), (["edits", "--cfg-text", "nan"], "must be in -1000..1000, got nan"),
    (["curve", "--strengths", 2], "must be in 0..1, got 2"), (["pairs", "--shares", -1], "must be in 0..1, got -1"),
    (["edits", "--seed", 2 ** 64], "must be in 0.."), (["edits", "--json", "FOLDER"], ": is a folder"),
    (["curve", "--base", "EDITOR"], "this model edits pictures")])
def test_mistakes_are_one_line_and_status_two(words, message, files, capsys):
    names = {"CLIP": files / "clip.safetensors", "EDITOR": files / "editor.safetensors", "FOLDER": files}
    defaults = [] if "--scorer" in words or words[0] == "curve" else ["--scorer", files / "scorer.safetensors"]
    defaults += ["--model", files / "editor.safetensors"] if words[0] == "curve" else []
    try:
        code = run(words[0], *defaults, *(names.get(word, word) for word in words[1:]))
    except SystemExit as stopped:                                     # argparse's own
        code = stopped.code
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_plot_without_matplotlib_is_one_line(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert curve(files, "--plot", "curve.png") == 2
    assert capsys.readouterr().err == "ip2p.evaluate: --plot takes matplotlib: pip install matplotlib\n"
