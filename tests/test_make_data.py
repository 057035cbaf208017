"""make_data.py: the published layout from start to end, and what is refused."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from making_data import LOOSE, METADATA, PROMPTS, ROOT, flags, make_data, rows, tree
from making_data import cli, models, whole                     # fixtures
from PIL import Image

from ip2p import InstructPix2Pix
from ip2p.checkpoint import load_checkpoint, save_checkpoint
from ip2p.clip_filter import ClipSimilarity, Thresholds
from ip2p.data import PairedDataset, read_jsonl
from ip2p.images import open_image, to_pixels


def published_examples(path):
    """What the published EditDataset finds: for each entry of seeds.json both pictures of each seed, and the instruction."""
    with open(path / "seeds.json") as file:
        seeds = json.load(file)
    for name, found in seeds:
        folder = path.joinpath(name)
        with open(folder.joinpath("prompt.json")) as file:
            prompt = json.load(file)["edit"]
        for seed in found:
            yield Image.open(folder.joinpath(f"{seed}_0.jpg")), Image.open(folder.joinpath(f"{seed}_1.jpg")), prompt


# ---- from start to end

def test_published_layout(whole):
    folders = [whole / f"{i:07d}" for i in range(5)]
    for folder, prompt in zip(folders, PROMPTS):
        assert json.loads((folder / "prompt.json").read_text("utf-8")) == prompt
        kept, drawn = rows(folder / "metadata.jsonl"), rows(folder / "samples.jsonl")
        assert len(kept) == 2 and len(drawn) == 3 and all(set(row) == METADATA for row in drawn)
        assert kept == sorted(drawn, key=lambda row: -row["clip_sim_dir"])[:2]
        assert {p.name for p in folder.glob("*.jpg")} == {f"{row['seed']}_{k}.jpg" for row in kept for k in range(2)}
        assert all(0 <= r["seed"] < 2 ** 32 and 0.1 <= r["p2p_threshold"] <= 0.9 and 2 <= r["cfg_scale"] <= 4 for r in drawn)
        quality = Image.open(next(folder.glob("*.jpg"))).quantization
        assert all(set(table) == {1} for table in quality.values())       # quality 100: nothing is divided away
    seeds = json.loads((whole / "seeds.json").read_text())
    assert seeds == [[f.name, sorted(p.name.split("_")[0] for p in f.glob("*_0.jpg"))] for f in folders]
    assert {p.name for p in whole.iterdir()} == {f.name for f in folders} | {"seeds.json", "settings.json", "sheet.png"}
    drawn = [(row["seed"], row["p2p_threshold"]) for folder in folders for row in rows(folder / "samples.jsonl")]
    assert len(set(drawn)) == 15


def test_the_published_reader_and_ours_find_the_same(whole):
    theirs = list(published_examples(whole))
    assert len(theirs) == 10 and all(a.size == b.size == (32, 32) and a.mode == "RGB" for a, b, _ in theirs)
    data = PairedDataset(whole, "all", min_resize_res=32, max_resize_res=32, crop_res=32, flip_prob=0.0)
    as_pixels = [(to_pixels(a, 32, 32), text) for a, _, text in theirs]
    for before, after, instruction in data:
        assert any(torch.equal(before, pixels) and text == instruction for pixels, text in as_pixels)
        assert not torch.equal(before, after)
    assert [text for *_, text in data] == [p["edit"] for p in PROMPTS]


def test_pictures_are_those_of_the_model_and_scores_those_of_the_stored_pictures(models, whole):
    model, judge = InstructPix2Pix.load(models / "sd.safetensors"), ClipSimilarity.load(models / "clip.safetensors")
    folder, prompt = whole / "0000001", PROMPTS[1]
    for row in rows(folder / "metadata.jsonl"):
        pixels = model.draw_pairs([prompt["input"]], [prompt["output"]], [row["seed"]], [row["p2p_threshold"]],
                                  [row["cfg_scale"]], steps=2)
        stored = [to_pixels(open_image(folder / f"{row['seed']}_{k}.jpg"), 32, 32)[None] for k in range(2)]
        assert all((a - b).abs().mean() < 0.02 for a, b in zip(pixels, stored))           # JPEG
        scores, = judge(*stored, [prompt["input"]], [prompt["output"]])
        assert all(abs(row[name] - value) < 1e-5 for name, value in scores.items())


def test_controls_and_samplers_draw_the_same_seeds_differently(cli, tmp_path, whole):
    pictures = [whole / "0000000"]
    for i, more in enumerate((["--control", "cross-attention"], ["--sampler", "ddim"])):
        assert cli(*more, "--shard", "0/5", "--max-out-samples", 3, out=tmp_path / str(i)).code == 0
        pictures.append(tmp_path / str(i) / "0000000")
    seed = rows(pictures[0] / "metadata.jsonl")[0]["seed"]
    assert len({(folder / f"{seed}_1.jpg").read_bytes() for folder in pictures}) == 3


def test_the_sheet_shows_kept_and_rejected(whole):
    sheet = np.asarray(Image.open(whole / "sheet.png").convert("RGB"))
    best = rows(whole / "0000000" / "metadata.jsonl")[0]["seed"]
    first = np.asarray(Image.open(whole / "0000000" / f"{best}_0.jpg"))
    assert np.array_equal(sheet[2:34, 3:35], first)
    assert sheet.shape[0] == 4 * (32 + 12 * 6 + 6)          # 5 kept pairs, then 5 others: two rows each


def test_settings_are_printed_first_and_the_training_command_last(cli, tmp_path):
    result = cli("--n-samples", 1)
    lines = result.out.splitlines()
    assert "steps=2" in lines[0] and "min_cfg=2.0" in lines[0] and "max_cfg=4.0" in lines[0]
    assert lines[-3].startswith("5 prompts, 5 pairs in ") and lines[-3].endswith("5 kept (100%)")
    assert lines[-1] == f"python train.py --stage edit --data {tmp_path / 'out'}"


def test_defaults_follow_the_model():
    def chosen(own, *more):
        args = make_data.parse(more)
        make_data.choose_settings(args, own)
        return args

    paper = chosen({})
    assert (paper.steps, paper.n_samples, paper.clip, paper.control) == (100, 100, "ViT-L-14:openai", "self-attention")
    assert (paper.min_cfg, paper.max_cfg) == (7.5, 15.0)
    assert (paper.min_p2p, paper.max_p2p, paper.max_out_samples) == (0.1, 0.9, 4)
    small = chosen({"data": "ip2p.world, core", "cfg_text": 3.0})
    assert (small.steps, small.n_samples, small.control, small.min_cfg, small.max_cfg) == (20, 8, "local-blend", 3.0, 6.0)
    assert Path(small.clip).name == "mini-clip.safetensors" and chosen({}, "--steps", "7").steps == 7
    assert make_data.choose_thresholds(paper) == Thresholds(0.2, 0.2, 0.7)


# ---- the filter

def test_only_what_passes_is_kept_and_a_prompt_without_pairs_keeps_its_record(cli, tmp_path, whole):
    drawn = [row for i in range(5) for row in rows(whole / f"{i:07d}" / "samples.jsonl")]
    middle = sorted(row["clip_sim_dir"] for row in drawn)[7]
    assert cli("--clip-dir-threshold", middle, "--max-out-samples", 3).code == 0
    for i in range(5):
        folder = tmp_path / "out" / f"{i:07d}"
        wanted = [row for row in rows(whole / folder.name / "samples.jsonl") if row["clip_sim_dir"] >= middle]
        assert rows(folder / "samples.jsonl") == rows(whole / folder.name / "samples.jsonl")
        assert {row["seed"] for row in rows(folder / "metadata.jsonl")} == {row["seed"] for row in wanted}
        assert len(list(folder.glob("*.jpg"))) == 2 * len(wanted) and (folder / "prompt.json").exists()
    assert sum(len(found) for _, found in json.loads((tmp_path / "out" / "seeds.json").read_text())) == 8
    assert cli("--check", tmp_path / "out").code == 0


def test_rejected_pictures_are_stored_for_the_first_prompts_or_if_asked(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "SHOWN", 1)
    assert cli("--clip-threshold", 1).code == 0 and cli("--clip-threshold", 1, "--keep-all", out=tmp_path / "all").code == 0
    for folder, stored in ((tmp_path / "out", [3, 0, 0, 0, 0]), (tmp_path / "all", [3] * 5)):
        assert [len(list((folder / f"{i:07d}").glob("**/*_1.jpg"))) for i in range(5)] == stored
        assert json.loads((folder / "seeds.json").read_text()) == []
        assert "a data set without pairs; --filter-only" in cli("--check", folder).out


def test_filter_only_gives_what_drawing_with_those_thresholds_gives(cli, tmp_path, whole):
    """From unfiltered pairs to scores and a loose filter; to a strict one and back."""
    out = tmp_path / "out"
    assert cli("--pairs-only").code == 0
    assert not list(out.glob("*/metadata.jsonl")) and json.loads((out / "seeds.json").read_text()) == []
    assert len(list(out.glob("*/rest/*.jpg"))) == 30 and "--filter-only chooses" in cli("--check", out).out
    assert "filter was None" in cli().err                                  # these have to be filtered first
    result = cli("--filter-only")
    assert result.code == 0 and "10 kept (67%)" in result.out
    assert tree(out) == tree(whole)
    assert "15 pairs" in cli("--filter-only", "--max-out-samples", 1).out and len(list(out.glob("*/*_0.jpg"))) == 5
    assert cli("--filter-only", "--clip-threshold", 1).code == 0 and not list(out.glob("*/*_0.jpg"))
    assert "clip_sim_0" in (out / "0000000" / "samples.jsonl").read_text() and cli("--check", out).code == 1
    assert cli("--filter-only").code == 0 and tree(out) == tree(whole)
    assert cli().code == 0 and tree(out) == tree(whole)                    # and drawing could go on


@pytest.mark.parametrize("own, clip", [
    (dict(miniature=True, filter=None), "mini-clip.safetensors"), (dict(miniature=False, filter=None), "ViT-L-14:openai"),
    (dict(miniature=True, filter=dict(clip="RN50:openai")), "RN50:openai")])
def test_filter_only_goes_by_what_judged_the_pairs_or_drew_them(tmp_path, capsys, whole, own, clip):
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "settings.json").write_text(json.dumps(dict(model="mine.safetensors") | own))
    assert make_data.run(["--filter-only", "--out", str(out)]) == 0
    assert f"{clip} max_out_samples" in capsys.readouterr().out


def test_filter_only_with_a_clip_that_is_not_here_changes_nothing(tmp_path, capsys, whole):
    out = shutil.copytree(whole, tmp_path / "out")
    for flags in (["--clip", "RN5O:openai"], ["--clip", "nowhere.safetensors"]):
        assert make_data.run(["--filter-only", "--out", str(out), *flags]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1 and tree(out) == tree(whole)


def test_a_clip_is_stored_so_that_it_is_found_again(tmp_path, monkeypatch):
    """The shipped one by its name; a file of the same name elsewhere, or behind an architecture, by its whole path."""
    for name in ("mini-clip.safetensors", "clip.pt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    names = {make_data.MINIATURE["clip"]: "mini-clip.safetensors", "mini-clip.safetensors": f"{tmp_path}/mini-clip.safetensors",
             "ViT-L-14-quickgelu:clip.pt": f"ViT-L-14-quickgelu:{tmp_path}/clip.pt", "ViT-L-14:openai": "ViT-L-14:openai"}
    assert {clip: make_data.name_of(clip) for clip in names} == names


def test_a_filter_that_was_stopped_goes_on_with_its_clip(models, tmp_path, capsys, monkeypatch, whole):
    """With another CLIP, and stopped before the third of five prompts: repeated without a word of the CLIP, it ends as if it
    had not been stopped."""
    from ip2p.clip_filter import load_clip, save_clip
    (clip, record), outs = load_clip(models / "clip.safetensors"), [tmp_path / "once", tmp_path / "twice"]
    for p in clip.parameters():
        p.mul_(1.1)
    save_clip(clip, record["clip"], tmp_path / "other.safetensors", {})
    score, left = make_data.score, [2]

    def stopping(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        score(*args)

    for out in outs:
        shutil.copytree(whole, out)
    begin = ["--filter-only", *LOOSE, "--batch-size", "99", "--clip", str(tmp_path / "other.safetensors")]
    assert make_data.run([*begin, "--out", str(outs[0])]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(make_data, "score", stopping)
        assert make_data.run([*begin, "--out", str(outs[1])]) == 130
    assert make_data.run(["--out", str(outs[1]), *LOOSE, "--batch-size", "99", "--filter-only"]) == 0
    assert tree(outs[0]) == tree(outs[1]) != tree(whole)


def test_filter_only_of_odd_sets(models, tmp_path, capsys):
    """Pictures of several sizes, a pair that is listed twice, one that is not listed, a score that is none."""
    folder = tmp_path / "0000000"
    folder.mkdir()
    (folder / "prompt.json").write_text(json.dumps(dict(caption="a fox", edit="make it blue", output="a blue fox")))
    for seed, side in ((1, 32), (2, 48), (3, 32)):
        for k in range(2):
            Image.new("RGB", (side, side), "red").save(folder / f"{seed}_{k}.jpg")
    none = dict.fromkeys(("clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image"))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(dict(seed=seed) | none) + "\n" for seed in (1, 2, 2)))
    clip = "--clip", str(models / "clip.safetensors")
    assert make_data.run(["--filter-only", "--out", str(tmp_path), *LOOSE, *clip]) == 0
    listed = [row["seed"] for _, row in read_jsonl(folder / "metadata.jsonl")]
    assert sorted(listed) == [1, 2, 3] == sorted(int(p.name[0]) for p in folder.glob("*_0.jpg"))
    (folder / "samples.jsonl").write_text("".join(json.dumps(dict(seed=seed) | none) + "\n" for seed in (1, 2, 3)))
    assert make_data.run(["--filter-only", "--out", str(tmp_path)]) == 0 and "0 kept" in capsys.readouterr().out
    (folder / "samples.jsonl").write_text("{}\n")
    assert make_data.run(["--filter-only", "--out", str(tmp_path)]) == 2
    assert "samples.jsonl:1: a pair without its seed" in capsys.readouterr().err


def test_filter_only_scores_again_only_with_a_clip(models, tmp_path, capsys, whole):
    """No CLIP is loaded where all has been scored; and a set of the published program has no samples.jsonl."""
    out = tmp_path / "published"
    for i in range(5):
        (out / f"{i:07d}").mkdir(parents=True)
        for file in (whole / f"{i:07d}").iterdir():
            if file.is_file() and file.name != "samples.jsonl":
                (out / f"{i:07d}" / file.name).write_bytes(file.read_bytes())
    (out / "seeds.json").write_bytes((whole / "seeds.json").read_bytes())
    best = [rows(whole / f"{i:07d}" / "metadata.jsonl")[0] for i in range(5)]
    assert make_data.run(["--filter-only", "--out", str(out), *LOOSE, "--max-out-samples", "1"]) == 0
    assert [rows(out / f"{i:07d}" / "metadata.jsonl") for i in range(5)] == [[row] for row in best]
    assert [found for _, found in json.loads((out / "seeds.json").read_text())] == [[str(row["seed"])] for row in best]
    for i in range(5):                                                     # scores that are not so
        file = out / f"{i:07d}" / "samples.jsonl"
        file.write_text("".join(json.dumps(row | {"clip_sim_dir": 0.5}) + "\n" for row in rows(file)))
    scoring = ["--clip", str(models / "clip.safetensors"), "--device", "cpu"]
    assert make_data.run(["--filter-only", "--out", str(out), *LOOSE, *scoring]) == 0
    again = [rows(out / f"{i:07d}" / "metadata.jsonl")[0] for i in range(5)]
    assert all(a["seed"] == b["seed"] and abs(a["clip_sim_dir"] - b["clip_sim_dir"]) < 1e-4 for a, b in zip(again, best))
    assert make_data.run(["--check", str(out)]) == 0


def test_looser_thresholds_say_what_was_not_stored(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "SHOWN", 0)
    assert cli("--clip-threshold", 1).code == 0 and not list((tmp_path / "out").glob("**/*.jpg"))
    assert "15 more would pass, but their pictures were not stored" in cli("--filter-only").out


# ---- edits

def test_edits_are_written_from_captions_then_drawn(cli, models, tmp_path, monkeypatch, capsys):
    """The language model is stood in for; what it writes and how it resumes is tested with it."""
    from ip2p import edits
    asked = []

    class Writer(edits.EditWriter):
        def __init__(self):
            self.model = torch.nn.Linear(1, 1)
            torch.nn.init.zeros_(self.model.weight), torch.nn.init.zeros_(self.model.bias)

        def complete(self, caption, seed):
            asked.append(caption)
            return "nonsense" if "bad" in caption else edits.make_completion("make it night", caption + " at night")

    monkeypatch.setattr(edits.EditWriter, "load", classmethod(lambda cls, path, device=None: Writer()))
    (tmp_path / "captions.txt").write_text("a fox\na bad one\na boat\na fox\na cat\n")
    argv = [a for a in flags(models, tmp_path / "out") if a not in ("--prompts-file", str(models / "prompts.jsonl"))]
    argv += ["--captions", str(tmp_path / "captions.txt"), "--n-samples", "1", "--num-captions", "2"]
    assert make_data.run([*argv, "--edits-only"]) == 0
    assert [p.name for p in (tmp_path / "out").glob("0*")] == [] and asked == ["a fox", "a bad one", "a boat"]
    assert make_data.run([*argv, "--pairs-only", "--out", str(tmp_path / "empty")]) == 2
    assert make_data.run(argv) == 0 and len(asked) == 3
    assert [row["output"] for row in rows(tmp_path / "out" / "edits.jsonl")] == ["a fox at night", "a boat at night"]
    first = tree(tmp_path / "out")
    assert json.loads(first["0000001/prompt.json"])["caption"] == "a boat"
    assert make_data.run([*argv, "--num-captions", "9"]) == 0 and asked[3:] == ["a cat"]  # more of them, later
    then = tree(tmp_path / "out")
    assert "0000002/prompt.json" in then and all(then[k] == first[k] for k in first if k.startswith("000000"))
    assert make_data.run(["--check", str(tmp_path / "out")]) == 0
    (tmp_path / "pairs").mkdir()
    shutil.copy(tmp_path / "out" / "edits.jsonl", tmp_path / "pairs")
    assert make_data.run([*argv, "--pairs-only", "--out", str(tmp_path / "pairs")]) == 0       # all, whatever --num-captions is
    assert len(list((tmp_path / "pairs").glob("0*"))) == 3
    for shard in ("0/2", "1/2"):                                           # the second does not wait for what will not come
        assert make_data.run([*argv, "--seed", "1", "--shard", shard]) == 2
        assert "holds edits made with other settings (seed was 0, now 1)" in capsys.readouterr().err
    assert tree(tmp_path / "out") == then

    # The file of captions may grow at its end, and may not change otherwise.
    text = (tmp_path / "captions.txt").read_text()
    (tmp_path / "captions.txt").write_text(text + "a tree\n")
    assert make_data.run([*argv, "--num-captions", "9"]) == 0 and asked[4:] == ["a tree"]
    then = tree(tmp_path / "out")
    (tmp_path / "captions.txt").write_text("a wolf\n" + text)
    assert make_data.run([*argv, "--num-captions", "9"]) == 2
    assert "before it changed; new captions may only follow" in capsys.readouterr().err and tree(tmp_path / "out") == then

    # What cannot work is found before edits are written.
    for text, more, words in (("a fox\n", ["--min-p2p", ".9", "--max-p2p", ".1"], "--min-p2p 0.9 is above"),
                              ("a fox\n", ["--model", "nowhere.safetensors"], "nowhere.safetensors"),
                              ("a fox\n", ["--clip", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
                              ("\n", [], "captions.txt: holds no captions"), (None, [], "captions.txt: no such file")):
        (tmp_path / "captions.txt").unlink()
        if text:
            (tmp_path / "captions.txt").write_text(text)
        else:
            (tmp_path / "captions.txt").mkdir()
        assert make_data.run([*argv, *more, "--out", str(tmp_path / "new")]) == 2
        assert words in capsys.readouterr().err and not any((tmp_path / "new").iterdir())
    (tmp_path / "captions.txt").rmdir()
    (tmp_path / "captions.txt").write_text("a bad one\n")                  # edits.json would say that the edits are written
    for _ in range(2):
        assert make_data.run([*argv, "--out", str(tmp_path / "new")]) == 2
        assert "wrote an edit for none of its 1 captions" in capsys.readouterr().err
    (tmp_path / "captions.txt").write_text("a fox\n")
    assert make_data.run([*argv, "--out", str(tmp_path / "new"), "--num-captions", "1"]) == 0


def test_a_data_set_in_another_layout_is_left_alone(cli, models, tmp_path):
    """The seeds.json of what was drawn would come first, and hide it."""
    for name in ("pairs.jsonl", "data/train-0.parquet"):
        out = tmp_path / name.partition(".")[0]
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("{}\n")
        assert f"holds other data, {Path(name).name}: give another --out" in cli(out=out).err
        assert not list(out.glob("*.json"))
    prompts = tmp_path / "mine" / "prompts.jsonl"                            # what is drawn may lie beside its prompts
    prompts.parent.mkdir()
    shutil.copy(models / "prompts.jsonl", prompts)
    for _ in range(2):
        assert cli("--prompts-file", prompts, "--n-samples", 1, out=prompts.parent).code == 0


def test_an_edit_to_a_held_out_combination_is_not_drawn(models, tmp_path, monkeypatch):
    from ip2p import edits
    from ip2p.world import World
    from ip2p.world_reader import read
    world, outputs = World(), []

    def complete(self, caption, seed):
        color = list(world.colors)[len(outputs) % len(world.colors)]
        outputs.append(f"a {color} fox in a meadow")
        return edits.make_completion("paint it", outputs[-1])

    monkeypatch.setattr(edits.EditWriter, "complete", complete)
    gpt = ROOT / "weights" / "mini-gpt.safetensors"
    assert make_data.run([*map(str, ("--edits-only", "--out", tmp_path, "--gpt", gpt, "--num-captions", 12, "--device", "cpu"))]) == 0
    held_out = [text for text in outputs if world.holds_out(read(text))]
    written = [row["output"] for row in rows(tmp_path / "edits.jsonl")]
    assert held_out and written == [text for text in outputs if text not in held_out] and len(written) == 12


# ---- what cannot work

@pytest.mark.parametrize("more, words", [
    (["--prompts-file", "nowhere.jsonl"], "nowhere.jsonl: no such file"), (["--model", "nowhere.safetensors"], "nowhere"),
    (["--clip", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
    (["--min-cfg", "9", "--max-cfg", "8"], "--min-cfg 9.0 is above --max-cfg 8.0"),
    (["--min-p2p", "1.5"], "must be in 0..1"), (["--min-p2p", "0.95"], "--min-p2p 0.95 is above --max-p2p 0.9"),
    (["--shard", "2/2"], "0 <= i < n"), (["--shard", "x"], "0 <= i < n"), (["--n-samples", "0"], "must be in 1.."),
    (["--device", "cuda:77"], "cannot be used here"), (["--filter-only"], "holds no pairs to filter"),
    (["--edits-only", "--pairs-only"], "exclude one another"), (["--edits-only"], "give one of the two"),
    (["--num-captions", "5"], "--num-captions is for edits that are yet to be written"), (["--gpt", "x"], "--gpt is for edits"),
    (["--captions", "x"], "--captions is for edits"), (["--out", "/proc/pairs"], "--out /proc/pairs: cannot be written")])
def test_bad_input_is_one_line(cli, more, words):
    result = cli(*more)
    err = result.err.splitlines()[-1]
    assert result.code == 2 and err.startswith("make_data.py: ") and words in err and "Traceback" not in result.err


@pytest.mark.parametrize("line, words", [("{", "not a line of JSON"), ('{"edit": "x", "output": "y"}', "'caption'"),
                                         ('{"caption": "x", "edit": "", "output": "y"}', "'edit'")])
def test_a_bad_prompt_is_found_before_anything_is_drawn(cli, tmp_path, line, words):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(PROMPTS[0]) + "\n" + line + "\n")
    result = cli("--prompts-file", file, "--shard", "0/2")
    assert result.code == 2 and "prompts.jsonl:2" in result.err and words in result.err
    assert not list((tmp_path / "out").iterdir())


def test_a_clip_that_cannot_be_had_leaves_the_folder_as_it_was(cli, models, tmp_path):
    """So that the command may be repeated with another."""
    wrong = cli("--clip", models / "sd.safetensors")
    assert wrong.code == 2 and "not a CLIP of this project" in wrong.err and not (tmp_path / "out" / "settings.json").exists()
    assert cli().code == 0


def test_a_file_without_prompts_is_refused(cli, tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    result = cli("--prompts-file", tmp_path / "none.jsonl")
    assert result.code == 2 and "none.jsonl: holds no prompts" in result.err


def test_a_folder_of_other_settings_or_prompts_is_left_alone(cli, models, tmp_path):
    assert cli("--n-samples", 1).code == 0
    before = tree(tmp_path / "out")
    assert "n_samples was 1, now 3" in cli().err
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(p) + "\n" for p in PROMPTS[1:]))
    assert "was made of another prompt" in cli("--n-samples", 1, "--prompts-file", other).err
    retrained = InstructPix2Pix.load(models / "sd.safetensors")
    retrained.unet.out[-1].bias += 1
    (tmp_path / "retrained").mkdir()
    retrained.save(tmp_path / "retrained" / "sd.safetensors")                        # the same name, other weights
    assert "weights was" in cli("--n-samples", 1, "--model", tmp_path / "retrained" / "sd.safetensors").err
    assert tree(tmp_path / "out") == before


def test_an_editor_is_refused(cli, models, tmp_path):
    parts = load_checkpoint(models / "sd.safetensors")
    parts.unet.widen(8)
    save_checkpoint(parts, tmp_path / "editor.safetensors")
    assert "text-to-image" in cli("--model", tmp_path / "editor.safetensors").err


def test_check_says_what_is_wrong_by_its_exit_status(cli, tmp_path):
    assert cli("--n-samples", 1).code == 0
    torn = next((tmp_path / "out").glob("*/*_1.jpg"))
    torn.write_bytes(torn.read_bytes()[:100])
    result = cli("--check", tmp_path / "out")
    assert result.code == 1 and str(torn) in result.out
