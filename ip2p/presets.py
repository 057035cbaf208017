"""What train.py sets where nothing was asked for: by stage, and for the editor by preset, with the memory that each takes."""

ALWAYS = dict(accumulate=1, block=4096, lr=1e-3, optimizer="muon", warmup=100, cooldown=0.3, clip_norm=1.0, dtype="bf16",
              offload=False, checkpointing=False, save_minutes=3.0, cfg_text=3.0, cfg_image=1.5, reuse=1)

STAGES = {              # what made the shipped weights, but for base, scorer and distill (README); a GPU has time for more
    "vae": ALWAYS | dict(steps=3400, batch_size=16, ema_decay=0.999),
    "clip": ALWAYS | dict(steps=260, batch_size=128, ema_decay=0.99),
    "base": ALWAYS | dict(steps=2300, batch_size=96, ema_decay=0.998, reuse=4, timesteps="logit-normal"),
    "scorer": ALWAYS | dict(steps=3000, batch_size=64, ema_decay=0.998, reuse=3),
    "edits": ALWAYS | dict(steps=3500, batch_size=32, ema_decay=0.995, pretrain_steps=300),
    "distill": ALWAYS | dict(steps=600, batch_size=96, ema_decay=0.99, warmup=20, cooldown=0.7, block=1024, reuse=20, views=8,
                             train_text=False,
                             freeze=["input_blocks", "middle_block", "output_blocks.0.", "output_blocks.1."]),
}

# Memory of Stable Diffusion 1.5's UNet, 859.5 M parameters, for pictures of 256 x 256; computed, in GB of 1e9 bytes:
#   bytes a parameter: 4 for the weight, 4 gradient, 8 AdamW's state, 4 average    3.44 + 3.44 + 6.88 + 3.44 = 17.2
#   the copies of weights in bf16 that autocast makes, without biases and norms    1.7
#   an example's activations: inputs of all blocks, and what the largest block     bf16: 0.011 + 2 x 0.040 = 0.09
#   keeps while it is computed again, twice for its gradients                      fp32: 0.022 + 2 x 0.057 = 0.14
#   (all blocks without --checkpointing: bf16 0.31, fp32 0.47)
#   autoencoder and text encoder 0.8; what encoding a pair takes                   fp32: about 0.2
# paper 17.2 + 0.8 + 32 x (0.14 + 0.2) = 28.9; 24gb 17.2 + 1.7 + 0.8 + 8 x 0.09 = 20.4; 12gb 2 x 3.44 + 1.7 + 8 x 0.09 = 9.3,
# and on the CPU 3.44 + 6.88 + 3.44, gradients on their way 3.44, 0.8: 18.0 (3.44 more to go on after a stop: 21.4). CUDA itself
# takes about half a GB more.
PAPER = ALWAYS | dict(steps=10000, batch_size=1024, accumulate=4, lr=1e-4, optimizer="adamw", warmup=0, cooldown=0.0,
                      ema_decay=0.9996, clip_norm=0.0, dtype="fp32", timesteps="uniform", target="sample", train_text=False,
                      views=0, size=256, checkpointing=True, save_minutes=30.0, cfg_text=7.5)
CARD = PAPER | dict(batch_size=128, accumulate=16, lr=5e-5, warmup=500, ema_decay=0.999, clip_norm=1.0, dtype="bf16",
                    views=4)                                          # a prompt has up to four pairs
FAST = CARD | dict(steps=4000, batch_size=64, accumulate=8, lr=1e-5, block=512, reuse=8, freeze=[])      # to distil it
PRESETS = {
    "paper": PAPER,     # it averages after each of a step's 4 parts, by 0.9999: by 0.9996 a step
    "24gb": CARD,
    "12gb": CARD | dict(offload=True),
    "miniature": ALWAYS | dict(steps=1500, batch_size=96, ema_decay=0.998, reuse=5, timesteps="logit-normal", target="mode",
                               train_text=True, views=8),
}
ABOUT_PRESETS = """\
  paper      the published settings, 1024 examples a step, for 8 GPUs: 28.9 GB on each
  24gb       128 examples a step, latents and text features cached, bf16 arithmetic: 20.4 GB
  12gb       the same, with AdamW's state and the averaged weights in the CPU's memory: 9.3 GB, and 18.0 GB there
  miniature  the first of the runs that made weights/mini-ip2p.safetensors; the text encoder learns too: on a CPU, in 3 GB"""


def defaults(args):
    """Settings for what was not asked for."""
    if args.stage == "edit":
        return PRESETS[args.preset]
    if args.stage == "distill" and args.preset != "miniature":
        return FAST | dict(offload=PRESETS[args.preset]["offload"])
    return STAGES[args.stage]
