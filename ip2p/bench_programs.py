"""What ip2p.bench holds side by side. Every function here makes another one, which is timed.

edit_by_*: whole edits, from picture to picture; multiply_as_much: the least that they take. draw_by_*: pairs of pictures,
as make_data.py draws them. train_by_*: optimiser steps of an editor's training, as train.py makes them, and as diffusers'
train_instruct_pix2pix.py does between two batches of its loader.
"""
from functools import lru_cache, partial
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .checkpoint import Parts, load_checkpoint
from .clip_filter import import_open_clip
from .command_line import WEIGHTS, keep_freed_memory
from .distributed import DTYPES
from .guidance import dropout_masks
from .pipeline import InstructPix2Pix
from .prompt_to_prompt import AttentionControl, ControlledRun, control_pairs
from .stages import diffusion_loss, draw_timesteps, latent_moments, to_device
from .text import TextEncoder
from .training import EMA, make_optimizers, seeded
from .unet import UNet, UNetConfig
from .vae import AutoencoderKL

CFG_TEXT = 3.0                                                     # of pairs


def open_model(args, editor):
    """The shipped model, or one of Stable Diffusion 1.5's size with random weights."""
    if not args.full_size:
        path = args.model or WEIGHTS / f"mini-{'ip2p' if editor else 'sd'}.safetensors"
        return InstructPix2Pix.load(path, args.device, DTYPES[args.dtype])
    torch.manual_seed(0)
    with torch.device(args.device):
        parts = UNet(UNetConfig(in_channels=8 if editor else 4)), AutoencoderKL(), TextEncoder()
    parts = (part.eval().requires_grad_(False).to(DTYPES[args.dtype]) for part in parts)
    return InstructPix2Pix(Parts(*parts, "eps", 512, {}))


def export(args, folder, editor):
    """Writes the model as a diffusers folder. The function returned gives the side of its pictures."""
    model = open_model(args, editor)
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


def edit_by_ip2p(path, device, dtype, compiled=False, low_memory=False):
    """edit(pictures, size, steps, cfg_text, cfg_image) -> (pictures, size, size, 3) uint8, by `InstructPix2Pix.edit`."""
    keep_freed_memory()                                                    # here and below: as ip2p's commands do
    model = InstructPix2Pix.load(path, device, DTYPES[dtype], low_memory=low_memory)
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
            pipe.fuse_qkv_projections()
            pipe.vae.decode = torch.compile(pipe.vae.decode, mode="max-autotune", fullgraph=True)
            from torch._inductor import config
            for name, value in dict(conv_1x1_as_mm=True, coordinate_descent_tuning=True, epilogue_fusion=False,
                                    coordinate_descent_check_all_directions=True).items():
                setattr(config, name, value)
        pipe.unet = torch.compile(pipe.unet, mode="max-autotune" if gpu else None, fullgraph=True)

    def edit(pictures, size, steps, cfg_text, cfg_image):
        images, prompts, x_T = inputs(pictures, size, pipe.vae.config.latent_channels, pipe.vae_scale_factor)
        return np.stack(pipe(prompts, images, num_inference_steps=steps, guidance_scale=cfg_text,
                             image_guidance_scale=cfg_image, latents=x_T.to(device, DTYPES[dtype])).images)
    return edit


@torch.no_grad()
def count_operations(model, pictures, size, steps, cfg_text, cfg_image):
    """Additions and multiplications in the layers of such an edit. model: on the meta device, which computes nothing."""
    with FlopCounterMode(display=False) as counter:
        image_latents = model.encode(torch.empty(pictures, 3, size, size, device="meta"))
        z = model.edit_latents(image_latents, ["make it night"] * pictures, cfg_text, cfg_image, steps=steps,
                               seeds=range(pictures))
        model.vae.decode(z)
    return counter.get_total_flops()


def multiply_as_much(folder, device, dtype):
    """What no edit can be faster than at the machine's rate: products of square matrices with as many operations. It returns
    no pictures."""
    parts = load_checkpoint(folder)
    for part in (parts.unet, parts.vae, parts.text):
        part.to("meta")
    model = InstructPix2Pix(parts)
    torch.backends.cuda.matmul.allow_tf32 = True               # as convolutions may by default
    side = 8192 if device.startswith("cuda") else 1024
    a, b = torch.randn(2, side, side, generator=seeded(0)).to(device, DTYPES[dtype])
    operations = lru_cache(partial(count_operations, model))

    def multiply(pictures, size, steps, cfg_text, cfg_image):
        rows = round(operations(pictures, size or model.parts.image_size, steps, cfg_text, cfg_image) / (2 * side * side))
        for start in range(0, rows, side):
            a[:rows - start] @ b
    return multiply


# ---- pairs

CAPTIONS = ("a red car in the city", "a fox", "a house in summer")
EDITED = ("a red car in the city at night", "a blue fox", "a house in winter")


def pair_settings(args):
    """Of pairs to draw: captions, edited captions, seeds, and shares of the steps, as wide apart as the paper's."""
    numbers = range(args.batch_size)
    texts = ([texts[i % len(texts)] for i in numbers] for texts in (CAPTIONS, EDITED))
    return *texts, list(numbers), np.linspace(0.1, 0.9, args.batch_size).tolist()


