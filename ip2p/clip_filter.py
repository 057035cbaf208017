"""CLIP models of open_clip, for judging pictures against words."""
import json

import torch
from torch import Tensor

from .tensorfiles import read_state_dict, replacing, write_safetensors
from .text import import_open_clip

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)     # OpenAI's, of pixels in [0, 1]


def normalize_pixels(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], (B, 3, H, W), to what CLIP's image tower expects."""
    mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (MEAN, STD))
    return ((pixels + 1) / 2 - mean) / std


def build_clip(config: dict) -> torch.nn.Module:
    """An open_clip CLIP with fresh weights. config: embed_dim, vision_cfg and text_cfg, as in open_clip's model files."""
    return import_open_clip().CLIP(**config)


def save_clip(clip, config: dict, path, record: dict):
    """Write a CLIP as float16 safetensors, with its configuration and training record in the metadata."""
    tensors = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    with replacing(path) as temporary:
        write_safetensors(temporary, tensors, {"ip2p": json.dumps({"clip": config, **record})})


def load_clip(path, device=None) -> tuple[torch.nn.Module, dict]:
    """A CLIP that `save_clip` wrote, in float32 and eval mode, and its record. ValueError if the file is another kind."""
    tensors, record = read_state_dict(path)
    if "clip" not in record:
        raise ValueError(f"{path}: not a CLIP of this project (its metadata has no configuration)")
    clip = build_clip(record["clip"])
    clip.load_state_dict(tensors)
    return clip.float().eval().requires_grad_(False).to(device or "cpu"), record
