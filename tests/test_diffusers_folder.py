"""Diffusers folders in and out, and the names in full-size models. Diffusers and transformers judge layout and arithmetic."""
import json
import shutil
from dataclasses import replace

import pytest
import torch
from checkpoints import PARITY, error_of, published_like, randomised, relative_error, same_parts, tiny

from ip2p import keys
from ip2p.checkpoint import _as_published, load_checkpoint, read_state_dict, save_checkpoint
from ip2p.clip_filter import import_open_clip
from ip2p.text import TextConfig, TextEncoder, Tokenizer
from ip2p.unet import UNet, UNetConfig
from ip2p.vae import AutoencoderKL, VAEConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def test_shards_variants_pickles_and_old_names(tmp_path, saved):
    parts, _, good = saved
    unet = "diffusion_pytorch_model"

    def fresh():
        shutil.rmtree(tmp_path / "f", ignore_errors=True)
        return shutil.copytree(good, tmp_path / "f")

    folder = fresh()
    state, _ = read_state_dict(folder / f"unet/{unet}.safetensors")
    (folder / f"unet/{unet}.safetensors").unlink()
    names = sorted(state)
    shards = {f"{unet}-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, inside in shards.items():
        torch.save({name: state[name].clone() for name in inside}, folder / "unet" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (folder / f"unet/{unet}.bin.index.json").write_text(json.dumps(index))
    assert same_parts(load_checkpoint(folder), parts)
    (folder / "unet" / list(shards)[1]).unlink()
    assert "00002-of-00002.bin: no such file" in error_of(folder)

    folder = fresh()
    half = folder / f"unet/{unet}.fp16.safetensors"
    (folder / f"unet/{unet}.safetensors").rename(half)                            # there is only this one
    shutil.copy(half, folder / "vae")                                             # not to be read: there is a full one
    text, _ = read_state_dict(folder / "text_encoder/model.safetensors")
    text = {name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    text["embeddings.position_ids"] = torch.arange(12)
    torch.save(text, folder / "text_encoder/pytorch_model.bin")
    (folder / "text_encoder/model.safetensors").unlink()
    vae, _ = read_state_dict(folder / f"vae/{unet}.safetensors")
    (folder / f"vae/{unet}.safetensors").unlink()
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        vae = {name.replace(new, old): tensor for name, tensor in vae.items()}
    assert "decoder.mid_block.attentions.0.query.weight" in vae
    torch.save(vae, folder / f"vae/{unet}.bin")
    assert same_parts(load_checkpoint(folder), parts)


def test_folder_configs_are_optional_for_published_shapes(tmp_path):
    parts = published_like("sd1")
    save_checkpoint(parts, tmp_path / "f", "diffusers")
    for name in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler", "tokenizer", "ip2p.json",
                 "model_index.json"):
        path = tmp_path / "f" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert same_parts(load_checkpoint(tmp_path / "f"), parts)


@pytest.fixture(scope="module")
def diffusers():
    import_open_clip()
    pytest.importorskip("transformers")
    module = pytest.importorskip("diffusers")
    module.utils.logging.disable_progress_bar()
    return module


@pytest.mark.parametrize("kind", ["sd1", "sd2", "odd"])
def test_diffusers_opens_what_we_save(tmp_path, diffusers, kind):
    parts = tiny(kind)
    parts.text = randomised(parts.text, 3)
    save_checkpoint(parts, tmp_path / "f", "diffusers")
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "f")
    generator = torch.Generator().manual_seed(2)
    z = parts.vae.config.z_channels
    x, context, pixels, latents = (torch.randn(s, generator=generator) for s in (
        (2, parts.unet.config.in_channels, 8, 8), (2, 12, 64), (1, 3, 32, 32), (1, z, 8, 8)))
    t, ids = torch.tensor([3, 801]), torch.randint(0, 700, (2, 12), generator=generator)
    with torch.no_grad():
        assert relative_error(pipe.unet(x, t, context).sample, parts.unet(x, t, context)) < PARITY
        theirs, ours = pipe.vae.encode(pixels).latent_dist, parts.vae.encode(pixels)
        assert relative_error(theirs.mean, ours.mean) < PARITY and relative_error(theirs.logvar, ours.logvar) < PARITY
        assert relative_error(pipe.vae.decode(latents).sample, parts.vae.decode(latents)) < PARITY
        assert relative_error(pipe.text_encoder(ids)[0], parts.text(ids)) < PARITY
    assert pipe.vae.config.scaling_factor == parts.vae.config.scale_factor
    assert pipe.scheduler.config.prediction_type == {"eps": "epsilon", "v": "v_prediction"}[parts.parameterization]
    prompts = ["make it NIGHT!", "", "!! a fox's cafés, 12 & 日本 ?!", "word " * 30, "what about snow ?"]
    theirs = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(theirs, Tokenizer(parts.text.config)(prompts))
    four = tiny(kind, in_channels=4)
    if kind == "sd1":
        save_checkpoint(four, tmp_path / "four", "diffusers")
        assert diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "four").unet.config.in_channels == 4
        for change, words in (({"in_channels": 5}, "no diffusers pipeline for 5"), ({"channel_mult": (2, 1)}, "wider than")):
            four.unet = on_meta(lambda: UNet(replace(parts.unet.config, **change)))
            with pytest.raises(ValueError, match=words):
                save_checkpoint(four, tmp_path / "never", "diffusers")
            assert not list(tmp_path.glob("*never*"))


