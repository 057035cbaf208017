"""Stable Diffusion and InstructPix2Pix checkpoints, in and out.

Two layouts are read and written: the original single file (.safetensors or .ckpt) and the diffusers folder. What the
tensors cannot tell (heads, norm groups, the latents' scale) stands in a folder's config.json files, or, in a file of
ours, as JSON under the key "ip2p" of its metadata; other files are taken to be Stable Diffusion's own.
"""
import copy
import json
import re
import sys
import zlib
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch

from . import keys
from .diffusers_folder import FOLDER, PREDICTION, read_folder, read_vae, write_folder
from .tensorfiles import cast, read_state_dict, replacing, round_weights, write_safetensors, write_state_dict
from .text import TextConfig, TextEncoder
from .unet import UNet, UNetConfig
from .vae import AutoencoderKL, VAEConfig

# What the original's files hold beside weights: the noise schedule, an optimiser's or loss's own, constants of CLIP.
IGNORED = re.compile(r"betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_.*|posterior_.*|logvar|lvlb_weights|"
                     r"model_ema\.(decay|num_updates)|first_stage_model\.(loss\..*|model_ema\.(decay|num_updates))|"
                     r"cond_stage_model\.((transformer|model)\.)?(logit_scale|attn_mask)|.*\.position_ids|"
                     r"cond_stage_model\.text_projection|denoiser\.sigmas")
SD1_TEXT = dict(quick_gelu=True, skip_last=0, pad_with_end=True)
SD2_TEXT = dict(quick_gelu=False, skip_last=1, pad_with_end=False)
MODELS = {"unet": (UNet, UNetConfig), "vae": (AutoencoderKL, VAEConfig), "text": (TextEncoder, TextConfig)}
NAMES = {"unet": "UNet", "vae": "VAE", "text": "text encoder"}
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.model."}


@dataclass
class Parts:
    """What a checkpoint holds. Models are in eval mode and ask for no gradients."""
    unet: UNet
    vae: AutoencoderKL
    text: TextEncoder
    parameterization: str      # what the UNet predicts: "eps" or "v"
    image_size: int            # the side of the pictures it was trained at
    metadata: dict             # the file's `ip2p` record: training data, steps, score, configurations; {} if none


@dataclass
class Found:
    """What was read, before models are built of it; the dicts by part, "unet", "vae" and "text"."""
    tensors: dict[str, keys.Tensors]          # under our names
    known: dict[str, dict]                    # fields of configurations that were told, not read from tensors
    record: dict
    parameterization: str | None
    image_size: int | None


# ---- in ----

