"""What the stages of train.py share: one way to run, batches of examples made in blocks, the loss of a diffusion model."""
import json
import subprocess
from contextlib import nullcontext
from datetime import date
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from . import distributed
from .schedule import add_noise, make_alphas_cumprod, velocity
from .training import fit, seeded


# Settings that may change when a run is resumed. Another number of steps moves the cool-down.
MAY_CHANGE = ("out", "cache", "minutes", "steps", "device", "sheet_minutes", "save_minutes", "keep", "score_examples", "cfg_text",
              "cfg_image", "accumulate", "offload", "checkpointing", "compile", "workers", "preset", "num_captions", "triples")


def run(args, module, loss_fn, sheet=None, **fixed):
    """Train `module` by the stage's settings. Its folder's settings.json gets all of them; its checkpoints get `fixed` and those
    that MAY_CHANGE does not name: should any of these differ, a run is not resumed. Returns the record for the file's
    metadata."""
    settings = {k: v for k, v in vars(args).items() if k not in ("layout", "autocast") and v is not None}
    free = (*MAY_CHANGE, "data") if "pairs" in fixed else MAY_CHANGE              # pairs say more than their folder's name
    fixed |= {k: v.name if isinstance(v, Path) else v for k, v in settings.items() if k not in free}
    folder = args.out / args.stage
    folder.mkdir(parents=True, exist_ok=True)
    first = distributed.rank() == 0
    with distributed.locked(folder, f"{folder}: another run is at work there") if first else nullcontext():
        result = fit(module, loss_fn, folder, steps=args.steps, batch_size=args.batch_size, accumulate=args.accumulate,
                     minutes=args.minutes, lr=args.lr, optimizer=args.optimizer, warmup=args.warmup, cooldown=args.cooldown,
                     ema_decay=args.ema_decay, clip_norm=args.clip_norm, offload=args.offload, keep=args.keep,
                     save_minutes=args.save_minutes, sheet_minutes=args.sheet_minutes, sheet=sheet, config=fixed,
                     settings=settings)
    data = f"ip2p.world, {args.subset}" if args.data == "world" else Path(args.data).name
    return dict(stage=args.stage, data=data, steps=result["step"], batch_size=args.batch_size,
                minutes=round(result["seconds"] / 60, 1), finished=result["finished"], commit=commit(),
                date=str(date.today()))


def history(record: dict) -> dict:
    """What a file's metadata says of its training, without its configurations."""
    return {k: v for k, v in record.items() if k not in ("unet", "vae", "text", "scorer", "shared", "shared_sums",
                                                          "parameterization", "image_size")}


def is_miniature(record: dict) -> bool:
    """Whether a model says that it was made for the toy world, or from one that was."""
    return "ip2p.world" in json.dumps(record)


def commit() -> str:
    """The commit of the code at hand, or "" outside a repository, or without git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


class Pool:
    """Examples made in blocks, each gone through `reuse` times: drawing and encoding a scene costs as much as learning
    from it. `draw(start, count)` returns a tuple of tensors or lists; what comes at a step depends on the step alone."""

    def __init__(self, draw, args):
        self.draw, self.args = draw, args
        self.number = self.columns = None                                # of the block in memory

    def batch(self, step, rows=slice(None)):
        B = self.args.batch_size
        batches = self.args.block // B                                   # in a block
        number, step_in_block = divmod(step, batches * self.args.reuse)
        time_through, turn = divmod(step_in_block, batches)
        if number != self.number:
            self.columns, self.number = self._make(number, batches * B), number
        order = torch.randperm(batches * B, generator=seeded(self.args.seed, number, time_through))
        chosen = order[turn * B:(turn + 1) * B][rows]
        return [c[to_device(chosen, str(c.device))] if torch.is_tensor(c) else [c[i] for i in chosen.tolist()]
                for c in self.columns]

    def _make(self, number, size):
        """The columns of a block of `size` examples; the processes share the work."""
        with tqdm(total=size, desc="drawing", leave=False, dynamic_ncols=True, disable=distributed.rank() > 0) as bar:
            def draw(i):
                part = self.draw(number * size + i, min(128, size - i))
                bar.update(min(128 * distributed.processes(), size - bar.n))
                return part
            parts = distributed.share_out(range(0, size, 128), draw)
        return [torch.cat(c) if torch.is_tensor(c[0]) else sum(c, []) for c in zip(*parts)]


@torch.no_grad()
def latent_moments(vae, pixels):
    """Mean and log variance of the unscaled latents of pixels, (B, 2, z, h, w) float32."""
    posterior = vae.encode(pixels)
    return torch.stack([posterior.mean, posterior.logvar], 1).float()


def to_device(x, device: str):
    """The tensor on the device, without waiting for a GPU."""
    return x.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") and not x.is_cuda else x.to(device)


@lru_cache
def alphas_on(device):
    return make_alphas_cumprod().to(device)


def draw_timesteps(distribution, count, rng, settling=False):
    """(count,) int64 in 0..999: uniform, as published, or logit-normal (Esser et al. 2024, arXiv:2403.03206) around 650, where
    the shape of things is decided: less time for the fine grain, which is made up for while a run is `settling`."""
    if distribution == "uniform" or settling:
        return torch.randint(0, 1000, (count,), generator=rng)
    return (1000 * torch.sigmoid(0.6 + torch.randn(count, generator=rng))).long().clamp(max=999)


def is_settling(step, args):
    """Whether a step is in the second half of the cool-down, where the learning rate is low."""
    return step >= (1 - args.cooldown / 2) * args.steps


def diffusion_loss(model, x0, context, t, noise, parameterization, image_latents=None):
    """Mean squared error of the predicted eps (arXiv:2211.09800, Eq. 1), or of v. x0, noise, image_latents: (B, z, h, w), x0
    scaled to unit variance, image_latents as the model takes them, in InstructPix2Pix not scaled; t: (B,)."""
    alphas_cumprod = alphas_on(x0.device)
    x = add_noise(x0, noise, t, alphas_cumprod)
    x = x if image_latents is None else torch.cat([x, image_latents], 1)
    target = noise if parameterization == "eps" else velocity(x0, noise, t, alphas_cumprod)
    return F.mse_loss(model(x, t, context).float(), target)
