"""Names of weights by rule, and the sizes that weights tell.

Everywhere else a tensor is called what the original code calls it: Stable Diffusion's UNet and VAE, OpenCLIP's text
tower, each without its prefix. Here those names are turned into the ones of diffusers and of Hugging Face's CLIP and
back, and a model's configuration is read from the shapes of its tensors. Dicts of name -> tensor in, dicts out.
"""
import re

import torch
from torch import Tensor

from .text import TextConfig
from .unet import UNetConfig
from .vae import VAEConfig

Tensors = dict[str, Tensor]

RES_BLOCK = [("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj"),
             ("out_layers.0", "norm2"), ("out_layers.3", "conv2"), ("skip_connection", "conv_shortcut")]
VAE_ATTENTION = [("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "proj_attn"),     # diffusers before 0.18
                 ("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")]
HF_LAYER = [("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("attn.out_proj", "self_attn.out_proj"),
            ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")]


def _rename(tensors: Tensors, table: dict[str, str]) -> Tensors:
    """Each name's longest listed module path replaced; a name with none stays, to be reported as unknown."""
    def rename(name):
        words = name.split(".")
        for n in range(len(words), 0, -1):
            head = ".".join(words[:n])
            if head in table:
                return ".".join([table[head], *words[n:]])
        return name
    return {rename(name): tensor for name, tensor in tensors.items()}


def _count(tensors, pattern):
    """How many different numbers stand where `pattern` has its group."""
    return len({match[1] for match in map(re.compile(pattern).match, tensors) if match})


# ---- UNet ----

def _unet_pairs(attention_levels, num_res_blocks):
    """(our module, diffusers' module) for every module a UNet of this shape can have."""
    pairs = [("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"),
             ("cond_proj", "time_embedding.cond_proj"),
             ("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out"),
             ("middle_block.1", "mid_block.attentions.0")]

    def res_block(ours, theirs):
        pairs.extend((f"{ours}.{a}", f"{theirs}.{b}") for a, b in RES_BLOCK)

    res_block("middle_block.0", "mid_block.resnets.0")
    res_block("middle_block.2", "mid_block.resnets.1")
    per_level = num_res_blocks + 1            # blocks: going down, its blocks and a Downsample; going up, one block more
    for i, attention in enumerate(reversed(attention_levels)):
        for j in range(per_level):
            down, up = f"input_blocks.{i * per_level + j + 1}", f"output_blocks.{i * per_level + j}"
            res_block(f"{down}.0", f"down_blocks.{i}.resnets.{j}")
            res_block(f"{up}.0", f"up_blocks.{i}.resnets.{j}")
            pairs.append((f"{down}.1", f"down_blocks.{i}.attentions.{j}"))
            pairs.append((f"{up}.1", f"up_blocks.{i}.attentions.{j}"))
        pairs.append((f"{down}.0.op", f"down_blocks.{i}.downsamplers.0.conv"))
        pairs.append((f"{up}.{1 + attention}.conv", f"up_blocks.{i}.upsamplers.0.conv"))
    return pairs


def unet_from_diffusers(tensors: Tensors) -> Tensors:
    levels = _count(tensors, r"down_blocks\.(\d+)\.")
    attention = [any(name.startswith(f"down_blocks.{i}.attentions.") for name in tensors) for i in range(levels)]
    pairs = _unet_pairs(attention, _count(tensors, r"down_blocks\.0\.resnets\.(\d+)\."))
    return _rename(tensors, {theirs: ours for ours, theirs in pairs})


def unet_to_diffusers(tensors: Tensors, config: UNetConfig) -> Tensors:
    return _rename(tensors, dict(_unet_pairs(config.attention_levels, config.num_res_blocks)))


def ema_name(name: str) -> str:
    """Where the original's EMA keeps its copy of a UNet tensor: the name without its dots, so this goes one way only."""
    return "model_ema.diffusion_model" + name.replace(".", "")


def unet_sizes(tensors: Tensors) -> dict:
    """Fields of UNetConfig as the tensors tell them (KeyError for a missing one). Heads are Stable Diffusion's: 8 of
    them beside 1x1 convolutions (1.x), 64 wide beside linear projections (2.x); a narrower model's must be recorded."""
    shape = {name: tensor.shape for name, tensor in tensors.items()}
    width, in_channels = shape["input_blocks.0.0.weight"][:2]
    mult, attention, i = [], [], 1
    while f"input_blocks.{i}.0.in_layers.2.weight" in shape:
        mult.append(shape[f"input_blocks.{i}.0.in_layers.2.weight"][0] // width)
        attention.append(f"input_blocks.{i}.1.norm.weight" in shape)
        first = i
        while f"input_blocks.{i}.0.in_layers.2.weight" in shape:
            i += 1
        num_res_blocks = i - first
        i += 1                                                             # the Downsample
    cross = shape["middle_block.1.transformer_blocks.0.attn2.to_k.weight"]
    linear = len(shape["middle_block.1.proj_in.weight"]) == 2
    return dict(in_channels=in_channels, out_channels=shape["out.2.weight"][0], model_channels=width,
                channel_mult=tuple(mult), num_res_blocks=num_res_blocks, attention_levels=tuple(attention),
                transformer_depth=_count(tensors, r"middle_block\.1\.transformer_blocks\.(\d+)\."),
                context_dim=cross[1], linear_proj=linear,
                num_heads=None if linear else 8, head_channels=64 if linear else None,
                cond_dim=shape["cond_proj.weight"][1] if "cond_proj.weight" in shape else None)


# ---- VAE ----

def _vae_pairs(levels, num_res_blocks):
    pairs = [("encoder.norm_out", "encoder.conv_norm_out"), ("decoder.norm_out", "decoder.conv_norm_out")]

    def res_block(ours, theirs):
        pairs.extend([(ours, theirs), (f"{ours}.nin_shortcut", f"{theirs}.conv_shortcut")])

    for side in ("encoder", "decoder"):
        res_block(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0")
        res_block(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1")
        pairs.extend((f"{side}.mid.attn_1.{a}", f"{side}.mid_block.attentions.0.{b}") for a, b in VAE_ATTENTION)
    for i in range(levels):
        up = levels - 1 - i                                    # diffusers counts up-blocks in the order they run
        for j in range(num_res_blocks + 1):
            res_block(f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}")
            res_block(f"decoder.up.{i}.block.{j}", f"decoder.up_blocks.{up}.resnets.{j}")
        pairs.append((f"encoder.down.{i}.downsample.conv", f"encoder.down_blocks.{i}.downsamplers.0.conv"))
        pairs.append((f"decoder.up.{i}.upsample.conv", f"decoder.up_blocks.{up}.upsamplers.0.conv"))
    return pairs


def _vae_attention(tensors, reshape):
    pattern = re.compile(r"(en|de)coder\.mid\.attn_1\.(q|k|v|proj_out)\.weight")
    return {name: reshape(tensor) if pattern.fullmatch(name) else tensor for name, tensor in tensors.items()}


def vae_from_diffusers(tensors: Tensors) -> Tensors:
    pairs = _vae_pairs(_count(tensors, r"encoder\.down_blocks\.(\d+)\."),
                       _count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."))
    renamed = _rename(tensors, {theirs: ours for ours, theirs in pairs})
    return _vae_attention(renamed, lambda w: w[:, :, None, None] if w.ndim == 2 else w)


def vae_to_diffusers(tensors: Tensors, config: VAEConfig) -> Tensors:
    matrices = _vae_attention(tensors, lambda w: w[:, :, 0, 0])
    return _rename(matrices, dict(_vae_pairs(len(config.channel_mult), config.num_res_blocks)))


def vae_sizes(tensors: Tensors) -> dict:
    """Fields of VAEConfig as the tensors tell them (KeyError for a missing one)."""
    width, in_channels = tensors["encoder.conv_in.weight"].shape[:2]
    levels = _count(tensors, r"encoder\.down\.(\d+)\.block\.")
    return dict(channels=width, in_channels=in_channels, z_channels=tensors["post_quant_conv.weight"].shape[0],
                channel_mult=tuple(tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // width
                                   for i in range(levels)),
                num_res_blocks=_count(tensors, r"encoder\.down\.0\.block\.(\d+)\."))


# ---- text encoder ----

def _hf_pairs(tensors, pattern):
    """The layers that `tensors` holds, by a pattern with their number as its group."""
    pairs = [("positional_embedding", "embeddings.position_embedding.weight"),
             ("token_embedding", "embeddings.token_embedding"), ("ln_final", "final_layer_norm")]
    for i in {match[1] for match in map(re.compile(pattern).match, tensors) if match}:
        pairs.extend((f"transformer.resblocks.{i}.{a}", f"encoder.layers.{i}.{b}") for a, b in HF_LAYER)
    return pairs


def text_from_hf(tensors: Tensors) -> Tensors:
    """From Hugging Face's CLIPTextModel, with `text_model.` before its names or without (since transformers 5)."""
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()
               if not name.endswith("position_ids")}
    pairs = _hf_pairs(tensors, r"encoder\.layers\.(\d+)\.")
    out = _rename(tensors, {theirs: ours for ours, theirs in pairs})
    for name in [name for name in out if ".self_attn.q_proj." in name]:          # q, k and v are one matrix in ours
        qkv = [name.replace("q_proj", x) for x in ("q_proj", "k_proj", "v_proj")]
        if all(x in out for x in qkv):
            prefix, kind = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", name).groups()
            out[f"transformer.resblocks.{prefix}.attn.in_proj_{kind}"] = torch.cat([out.pop(x) for x in qkv])
    if "text_projection.weight" in out:
        out["text_projection"] = out.pop("text_projection.weight").mT
    return out


def text_to_hf(tensors: Tensors) -> Tensors:
    """To Hugging Face's names, with `text_model.`, which every release reads."""
    pairs = _hf_pairs(tensors, r"transformer\.resblocks\.(\d+)\.")
    out = {}
    for name, tensor in _rename(tensors, dict(pairs)).items():
        if match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)", name):
            for x, part in zip("qkv", tensor.chunk(3)):
                out[f"text_model.encoder.layers.{match[1]}.self_attn.{x}_proj.{match[2]}"] = part
        elif name == "text_projection":
            out["text_projection.weight"] = tensor.mT
        else:
            out[f"text_model.{name}"] = tensor
    return out


def text_sizes(tensors: Tensors) -> dict:
    """Fields of TextConfig as the tensors tell them (KeyError for a missing one); heads are 64 wide, as in every CLIP."""
    vocab_size, width = tensors["token_embedding.weight"].shape
    projection = tensors.get("text_projection")
    return dict(vocab_size=vocab_size, width=width, context_length=tensors["positional_embedding"].shape[0],
                layers=_count(tensors, r"transformer\.resblocks\.(\d+)\."), heads=max(width // 64, 1),
                projection_dim=None if projection is None else projection.shape[-1])


def config_from(cls: type[UNetConfig] | type[VAEConfig] | type[TextConfig], tensors: Tensors, known: dict):
    """A configuration: what is `known` (a record, config.json), the rest from the tensors.

    Raises ValueError for unknown fields, KeyError where a tensor that tells a size is missing.
    """
    fields = set(cls.__dataclass_fields__)
    if unknown := sorted(set(known) - fields):
        raise ValueError(f"unknown {cls.__name__} fields: {', '.join(unknown)}")
    if fields - set(known):
        sizes = {UNetConfig: unet_sizes, VAEConfig: vae_sizes, TextConfig: text_sizes}[cls](tensors)
        known = {**sizes, **known}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})
