"""make_data.py: any kill, any shards, the same files; memory that does not grow."""
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from making_data import ROOT, flags, make_data, rows, tree
from making_data import cli, models, whole                     # fixtures

from ip2p import InstructPix2Pix


def start(models, out, *more, env=()):
    """make_data.py as a process of its own."""
    return subprocess.Popen([sys.executable, str(ROOT / "make_data.py"), *flags(models, out, *more)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(env))


FORKS = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import ip2p.clip_filter, ip2p.pipeline, make_data
ip2p.clip_filter.import_open_clip()
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
        os._exit(make_data.run(json.loads(line)))
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def forked():
    """run(seconds, *argv) runs make_data.py, and kills it after so many seconds: its wait status, 9 if it was killed. The
    runs are forks of one process that has imported what they need, so that many starts take little time."""
    process = subprocess.Popen([sys.executable, "-c", FORKS, str(ROOT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})

    assert process.stdout.readline() == b"ready\n"

    def run(seconds, *argv):
        process.stdin.write(json.dumps(argv).encode() + b"\n")
        process.stdin.flush()
        pid = int(process.stdout.readline())
        if not select.select([process.stdout], [], [], seconds)[0]:
            os.kill(pid, signal.SIGKILL)
        return int(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait()


def test_killed_at_random_moments_it_writes_what_an_uninterrupted_run_writes(forked, models, tmp_path, whole):
    out, rng, kills, began = tmp_path / "out", random.Random(0), 0, time.monotonic()
    assert forked(99, *flags(models, tmp_path / "once")) == 0
    duration = time.monotonic() - began
    while forked(rng.uniform(0.02, 0.1) * (kills + 1) * duration, *flags(models, out)) == signal.SIGKILL:   # later and later
        kills += 1
        for folder in out.glob("0*"):                                      # whatever has its name is whole
            assert len(list(folder.glob("*.jpg"))) == 4 and len(rows(folder / "metadata.jsonl")) == 2
        assert kills < 100
    assert kills >= 2 and tree(out) == tree(whole) == tree(tmp_path / "once")


def test_filter_killed_at_random_moments_completes(forked, models, tmp_path, whole):
    out, rng, argv, began = tmp_path / "out", random.Random(1), flags(models, tmp_path / "out"), time.monotonic()
    assert forked(99, *argv, "--pairs-only") == 0
    duration, ends = time.monotonic() - began, set()
    for i in range(8):
        ends.add(forked(rng.random() * i / 8 * duration, *argv, "--filter-only"))
    assert signal.SIGKILL in ends and forked(99, *argv, "--filter-only") == 0
    assert tree(out) == tree(whole)


def test_told_to_stop_it_ends_well(models, tmp_path):
    out = tmp_path / "out"
    process = start(models, out, "--n-samples", 40)
    while not (out / "0000000").exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()                                                    # SIGTERM; Ctrl-C takes the same way
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith("make_data.py: stopped; repeat the command to go on\n"), err
    assert "Traceback" not in err and not list(out.glob(".*")) and (out / "seeds.json").exists()
    assert make_data.run(["--check", str(out)]) == 0


def test_shards_side_by_side_write_what_one_run_writes(models, tmp_path, whole):
    out = tmp_path / "out"
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    processes = [start(models, out, "--shard", "0/2"), start(models, out, env=torchrun)]
    for process in processes:
        assert process.wait(timeout=120) == 0, process.stderr.read()
    assert tree(out) == tree(whole)


def test_a_second_run_on_the_same_shard_is_refused(models, tmp_path, capsys, cli):
    with make_data.holding(scratch := tmp_path / ".shard-0-of-1.tmp"):
        (scratch / "file").touch()
        assert make_data.run(["--filter-only", "--out", str(tmp_path)]) == 2                    # holds no pairs
        assert make_data.run(["--edits-only", "--out", str(tmp_path)]) == 2
        assert "another run is at work there" in capsys.readouterr().err and (scratch / "file").exists()
    assert not scratch.exists()


def test_shards_one_after_the_other(cli, tmp_path, whole):
    for i in (2, 0, 1):
        assert cli("--shard", f"{i}/3").code == 0
        assert cli("--check", tmp_path / "out").code == 0
    assert tree(tmp_path / "out") == tree(whole)


def test_memory_does_not_grow_with_the_number_of_samples(cli, monkeypatch, tmp_path):
    """At any time at most two batches of pixels live: one that is drawn while the last is still held."""
    living, most, drawn = weakref.WeakSet(), [], []

    def draw_pairs(self, captions, edited, seeds, shares, scales, **settings):
        pixels = torch.rand(2, len(seeds), 3, 32, 32, generator=torch.Generator().manual_seed(seeds[0])) * 2 - 1
        living.add(pixels)
        most.append(len(living))
        drawn.append(len(seeds))
        return pixels.unbind()

    monkeypatch.setattr(InstructPix2Pix, "draw_pairs", draw_pairs)
    monkeypatch.setattr(make_data, "SHOWN", 0)
    assert cli("--n-samples", 101, "--batch-size", 4, "--clip-threshold", 1, "--shard", "0/5").code == 0
    assert sum(drawn) == 101 and max(drawn) == 4 and max(most) <= 2
    assert not list((tmp_path / "out").glob("**/*.jpg"))