def load_checkpoint(path, *, device=None, dtype=None, vae=None, parameterization=None, ema=True) -> Parts:
    """Opens a checkpoint: a file, a diffusers folder, or a Hugging Face id "name/model".

    device: where to put the models (None leaves them on the CPU, memory-mapped); dtype: None for float32.
    vae: a file or folder whose VAE is used instead of the checkpoint's. parameterization: "eps" or "v", where the file does
    not say or is wrong. ema: take a file's averaged weights where it holds them, as the original does.
    Raises ValueError, one line naming the file, for anything that is not a complete checkpoint.
    """
    if parameterization not in (None, *PREDICTION):
        raise ValueError(f'parameterization must be "eps" or "v", got {parameterization!r}')
    local = _locate(path)
    found = Found(*read_folder(local)) if local.is_dir() else _read_file(local, ema=ema)
    if vae is not None:
        found.tensors["vae"], found.known["vae"] = _read_vae(_locate(vae))
    for part in ("vae", "text"):
        if not found.tensors.get(part):
            raise ValueError(f"{local}: holds no {NAMES[part]}" + ("; name one with `vae`" if part == "vae" else ""))
    where = {"unet": local, "vae": vae or local, "text": local}
    unet, vae, text = (_build(part, found.tensors[part], found.known[part], where[part], device, dtype)
                       for part in MODELS)

    if text.config.width != unet.config.context_dim:
        raise ValueError(f"{local}: its UNet reads texts {unet.config.context_dim} wide, its text encoder's are {text.config.width}")
    if vae.config.z_channels != unet.config.out_channels:
        raise ValueError(f"{where['vae']}: its autoencoder's latents have {vae.config.z_channels} channels, those of {local}'s UNet "
                         f"{unet.config.out_channels}")

    is_sd2 = unet.config.context_dim == 1024
    steps = found.record.get("global_step")
    if set(found.record) == {"global_step"}:             # the only thing a foreign file tells
        found.record = {}
    guess = "v" if is_sd2 and steps != 875000 else "eps"     # 875,000 steps: Stable Diffusion 2 base
    if is_sd2 and not (parameterization or found.parameterization):
        other = "eps" if guess == "v" else "v"
        print(f'ip2p: {path} does not say what it predicts; taking "{guess}". If pictures come out as noise, pass '
              f'--parameterization {other}, in Python parameterization="{other}"', file=sys.stderr)
    parameterization = parameterization or found.parameterization or guess
    for name, kind in dict(sample_steps=int, cfg_text=(int, float), cfg_image=(int, float)).items():
        if not isinstance(found.record.get(name, 1), kind):
            raise ValueError(f"{local}: its {name} must be a number, got {found.record[name]!r}")
    if not isinstance(found.image_size or 1, int):
        raise ValueError(f"{local}: its image_size must be a number, got {found.image_size!r}")
    if not isinstance(parameterization, str) or parameterization not in PREDICTION:
        raise ValueError(f'{local}: parameterization must be "eps" or "v", got {parameterization!r}')
    image_size = found.image_size or (768 if is_sd2 and parameterization == "v" else 512)
    return Parts(unet, vae, text, parameterization, image_size, found.record)


def _locate(path):
    """The local file or folder: `path` itself, or what is downloaded for a Hugging Face id."""
    local = Path(path)
    if local.exists():
        return local
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path))
    if not is_id or local.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f'{path}: no such file or folder, nor a Hugging Face id like "name/model"')
    try:
        import huggingface_hub
        configs = ["model_index.json", "ip2p.json", "config.json", "unet/config.json", "vae/config.json",
                   "text_encoder/config.json", "scheduler/scheduler_config.json", "tokenizer/*.json"]
        stems = ["diffusion_pytorch_model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model",
                 "text_encoder/model", "text_encoder/pytorch_model"]
        for kind, variant in product(("safetensors", "bin"), ("", ".fp16")):       # the later only where there is nothing else
            weights = [f"{stem}{ending}" for stem in stems for ending in
                       (f"{variant}.{kind}", f"{variant}-0*.{kind}", f".{kind}.index{variant}.json")]
            local = Path(huggingface_hub.snapshot_download(str(path), allow_patterns=configs + weights))
            if not local.is_dir():
                break
            parts = [part for name in ("unet", "vae", "text_encoder") if (part := local / name).is_dir()] or [local]
            if all(any(file.suffix in (".safetensors", ".bin") for file in part.iterdir()) for part in parts):
                break
    except Exception as error:                           # offline, not found, gated, no huggingface_hub, ...
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{path}: no such file or folder, and fetching it from Hugging Face failed "
                         f"({type(error).__name__}: {reason}); the path of a local copy works too") from error
    if not local.is_dir():                               # none of the patterns matched
        raise ValueError(f"{path}: holds no diffusers folder on Hugging Face; download its .safetensors or .ckpt file, and give "
                         f"the path of that")
    return local


def _below(tensors, prefix):
    """What stands below a prefix, without it. Takes it out of `tensors`."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in [n for n in tensors if n.startswith(prefix)]}


def _some(names):
    names = sorted(names)
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def checksum(tensors: keys.Tensors) -> int:
    """CRC-32 of all numbers, in the order of their names: whether they are still the same."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy(), total)
    return total


