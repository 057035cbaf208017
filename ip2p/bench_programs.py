"""What ip2p.bench holds side by side. Every function here makes another one, which is timed.

edit_by_*: whole edits, from picture to picture. draw_with: pairs of pictures. train_by_*: optimiser steps of an editor's
training, as train.py makes them, and as diffusers' train_instruct_pix2pix.py does between two batches of its loader.
"""
from functools import lru_cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from . import pipeline
from .checkpoint import Parts
from .guidance import dropout_masks
from .pipeline import InstructPix2Pix
from .prompt_to_prompt import ControlledRun
from .stages import diffusion_loss, draw_timesteps, encode, recompute_stages, to_device
from .text import TextEncoder, import_open_clip
from .training import EMA, make_optimizers, seeded
from .unet import UNet, UNetConfig
from .vae import AutoencoderKL

WEIGHTS = Path(__file__).parent.parent / "weights"
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)


def open_model(args, editor=True):
    """The shipped model, or one of Stable Diffusion 1.5's size with random weights."""
    if not args.full_size:
        path = args.model or WEIGHTS / f"mini-{'ip2p' if editor else 'sd'}.safetensors"
        return InstructPix2Pix.load(path, args.device, DTYPES[args.dtype])
    torch.manual_seed(0)
    with torch.device(args.device):
        parts = UNet(UNetConfig(in_channels=8 if editor else 4)), AutoencoderKL(), TextEncoder()
    parts = (part.eval().requires_grad_(False).to(DTYPES[args.dtype]) for part in parts)
    return InstructPix2Pix(Parts(*parts, "eps", 512, {}))


def export(args, folder):
    """Writes the editor as a diffusers folder. The function returned gives the side of its pictures."""
    model = open_model(args)
    model.save(folder, "diffusers")
    return lambda: model.parts.image_size


# ---- edits

@lru_cache(1)
def inputs(pictures, size, z_channels, downsampling):
    """Pictures of noise, instructions, and the noise to start from."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(pictures)]
    x_T = torch.randn(pictures, z_channels, *[size // downsampling] * 2, generator=seeded(0))
    return images, ["make it night"] * pictures, x_T


def edit_by_ip2p(path, device, dtype, compiled=False):
    """edit(pictures, size, steps, cfg_text, cfg_image) -> (pictures, size, size, 3) uint8, by `InstructPix2Pix.edit`."""
    model = InstructPix2Pix.load(path, device, DTYPES[dtype])
    if compiled:
        model.unet.forward = torch.compile(model.unet.forward)             # as sample.py --compile

    def edit(pictures, size, steps, cfg_text, cfg_image):
        size = size or model.parts.image_size
        images, prompts, x_T = inputs(pictures, size, model.vae.config.z_channels, model.vae.config.downsampling)
        return np.stack(model.edit(images, prompts, steps=steps, cfg_text=cfg_text, cfg_image=cfg_image, size=size, x_T=x_T,
                                   progress=False))
    return edit


def edit_by_diffusers(folder, device, dtype, compiled=False):
    """The same by diffusers' pipeline; compiled as its guide to fast inference says."""
    import_open_clip()                                                     # before diffusers: see its docstring
    import diffusers
    diffusers.utils.logging.disable_progress_bar()
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(folder, torch_dtype=DTYPES[dtype]).to(device)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        gpu = device.startswith("cuda")
        if gpu:
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.vae.to(memory_format=torch.channels_last)
        pipe.unet = torch.compile(pipe.unet, mode="max-autotune" if gpu else None, fullgraph=True)

    def edit(pictures, size, steps, cfg_text, cfg_image):
        images, prompts, x_T = inputs(pictures, size, pipe.vae.config.latent_channels, pipe.vae_scale_factor)
        return np.stack(pipe(prompts, images, num_inference_steps=steps, guidance_scale=cfg_text,
                             image_guidance_scale=cfg_image, latents=x_T.to(device, DTYPES[dtype])).images)
    return edit


# ---- pairs

class MaterializedRun(ControlledRun):
    """The same controls as published code has them: on the attention maps, which are all in memory."""

    def __call__(self, q, k, v, heads, is_cross):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))       # (B, heads, tokens, C / heads)
        maps = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)                                # (B, heads, pixels, tokens)
        if not is_cross and self.shares_self and q.shape[2] <= self.most_pixels:
            maps = maps[self.self_rows]
        if is_cross and self.crossing is not None:
            rows, source, from_source, own = self.crossing
            borrowed = maps[source] @ from_source.to(maps.dtype)[:, None]
            maps = (maps * own.to(maps.dtype)[:, None].mT).index_add(0, rows, borrowed)
        return (maps @ v).transpose(1, 2).flatten(2)


def draw_with(run, args):
    """draw(control) -> (2 B, 3, size, size) pixels, by `draw_pairs` with `run` in the place of attention."""
    model = open_model(args, editor=False)
    B, steps, size = args.batch_size[0], args.steps[0], args.size and args.size[0]
    texts = ["a red car in a city"] * B, ["a red car in a city at night"] * B

    def draw(control):
        with patch.object(pipeline, "ControlledRun", run):
            return torch.cat(model.draw_pairs(*texts, list(range(B)), [0.5] * B, [3.0] * B, steps=steps, control=control,
                                              size=size)).numpy()
    return draw