def draw_by_ip2p(folder, args):
    """draw(control) -> (2 B, 3, size, size) pixels, sources first, by `draw_pairs`."""
    keep_freed_memory()
    model = InstructPix2Pix.load(folder, args.device, DTYPES[args.dtype])
    *texts, seeds, shares = pair_settings(args)

    def draw(control):
        return torch.cat(model.draw_pairs(*texts, seeds, shares, [CFG_TEXT] * len(seeds), steps=args.steps, control=control,
                                          size=args.size)).numpy()
    return draw


class MapsProcessor:
    """For diffusers' attention layers: the maps are computed, edited in place as published Prompt-to-Prompt does it, and
    applied. Of guidance's two halves of the batch, the one without text comes first. `step`: counted by the pipeline."""

    def __init__(self, control: AttentionControl, side: int):
        self.control, self.step = control, 0
        self.most_pixels = ControlledRun(control, side, side).most_pixels
        self.targets = [(r, s) for r, s in enumerate(control.source.tolist()) if s != r]
        if control.cross_steps is not None:                      # each token of a target answers to one of its source's
            self.weights, self.tokens = control.from_source.max(1)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        is_cross = encoder_hidden_states is not None
        context = encoder_hidden_states if is_cross else hidden_states
        q, k, v = (attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        maps = attn.get_attention_scores(q, k)                                       # (2 R heads, pixels, tokens)
        plain, told = maps.unflatten(0, (2, len(self.control.source), -1))           # (R, heads, pixels, tokens)
        if is_cross and self.control.cross_steps is not None:
            self.edit_cross(told)
        elif not is_cross and q.shape[1] <= self.most_pixels:
            for half in (plain, told) if self.control.unconditional else (told,):
                for target, source in self.targets:
                    if self.control.self_steps[self.step, target]:
                        half[target] = half[source]
        return attn.to_out[0](attn.batch_to_head_dim(maps @ v))

    def edit_cross(self, maps):
        for target, source in self.targets:
            alpha = self.control.cross_steps[self.step, target].to(maps)
            new = maps[source][..., self.tokens[target]] * self.weights[target].to(maps)
            new += maps[target] * self.control.own[target].to(maps)
            maps[target] = alpha * new + (1 - alpha) * maps[target]


def draw_by_diffusers(folder, args):
    """The same by diffusers' pipeline and sampler, with maps in memory."""
    import_open_clip()                                                     # before diffusers: see its docstring
    import diffusers
    diffusers.utils.logging.disable_progress_bar()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=DTYPES[args.dtype]).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    captions, edited, seeds, shares = pair_settings(args)
    tokenizer = InstructPix2Pix.load(folder).tokenizer
    shape = pipe.unet.config.in_channels, *[args.size // pipe.vae_scale_factor] * 2

    def draw(control):
        maps = MapsProcessor(control_pairs(tokenizer, captions, edited, shares, args.steps, control), shape[-1])
        pipe.unet.set_attn_processor(maps)

        def after_step(pipe, step, t, kept):
            maps.step = step + 1
            return kept

        streams = [torch.Generator().manual_seed(seed) for seed in seeds * 2]
        x_T = torch.stack([torch.randn(shape, generator=stream) for stream in streams])
        pictures = pipe(captions + edited, num_inference_steps=args.steps, guidance_scale=CFG_TEXT, height=args.size,
                        width=args.size, generator=streams, latents=x_T.to(args.device, DTYPES[args.dtype]), output_type="pt",
                        callback_on_step_end=after_step).images
        return pictures.float().cpu().numpy() * 2 - 1
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


def set_precision(args):
    """Of float32 products, as train.py does."""
    if args.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")


def draws(number, args, shape):
    """Timesteps, and noise for the step and for the latents' spread."""
    rng = seeded(0, number)
    t, noise, spread = draw_timesteps("uniform", args.batch_size, rng), *torch.randn(2, *shape, generator=rng)
    return (to_device(x, args.device) for x in (t, noise, spread))


def train_by_ip2p(folder, args, cached):
    """cached: latents and text features come in half precision from memory, as they do from `CachedPairs`."""
    keep_freed_memory()
    set_precision(args)
    model = InstructPix2Pix.load(folder, args.device)
    unet, vae, text = model.unet.requires_grad_(True).train(), model.vae, model.text
    unet.recompute_blocks(args.checkpointing)
    predict = torch.compile(unet) if args.compile else unet
    optimizer, = make_optimizers(unet, "adamw", LR)
    ema, weights = EMA(unet), list(unet.parameters())
    B, (before, after, instructions) = args.batch_size, examples(args)

    @torch.no_grad()
    def encode_text(texts):
        with autocast(args):
            return text(to_device(model.tokenizer(texts), args.device))

    def encode_pairs():
        with autocast(args):
            latents = latent_moments(vae, torch.cat([before, after]))
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
            context = torch.where(to_device(drop_text, args.device)[:, None, None], null_context, context)
        else:
            image_latents, target = encode_pairs()
            context = encode_text(["" if d else text for text, d in zip(instructions, drop_text)])
        mean, logvar = target.unbind(1)
        t, noise, spread = draws(number, args, mean.shape)
        x0 = (mean + (0.5 * logvar).exp() * spread) * vae.config.scale_factor
        image_latents = image_latents.masked_fill(to_device(drop_image, args.device)[:, None, None, None], 0)
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
    set_precision(args)
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
