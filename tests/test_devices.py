"""Everything that happens between pixels and pixels stays on the model's device. The meta device stands in for a GPU: it
computes nothing, but like one it refuses to combine its tensors with the CPU's (though not to index them with its own)."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ip2p import InstructPix2Pix
from ip2p.checkpoint import Parts
from ip2p.guidance import instruct_denoiser
from ip2p.prompt_to_prompt import LocalBlend, prompt_to_prompt, share_self_attention
from ip2p.samplers import SAMPLERS
from ip2p.stages import diffusion_loss
from ip2p.text import TextConfig, TextEncoder
from ip2p.unet import UNet, UNetConfig
from ip2p.vae import AutoencoderKL, VAEConfig

PROMPTS = ["a fox", "a car", "a red fox", "a blue car"]


def model_on_meta(in_channels, parameterization="v"):
    with torch.device("meta"):
        parts = (UNet(UNetConfig(in_channels, 4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, context_dim=32,
                                 attention_levels=(True, True), num_heads=2, norm_groups=8)),
                 AutoencoderKL(VAEConfig(channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4)),
                 TextEncoder(TextConfig(vocab_size=514 + 200, context_length=16, width=32, layers=2, heads=2)))
    return InstructPix2Pix(Parts(*(part.requires_grad_(False) for part in parts), parameterization, 32, {}))


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.5), ("euler-ancestral", 1.0)])
def test_an_edit(sampler, eta, parameterization):
    model = model_on_meta(8, parameterization)
    latents = model.vae.encode(torch.empty(2, 3, 32, 32, device="meta")).mode()
    denoise = instruct_denoiser(model.predict, model.encode_text(PROMPTS[:2]), model.encode_text(["", ""]), latents, 3.0, 1.5,
                                model.read_text)
    z = model._sample(denoise, latents.shape, 4, sampler, [1, 2], None, eta, False)
    assert model.decode(z).device.type == "meta"


class Crossings(TorchDispatchMode):
    """Counts the operations that see tensors of the CPU beside, or in place of, the model's."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += any(x.device.type == "cpu" for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x))
        return out


@pytest.mark.parametrize("sampler", ["ddim", "euler-ancestral"])
def test_steps_need_nothing_of_the_cpu(sampler):
    """On a GPU it would have to wait for it, and could not record the step as a graph. What is moved, before and after, does
    not grow with the steps; noise would, so it is drawn on the device here."""
    model, counts = model_on_meta(8), []
    latents = torch.empty(2, 4, 8, 8, device="meta")
    contexts = [model.encode_text(PROMPTS[:2]), model.encode_text(["", ""])]
    for steps in (2, 4):
        with Crossings() as crossings:
            denoise = instruct_denoiser(model.predict, *contexts, latents, 3.0, 1.5, model.read_text)
            SAMPLERS[sampler](denoise, latents, steps, model.alphas_cumprod, float(sampler != "ddim"), torch.empty_like)
        counts.append(crossings.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("sampler", ["ddim", "euler-ancestral"])
@pytest.mark.parametrize("make_control", [
    lambda model: None,
    lambda model: share_self_attention([0, 1, 0, 1], [0.5] * 4, 4),
    lambda model: prompt_to_prompt(model.tokenizer, PROMPTS, 4, cross_replace_steps=[0.5] * 4, self_replace_steps=[0.2] * 4,
                                   source=[0, 1, 0, 1]),
    lambda model: prompt_to_prompt(model.tokenizer, PROMPTS[::2] * 2, 4, mode="refine", cross_replace_steps=0.8,
                                   self_replace_steps=0.2, equalizer={"red": 3}, local_blend=LocalBlend(("fox",) * 4))],
    ids=["none", "self", "cross", "blend"])
def test_pictures_with_controls(make_control, sampler):
    model = model_on_meta(4)
    scales = torch.tensor([3.0, 4.0, 3.0, 4.0], device="meta")
    z = model.text_to_latents(PROMPTS, model.encode_text([""] * 4), scales, (4, 4, 8, 8), steps=4, sampler=sampler, seeds=[1] * 4,
                              control=make_control(model))
    assert z.device.type == "meta"


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_the_loss_of_training(parameterization):
    model = model_on_meta(8)
    x0, t = torch.empty(2, 4, 8, 8, device="meta"), torch.tensor([3, 900]).to("meta")
    assert diffusion_loss(model.unet, x0, model.encode_text(PROMPTS[:2]), t, x0, parameterization, x0).device.type == "meta"
