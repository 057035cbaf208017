"""The cache of a data set's latents and features: what it holds, when it is made anew, and that no end of a run harms it."""
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

import ip2p.features
from ip2p.data import PairedDataset
from ip2p.features import CachedPairs, LivePairs

SIZE, WEIGHTS = 16, torch.nn.Linear(3, 2)


def write_pairs(path, count=21, broken=()):
    """A data set as the published program writes it, whose pictures and instructions are all different."""
    for i in range(count):
        folder = path / f"{i:07d}"
        folder.mkdir(parents=True)
        (folder / "prompt.json").write_text(json.dumps(dict(caption="a", edit=f"edit {i % 4}", output="b")))
        for side in (0, 1):
            picture = Image.linear_gradient("L").resize((SIZE, SIZE)).rotate(90 * side)
            picture = Image.merge("RGB", (picture, picture, Image.new("L", picture.size, 5 * i + side)))
            picture.save(folder / f"1_{side}.png")
            (folder / f"1_{side}.png").rename(folder / f"1_{side}.jpg")
    (path / "seeds.json").write_text(json.dumps([[f"{i:07d}", ["1"]] for i in range(count)]))
    for i in broken:
        (path / f"{i:07d}" / "1_1.jpg").write_bytes(b"no picture")
    return path


def encode(before, after):
    """Stands for an autoencoder: means of 4 x 4 pixels. Half precision holds them exactly to 11 bits."""
    encode.seen += len(before)
    a, b = (torch.nn.functional.avg_pool2d(x, 4).half().float() for x in (before, after))
    return a, torch.stack([b, -b], 1)


def encode_text(texts):
    return torch.tensor([[[len(t), sum(t.encode())]] for t in texts]).half().float()


def open_data(path, **settings):
    return PairedDataset(path, "all", **dict(min_resize_res=SIZE, max_resize_res=SIZE, crop_res=SIZE, seed=3) | settings)


def open_cache(path, folder, views=2, batch_size=4, told=None, **settings):
    encode.seen = 0
    return CachedPairs(open_data(path, **settings), folder, views, encode, encode_text, batch_size=batch_size,
                       weights=[WEIGHTS], told=told or {})


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "set")


@pytest.mark.parametrize("broken", [(), (4, 5, 20)])
def test_cached_pairs_are_the_live_ones(tmp_path, broken):
    """Of the first epochs, of which there are as many as views, bit for bit: also where pictures cannot be read, and
    others take their place."""
    path = write_pairs(tmp_path / "set", broken=broken)
    cached = open_cache(path, tmp_path / "cache")
    rows = [slice(0, 1), slice(1, 4)]
    live = LivePairs(open_data(path), encode, steps=10, batch_size=4, parts=rows)
    for step in range(10):                                       # 40 of 2 x 21 examples
        for part in rows:
            a, b = cached.batch(step, part), live.batch(step, part)
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
            assert torch.equal(a[2], encode_text(b[2]))
    assert len(cached.skipped) == len(broken) and live.skipped == cached.skipped
    assert all("1_1.jpg: not a picture" in complaint for complaint in live.skipped)


def test_no_single_pair_stands_in_for_all_that_are_missing(tmp_path):
    """Half of the set is missing in a row, as when one of the published files was not downloaded."""
    path = write_pairs(tmp_path / "set", count=40, broken=range(10, 30))
    cached, data = open_cache(path, tmp_path / "cache"), open_data(path)
    for epoch, rows in enumerate(cached.row):
        assert sorted(data.stand_ins(epoch, 12)) == list(range(40))                       # every other is tried
        chosen = Counter((rows - 40 * epoch).tolist())
        assert not set(chosen) & set(range(10, 30)) and sum(chosen.values()) == 40
        assert len(chosen) > 12 and max(chosen.values()) <= 6                             # of 20, each is due twice


