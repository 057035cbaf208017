"""What the commands share: flags, and how they end. Nothing here needs torch, so `--help` need not wait for it."""
import argparse
import ctypes
import sys
import tempfile
from pathlib import Path
from typing import Callable

PARAMETERIZATION = dict(choices=("eps", "v"), help="what the UNet of the model given predicts, where its file does not say or "
                        "is wrong (default: what the file says, else a guess)")          # a flag of all three scripts

DEVICE = dict(help="such as cpu, cuda or cuda:1 (default: cuda if there is one, else cpu)")        # likewise
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"                          # the shipped miniature's

NO_COMPILER = ("InvalidCxxCompiler", "Failed to find C compiler", "TritonMissing", "Cannot find a working triton",
               "GPUTooOldForTriton")                                                     # as torch.compile says it


class Parser(argparse.ArgumentParser):
    """A parser whose help keeps the lines of its description as they are, and whose errors are one line."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def within(kind: Callable, least: float, most: float) -> Callable:
    """An argparse type: a finite number with bounds."""
    def convert(text):
        value = kind(text)
        if not least <= value <= most:                         # NaN is not
            raise argparse.ArgumentTypeError(f"must be in {least}..{most}, got {text}")
        return value
    convert.__name__ = kind.__name__                           # for argparse's own message
    return convert


def named_path(text: str) -> Path:
    """An argparse type: a path; not the empty text of a variable that is not set, which would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("needed a path, got nothing")
    return Path(text)


def make_writable(folder: Path, flag: str):
    """Create a folder, unless it is there. ValueError, naming the flag that asked for it, if nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{flag}: cannot be written ({error.strerror}); name another place") from None


SEEDS = within(int, 0, 2 ** 63 - 1)                         # what torch takes


def exit_status(name: str, command: Callable, short_of_memory: str, stopped: str = "", status_if_stopped: int = 130) -> int:
    """Runs a command. Returns its exit status: what command() returns, 0 if that is None; or 2, with one line on stderr, for
    whatever its user can put right.

    name: what the line begins with. short_of_memory: what to try then. stopped: what to do after Ctrl-C, "" if nothing;
    status_if_stopped: the status then.
    """
    keep_freed_memory()
    try:
        return command() or 0
    except (ValueError, OSError) as error:
        line = complaint(error)
    except ModuleNotFoundError as error:
        if error.name != "fcntl":
            raise
        line = "needs Linux or macOS, for their locks on files"
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            line = f"out of memory; try {short_of_memory}"
        elif any(words in repr(error) for words in NO_COMPILER):
            line = "--compile needs a C++ compiler, such as g++, and on a GPU Triton; not all are here"
        else:
            raise
    except KeyboardInterrupt as interrupt:
        print(f"\n{name}: " + "; ".join(filter(None, (str(interrupt) or "stopped", stopped))), file=sys.stderr)
        return status_if_stopped
    print(f"{name}: {line}", file=sys.stderr)
    return 2


def keep_freed_memory():
    """On Linux: keep the memory of freed tensors for the next ones. The C library gives that of large ones back to the system
    and takes it anew, cleared page by page, which costs a tenth of a training step on a CPU. More of it is held so."""
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):               # another C library
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, NEVER = -1, -3, 2 ** 31 - 1          # names and numbers of malloc.h
    set_option(M_TRIM_THRESHOLD, NEVER)
    set_option(M_MMAP_THRESHOLD, NEVER)


def complaint(error: Exception) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split())


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is memory that was lacking: Python's own error says so by its kind, torch's by their words."""
    words = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, MemoryError) or any(some in str(error).lower() for some in words)
