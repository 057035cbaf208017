"""The miniature's models from nothing, on the toy world's scenes: autoencoder, CLIP, text-to-image base, scorer.

Each stage is a function of the settings (`train.py --help`) and a `World`; it writes its result into `args.out`, where the
next finds it, and returns what it says of itself in the file.
"""
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from . import distributed
from .attention import SpatialTransformer
from .checkpoint import Parts, load_checkpoint, load_vae, round_as_stored, save_checkpoint, save_vae
from .clip_filter import build_clip, load_clip, normalize_pixels, save_clip
from .features import hash_weights
from .images import contact_sheet, save_image, to_images
from .pipeline import InstructPix2Pix
from .scorer import build_scorer, load_scorer, read_scene, save_scorer, score_scorer, scorer_loss, soften
from .stages import Pool, diffusion_loss, draw_timesteps, history, is_settling, latent_moments, run, to_device
from .tensorfiles import read_state_dict, round_weights, small_dtype
from .text import TextConfig, TextEncoder, Tokenizer
from .training import seeded
from .truth import psnr, through
from .unet import ResBlock, UNet, UNetConfig
from .vae import AttnBlock, AutoencoderKL, ResnetBlock, VAEConfig
from .world import KINDS


# ---- the autoencoder

VAE = VAEConfig(channels=16, channel_mult=(1, 2, 4, 8), num_res_blocks=1, z_channels=16, norm_groups=4, scale_factor=1.0)


