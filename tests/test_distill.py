"""The distilled editor: what its student learns, and that it is used with one evaluation a step."""
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from test_train_editor import run, write_pairs

from ip2p import InstructPix2Pix
from ip2p.checkpoint import Parts, load_checkpoint, save_checkpoint
from ip2p.clip_filter import import_open_clip
from ip2p.distill import COND_DIM, TEACHER_STEPS, draw_trajectories, landing_loss, landing_velocity, make_student
from ip2p.guidance import guidance_condition, instruct_denoiser
from ip2p.keys import config_from, unet_from_diffusers
from ip2p.samplers import ddim_sample, ddim_step, ddim_steps, ddim_timesteps
from ip2p.schedule import make_alphas_cumprod
from ip2p.text import TextConfig, TextEncoder
from ip2p.unet import UNet, UNetConfig, timestep_embedding
from ip2p.vae import AutoencoderKL, VAEConfig

ALPHAS = make_alphas_cumprod()


def editor(parameterization="v", metadata=None):
    """Stable Diffusion 1's shape, small, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(UNetConfig(8, 4, 32, (1, 2), 1, (True, False), context_dim=64, num_heads=8))
        vae, text = AutoencoderKL(VAEConfig(32, (1, 1, 1, 1), 1)), TextEncoder(TextConfig(width=64, layers=1, heads=1))
    parts = (part.eval().requires_grad_(False) for part in (unet, vae, text))
    return Parts(*parts, parameterization, 32, metadata or {})


def student_of(parts):
    """A distilled editor that minds what it is told."""
    unet = make_student(parts.unet).eval().requires_grad_(False)
    unet.cond_proj.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return InstructPix2Pix(replace(parts, unet=unet))


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


# ---- the arithmetic

@pytest.mark.parametrize("t, s", [(999, 0), (999, 874), (249, 124), (500, 499)])
def test_a_step_with_the_landing_velocity_lands_there(t, s):
    """By ddim_step, in float64: to 1e-9 (between neighbouring timesteps the angle is small)."""
    x_t, x_s, alphas = noise(2, 4, 3, 3, dtype=torch.float64), noise(2, 4, 3, 3, seed=1, dtype=torch.float64), ALPHAS.double()
    v = landing_velocity(x_t, x_s, alphas[t], alphas[s])
    eps = alphas[t].sqrt() * v + (1 - alphas[t]).sqrt() * x_t
    assert torch.allclose(ddim_step(x_t, eps, alphas[t], alphas[s]), x_s, atol=1e-9, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 8, 20])
def test_trailing_timesteps_are_those_of_diffusers(num_steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == ddim_timesteps(num_steps, spacing="trailing").tolist()


def test_fewer_steps_meet_the_teachers():
    every = ddim_timesteps(TEACHER_STEPS, spacing="trailing").tolist()
    for n in (1, 2, 4):
        assert ddim_timesteps(n, spacing="trailing").tolist() == every[::TEACHER_STEPS // n]


def test_the_condition_enters_as_diffusers_has_it():
    """UNet2DConditionModel's timestep_cond. Relative error below 1e-5, and far off with another condition."""
    import_open_clip()                           # before diffusers: see its docstring
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DConditionModel(
        in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), time_cond_proj_dim=48,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).eval()
    tensors = unet_from_diffusers(theirs.state_dict())
    ours = UNet(config_from(UNetConfig, tensors, dict(num_heads=8, head_channels=None)))
    ours.load_state_dict(tensors)
    x, context, t = noise(2, 8, 8, 8), noise(2, 5, 64), torch.tensor([999, 249])
    condition = torch.tensor([[300., 150., 250.], [750., 100., 1000.]])
    features = torch.cat([timestep_embedding(column, 16) for column in condition.T], 1)
    with torch.no_grad():
        reference = theirs(x, t, context, timestep_cond=features).sample
        error = lambda c: ((ours(x, t, context, condition=c) - reference).norm() / reference.norm()).item()
        assert error(condition) < 1e-5 < 1e-3 < error(condition.flip(0))