def test_what_is_skipped_is_counted_over_processes_and_stops(tmp_path):
    """Of an epoch of 21 examples, half of each step in a process of its own; the first is stopped after two steps."""
    path, file = write_pairs(tmp_path / "set", broken=(4, 5, 20)), tmp_path / "skipped.txt"
    halves, lives, encode.seen = [slice(0, 2), slice(2, 4)], [], 0
    for rows, steps in ((halves[0], range(2)), (halves[0], range(2, 6)), (halves[1], range(6))):
        lives.append(LivePairs(open_data(path), encode, steps=6, batch_size=4, parts=[rows], skipped=file))
        for step in steps:
            lives[-1].batch(step, rows)
    assert [live.skipped.count() for live in lives] == [3, 3, 3]
    alone = LivePairs(open_data(path), encode, steps=6, batch_size=4, parts=[halves[0]])
    for step in range(6):
        alone.batch(step, halves[0])
    assert 0 < alone.skipped.count() < 3                                        # so it takes both processes


def test_live_pairs_do_not_depend_on_where_they_begin_or_on_workers(pairs):
    def make(workers=0):
        return LivePairs(open_data(pairs), encode, steps=9, batch_size=4, parts=[slice(0, 2), slice(2, 4)], workers=workers)

    encode.seen, whole, later = 0, make(), make(workers=1)
    for step in range(9):
        for rows in (slice(0, 2), slice(2, 4)):
            batch = whole.batch(step, rows)
            if step >= 6:
                again = later.batch(step, rows)
                assert torch.equal(batch[0], again[0]) and batch[2] == again[2]


def test_a_second_run_encodes_nothing(pairs, tmp_path):
    open_cache(pairs, tmp_path / "cache")
    assert encode.seen == 43                                     # 2 views of 21 pairs, and a blank one to learn the shape
    again = open_cache(pairs, tmp_path / "cache")
    assert encode.seen == 1 and len(list((tmp_path / "cache").iterdir())) == 1
    assert again.batch(0, slice(0, 4))[0].shape == (4, 3, 4, 4)


