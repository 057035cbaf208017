"""A function as a CUDA graph: its kernels, hundreds in a sampler's step, are started at once. One by one, starting them
takes longer than running them where a model is small or a GPU large."""
import sys
from functools import lru_cache
from threading import Lock, get_ident
from typing import Callable

import torch

ONE_AT_A_TIME = Lock()                                         # a process may record one graph at a time


class CUDAGraphed:
    """function(*tensors) -> tensor on a GPU, recorded when it is called again and replayed from then on.

    The first call is an ordinary one, for whatever is set up on first use. A replay reads and writes the memory it was
    recorded with: results are valid until the next call, arguments are copied to where they were, and what else the
    function reads must stay. It cannot be recorded if it copies from or to the CPU; then, with a note, every call is an
    ordinary one, as are calls with other shapes. After a recording that failed there are no others in the process, as torch
    before 2.13 takes that one to go on.
    """

    can_record = True

    def __init__(self, function: Callable):
        self.function, self.graph, self.calls = function, None, 0

    def __call__(self, *inputs):
        with torch.cuda.device(inputs[0].device):              # streams and graphs are of the current one
            return self._call(inputs)

    def _call(self, inputs):
        self.calls += 1
        if self.calls == 1:
            return self._warm_up(inputs)
        if self.calls == 2:
            with ONE_AT_A_TIME:
                if CUDAGraphed.can_record:
                    self._record(inputs)
        if self.graph is None or [x.shape for x in inputs] != [x.shape for x in self.inputs]:
            return self.function(*inputs)
        for static, x in zip(self.inputs, inputs):
            static.copy_(x)
        self.graph.replay()
        return self.output

    def _warm_up(self, inputs):
        """On a stream other than the default one, as PyTorch asks for before recording."""
        stream = side_stream(torch.cuda.current_device(), get_ident())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return output

    def _record(self, inputs):
        graph, self.inputs = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
        stream, side = torch.cuda.current_stream(), side_stream(torch.cuda.current_device(), get_ident())
        try:
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):   # other threads may use the GPU
                self.output = self.function(*self.inputs)
            self.graph = graph
        except RuntimeError as error:
            CUDAGraphed.can_record = False
            torch.cuda.set_stream(stream)                      # which a recording that fails at its end does not give back
            reason = (str(error).strip().splitlines() or [""])[0]
            print(f"note: no CUDA graph, steps are run as usual ({reason})", file=sys.stderr)


@lru_cache(maxsize=None)
def side_stream(device: int, thread: int):
    """A thread's second stream on the current device. Always the same one: memory of cuBLAS stays with each that was used."""
    return torch.cuda.Stream(device)
