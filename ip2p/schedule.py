"""The noise schedule of Stable Diffusion, and conversions between what models predict.

x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps, with a_t = `alphas_cumprod[t]` (DDPM's alpha-bar; the DDIM paper's alpha).
"""
import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS, BETA_START, BETA_END = 1000, 0.00085, 0.012


def make_alphas_cumprod() -> Tensor:
    """Stable Diffusion's "scaled linear" schedule: betas whose square roots are evenly spaced.

    Returns (1000,) float32, falling from 0.99915 to 0.0047; computed in float64, as the original does.
    """
    betas = torch.linspace(BETA_START ** 0.5, BETA_END ** 0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def sigmas_at(t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Noise levels sqrt((1 - a_t) / a_t) at timesteps in 0..999, of any shape; log sigma is interpolated linearly."""
    log_sigmas = ((1 - alphas_cumprod) / alphas_cumprod).log().to(t.device) / 2
    t = t.float()
    low = t.floor().long().clamp(max=len(log_sigmas) - 2)
    return torch.lerp(log_sigmas[low], log_sigmas[low + 1], t - low).exp()


def _coefficients(alphas_cumprod, t, like):
    """sqrt(a_t) and sqrt(1 - a_t), shaped to multiply `like`; float32."""
    a_t = alphas_cumprod.to(like.device)[t].view(-1, *[1] * (like.ndim - 1))
    return a_t.sqrt(), (1 - a_t).sqrt()


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t (DDPM, arXiv:2006.11239, Eq. 4) for clean latents x0 and noise, both (B, ...), at integer timesteps t, (B,)."""
    signal_scale, noise_scale = _coefficients(alphas_cumprod, t, x0)
    return signal_scale * x0 + noise_scale * noise


def velocity(x0: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """v = sqrt(a_t) eps - sqrt(1 - a_t) x0 (Salimans & Ho 2022, arXiv:2202.00512). Shapes as for `add_noise`."""
    signal_scale, noise_scale = _coefficients(alphas_cumprod, t, x0)
    return signal_scale * noise - noise_scale * x0


def eps_from_v(v: Tensor, x_t: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """eps = sqrt(a_t) v + sqrt(1 - a_t) x_t, float32. v, x_t: (B, z, h, w); t: (B,) or (1,) timesteps, whole or not."""
    sigma = sigmas_at(t, alphas_cumprod)[:, None, None, None]
    return (v.float() + sigma * x_t.float()) / (1 + sigma ** 2).sqrt()         # as sqrt(a_t) = 1 / sqrt(1 + sigma^2)
