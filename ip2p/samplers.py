"""Samplers: DDIM with its inversion, and Euler ancestral. Each is a function of a callable denoise(x_t, t) -> eps.

x_t: (B, z, h, w) float32 latents of unit variance, t: a scalar tensor, eps: like x_t. Nothing here knows of prompts,
guidance or networks. Random numbers come from `noise_like`, a function that draws a tensor shaped like its argument;
`after_step`, another function, may change the latents after every step (Euler ancestral's are larger by 1 / sqrt(a_t)).
"""
from typing import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from .schedule import NUM_TRAIN_TIMESTEPS, sigmas_at


def ddim_timesteps(num_steps: int, spacing: str = "leading") -> Tensor:
    """Descending int64 timesteps, (num_steps,). Raises ValueError unless 1 <= num_steps <= 1000.

    spacing: "leading" for every (1000 // num_steps)th from 1 up, as in diffusers; "trailing" for evenly spaced from 999 down
    (Lin et al. 2023, arXiv:2305.08891), needed for few steps: two leading ones begin at 501. The original's leading ones are
    more than asked where num_steps does not divide 1000; here as many as asked. Where these would leave out more than a
    tenth of all timesteps, as 334 would begin at 667, trailing ones take their place. (All 1000 are 999, ..., 0.)"""
    if not 1 <= num_steps <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"the number of steps must be in 1..{NUM_TRAIN_TIMESTEPS}, got {num_steps}")
    every = NUM_TRAIN_TIMESTEPS // num_steps
    if spacing == "trailing" or num_steps * every < 0.9 * NUM_TRAIN_TIMESTEPS:
        return (NUM_TRAIN_TIMESTEPS * (1 - torch.arange(num_steps, dtype=torch.float64) / num_steps)).round().long() - 1
    offset = int(num_steps < NUM_TRAIN_TIMESTEPS)
    return (torch.arange(num_steps) * every + offset).flip(0)


def ddim_steps(num_steps: int, alphas_cumprod: Tensor, spacing: str = "leading") -> list[tuple[Tensor, Tensor, Tensor]]:
    """(t, a_t, a_prev) of each step. The last step ends at alphas_cumprod[0], not at 1."""
    timesteps = ddim_timesteps(num_steps, spacing).to(alphas_cumprod.device)
    a_t = alphas_cumprod[timesteps]
    return list(zip(timesteps, a_t, torch.cat([a_t[1:], alphas_cumprod[:1]])))


def ddim_step(x_t: Tensor, eps: Tensor, a_t: Tensor, a_prev: Tensor, eta: float = 0.0, noise: Tensor | None = None):
    """One step of DDIM (Song et al. 2020, arXiv:2010.02502, Eq. 12) from noise level a_t to a_prev, either way.

    eta: 0 is deterministic, 1 has DDPM's variance; `noise` (like x_t) is needed unless eta is 0.
    """
    x0 = (x_t - (1 - a_t).sqrt() * eps) / a_t.sqrt()
    # Clamped for inversion, where a_prev < a_t and eta is 0: the root would be NaN, and 0 times NaN is NaN.
    sigma = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)).clamp(min=0).sqrt()
    x_prev = a_prev.sqrt() * x0 + (1 - a_prev - sigma ** 2).clamp(min=0).sqrt() * eps
    return x_prev if eta == 0 else x_prev + sigma * noise


def ddim_sample(denoise: Callable, x_T: Tensor, num_steps: int, alphas_cumprod: Tensor, eta: float = 0.0,
                noise_like: Callable | None = None, progress: bool = False, after_step: Callable | None = None,
                first: int = 0, spacing: str = "leading") -> Tensor:
    """Clean latents from noise x_T (unit variance), in exactly `num_steps` evaluations of `denoise`; or in the steps from
    `first` on, from latents that are as noisy as that step expects. spacing: see `ddim_timesteps`."""
    x, steps = x_T, ddim_steps(num_steps, alphas_cumprod.to(x_T.device), spacing)[first:]
    for t, a_t, a_prev in tqdm(steps, desc="DDIM", disable=not progress):
        x = ddim_step(x, denoise(x, t), a_t, a_prev, eta, noise_like(x) if eta != 0 else None)
        if after_step is not None:
            x = after_step(x)
    return x


def ddim_invert(denoise: Callable, x0: Tensor, num_steps: int, alphas_cumprod: Tensor, progress: bool = False) -> list[Tensor]:
    """DDIM run backwards: noise that `ddim_sample` turns into x0 again, up to the error of its steps.

    Returns the num_steps + 1 latents on the way, x0 first and x_T last. As in null-text inversion (Mokady et al. 2022), the
    eps of a step is predicted from the latents at its start, but at the timestep of its end.
    """
    latents = [x0]
    for t, a_t, a_prev in tqdm(ddim_steps(num_steps, alphas_cumprod.to(x0.device))[::-1], desc="DDIM inversion", disable=not progress):
        x = latents[-1]
        latents.append(ddim_step(x, denoise(x, t), a_prev, a_t))
    return latents


def euler_ancestral_sample(denoise: Callable, x_T: Tensor, num_steps: int, alphas_cumprod: Tensor, eta: float = 1.0,
                           noise_like: Callable | None = None, progress: bool = False,
                           after_step: Callable | None = None) -> Tensor:
    """Euler ancestral as in InstructPix2Pix's own script (Karras et al. 2022, arXiv:2206.00364; k-diffusion).

    It works on x_t / sqrt(a_t), whose noise has the level sigma = sqrt((1 - a_t) / a_t), at timesteps evenly spaced from
    999 to 0, mostly fractions. eta scales the noise added at each step. ValueError unless 1 <= num_steps <= 1000.
    """
    if not 1 <= num_steps <= len(alphas_cumprod):
        raise ValueError(f"the number of steps must be in 1..{len(alphas_cumprod)}, got {num_steps}")
    timesteps = torch.linspace(len(alphas_cumprod) - 1, 0, num_steps, device=x_T.device)
    sigmas = torch.cat([sigmas_at(timesteps, alphas_cumprod), torch.zeros(1, device=x_T.device)])
    x = x_T * sigmas[0]
    for i in tqdm(range(num_steps), desc="Euler ancestral", disable=not progress):
        sigma, sigma_to = sigmas[i], sigmas[i + 1]
        sigma_up = torch.minimum(sigma_to, eta * (sigma_to ** 2 * (sigma ** 2 - sigma_to ** 2) / sigma ** 2).sqrt())
        sigma_down = (sigma_to ** 2 - sigma_up ** 2).sqrt()             # where Euler goes; then noise of sigma_up is added
        eps = denoise(x / (sigma ** 2 + 1).sqrt(), timesteps[i])
        x = x + (sigma_down - sigma) * eps
        if i < num_steps - 1:                                           # the last step's sigma_up is 0
            x = x + sigma_up * noise_like(x)
        if after_step is not None:
            x = after_step(x)
    return x


SAMPLERS = {"ddim": ddim_sample, "euler-ancestral": euler_ancestral_sample}
