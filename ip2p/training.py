"""One training loop for every stage: exact resume, EMA, warm-up and cool-down, metrics, sheets.

A step is a function of its number: `loss_fn(step, rows)` draws the same batch and noise whenever it is asked for that step.
So a run that was stopped and repeated is, bit for bit on a CPU, the run that was not; and the rows of a step may be shared
out between parts that follow each other (`accumulate`) and between processes.
"""
import copy
import json
import math
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

import torch
from torch import nn
from tqdm import tqdm

from . import distributed
from .muon import Muon
from .run_folder import draw_loss, forget_after, list_checkpoints, read_newest, write_checkpoint
from .tensorfiles import replacing


def seeded(*numbers) -> torch.Generator:
    """A CPU generator of its own for every tuple of small numbers, such as (seed, step)."""
    seed = 0
    for n in numbers:
        seed = (seed * 1_000_003 + int(n) + 1) % (2 ** 63 - 1)
    return torch.Generator().manual_seed(seed)


class EMA:
    """Running average of a module's weights, with the originals' warm-up: decay = min(decay, (1 + n) / (10 + n))."""

    def __init__(self, module: nn.Module, decay: float = 0.9999):
        self.decay, self.updates = decay, 0
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        params = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.weights.values()), [params[name] for name in self.weights], 1 - decay)


def make_optimizers(module: nn.Module, name: str, lr: float):
    """AdamW over everything; or Muon (at 20 lr) over the inner matrices and AdamW over the rest."""
    params = {n: p for n, p in module.named_parameters() if p.requires_grad}
    fused = dict(betas=(0.9, 0.99 if name == "muon" else 0.999), weight_decay=0.01, fused=True)
    if name == "adamw":
        return [torch.optim.AdamW(params.values(), lr=lr, **fused)]
    outer = ("embedding", "conv_in", "conv_out", "input_blocks.0.", "out.2", "visual.conv1", "logit_scale", "wte", "wpe")
    inner = [p for n, p in params.items() if p.ndim >= 2 and not any(part in n for part in outer)]
    inside = {id(p) for p in inner}
    return [Muon(inner, lr=20 * lr), torch.optim.AdamW([p for p in params.values() if id(p) not in inside], lr=lr, **fused)]


def lay_out_as_weights(optimizer: torch.optim.Optimizer):
    """Lay a loaded state out in memory like its weights (it may come from a device with channels last): fused AdamW walks
    both in memory order."""
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == weight.shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, requires_grad=False).copy_(value)


