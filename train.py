"""Train an InstructPix2Pix editor, and every model it needs.

    python train.py --stage edit --steps 20000        # fine-tune weights/mini-sd.safetensors into an editor
    python train.py --stage edit --data data          # the same on pairs that make_data.py drew
    python train.py --stage vae --minutes 30          # or from nothing: vae, clip, base, edit, each from the one before
    python train.py --stage edits                     # the language model of make_data.py, by itself

Each stage trains on the miniature world, in a folder of its own below --out. Stopped by --minutes, Ctrl-C or SIGTERM, it
goes on when the command is repeated.
"""
import argparse
import hashlib
import json
import math
import random
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from datetime import date
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ip2p import InstructPix2Pix
from ip2p.attention import SpatialTransformer
from ip2p.checkpoint import Parts, load_checkpoint, load_vae, save_checkpoint, save_vae
from ip2p.clip_filter import build_clip, load_clip, normalize_pixels, save_clip
from ip2p.data import PairedDataset
from ip2p.edits import EditWriter, completion_loss, make_completion, make_prompt, read_triples
from ip2p.encodings import pack_encoding, train_encoding
from ip2p.evaluate import FIXED, psnr
from ip2p.gpt import GPT, GPTConfig, save_gpt
from ip2p.guidance import dropout_masks
from ip2p.images import contact_sheet, save_image, to_images, to_pixels
from ip2p.schedule import add_noise, make_alphas_cumprod, velocity
from ip2p.tensorfiles import read_state_dict
from ip2p.text import TextConfig, TextEncoder, Tokenizer
from ip2p.training import fit, seeded
from ip2p.unet import ResBlock, UNet, UNetConfig
from ip2p.vae import AttnBlock, AutoencoderKL, ResnetBlock, VAEConfig
from ip2p.world import KINDS, SPLITS, World
from ip2p.world_reader import judge, relexicalize

WEIGHTS = Path(__file__).parent / "weights"


# ---- the autoencoder

VAE = VAEConfig(channels=16, channel_mult=(1, 2, 4, 8), num_res_blocks=1, z_channels=16, norm_groups=4, scale_factor=1.0)


