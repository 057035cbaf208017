"""A whole edit, a picture made from text, CLIP's tokens, and models of full size (`-m slow`), against diffusers and
transformers with the same random weights and noise."""

import numpy as np
import pytest
import torch
from checkpoints import relative_error
from pictures import levels_apart
from PIL import Image

from ip2p import InstructPix2Pix
from ip2p.clip_filter import import_open_clip
from ip2p.images import to_images, to_pixels

import_open_clip()                               # before diffusers: see its docstring
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def reference_pipeline(sd2=False, seed=0, in_channels=8):
    """diffusers' InstructPix2Pix at small size, in the shape of SD 1 or SD 2, random weights."""
    torch.manual_seed(seed)
    width = 64
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, out_channels=4, block_out_channels=(64, 128), layers_per_block=1, norm_num_groups=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width, attention_head_dim=[1, 2] if sd2 else 8, use_linear_projection=sd2)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 32, 64), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, sample_size=64)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=1,
        hidden_act="gelu" if sd2 else "quick_gelu", bos_token_id=49406, eos_token_id=49407, pad_token_id=0 if sd2 else 49407))
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
        set_alpha_to_one=False, clip_sample=False, prediction_type="v_prediction" if sd2 else "epsilon")
    return unet, vae, text, scheduler


@pytest.mark.parametrize("sd2", [False, True], ids=["SD1", "SD2"])
@pytest.mark.parametrize("cfg_text, cfg_image", [(7.5, 1.5), (3.0, 1.0)])
def test_a_whole_edit_equals_diffusers(sd2, cfg_text, cfg_image, tmp_path):
    """Their weights, our checkpoint loader, tokenizer, encoders, guidance with a negative prompt, sampler and decoder. The
    pixels in [0, 1] differ by less than 5e-6 of their norm (measured: up to 8.2e-7; with text guidance 7.4 for 7.5 by 5.6e-4
    and more), before `edit` rounds them to 8 bits."""
    unet, vae, text, scheduler = reference_pipeline(sd2)
    parts = dict(unet=unet, vae=vae, text_encoder=text, scheduler=scheduler)
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    (tmp_path / "model_index.json").write_text("{}")
    ours = InstructPix2Pix.load(tmp_path, parameterization="v" if sd2 else "eps")

    prompt, seed, steps = "make it night", 3, 20
    with torch.no_grad():
        embeds = text(ours.tokenizer([prompt, "rain"])).last_hidden_state
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))

    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, tokenizer=None, safety_checker=None,
                                                                feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(image=image, prompt_embeds=embeds[:1], negative_prompt_embeds=embeds[1:], latents=x_T,
                      num_inference_steps=steps, guidance_scale=cfg_text, image_guidance_scale=cfg_image, output_type="pt").images
    z = ours.edit_latents(ours.encode(to_pixels(image, 64, 64)[None]), [prompt], cfg_text, cfg_image, steps=steps, seeds=[seed],
                          negative_prompt="rain")
    pixels = ours.decode(z)
    assert relative_error((pixels / 2 + 0.5).clamp(0, 1), theirs) < 5e-6

    settings = dict(steps=steps, cfg_text=cfg_text, cfg_image=cfg_image, negative_prompt="rain", progress=False)
    picture, given = (ours.edit(image, prompt, **settings, **noise)[0] for noise in (dict(seed=seed), dict(x_T=x_T)))
    assert levels_apart(picture, to_images(pixels)[0]).max() <= 1 and np.array_equal(np.asarray(given), np.asarray(picture))


@pytest.mark.parametrize("hard", ["", "a photo of a cat", "  Make   it NIGHT!! ", "don't they'll we've", "naïve café, 東京 🦊",
                                  "x" * 300, "3.14159 & 2^10 <b>bold</b>", "a&amp;b", "word " * 200, "\t\n", "it's 50% off—really…"])
def test_tokens_equal_transformers(hard, tmp_path):
    """transformers' CLIPTokenizer, built from the same merges, on hard strings."""
    from ip2p.text import TextConfig, Tokenizer
    ours = Tokenizer(TextConfig())
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    import json
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab.write_text(json.dumps({names.get(k, k): v for k, v in ours.bpe.encoder.items()}), encoding="utf-8")
    merges.write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in ours.bpe.bpe_ranks), encoding="utf-8")
    theirs = transformers.CLIPTokenizer(str(vocab), str(merges), pad_token="<|endoftext|>")
    ids = theirs([hard], padding="max_length", max_length=77, truncation=True).input_ids
    if hard == "a&amp;b":                     # the original unescapes HTML, as ours does; transformers leaves it
        ids = theirs(["a&b"], padding="max_length", max_length=77, truncation=True).input_ids
    assert ours([hard]).tolist() == ids