def _check_kind(path, names):
    """ValueError for files of other kinds that are taken for a checkpoint, by what only their tensors are called."""
    kinds = {"of Stable Diffusion XL": "conditioner.embedders.1.", "of Stable Diffusion 3": ".joint_blocks."}
    if not any(name.startswith(PREFIXES["unet"]) for name in names):     # else a merge has left a LoRA's keys
        kinds["a LoRA"] = "lora"
    for kind, mark in kinds.items():
        if any(mark in name for name in names):
            raise ValueError(f"{path}: is {kind}; needed a whole checkpoint of Stable Diffusion 1 or 2, or of an editor made from one")


def _read_file(path, use_shared=True, ema=True):
    """A single file in the original's layout; ema: with its averaged weights, if it holds them."""
    tensors, record = read_state_dict(path)
    if all(name.startswith("module.") for name in tensors):              # saved from DistributedDataParallel
        tensors = _below(tensors, "module.")
    tensors = {name: tensor for name, tensor in tensors.items() if not IGNORED.fullmatch(name)}
    names = list(tensors)
    _check_kind(path, names)
    unet, copies = _below(tensors, PREFIXES["unet"]), _below(tensors, "model_ema.")
    vae = _below(tensors, PREFIXES["vae"])
    hf, text = _below(tensors, "cond_stage_model.transformer."), _below(tensors, PREFIXES["text"])
    scale = tensors.pop("scale_factor", None)                            # measured on the first batch of a run, not fixed
    if not unet:
        raise ValueError(f"{path}: holds no UNet (model.diffusion_model.*) among its {_some(names)} tensors")
    if unknown := [name for name in tensors if name.startswith(("model.", "first_stage_model.", "cond_stage_model."))]:
        raise ValueError(f"{path}: unknown keys: {_some(unknown)}")
    if tensors:                                                          # of trainers, or left by a merge of models
        print(f"ip2p: {path}: ignored what is no part of Stable Diffusion: {_some(tensors)}", file=sys.stderr)
    if hf and text:
        raise ValueError(f"{path}: holds two text encoders (cond_stage_model.transformer.* and cond_stage_model.model.*)")
    if copies and ema:                                                   # what the original samples with
        averaged = {name: copies.get(keys.ema_name(name).removeprefix("model_ema.")) for name in unet}
        if len(copies) == len(unet) and all(t is not None and t.shape == unet[name].shape for name, t in averaged.items()):
            unet = averaged
        else:
            print(f"ip2p: {path}: ignored its averaged weights (EMA), which do not fit the others; a merge of models may have "
                  f"left them", file=sys.stderr)
    known = {part: record.get(part, {}) for part in MODELS}
    shared, sums = record.get("shared", {}), record.get("shared_sums", {})
    if not all(isinstance(fields, dict) for fields in (*known.values(), shared, sums)) or not set(shared) <= set(MODELS):
        raise ValueError(f"{path}: its record of configurations is malformed")
    known["text"] = {**(SD2_TEXT if text else SD1_TEXT), **known["text"]}
    if scale is not None:
        if scale.numel() != 1:
            raise ValueError(f"{path}: its scale_factor must be one number, got the shape {tuple(scale.shape)}")
        known["vae"] = {"scale_factor": scale.item(), **known["vae"]}
    last = [f"transformer.resblocks.{i}.ln_1.weight" in text for i in (22, 23)]
    if last == [True, False] and "text" not in record:                   # Stable Diffusion 2's out of a diffusers folder, which
        known["text"]["skip_last"] = 0                                   # has left out the last layer already
    found = Found({"unet": unet, "vae": keys.vae_from_diffusers(vae), "text": text or keys.text_from_hf(hf)}, known, record,
                  record.get("parameterization"), record.get("image_size"))
    for part, name in shared.items() if use_shared else ():
        sibling = path.parent / Path(str(name)).name                          # a plain name: nothing outside of the folder
        if not sibling.is_file():
            raise ValueError(f"{path}: its {NAMES[part]} is in {sibling.name}, which is missing beside it")
        other = _read_file(sibling, use_shared=False)
        if part in sums and sums[part] != checksum(other.tensors[part]):
            raise ValueError(f"{path}: its {NAMES[part]} was stored in {sibling.name}, but the file beside it is another by now")
        found.tensors[part] = other.tensors[part] | found.tensors[part]       # of a UNet, only what differs is in this file
        found.known[part] = other.known[part] | (record.get(part, {}) if part == "unet" else {})
    return found


