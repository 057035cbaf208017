"""Pictures and pairs drawn under control: what must hold of whole pictures, and pairs against the published loop."""
from itertools import product

import numpy as np
import pytest
import torch
from published_control import UNET, SlowBlend, noise, published_generator, textbook

from ip2p import InstructPix2Pix
from ip2p.checkpoint import Parts
from ip2p.images import to_images
from ip2p.prompt_to_prompt import CONTROLS, LocalBlend, prompt_to_prompt, share_self_attention
from ip2p.samplers import ddim_step, ddim_steps
from ip2p.text import TextConfig, TextEncoder
from ip2p.vae import AutoencoderKL, VAEConfig

pytestmark = pytest.mark.usefixtures("no_gradients")

T = 5


# ---- what must hold of whole pictures

@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(VAEConfig(channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4)).eval()
        text = TextEncoder(TextConfig(vocab_size=2 * 256 + 2 + 2048, context_length=32, width=24, layers=2, heads=2)).eval()
    for part in (vae, text):
        part.requires_grad_(False)
    return InstructPix2Pix(Parts(UNET(), vae, text, "eps", 32, {}))


def arrays(pictures):
    return np.stack([np.asarray(picture, dtype=int) for picture in pictures])


def generate(model, prompts, control=None, **settings):
    return arrays(model.generate(prompts, **dict(steps=T, cfg_text=3.0, seed=5, size=(48, 32), control=control, progress=False) | settings))


def test_control_for_no_step_is_no_control(model):
    prompts = ["a red cat", "a blue dog sits"]
    plain = generate(model, prompts)
    for mode in ("replace", "refine"):
        control = prompt_to_prompt(model.tokenizer, prompts, T, mode=mode, cross_replace_steps=0, self_replace_steps=0, equalizer={"dog": 3})
        assert np.array_equal(generate(model, prompts, control), plain)
    assert np.array_equal(generate(model, prompts, share_self_attention([0, 0], [0, 0], T)), plain)


@pytest.mark.parametrize("make", [
    lambda tok, prompts: prompt_to_prompt(tok, prompts, T, cross_replace_steps=1, self_replace_steps=1, equalizer={"dog": 4}),
    lambda tok, prompts: prompt_to_prompt(tok, prompts, T, local_blend=LocalBlend(("cat", "dog"), threshold=0.8)),
    lambda tok, prompts: share_self_attention([0, 0], [0.9, 0.9], T)], ids=["refine", "blend", "shared"])
def test_the_source_is_drawn_as_ever(make, model):
    prompts = ["a red cat", "a blue dog"]
    plain, controlled = generate(model, prompts), generate(model, prompts, make(model.tokenizer, prompts))
    assert np.abs(controlled[0] - plain[0]).max() <= 1 and np.abs(controlled[0] - generate(model, prompts[:1])[0]).max() <= 1
    assert np.abs(controlled[1] - plain[1]).mean() > 1


def test_equal_prompts_give_equal_pictures(model):
    prompts = ["a red cat"] * 3
    for mode, sampler in product(("replace", "refine", "reweight"), ("ddim", "euler-ancestral")):
        control = prompt_to_prompt(model.tokenizer, prompts, T, mode=mode, cross_replace_steps=1, self_replace_steps=1)
        pictures = generate(model, prompts, control, sampler=sampler)
        assert np.abs(pictures - pictures[:1]).max() <= 1
        assert np.abs(pictures - generate(model, prompts, sampler=sampler)).max() <= 1


def test_control_without_guidance(model):
    """At a scale of 1 the one evaluation is conditional, and controlled as the conditional half of two is; at 0 none counts that
    is controlled."""
    prompts = ["a red cat", "a blue dog"]
    control = prompt_to_prompt(model.tokenizer, prompts, T, equalizer={"blue": 8})
    for scale in (0.0, 1.0):
        near, at = (generate(model, prompts, control, cfg_text=s) for s in (scale + 1e-6, scale))
        assert np.abs(near - at).max() <= 1
    assert np.abs(at[0] - at[1]).mean() > 1
    assert np.abs(at[1] - generate(model, prompts, cfg_text=1.0)[1]).mean() > 1


# ---- pairs

PAIR = dict(captions=["a red cat on a table", "a big dog", "a red cat on a table"],
            edited_captions=["a blue cat on a table", "a big dog in the snow", "a fox"], seeds=[3, 11, 4], shares=[0.3, 0.9, 0.6],
            cfg_text=[2.0, 4.0, 3.0])