def lr_scale(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Multiplier of the learning rate: up over `warmup` steps, then 1, down to 0 over the last share `cooldown`."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    fall = min(1.0, (steps - step) / max(1.0, cooldown * steps))
    return min(rise, fall)


def fit(module: nn.Module, loss_fn: Callable, folder: Path, *, steps: int, batch_size: int = 1, accumulate: int = 1,
        minutes: float | None = None, lr: float = 1e-4, optimizer: str = "adamw", warmup: int = 100, cooldown: float = 0.0,
        ema_decay: float = 0.9999, clip_norm: float = 1.0, offload: bool = False, keep: int = 2, save_minutes: float = 3.0,
        sheet_minutes: float = 10.0, sheet: Callable | None = None, config: dict | None = None,
        settings: dict | None = None) -> dict:
    """Train `module` until `steps` are done or `minutes` of this call have passed, resuming from `folder`.

    loss_fn(step, rows) -> (loss, dict of numbers to log), the mean over `rows`, a slice of the step's `batch_size` examples;
    the parts are equal and their gradients are averaged. sheet(path) writes a picture, called with the averaged weights.
    clip_norm: the most that the gradient's norm may be, 0 for any. offload: the optimiser's state, the average and the
    weights that they go with are kept in the CPU's memory, and the module gets a copy after each step.
    In `folder`: the last `keep` checkpoints step-*.pt (everything needed to go on), metrics.jsonl, loss.png, sheet-*.png,
    and settings.json with `settings`, or else `config`.
    On return the module holds the averaged weights. Returns {"step", "seconds", "finished"}.
    SIGINT and SIGTERM stop it after the current step: it saves, and raises KeyboardInterrupt. A second SIGINT, where there is
    one process, does not wait for the step, nor save.
    Raises ValueError if the folder holds a run with another `config`, the loss is not finite, or a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    leads = distributed.rank() == 0
    parts = distributed.own_rows(batch_size, accumulate)
    master = copy.deepcopy(module).cpu() if offload else module                   # what the optimisers update
    weights = [p for p in module.parameters() if p.requires_grad]
    master_weights = [p for p in master.parameters() if p.requires_grad]
    ema, optimizers, config = EMA(master, ema_decay), make_optimizers(master, optimizer, lr), config or {}
    step, seconds = resume(folder, master, ema, optimizers, config)
    first_step = step
    if offload:
        module.load_state_dict(master.state_dict())
    if leads:
        forget_after(folder, step)
        with replacing(folder / "settings.json") as temporary:
            temporary.write_text(json.dumps(settings or config, indent=1, default=str))
    distributed.wait_for_all()

    device = weights[0].device
    good = torch.ones((), dtype=torch.bool, device=device)             # read only now and then: reading waits for the device

    def check():
        if not good.item():
            found = list_checkpoints(folder)
            where = f"{found[-1]} holds the last good state" if found else "nothing was saved yet"
            raise ValueError(f"the loss or its gradient is no longer finite, seen at step {step}; {where}")

    def save():
        check()
        if leads:
            record = dict(model=master.state_dict(), ema=ema.weights, ema_updates=ema.updates, config=config, step=step,
                          opt=[o.state_dict() for o in optimizers], seconds=seconds)
            write_checkpoint(folder, record, keep)

    def draw():
        if leads and sheet:
            with averaged(module, ema):
                sheet(folder / f"sheet-{step:07d}.png")
            draw_loss(folder)

    stop = []

    def on_signal(number, _):
        if stop and number == signal.SIGINT and distributed.processes() == 1:         # torchrun passes on what each got itself
            raise KeyboardInterrupt("stopped at once; what came after the last checkpoint is lost")
        if leads and not stop:
            again = "; Ctrl-C again does not wait for it" * (distributed.processes() == 1)
            os.write(2, f"\nstopping after this step{again}\n".encode())              # print must not be called from here
        stop.append(number)

    handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    began = saved_at = drawn_at = time.monotonic()
    logged, logged_step, end = seconds, step, math.inf if minutes is None else began + 60 * minutes
    module.train()
    bar = tqdm(total=steps, initial=step, dynamic_ncols=True, mininterval=1, desc=folder.name, disable=not leads)
    try:
        with open(folder / "metrics.jsonl" if leads else os.devnull, "a") as metrics:
            while step < steps and not distributed.any_of(bool(stop) or time.monotonic() >= end):
                tick = time.monotonic()
                scale = lr_scale(step, steps, warmup, cooldown)
                for o in optimizers:
                    for group in o.param_groups:
                        group["lr"] = scale * o.defaults["lr"]
                loss = torch.zeros((), device=device)
                for rows in parts:
                    part, numbers = loss_fn(step, rows)
                    (part / len(parts)).backward()
                    loss += part.detach() / len(parts)
                distributed.average([loss, *(p.grad for p in weights if p.grad is not None)])
                norm = nn.utils.clip_grad_norm_(weights, clip_norm or math.inf)
                good &= loss.isfinite() & norm.isfinite()
                if offload:
                    for p, m in zip(weights, master_weights):
                        m.grad = None if p.grad is None else p.grad.cpu()
                        p.grad = None
                for o in optimizers:
                    o.step()
                    o.zero_grad(set_to_none=True)
                ema.update(master)
                if offload:
                    copy_weights(master_weights, weights)
                step += 1
                report = step % 20 == 0 or step == steps
                if report:
                    check()                                            # waits for the device, whose time counts too
                now = time.monotonic()
                seconds += now - tick
                bar.update()
                if report:
                    row = dict(step=step, loss=float(loss), lr=scale * lr, grad_norm=float(norm),
                               seconds_per_step=(seconds - logged) / (step - logged_step), seconds=seconds)
                    row |= {k: float(v.detach() if isinstance(v, torch.Tensor) else v) for k, v in numbers.items()}
                    metrics.write(json.dumps({k: float(f"{v:.6g}") for k, v in row.items()}) + "\n")
                    metrics.flush()
                    bar.set_postfix_str(f"loss {row['loss']:.4f}, lr {row['lr']:.1e}, "
                                        f"{batch_size / row['seconds_per_step']:.3g} examples/s", refresh=False)
                    logged, logged_step = seconds, step
                if now - saved_at > 60 * save_minutes:
                    save()
                    saved_at = time.monotonic()
                if now - drawn_at > 60 * sheet_minutes:
                    draw()
                    drawn_at = time.monotonic()
            if step > first_step:
                save()
    finally:
        bar.close()
        for s, handler in handlers.items():
            signal.signal(s, handler)
    if leads:
        draw_loss(folder)
    if distributed.any_of(bool(stop)):
        raise KeyboardInterrupt(f"stopped at step {step}")
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(ema.weights[name])
    module.eval()
    return dict(step=step, seconds=seconds, finished=step >= steps)


def resume(folder: Path, module: nn.Module, ema: EMA, optimizers, config: dict) -> tuple[int, float]:
    """Load the newest checkpoint in `folder`, if any, into module, ema and optimizers. Returns its step and seconds, or zeros."""
    leads, saved = distributed.rank() == 0, None
    if leads:
        saved = read_newest(folder)                                    # renames what is damaged, before the others look
    distributed.wait_for_all()
    if not leads:
        saved = read_newest(folder, mapped=True)                       # or there would be as many copies as processes
    if distributed.any_of(bool(saved)) and distributed.any_of(not saved):
        raise ValueError(f"{folder}: not all processes see its checkpoints; --out must be a folder that they share")
    if not saved:
        return 0, 0.0
    if saved["config"] != config:
        changed = {k for k in saved["config"] | config if saved["config"].get(k) != config.get(k)}
        raise ValueError(f"{folder} holds a run with other settings ({', '.join(sorted(changed))}): repeat its command, "
                         f"or give another --out")
    module.load_state_dict(saved["model"])
    for o, state in zip(optimizers, saved["opt"]):
        o.load_state_dict(state)
        lay_out_as_weights(o)
    for name, value in saved["ema"].items():
        ema.weights[name].copy_(value)
    ema.updates = saved["ema_updates"]
    if leads:
        print(f"resuming {folder} at step {saved['step']}", flush=True)
    return saved["step"], saved["seconds"]


@torch.no_grad()
def copy_weights(source, target):
    for s, t in zip(source, target):
        t.copy_(s, non_blocking=True)


@contextmanager
def averaged(module, ema):
    """Within the block the module holds the averaged weights, in eval mode and without gradients."""
    own = [p.detach().clone() for p in module.parameters()]
    copy_weights(ema.weights.values(), module.parameters())
    module.eval()
    with torch.no_grad():
        yield
    copy_weights(own, module.parameters())
    module.train()
