"""Dual guidance against Eq. 3 written out, its shortcuts, and conditioning dropout as published."""
import pytest
import torch

from torch._dynamo.testing import CompileCounter

from ip2p.guidance import dropout_masks, instruct_denoiser, text_denoiser
from ip2p.unet import UNet, UNetConfig

B, Z = 2, 4
generator = torch.Generator().manual_seed(0)
x_t, image_latents = (torch.randn(B, Z, 8, 8, generator=generator) for _ in range(2))
context, null_context = (torch.randn(B, 5, 3, generator=generator) for _ in range(2))
t = torch.tensor(500)


class Predict:
    """A stand-in for the UNet that depends on each of its inputs and counts its evaluations."""

    def __init__(self):
        self.evaluations = []

    def __call__(self, x, t, context):
        self.evaluations.append(len(x) // B)
        image = x[:, Z:] if x.shape[1] == 2 * Z else 0
        return torch.sin(x[:, :Z]) + 0.5 * image + context.mean((1, 2)).view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000


def equation_3(s_T, s_I):
    def e(image, text):
        return Predict()(torch.cat([x_t, image], 1), t.expand(B), text)
    none = torch.zeros_like(image_latents)
    full, image, nothing = e(image_latents, context), e(image_latents, null_context), e(none, null_context)
    return nothing + s_I * (image - nothing) + s_T * (full - image)


@pytest.mark.parametrize("s_T, s_I, evaluations", [(7.5, 1.5, 3), (0.5, 0.3, 3), (3.0, 0.0, 3), (-1.0, 2.0, 3),
                                                   (7.5, 1.0, 2), (2.0, 2.0, 2), (0.0, 1.5, 2), (1.0, 1.0, 1)])
def test_dual_guidance_is_equation_3_in_as_few_evaluations(s_T, s_I, evaluations):
    predict = Predict()
    eps = instruct_denoiser(predict, context, null_context, image_latents, s_T, s_I)(x_t, t)
    assert predict.evaluations == [evaluations]
    assert torch.allclose(eps, equation_3(s_T, s_I), atol=1e-5)
    apart = instruct_denoiser(predict, context, null_context, image_latents, s_T, s_I, one_by_one=True)(x_t, t)
    assert predict.evaluations[1:] == [1] * evaluations and torch.allclose(apart, eps, atol=1e-5)


def test_scales_of_one_are_the_plain_model():
    eps = instruct_denoiser(Predict(), context, null_context, image_latents, 1.0, 1.0)(x_t, t)
    assert torch.equal(eps, Predict()(torch.cat([x_t, image_latents], 1), t.expand(B), context))


def test_branches_come_in_the_published_order():
    seen = {}

    def predict(x, t, context):
        seen.update(image=x[:, Z:], context=context)
        return x[:, :Z]
    instruct_denoiser(predict, context, null_context, image_latents, 7.5, 1.5)(x_t, t)
    assert torch.equal(seen["context"], torch.cat([context, null_context, null_context]))
    assert torch.equal(seen["image"], torch.cat([image_latents, image_latents, torch.zeros_like(image_latents)]))


def test_a_compiled_unet_is_one_program_for_every_edit():
    """Texts that were read ahead are a dict by layer: a new one for each edit, and nothing is compiled anew."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(2 * Z, Z, 32, (1, 2), 1, (True, False), context_dim=3, num_heads=2, norm_groups=8)).eval()
    programs = CompileCounter()
    compiled = torch.compile(unet, backend=programs, fullgraph=True)
    with torch.no_grad():
        for i in range(3):
            texts = context + i, null_context
            results = [instruct_denoiser(predict, *texts, image_latents, 7.5, 1.5, unet.read_text)(x_t, t)
                       for predict in (compiled, unet)]
            assert torch.equal(*results)
    assert programs.frame_count == 1


def test_guidance_is_computed_in_float32():
    def predict(x, t, context):
        return Predict()(x, t, context).half()
    assert instruct_denoiser(predict, context, null_context, image_latents, 7.5, 1.5)(x_t, t).dtype == torch.float32


@pytest.mark.parametrize("scale, evaluations", [(7.5, 2), (1.0, 1), (0.0, 1)])
def test_text_guidance(scale, evaluations):
    predict = Predict()
    eps = text_denoiser(predict, context, null_context, scale)(x_t, t)
    with_text, without = (Predict()(x_t, t.expand(B), c) for c in (context, null_context))
    assert predict.evaluations == [evaluations]
    assert torch.allclose(eps, without + scale * (with_text - without), atol=1e-5)


def test_dropout_is_five_percent_each_way():
    """Text alone, both, image alone: 5% each, by one draw. Of 200,000, five standard deviations are 0.25%."""
    drop_text, drop_image = dropout_masks(200_000, 0.05, torch.Generator().manual_seed(0))
    for case in (drop_text & ~drop_image, drop_text & drop_image, drop_image & ~drop_text):
        assert case.float().mean().item() == pytest.approx(0.05, abs=0.0025)


def test_dropout_probability_out_of_range_is_refused():
    with pytest.raises(ValueError, match="got 0.4"):
        dropout_masks(4, 0.4, torch.Generator())
