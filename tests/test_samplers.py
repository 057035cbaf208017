"""Schedule and samplers, against diffusers' schedulers and formulas written out."""
import math

import pytest
import torch

from ip2p.samplers import ddim_invert, ddim_sample, ddim_step, ddim_timesteps, euler_ancestral_sample
from ip2p.schedule import add_noise, eps_from_v, make_alphas_cumprod, sigmas_at, velocity

ALPHAS = make_alphas_cumprod()
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def toy_denoise(x_t, t):
    """Something smooth that depends on everything, in the place of a network."""
    return torch.tanh(x_t + 0.3 * torch.sin(t.float() / 100)) + 0.1 * x_t.roll(1, -1)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_schedule_has_the_published_ends():
    assert ALPHAS.shape == (1000,) and ALPHAS[0].item() == pytest.approx(0.99915, abs=1e-6)
    sigmas = sigmas_at(torch.tensor([999.0, 0.0]), ALPHAS)
    assert sigmas.tolist() == pytest.approx([14.6146, 0.02917], rel=1e-4)        # REFERENCE: k-diffusion's ends


def test_velocity_turns_back_into_eps():
    x0, eps, t = noise(4, 4, 8, 8), noise(4, 4, 8, 8, seed=1), torch.tensor([0, 10, 500, 999])
    x_t, v = add_noise(x0, eps, t, ALPHAS), velocity(x0, eps, t, ALPHAS)
    assert torch.allclose(eps_from_v(v, x_t, t, ALPHAS), eps, atol=2e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 20, 30, 33, 50, 99, 100, 333, 500, 501, 777, 999, 1000])
def test_ddim_takes_exactly_the_asked_number_of_steps(num_steps):
    calls = []
    ddim_sample(lambda x, t: calls.append(int(t)) or torch.zeros_like(x), noise(1, 4, 2, 2), num_steps, ALPHAS)
    assert len(calls) == num_steps
    assert all(a > b for a, b in zip(calls, calls[1:])) and 0 <= calls[-1] and calls[0] <= 999


def test_every_number_of_steps_gives_strictly_falling_timesteps():
    for num_steps in range(1, 1001):
        t = ddim_timesteps(num_steps)
        assert len(t) == num_steps and (t.diff() < 0).all() and t.min() >= 0 and t.max() <= 999
        assert t.max() >= 890 or num_steps < 10              # or noise would be taken for less noisy latents: 501 every 1000 // 501


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match=f"1..1000, got {num_steps}"):
        ddim_timesteps(num_steps)
    with pytest.raises(ValueError, match=f"1..1000, got {num_steps}"):
        euler_ancestral_sample(toy_denoise, noise(1, 4, 2, 2), num_steps, ALPHAS)


@pytest.mark.parametrize("num_steps", [1, 5, 7, 20, 30, 50, 100, 150, 180, 250, 300, 333, 500])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_trajectory_equals_diffusers(num_steps, eta):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False,
                                        clip_sample=False)
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == ddim_timesteps(num_steps).tolist()
    theirs = x_T = noise(2, 4, 8, 8)
    fresh = [noise(2, 4, 8, 8, seed=10 + i) for i in range(num_steps)]
    for t, z in zip(scheduler.timesteps, fresh):
        theirs = scheduler.step(toy_denoise(theirs, t), t, theirs, eta=eta, variance_noise=z).prev_sample
    draws = iter(fresh)
    ours = ddim_sample(toy_denoise, x_T, num_steps, ALPHAS, eta=eta, noise_like=lambda x: next(draws))
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("num_steps", [2, 10, 30])
def test_euler_ancestral_trajectory_equals_diffusers(num_steps, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    module = pytest.importorskip("diffusers.schedulers.scheduling_euler_ancestral_discrete")
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="linspace")
    scheduler.set_timesteps(num_steps)
    fresh = [noise(2, 4, 8, 8, seed=10 + i) for i in range(num_steps)]
    draws = iter(fresh)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(draws))
    x_T = noise(2, 4, 8, 8)
    theirs = x_T * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        theirs = scheduler.step(toy_denoise(scheduler.scale_model_input(theirs, t), t), t, theirs).prev_sample
    ours_draws = iter(fresh)
    ours = euler_ancestral_sample(toy_denoise, x_T, num_steps, ALPHAS, noise_like=lambda x: next(ours_draws))
    assert (ours - theirs).norm() / theirs.norm() < 2e-5          # their sigmas go through float32 numpy interpolation


def test_ddim_step_by_hand():
    """x_t = 1, eps = 0.5, a_t = 0.36, a_prev = 0.64: x0 = (1 - 0.8 * 0.5) / 0.6 = 1, so x_prev = 0.8 + 0.6 * 0.5."""
    x = ddim_step(torch.tensor(1.0), torch.tensor(0.5), torch.tensor(0.36), torch.tensor(0.64))
    assert x.item() == pytest.approx(1.1, abs=1e-6)


def test_ddim_with_the_true_eps_ends_at_the_last_noise_level():
    """A denoiser that knows x0 leads to sqrt(a_0) x0 + sqrt(1 - a_0) eps, whatever the number of steps."""
    x0, eps = noise(1, 4, 4, 4), noise(1, 4, 4, 4, seed=1)
    for num_steps in (1, 7, 100):
        first = ddim_timesteps(num_steps)[0]
        x_T = add_noise(x0, eps, first[None], ALPHAS)
        end = ddim_sample(lambda x, t: eps, x_T, num_steps, ALPHAS)
        assert torch.allclose(end, ALPHAS[0].sqrt() * x0 + (1 - ALPHAS[0]).sqrt() * eps, atol=1e-4)


def test_invert_then_sample_returns():
    """Inversion takes eps a step early or late, so its error is of first order: it halves when the steps double."""
    def denoise(x, t):
        return 0.5 * torch.tanh(x)
    x0, errors = noise(1, 4, 8, 8), []
    for num_steps in (25, 50, 100, 200):
        latents = ddim_invert(denoise, x0, num_steps, ALPHAS)
        assert len(latents) == num_steps + 1 and latents[0] is x0
        back = ddim_sample(denoise, latents[-1], num_steps, ALPHAS)
        errors.append(((back - x0).norm() / x0.norm()).item())
    assert errors[1] < 0.06
    assert all(0.4 < finer / coarser < 0.6 for coarser, finer in zip(errors, errors[1:])), errors


def test_inversion_with_constant_eps_is_exact():
    x0, eps = noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=1)
    latents = ddim_invert(lambda x, t: eps, x0, 20, ALPHAS)
    back = ddim_sample(lambda x, t: eps, latents[-1], 20, ALPHAS)
    assert torch.allclose(back, x0, atol=2e-4)
    assert math.isfinite(latents[-1].std())