def _read_vae(path):
    """Tensors and known configuration of a VAE: a file of its own, a checkpoint, or a diffusers folder of or with one."""
    if path.is_dir():
        return read_vae(path / "vae" if (path / "vae").is_dir() else path)
    tensors, record = read_state_dict(path)
    if any(name.startswith(PREFIXES["unet"]) for name in tensors):          # a checkpoint, its VAE perhaps in another
        found = _read_file(path)
        return found.tensors["vae"], found.known["vae"]
    tensors = _below(dict(tensors), PREFIXES["vae"]) or tensors
    tensors = {name: tensor for name, tensor in tensors.items() if not IGNORED.fullmatch(PREFIXES["vae"] + name)}
    return keys.vae_from_diffusers(tensors), record.get("vae", {})


def _build(part, tensors, known, path, device=None, dtype=None):
    """A model of the tensors, which are used in place where device and dtype allow."""
    model_class, config_class = MODELS[part]
    what = NAMES[part]
    try:
        config = keys.config_from(config_class, tensors, known)
        with torch.device("meta"):                       # names and shapes only: no memory, no random numbers
            model = model_class(config)
    except KeyError as error:
        raise ValueError(f"{path}: its {what} lacks the key {error.args[0]}") from error
    except (ValueError, TypeError, RuntimeError, IndexError, ZeroDivisionError, AssertionError) as error:
        raise ValueError(f"{path}: its {what}: {' '.join(str(error).split())}") from error
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    problems = []
    if missing := wanted.keys() - tensors.keys():
        problems.append(f"missing keys: {_some(missing)}")
    if extra := tensors.keys() - wanted.keys():
        problems.append(f"unknown keys: {_some(extra)}")
    if wrong := [f"{n} is {tuple(tensors[n].shape)} instead of {tuple(wanted[n])}" for n in wanted.keys() & tensors.keys()
                 if tensors[n].shape != wanted[n] or not tensors[n].is_floating_point()]:
        problems.append(f"misshapen keys: {_some(wrong)}")
    if problems:
        raise ValueError(f"{path}: its {what} has {'; '.join(problems)}")
    dtype = dtype or torch.float32
    model.load_state_dict({name: tensors[name].to(device=device, dtype=dtype) for name in wanted}, assign=True)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()]), "a tensor outside of the state_dict"
    return model.eval().requires_grad_(False)


def load_vae(path) -> AutoencoderKL:
    """Opens an autoencoder alone, on the CPU: from a file of its own, a checkpoint, or a diffusers folder. Errors as for
    `load_checkpoint`."""
    local = _locate(path)
    return _build("vae", *_read_vae(local), local)


# ---- out ----

def save_vae(vae: AutoencoderKL, path, metadata=None):
    """Writes an autoencoder alone, as safetensors, under its names without prefix."""
    record = {**(metadata or {}), "vae": asdict(vae.config)}
    write_state_dict(path, vae.state_dict(), record)