def draw(model, only=slice(None), **settings):
    settings = dict(steps=T) | {k: v[only] for k, v in PAIR.items()} | settings
    return torch.stack(model.draw_pairs(**settings), 1)                                  # (B, 2, 3, side, side)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_pair_does_not_depend_on_its_batch(control, model):
    together = draw(model, control=control)
    assert together.shape == (3, 2, 3, 32, 32) and together.dtype == torch.float32 and together.abs().max() <= 1
    for i in range(3):
        assert torch.allclose(together[i], draw(model, slice(i, i + 1), control=control)[0], atol=2e-4)
    chosen = [2, 0]
    assert torch.allclose(draw(model, control=control, **{k: [v[i] for i in chosen] for k, v in PAIR.items()}), together[chosen], atol=2e-4)
    for name, other in dict(seeds=100, shares=0.05, cfg_text=9.0).items():
        changed = draw(model, control=control, **{name: [PAIR[name][0], other, PAIR[name][2]]})
        assert torch.allclose(changed[[0, 2]], together[[0, 2]], atol=2e-4)
        assert (changed[1, 1] - together[1, 1]).abs().mean() > 1e-3, name
        assert torch.allclose(changed[1, 0], together[1, 0], atol=2e-4) == (name == "shares")         # the source borrows nothing


@pytest.mark.parametrize("control", ["self-attention", "cross-attention"])
def test_pairs_without_shared_steps_are_pictures_of_their_captions(control, model):
    pairs = draw(model, shares=[0.0] * 3, control=control)
    for i, pair in enumerate(pairs):
        for pixels, caption in zip(pair, (PAIR["captions"][i], PAIR["edited_captions"][i])):
            alone = generate(model, caption, sampler="euler-ancestral", seed=PAIR["seeds"][i], cfg_text=PAIR["cfg_text"][i], size=32)
            assert np.abs(arrays(to_images(pixels[None])) - alone).max() <= 1


@pytest.mark.parametrize("control", CONTROLS)
def test_equal_captions_make_equal_pictures(control, model):
    """The noise of either is the same, at the start and on the way."""
    pairs = draw(model, edited_captions=PAIR["captions"], control=control)
    assert torch.allclose(pairs[:, 0], pairs[:, 1], atol=2e-4)


def test_pairs_from_given_noise(model):
    x_T = torch.cat([noise(1, 4, 8, 8, seed=seed) for seed in PAIR["seeds"]])
    assert torch.equal(draw(model, x_T=x_T, sampler="ddim"), draw(model, sampler="ddim"))
    assert not torch.allclose(draw(model, x_T=x_T.flip(0), sampler="ddim"), draw(model, sampler="ddim"), atol=0.01)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_pair_is_drawn_as_published(control, model):
    """The textbook control in a sampler written out, u + s (c - u), with the whole batch in one UNet call."""
    i, tokenizer = 1, model.tokenizer
    texts, share, scale = [PAIR["captions"][i], PAIR["edited_captions"][i]], PAIR["shares"][i], PAIR["cfg_text"][i]
    book = published_generator([0, 0], [share, share], T) if control == "self-attention" else textbook(
        tokenizer, texts, T, cross_replace_steps=share, self_replace_steps=share / 2)
    blend = SlowBlend(tokenizer, texts, [0, 0], 8, 8, 1, start=0.2, num_steps=T)
    context = model.text(tokenizer([*texts, "", ""]))
    x = noise(1, 4, 8, 8, seed=PAIR["seeds"][i]).repeat(2, 1, 1, 1)
    for book.step, (t, a_t, a_prev) in enumerate(ddim_steps(T, model.alphas_cumprod)):
        book.cross_maps = []
        c, u = model.unet(x.repeat(2, 1, 1, 1), t.expand(4), context, book).chunk(2)
        x = ddim_step(x, u + scale * (c - u), a_t, a_prev)
        if control == "local-blend":
            x = blend(x, book.cross_maps)
    expected = model.vae.decode(x / model.vae.config.scale_factor).clamp(-1, 1)
    assert torch.allclose(draw(model, control=control, sampler="ddim")[i], expected, atol=5e-4)


# ---- what cannot be done

PROMPTS = ["a cat on a mat", "a dog on a mat"]


def test_generate_refuses_a_control_for_something_else(model):
    control = prompt_to_prompt(model.tokenizer, PROMPTS, T)
    for prompts, settings in [(PROMPTS[:1], {}), (PROMPTS * 2, {}), (PROMPTS, dict(num_images=2)), (PROMPTS, dict(steps=T + 1)),
                              (PROMPTS, dict(steps=T - 1))]:
        with pytest.raises(ValueError) as error:
            generate(model, prompts, control, **settings)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cross"):
        draw(model, control="replace")
