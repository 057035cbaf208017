"""Editing real pictures with a text-to-image model: what InstructPix2Pix is compared with, and does without.

    sdedit            noise the picture part of the way, and draw on under another prompt (Meng et al. 2021, arXiv:2108.01073)
    invert            DDIM backwards, to noise that gives the picture again (Song et al. 2020, arXiv:2010.02502)
    null_text         then, for every step, fit what stands for "no text" until guidance keeps to the inversion's path
                      (Mokady et al. 2022, arXiv:2211.09794)
    InvertedPicture   either of these two, then Prompt-to-Prompt: source and edited picture drawn side by side
"""
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .guidance import text_denoiser
from .images import model_size, to_images, to_pixels, to_rgb
from .pipeline import InstructPix2Pix
from .prompt_to_prompt import AttentionControl
from .samplers import ddim_invert, ddim_step, ddim_steps
from .schedule import add_noise


@torch.no_grad()
def encode_picture(model: InstructPix2Pix, image: Image.Image, size: int | None = None) -> Tensor:
    """The posterior's mean of a picture, scaled as the sampler expects: (1, z, h, w) float32. size: as in `edit`."""
    model.check_makes_pictures()
    image = to_rgb(image)
    width, height = model_size(*image.size, model.parts.image_size if size is None else size, model.size_multiple)
    return model.encode(to_pixels(image, width, height)[None]) * model.vae.config.scale_factor


@torch.no_grad()
def sdedit(model: InstructPix2Pix, image: Image.Image, prompt: str, *, strength=0.75, steps=50, cfg_text=7.5, seed=0,
           size=None, progress=True) -> Image.Image:
    """Draw a picture again under a prompt, from its own noised latents. strength: the share of the `steps` that are run,
    in [0, 1]; more changes more. Raises ValueError outside."""
    if not 0 <= strength <= 1:
        raise ValueError(f"the strength must be in 0..1, got {strength}")
    z = encode_picture(model, image, size)
    first = steps - int(steps * strength)
    if first < steps:
        t, _, _ = ddim_steps(steps, model.alphas_cumprod)[first]
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z.device)
        z = model.text_to_latents([prompt], model.encode_text([""]), cfg_text, z.shape, steps=steps, seeds=[seed],
                                  x_T=add_noise(z, noise, t[None], model.alphas_cumprod), first=first, progress=progress)
    return to_images(model.decode(z))[0]


@torch.no_grad()
def invert(model: InstructPix2Pix, z: Tensor, prompts: list[str], steps: int = 50, progress=True) -> list[Tensor]:
    """DDIM inversion of latents (B, z, h, w) under a prompt each, without guidance: steps + 1 latents, z first and the noise
    last."""
    denoise = text_denoiser(model.predict, model.encode_text(prompts), model.encode_text([""]), cfg_text=1.0)
    with model.working(model.unet):
        return ddim_invert(denoise, z, steps, model.alphas_cumprod, progress)


def null_text(model: InstructPix2Pix, latents: list[Tensor], prompt: str, *, cfg_text=7.5, inner_steps=10, tolerance=1e-5,
              progress=True) -> list[Tensor]:
    """Null-text optimisation: for each step from noise, a null context with which guided DDIM follows `latents` (of
    `invert`) back to the picture, (1, M, D) each, each beginning with the one before.

    Adam with learning rate 0.01 (1 - i / 100) at step i, at most `inner_steps` updates, fewer once the mean squared error
    of the latents is below tolerance + 2e-5 i, as published for 50 steps.
    """
    steps, x = len(latents) - 1, latents[-1]
    context, null, nulls = model.encode_text([prompt]), model.encode_text([""]).float(), []
    bar = tqdm(total=steps * inner_steps, desc="null-text", disable=not progress)
    with model.working(model.unet):
        for i, (t, a_t, a_prev) in enumerate(ddim_steps(steps, model.alphas_cumprod.to(x.device))):
            with torch.no_grad():
                eps_text = model.predict(x, t[None], context)

            def previous(null):
                eps_null = model.predict(x, t[None], null)
                return ddim_step(x, eps_null + cfg_text * (eps_text - eps_null), a_t, a_prev)

            null = null.detach().clone().requires_grad_()
            adam = torch.optim.Adam([null], lr=1e-2 * max(0.0, 1 - i / 100))
            for j in range(inner_steps):
                with torch.enable_grad():
                    loss = F.mse_loss(previous(null), latents[-2 - i])
                grad, = torch.autograd.grad(loss * x.numel(), null)             # the mean's own is too small for float16
                null.grad = grad / x.numel()
                adam.step()
                bar.update()
                if loss.item() < tolerance + 2e-5 * i:
                    bar.update(inner_steps - 1 - j)
                    break
            with torch.no_grad():
                x = previous(null)
            nulls.append(null.detach())
    bar.close()
    return nulls


class InvertedPicture:
    """A picture turned into noise that its own prompt turns back into it; then edited by other prompts, as often as liked."""

    def __init__(self, model: InstructPix2Pix, image: Image.Image, source_prompt: str, *, optimize=True, steps=50,
                 cfg_text=7.5, inner_steps=10, size=None, progress=True):
        """optimize: null-text inversion; without it, guidance leads away from the picture, but it is fast."""
        self.model, self.source_prompt, self.steps, self.cfg_text = model, source_prompt, steps, cfg_text
        z = encode_picture(model, image, size)
        self.nulls = model.encode_text([""])                           # one for all steps; null-text inversion has one for each
        self.latents = invert(model, z, [source_prompt], steps, progress)
        if optimize:
            self.nulls = null_text(model, self.latents, source_prompt, cfg_text=cfg_text, inner_steps=inner_steps,
                                   progress=progress)

    @torch.no_grad()
    def edit(self, prompts: list[str], control: AttentionControl | None = None, progress=True) -> list[Image.Image]:
        """The picture as it is drawn again, then one for each prompt. control: of [source_prompt, *prompts]."""
        texts, x_T = [self.source_prompt, *prompts], self.latents[-1]
        R = len(texts)
        z = self.model.text_to_latents(texts, self.nulls, self.cfg_text,
                                       (R, *x_T.shape[1:]), steps=self.steps, seeds=[0] * R, x_T=x_T.expand(R, -1, -1, -1),
                                       control=control, progress=progress)
        return to_images(self.model.decode(z))
