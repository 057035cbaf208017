"""Data sets of pairs: every layout read, examples by (seed, epoch, index) alone, and what is wrong found."""
import io
import json
import shutil
import sys
from collections import Counter
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ip2p.check_data import check_dataset
from ip2p.data import PairedDataset, find_pairs, keep_pictures, list_seeds, prompt_texts, read_jsonl

SMALL = dict(min_resize_res=16, max_resize_res=16, crop_res=16, flip_prob=0.0)


def picture(value, size=(16, 16)):
    """Red rises to the right, green downwards; blue is the value."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return Image.fromarray((np.stack([x, y, np.full_like(x, value / 255)], -1) * 255).round().astype(np.uint8))


def write_published(path, prompts=20, seeds=(7, 12), size=(16, 16), key="caption"):
    """A data set as the published program writes it; a picture's blue tells prompt, seed and whether it is edited."""
    for i in range(prompts):
        folder = path / f"{i:07d}"
        folder.mkdir(parents=True)
        record = {key: f"scene {i}", "edit": f"edit {i}", "output": f"scene {i}, edited", "url": "http://x"}
        (folder / "prompt.json").write_text(json.dumps(record))
        with open(folder / "metadata.jsonl", "w") as file:
            for s, seed in enumerate(seeds):
                for k in range(2):
                    picture(8 * i + 4 * s + 2 * k, size).save(folder / f"{seed}_{k}.jpg", quality=100, subsampling=0)
                row = dict(seed=seed, p2p_threshold=0.5, cfg_scale=9.0, clip_sim_0=0.3, clip_sim_1=0.3,
                           clip_sim_dir=0.3 - s / 10, clip_sim_image=0.8)
                file.write(json.dumps(row) + "\n")
    (path / "seeds.json").write_text(json.dumps([[f"{i:07d}", sorted(map(str, seeds))] for i in range(prompts)]))
    return path


def blue(pixels):
    return round(float((pixels[2].mean() + 1) * 127.5))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    torch.set_num_threads(1)
    return write_published(tmp_path_factory.mktemp("data") / "set")


# ---- layouts

@pytest.mark.parametrize("key", ["caption", "input"])
def test_published_layout(tmp_path, key):
    data = PairedDataset(write_published(tmp_path / "set", 3, key=key), "all", **SMALL)
    assert len(data) == 3
    for i, (before, after, instruction) in enumerate(data):
        assert instruction == f"edit {i}" and before.shape == after.shape == (3, 16, 16) and before.dtype == torch.float32
        assert min(abs(blue(before) - 8 * i - 4 * s) for s in range(2)) <= 1 and abs(blue(after) - blue(before) - 2) <= 1
        wanted = np.linspace(-1, 1, 16)
        assert np.abs(before[0, 0].numpy() - wanted).max() < 0.05 and np.abs(before[1, :, 0].numpy() - wanted).max() < 0.05


def test_an_epoch_has_one_random_pair_of_each_prompt(published):
    data = PairedDataset(published, "all", **SMALL)
    first = Counter((index, blue(data.example(epoch, index)[0]) % 8 > 2) for epoch in range(30) for index in range(3))
    assert all(5 <= first[index, second] <= 25 for index in range(3) for second in (False, True))
    assert sorted(data.order(0)) == list(range(20)) and data.order(0) != data.order(1) and data.order(1) == data.order(1)


def test_an_instruction_is_all_that_training_needs_of_a_prompt(tmp_path):
    write_published(tmp_path, 3)
    (tmp_path / "0000001/prompt.json").write_text(json.dumps(dict(edit="only this")))
    assert PairedDataset(tmp_path, "all", **SMALL)[1][2] == "only this"


def test_split_is_the_published_one(published):
    """First 90% of the prompts, then 5%, then 5%."""
    found = {split: [text for _, _, text in PairedDataset(published, split, **SMALL)] for split in ("train", "val", "test")}
    assert found == dict(train=[f"edit {i}" for i in range(18)], val=["edit 18"], test=["edit 19"])


@pytest.mark.parametrize("keys", [
    ("input_image", "edited_image", "edit_prompt"), ("source_img", "target_img", "instruction"), ("original_image", "edited_image", "edit_prompt"),
    ("input", "output", "edit"), ("input_image_file_name", "edited_image_file_name", "instruction")])
