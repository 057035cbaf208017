"""The 700 hand-written triples that the language model learns to write edits from."""
import json
from itertools import combinations
from pathlib import Path

from ip2p.world import World
from ip2p.world_reader import read

FOLDER = Path(__file__).parent.parent / "ip2p" / "assets" / "triples"
TRIPLES = [json.loads(line) for name in ("world", "photos") for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()]


def plain(text):
    return text.strip().strip(".!?").lower()


def words(triple):
    return set(plain(f"{triple['input']} {triple['edit']}").replace(",", "").split())


def test_there_are_seven_hundred_with_the_published_keys():
    assert len(TRIPLES) == 700 and all(set(t) == {"input", "edit", "output"} for t in TRIPLES)


def test_every_edit_changes_its_caption():
    """By the original's own rule for accepting one."""
    assert all(plain(t["input"]) != plain(t["output"]) for t in TRIPLES)


def test_no_combination_is_held_out():
    world = World()
    read_ones = [scene for t in TRIPLES for text in (t["input"], t["output"]) if (scene := read(text))]
    assert len(read_ones) > 600 and not any(world.holds_out(scene) for scene in read_ones)


def test_delimiters_do_not_occur():
    assert not any(mark in text for t in TRIPLES for text in t.values() for mark in ("##", "%%", "END", "\n"))


def test_no_two_are_nearly_the_same():
    """Of caption and instruction together, two share at most half of their words; no caption comes twice."""
    assert len({plain(t["input"]) for t in TRIPLES}) == 700
    sets = [words(t) for t in TRIPLES]
    worst = max(combinations(sets, 2), key=lambda pair: len(pair[0] & pair[1]) / len(pair[0] | pair[1]))
    assert len(worst[0] & worst[1]) / len(worst[0] | worst[1]) <= 0.5, worst


def test_instructions_are_varied():
    assert len({plain(t["edit"]) for t in TRIPLES}) >= 690