def train_vae(args, world):
    """Random crops, L1 + MSE and a touch of KL. Residual branches start at zero, so it begins as a linear code."""
    vae = AutoencoderKL(VAE).to(args.device, memory_format=args.layout)
    start_as_identity(vae)

    def loss_fn(step, rows):
        rng, side = seeded(args.seed, step), args.crop
        pixels, _ = world.pictures(args.seed, step * args.batch_size // 2, args.batch_size // 2)
        corners = torch.randint(0, 128 - side + 1, (2 * len(pixels), 2), generator=rng).tolist()
        x = torch.stack([pixels[i // 2, :, a:a + side, b:b + side] for i, (a, b) in enumerate(corners)])
        x = x.contiguous(memory_format=args.layout)
        with args.autocast():
            posterior = vae.encode(x)
            z = posterior.sample(torch.randn(posterior.mean.shape, generator=rng).to(x))
            y = vae.decode(z).float()
        mse, kl = F.mse_loss(y, x), posterior.kl().float().mean()
        loss = F.l1_loss(y, x) + 5 * mse + 1e-6 * kl
        return loss, dict(psnr=10 * (4 / mse.detach()).log10(), kl=kl)

    held_out, _ = world.pictures(args.seed, 0, 8, "combinations")

    def sheet(path):
        cells = [(p, text) for pixels, text in ((held_out, "picture"), (through(vae, held_out), "reconstruction"))
                 for p in to_images(pixels)]
        save_image(contact_sheet(cells, lines=1), path)

    record = run(args, vae, loss_fn, sheet)
    normalize_latents(vae, world.pictures(args.seed, 0, 256)[0])
    held_out, _ = world.pictures(args.seed, 0, args.score_examples, "combinations")
    record["psnr"] = round(float(psnr(through(vae, held_out), held_out).mean()), 2)
    save_vae(vae, args.out / "vae.safetensors", record)
    return record


@torch.no_grad()
def normalize_latents(vae, pixels):
    """Shift each latent channel to mean zero and scale all to unit variance, within the 1x1 convolutions next to them."""
    z = torch.cat([vae.encode(x).mode() for x in pixels.split(32)])
    mean, n = z.mean((0, 2, 3)), z.shape[1]
    std = (z - mean[:, None, None]).std()
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std
    quant.weight[:n] /= std
    quant.bias[:n] = (quant.bias[:n] - mean) / std
    quant.bias[n:] -= 2 * std.log()                      # log variance


# ---- CLIP, whose text tower is the text encoder of the next stages

CLIP = dict(embed_dim=192, vision_cfg=dict(image_size=128, patch_size=16, width=192, layers=4, head_width=32),
            text_cfg=dict(context_length=32, vocab_size=2 * 256 + 2 + 2048, width=192, heads=6, layers=4))
TEXT = TextConfig(**CLIP["text_cfg"], quick_gelu=False, skip_last=0, pad_with_end=False)


def train_clip(args, world):
    """Contrastive: each picture of a batch finds its caption among all, and each caption its picture (CLIP, Fig. 3)."""
    clip, tokenizer = build_clip(CLIP).to(args.device), Tokenizer(TEXT)

    def similarities(start, count, split="train"):
        pixels, captions = world.pictures(args.seed + 1, start, count, split)
        with args.autocast():
            images = clip.encode_image(normalize_pixels(pixels), normalize=True)
            texts = clip.encode_text(tokenizer(captions).to(args.device), normalize=True)
        return images.float() @ texts.float().T

    def loss_fn(step, rows):
        logits = clip.logit_scale.exp().clamp(max=100) * similarities(step * args.batch_size, args.batch_size)
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, dict(accuracy=(logits.argmax(1) == target).float().mean())

    record = run(args, clip, loss_fn)
    round_weights(clip, small_dtype)
    with torch.no_grad():
        right = [similarities(start, 100, "combinations").argmax(1) == torch.arange(100, device=args.device)
                 for start in range(0, args.score_examples, 100)]
    record["accuracy_1_of_100"] = round(float(torch.cat(right).float().mean()), 3)
    save_clip(clip, CLIP, args.out / "mini-clip.safetensors", record)
    return record


# ---- the text-to-image base

UNET = UNetConfig(in_channels=VAE.z_channels, out_channels=VAE.z_channels, model_channels=128, channel_mult=(1, 1, 1),
                  num_res_blocks=1, attention_levels=(True, True, True), context_dim=TEXT.width, num_heads=None,
                  head_channels=32)
HARD = ("add", "add", "color", "size", "style")            # edits with two things, or one painted, tiny, huge or in a style


def train_base(args, world):
    """Text to picture: v-prediction, a tenth of the captions dropped; the text tower goes on learning with the UNet."""
    vae = load_vae(args.out / "vae.safetensors").to(args.device, memory_format=args.layout)
    if args.init:
        begun = load_checkpoint(args.init)
        if begun.unet.config.cond_dim or begun.unet.config.in_channels != vae.config.z_channels or begun.parameterization != "v":
            raise ValueError(f"--init {args.init}: not the miniature's text-to-image model, which takes "
                             f"{vae.config.z_channels} channels and predicts v")
        unet, text = begun.unet.requires_grad_(True), begun.text.requires_grad_(True)
    else:
        unet, text = UNet(UNET), TextEncoder(replace(TEXT, projection_dim=CLIP["embed_dim"]))
        clip = load_clip(args.out / "mini-clip.safetensors")[0].state_dict()
        text.load_state_dict({k: v for k, v in clip.items() if k in text.state_dict()})
        start_as_identity(unet)
        torch.nn.init.zeros_(unet.out[-1].weight)
    model = nn.ModuleDict(dict(unet=unet, text=text)).to(args.device, memory_format=args.layout)
    tokenizer = Tokenizer(TEXT)

    def lesson(i):
        """A scene and its caption. Every other one is hard: of a hard edit's two, the one with the longer caption."""
        if i % 2:
            return world.caption(args.seed + 2, i)
        edit = world.edit(args.seed + 2, i, kind=HARD)
        return max((edit.source, edit.caption), (edit.target, edit.edited_caption), key=lambda told: len(told[1]))

    def draw(start, count):
        scenes, captions = zip(*map(lesson, range(start, start + count)))
        return encode(world.render(scenes)), list(captions)

    def encode(pixels):
        with args.autocast():
            return latent_moments(vae, pixels)[:, 0] * vae.config.scale_factor

    pool = Pool(draw, args)

    def loss_fn(step, rows, batch=None, dropout=0.1, timesteps=args.timesteps):
        x0, captions = batch or pool.batch(step, rows)
        count = len(x0) if batch else args.batch_size                          # drawn for all, however they are shared out
        rng = seeded(args.seed, step)
        drop = torch.rand(count, generator=rng) < dropout
        t = draw_timesteps(timesteps, count, rng, is_settling(step, args))
        noise = torch.randn(count, *x0.shape[1:], generator=rng)
        x0, t, noise = (to_device(x, args.device) for x in (x0, t[rows], noise[rows]))
        ids = to_device(tokenizer(["" if d else c for c, d in zip(captions, drop[rows])]), args.device)
        with args.autocast():
            return diffusion_loss(unet, x0, text(ids), t, noise, "v"), {}

    parts = Parts(unet, vae, text, "v", 128, {})
    prompts = [world.caption(args.seed, i, "combinations")[1] for i in range(16)]

    def sheet(path):
        pictures = InstructPix2Pix(parts).generate(prompts, steps=20, cfg_text=args.cfg_text, progress=False)
        save_image(contact_sheet(list(zip(pictures, prompts))), path)

    record = run(args, model, loss_fn, sheet, vae=hash_weights(vae))
    if distributed.rank():
        return None
    round_as_stored(parts, small_dtype)
    sheet(args.out / "base" / "sheet-final.png")
    with torch.no_grad():
        pixels, captions = world.pictures(args.seed + 2, 0, args.score_examples, "combinations")
        loss, _ = loss_fn(0, slice(None), (encode(pixels), captions), dropout=0, timesteps="uniform")
    record["held_out_loss"] = round(loss.item(), 4)
    record |= dict(cfg_text=args.cfg_text, autoencoder=history(read_state_dict(args.out / "vae.safetensors")[1]))
    record |= {"init": history(begun.metadata)} if args.init else {}
    save_checkpoint(parts, args.out / "mini-sd.safetensors", metadata=record, dtype=small_dtype)
    return record


# ---- the scorer, which reads pictures for `python -m ip2p.evaluate`

SCENES = KINDS + 3 * ("size", "style")              # tiny and huge things, and all things in other styles, are missed most


def train_scorer(args, world):
    """From edits' scenes, before and after, softened as an autoencoder's pictures are."""
    begun = load_scorer(args.init) if args.init else build_scorer(world)
    if begun.nouns != world.nouns:
        raise ValueError(f"--init {args.init}: reads {len(begun.nouns)} nouns, not the {len(world.nouns)} of --subset {args.subset}")
    scorer = begun.requires_grad_(True).to(args.device, memory_format=args.layout)

    def draw(start, count):
        edits = [world.edit(args.seed + 6, i // 2, kind=SCENES) for i in range(start, start + count)]
        scenes = [e.target if i % 2 else e.source for i, e in enumerate(edits, start)]
        pixels = ((world.render(scenes) + 1) * 127.5).round().byte()                # a quarter of the memory
        return pixels, [read_scene(world, scene) for scene in scenes]

    pool = Pool(draw, args)

    def loss_fn(step, rows):
        pixels, readings = pool.batch(step)
        pixels = soften(pixels.float() / 127.5 - 1, seeded(args.seed, step)).contiguous(memory_format=args.layout)
        with args.autocast():
            return scorer_loss(scorer, pixels, readings), {}

    record = run(args, scorer, loss_fn)
    record["scores"] = score_scorer(scorer, world, args.score_examples)
    record |= {"init": history(read_state_dict(args.init)[1])} if args.init else {}
    save_scorer(scorer, args.out / "mini-scorer.safetensors", record)
    return record


# ---- what all begin with

def start_as_identity(module):
    """Zero the last layer of every residual branch, so that a deep network begins as a shallow one."""
    last_layers = {ResnetBlock: lambda m: m.conv2, AttnBlock: lambda m: m.proj_out, ResBlock: lambda m: m.out_layers[-1],
                   SpatialTransformer: lambda m: m.proj_out}
    for m in module.modules():
        if type(m) in last_layers:
            for p in last_layers[type(m)](m).parameters():
                nn.init.zeros_(p)
