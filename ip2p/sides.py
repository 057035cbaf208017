"""Programs side by side: each in a process of its own, so that its memory is its own, and called in turns."""
import multiprocessing
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch

from .command_line import is_out_of_memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Timed:
    seconds: float          # median of the calls that count
    first: float            # the first call, which warms up and compiles, and does not count
    peak: float | None      # most bytes in use in any call; None where that cannot be told
    results: list[Any]      # of all calls, the first too


class Side:
    """make(*args) in a new process; then calls of what it returns. `threads`: of torch, its own number if None."""

    def __init__(self, make: Callable, *args, device="cpu", threads: int | None = None):
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(far, make, args, device, threads), daemon=True)
        self.process.start()
        far.close()
        self.finish()

    def begin(self, **settings):
        self.pipe.send(settings)

    def finish(self):
        """(seconds, peak bytes, result) of the call begun. Raises what the program raised that its user can put right."""
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise SystemExit("one of the programs failed: see above") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self):
        self.pipe.close()
        self.process.join(10)
        self.process.kill()

    def __call__(self, **settings):
        self.begin(**settings)
        return self.finish()


def _serve(pipe, make, args, device, threads):
    try:
        if threads:
            torch.set_num_threads(threads)
        if torch.device(device).index is not None:
            torch.cuda.set_device(device)
        run = make(*args)
        pipe.send(None)
        while True:
            settings = pipe.recv()
            reset_peak(device)
            began = time.perf_counter()
            result = run(**settings)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            pipe.send((time.perf_counter() - began, peak_memory(device), result))
    except EOFError:                                           # whoever asked is gone
        return
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, ImportError)) and not is_out_of_memory(error):
            raise
        pipe.send(error)


def reset_peak(device: str):
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")                                  # proc(5): the peak is what is in use now


def peak_memory(device: str) -> float | None:
    """Most bytes in use since the last reset: what torch had allocated on the GPU, or, on a CPU, what the whole process, its
    libraries included, had in memory (Linux; None elsewhere)."""
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated())
    if not STATUS.exists():
        return None
    line, = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return float(line.split()[1]) * 1024


@contextmanager
def side_by_side(device: str, **programs):
    """{name: Side} of {name: (make, *args)}, started one after the other and ended with the block."""
    sides = {}
    try:
        for name, (make, *args) in programs.items():
            sides[name] = Side(make, *args, device=device)
        yield sides
    finally:
        for side in sides.values():
            side.end()


def take_turns(sides: dict[str, Callable], repeats: int, **settings) -> dict[str, Timed]:
    """Each side called with these settings, 1 + `repeats` times, in turns. The first call counts for the memory alone: what it
    records or compiles, later ones use again."""
    calls = {name: [] for name in sides}
    for _ in range(repeats + 1):
        for name, side in sides.items():
            calls[name].append(side(**settings))
    timed = {}
    for name, ((first, *_), *counted) in calls.items():
        seconds, peaks = [s for s, *_ in counted], [peak for _, peak, _ in calls[name]]
        timed[name] = Timed(statistics.median(seconds), first, None if None in peaks else max(peaks),
                            [result for _, _, result in calls[name]])
    return timed