def test_learned_words_beyond_clips_own_move_no_token():
    from ip2p.text import TextConfig, Tokenizer
    assert torch.equal(Tokenizer(TextConfig(vocab_size=49410))(["a fox"]), Tokenizer(TextConfig())(["a fox"]))


@pytest.mark.parametrize("sd2", [False, True], ids=["SD1", "SD2"])
def test_text_to_picture_equals_diffusers(sd2, tmp_path):
    """Pixels to 5e-6 of their norm, before `generate` rounds them."""
    unet, vae, text, scheduler = reference_pipeline(sd2, in_channels=4)
    parts = dict(unet=unet, vae=vae, text_encoder=text, scheduler=scheduler)
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    (tmp_path / "model_index.json").write_text("{}")
    ours = InstructPix2Pix.load(tmp_path)
    with torch.no_grad():
        embeds = text(ours.tokenizer(["a fox in a meadow", "rain"])).last_hidden_state
    x_T = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(3))
    pipeline = diffusers.StableDiffusionPipeline(**parts, tokenizer=None, safety_checker=None, feature_extractor=None,
                                                 requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(prompt_embeds=embeds[:1], negative_prompt_embeds=embeds[1:], latents=x_T, height=64, width=128,
                      num_inference_steps=10, guidance_scale=5.0, output_type="pt").images
    z = ours.text_to_latents(["a fox in a meadow"], ours.encode_text(["rain"]), 5.0, x_T.shape, steps=10, seeds=[0], x_T=x_T)
    pixels = ours.decode(z)
    assert relative_error((pixels / 2 + 0.5).clamp(0, 1), theirs) < 5e-6
    picture, = ours.generate("a fox in a meadow", negative_prompt="rain", steps=10, cfg_text=5.0, size=(128, 64), x_T=x_T,
                             progress=False)
    assert levels_apart(picture, to_images(pixels)[0]).max() <= 1


@pytest.mark.slow
def test_full_size_models_equal_diffusers_and_transformers():
    """Stable Diffusion 1.5's sizes: the UNet's 859.5 M parameters on 64x64 latents, the VAE both ways on a 256x256 picture,
    the text encoder on 77 tokens: relative errors below 1e-5 in float32."""
    from ip2p import keys
    from ip2p.text import TextConfig, TextEncoder, Tokenizer
    from ip2p.unet import UNet, UNetConfig
    from ip2p.vae import AutoencoderKL, VAEConfig
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)

    def build(model_class, config, tensors):
        with torch.device("meta"):
            model = model_class(config)
        model.load_state_dict(tensors, assign=True)
        return model

    errors = {}
    with torch.no_grad():
        theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu"))
        ours = build(TextEncoder, TextConfig(), keys.text_from_hf(theirs.state_dict()))
        ids = Tokenizer()(["a watercolor of a fox in a meadow, at night"])
        context = theirs(ids).last_hidden_state
        errors["text"] = relative_error(ours(ids), context)

        theirs = diffusers.UNet2DConditionModel(
            sample_size=64, in_channels=8, out_channels=4, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768,
            attention_head_dim=8)
        ours = build(UNet, UNetConfig(in_channels=8), keys.unet_from_diffusers(theirs.state_dict()))
        assert len(ours.state_dict()) == 686
        x, t = torch.randn(1, 8, 64, 64, generator=generator), torch.tensor([500])
        errors["unet"] = relative_error(ours(x, t, context), theirs(x, t, context).sample)

        theirs = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=512)
        ours = build(AutoencoderKL, VAEConfig(), keys.vae_from_diffusers(theirs.state_dict()))
        pixels = torch.rand(1, 3, 256, 256, generator=generator) * 2 - 1
        z = theirs.encode(pixels).latent_dist
        errors["encode"] = relative_error(ours.encode(pixels).mode(), z.mode())
        errors["decode"] = relative_error(ours.decode(z.mode()), theirs.decode(z.mode()).sample)
    print(errors)
    assert all(error < 1e-5 for error in errors.values()), errors