def test_scales_of_each_picture_guide_as_they_do_alone():
    """Relative error below 1e-5: guidance amplifies rounding."""
    latents, context, null, x = noise(3, 4, 4, 4), noise(3, 5, 64, seed=1), noise(3, 5, 64, seed=2), noise(3, 4, 4, 4, seed=3)
    model, t = InstructPix2Pix(editor()), torch.tensor(500)
    text, image = torch.tensor([3., 7.5, 1.]), torch.tensor([1., 1.5, 2.])
    with torch.no_grad():
        together = instruct_denoiser(model.predict, context, null, latents, text, image)(x, t)
        for i in range(3):
            row = slice(i, i + 1)
            alone = instruct_denoiser(model.predict, context[row], null[row], latents[row], text[i].item(), image[i].item())
            assert (together[row] - alone(x[row], t)).norm() < 1e-5 * together[row].norm()


def test_trajectories_are_guided_edits_from_start_to_end():
    model = InstructPix2Pix(editor())
    latents, x_T, context, null = noise(2, 4, 4, 4), noise(2, 4, 4, 4, seed=1), noise(2, 5, 64), noise(1, 5, 64).expand(2, -1, -1)
    states = draw_trajectories(model, latents, context, null, torch.full((2,), 3.), torch.full((2,), 1.5), x_T)
    denoise = instruct_denoiser(model.predict, context, null, latents, 3.0, 1.5)
    with torch.no_grad():
        result = ddim_sample(denoise, x_T, TEACHER_STEPS, ALPHAS, spacing="trailing")
        for i, (t, a_t, a_s) in enumerate(ddim_steps(TEACHER_STEPS, ALPHAS, "trailing")):
            assert torch.allclose(ddim_step(states[:, i], denoise(states[:, i], t), a_t, a_s), states[:, i + 1], atol=1e-5)
    assert torch.equal(states[:, 0], x_T) and torch.allclose(states[:, -1], result, atol=1e-5)


# ---- the student

def test_a_student_begins_as_its_teacher():
    """To float32's rounding: what its new layer adds is zero, but some CPUs' kernels go by where weights lie in memory."""
    teacher, (x, t, context) = editor().unet, (noise(2, 8, 4, 4), torch.tensor([999, 124]), noise(2, 5, 64))
    student = make_student(teacher)
    with torch.no_grad():
        ours, theirs = student(x, t, context, condition=torch.rand(2, 3) * 1000), teacher(x, t, context)
    assert (ours - theirs).norm() < 2e-6 * theirs.norm()
    assert {p.shape for n, p in student.named_parameters() if n == "cond_proj.weight"} == {(32, COND_DIM)}


@pytest.mark.parametrize("parameterization", ["v", "eps"])
def test_the_loss_is_zero_for_who_lands_and_for_no_one_else(parameterization):
    states, latents, context = noise(4, TEACHER_STEPS + 1, 4, 2, 2), noise(4, 4, 2, 2), noise(4, 5, 64)
    first, last = torch.tensor([0, 4, 7, 2]), torch.tensor([8, 6, 8, 3])
    text, image = torch.tensor([3., 7., 1., 2.]), torch.tensor([1., 1.5, 2., 1.2])
    timesteps = torch.tensor([999, 874, 749, 624, 499, 374, 249, 124, 0])
    rows, seen = torch.arange(4), {}

    def oracle(x, t, context, condition, off=0.0):
        seen.update(x=x, t=t, condition=condition)
        a_t, a_s = (ALPHAS[timesteps[i]].view(-1, 1, 1, 1) for i in (first, last))
        v = landing_velocity(states[rows, first], states[rows, last], a_t, a_s) + off
        return v if parameterization == "v" else a_t.sqrt() * v + (1 - a_t).sqrt() * states[rows, first]

    told = (parameterization, ALPHAS, states, first, last, latents, context, text, image)
    assert landing_loss(oracle, *told) < 1e-9
    assert landing_loss(partial(oracle, off=0.1), *told).item() == pytest.approx(0.01, rel=1e-3)
    assert torch.equal(seen["x"], torch.cat([states[rows, first], latents], 1)) and torch.equal(seen["t"], timesteps[first])
    assert torch.equal(seen["condition"][:, 2], torch.tensor([1000., 250., 125., 125.]))       # timesteps a step covers
    assert torch.equal(seen["condition"][:, :2], torch.stack([100 * text, 100 * image], 1))


