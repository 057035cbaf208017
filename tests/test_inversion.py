"""Editing real pictures with a text-to-image model, against diffusers' scheduler and the published loops written out."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ip2p import InstructPix2Pix
from ip2p.checkpoint import Parts
from ip2p.clip_filter import import_open_clip
from ip2p.inversion import InvertedPicture, encode_picture, invert, null_text, sdedit
from ip2p.prompt_to_prompt import prompt_to_prompt
from ip2p.text import TextConfig, TextEncoder
from ip2p.unet import UNet, UNetConfig
from ip2p.vae import AutoencoderKL, VAEConfig

import_open_clip()
diffusers = pytest.importorskip("diffusers")

STEPS, CFG = 5, 3.0
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(True, True),
                               context_dim=32, num_heads=2, norm_groups=8))
        vae = AutoencoderKL(VAEConfig(channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4))
        text = TextEncoder(TextConfig(vocab_size=514 + 200, context_length=16, width=32, layers=2, heads=2))
        for p in unet.out[-1].parameters():                   # predictions of the size of noise, that text changes
            torch.nn.init.normal_(p, std=0.1)
        torch.nn.init.normal_(text.token_embedding.weight)
    for part in (unet, vae, text):
        part.eval().requires_grad_(False)
    return InstructPix2Pix(Parts(unet, vae, text, "eps", 32, {}))


@pytest.fixture(scope="module")
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)


@pytest.fixture
def scheduler():
    """DDIM of diffusers with Stable Diffusion's settings."""
    s = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                set_alpha_to_one=False, steps_offset=1)
    s.set_timesteps(STEPS)
    return s


def guided(model, x, t, prompt, null):
    e_null, e_text = (model.predict(x, torch.tensor([int(t)]), c) for c in (null, model.encode_text([prompt])))
    return e_null + CFG * (e_text - e_null)


@pytest.mark.parametrize("strength", [0.0, 0.45, 0.8, 1.0])
def test_sdedit_equals_diffusers_scheduler(model, picture, scheduler, strength):
    """diffusers' image-to-image rule: the last int(steps x strength) steps, from latents noised to the first of them."""
    z = encode_picture(model, picture)
    timesteps = scheduler.timesteps[STEPS - int(STEPS * strength):]
    if len(timesteps):
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(7))
        z = scheduler.add_noise(z, noise, timesteps[:1])
    for t in timesteps:
        z = scheduler.step(guided(model, z, t, "a fox", model.encode_text([""])), t, z).prev_sample
    expected = ((model.decode(z)[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    result = sdedit(model, picture, "a fox", strength=strength, steps=STEPS, cfg_text=CFG, seed=7, progress=False)
    assert np.abs(np.asarray(result).astype(int) - expected).max() <= 1                  # 8-bit rounding
    with pytest.raises(ValueError, match="0..1, got 1.2"):
        sdedit(model, picture, "a fox", strength=1.2)


def test_inversion_is_the_published_step(model, picture, scheduler):
    """Null-text inversion's next_step, written out: from one noise level up to the next, with eps at the upper timestep."""
    z = encode_picture(model, picture)
    latents = invert(model, z, ["a fox"], STEPS, progress=False)
    alphas = [scheduler.alphas_cumprod[0], *scheduler.alphas_cumprod[scheduler.timesteps.flip(0)]]
    for t, a, a_next in zip(scheduler.timesteps.flip(0), alphas, alphas[1:]):
        eps = model.predict(z, t[None], model.encode_text(["a fox"]))
        z = a_next.sqrt() * (z - (1 - a).sqrt() * eps) / a.sqrt() + (1 - a_next).sqrt() * eps
    assert len(latents) == STEPS + 1
    assert (latents[-1] - z).norm() / z.norm() < 1e-5


@pytest.mark.parametrize("tolerance, updates", [(0.0, 3), (1e9, 1)])
def test_null_text_is_the_published_loop(model, picture, scheduler, tolerance, updates):
    """Up to `inner_steps` updates of Adam a step, or one where the loss is below the tolerance at once."""
    latents = invert(model, encode_picture(model, picture), ["a fox"], STEPS, progress=False)
    nulls = null_text(model, latents, "a fox", cfg_text=CFG, inner_steps=3, tolerance=tolerance - 1e-3, progress=False)
    x, null = latents[-1], model.encode_text([""])
    for i, t in enumerate(scheduler.timesteps):
        null = torch.nn.Parameter(null.clone())
        adam = torch.optim.Adam([null], lr=1e-2 * (1 - i / 100))
        for _ in range(updates):
            adam.zero_grad()
            torch.nn.functional.mse_loss(scheduler.step(guided(model, x, t, "a fox", null), t, x).prev_sample, latents[-2 - i]).backward()
            adam.step()
        null = null.detach()
        x = scheduler.step(guided(model, x, t, "a fox", null), t, x).prev_sample
        assert (nulls[i] - null).abs().max() < 1e-4 * null.abs().max()                   # Adam divides by small gradients
    assert not any(p.grad is not None for p in model.unet.parameters())


def test_null_text_learns_in_half_precision(picture):
    """The shipped base, whose gradients are below float16's smallest numbers: contexts go where they go in float32."""
    models = [InstructPix2Pix.load(ROOT / "weights/mini-sd.safetensors", dtype=dtype) for dtype in (torch.float32, torch.float16)]
    latents = invert(models[0], encode_picture(models[0], picture.resize((64, 64))), ["a fox"], 3, progress=False)
    moved = []
    for model in models:
        nulls = null_text(model, latents, "a fox", cfg_text=CFG, inner_steps=2, tolerance=-1.0, progress=False)
        moved.append((nulls[-1] - model.encode_text([""]).float()).flatten())
    assert torch.cosine_similarity(*moved, 0) > 0.8 and moved[1].norm() > 0.8 * moved[0].norm()


def test_null_text_undoes_guidance(model, picture):
    """Strong guidance leads away from the inverted latents; the fitted null contexts lead back to them."""
    latents = invert(model, encode_picture(model, picture), ["a fox"], 20, progress=False)
    settings = dict(steps=20, seeds=[0], x_T=latents[-1])
    nulls = {"plain": [model.encode_text([""])] * 20,
             "fitted": null_text(model, latents, "a fox", cfg_text=60.0, inner_steps=20, progress=False)}
    errors = {name: float((model.text_to_latents(["a fox"], null, 60.0, latents[0].shape, **settings) - latents[0]).norm())
              for name, null in nulls.items()}
    assert errors["fitted"] < 0.5 * errors["plain"], errors


def test_control_leaves_the_source_as_it_is(model, picture):
    inverted = InvertedPicture(model, picture, "a fox", optimize=False, steps=STEPS, cfg_text=CFG, progress=False)
    control = prompt_to_prompt(model.tokenizer, ["a fox", "a red fox"], STEPS, cross_replace_steps=0.4)
    alone, (source, edited) = inverted.edit([], progress=False)[0], inverted.edit(["a red fox"], control, progress=False)
    assert np.abs(np.asarray(source).astype(int) - np.asarray(alone)).max() <= 1
    assert np.abs(np.asarray(edited).astype(int) - np.asarray(source)).max() > 1


def test_an_editor_is_refused(picture):
    class Editor:
        is_editor = True
        check_makes_pictures = InstructPix2Pix.check_makes_pictures
    with pytest.raises(ValueError, match="needs a text-to-image checkpoint"):
        sdedit(Editor(), picture, "a fox")
