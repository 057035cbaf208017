"""A GPU in name, for machines without one: what is left on the wrong device shows itself all the same."""
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
READS = {"item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"}          # what waits for a GPU
MAKE = {"tensor", "as_tensor", "from_numpy"}                                                    # from numbers of the CPU's
MEET = READS | {"copy_", "__getitem__", "__setitem__", "_has_compatible_shallow_copy_type"}        # takes tensors of either


def there(*tensors):
    """Whether any of them is on the pretended GPU."""
    return any(getattr(x, "_on_gpu", False) for x in tensors)


def mark(out, on_gpu):
    for x in tree_leaves(out):
        if isinstance(x, torch.Tensor) and there(x) != on_gpu:
            x._on_gpu = on_gpu
    return out


def waits_for_indices(name, args):
    """Whether x[i] or x[i] = y takes numbers from the CPU, or has to count them first."""
    indices = args[1] if name in ("__getitem__", "__setitem__") else ()
    indices = indices if isinstance(indices, tuple) else (indices,)
    return any(isinstance(i, list) or isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)


class PretendedGPU(TorchFunctionMode):
    """Within it there is a device "cuda". Its tensors are the CPU's, and so is the arithmetic, but they do not combine with the
    CPU's other than as a GPU's do, nor take its random numbers, nor become numpy's; and a graph does not record a crossing.

    crossings: how often numbers were moved to or from it, or waited for; reads: how often from it."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.crossings, self.reads, self.recording = 0, 0, False
        autocast, new, stream = torch.autocast, torch.nn.Parameter.__new__, SimpleNamespace(wait_stream=lambda other: None)

        def new_parameter(cls, data=None, requires_grad=True):
            return mark(new(cls, data, requires_grad), there(data))

        for name, value in dict(is_available=lambda: True, Stream=lambda device: stream, CUDAGraph=lambda: Tape(self),
                                current_stream=lambda: stream, stream=lambda stream: nullcontext(), graph=lambda tape, **_: tape,
                                set_stream=lambda stream: None, device=lambda device: nullcontext(), current_device=lambda: 0,
                                is_bf16_supported=lambda **_: True).items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "autocast", lambda device, *args, **kwargs: autocast("cpu", *args, **kwargs))
        monkeypatch.setattr(torch.nn.Parameter, "__new__", new_parameter)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, dict(kwargs or {})
        if name in ("__get__", "__set__"):
            return self.attribute(func, func.__self__.__name__, *args)
        if name in ("to", "cpu", "cuda"):
            return self.move(name, *args, **kwargs)
        if name == "pin_memory":
            return args[0]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu, everywhere, own = there(*tensors), all(map(there, tensors)), there(*args[:1])
        if on_gpu and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if on_gpu and name not in MEET and any(x.ndim and not there(x) for x in tensors):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found cuda:0 and cpu")
        if on_gpu and name == "__getitem__" and not own:
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if on_gpu and (name in READS or name in MEET and not everywhere or waits_for_indices(name, args)):
            self.reads += name in READS
            self.cross()
        on_gpu = own if name in MEET - {"nonzero"} else on_gpu
        if kwargs.get("device") is not None:
            on_gpu = torch.device(kwargs.pop("device")).type == "cuda"
            if on_gpu and name in MAKE:
                self.cross()
        if on_gpu and kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu', in {name}")
        return mark(func(*args, **kwargs), on_gpu)

    def attribute(self, func, name, x, *value):
        """x.name, or x.name = value."""
        if name in ("device", "is_cuda", "is_cpu") and there(x):
            return {"device": GPU, "is_cuda": True, "is_cpu": False}[name]
        out = func(x, *value)
        if name == "data" and value:
            mark(x, there(*value))
        return mark(out, there(x))

    def move(self, name, x, *args, **kwargs):
        """x.to(...), x.cpu() or x.cuda(): a copy, unless it is there already."""
        given = [kwargs.pop("device", None), *args, {"cpu": "cpu", "cuda": GPU}.get(name)]
        given = [(GPU if there(y) else "cpu") if isinstance(y, torch.Tensor) else y for y in given]
        wanted = [y for y in given if isinstance(y, (str, torch.device))]
        to_gpu = torch.device(wanted[0]).type == "cuda" if wanted else there(x)
        dtypes = [y for y in args if isinstance(y, torch.dtype)]
        out = torch.Tensor.to(x, *dtypes, **kwargs) if dtypes or kwargs.keys() - {"non_blocking"} else x
        if to_gpu != there(x):
            self.reads += not to_gpu
            self.cross()
            out = out.clone() if out is x else out
        return mark(out, to_gpu)

    def cross(self):
        self.crossings += 1
        if self.recording:
            raise RuntimeError("operation not permitted when stream is capturing")


class Tape(TorchDispatchMode):
    """As a CUDA graph does, runs the same kernels on the same memory again."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu, self.calls = gpu, []

    def __enter__(self):
        self.gpu.recording = True
        return super().__enter__()

    def __exit__(self, *error):
        self.gpu.recording = False
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for func, args, kwargs, out in self.calls:
                new = func(*args, **kwargs)
                for old, x in zip(*((y if isinstance(y, (tuple, list)) else [y]) for y in (out, new))):
                    old.copy_(x)
