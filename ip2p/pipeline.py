"""Load a model, edit a picture: what `sample.py` and your own code call.

    model = InstructPix2Pix.load("weights/mini-ip2p.safetensors")
    picture, = model.edit(Image.open("fox.png"), "make it night")
"""
import math
from contextlib import nullcontext
from functools import partial
from typing import Sequence

import torch
from PIL import Image
from torch import Tensor

from . import low_memory
from .attention import has_amx
from .checkpoint import Parts, load_checkpoint, save_checkpoint
from .cuda_graph import CUDAGraphed
from .guidance import guidance_condition, instruct_denoiser, text_denoiser
from .images import check_shape, model_size, to_images, to_pixels, to_rgb
from .prompt_to_prompt import AttentionControl, ControlledRun, control_pairs
from .samplers import SAMPLERS
from .schedule import eps_from_v, make_alphas_cumprod
from .text import Tokenizer

DECODED = 2 ** 15          # latents' pixels that are decoded at once, those of eight pictures of 512 x 512, whatever the batch


class InstructPix2Pix:
    """A UNet, an autoencoder and a text encoder that edit pictures; or, with a text-to-image UNet, that make them.

    unet(x, t, context), vae.encode(pixels), vae.decode(z) and encode_text(prompts) may be called directly.
    """

    def __init__(self, parts: Parts, device=None, low_memory=False):
        """device: where to work, by default where the UNet is; low_memory: see `load`."""
        self.parts, self.low_memory = parts, low_memory
        self.unet, self.vae, self.text = parts.unet, parts.vae, parts.text
        self.device = torch.device(device or next(parts.unet.parameters()).device)
        self.tokenizer = Tokenizer(parts.text.config)
        self.alphas_cumprod = make_alphas_cumprod().to(self.device)

    @classmethod
    def load(cls, path_or_repo_id, device=None, dtype=None, vae=None, *, parameterization=None, ema=True, low_memory=False):
        """Open a checkpoint: a .safetensors or .ckpt file, a diffusers folder, or the id of one on the hub.

        device, dtype: where the weights go and as what; CPU and float32 if not given. vae: a separate autoencoder file.
        parameterization: "eps" or "v", what the UNet predicts; read or guessed if not given.
        ema: take a file's averaged weights where it holds them; merges of models may hold those of one of the models.
        low_memory: the parts stay on the CPU and visit the device in turn; the autoencoder works in strips of rows, and the
        guidance branches of an edit run one after another. Slower; the results are the same up to rounding.
        Raises a one-line ValueError if the file is missing, damaged or not such a model.
        """
        parts = load_checkpoint(path_or_repo_id, device=None if low_memory else device, dtype=dtype, vae=vae,
                                parameterization=parameterization, ema=ema)
        model = cls(parts, device, low_memory)
        tiled = model.device.type == "cpu" and dtype == torch.bfloat16 and has_amx()
        if model.device.type == "cuda" or tiled and not low_memory:      # the layout that its convolutions compute in; a copy
            for part in (model.unet, model.vae):
                part.to(memory_format=torch.channels_last)
        return model

    def save(self, path, layout="ldm"):
        """Write the model as one file in the public layout ("ldm") or as a diffusers folder ("diffusers")."""
        save_checkpoint(self.parts, path, layout, metadata=self.parts.metadata)

    @property
    def is_editor(self) -> bool:
        """Whether the UNet takes image latents beside the noisy ones."""
        return self.unet.config.in_channels == 2 * self.vae.config.z_channels

    @property
    def is_distilled(self) -> bool:
        """Whether the UNet is told the guidance scales, and needs one evaluation a step (`distill.py`)."""
        return self.unet.config.cond_dim is not None

    @property
    def own_settings(self) -> dict:
        """sample_steps, cfg_text and cfg_image that suit the model: as its file says, else 20, 7.5 and 1.5."""
        usual = dict(sample_steps=20, cfg_text=7.5, cfg_image=1.5)             # a file's "steps" are those of its training
        return {name: self.parts.metadata.get(name, value) for name, value in usual.items()}

    @property
    def size_multiple(self) -> int:
        """Pictures given to the model have sides that are multiples of this: 64 for Stable Diffusion."""
        return self.vae.config.downsampling * 2 ** (len(self.unet.config.channel_mult) - 1)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        """The context of each prompt, (B, M, D): (B, 77, 768) for Stable Diffusion 1. Long prompts lose their end."""
        with self.working(self.text):
            return self.text(self.tokenizer(prompts).to(self.device))

    def working(self, part):
        """A context manager: `part` is on the device, with low_memory only within the block."""
        return low_memory.visiting(part, self.device) if self.low_memory else nullcontext()

    def read_text(self, context: Tensor) -> dict:
        """The UNet's keys and values of a context, (B, M, D): the same at every step."""
        return self.unet.read_text(context.to(self.dtype))

    def predict(self, x: Tensor, t: Tensor, context: Tensor | dict, control=None, condition: Tensor | None = None) -> Tensor:
        """eps of the noisy latents in x, whatever the UNet predicts.

        x: (B, z or 2 z, h, w) float32, noisy latents first; t: (B,) or (1,); context: (B, M, D), or what `read_text` makes of it;
        control: see `UNet.forward`; condition: a distilled editor's, (3,) or (B, 3). Returns (B, z, h, w) float32.
        """
        context = context if isinstance(context, dict) else context.to(self.dtype)
        condition = condition if condition is None else condition.expand(len(x), -1)
        out = self.unet(x.to(self.dtype), t, context, control, condition).float()
        if self.parts.parameterization == "v":
            out = eps_from_v(out, x[:, :out.shape[1]], t, self.alphas_cumprod)
        return out

    @torch.no_grad()
    def edit(self, images, prompts, *, steps=None, sampler="ddim", cfg_text=None, cfg_image=None, negative_prompt="", seed=0,
             num_images=1, size=None, x_T=None, eta=0.0, progress=True) -> list[Image.Image]:
        """Edit pictures as told.

        images, prompts: a PIL picture or a list, an instruction or a list; a single one goes with all of the other.
        steps: 1..1000; the model's own if None, 20 if it has none. sampler: "ddim" or "euler-ancestral". eta: DDIM's share of
        fresh noise.
        cfg_text, cfg_image: guidance scales; raise cfg_text to follow the instruction more, cfg_image to keep more of the
        picture. The model's own if None, 7.5 and 1.5 if it has none.
        negative_prompt: what guidance leads away from, in the place of "".
        seed: of the first of an input's `num_images` results; the next have seed + 1, ...
        size: the long side in the model, rounded to `size_multiple`; the model's own if None.
        x_T: the noise to start from instead, (results, z, h, w) of unit variance, if all pictures have one size.
        Returns the pictures at the size they were made at, `num_images` of each input in a row. A blank instruction
        gives the picture back through the autoencoder (the original's script: the resized picture itself). Raises
        ValueError for what cannot be done.
        """
        self.check_edits()
        own = self.own_settings
        steps = own["sample_steps"] if steps is None else steps
        cfg_text = own["cfg_text"] if cfg_text is None else cfg_text
        cfg_image = own["cfg_image"] if cfg_image is None else cfg_image
        check_settings(steps, sampler, num_images, cfg_text=cfg_text, cfg_image=cfg_image, eta=eta)
        if self.is_distilled and (sampler != "ddim" or eta or negative_prompt):
            raise ValueError("a distilled editor takes DDIM's steps, without fresh noise and without a negative prompt; what it "
                             "was distilled from takes them (of the miniature, weights/mini-ip2p.safetensors)")
        images, prompts = _pair_up(images, prompts)
        images = [to_rgb(image) for image in images]                      # upright before anything looks at their sizes
        for image in images:
            check_shape(image)
        size = self.parts.image_size if size is None else size
        kinds = [(*model_size(*image.size, size, self.size_multiple), bool(prompt.strip()))
                 for image, prompt in zip(images, prompts)]
        if x_T is not None and (len(set(kinds)) > 1 or not all(told for *_, told in kinds)):
            raise ValueError("x_T needs pictures of one size, each with an instruction")

        results = [None] * len(images)
        for kind in dict.fromkeys(kinds):                                 # pictures of one kind make one batch
            width, height, told = kind
            batch = [i for i in range(len(images)) if kinds[i] == kind]
            image_latents = self.encode(torch.stack([to_pixels(images[i], width, height) for i in batch]))
            image_latents = image_latents.repeat_interleave(num_images, 0)
            z = image_latents * self.vae.config.scale_factor
            if told:
                texts = [prompts[i] for i in batch for _ in range(num_images)]
                z = self.edit_latents(image_latents, texts, cfg_text, cfg_image, steps=steps, sampler=sampler,
                                      negative_prompt=negative_prompt, seeds=_seeds(seed, num_images, len(texts)), x_T=x_T,
                                      eta=eta, progress=progress)
            pictures = to_images(self.decode(z))
            for j, i in enumerate(batch):
                results[i] = pictures[j * num_images:(j + 1) * num_images]
        return [picture for row in results for picture in row]

    @torch.no_grad()
    def edit_latents(self, image_latents: Tensor, texts: list[str], cfg_text: float, cfg_image: float, *, steps, sampler="ddim",
                     negative_prompt="", seeds, x_T=None, eta=0.0, progress=False) -> Tensor:
        """Clean latents (B, z, h, w) of B edits, for `decode`. image_latents: (B, z, h, w), unscaled, as `encode` gives them
        and the UNet takes them; seeds: B numbers; the rest as in `edit`."""
        context, null = self.encode_text([*texts, negative_prompt]).split([len(texts), 1])
        predict, options = self.predict, {}
        if self.is_distilled:                          # its UNet is told the scales, and does by itself what guidance would
            condition = guidance_condition(cfg_text, cfg_image, steps).to(self.device)
            predict, options = partial(self.predict, condition=condition), dict(spacing="trailing")
            cfg_text = cfg_image = 1                   # so one branch is left
        with self.working(self.unet):
            denoise = instruct_denoiser(predict, context, null, image_latents, cfg_text, cfg_image, self.read_text,
                                        one_by_one=self.low_memory)
            if self.device.type == "cuda" and steps > 4:                  # recording takes as long as a few steps do
                denoise = CUDAGraphed(denoise)
            return self._sample(denoise, image_latents.shape, steps, sampler, seeds, x_T, eta, progress, **options)

    @torch.no_grad()
    def generate(self, prompts, *, steps=None, sampler="ddim", cfg_text=None, negative_prompt="", seed=0, num_images=1, size=None,
                 x_T=None, eta=0.0, control: AttentionControl | None = None, progress=True) -> list[Image.Image]:
        """Make pictures from text, with a text-to-image checkpoint. size: the side, or (width, height); the rest as in
        `edit`. control: what each prompt's picture borrows from another's, made by `prompt_to_prompt`, with num_images 1.
        Returns `num_images` of each prompt in a row."""
        self.check_makes_pictures()
        steps = self.own_settings["sample_steps"] if steps is None else steps
        cfg_text = self.own_settings["cfg_text"] if cfg_text is None else cfg_text
        check_settings(steps, sampler, num_images, cfg_text=cfg_text, eta=eta)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [p for p in prompts for _ in range(num_images)]
        shape = self.latent_shape(len(texts), size)
        if not texts:
            return []
        z = self.text_to_latents(texts, self.encode_text([negative_prompt]), cfg_text, shape, steps=steps, sampler=sampler,
                                 seeds=_seeds(seed, num_images, len(texts)), x_T=x_T, eta=eta, control=control, progress=progress)
        return to_images(self.decode(z))

    @torch.no_grad()
    def draw_pairs(self, captions: list[str], edited_captions: list[str], seeds: list[int], shares: list[float],
                   cfg_text: list[float], *, steps=100, sampler="euler-ancestral", control="self-attention", size=None,
                   x_T=None, progress=False) -> tuple[Tensor, Tensor]:
        """B pairs of pictures, each of a caption and of its edited caption, drawn from shared noise (InstructPix2Pix,
        Sec. 3.1.2). Every pair has its own seed, share of the steps and guidance scale, and no batch changes it.

        control: one of `prompt_to_prompt.CONTROLS`, see `control_pairs`. x_T: as in `generate`, one for each pair.
        Returns pixels of either, (B, 3, size, size) float32 in [-1, 1] on the CPU.
        """
        self.check_makes_pictures()
        B, texts = len(captions), [*captions, *edited_captions]
        if any(len(x) != B for x in (edited_captions, seeds, shares, cfg_text)):
            raise ValueError(f"{B} captions need as many edited captions, seeds, shares and guidance scales")
        check_settings(steps, sampler, 1)
        control = control_pairs(self.tokenizer, captions, edited_captions, shares, steps, control)
        z = self.text_to_latents(texts, self.encode_text([""]), torch.tensor(cfg_text, device=self.device).repeat(2),
                                 self.latent_shape(2 * B, size), steps=steps, sampler=sampler, seeds=[*seeds] * 2,
                                 x_T=None if x_T is None else x_T.repeat(2, 1, 1, 1), control=control, progress=progress)
        return self.decode(z).float().clamp(-1, 1).cpu().split(B)

    @torch.no_grad()
    def text_to_latents(self, texts: list[str], null_context, cfg_text, shape, *, steps, sampler="ddim", seeds, x_T=None,
                        eta=0.0, control=None, first=0, progress=False) -> Tensor:
        """Clean latents (B, z, h, w) = `shape` of B texts. null_context: (1, M, D), or a list with one for every step;
        cfg_text: a number or (B,); seeds: B numbers; first: the step to begin with, x_T being as noisy as it expects."""
        predict, options = self.predict, {}
        if control is not None:
            if (shape[0], steps - first) != (len(control.source), len(control.self_steps)):
                raise ValueError(f"this control is for {len(control.source)} prompts with one picture each in "
                                 f"{len(control.self_steps)} steps, got {shape[0]} in {steps - first}")
            if not torch.is_tensor(cfg_text) and cfg_text == 0:
                cfg_text = torch.zeros(shape[0], device=self.device)          # keeps the texts' branch, which is controlled
            run = ControlledRun(control, *shape[2:], self.device)
            predict, options = run.predicting(self.predict), dict(after_step=run.after_step)
        if first:
            options["first"] = first                                     # DDIM's own
        context = self.encode_text(texts)
        with self.working(self.unet):
            if isinstance(null_context, list):                           # one for each step: not worth reading ahead
                denoisers = iter([text_denoiser(predict, context, null, cfg_text) for null in null_context])
                denoise = lambda x, t: next(denoisers)(x, t)
            else:
                denoise = text_denoiser(predict, context, null_context, cfg_text, self.read_text)
            return self._sample(denoise, shape, steps, sampler, seeds, x_T, eta, progress, **options)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The mean latents, (B, z, h, w) float32 and unscaled, of pixels (B, 3, H, W) in [-1, 1]."""
        with self.working(self.vae):
            encode = partial(low_memory.encode, self.vae) if self.low_memory else self.vae.encode
            return encode(pixels.to(self.device, self.dtype)).mode().float()

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), about in [-1, 1], of latents as the sampler leaves them. ValueError if numbers have overflowed,
        as they may in float16."""
        with self.working(self.vae):
            decode = partial(low_memory.decode, self.vae) if self.low_memory else self.vae.decode
            z = (z / self.vae.config.scale_factor).to(self.dtype)
            pixels = torch.cat([decode(some) for some in z.split(max(1, DECODED // (z.shape[2] * z.shape[3])))])
        check_finite(pixels)
        return pixels

    def latent_shape(self, count, size=None):
        """(count, z, h, w) of pictures' latents. size: the side, or (width, height); the model's own if None. ValueError for
        sizes that the model cannot take."""
        size = self.parts.image_size if size is None else size
        width, height = size if isinstance(size, Sequence) else (size, size)
        if min(width, height) < 1 or width % self.size_multiple or height % self.size_multiple:
            raise ValueError(f"width and height must be multiples of {self.size_multiple}, got {width}x{height}")
        f = self.vae.config.downsampling
        return count, self.vae.config.z_channels, height // f, width // f

    def check_edits(self):
        """ValueError unless this is an editor."""
        if not self.is_editor:
            raise ValueError(f"this model's UNet takes {self.unet.config.in_channels} channels, an editor's "
                             f"{2 * self.vae.config.z_channels}; one that makes pictures from text has `generate`")

    def check_makes_pictures(self):
        """ValueError unless this is a text-to-image model."""
        if self.is_editor:
            raise ValueError("this model edits pictures (use edit); this needs a text-to-image checkpoint")
        if self.unet.config.in_channels != self.vae.config.z_channels:
            raise ValueError(f"this model's UNet takes {self.unet.config.in_channels} channels and its autoencoder has "
                             f"{self.vae.config.z_channels}; this needs a text-to-image checkpoint, which has as many of both")
        if self.is_distilled:
            raise ValueError("a distilled text-to-image model: of these, only editors are known here")

    def _sample(self, denoise, shape, steps, sampler, seeds, x_T, eta, progress, **options):
        """Clean latents, float32. Each picture has a random stream of its own, so no batch changes it."""
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise_like(x):
            noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in streams])
            if x.is_cuda:
                return noise.pin_memory().to(x.device, non_blocking=True)                    # pinned: no need to wait
            return noise.to(x.device)                    # blocking: unpinned memory could be freed before the copy ends

        if x_T is None:
            x_T = noise_like(torch.empty(shape, device=self.device))
        elif x_T.shape != torch.Size(shape):
            raise ValueError(f"x_T must be {tuple(shape)}, got {tuple(x_T.shape)}")
        eta = eta if sampler == "ddim" else 1.0
        return SAMPLERS[sampler](denoise, x_T.to(self.device, torch.float32), steps, self.alphas_cumprod, eta, noise_like, progress,
                                 **options)


def _seeds(seed, num_images, count):
    """The seeds of `count` pictures, of which `num_images` in a row are of one input."""
    return [seed + i % num_images for i in range(count)]


def check_settings(steps, sampler, num_images, **scales):
    """ValueError for settings that no sampler can follow."""
    if not 1 <= steps <= 1000:
        raise ValueError(f"steps must be in 1..1000, got {steps}")
    if sampler not in SAMPLERS:
        raise ValueError(f"the sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    for name, value in scales.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")


def check_finite(pixels):
    if not pixels.isfinite().all():
        raise ValueError(f"the model computed numbers that are not finite in {str(pixels.dtype).removeprefix('torch.')}; use "
                         f"bfloat16 (--dtype bf16) or float32 (--dtype fp32)")


def _pair_up(images, prompts):
    """Lists of equal length; a single picture or instruction is repeated for all of the other."""
    images = [images] if isinstance(images, Image.Image) else list(images)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    count = max(len(images), len(prompts))
    if not {len(images), len(prompts)} <= {1, count}:
        raise ValueError(f"needed as many instructions as pictures, or one of either: got {len(prompts)} and {len(images)}")
    return (images * count if len(images) == 1 else images), (prompts * count if len(prompts) == 1 else prompts)
