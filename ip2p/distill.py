"""An editor for real time: distilled from a guided one, it needs one evaluation a step instead of three, and few steps.

The teacher's guided trajectories, from noise to an edit in TEACHER_STEPS steps, are drawn first, each at scales of its own.
The student, which begins as the teacher, is told the scales (Meng et al. 2022, arXiv:2210.03142) and how far a step goes;
from the state after i of the teacher's steps it learns to land, in one step of its own, on the state after i + 1, 2, 4 or 8.
An edit of 8, 4, 2 or 1 steps is so many landings. The step is DDIM's, so whatever samples with DDIM from trailing
timesteps can use it.
"""
import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .checkpoint import round_as_stored
from .features import hash_weights
from .guidance import guidance_condition, instruct_denoiser
from .lessons import encoders, open_data, open_pairs, save_editor, save_sheet
from .pipeline import InstructPix2Pix
from .samplers import ddim_sample, ddim_timesteps
from .stages import Pool, history, is_miniature, run, to_device
from .tensorfiles import small_dtype
from .training import seeded
from .unet import UNet
from .world import World

TEACHER_STEPS = 8
AT_ONCE = 32                     # teacher's edits drawn together: with three branches of guidance, 2 GB of maps at 256 x 256
COND_DIM = 192                   # of the features of what the student is told: both scales, and the length of a step


@torch.no_grad()
def draw_trajectories(teacher: InstructPix2Pix, image_latents: Tensor, context: Tensor, null_context: Tensor,
                      cfg_text: Tensor, cfg_image: Tensor, noise: Tensor) -> Tensor:
    """Guided edits with all that lies on the way, (B, TEACHER_STEPS + 1, z, h, w): from noise to the result.

    image_latents, noise: (B, z, h, w); context, null_context: (B, M, D); cfg_text, cfg_image: (B,).
    """
    denoise = instruct_denoiser(teacher.predict, context, null_context, image_latents, cfg_text, cfg_image, teacher.read_text)
    states = [noise]
    ddim_sample(denoise, noise, TEACHER_STEPS, teacher.alphas_cumprod, spacing="trailing",
                after_step=lambda x: states.append(x) or x)
    return torch.stack(states, 1)


def landing_velocity(x_t: Tensor, x_s: Tensor, a_t: Tensor, a_s: Tensor) -> Tensor:
    """The v with which one step of DDIM from x_t, of noise level a_t, lands on x_s, of a_s > a_t (Salimans & Ho 2022).

    With a = cos(phi)^2, a step of DDIM is a turn: x_s = cos(d) x_t - sin(d) v by the angle d = phi_t - phi_s.
    """
    cos = (a_t * a_s).sqrt() + ((1 - a_t) * (1 - a_s)).sqrt()
    sin = ((1 - a_t) * a_s).sqrt() - (a_t * (1 - a_s)).sqrt()
    return (cos * x_t - x_s) / sin


def make_student(teacher: UNet) -> UNet:
    """A copy of the teacher's UNet that takes a condition, and at first pays it no attention."""
    student = UNet(replace(teacher.config, cond_dim=COND_DIM))
    student.load_state_dict(teacher.state_dict(), strict=False)
    nn.init.zeros_(student.cond_proj.weight)
    return student


def landing_loss(student: UNet, parameterization: str, alphas_cumprod: Tensor, states: Tensor, first: Tensor, last: Tensor,
                 image_latents: Tensor, context: Tensor, cfg_text: Tensor, cfg_image: Tensor) -> Tensor:
    """Mean squared error of v, with which the student shall get from state `first` to state `last`, both (B,)."""
    rows, timesteps = torch.arange(len(states), device=states.device), ddim_timesteps(TEACHER_STEPS, spacing="trailing")
    timesteps = to_device(torch.cat([timesteps, torch.zeros(1, dtype=torch.long)]), str(states.device))   # 0: where sampling ends
    t, s = timesteps[first], timesteps[last]
    a_t, a_s = (alphas_cumprod[i][:, None, None, None] for i in (t, s))
    x_t, x_s = states[rows, first], states[rows, last]
    condition = guidance_condition(cfg_text, cfg_image, TEACHER_STEPS / (last - first))
    v = out = student(torch.cat([x_t, image_latents], 1), t, context, condition=condition).float()
    if parameterization == "eps":
        v = (out - (1 - a_t).sqrt() * x_t) / a_t.sqrt()                   # the v that goes with this eps
    return F.mse_loss(v, landing_velocity(x_t, x_s, a_t, a_s))


