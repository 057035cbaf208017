"""Small checkpoints for tests, and what the tests of them share."""
from dataclasses import replace

import pytest
import torch

from ip2p.checkpoint import Parts, load_checkpoint
from ip2p.text import TextConfig, TextEncoder
from ip2p.unet import UNet, UNetConfig
from ip2p.vae import AutoencoderKL, VAEConfig

PARITY = 1e-5      # relative error in float32, norm of the difference over norm


def randomised(model, seed):
    """Every parameter moved off its initial value, so that no zero bias or unit gain hides a mix-up."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p.mean() if p.ndim == 1 else 0) + 0.1 * torch.randn(p.shape, generator=generator))
    return model.eval().requires_grad_(False)


def tiny(kind, in_channels=8, seed=0):
    """Parts shaped like SD 1, SD 2 (32-wide heads, penultimate layer), or like nothing published ("odd")."""
    unet = UNetConfig(in_channels=in_channels, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                      attention_levels=(True, False), context_dim=64, num_heads=4, norm_groups=8)
    vae = VAEConfig(channels=8, channel_mult=(1, 2, 4), num_res_blocks=1, norm_groups=4)
    text = TextConfig(vocab_size=700, context_length=12, width=64, layers=2, heads=2)
    if kind == "sd2":
        unet = replace(unet, num_heads=None, head_channels=16, linear_proj=True, num_res_blocks=2)
        text = replace(text, layers=3, quick_gelu=False, skip_last=1, pad_with_end=False, projection_dim=48)
    if kind == "odd":
        unet = replace(unet, channel_mult=(1, 1, 3), attention_levels=(False, True, True), num_heads=2,
                       transformer_depth=2, out_channels=6, in_channels=12)
        vae = replace(vae, z_channels=6, channel_mult=(1, 1, 2), scale_factor=0.9, num_res_blocks=2)
        text = replace(text, quick_gelu=False, heads=4)
    with torch.random.fork_rng():
        models = UNet(unet), AutoencoderKL(vae), TextEncoder(text)
    models = [randomised(model, seed + i) for i, model in enumerate(models)]
    return Parts(*models, "eps" if kind == "sd1" else "v", 64, {"steps": 12, "data": "noise"})


def same(a, b):
    """Equal models of equal configuration, bit for bit."""
    assert a.config == b.config
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def same_parts(a, b):
    return same(a.unet, b.unet) and same(a.vae, b.vae) and same(a.text, b.text) and (
        a.parameterization, a.image_size) == (b.parameterization, b.image_size)


def public(parts):
    """A state dict by the published names, put together without the code under test: EMA-less, no record."""
    out = {f"model.diffusion_model.{k}": v for k, v in parts.unet.state_dict().items()}
    out |= {f"first_stage_model.{k}": v for k, v in parts.vae.state_dict().items()}
    text = parts.text.state_dict()
    if not parts.text.config.quick_gelu:
        return out | {f"cond_stage_model.model.{k}": v for k, v in text.items()}
    start = "cond_stage_model.transformer.text_model."
    out[start + "embeddings.token_embedding.weight"] = text["token_embedding.weight"]
    out[start + "embeddings.position_embedding.weight"] = text["positional_embedding"]
    for kind in ("weight", "bias"):
        out[f"{start}final_layer_norm.{kind}"] = text[f"ln_final.{kind}"]
        for i in range(parts.text.config.layers):
            a, b = f"transformer.resblocks.{i}.", f"{start}encoder.layers.{i}."
            width = parts.text.config.width
            for n, x in enumerate("qkv"):
                out[f"{b}self_attn.{x}_proj.{kind}"] = text[f"{a}attn.in_proj_{kind}"][n * width:(n + 1) * width].clone()
            out[f"{b}self_attn.out_proj.{kind}"] = text[f"{a}attn.out_proj.{kind}"]
            out[f"{b}layer_norm1.{kind}"], out[f"{b}layer_norm2.{kind}"] = text[f"{a}ln_1.{kind}"], text[f"{a}ln_2.{kind}"]
            out[f"{b}mlp.fc1.{kind}"], out[f"{b}mlp.fc2.{kind}"] = text[f"{a}mlp.c_fc.{kind}"], text[f"{a}mlp.c_proj.{kind}"]
    return out


def published_like(kind):
    """Narrow parts, but for the text's, whose heads and groups follow Stable Diffusion's rules, so that a file needs no record."""
    sd2 = kind == "sd2"
    width = 1024 if sd2 else 768
    unet = UNetConfig(model_channels=64 if sd2 else 32, channel_mult=(1, 2), num_res_blocks=1, linear_proj=sd2,
                      attention_levels=(True, False), context_dim=width,
                      num_heads=None if sd2 else 8, head_channels=64 if sd2 else None)
    text = TextConfig(vocab_size=600, context_length=12, width=width, layers=2, heads=width // 64)
    if sd2:
        text = replace(text, quick_gelu=False, skip_last=1, pad_with_end=False, projection_dim=64)
    vae = VAEConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1)
    with torch.random.fork_rng():
        models = UNet(unet), AutoencoderKL(vae), TextEncoder(text)
    return Parts(*(randomised(model, 5 + i) for i, model in enumerate(models)), "eps", 512, {})


def error_of(path, **kwargs):
    """The one line with which a checkpoint is refused."""
    with pytest.raises(ValueError) as info:
        load_checkpoint(path, **kwargs)
    message = str(info.value)
    assert "\n" not in message
    return message


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()