@pytest.mark.parametrize("name, names", [("metadata.jsonl", "{}.png"), ("pairs.jsonl", "{}_0.jpg")])         # the latter: as published
def test_folder_with_a_list(tmp_path, keys, name, names):
    (tmp_path / "a").mkdir()
    for i in range(3):
        picture(10 * i).save(tmp_path / "a" / names.format(i), "PNG")
    rows = [dict(zip(keys, (f"a/{names.format(i)}", f"a/{names.format(i + 1)}", f"edit {i}"))) for i in range(2)]
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    for path in (tmp_path, tmp_path / name):
        data = list(PairedDataset(path, "all", **SMALL))
        assert [(blue(a), blue(b), text) for a, b, text in data] == [(0, 10, "edit 0"), (10, 20, "edit 1")]
    assert check_dataset(tmp_path) == []


@pytest.mark.parametrize("first", ["input_image", "original_image"])
def test_parquet_with_the_hubs_columns(tmp_path, monkeypatch, first):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def encoded(value):
        buffer = io.BytesIO()
        picture(value).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    for n in range(2):
        rows = [{first: encoded(20 * n + 10 * i), "edited_image": encoded(100 + 20 * n + 10 * i),
                 "edit_prompt": f"edit {n}{i}", "extra": 1} for i in range(2)]
        (tmp_path / "data").mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data" / f"train-{n}.parquet")
    data = PairedDataset(tmp_path, "all", **SMALL)
    for _ in range(2):                                                   # pictures can be opened again
        assert [(blue(a), blue(b), text) for a, b, text in data] == [
            (20 * n + 10 * i, 100 + 20 * n + 10 * i, f"edit {n}{i}") for n in range(2) for i in range(2)]
    assert len(PairedDataset(tmp_path / "data" / "train-1.parquet", "all", **SMALL)) == 2
    shutil.copy(tmp_path / "data" / "train-1.parquet", tmp_path / "data" / "test-0.parquet")
    assert len(PairedDataset(tmp_path, "all", **SMALL)) == 4             # not trained on
    assert check_dataset(tmp_path) == []
    data.pairs.rows[1] = (*data.pairs.rows[1][:1], b"\x89PNG torn", *data.pairs.rows[1][2:])
    with pytest.raises(ValueError, match=r"train-0.parquet, row 1, input: "):
        data[1]
    size = sum(table.stat().st_size for table in (tmp_path / "data").glob("train-*"))
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": size - 1}.get)
    with pytest.raises(ValueError, match="GB of Parquet files, which every process holds in memory, and there are"):
        PairedDataset(tmp_path)
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": size}.get)
    (tmp_path / "x.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="x.parquet: not a Parquet file"):
        PairedDataset(tmp_path / "x.parquet")


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        PairedDataset(tmp_path / "x.parquet")


@pytest.mark.parametrize("files, words", [
    ({}, "not a data set"), ({"a.jsonl": "", "b.jsonl": ""}, "not a data set"), ({"a.jsonl": ""}, "without pairs"),
    ({"a.jsonl": "{"}, "a.jsonl:1: not a line of JSON"), ({"a.jsonl": "[1]"}, "a.jsonl:1: not a line of JSON"),
    ({"a.jsonl": b"\xff\xfe"}, "a.jsonl:1: not a line of JSON"), ({"seeds.json": "{}"}, r"needed a list of \[folder"),
    ({"seeds.json": "["}, "seeds.json: not JSON"), ({"seeds.json": "[]"}, "without pairs"),
    ({"a.jsonl": '{"input": "x.png", "output": "y.png"}'}, "a.jsonl:1: no instruction: needed one of edit_prompt"),
    ({"a.jsonl": '{"input": "x.png", "output": "y.png", "edit": " "}'}, "a.jsonl:1: no instruction")])
def test_what_is_no_data_set_is_one_line(tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words) as caught:
        PairedDataset(tmp_path)
    assert "\n" not in str(caught.value)


# ---- examples

def test_examples_depend_on_seed_epoch_and_index_alone(published):
    sizes = dict(min_resize_res=16, max_resize_res=24, crop_res=12)
    one, two = (PairedDataset(published, **sizes) for _ in range(2))
    wanted = [one.example(epoch, index) for epoch in range(2) for index in range(4)]
    two.epoch = 1
    torch.manual_seed(5)
    for (a, b, text), (epoch, index) in reversed(list(zip(wanted, [(e, i) for e in range(2) for i in range(4)]))):
        x, y, same = two[index] if epoch else two.example(epoch, index)
        assert torch.equal(a, x) and torch.equal(b, y) and text == same
    other = PairedDataset(published, seed=1, **sizes)
    assert not all(torch.equal(other[i][0], one[i][0]) for i in range(4))
    loader = torch.utils.data.DataLoader(one, batch_size=4, num_workers=2)                # in other processes
    assert torch.equal(next(iter(loader))[0], torch.stack([one[i][0] for i in range(4)]))


def test_both_pictures_are_resized_cropped_and_mirrored_together(tmp_path):
    """Red and green tell where a pixel comes from: the same places in both, and all that the ranges allow."""
    path = write_published(tmp_path / "set", 1, seeds=(1,), size=(64, 64))
    data, seen = PairedDataset(path, "all", min_resize_res=20, max_resize_res=28, crop_res=16), []
    for epoch in range(60):
        before, after, _ = data.example(epoch, 0)
        assert before.shape == (3, 16, 16) and (before[:2] - after[:2]).abs().max() < 0.05
        step = float(before[0, 8, 10] - before[0, 8, 5]) / 10                             # in units of the picture's width
        seen.append((step < 0, round(1 / abs(step)), round(float(before[1, 0, 0]), 1)))
    mirrored, sizes, tops = zip(*seen)
    assert 15 <= sum(mirrored) <= 45 and min(sizes) in (19, 20, 21) and max(sizes) in (27, 28, 29) and len(set(tops)) > 5


def test_shorter_side_is_resized_and_the_proportions_stay(tmp_path):
    path = write_published(tmp_path / "set", 1, seeds=(1,), size=(64, 32))
    data = PairedDataset(path, "all", **SMALL)
    before, _, _ = data[0]
    assert float(before[0].amax() - before[0].amin()) < 1.1 < 1.8 < float(before[1].amax() - before[1].amin())


def test_a_broken_picture_is_named_when_it_is_asked_for(tmp_path):
    path = write_published(tmp_path / "set", 2, seeds=(1,))
    file = path / "0000001" / "1_1.jpg"
    file.write_bytes(file.read_bytes()[:200])
    data = PairedDataset(path, "all", **SMALL)
    data[0]
    with pytest.raises(ValueError, match="0000001/1_1.jpg"):
        data[1]
    file.unlink()
    with pytest.raises(ValueError, match="0000001/1_1.jpg: no such picture"):
        data[1]


def test_modes_and_orientation_are_those_of_a_viewer(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3                                                     # upside down
    picture(0).rotate(180).save(tmp_path / "a.png", exif=exif)
    picture(0).convert("RGBA").save(tmp_path / "b.png")
    (tmp_path / "x.jsonl").write_text('{"input": "a.png", "output": "b.png", "edit": "x"}')
    before, after, _ = PairedDataset(tmp_path, "all", **SMALL)[0]
    assert torch.equal(before, after)


@pytest.mark.parametrize("options, words", [
    (dict(crop_res=17), "crop_res <= min_resize_res"), (dict(max_resize_res=15), "crop_res <= min_resize_res"),
    (dict(split="tests"), "split must be")])
def test_settings_that_cannot_work(published, options, words):
    with pytest.raises(ValueError, match=words):
        PairedDataset(published, **(SMALL | options))


# ---- folders of prompts

def test_list_seeds_is_that_of_the_published_program(published):
    """prepare_dataset.py: of every folder, the names of its *_0.jpg up to the underscore; empty ones are left out."""
    (published / "empty").mkdir(exist_ok=True)
    (published / "0000003" / "rest").mkdir(exist_ok=True)
    picture(0).save(published / "0000003" / "rest" / "5_0.jpg")
    wanted = []
    for folder in published.iterdir():
        if folder.is_dir():
            found = [p.name.split("_")[0] for p in sorted(folder.glob("*_0.jpg"))]
            if found:
                wanted.append([folder.name, found])
    assert list_seeds(published) == sorted(wanted) == json.loads((published / "seeds.json").read_text())
    shutil.rmtree(published / "0000003" / "rest")


def test_keeping_completes_what_was_interrupted(tmp_path):
    folder = write_published(tmp_path / "set", 1, seeds=(1, 2, 3)) / "0000000"
    rows = [row for _, row in read_jsonl(folder / "metadata.jsonl")]
    (folder / "rest").mkdir()
    (folder / "3_0.jpg").rename(folder / "rest" / "3_0.jpg")             # killed between the two
    (folder / "1_0.jpg").rename(folder / "rest" / "1_0.jpg")
    keep_pictures(folder, rows, [rows[2], rows[1]], tmp_path)
    assert {p.name for p in folder.glob("*.jpg")} == {"2_0.jpg", "2_1.jpg", "3_0.jpg", "3_1.jpg"}
    assert {p.name for p in folder.glob("rest/*")} == {"1_0.jpg", "1_1.jpg"}
    assert [row["seed"] for _, row in read_jsonl(folder / "metadata.jsonl")] == [3, 2]


# ---- what is wrong

def damage(action):
    """An action on `s.path` (the set), `s.folder` (its second prompt) and `s.seeds` (the text of seeds.json)."""
    return lambda path: action(SimpleNamespace(path=path, folder=path / "0000001", list=path / "seeds.json"))


def test_a_caption_is_found_beside_a_blank_under_its_other_name():
    """As files are written that were merged from both."""
    rest = {"edit": "make it night", "output": "a fox at night"}
    for record in ({"caption": None, "input": "a fox"}, {"caption": " ", "input": "a fox"}, {"caption": "a fox", "input": None}):
        assert prompt_texts(record | rest, "") == ["a fox", "make it night", "a fox at night"]
    with pytest.raises(ValueError, match="x.json: a prompt needs a text as 'caption'"):
        prompt_texts({"caption": None} | rest, "x.json")


def test_seeds_may_have_any_names(tmp_path):
    """An underscore among them too: what is listed is what is read."""
    folder = tmp_path / "0000000"
    folder.mkdir()
    for seed, side in product(("my_a", "my_b"), (0, 1)):
        picture(side).save(folder / f"{seed}_{side}.jpg")
    (folder / "prompt.json").write_text('{"caption": "a fox", "edit": "make it red", "output": "a red fox"}')
    (folder / "metadata.jsonl").write_text('{"seed": "my_a"}\n{"seed": "my_b"}\n')
    assert list_seeds(tmp_path) == [["0000000", ["my_a", "my_b"]]]
    (tmp_path / "seeds.json").write_text(json.dumps(list_seeds(tmp_path)))
    assert check_dataset(tmp_path) == [] and len(PairedDataset(tmp_path).pairs[0]) == 2


@pytest.mark.parametrize("name, text", [("seeds.json", "[]"), ("pairs.jsonl", ""), ("pairs.jsonl", "\n")])
def test_a_set_without_pairs_is_no_set(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    problem, = check_dataset(tmp_path)
    assert problem.endswith("a data set without pairs")


def test_a_table_beside_a_list_is_what_is_checked_as_it_is_what_is_read(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "train-0.parquet").write_bytes(b"no table")
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text('{"input_image": "a.png", "edited_image": "a.png", "edit_prompt": "leave it"}\n')
    assert "not a Parquet file" in check_dataset(tmp_path)[0]


def test_half_a_character_is_named():
    with pytest.raises(ValueError, match="x.json: 'edit' has half of a character"):
        prompt_texts({"caption": "a fox", "edit": "make it \ud83d", "output": "a red fox"}, "x.json")


def append(path, text):
    path.write_text(path.read_text() + text)


DAMAGE = {
    "a torn picture": (lambda s: (s.folder / "7_0.jpg").write_bytes((s.folder / "7_0.jpg").read_bytes()[:300]),
                       "7_0.jpg: cannot be read"),
    "no picture": (lambda s: (s.folder / "7_0.jpg").write_text("hello"), "7_0.jpg: not a picture"),
    "an empty picture": (lambda s: (s.folder / "7_1.jpg").write_bytes(b""), "7_1.jpg: "),
    "no partner": (lambda s: (s.folder / "7_1.jpg").unlink(), "7_1.jpg: no such picture"),
    "no input": (lambda s: (s.folder / "7_0.jpg").unlink(), "7_0.jpg: no such picture"),
    "two sizes": (lambda s: picture(0, (16, 24)).save(s.folder / "12_1.jpg"), "12_1.jpg: 16x24, but its input is 16x16"),
    "no prompt": (lambda s: (s.folder / "prompt.json").unlink(), "prompt.json: no such file"),
    "a torn prompt": (lambda s: (s.folder / "prompt.json").write_text('{"caption": "x", "ed'), "prompt.json: not JSON"),
    "no instruction": (lambda s: (s.folder / "prompt.json").write_text('{"caption": "x", "output": "y", "edit": " "}'),
                       "prompt.json: a prompt needs a text as 'edit'"),
    "a torn row": (lambda s: append(s.folder / "metadata.jsonl", '{"seed": 1'), "metadata.jsonl:3: not a line of JSON"),
    "a row twice": (lambda s: append(s.folder / "metadata.jsonl", (s.folder / "metadata.jsonl").read_text()),
                    "metadata.jsonl: seed 7 comes 2 times"),
    "a row too many": (lambda s: append(s.folder / "metadata.jsonl", '{"seed": 99}\n'),
                       "metadata.jsonl: no pictures of seed 99"),
    "no row": (lambda s: (s.folder / "metadata.jsonl").write_text('{"seed": 7}\n'), "metadata.jsonl: no line for 12_0.jpg"),
    "no rows": (lambda s: (s.folder / "metadata.jsonl").unlink(), "metadata.jsonl: no such file"),
    "no list": (lambda s: s.list.unlink(), "seeds.json: no such file"),
    "a torn list": (lambda s: s.list.write_text(s.list.read_text()[:-9]), "seeds.json: not JSON"),
    "another list": (lambda s: s.list.write_text('{"a": 1}'), "seeds.json: needed a list"),
    "a list with too much": (lambda s: s.list.write_text(s.list.read_text().replace('"12"', '"12", "13"', 1)),
                             "seeds.json: lists a pair that is not there: 0000000/13_0.jpg"),
    "a list with too little": (lambda s: s.list.write_text(s.list.read_text().replace('"12", ', "", 1)),
                               "seeds.json: does not list 0000000/12_0.jpg"),
    "an unsorted list": (lambda s: s.list.write_text(json.dumps(json.loads(s.list.read_text())[::-1])), "not sorted"),
    "a temporary folder": (lambda s: (s.path / ".shard-0-of-1.tmp").mkdir(), ".shard-0-of-1.tmp: left over"),
    "a temporary file": (lambda s: (s.folder / ".7_0.jpg.33.tmp").write_text(""), ".7_0.jpg.33.tmp: left over"),
    "a torn rejected picture": (lambda s: ((s.folder / "rest").mkdir(), (s.folder / "rest" / "5_0.jpg").write_text("x")),
                                "rest/5_0.jpg: not a picture")}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_damage_is_found_and_its_file_named(tmp_path, kind):
    path = write_published(tmp_path / "set", 3)
    assert check_dataset(path) == []
    action, words = DAMAGE[kind]
    damage(action)(path)
    problems = check_dataset(path)
    assert any(words in problem for problem in problems) and len(problems) <= 3, problems
    assert all(str(path) in problem and "\n" not in problem for problem in problems)


def test_prompts_in_folders_of_folders_are_read_and_checked(tmp_path):
    path = write_published(tmp_path / "set", 3)
    (path / "shard-00").mkdir()
    for folder in path.glob("0*"):
        folder.rename(path / "shard-00" / folder.name)
    (path / "seeds.json").write_text((path / "seeds.json").read_text().replace('["0', '["shard-00/0'))
    assert check_dataset(path) == [] and len(find_pairs(path)) == 3
    (path / "shard-00/0000001/7_0.jpg").unlink()
    assert any("0000001/7_0.jpg" in problem for problem in check_dataset(path))


def test_damage_in_a_list_of_files_is_found(tmp_path):
    picture(0).save(tmp_path / "a.png")
    picture(0, (16, 24)).save(tmp_path / "b.png")
    line = '{"input": "a.png", "output": "%s.png", "edit": "%s"}'
    rows = [line % ("a", "x"), line % ("b", "x"), line % ("c", "x"), line % ("a", ""), '{"inp', line % ("a", "x")]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    problems = check_dataset(tmp_path)
    for words in ("b.png: 16x24, but its input is 16x16", "c.png: no such picture", "x.jsonl:4: no instruction",
                  "x.jsonl:5: not a line of JSON", "x.jsonl:6: the same as an earlier line"):
        assert sum(words in problem for problem in problems) == 1, problems
    assert len(problems) == 5
    assert "not a data set" in check_dataset(tmp_path / "nowhere")[0]