def test_whatever_the_numbers_depend_on_makes_another_cache(pairs, tmp_path):
    folders = [open_cache(pairs, tmp_path / "cache").folder]
    for change in (dict(views=3), dict(seed=4), dict(flip_prob=0.0), dict(told=dict(dtype="fp32"))):
        folders.append(open_cache(pairs, tmp_path / "cache", **change).folder)
    with torch.no_grad():
        WEIGHTS.weight[0, 0] += 1
    folders.append(open_cache(pairs, tmp_path / "cache").folder)
    WEIGHTS.config = "of other heads"
    folders.append(open_cache(pairs, tmp_path / "cache").folder)
    del WEIGHTS.config
    Image.new("RGB", (SIZE, SIZE), "red").save(pairs / "0000003" / "1_0.jpg")
    folders.append(open_cache(pairs, tmp_path / "cache").folder)
    (pairs / "0000003" / "prompt.json").write_text(json.dumps(dict(caption="a", edit="another edit", output="b")))
    folders.append(open_cache(pairs, tmp_path / "cache").folder)
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("writes", range(1, 10, 2))
def test_a_cache_goes_on_after_any_end(pairs, tmp_path, monkeypatch, writes):
    """Encoding ends after so many writes to its files, with half of the last one there; then it is repeated."""
    whole = open_cache(pairs, tmp_path / "whole").folder
    opened, left = open, [writes]

    def failing_open(path, mode="r"):
        file = opened(path, mode)
        if mode != "ab":
            return file
        write = file.write

        class Torn:
            flush, close = file.flush, file.close

            def write(self, data):
                left[0] -= 1
                if left[0] < 0:
                    write(data[:len(data) // 2])
                    raise KeyboardInterrupt
                write(data)

        return Torn()

    monkeypatch.setattr(ip2p.features, "open", failing_open, raising=False)
    with pytest.raises(KeyboardInterrupt):
        open_cache(pairs, tmp_path / "cache")
    monkeypatch.undo()
    again = open_cache(pairs, tmp_path / "cache").folder
    assert encode.seen - 1 == (42 if writes < 4 else 26 if writes < 8 else 10)           # whole chunks, of 16, are left
    for name in ("latents.f16", "contexts.f16", "texts.jsonl", "index.i32"):
        assert (again / name).read_bytes() == (whole / name).read_bytes() and os.path.getsize(again / name)


@pytest.mark.parametrize("cuts", range(4))
def test_a_stop_while_cutting_what_is_torn_loses_no_text(pairs, tmp_path, monkeypatch, cuts):
    """A third of the examples is there, and a bit of the next; the run that goes on is stopped after so many cuts."""
    whole, again = open_cache(pairs, tmp_path / "whole").folder, open_cache(pairs, tmp_path / "cache").folder
    with open(again / "index.i32", "r+b") as index:
        index.truncate(17 * 4)
    truncate, left = os.truncate, [cuts]

    def stopped(path, size):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        truncate(path, size)

    monkeypatch.setattr(os, "truncate", stopped)
    with pytest.raises(KeyboardInterrupt):
        open_cache(pairs, tmp_path / "cache")
    monkeypatch.undo()
    open_cache(pairs, tmp_path / "cache")
    assert all((again / name).read_bytes() == (whole / name).read_bytes() for name in ("latents.f16", "contexts.f16", "texts.jsonl",
                                                                                       "index.i32"))


@pytest.mark.parametrize("name", ["texts.jsonl", "contexts.f16"])
@pytest.mark.parametrize("left", [0, 0.6])
def test_texts_that_were_lost_are_encoded_again(pairs, tmp_path, name, left):
    """As a power cut may leave it: the index is whole, what it points to is not."""
    whole, again = open_cache(pairs, tmp_path / "whole").folder, open_cache(pairs, tmp_path / "cache").folder
    os.truncate(again / name, int(left * os.path.getsize(again / name)))
    open_cache(pairs, tmp_path / "cache")
    assert all((again / each).read_bytes() == (whole / each).read_bytes() for each in ("latents.f16", "contexts.f16", "texts.jsonl",
                                                                                      "index.i32"))


def test_what_could_not_be_read_for_a_moment_is_encoded_by_the_next_run(pairs, tmp_path):
    """As a network's disk fails: nothing has changed that a cache is named for."""
    whole, example = open_cache(pairs, tmp_path / "whole"), PairedDataset.example

    def failing(self, epoch, index):
        if (epoch, index) in ((0, 18), (1, 3)):
            raise ValueError("input/output error")
        return example(self, epoch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairedDataset, "example", failing)
        assert open_cache(pairs, tmp_path / "cache").skipped == {"input/output error"}
    again = open_cache(pairs, tmp_path / "cache")
    assert encode.seen - 1 == 26 and not again.skipped                             # from the second chunk on
    assert (again.folder / "latents.f16").read_bytes() == (whole.folder / "latents.f16").read_bytes()


@pytest.mark.parametrize("kind", ["live", "cached"])
def test_workers_need_few_open_files(pairs, tmp_path, kind):
    """64 of 128 pictures; half of a step's batch in a worker alone was more than this allows."""
    code = f"""
import resource, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}
import test_features as t
from ip2p.features import CachedPairs, LivePairs
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
t.encode.seen, data = 0, t.open_data({str(pairs)!r})
if {kind == "live"}:
    live = LivePairs(data, t.encode, steps=40, batch_size=128, parts=[slice(0, 128)], workers=1)
    print(len(live.batch(0, slice(0, 128))[2]), flush=True)
else:
    print(len(CachedPairs(data, {str(tmp_path / "cache")!r}, 8, t.encode, t.encode_text, batch_size=4, weights=[], told={{}}, workers=4).index))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == ("128\n" if kind == "live" else "168\n")
    assert "Traceback" not in done.stderr                                          # nor when it stops with batches to come


def test_a_data_set_that_cannot_be_read_at_all(tmp_path):
    path = write_pairs(tmp_path / "set", 3, broken=range(3))
    with pytest.raises(ValueError, match="no pair can be read; the first: .*1_1.jpg: not a picture"):
        open_cache(path, tmp_path / "cache")
    with pytest.raises(ValueError, match="no pair can be read; the first: .*1_1.jpg: not a picture"):
        LivePairs(open_data(path), encode, steps=1, batch_size=2, parts=[slice(0, 2)]).batch(0, slice(0, 2))