def train_vae(args, world):
    """Random crops, L1 + MSE and a touch of KL. Residual branches start at zero, so it begins as a linear code."""
    vae = AutoencoderKL(VAE).to(args.device, memory_format=args.layout)
    start_as_identity(vae)

    def loss_fn(step):
        rng, side = seeded(args.seed, step), args.crop
        pixels, _ = world.pictures(args.seed, step * args.batch_size // 2, args.batch_size // 2)
        corners = torch.randint(0, 128 - side + 1, (2 * len(pixels), 2), generator=rng).tolist()
        x = torch.stack([pixels[i // 2, :, a:a + side, b:b + side] for i, (a, b) in enumerate(corners)])
        x = x.contiguous(memory_format=args.layout)
        with args.autocast():
            posterior = vae.encode(x)
            noise = torch.randn(posterior.mean.shape, generator=rng).to(x)
            z = posterior.mean + (0.5 * posterior.logvar).exp() * noise
            y = vae.decode(z).float()
        mse, kl = F.mse_loss(y, x), posterior.kl().float().mean()
        loss = F.l1_loss(y, x) + 5 * mse + 1e-6 * kl
        return loss, dict(psnr=10 * (4 / mse.detach()).log10(), kl=kl)

    held_out, _ = world.pictures(args.seed, 0, 8, "combinations")

    def sheet(path):
        cells = [(p, text) for pixels, text in ((held_out, "picture"), (reconstruct(vae, held_out), "reconstruction"))
                 for p in to_images(pixels)]
        save_image(contact_sheet(cells, lines=1), path)

    record = run(args, vae, loss_fn, sheet)
    normalize_latents(vae, world.pictures(args.seed, 0, 256)[0])
    held_out, _ = world.pictures(args.seed, 0, args.score_examples, "combinations")
    record["psnr"] = round(float(psnr(reconstruct(vae, held_out), held_out).mean()), 2)
    save_vae(vae, args.out / "vae.safetensors", record)
    return record


@torch.no_grad()
def reconstruct(vae, pixels):
    return torch.cat([vae.decode(vae.encode(x).mode()).float().clamp(-1, 1) for x in pixels.split(32)])


@torch.no_grad()
def normalize_latents(vae, pixels):
    """Shift each latent channel to mean zero and scale all to unit variance, within the 1x1 convolutions next to them."""
    z = torch.cat([vae.encode(x).mode() for x in pixels.split(32)])
    mean, std, n = z.mean((0, 2, 3)), z.std(), z.shape[1]
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

    def loss_fn(step):
        logits = clip.logit_scale.exp().clamp(max=100) * similarities(step * args.batch_size, args.batch_size)
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, dict(accuracy=(logits.argmax(1) == target).float().mean())

    record = run(args, clip, loss_fn)
    with torch.no_grad():
        right = [similarities(start, 100, "combinations").argmax(1) == torch.arange(100, device=args.device)
                 for start in range(0, args.score_examples, 100)]
    record["accuracy_1_of_100"] = round(float(torch.cat(right).float().mean()), 3)
    save_clip(clip, CLIP, args.out / "mini-clip.safetensors", record)
    return record


# ---- the text-to-image base and the editor

UNET = UNetConfig(in_channels=VAE.z_channels, out_channels=VAE.z_channels, model_channels=64, channel_mult=(1, 2, 2),
                  num_res_blocks=1, attention_levels=(True, True, True), context_dim=TEXT.width, num_heads=None,
                  head_channels=32)


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


def train_base(args, world):
    """Text to picture: v-prediction, a tenth of the captions dropped; the text tower goes on learning with the UNet."""
    vae = load_vae(args.out / "vae.safetensors").to(args.device)
    if args.init:
        begun = load_checkpoint(args.init)
        unet, text = begun.unet.requires_grad_(True), begun.text.requires_grad_(True)
    else:
        unet, text = UNet(UNET), TextEncoder(replace(TEXT, projection_dim=CLIP["embed_dim"]))
        clip = load_clip(args.out / "mini-clip.safetensors")[0].state_dict()
        text.load_state_dict({k: v for k, v in clip.items() if k in text.state_dict()})
        start_as_identity(unet)
        torch.nn.init.zeros_(unet.out[-1].weight)
    model = nn.ModuleDict(dict(unet=unet, text=text)).to(args.device, memory_format=args.layout)
    tokenizer = Tokenizer(TEXT)

    def draw(start, count, split="train"):
        pixels, captions = world.pictures(args.seed + 2, start, count, split)
        return encode(vae, pixels, args) * vae.config.scale_factor, captions

    pool = Pool(draw, args)

    def loss_fn(step, batch=None, dropout=0.1, timesteps=args.timesteps):
        rng = seeded(args.seed, step)
        x0, captions = batch or pool.batch(step)
        drop = torch.rand(len(x0), generator=rng) < dropout
        t, noise = draw_timesteps(timesteps, len(x0), rng), torch.randn(x0.shape, generator=rng)
        ids = tokenizer(["" if d else c for c, d in zip(captions, drop)]).to(args.device)
        with args.autocast():
            loss = diffusion_loss(unet, x0, text(ids), t.to(args.device), noise.to(args.device), "v")
        return loss, {}

    parts = Parts(unet, vae, text, "v", 128, {})
    prompts = [world.caption(args.seed, i, "combinations")[1] for i in range(16)]

    def sheet(path):
        pictures = InstructPix2Pix(parts).generate(prompts, steps=20, cfg_text=args.cfg_text, progress=False)
        save_image(contact_sheet(list(zip(pictures, prompts))), path)

    record = run(args, model, loss_fn, sheet)
    sheet(args.out / "base" / "sheet-final.png")
    with torch.no_grad():
        loss, _ = loss_fn(0, draw(0, args.score_examples, "combinations"), dropout=0, timesteps="uniform")
    record["held_out_loss"] = round(loss.item(), 4)
    record |= dict(cfg_text=args.cfg_text, autoencoder=history(read_state_dict(args.out / "vae.safetensors")[1]))
    record |= {"init": history(begun.metadata)} if args.init else {}
    save_checkpoint(parts, args.out / "mini-sd.safetensors", metadata=record, dtype=torch.float16)
    return record


# What is drawn anew is harder to learn than what is changed, and comes twice as often.
LESSONS = KINDS + ("object", "place", "add")


def train_edit(args, world):
    """The editor: the base widened by image latents, conditionings dropped at random, on the world's true pairs or on those
    that `make_data.py` drew."""
    base = load_checkpoint(args.base, in_channels=2 * load_vae(args.base).config.z_channels)
    unet, vae, text = base.unet.requires_grad_(True), base.vae, base.text.requires_grad_(True)
    model = nn.ModuleDict(dict(unet=unet, text=text)).to(args.device, memory_format=args.layout)
    vae.to(args.device)
    tokenizer = Tokenizer(text.config)
    drawn = open_pairs(args.data, base.image_size, args.seed) if args.data else None

    def draw(start, count, split="train"):
        if drawn and split == "train":
            before, after, instructions = zip(*map(drawn, range(start, start + count)))
            before, after = torch.stack(before).to(args.device), torch.stack(after).to(args.device)
        else:
            before, after, edits = world.pairs(args.seed + 3, start, count, split, LESSONS if split == "train" else None)
            instructions = [e.instruction for e in edits]
        x0 = encode(vae, after, args) * vae.config.scale_factor
        return encode(vae, before, args), x0, list(instructions)                  # image latents are not scaled

    pool = Pool(draw, args)

    def loss_fn(step, batch=None, dropout=0.05, timesteps=args.timesteps):
        rng = seeded(args.seed, step)
        image_latents, x0, instructions = batch or pool.batch(step)
        drop_text, drop_image = dropout_masks(len(x0), dropout, rng)
        t, noise = draw_timesteps(timesteps, len(x0), rng), torch.randn(x0.shape, generator=rng)
        ids = tokenizer(["" if d else i for i, d in zip(instructions, drop_text)]).to(args.device)
        image_latents = image_latents.masked_fill(drop_image.to(args.device)[:, None, None, None], 0)
        with args.autocast():
            loss = diffusion_loss(unet, x0, text(ids), t.to(args.device), noise.to(args.device), base.parameterization,
                                  image_latents)
        return loss, {}

    editor = InstructPix2Pix(replace(base, metadata={}))

    def sheet(path, per_kind=3):
        cells = []
        for kind in KINDS:
            before, _, edits = world.pairs(args.seed, 0, per_kind, "combinations", kind)
            pictures = to_images(before)
            edited = editor.edit(pictures, [e.instruction for e in edits], cfg_text=args.cfg_text, cfg_image=args.cfg_image,
                                 progress=False)
            for a, b, e in zip(pictures, edited, edits):
                cells += [(a, e.caption), (b, e.instruction)]
        save_image(contact_sheet(cells, columns=2 * per_kind), path)

    record = run(args, model, loss_fn, sheet)
    sheet(args.out / "edit" / "sheet-final.png", per_kind=min(6, args.score_examples))
    with torch.no_grad():
        loss, _ = loss_fn(0, draw(0, args.score_examples, "combinations"), dropout=0, timesteps="uniform")
    record["held_out_loss"] = round(loss.item(), 4)
    record |= dict(cfg_text=args.cfg_text, cfg_image=args.cfg_image, base=history(base.metadata))
    record |= score_edits(editor, world, args)
    together = args.base.resolve().parent == args.out.resolve()          # then the autoencoder is stored once
    save_checkpoint(editor.parts, args.out / "mini-ip2p.safetensors", metadata=record, dtype=torch.float16,
                    shared={"vae": args.base.name} if together else None)
    return record


def open_pairs(path, size, seed):
    """The training pairs of a data set as a function of their number, epoch after epoch, at a side of `size`."""
    pairs = PairedDataset(path, min_resize_res=size, max_resize_res=size, crop_res=size, seed=seed)
    if not len(pairs):
        raise ValueError(f"{path}: a tenth of the prompts is held back, and of {len(pairs.pairs)} that leaves none")
    order = lru_cache(2)(pairs.order)
    return lambda n: pairs.example(n // len(pairs), order(n // len(pairs))[n % len(pairs)])


def score_edits(editor, world, args):
    """PSNR in dB against the true edited picture, where the instruction fixes it, on held-out scenes: of the edit, of the
    unedited picture, and of the true picture after the autoencoder, which is the most an edit can reach."""
    scores = {"edit": [], "unedited": [], "autoencoder": []}
    for kind in FIXED:
        before, after, edits = world.pairs(args.seed, 100, -(-args.score_examples // 32), "combinations", kind)
        edited = editor.edit(to_images(before), [e.instruction for e in edits], cfg_text=args.cfg_text,
                             cfg_image=args.cfg_image, progress=False)
        edited = torch.stack([to_pixels(p, 128, 128) for p in edited]).to(after)
        for name, x in (("edit", edited), ("unedited", before), ("autoencoder", reconstruct(editor.vae, after))):
            scores[name].append(psnr(x, after))
    return {"psnr": {name: round(float(torch.cat(values).mean()), 2) for name, values in scores.items()}}


# ---- the language model that writes edits

TRIPLES = [Path(__file__).parent / "ip2p" / "assets" / "triples" / name for name in ("world.jsonl", "photos.jsonl")]
EDITS = GPTConfig(vocab_size=2048, context_length=128, width=192, layers=4, heads=6)


def train_edits(args, world):
    """First the world's captions, each followed by the same scene's after some change, so that the model learns to repeat a
    sentence but for a word; then triples, with the loss on the completion alone as in the paper. Its own first stage falls
    away where it starts from public GPT-2 weights (--base).

    700 triples are few for a small model. So unless --verbatim or --base is given, three times out of four it learns from one
    that the world's grammar can read, put in other words of the world (`relexicalize`); and a quarter of these begin, before
    and after the edit, with a few words out of the other triples' captions, half of them with their letters shuffled, so
    that it learns to repeat what it does not know. The world's own instructions are not used.
    """
    triples = read_triples(args.triples)
    args.learns_from = hashlib.sha256(json.dumps([triples, str(args.base)]).encode()).hexdigest()       # a setting of the run
    if args.base:
        writer = EditWriter.load(args.base, args.device)
        model, encoding = writer.model.requires_grad_(True), writer.encoding
    else:
        texts = [world.caption(args.seed + 4, i)[1] for i in range(3000)] + [text for t in triples for text in t.values()]
        encoding = train_encoding(texts + [make_prompt("") + make_completion("", "")] * 1000, EDITS.vocab_size)
        model = GPT(EDITS).to(args.device)
        writer = EditWriter(model, encoding)
    readable = [] if args.verbatim or args.base else [t for t in triples if judge(*t.values())[1] == "right"]
    others = [t["input"].split() for t in triples if t not in readable and len(t["input"]) < 60]
    encode, first = encoding.encode_ordinary, 0 if args.base else args.pretrain_steps
    lengths = [len(encode(make_prompt(t["input"]))) + len(encode(make_completion(t["edit"], t["output"]))) for t in triples]
    if max(lengths) > model.config.context_length:
        raise ValueError(f"a triple of {max(lengths)} tokens is more than the context's {model.config.context_length}: "
                         f"{triples[lengths.index(max(lengths))]}")

    def captions_loss(step, length=65):
        """The world's captions in pairs, before and after a change, as one text, cut off at `length` tokens."""
        edits, rows = iter(range(step * 8 * args.batch_size, (step + 1) * 8 * args.batch_size)), []
        for _ in range(args.batch_size):
            tokens = []
            while len(tokens) < length:
                edit = world.edit(args.seed + 4, next(edits))
                tokens += encode(f"{edit.caption}\n{edit.edited_caption}\n\n")
            rows.append(tokens[:length])
        ids = torch.tensor(rows, device=args.device)
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())

    def triples_loss(step):
        rng, pairs = random.Random(f"{args.seed}/{step}"), []
        for _ in range(args.batch_size):
            triple = rng.choice(triples)
            if readable and rng.random() < .75:
                triple = relexicalize(rng.choice(readable), rng, world) or triple
                if others and rng.random() < .25:
                    words = rng.choice(others)
                    start = rng.randrange(len(words))
                    some = words[start:start + rng.randint(1, 3)]
                    some = [w if rng.random() < .5 else "".join(rng.sample(w, len(w))) for w in some]
                    triple = triple | {key: f"{' '.join(some)} {triple[key]}" for key in ("input", "output")}
            caption, edit, output = triple.values()
            pairs.append((encode(make_prompt(caption)), encode(make_completion(edit, output))))
        return completion_loss(model, pairs)

    def loss_fn(step):
        with args.autocast():
            return (captions_loss if step < first else triples_loss)(step), {}

    record = run(args, model, loss_fn)
    record |= dict(triples=len(triples), verbatim=not readable, pretrain_steps=first,
                   scores=score_writer(writer, world, args), encoding=pack_encoding(encoding))
    save_gpt(model, args.out / "mini-gpt.safetensors", record, dtype=torch.float16)
    return {k: v for k, v in record.items() if k != "encoding"}


def score_writer(writer, world, args):
    """On new captions of each split: the share of completions that are edits, and how many of all the world's grammar finds
    right, wrong, or cannot read (`ip2p.world_reader.judge`)."""
    scores = {}
    for split in SPLITS:
        verdicts = Counter()
        for i in range(args.score_examples):
            caption = world.caption(args.seed + 5, i, split)[1]
            edit = writer.write(caption, args.seed)
            verdicts[judge(caption, *edit)[1] if edit else "no edit"] += 1
        share = {k: round(verdicts[k] / args.score_examples, 3) for k in ("right", "wrong", "unknown", "no edit")}
        scores[split] = dict(captions=args.score_examples, parsed=round(1 - share.pop("no edit"), 3), **share)
    return scores


# ---- what all stages share

def start_as_identity(module):
    """Zero the last layer of every residual branch, so that a deep network begins as a shallow one."""
    last_layers = {ResnetBlock: lambda m: m.conv2, AttnBlock: lambda m: m.proj_out, ResBlock: lambda m: m.out_layers[-1],
                   SpatialTransformer: lambda m: m.proj_out}
    for m in module.modules():
        if type(m) in last_layers:
            for p in last_layers[type(m)](m).parameters():
                nn.init.zeros_(p)


DEFAULTS = {         # what made the shipped weights, on two CPU cores, but for the base: README; a GPU has time for more
    "vae": dict(steps=3400, batch_size=16, ema_decay=0.999),
    "clip": dict(steps=260, batch_size=128, ema_decay=0.99),
    "base": dict(steps=2300, batch_size=96, ema_decay=0.998, reuse=4, timesteps="logit-normal"),
    "edit": dict(steps=1800, batch_size=48, ema_decay=0.998, reuse=5, timesteps="uniform"),
    "edits": dict(steps=3500, batch_size=32, ema_decay=0.995, pretrain_steps=300),
}


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


STAGES = {"vae": train_vae, "clip": train_clip, "base": train_base, "edit": train_edit, "edits": train_edits}


def main(args):
    for name, value in DEFAULTS[args.stage].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(args)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.base is None and args.stage == "edit":
        here = args.out / "mini-sd.safetensors"
        args.base = here if here.exists() else WEIGHTS / here.name
    print(" ".join(f"{k}={v}" for k, v in vars(args).items()), flush=True)
    args.layout = torch.channels_last if args.device.startswith("cuda") else torch.contiguous_format      # 1.3 x on a CPU
    args.autocast = lambda: torch.autocast(args.device.split(":")[0], torch.bfloat16) if args.dtype == "bf16" else nullcontext()
    torch.manual_seed(args.seed)                  # initial weights
    record = STAGES[args.stage](args, World(args.device, args.subset))
    print(json.dumps(record), flush=True)


def check(args):
    """ValueError for settings that cannot work."""
    for name, least in (("steps", 1), ("batch_size", 2), ("pretrain_steps", 0), ("block", args.batch_size), ("reuse", 1),
                        ("score_examples", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not 8 <= args.crop <= 128 or args.crop % 8:
        raise ValueError(f"--crop must be a multiple of 8 up to 128, got {args.crop}")
    for name in ("lr", "cooldown", "cfg_text", "cfg_image"):
        if not math.isfinite(getattr(args, name)) or getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number, not below zero, got {getattr(args, name)}")
    for stage, name in (("vae", "vae.safetensors"), ("clip", "mini-clip.safetensors")):
        if args.stage == "base" and not (args.out / name).exists():
            raise ValueError(f"{args.out / name} is missing: train --stage {stage} with the same --out first")
    try:
        torch.ones(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} cannot be used here ({str(error).splitlines()[0]})") from None


def run_command(argv=None):
    """main, with one line on stderr for whatever the user can put right. Returns the exit status."""
    try:
        main(parse(argv))
        return 0
    except (ValueError, OSError) as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, default="edit", help="what to train (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimiser steps in all; may be changed when resuming (default: the stage's own)")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; repeat the command to go on")
    parser.add_argument("--batch-size", type=int, help="examples a step (default: the stage's own)")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW; Muon's is 20 times as much (default: %(default)s)")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon", help="default: %(default)s")
    parser.add_argument("--warmup", type=int, default=100, help="steps of rising learning rate (default: %(default)s)")
    parser.add_argument("--cooldown", type=float, default=0.3, help="last share of the steps, with falling learning rate "
                        "(default: %(default)s)")
    parser.add_argument("--ema-decay", type=float, help="of the averaged weights (default: the stage's own)")
    parser.add_argument("--base", type=Path, help="edit: the text-to-image checkpoint to start from (default: OUT/mini-sd."
                        "safetensors if there is one, else weights/mini-sd.safetensors); edits: public GPT-2 weights to start from")
    parser.add_argument("--triples", type=Path, nargs="+", default=TRIPLES, help="edits: jsonl files of {input or caption, edit, "
                        "output} (default: the 700 shipped)")
    parser.add_argument("--pretrain-steps", type=int, help="edits: how many of the steps go to captions, before the triples "
                        "(default: 300; none with --base)")
    parser.add_argument("--verbatim", action="store_true", default=None, help="edits: learn the triples only as they are written")
    parser.add_argument("--data", help="edit: a data set, as make_data.py writes it or in any layout that ip2p/data.py "
                        "reads (default: the world's true pairs)")
    parser.add_argument("--init", type=Path, help="base: the text-to-image checkpoint to train further, made with the same autoencoder")
    parser.add_argument("--cfg-text", type=float, default=3.0, help="text guidance of sheets and scores, kept as the model's "
                        "own default (default: %(default)s)")
    parser.add_argument("--cfg-image", type=float, default=1.5, help="likewise for image guidance (default: %(default)s)")
    parser.add_argument("--block", type=int, default=4096, help="base, edit: examples drawn and encoded at a time (default: %(default)s)")
    parser.add_argument("--reuse", type=int, help="base, edit: times that each is learned from (default: the stage's own)")
    parser.add_argument("--timesteps", choices=("uniform", "logit-normal"), help="base, edit: how they are drawn (default: the stage's own)")
    parser.add_argument("--crop", type=int, default=64, help="vae: side of the crops (default: %(default)s)")
    parser.add_argument("--subset", choices=("core", "all"), default="core", help="nouns and places of the world (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--sheet-minutes", type=float, default=10.0, help="minutes between sample sheets (default: %(default)s)")
    parser.add_argument("--score-examples", type=int, default=512, help="held-out examples that the result is scored on; "
                        "edit: pictures are drawn in full for a sixth of as many (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the arithmetic; weights stay float32 (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command())
