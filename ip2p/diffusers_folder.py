"""The diffusers folder: a subfolder for each part of a model, with its config.json and its weights.

The configs say what the tensors cannot (heads, norm groups, the latents' scale); sizes are read from the tensors. What a
config asks for that the models here do not do is an error.
"""
import json
import re
from pathlib import Path

from . import keys
from .schedule import BETA_END, BETA_START, NUM_TRAIN_TIMESTEPS
from .tensorfiles import read_state_dict, write_safetensors
from .text import Tokenizer

SCHEDULE = dict(num_train_timesteps=NUM_TRAIN_TIMESTEPS, beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear")
PREDICTION = {"eps": "epsilon", "v": "v_prediction"}
FOLDER = {"model_index.json", "ip2p.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"}      # what is written


def read_folder(path: Path):
    """Everything in a folder but models: by part ("unet", "vae", "text"), tensors under our names and the configuration
    fields its configs tell; the `ip2p` record; "eps", "v" or None; the side of the pictures or None.
    """
    if not (path / "unet").is_dir():
        raise ValueError(f"{path}: not a diffusers folder (it has no unet/); a checkpoint is a .safetensors or .ckpt file, "
                         f"or a folder with unet/, vae/ and text_encoder/")
    if (path / "text_encoder_2").is_dir():
        raise ValueError(f"{path}: has two text encoders, as Stable Diffusion XL; needed Stable Diffusion 1 or 2, or an editor made "
                         f"from one")
    for part in ("vae", "text_encoder"):
        if not (path / part).is_dir():
            raise ValueError(f"{path}: an incomplete diffusers folder (it has no {part}/)")
    unet, unet_known, sample_size = _read_unet(path / "unet")
    vae, vae_known = read_vae(path / "vae")
    text, text_known = _read_text(path / "text_encoder", path / "tokenizer")
    tensors, known = dict(unet=unet, vae=vae, text=text), dict(unet=unet_known, vae=vae_known, text=text_known)
    image_size = None
    if isinstance(sample_size, int):                                             # in latent cells
        image_size = sample_size * 2 ** sum(name.endswith("downsample.conv.weight") for name in vae)
    return tensors, known, _json(path / "ip2p.json"), _read_scheduler(path / "scheduler/scheduler_config.json"), image_size


def _read_unet(folder):
    config = _json(folder / "config.json")
    _require(folder, config, act_fn="silu", norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0, downsample_padding=1,
             center_input_sample=False, mid_block_scale_factor=1, resnet_time_scale_shift="default", class_embed_type=None,
             time_embedding_type="positional", _class_name="UNet2DConditionModel")
    known = {}
    if config:
        # diffusers calls the number of heads `attention_head_dim`; Stable Diffusion 2 has one for each level
        heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
        heads, widths = heads if isinstance(heads, list) else [heads], config.get("block_out_channels", [])
        if not isinstance(widths, list) or not all(isinstance(n, int) and n > 0 for n in (*heads, *widths)):
            raise ValueError(f"{folder}: numbers of heads and widths must be positive integers, got {heads} and {widths}")
        sizes = {c // h for c, h in zip(widths, heads)}
        if len(set(heads)) == 1:
            known = dict(num_heads=heads[0], head_channels=None)
        elif len(sizes) == 1:
            known = dict(num_heads=None, head_channels=sizes.pop())
        else:
            raise ValueError(f"{folder}: heads of {heads} are neither equally many nor equally wide at every level")
        known["norm_groups"] = config.get("norm_num_groups", 32)
    size = config.get("sample_size")
    if isinstance(size, int) and re.match(r"0\.[0-8]\.", str(config.get("_diffusers_version"))):
        size = max(size, 64)                             # before 0.9 they wrote 32 whatever the size, as diffusers knows too
    return keys.unet_from_diffusers(_weights(folder)), known, size


def read_vae(folder: Path):
    """Tensors of a VAE's folder under our names, and the configuration fields that its config tells."""
    config = _json(folder / "config.json")
    _require(folder, config, act_fn="silu", shift_factor=None, latents_mean=None)
    fields = {"norm_groups": "norm_num_groups", "scale_factor": "scaling_factor"}
    known = {ours: config[theirs] for ours, theirs in fields.items() if theirs in config}
    return keys.vae_from_diffusers(_weights(folder)), known


def _read_text(folder, tokenizer):
    config = _json(folder / "config.json")
    _require(folder, config, layer_norm_eps=1e-5)
    act = config.get("hidden_act", "quick_gelu")
    if act not in ("quick_gelu", "gelu"):
        raise ValueError(f"{folder}: hidden_act must be quick_gelu or gelu, got {act!r}")
    special = {**_json(tokenizer / "tokenizer_config.json"), **_json(tokenizer / "special_tokens_map.json")}
    pad, end = (token.get("content") if isinstance(token, dict) else token
                for token in (special.get("pad_token"), special.get("eos_token")))
    known = dict(quick_gelu=act == "quick_gelu", skip_last=0,                    # the layers not used are left out
                 pad_with_end=act == "quick_gelu" if pad is None else pad == end)    # Stable Diffusion 2: "!", id 0
    if "num_attention_heads" in config:
        known["heads"] = config["num_attention_heads"]
    tensors = keys.text_from_hf(_weights(folder, "model", "pytorch_model"))
    if isinstance(used := config.get("num_hidden_layers"), int):                 # fewer than there are: clip-skip
        tensors = {name: tensor for name, tensor in tensors.items()
                   if not name.startswith("transformer.resblocks.") or int(name.split(".")[2]) < used}
    return tensors, known


def _read_scheduler(path):
    config = _json(path)
    _require(path, config, **SCHEDULE, rescale_betas_zero_snr=False, trained_betas=None)
    predicts = config.get("prediction_type", "epsilon") if config else None
    return next((ours for ours, theirs in PREDICTION.items() if theirs == predicts), predicts)


def _weights(folder, *stems):
    """All tensors of one part of a diffusers folder; full precision before .fp16, safetensors before pickles."""
    stems = stems or ("diffusion_pytorch_model",)
    for variant in ("", ".fp16"):
        for stem in stems:
            for ending in ("safetensors", "bin"):
                file, *indices = (folder / name for name in (
                    f"{stem}{variant}.{ending}", f"{stem}.{ending}.index{variant}.json",
                    f"{stem}{variant}.{ending}.index.json"))
                if file.is_file():
                    return read_state_dict(file)[0]
                for index in filter(Path.is_file, indices):
                    names = _json(index).get("weight_map")
                    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
                        raise ValueError(f"{index}: needed a weight_map, the file of every tensor")
                    shards = sorted({Path(name).name for name in names.values()})
                    return {name: tensor for shard in shards for name, tensor in read_state_dict(folder / shard)[0].items()}
    raise ValueError(f"{folder}: no weights ({stems[0]}.safetensors or the like)")


def _json(path):
    """The object in a JSON file, {} where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def _require(path, config, **values):
    for name, value in values.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path}: {name} must be {value!r}, got {config[name]!r}")


def write_folder(parts, path: Path, record: dict):
    """Writes a folder that diffusers' pipelines open, with the tokenizer. ValueError for what diffusers has no model for."""
    u, v, t = parts.unet.config, parts.vae.config, parts.text.config
    kinds = {v.z_channels: "StableDiffusionPipeline", 2 * v.z_channels: "StableDiffusionInstructPix2PixPipeline"}
    if u.in_channels not in kinds:
        raise ValueError(f"no diffusers pipeline for {u.in_channels} input channels and latents of {v.z_channels}")
    if u.cond_dim is not None:
        raise ValueError("diffusers has no pipeline for a distilled editor, whose UNet is told the guidance scales")
    if u.channel_mult[0] != 1 or v.channel_mult[0] != 1:
        raise ValueError("diffusers has no models whose first level is wider than their first convolution")
    widths = [u.model_channels * m for m in u.channel_mult]
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in u.attention_levels]
    vae_widths = [v.channels * m for m in v.channel_mult]
    layers, tokenizer = t.layers - t.skip_last, Tokenizer(t)
    configs = {
        "model_index": {
            "_class_name": kinds[u.in_channels], "_diffusers_version": "0.18.0", "feature_extractor": [None, None],
            "requires_safety_checker": False, "safety_checker": [None, None], "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]},
        "unet/config": {
            "_class_name": "UNet2DConditionModel", "sample_size": parts.image_size // v.downsampling,
            "in_channels": u.in_channels, "out_channels": u.out_channels, "block_out_channels": widths,
            "layers_per_block": u.num_res_blocks, "down_block_types": down, "mid_block_type": "UNetMidBlock2DCrossAttn",
            "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
            "attention_head_dim": u.num_heads if u.head_channels is None else [u.heads(c) for c in widths],
            "cross_attention_dim": u.context_dim, "transformer_layers_per_block": u.transformer_depth,
            "use_linear_projection": u.linear_proj,
            "norm_num_groups": u.norm_groups, "norm_eps": 1e-5, "act_fn": "silu",
            "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False, "downsample_padding": 1},
        "vae/config": {
            "_class_name": "AutoencoderKL", "sample_size": parts.image_size, "in_channels": v.in_channels,
            "out_channels": v.in_channels, "latent_channels": v.z_channels, "block_out_channels": vae_widths,
            "layers_per_block": v.num_res_blocks, "down_block_types": ["DownEncoderBlock2D"] * len(vae_widths),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae_widths), "norm_num_groups": v.norm_groups,
            "scaling_factor": v.scale_factor, "act_fn": "silu"},
        "text_encoder/config": {
            "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": t.vocab_size,
            "hidden_size": t.width, "intermediate_size": 4 * t.width, "num_hidden_layers": layers,
            "num_attention_heads": t.heads, "max_position_embeddings": t.context_length, "layer_norm_eps": 1e-5,
            "hidden_act": "quick_gelu" if t.quick_gelu else "gelu", "bos_token_id": tokenizer.start,
            "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end if t.pad_with_end else 0,
            "projection_dim": t.projection_dim or t.width},
        "scheduler/scheduler_config": {              # the original's DDIM
            "_class_name": "DDIMScheduler", **SCHEDULE, "prediction_type": PREDICTION[parts.parameterization],
            "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
        "ip2p": {key: value for key, value in record.items() if key not in ("unet", "vae", "text")}}     # configs above
    text = {name: tensor for name, tensor in parts.text.state_dict().items() if name != "text_projection"
            and not any(name.startswith(f"transformer.resblocks.{i}.") for i in range(layers, t.layers))}
    weights = {"unet/diffusion_pytorch_model": keys.unet_to_diffusers(parts.unet.state_dict(), u),
               "vae/diffusion_pytorch_model": keys.vae_to_diffusers(parts.vae.state_dict(), v),
               "text_encoder/model": keys.text_to_hf(text)}
    end = "<|endoftext|>"
    bpe = tokenizer.bpe
    vocab = dict(zip([*list(bpe.encoder)[:-2], "<|startoftext|>", end], range(len(bpe.encoder))))
    # Id 0 is "!", but naming that as the padding, as Stable Diffusion 2 does, would turn a prompt's "!" into padding too.
    pad = end if t.pad_with_end else "<|pad|>"
    vocab.setdefault(pad, 0)
    special = dict(bos_token="<|startoftext|>", eos_token=end, unk_token=end, pad_token=pad)
    configs["tokenizer/special_tokens_map"] = special
    configs["tokenizer/tokenizer_config"] = {"tokenizer_class": "CLIPTokenizer", "model_max_length": t.context_length,
                                             "do_lower_case": True, "errors": "replace", **special}
    configs["tokenizer/vocab"] = vocab
    for name, config in configs.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / f"{name}.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in bpe.bpe_ranks)]
    (path / "tokenizer/merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    for name, tensors in weights.items():
        write_safetensors(path / f"{name}.safetensors", tensors, {})
