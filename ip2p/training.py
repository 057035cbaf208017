"""One training loop for every stage: exact resume, EMA, warm-up and cool-down, metrics, sheets.

A step is a function of its number: `loss_fn(step)` draws the same batch and noise whenever it is asked for that step. So
a run that was stopped and repeated is, bit for bit on a CPU, the run that was not.
"""
import json
import signal
import time
from pathlib import Path
from typing import Callable

import torch
from torch import nn
from tqdm import tqdm

from .muon import Muon
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

    def swap(self, module: nn.Module):
        """Exchange the module's weights with the average; a second call undoes it."""
        for name, p in module.named_parameters():
            p.data, self.weights[name] = self.weights[name], p.data


def make_optimizers(module: nn.Module, name: str, lr: float, weight_decay: float = 0.01):
    """AdamW over everything; or Muon (at 20 lr) over the inner matrices and AdamW over the rest."""
    params = {n: p for n, p in module.named_parameters() if p.requires_grad}
    fused = dict(betas=(0.9, 0.99 if name == "muon" else 0.999), weight_decay=weight_decay, fused=True)
    if name == "adamw":
        return [torch.optim.AdamW(params.values(), lr=lr, **fused)]
    outer = ("embedding", "conv_in", "conv_out", "input_blocks.0.", "out.2", "visual.conv1", "logit_scale", "wte", "wpe")
    inner = [p for n, p in params.items() if p.ndim >= 2 and not any(part in n for part in outer)]
    inside = {id(p) for p in inner}
    return [Muon(inner, lr=20 * lr), torch.optim.AdamW([p for p in params.values() if id(p) not in inside], lr=lr, **fused)]


def lr_scale(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Multiplier of the learning rate: up over `warmup` steps, then 1, down to 0 over the last share `cooldown`."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    fall = min(1.0, (steps - step) / max(1.0, cooldown * steps))
    return min(rise, fall)


def fit(module: nn.Module, loss_fn: Callable, folder: Path, *, steps: int, minutes: float | None = None, lr: float = 1e-4,
        optimizer: str = "adamw", warmup: int = 100, cooldown: float = 0.0, ema_decay: float = 0.9999,
        clip_norm: float = 1.0, save_minutes: float = 3.0, sheet_minutes: float = 10.0, sheet: Callable | None = None,
        config: dict | None = None) -> dict:
    """Train `module` until `steps` are done or `minutes` of this call have passed, resuming from `folder`.

    loss_fn(step) -> (loss, dict of numbers to log). sheet(path) writes a picture, called with the averaged weights.
    In `folder`: last.pt (everything needed to go on), metrics.jsonl, sheet-*.png. On return, by whichever way (SIGINT and
    SIGTERM stop after the step in hand), the module holds the averaged weights. Returns {"step", "seconds", "finished"}.
    Raises ValueError if the folder holds a run with another `config`, or the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ema, optimizers, config = EMA(module, ema_decay), make_optimizers(module, optimizer, lr), config or {}
    step, seconds, last = 0, 0.0, folder / "last.pt"
    if last.exists():
        saved = torch.load(last, weights_only=True, map_location="cpu")
        if saved["config"] != config:
            changed = {k for k in saved["config"] | config if saved["config"].get(k) != config.get(k)}
            raise ValueError(f"{folder} holds a run with other settings ({', '.join(sorted(changed))}): repeat its command, "
                             f"or give another --out")
        module.load_state_dict(saved["model"])
        for o, state in zip(optimizers, saved["opt"]):
            o.load_state_dict(state)
        for name, value in saved["ema"].items():
            ema.weights[name].copy_(value)
        ema.updates, step, seconds = saved["ema_updates"], saved["step"], saved["seconds"]
        print(f"resuming {folder} at step {step}", flush=True)

    def save():
        record = dict(model=module.state_dict(), ema=ema.weights, ema_updates=ema.updates, config=config, step=step,
                      opt=[o.state_dict() for o in optimizers], seconds=seconds)
        with replacing(last) as temporary:
            torch.save(record, temporary)

    stop = []
    handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    began = logged = saved_at = drawn_at = time.monotonic()
    logged_step = step
    module.train()
    bar = tqdm(total=steps, initial=step, dynamic_ncols=True, mininterval=1, desc=folder.name)
    try:
        with open(folder / "metrics.jsonl", "a") as metrics:
            while step < steps and not stop and (minutes is None or time.monotonic() - began < 60 * minutes):
                tick = time.monotonic()
                scale = lr_scale(step, steps, warmup, cooldown)
                for o in optimizers:
                    for group in o.param_groups:
                        group["lr"] = scale * (20 * lr if isinstance(o, Muon) else lr)
                loss, numbers = loss_fn(step)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
                for o in optimizers:
                    o.step()
                    o.zero_grad(set_to_none=True)
                ema.update(module)
                step += 1
                now = time.monotonic()
                seconds += now - tick
                bar.update()
                if step % 20 == 0 or step == steps:
                    value = loss.item()
                    if not torch.isfinite(torch.tensor(value)):
                        raise ValueError(f"the loss became {value} at step {step}; {last} holds the last good state")
                    row = dict(step=step, loss=value, lr=scale * lr, grad_norm=float(norm),
                               seconds_per_step=(now - logged) / (step - logged_step), seconds=seconds)
                    row |= {k: float(v.detach() if isinstance(v, torch.Tensor) else v) for k, v in numbers.items()}
                    metrics.write(json.dumps({k: float(f"{v:.6g}") for k, v in row.items()}) + "\n")
                    metrics.flush()
                    bar.set_postfix(loss=f"{value:.4f}", lr=f"{scale * lr:.1e}")
                    logged, logged_step = now, step
                if now - saved_at > 60 * save_minutes:
                    save()
                    saved_at = time.monotonic()
                if sheet and now - drawn_at > 60 * sheet_minutes:
                    _draw(module, ema, sheet, folder / f"sheet-{step:07d}.png")
                    drawn_at = time.monotonic()
    finally:
        bar.close()
        for s, handler in handlers.items():
            signal.signal(s, handler)
    save()
    ema.swap(module)
    module.eval()
    return dict(step=step, seconds=seconds, finished=step >= steps)


def _draw(module, ema, sheet, path):
    ema.swap(module)
    module.eval()
    with torch.no_grad():
        sheet(path)
    ema.swap(module)
    module.train()