def test_a_student_learns_to_land():
    """On trajectories of two edits, both guided four ways: from the mean loss over all landings of 1, 2, 4 and 8 steps, which
    at the beginning is the unguided teacher's, to less than a third of it in 60 steps; and, told wrong scales, back over it."""
    model, B = InstructPix2Pix(editor()), 8
    latents, x_T, context = (x.repeat_interleave(4, 0) for x in (noise(2, 4, 4, 4), noise(2, 4, 4, 4, seed=1), 3 * noise(2, 5, 64)))
    text, image, null = torch.tensor([1., 15.]).repeat(4), torch.tensor([1., 1., 3., 3.]).repeat(2), torch.zeros(B, 5, 64)
    states = draw_trajectories(model, latents, context, null, text, image, x_T)
    student = make_student(model.unet)
    landings = [(first, first + reach) for reach in (1, 2, 4, 8) for first in range(0, TEACHER_STEPS, reach)]

    def loss(first, last, text=text, image=image):
        first, last = torch.full((B,), first), torch.full((B,), last)
        return landing_loss(student, "v", ALPHAS, states, first, last, latents, context, text, image)

    def mean_loss(**told):
        with torch.no_grad():
            return sum(loss(*landing, **told) for landing in landings).item() / len(landings)

    before, optimizer = mean_loss(), torch.optim.Adam(student.parameters(), 2e-3)
    for step in range(60):
        optimizer.zero_grad()
        loss(*landings[step * 7 % len(landings)]).backward()
        optimizer.step()
    after = mean_loss()
    wrong = mean_loss(text=text.flip(0), image=image.flip(0))
    assert after < before / 3 < wrong, (before, after, wrong)


def test_an_edit_takes_one_evaluation_a_step_and_minds_the_scales():
    model, calls = student_of(editor(metadata=dict(sample_steps=2, cfg_text=3.0))), []
    unet = model.unet
    model.unet = lambda x, t, context, control, condition: (calls.append((len(x), t[0].item(), condition)),
                                                            unet(x, t, context, control, condition))[1]
    model.unet.config, model.unet.read_text, model.unet.parameters = unet.config, unet.read_text, unet.parameters
    first, = model.edit(picture, "make it red", progress=False)                     # by its own settings
    assert [(n, t) for n, t, _ in calls] == [(1, 999), (1, 499)]
    assert all(torch.equal(c, torch.tensor([[300., 150., 500.]])) for *_, c in calls)
    others = [model.edit(picture, "make it red", progress=False, **scales)[0]
              for scales in (dict(cfg_text=6.0, cfg_image=1.5), dict(cfg_text=3.0, cfg_image=1.0),
                             dict(cfg_text=3.0, cfg_image=1.5, steps=4))]
    assert all(np.asarray(first).tolist() != np.asarray(other).tolist() for other in others)
    assert torch.equal(guidance_condition(3.0, 1.5, 2), torch.tensor([300., 150., 500.]))


@pytest.mark.parametrize("wrong", [dict(sampler="euler-ancestral"), dict(eta=0.5), dict(negative_prompt="blurry")])
def test_what_a_student_has_not_learned_is_refused(wrong):
    with pytest.raises(ValueError, match="a distilled editor takes DDIM's steps"):
        student_of(editor()).edit(picture, "make it red", **wrong)


def test_a_student_is_an_ordinary_checkpoint(tmp_path):
    model = student_of(editor(metadata=dict(sample_steps=4)))
    model.save(tmp_path / "fast.safetensors")
    again = InstructPix2Pix.load(tmp_path / "fast.safetensors")
    assert again.is_distilled and again.unet.config == model.unet.config and again.parts.metadata["sample_steps"] == 4
    ours, theirs = (np.asarray(m.edit(picture, "make it red", progress=False)[0]) for m in (model, again))
    assert (ours == theirs).all()
    with pytest.raises(ValueError, match="diffusers has no pipeline for a distilled editor"):     # its own would guide it again
        model.save(tmp_path / "folder", "diffusers")
    assert not (tmp_path / "folder").exists()


