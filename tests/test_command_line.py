"""How the commands end: one line on stderr for what their user can put right, and an exit status that tells."""
import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ip2p.command_line import Parser, exit_status, within

ROOT = Path(__file__).parent.parent


def raising(error):
    def command():
        raise error
    return command


@pytest.mark.parametrize("error, status, line", [
    (ValueError("a needs\n   b"), 2, "x.py: a needs b"),
    (OSError(28, "No space left on device"), 2, "x.py: [Errno 28] No space left on device"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 2, "x.py: out of memory; try less"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "x.py: out of memory; try less"),
    (MemoryError(), 2, "x.py: out of memory; try less"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), 2, "x.py: out of memory; try less"),
    (RuntimeError("Failed to find C compiler. Please specify via CC"), 2,
     "x.py: --compile needs a C++ compiler, such as g++, and on a GPU Triton; not all are here"),
    (ModuleNotFoundError("No module named 'fcntl'", name="fcntl"), 2, "x.py: needs Linux or macOS, for their locks on files"),
    (KeyboardInterrupt(), 130, "x.py: stopped; go on"),
    (KeyboardInterrupt("stopped at step 7"), 130, "x.py: stopped at step 7; go on")])
def test_what_a_user_can_put_right_is_one_line(error, status, line, capsys):
    assert exit_status("x.py", raising(error), "less", "go on") == status
    out, err = capsys.readouterr()
    assert not out and err.strip("\n") == line


@pytest.mark.parametrize("error", [
    RuntimeError("size mismatch"), KeyError("name"), AssertionError(), ModuleNotFoundError("No module named 'x'", name="x"),
    RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError("unsupported memory format option")])
def test_what_is_our_own_mistake_is_not_hidden(error):
    with pytest.raises(type(error)):
        exit_status("x.py", raising(error), "less")


@pytest.mark.parametrize("answer, status", [(None, 0), (0, 0), (1, 1)])
def test_a_command_says_how_it_ended(answer, status, capsys):
    assert exit_status("x.py", lambda: answer, "less") == status and capsys.readouterr() == ("", "")


def test_compiling_without_a_compiler(tmp_path):
    code = ("import sys, torch; from ip2p.command_line import exit_status; f = torch.compile(lambda x: x.sin() + 1);"
            "sys.exit(exit_status('x.py', lambda: f(torch.ones(3)).sum() < 0, ''))")
    nowhere = os.environ | dict(CXX="/nowhere/g++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=nowhere, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "x.py: --compile needs a C++ compiler, such as g++, and on a GPU Triton; not all are here\n"


@pytest.mark.parametrize("text, said", [("1.5", "must be in 0..1, got 1.5"), ("nan", "must be in 0..1, got nan"), ("half", "invalid float value")])
def test_a_flag_out_of_bounds_is_one_line(text, said, capsys):
    parser = Parser(prog="x.py", description="two\nlines")
    parser.add_argument("--share", type=within(float, 0, 1))
    assert parser.parse_args(["--share", "1"]) == argparse.Namespace(share=1)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--share", text])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("x.py: argument --share: ") and said in err and err.count("\n") == 1
    assert "two\nlines" in parser.format_help()


@pytest.mark.parametrize("script", ["train.py --out", "make_data.py --out", "sample.py --prompt x --image x.png --output"])
def test_a_variable_that_is_not_set_is_no_folder(script):
    done = subprocess.run([sys.executable, *script.split(), ""], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith("needed a path, got nothing\n") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["sample.py", "train.py", "make_data.py", "-m ip2p.evaluate edits", "-m ip2p.bench edit"])
def test_an_unknown_flag_is_one_line(script):
    done = subprocess.run([sys.executable, *script.split(), "--colour"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the option is glibc's")
def test_commands_keep_the_memory_of_freed_tensors():
    code = ("import re, torch; from ip2p.command_line import exit_status\n"
            "def megabytes(): return int(re.search(r'VmRSS:\\s*(\\d+)', open('/proc/self/status').read())[1]) // 1024\n"
            "def use_and_free():\n"
            "    before, x = megabytes(), torch.ones(64 * 2 ** 20 // 4)\n"
            "    del x\n"
            "    print(megabytes() - before)\n"
            "use_and_free()\n"
            "exit_status('x', use_and_free, '')")
    given_back, kept = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(given_back) < 10 and int(kept) > 60