def save_checkpoint(parts: Parts, path, layout="ldm", metadata=None, shared=None, dtype=None):
    """Writes a checkpoint that Stable Diffusion programs open.

    layout: "ldm" for one file in the original's layout (.safetensors; .ckpt, .pt and .pth are pickles), "diffusers" for
    a folder. metadata: the training record to write, `parts.metadata` if None. shared: parts to leave out because a file in
    the same folder holds them, such as {"vae": "sd.safetensors"}; of a UNet, what differs from that file's is written.
    dtype: of the numbers in a single file, as `cast` takes it; the models' own if None.
    The old file or folder is replaced only once the new one is complete. ValueError for what cannot be written.
    """
    path = Path(path)
    record = copy.deepcopy(parts.metadata if metadata is None else metadata)
    record |= dict(parameterization=parts.parameterization, image_size=parts.image_size)
    shared = shared or {}
    record = {key: value for key, value in record.items() if key not in ("shared", "shared_sums", *MODELS)}
    if layout == "diffusers":
        if shared:
            raise ValueError("a diffusers folder holds all of its parts: `shared` goes with layout=\"ldm\"")
        if path.exists() and not (path.is_dir() and ((path / "model_index.json").exists() or not any(path.iterdir()))):
            raise ValueError(f"{path}: exists and is not a diffusers folder; not overwritten")
        if path.is_dir() and (others := {p.name for p in path.iterdir()} - FOLDER):
            raise ValueError(f"{path}: holds more than a model: {_some(others)}; not overwritten")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write_folder(parts, temporary, record)
        return
    if layout != "ldm":
        raise ValueError(f'layout must be "ldm" or "diffusers", got {layout!r}')
    if path.suffix not in (".safetensors", ".ckpt", ".pt", ".pth"):
        raise ValueError(f"{path}: the name of a checkpoint file ends in .safetensors or .ckpt")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder")
    if not set(shared) <= set(MODELS) or any(Path(name).name != name for name in shared.values()):
        raise ValueError(f"`shared` must give parts ({', '.join(MODELS)}) the plain name of a file in the same folder, got "
                         f"{shared!r}")

    others = {part: _read_file(path.parent / name, use_shared=False).tensors[part] for part, name in shared.items()}
    stored = others.get("unet", {})
    tensors = {PREFIXES["unet"] + name: t for name, t in parts.unet.state_dict().items() if name not in stored or
               not torch.equal(*(cast(PREFIXES["unet"] + name, x, dtype) for x in (t.cpu(), stored[name])))}
    record["unet"] = asdict(parts.unet.config)
    if shared:
        record |= dict(shared=shared, shared_sums={part: checksum(found) for part, found in others.items()})
    if "vae" not in shared:
        record["vae"] = asdict(parts.vae.config)
        tensors |= {PREFIXES["vae"] + name: t for name, t in parts.vae.state_dict().items()}
    if "text" not in shared:
        text, config = _as_published(parts.text)
        record["text"], prefix = asdict(config), PREFIXES["text"]
        if config.quick_gelu:
            prefix, text = "cond_stage_model.transformer.", keys.text_to_hf(text)
        tensors |= {prefix + name: t for name, t in text.items()}
    tensors = {name: cast(name, t, dtype) for name, t in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            write_safetensors(temporary, tensors, {"ip2p": json.dumps(record)})
        else:
            tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
            torch.save({"state_dict": tensors, "ip2p": json.loads(json.dumps(record))}, temporary)


def round_as_stored(parts: Parts, dtype):
    """The weights in place, rounded to what a file that is saved with this dtype gives back: what is scored is what is stored."""
    for part, prefix in PREFIXES.items():
        round_weights(getattr(parts, part), dtype, prefix)


def _as_published(text):
    """Tensors and config of the text encoder as the original files hold it. Diffusers drops Stable Diffusion 2's unused
    24th layer, which programs that open the original layout expect: one that changes nothing takes its place."""
    config, tensors = text.config, text.state_dict()
    if (config.width, config.layers, config.skip_last, config.quick_gelu) == (1024, 23, 0, False):
        for name in [name for name in tensors if name.startswith("transformer.resblocks.22.")]:
            tensors[name.replace(".22.", ".23.")] = torch.zeros_like(tensors[name])
        config = replace(config, layers=24, skip_last=1)
    return tensors, config


