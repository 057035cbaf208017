"""`python train.py` with nothing said, and `--stage all`: what they make by themselves, and what they leave alone."""
import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from ip2p.clip_filter import Thresholds
from ip2p.tensorfiles import read_state_dict

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import make_data  # noqa: E402
import train  # noqa: E402

LITTLE = "--steps 2 --batch-size 2 --block 4 --reuse 1 --score-examples 1 --device cpu".split()


@pytest.fixture
def drawn(monkeypatch):
    """make_data.py draws three prompts with two samples of two steps, all of which pass. Gives the flags of its calls."""
    calls, make_pairs = [], train.make_pairs

    def make_few(args, *flags):
        calls.append(list(map(str, flags)))
        make_pairs(args, *flags, "--num-captions", 3, "--n-samples", 2)

    monkeypatch.setattr(train, "make_pairs", make_few)
    monkeypatch.setitem(make_data.MINIATURE, "steps", 2)
    monkeypatch.setattr(Thresholds, "of", lambda clip: Thresholds(-1, -1, -1))
    return calls


def run(*flags):
    with redirect_stdout(StringIO()) as said, redirect_stderr(StringIO()) as complaint:
        code = train.run_command([*map(str, flags), *LITTLE])
    assert code == 0, complaint.getvalue()
    return said.getvalue()


def test_with_nothing_said_it_draws_a_small_data_set_and_learns_from_it(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run()
    assert "no data set in data/: drawing a small one" in said and "preset=miniature" in said
    assert drawn == [["--out", "data", "--num-captions", "24", "--n-samples", "4"]]
    assert len(json.loads(Path("data/seeds.json").read_text())) == 3
    _, record = read_state_dict("runs/mini-ip2p.safetensors")
    assert record["data"] == "data" and record["steps"] == 2 and set(record["psnr"]) == {"edit", "unedited", "autoencoder"}
    assert Path("runs/edit/sheet-final.png").exists() and len(list(Path("runs/cache").iterdir())) == 1
    said = run("--out", "again")
    assert len(drawn) == 1 and "drawing" not in said and len(list(Path("runs/cache").iterdir())) == 1


def test_data_that_cannot_be_read_is_not_drawn_over(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/pairs.jsonl").write_text('{"no": "pair"}\n')
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as complaint:
        assert train.run_command(LITTLE) == 2
    assert not drawn and len(list(Path("data").iterdir())) == 1
    assert "data" in complaint.getvalue() and complaint.getvalue().count("\n") == 1


def test_a_small_data_set_that_was_stopped_is_drawn_to_its_end(drawn, tmp_path, monkeypatch):
    """As after Ctrl-C with one prompt drawn: the pairs are then those of a run that was not stopped."""
    monkeypatch.chdir(tmp_path)
    make_few = train.make_pairs

    def make_one(args, *flags):
        make_few(args, *flags)
        for folder in sorted(Path("data").glob("0*"))[1:]:
            shutil.rmtree(folder)
        seeds = json.loads(Path("data/seeds.json").read_text())
        Path("data/seeds.json").write_text(json.dumps(seeds[:1]))
        raise KeyboardInterrupt

    with monkeypatch.context() as first, redirect_stdout(StringIO()), redirect_stderr(StringIO()) as complaint:
        first.setattr(train, "make_pairs", make_one)
        assert train.run_command(LITTLE) == 0
    assert "repeat the command to go on" in complaint.getvalue() and len(json.loads(Path("data/seeds.json").read_text())) == 1
    assert "drawing a small one" in run()
    assert len(json.loads(Path("data/seeds.json").read_text())) == 3 and not Path("data/.unfinished").exists()
    assert "drawing" not in run("--out", "again")


def test_all_stages_leave_alone_what_is_finished_and_end_in_a_table(drawn, tmp_path):
    for name in ("mini-clip", "mini-sd", "mini-gpt"):
        shutil.copy(ROOT / "weights" / f"{name}.safetensors", tmp_path)
    said = run("--stage", "all", "--out", tmp_path, "--cache", tmp_path / "cache", "--num-captions", 5)
    trained = [line.split()[0] for line in said.splitlines() if line.startswith("stage=")]
    assert trained == ["stage=vae", "stage=scorer", "stage=edit", "stage=distill"]
    data, = drawn                                                    # this CLIP has thresholds: no --calibrate
    assert dict(zip(data[::2], data[1::2])) == {"--out": f"{tmp_path}/data", "--num-captions": "5",
                                                **{f"--{k}": f"{tmp_path}/mini-{v}.safetensors" for k, v in
                                                   (("clip", "clip"), ("model", "sd"), ("gpt", "gpt"))}}
    _, record = read_state_dict(tmp_path / "mini-ip2p.safetensors")
    assert record["data"] == "data" and record["base"]["stage"] == "base"
    assert record["shared"] == {"vae": "mini-sd.safetensors"}
    _, record = read_state_dict(tmp_path / "mini-ip2p-fast.safetensors")
    assert record["data"] == "data" and record["teacher"]["stage"] == "edit"
    assert record["shared"] == {"vae": "mini-sd.safetensors", "text": "mini-ip2p.safetensors", "unet": "mini-ip2p.safetensors"}
    table = [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("|")]
    assert table == ["stage", "---", "vae", "clip", "base", "scorer", "edits", "edit", "distill"]
    again = run("--stage", "all", "--out", tmp_path)
    assert len(drawn) == 1 and not any(line.startswith("stage=") for line in again.splitlines())
    assert again.splitlines() == said.splitlines()[-9:]
    for path in (tmp_path / "edit", tmp_path / "distill"):
        shutil.rmtree(path)
        (tmp_path / {"edit": "mini-ip2p.safetensors", "distill": "mini-ip2p-fast.safetensors"}[path.name]).unlink()
    run("--stage", "all", "--data", "world", "--max-resize", 200, "--out", tmp_path)
    assert len(drawn) == 1 and read_state_dict(tmp_path / "mini-ip2p-fast.safetensors")[1]["teacher"]["data"] == "ip2p.world, core"


def test_all_stages_do_not_go_on_from_an_editor_of_another_base(tmp_path):
    """As `python train.py` leaves it in runs/, made from the shipped base; or a run of it that was stopped."""
    shutil.copy(ROOT / "weights" / "mini-ip2p.safetensors", tmp_path)
    (tmp_path / "stopped" / "edit").mkdir(parents=True)
    (tmp_path / "stopped" / "edit" / "step-0000001.pt").touch()
    for out in (tmp_path, tmp_path / "stopped"):
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as complaint:
            assert train.run_command(["--stage", "all", "--data", "world", "--out", str(out), *LITTLE]) == 2
        assert f"{out}: its edit was begun without its base" in complaint.getvalue() and not (out / "vae").exists()