# ---- the stage of train.py

def train_distill(args, base):
    """A copy of the editor `base` learns to do in few unguided steps what `base` does in several guided ones."""
    vae, text = base.vae.to(args.device, memory_format=args.layout), base.text.to(args.device)
    world = World(args.device, args.subset)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    teacher = InstructPix2Pix(replace(base, unet=copy.deepcopy(base.unet).to(args.device, dtype, memory_format=args.layout)))
    student = make_student(base.unet).to(args.device, memory_format=args.layout)
    student.recompute_blocks(args.checkpointing)
    for name, weight in student.named_parameters():
        weight.requires_grad_(not name.startswith(tuple(args.freeze)))
    predict = torch.compile(student) if args.compile else student

    # The teacher's edits, at scales drawn evenly from 1 to 2 s - 1, where s is its own.
    encode_pairs, encode_text, world_pairs = encoders(args, vae, text, world)
    held_out, fixed = None, dict(start=hash_weights(base.unet.out), scales=[args.cfg_text, args.cfg_image])
    if args.data != "world":
        data, held_out = open_data(args)
        fixed["pairs"] = data.fingerprint(look=False)
        pairs = open_pairs(args, data, encode_pairs, encode_text, [vae, text])
    with torch.no_grad():
        null_context = encode_text([""])

    @torch.no_grad()
    def draw(start, count):
        if held_out:
            rows = pairs.batch(0, slice(start, start + count))               # row n of a cache's step 0 is its example n
            image_latents, _, context = (to_device(x, args.device) for x in rows)
        else:
            image_latents, _, instructions = world_pairs(start, count)
            context = encode_text(instructions)
        rng = seeded(args.seed, 1, start)
        noise = torch.randn(image_latents.shape, generator=rng)
        scales = [1 + 2 * (own - 1) * torch.rand(count, generator=rng) for own in (args.cfg_text, args.cfg_image)]
        noise, *scales = (to_device(x, args.device) for x in (noise, *scales))
        parts = zip(*(x.split(AT_ONCE) for x in (image_latents, context, *scales, noise)))
        states = [draw_trajectories(teacher, latents, texts, null_context, *settings) for latents, texts, *settings in parts]
        return image_latents, context, *scales, torch.cat(states)

    pool, halvings = Pool(draw, args), TEACHER_STEPS.bit_length()

    def loss_fn(step, rows):
        image_latents, context, cfg_text, cfg_image, states = (to_device(x, args.device) for x in pool.batch(step, rows))
        rng = seeded(args.seed, step)
        reach = TEACHER_STEPS // 2 ** torch.randint(halvings, (args.batch_size,), generator=rng)     # teacher's steps in one
        first = reach * (torch.rand(args.batch_size, generator=rng) * (TEACHER_STEPS // reach)).long()
        first, last = (to_device(x[rows], args.device) for x in (first, first + reach))
        with args.autocast():
            return landing_loss(predict, base.parameterization, teacher.alphas_cumprod, states, first, last, image_latents,
                                context, cfg_text, cfg_image), {}

    own = dict(sample_steps=2, cfg_text=args.cfg_text, cfg_image=args.cfg_image)
    editor = InstructPix2Pix(replace(base, unet=student, metadata=own))

    def sheet(path):
        save_sheet(path, editor, world, held_out, args, count=6, per_kind=3)

    record = run(args, student, loss_fn, sheet, **fixed)
    if distributed.rank():
        return None
    small = is_miniature(base.metadata)
    if small:
        round_as_stored(editor.parts, small_dtype)
    record |= own | dict(teacher=history(base.metadata))
    return save_editor(editor, "ip2p-fast", record, args, world, held_out, small, args.init,
                       shared=base.metadata.get("shared", {}) | {"text": args.init.name, "unet": args.init.name})