def test_of_a_shared_unet_only_what_differs_is_written(tmp_path):
    teacher = editor()
    save_checkpoint(teacher, tmp_path / "edit.safetensors")
    model = student_of(teacher)
    with torch.no_grad():
        model.unet.out[2].bias.add_(1)
    shared = dict(vae="edit.safetensors", text="edit.safetensors", unet="edit.safetensors")
    save_checkpoint(model.parts, tmp_path / "fast.safetensors", shared=shared)
    from safetensors import safe_open
    with safe_open(tmp_path / "fast.safetensors", "pt") as file:
        assert sorted(name.removeprefix("model.diffusion_model.") for name in file.keys()) == ["cond_proj.weight", "out.2.bias"]
    again = load_checkpoint(tmp_path / "fast.safetensors")
    wanted = model.unet.state_dict()
    assert again.unet.config == model.unet.config and all(torch.equal(t, wanted[n]) for n, t in again.unet.state_dict().items())
    (tmp_path / "edit.safetensors").unlink()
    with pytest.raises(ValueError, match="its .* is in edit.safetensors, which is missing beside it"):
        load_checkpoint(tmp_path / "fast.safetensors")


# ---- the stage

@pytest.fixture
def command(tmp_path):
    """train.py --stage distill on a data set, of a small editor with random weights; with these flags."""
    save_checkpoint(editor(), tmp_path / "edit.safetensors")
    pairs = write_pairs(tmp_path / "pairs", count=24)

    def make(*flags, out="run"):
        usual = ("--stage", "distill", "--init", tmp_path / "edit.safetensors", "--data", pairs, "--out", tmp_path / out,
                 "--cache", tmp_path / "cache", "--size", 32, "--views", 1, "--steps", 3, "--batch-size", 8, "--accumulate", 2,
                 "--block", 16, "--reuse", 1, "--lr", 2e-3, "--warmup", 0, "--optimizer", "adamw", "--ema-decay", 0.9,
                 "--cfg-text", 4, "--dtype", "fp32", "--device", "cpu", "--score-examples", 2)
        return [str(x) for x in (*usual, *flags)]
    return make


def test_the_stage_changes_what_is_not_frozen_and_resumes(command, tmp_path):
    """Stopped after one step and repeated, it ends in the same bits."""
    frozen = "--freeze", "input_blocks", "middle_block"
    assert run(command(*frozen))[0] == 0
    made, teacher = load_checkpoint(tmp_path / "run/ip2p-fast.safetensors"), load_checkpoint(tmp_path / "edit.safetensors")
    assert made.metadata["sample_steps"] == 2 and made.metadata["cfg_text"] == 4 and made.metadata["stage"] == "distill"
    old, new = teacher.unet.state_dict(), made.unet.state_dict()
    assert {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])} == {"time_embed", "output_blocks", "out"}
    assert new["cond_proj.weight"].abs().max() > 0

    assert run(command(*frozen, "--minutes", 1e-4, out="parts"))[0] == 0
    assert load_checkpoint(tmp_path / "parts/ip2p-fast.safetensors").metadata["finished"] is False
    assert run(command(*frozen, out="parts"))[0] == 0
    again = load_checkpoint(tmp_path / "parts/ip2p-fast.safetensors").unet.state_dict()
    assert all(torch.equal(again[name], new[name]) for name in new)


@pytest.mark.parametrize("flags, complaint", [
    (("--base", "x.safetensors"), "--stage distill starts from an editor: give x.safetensors as --init if it is one"),
    (("--init", "FAST"), "is distilled already; give the editor that it was distilled from")])
def test_what_cannot_be_distilled_is_refused(command, tmp_path, flags, complaint):
    if "FAST" in flags:
        student_of(editor()).save(tmp_path / "fast.safetensors")
        flags = ("--init", tmp_path / "fast.safetensors")
    argv = command(*flags)
    if "--base" in argv:
        del argv[argv.index("--init"):argv.index("--init") + 2]
    status, _, said = run(argv)
    assert status == 2 and complaint in said and len(said.splitlines()) == 1