@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt"])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_diffusers_opens_our_single_files(tmp_path, diffusers, kind, name):
    parts = tiny(kind)
    save_checkpoint(parts, tmp_path / name)
    save_checkpoint(parts, tmp_path / "f", "diffusers")                           # its configs: a file of theirs has none
    models = diffusers.UNet2DConditionModel, diffusers.AutoencoderKL
    unet, vae = (model.from_single_file(tmp_path / name, config=str(tmp_path / "f"), subfolder=part)
                 for model, part in zip(models, ("unet", "vae")))
    generator = torch.Generator().manual_seed(2)
    x, context, z = (torch.randn(s, generator=generator) for s in ((2, 8, 8, 8), (2, 12, 64), (1, 4, 8, 8)))
    t = torch.tensor([3, 801])
    with torch.no_grad():
        assert relative_error(unet(x, t, context).sample, parts.unet(x, t, context)) < PARITY
        assert relative_error(vae.decode(z).sample, parts.vae.decode(z)) < PARITY


@pytest.mark.parametrize("prefix", ["text_model.", ""])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_we_open_what_diffusers_saves(tmp_path, diffusers, kind, prefix):
    import transformers
    sd2 = kind == "sd2"
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, block_out_channels=(32, 64, 64), layers_per_block=2, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=64,
        attention_head_dim=(2, 4, 4) if sd2 else 8, use_linear_projection=sd2)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16), layers_per_block=2, latent_channels=4, norm_num_groups=4, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, vocab_size=700,
        max_position_embeddings=20, hidden_act="gelu" if sd2 else "quick_gelu", bos_token_id=698, eos_token_id=699,
        pad_token_id=0))
    for i, (name, model) in enumerate((("unet", unet), ("vae", vae), ("text_encoder", text))):
        randomised(model, 20 + i).save_pretrained(tmp_path / name)
    state, _ = read_state_dict(tmp_path / "text_encoder/model.safetensors")       # transformers 4 and 5 differ here
    torch.save({prefix + k.removeprefix("text_model."): v.clone() for k, v in state.items()},
               tmp_path / "text_encoder/pytorch_model.bin")
    (tmp_path / "text_encoder/model.safetensors").unlink()
    diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                            prediction_type="v_prediction" if sd2 else "epsilon").save_pretrained(tmp_path / "scheduler")
    (tmp_path / "tokenizer").mkdir()
    special = {"pad_token": "!" if sd2 else {"content": "<|endoftext|>"}, "eos_token": {"content": "<|endoftext|>"}}
    (tmp_path / "tokenizer/special_tokens_map.json").write_text(json.dumps(special))

    parts = load_checkpoint(tmp_path)
    assert (parts.parameterization, parts.image_size, parts.metadata) == ("v" if sd2 else "eps", 64, {})
    assert parts.vae.config.scale_factor == 0.5 and parts.text.config.pad_with_end != sd2
    generator = torch.Generator().manual_seed(2)
    x, context, pixels, latents = (torch.randn(s, generator=generator) for s in (
        (2, 4, 16, 16), (2, 20, 64), (1, 3, 32, 32), (1, 4, 8, 8)))
    t, ids = torch.tensor([999, 0]), torch.randint(0, 700, (2, 20), generator=generator)
    with torch.no_grad():
        assert relative_error(parts.unet(x, t, context), unet(x, t, context).sample) < PARITY
        assert relative_error(parts.vae.encode(pixels).mean, vae.encode(pixels).latent_dist.mean) < PARITY
        assert relative_error(parts.vae.decode(latents), vae.decode(latents).sample) < PARITY
        assert relative_error(parts.text(ids), text(ids)[0]) < PARITY
    save_checkpoint(parts, tmp_path / "m.safetensors")                            # and on to a single file
    assert same_parts(load_checkpoint(tmp_path / "m.safetensors"), parts)

    config = json.loads((tmp_path / "text_encoder/config.json").read_text())      # clip-skip: its last layer is left out
    (tmp_path / "text_encoder/config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    text = transformers.CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    parts = load_checkpoint(tmp_path)
    assert parts.text.config.layers == 2
    with torch.no_grad():
        assert relative_error(parts.text(ids), text(ids)[0]) < PARITY


# ---- full size, without weights ----

def on_meta(build):
    with torch.device("meta"):
        return build()


SD2 = UNetConfig(context_dim=1024, num_heads=None, head_channels=64, linear_proj=True)
FULL = {"sd1": UNetConfig(), "ip2p": UNetConfig(in_channels=8), "sd2": SD2}


@pytest.mark.parametrize("kind", list(FULL))
def test_full_size_unet_names_and_sizes(kind):
    state = on_meta(lambda: UNet(FULL[kind])).state_dict()
    assert len(state) == 686
    if kind == "sd1":
        assert sum(t.numel() for t in state.values()) == 859_520_964             # 859.5 M, as published
    for name, shape in {
            "input_blocks.0.0.weight": (320, FULL[kind].in_channels, 3, 3), "input_blocks.3.0.op.weight": (320, 320, 3, 3),
            "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1), "input_blocks.11.0.out_layers.3.bias": (1280,),
            "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3), "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
            "output_blocks.8.2.conv.bias": (640,), "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
            "output_blocks.11.1.transformer_blocks.0.attn1.to_out.0.bias": (320,), "out.2.weight": (4, 320, 3, 3),
            "time_embed.2.weight": (1280, 1280), "middle_block.0.emb_layers.1.weight": (1280, 1280),
            "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, FULL[kind].context_dim)}.items():
        assert state[name].shape == shape, name
    assert keys.config_from(UNetConfig, state, {}) == FULL[kind]
    assert len(set(map(keys.ema_name, state))) == 686                             # dotless, and still different
    there = keys.unet_to_diffusers(state, FULL[kind])
    assert not set(there) & set(state)
    back = keys.unet_from_diffusers(there)
    assert {k: t.shape for k, t in back.items()} == {k: t.shape for k, t in state.items()}


def test_full_size_vae_and_text_names():
    vae = on_meta(lambda: AutoencoderKL()).state_dict()
    assert len(vae) == 248 and sum(t.numel() for t in vae.values()) == 83_653_863
    assert keys.config_from(VAEConfig, vae, {}) == VAEConfig()
    assert keys.vae_from_diffusers(keys.vae_to_diffusers(vae, VAEConfig())).keys() == vae.keys()
    import_open_clip()
    sd2 = TextConfig(width=1024, layers=24, heads=16, quick_gelu=False, skip_last=1, pad_with_end=False, projection_dim=1024)
    for config, count in ((TextConfig(), 123_060_480), (sd2, 354_032_640)):       # with SD 2's projection of 1024 x 1024
        text = on_meta(lambda: TextEncoder(config)).state_dict()
        assert sum(t.numel() for t in text.values()) == count
        assert keys.text_from_hf(keys.text_to_hf(text)).keys() == text.keys()
        rule = {k: getattr(config, k) for k in ("quick_gelu", "skip_last", "pad_with_end")}
        assert keys.config_from(TextConfig, text, rule) == config


def test_full_size_names_are_those_of_diffusers(diffusers):
    import transformers
    sd1 = dict(sample_size=64, cross_attention_dim=768)
    sd2 = dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
    for config, theirs in ((UNetConfig(), sd1), (SD2, sd2)):
        model = on_meta(lambda: diffusers.UNet2DConditionModel(**theirs)).state_dict()
        ours = keys.unet_to_diffusers(on_meta(lambda: UNet(config)).state_dict(), config)
        assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in model.items()}
    model = on_meta(lambda: diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4)).state_dict()
    ours = keys.vae_to_diffusers(on_meta(lambda: AutoencoderKL()).state_dict(), VAEConfig())
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in model.items()}
    model = on_meta(lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))).state_dict()
    ours = keys.text_to_hf(on_meta(lambda: TextEncoder()).state_dict())
    assert {k.removeprefix("text_model."): t.shape for k, t in ours.items()} == {
        k.removeprefix("text_model."): t.shape for k, t in model.items() if not k.endswith("position_ids")}


def test_the_layer_that_diffusers_drops_from_sd2_is_made_good():
    import_open_clip()
    config = TextConfig(width=1024, layers=23, heads=16, quick_gelu=False, pad_with_end=False)
    tensors, published = _as_published(on_meta(lambda: TextEncoder(config)))
    assert published == replace(config, layers=24, skip_last=1)
    assert tensors.keys() == on_meta(lambda: TextEncoder(published)).state_dict().keys()
    # what is added, a layer of zeros, leaves its input alone whether a program runs it or not
    small = tiny("sd2").text
    ids = torch.arange(24).view(2, 12)
    before = small(ids)
    with torch.no_grad():
        for p in small.transformer.resblocks[2].parameters():
            p.zero_()
    small.config = replace(small.config, skip_last=0)
    assert torch.equal(small(ids), before)
    assert _as_published(small)[1] == small.config                               # narrow models stay as they are
