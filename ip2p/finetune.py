"""The training of the editor: a text-to-image model, widened by image latents, learns from pairs of pictures with
instructions (InstructPix2Pix, arXiv:2211.09800, Sec. 3.2)."""
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import nn

from . import distributed
from .checkpoint import round_as_stored
from .features import CachedPairs, hash_weights
from .guidance import dropout_masks
from .lessons import data_batches, encoders, open_data, open_pairs, save_editor, save_sheet
from .pipeline import InstructPix2Pix
from .stages import Pool, diffusion_loss, draw_timesteps, history, is_miniature, is_settling, run, to_device
from .tensorfiles import small_dtype
from .training import seeded
from .world import World


def train_edit(args, base):
    """Train `base`, whose UNet takes image latents already, and write it. Returns its record; None in processes other than
    the first."""
    unet, vae, text = base.unet.requires_grad_(True), base.vae, base.text.requires_grad_(args.train_text)
    model = nn.ModuleDict(dict(unet=unet, text=text) if args.train_text else dict(unet=unet))
    model.to(args.device, memory_format=args.layout)
    vae.to(args.device, memory_format=args.layout)
    text.to(args.device)
    unet.recompute_blocks(args.checkpointing)
    predict = torch.compile(unet) if args.compile else unet
    world = World(args.device, args.subset)
    z, image_scale = vae.config.z_channels, vae.config.scale_factor if args.scale_image_latents else 1.0

    # Pairs of latents with instructions, or with their features.
    encode_pairs, encode_text, world_pairs = encoders(args, vae, text, world)
    fixed = dict(start=hash_weights(unet.out))               # a run goes on from the same model, told by its last layer
    if args.data == "world":
        pairs, held_out = Pool(world_pairs, args), None
    else:
        data, held_out = open_data(args)
        fixed["pairs"] = data.fingerprint(look=False)
        pairs = open_pairs(args, data, encode_pairs, encode_text, [vae, text])
    with torch.no_grad():
        null_context = encode_text([""])

    def encode_context(texts, drop):
        if torch.is_tensor(texts):
            return torch.where(to_device(drop, args.device)[:, None, None], null_context, to_device(texts, args.device))
        with nullcontext() if args.train_text else torch.no_grad():
            return encode_text(["" if d else instruction for instruction, d in zip(texts, drop)])

    def batch_loss(batch, rows, count, rng, dropout, timesteps):
        """Eq. 1 for `rows` of a step's `count` examples, which are the batch. Random numbers are drawn for the whole step and
        then cut to `rows`, so that they do not depend on how a step is split."""
        image_latents, edited, texts = batch                             # edited: (B, 2, z, h, w), mean and log variance
        shape = (count, *edited.shape[2:])
        drop_text, drop_image = dropout_masks(count, dropout, rng)
        drop_image = drop_image & args.image_dropout
        t = draw_timesteps(timesteps, count, rng)
        noise = torch.randn(shape, generator=rng)
        spread = torch.randn(shape, generator=rng) if args.target == "sample" else torch.zeros(count, 1, 1, 1)
        t, noise, spread, drop_image = (to_device(x[rows], args.device) for x in (t, noise, spread, drop_image))
        mean, logvar = to_device(edited, args.device).unbind(1)
        x0 = (mean + (0.5 * logvar).exp() * spread) * vae.config.scale_factor
        image_latents = image_scale * to_device(image_latents, args.device).masked_fill(drop_image[:, None, None, None], 0)
        with args.autocast():
            context = encode_context(texts, drop_text[rows])
            return diffusion_loss(predict, x0, context, t, noise, base.parameterization, image_latents)

    def loss_fn(step, rows):
        timesteps = "uniform" if is_settling(step, args) else args.timesteps
        return batch_loss(pairs.batch(step, rows), rows, args.batch_size, seeded(args.seed, step), args.dropout, timesteps), {}

    # Train.
    editor = InstructPix2Pix(replace(base, metadata={}))
    resting = "cpu" if args.offload and isinstance(pairs, CachedPairs) else args.device

    def move_frozen(device):
        """What does not learn goes where it is needed, or where it waits."""
        for part in [vae] if args.train_text else [vae, text]:
            part.to(device)

    @contextmanager
    def sampling():
        """Within the block all parts are on the device, and a UNet that learns from scaled image latents takes unscaled ones, as
        everything else gives them: its first layer absorbs the scale."""
        weight = unet.input_blocks[0][0].weight.data
        own = weight.clone()
        weight[:, z:] *= image_scale
        move_frozen(args.device)
        yield
        weight.copy_(own)
        move_frozen(resting)

    def sheet(path):
        with sampling():
            save_sheet(path, editor, world, held_out, args, count=6, per_kind=3)

    move_frozen(resting)
    record = run(args, model, loss_fn, sheet, **fixed)
    if distributed.rank():
        return None

    # Score, save.
    move_frozen(args.device)
    small = is_miniature(base.metadata)
    if small:
        round_as_stored(editor.parts, small_dtype)
    if held_out:
        batches = data_batches(held_out, encode_pairs, min(args.score_examples, len(held_out)), size=16)
    else:
        batches = (world_pairs(i, min(64, args.score_examples - i), "combinations") for i in range(0, args.score_examples, 64))
    total = count = 0
    with torch.no_grad():
        for i, batch in enumerate(batches):
            examples = len(batch[2])
            loss = batch_loss(batch, slice(None), examples, seeded(args.seed, i), dropout=0, timesteps="uniform")
            total, count = total + examples * loss.item(), count + examples
    on_training = held_out and not held_out.prompts.start             # as `open_data` has it where there are no others
    record["training_loss" if on_training else "held_out_loss"] = round(total / count, 4)
    record |= dict(cfg_text=args.cfg_text, cfg_image=args.cfg_image, base=history(base.metadata))
    if hasattr(pairs, "skipped") and (skipped := pairs.skipped.count()):
        record["skipped"] = skipped
        distributed.say(f"{skipped} pairs were skipped, as their files cannot be read")
    start = args.init or args.base
    with sampling():
        return save_editor(editor, "ip2p", record, args, world, held_out, small, start,
                           shared={"vae": base.metadata.get("shared", {}).get("vae", start.name)})
