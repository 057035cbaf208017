"""Guidance over two conditionings, and the dropout in training that makes it possible (InstructPix2Pix, Sec. 3.2).

A denoiser is a function denoise(x_t, t) -> eps. Samplers know nothing else, and this file makes it from a UNet.
"""
from typing import Callable

import torch
from torch import Tensor


def instruct_denoiser(predict: Callable, context: Tensor, null_context: Tensor, image_latents: Tensor,
                      cfg_text: float | Tensor, cfg_image: float | Tensor, read_text: Callable | None = None,
                      one_by_one=False) -> Callable:
    """denoise(x_t, t) -> eps for an editor, guided over text and image (arXiv:2211.09800, Eq. 3), in float32:

    eps = e(0, 0) + s_I (e(I, 0) - e(0, 0)) + s_T (e(I, T) - e(I, 0)).

    predict: (x, t, context) -> eps, with x of (N, 2 z, h, w) and t of (1,).
    context: (B, M, D), the instruction; null_context: (B or 1, M, D), what stands for its absence ("" or a negative prompt).
    image_latents: (B, z, h, w), unscaled in InstructPix2Pix. cfg_text, cfg_image: s_T and s_I, any finite numbers, or one
    of each for every picture, (B,).
    read_text: turns the contexts of all branches, once, into what `predict` takes in their place.
    Each step evaluates [text + image, image, nothing] in one batch, or one_by_one, in less memory. Their weights are s_T,
    s_I - s_T and 1 - s_I; where one is zero, its branch is not evaluated.
    """
    null_context = null_context.expand_as(context)
    branches = [(cfg_text, context, image_latents),                         # Eq. 3, its terms collected: (weight, text, image)
                (cfg_image - cfg_text, null_context, image_latents),
                (1 - cfg_image, null_context, torch.zeros_like(image_latents))]
    if one_by_one:
        denoisers = [_weighted_denoiser(predict, [branch], read_text) for branch in branches if _has_weight(branch)]
        return lambda x_t, t: sum(denoise(x_t, t) for denoise in denoisers)
    return _weighted_denoiser(predict, branches, read_text)


def guidance_condition(cfg_text: float | Tensor, cfg_image: float | Tensor, steps: int | Tensor) -> Tensor:
    """What a distilled editor's UNet is told in place of being guided: both scales, times 100 so that they are as large as
    timesteps are, and how many timesteps each of its steps covers. Numbers or (B,) each; returns (..., 3) float32."""
    numbers = (torch.as_tensor(x, dtype=torch.float32) for x in (100 * cfg_text, 100 * cfg_image, 1000 / steps))
    return torch.stack(torch.broadcast_tensors(*numbers), -1)


def text_denoiser(predict: Callable, context: Tensor, null_context: Tensor, cfg_text: float | Tensor,
                  read_text: Callable | None = None) -> Callable:
    """denoise(x_t, t) -> eps with classifier-free guidance for text alone (Ho & Salimans 2022, arXiv:2207.12598):
    eps = e(0) + s (e(T) - e(0)). One evaluation where s is 1 or 0, else [text, nothing] in one batch. cfg_text: s, or one
    for each picture, (B,). Shapes as in `instruct_denoiser`."""
    null_context = null_context.expand_as(context)
    return _weighted_denoiser(predict, [(cfg_text, context, None), (1 - cfg_text, null_context, None)], read_text)


def _has_weight(branch):
    """Whether a branch, (weight, text, image), takes part: its weight is a number other than 0, or a tensor of any numbers."""
    return torch.is_tensor(branch[0]) or branch[0] != 0


def _weighted_denoiser(predict, branches, read_text):
    """denoise(x_t, t): the sum of weight x prediction over those branches whose weight is not zero, all in one batch."""
    weights, texts, images = zip(*filter(_has_weight, branches))          # not empty: the weights sum to 1
    weights = [w[:, None, None, None] if torch.is_tensor(w) else w for w in weights]
    n, join_image = len(weights), images[0] is not None
    context = torch.cat(texts) if read_text is None else read_text(torch.cat(texts))
    image_latents = torch.cat(images) if join_image else None

    def denoise(x_t, t):
        x = x_t.repeat(n, 1, 1, 1)
        if join_image:
            x = torch.cat([x, image_latents.to(x.dtype)], dim=1)
        eps = predict(x, t.expand(1), context).float().chunk(n)
        return sum(w * e for w, e in zip(weights, eps))

    return denoise


def dropout_masks(batch_size: int, prob: float, generator: torch.Generator):
    """Which examples lose their conditioning in training: `prob` of them the text alone, `prob` both, `prob` the
    image alone, by one uniform draw r each, as published: text if r < 2 prob, image if prob <= r < 3 prob.

    Returns (drop_text, drop_image), each (batch_size,) bool on the generator's device. ValueError unless
    0 <= prob <= 1/3.
    """
    if not 0 <= prob <= 1 / 3:
        raise ValueError(f"the dropout probability must be in [0, 1/3], got {prob}")
    r = torch.rand(batch_size, generator=generator, device=generator.device)
    return r < 2 * prob, (prob <= r) & (r < 3 * prob)