# ---- training

LR, DROPOUT, CLIP_NORM = 1e-4, 0.05, 1.0
INSTRUCTIONS = ("make it night", "make it winter", "turn the fox into a panda", "make the car blue")


def examples(args):
    """Pixels before and after, (B, 3, size, size) in [-1, 1], and instructions."""
    before, after = torch.rand(2, args.batch_size, 3, args.size, args.size, generator=seeded(1)) * 2 - 1
    instructions = [INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(args.batch_size)]
    return before.to(args.device), after.to(args.device), instructions


def autocast(args):
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.dtype == "bf16")


def draws(number, args, shape):
    """Timesteps, and noise for the step and for the latents' spread."""
    rng = seeded(0, number)
    t, noise, spread = draw_timesteps("uniform", args.batch_size, rng), *torch.randn(2, *shape, generator=rng)
    return (to_device(x, args) for x in (t, noise, spread))


def train_by_ip2p(folder, args, cached):
    """cached: latents and text features come in half precision from memory, as they do from `CachedPairs`."""
    gpu = args.device.startswith("cuda")
    model = InstructPix2Pix.load(folder, args.device)
    layout = torch.channels_last if gpu else torch.contiguous_format
    unet, vae, text = model.unet.to(memory_format=layout).requires_grad_(True).train(), model.vae, model.text
    recompute_stages(unet, args.checkpointing)
    predict = torch.compile(unet) if args.compile else unet
    optimizer, = make_optimizers(unet, "adamw", LR)
    ema, weights = EMA(unet), list(unet.parameters())
    B, (before, after, instructions) = args.batch_size, examples(args)
    told = SimpleNamespace(device=args.device, autocast=lambda: autocast(args))

    @torch.no_grad()
    def encode_text(texts):
        with autocast(args):
            return text(to_device(model.tokenizer(texts), args))

    def encode_pairs():
        latents = encode(vae, torch.cat([before, after]), told)
        return latents[:B, 0], latents[B:]

    if cached:
        kept = [x.half() for x in (*encode_pairs(), encode_text(instructions))]
        null_context = encode_text([""])
    numbers = count()

    def step():
        number = next(numbers)
        drop_text, drop_image = dropout_masks(B, DROPOUT, seeded(2, number))
        if cached:
            image_latents, target, context = (x.float() for x in kept)
            context = torch.where(to_device(drop_text, args)[:, None, None], null_context, context)
        else:
            image_latents, target = encode_pairs()
            context = encode_text(["" if d else text for text, d in zip(instructions, drop_text)])
        mean, logvar = target.unbind(1)
        t, noise, spread = draws(number, args, mean.shape)
        x0 = (mean + (0.5 * logvar).exp() * spread) * vae.config.scale_factor
        image_latents = image_latents.masked_fill(to_device(drop_image, args)[:, None, None, None], 0)
        with autocast(args):
            loss = diffusion_loss(predict, x0, context, t, noise, model.parts.parameterization, image_latents)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(unet)
        return loss.item()
    return step


def train_by_diffusers(folder, args):
    """What the published script does between two batches of its loader, with its default optimiser and --use_ema."""
    import_open_clip()                                         # before diffusers: see its docstring
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import EMAModel
    from transformers import CLIPTextModel, CLIPTokenizer
    frozen = dict(device=args.device, dtype=torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").to(args.device).train()
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").to(**frozen).requires_grad_(False)
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").to(**frozen).requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    ema.to(args.device)
    if args.checkpointing:
        unet.enable_gradient_checkpointing()
    predict = torch.compile(unet) if args.compile else unet
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    B, (before, after, instructions) = args.batch_size, examples(args)

    def tokens(texts):
        return tokenizer(texts, max_length=tokenizer.model_max_length, padding="max_length", truncation=True,
                         return_tensors="pt").input_ids

    input_ids = tokens(instructions)
    numbers = count()

    def step():
        number = next(numbers)
        posterior = vae.encode(after.to(frozen["dtype"])).latent_dist
        t, noise, spread = draws(number, args, posterior.mean.shape)
        latents = (posterior.mean + posterior.std * spread.to(frozen["dtype"])) * vae.config.scaling_factor
        noise = noise.to(latents.dtype)
        noisy_latents = scheduler.add_noise(latents, noise, t)
        context = text(input_ids.to(args.device))[0]
        image_embeds = vae.encode(before.to(frozen["dtype"])).latent_dist.mode()

        r = torch.rand(B, generator=seeded(2, number)).to(args.device)
        null_context = text(tokens([""]).to(args.device))[0]
        context = torch.where((r < 2 * DROPOUT)[:, None, None], null_context, context)
        image_mask = 1 - (r >= DROPOUT).to(image_embeds.dtype) * (r < 3 * DROPOUT).to(image_embeds.dtype)
        image_embeds = image_mask[:, None, None, None] * image_embeds

        target = noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, t)
        with autocast(args):
            eps = predict(torch.cat([noisy_latents, image_embeds], 1), t, context, return_dict=False)[0]
        loss = F.mse_loss(eps.float(), target.float())
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        return loss.item()
    return step
