"""What the stages of train.py share: one way to run, batches of examples made in blocks, the loss of a diffusion model."""
import subprocess
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

from .schedule import add_noise, make_alphas_cumprod, velocity
from .training import fit, seeded


def run(args, module, loss_fn, sheet=None):
    """Train `module` by the stage's settings. Returns the record that goes into the file's metadata."""
    # What may change on resuming; another number of steps moves the cool-down.
    idle = ("minutes", "steps", "device", "sheet_minutes", "score_examples", "cfg_text", "cfg_image")
    settings = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str)) and k not in idle}
    result = fit(module, loss_fn, args.out / args.stage, steps=args.steps, minutes=args.minutes, lr=args.lr,
                 optimizer=args.optimizer, warmup=args.warmup, cooldown=args.cooldown, ema_decay=args.ema_decay,
                 sheet_minutes=args.sheet_minutes, sheet=sheet, config=settings)
    data = Path(args.data).name if args.data else f"ip2p.world, {args.subset}"
    return dict(stage=args.stage, data=data, steps=result["step"], batch_size=args.batch_size,
                minutes=round(result["seconds"] / 60, 1), finished=result["finished"], commit=commit(),
                date=str(date.today()))


def history(record: dict) -> dict:
    """What a file's metadata says of its training, without its configurations."""
    return {k: v for k, v in record.items() if k not in ("unet", "vae", "text", "shared", "parameterization", "image_size")}


def commit() -> str:
    """The commit of the code at hand, or "" outside a repository."""
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return answer.stdout.strip()


class Pool:
    """Examples made in blocks, each gone through `reuse` times: drawing and encoding a scene costs as much as learning
    from it. `draw(start, count)` returns a tuple of tensors or lists; what comes at a step depends on the step alone."""

    def __init__(self, draw, args):
        self.draw, self.args, self.number = draw, args, None

    def batch(self, step):
        B, block = self.args.batch_size, self.args.block // self.args.batch_size * self.args.batch_size
        number, within = divmod(step, block // B * self.args.reuse)
        again, row = divmod(within, block // B)
        if number != self.number:
            parts = [self.draw(number * block + i, min(128, block - i)) for i in range(0, block, 128)]
            self.columns = [torch.cat(c) if torch.is_tensor(c[0]) else sum(c, []) for c in zip(*parts)]
            self.number = number
        rows = torch.randperm(block, generator=seeded(self.args.seed, number, again))[row * B:(row + 1) * B].tolist()
        return [c[rows] if torch.is_tensor(c) else [c[i] for i in rows] for c in self.columns]


@torch.no_grad()
def encode(vae, pixels, args):
    with args.autocast():
        return vae.encode(pixels).mode().float()


def draw_timesteps(distribution, count, rng):
    """(count,) int64 in 0..999: uniform, as published, or logit-normal (Esser et al. 2024, arXiv:2403.03206) around 650, where
    the shape of things is decided: less time for the fine grain."""
    if distribution == "uniform":
        return torch.randint(0, 1000, (count,), generator=rng)
    return (1000 * torch.sigmoid(0.6 + torch.randn(count, generator=rng))).long().clamp(max=999)


def diffusion_loss(model, x0, context, t, noise, parameterization, image_latents=None):
    """Mean squared error of the predicted eps or v. x0, noise, image_latents: (B, z, h, w); t: (B,)."""
    alphas_cumprod = make_alphas_cumprod()
    x = add_noise(x0, noise, t, alphas_cumprod)
    x = x if image_latents is None else torch.cat([x, image_latents], 1)
    target = noise if parameterization == "eps" else velocity(x0, noise, t, alphas_cumprod)
    return F.mse_loss(model(x, t, context).float(), target)
