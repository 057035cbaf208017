"""Devices and processes. torchrun starts several processes for one run: each learns from its rows of a step's examples, and
gradients are averaged before the step. Without torchrun there is one, and it shares nothing out."""
import os
import re
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)


def usable_device(device: str | None) -> str:
    """The device, if None a GPU where there is one, else the CPU; of "cuda" the GPU that is this process's own, should torchrun
    have started several. ValueError unless torch can use it."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        usable = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        reason = re.split(r"[.\n]", str(error))[0]
        raise ValueError(f"--device {device} cannot be used here ({reason}); there is {', '.join(usable)}") from None
    return device


def choose_device(device: str | None, dtype: str | None):
    """Names of the device and dtype, by default of what exists, and torch's dtype. ValueError if there is no such device."""
    device = usable_device(device)
    dtype = dtype or ("fp32" if not device.startswith("cuda") else "bf16" if has_bf16(device) else "fp16")
    return device, dtype, DTYPES[dtype]


def has_bf16(device: str) -> bool:
    """Whether the device computes in bf16. GPUs before Ampere imitate it, slowly, and have no convolutions of it."""
    if not device.startswith("cuda"):
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def launched() -> int:
    """How many processes torchrun started, this one among them; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device: str):
    """Joins the processes that torchrun started, this one with its own device."""
    if launched() == 1 or dist.is_initialized():
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))         # the others wait while the first fills a cache


def end():
    """Leaves them, once nothing is to be shared any more."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def own_rows(batch_size: int, accumulate: int) -> list[slice]:
    """Which of a step's examples this process learns from, in `accumulate` parts."""
    size = batch_size // (accumulate * processes())
    first = rank() * accumulate
    return [slice(i * size, (i + 1) * size) for i in range(first, first + accumulate)]


def average(tensors: list[Tensor], bucket: int = 2 ** 25):
    """Replace each tensor by its mean over the processes; `bucket`: numbers sent at a time."""
    if processes() == 1:
        return
    while tensors:
        count = total = 0
        while count < len(tensors) and (count == 0 or total + tensors[count].numel() <= bucket):
            total += tensors[count].numel()
            count += 1
        some, tensors = tensors[:count], tensors[count:]
        flat = torch.cat([t.flatten() for t in some])
        dist.all_reduce(flat)
        for t, mean in zip(some, (flat / processes()).split([t.numel() for t in some])):
            t.copy_(mean.view_as(t))


def share_out(parts: list, make) -> list:
    """[make(part) for part in parts], each made by one of the processes and sent to the others; tensors arrive on the CPU."""
    if processes() == 1:
        return [make(part) for part in parts]
    own = [tuple(x.cpu() if torch.is_tensor(x) else x for x in make(part)) for part in parts[rank()::processes()]]
    made = [None] * processes()
    dist.all_gather_object(made, own)
    return [made[i % processes()][i // processes()] for i in range(len(parts))]


def any_of(flag: bool) -> bool:
    """Whether it is true in any process. Sent between CPUs, so that no accelerator is waited for."""
    if processes() == 1:
        return flag
    answer = torch.tensor(float(flag))
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer)


@contextmanager
def locked(path, busy: str | None = None):
    """One process at a time, whoever started it: while another is in a block of the same file or folder this one waits, or if
    there is something to say then, raises ValueError(busy), after 10 seconds: for so long the loaders of a run that was killed
    may outlive it. A file is made if there is none."""
    import fcntl                                                        # Unix only
    lock = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT)
    try:
        end = time.monotonic() + 10
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if busy else fcntl.LOCK_EX)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ValueError(busy) from None
                time.sleep(0.1)
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)                                # for processes forked since, too, which have it open
        os.close(lock)


def say(line: str):
    """Print a line, in the first process alone."""
    if rank() == 0:
        print(line, flush=True)
