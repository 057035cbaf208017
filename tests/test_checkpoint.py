"""Checkpoints in and out. Diffusers and transformers, where installed, judge the layouts and the arithmetic."""
import functools
import json
import os
import pickle
import shutil
import sys
import types
import zipfile
from dataclasses import replace

import pytest
import torch

from ip2p import keys
from ip2p.checkpoint import (Parts, _as_published, load_checkpoint, load_vae, read_state_dict, save_checkpoint,
                             save_vae)
from ip2p.text import TextConfig, TextEncoder, Tokenizer, import_open_clip
from ip2p.unet import UNet, UNetConfig
from ip2p.vae import AutoencoderKL, VAEConfig

PARITY = 1e-5      # relative error in float32, norm of the difference over norm


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomised(model, seed):
    """Every parameter moved off its initial value, so that no zero bias or unit gain hides a mix-up."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p.mean() if p.ndim == 1 else 0) + 0.1 * torch.randn(p.shape, generator=generator))
    return model.eval().requires_grad_(False)


def tiny(kind, in_channels=8, seed=0):
    """Parts shaped like SD 1, SD 2 (32-wide heads, penultimate layer), or like nothing published ("odd")."""
    unet = UNetConfig(in_channels=in_channels, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                      attention_levels=(True, False), context_dim=64, num_heads=4, norm_groups=8)
    vae = VAEConfig(channels=8, channel_mult=(1, 2, 4), num_res_blocks=1, norm_groups=4)
    text = TextConfig(vocab_size=700, context_length=12, width=64, layers=2, heads=2)
    if kind == "sd2":
        unet = replace(unet, num_heads=None, head_channels=16, linear_proj=True, num_res_blocks=2)
        text = replace(text, layers=3, quick_gelu=False, skip_last=1, pad_with_end=False, projection_dim=48)
    if kind == "odd":
        unet = replace(unet, channel_mult=(1, 1, 3), attention_levels=(False, True, True), num_heads=2,
                       transformer_depth=2, out_channels=6, in_channels=12)
        vae = replace(vae, z_channels=6, channel_mult=(1, 1, 2), scale_factor=0.9, num_res_blocks=2)
        text = replace(text, quick_gelu=False, heads=4)
    with torch.random.fork_rng():
        models = UNet(unet), AutoencoderKL(vae), TextEncoder(text)
    models = [randomised(model, seed + i) for i, model in enumerate(models)]
    return Parts(*models, "eps" if kind == "sd1" else "v", 64, {"steps": 12, "data": "noise"})


def same(a, b):
    """Equal models of equal configuration, bit for bit."""
    assert a.config == b.config
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def same_parts(a, b):
    return same(a.unet, b.unet) and same(a.vae, b.vae) and same(a.text, b.text) and (
        a.parameterization, a.image_size) == (b.parameterization, b.image_size)


def public(parts):
    """A state dict by the published names, put together without the code under test: EMA-less, no record."""
    out = {f"model.diffusion_model.{k}": v for k, v in parts.unet.state_dict().items()}
    out |= {f"first_stage_model.{k}": v for k, v in parts.vae.state_dict().items()}
    text = parts.text.state_dict()
    if not parts.text.config.quick_gelu:
        return out | {f"cond_stage_model.model.{k}": v for k, v in text.items()}
    start = "cond_stage_model.transformer.text_model."
    out[start + "embeddings.token_embedding.weight"] = text["token_embedding.weight"]
    out[start + "embeddings.position_embedding.weight"] = text["positional_embedding"]
    for kind in ("weight", "bias"):
        out[f"{start}final_layer_norm.{kind}"] = text[f"ln_final.{kind}"]
        for i in range(parts.text.config.layers):
            a, b = f"transformer.resblocks.{i}.", f"{start}encoder.layers.{i}."
            width = parts.text.config.width
            for n, x in enumerate("qkv"):
                out[f"{b}self_attn.{x}_proj.{kind}"] = text[f"{a}attn.in_proj_{kind}"][n * width:(n + 1) * width].clone()
            out[f"{b}self_attn.out_proj.{kind}"] = text[f"{a}attn.out_proj.{kind}"]
            out[f"{b}layer_norm1.{kind}"], out[f"{b}layer_norm2.{kind}"] = text[f"{a}ln_1.{kind}"], text[f"{a}ln_2.{kind}"]
            out[f"{b}mlp.fc1.{kind}"], out[f"{b}mlp.fc2.{kind}"] = text[f"{a}mlp.c_fc.{kind}"], text[f"{a}mlp.c_proj.{kind}"]
    return out


def published_like(kind):
    """Narrow parts whose heads and groups follow Stable Diffusion's rules, so that a file needs no record."""
    sd2 = kind == "sd2"
    unet = UNetConfig(model_channels=64 if sd2 else 32, channel_mult=(1, 2), num_res_blocks=1, linear_proj=sd2,
                      attention_levels=(True, False), context_dim=1024 if sd2 else 768,
                      num_heads=None if sd2 else 8, head_channels=64 if sd2 else None)
    text = TextConfig(vocab_size=600, context_length=12, width=64, layers=2, heads=1)
    if sd2:
        text = replace(text, quick_gelu=False, skip_last=1, pad_with_end=False, projection_dim=64)
    vae = VAEConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1)
    with torch.random.fork_rng():
        models = UNet(unet), AutoencoderKL(vae), TextEncoder(text)
    return Parts(*(randomised(model, 5 + i) for i, model in enumerate(models)), "eps", 512, {})


def error_of(path, **kwargs):
    """The one line with which a checkpoint is refused."""
    with pytest.raises(ValueError) as info:
        load_checkpoint(path, **kwargs)
    message = str(info.value)
    assert "\n" not in message
    return message


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A good file, and a folder of it, for tests that spoil copies."""
    folder = tmp_path_factory.mktemp("saved")
    parts = tiny("sd1")
    save_checkpoint(parts, folder / "good.safetensors")
    save_checkpoint(parts, folder / "good", "diffusers")
    return parts, folder / "good.safetensors", folder / "good"


# ---- round trips ----

@pytest.mark.parametrize("kind", ["sd1", "sd2", "odd"])
@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt", "folder"])
def test_saved_and_loaded_is_the_same(tmp_path, kind, name):
    parts = tiny(kind)
    save_checkpoint(parts, tmp_path / name, "diffusers" if name == "folder" else "ldm")
    loaded = load_checkpoint(tmp_path / name)
    if name == "folder":       # diffusers' layout has no place for a layer that is not used, nor for CLIP's projection
        text = parts.text.config
        kept = replace(text, layers=text.layers - text.skip_last, skip_last=0, projection_dim=None)
        assert loaded.text.config == kept
        ids = torch.randint(0, 700, (2, 12), generator=torch.Generator().manual_seed(0))
        assert torch.equal(loaded.text(ids), parts.text(ids))
        loaded.text = parts.text
    assert same_parts(loaded, parts)
    assert loaded.metadata["steps"] == 12 and loaded.metadata["data"] == "noise"
    for model in (loaded.unet, loaded.vae, loaded.text):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert [p.name for p in tmp_path.iterdir()] == [name]                   # no temporary left


def test_saving_replaces_the_old_and_keeps_it_on_failure(tmp_path, saved):
    parts, file, folder = saved
    path, old = tmp_path / "a.safetensors", file.read_bytes()
    shutil.copy(file, path)
    with pytest.raises(TypeError):
        save_checkpoint(parts, path, metadata={"not json": {1, 2}})
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1
    save_checkpoint(load_checkpoint(path), path, metadata={"steps": 13})      # onto the file it is mapped from
    assert load_checkpoint(path).metadata["steps"] == 13 and same_parts(load_checkpoint(path), parts)
    shutil.copytree(folder, tmp_path / "f")
    save_checkpoint(parts, tmp_path / "f", "diffusers", metadata={"steps": 14})
    assert load_checkpoint(tmp_path / "f").metadata["steps"] == 14
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not a diffusers folder; not overwritten"):
        save_checkpoint(parts, tmp_path / "mine", "diffusers")
    with pytest.raises(ValueError, match="layout"):
        save_checkpoint(parts, tmp_path / "x.safetensors", "onnx")
    with pytest.raises(ValueError, match="ends in"):
        save_checkpoint(parts, tmp_path / "x.png")


def test_safetensors_reads_what_we_write_and_we_read_what_it_writes(tmp_path, saved):
    st = pytest.importorskip("safetensors.torch")
    ours, _ = read_state_dict(saved[1])
    theirs = st.load_file(saved[1])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    mixed = {"a": torch.randn(3), "b": torch.arange(3, dtype=torch.int8), "c": torch.randn(5, 2).bfloat16(),
             "d": torch.tensor(2.0), "e": torch.zeros(0, 4), "f": torch.tensor([True, False]), "g": torch.ones(1).half()}
    st.save_file(mixed, tmp_path / "x.safetensors")
    again, record = read_state_dict(tmp_path / "x.safetensors")
    assert record == {} and all(torch.equal(again[k], mixed[k]) and again[k].dtype == mixed[k].dtype for k in mixed)


def test_shared_parts_are_stored_once(tmp_path):
    base, editor = tiny("odd"), tiny("odd", seed=50)
    editor.vae, editor.text = base.vae, base.text
    save_checkpoint(base, tmp_path / "sd.safetensors")
    save_checkpoint(editor, tmp_path / "edit.safetensors", shared={"vae": "sd.safetensors", "text": "sd.safetensors"})
    assert all(k.startswith("model.diffusion_model.") for k in read_state_dict(tmp_path / "edit.safetensors")[0])
    loaded = load_checkpoint(tmp_path / "edit.safetensors")
    assert same_parts(loaded, editor)
    save_checkpoint(loaded, tmp_path / "whole.safetensors")                   # and can be put together again
    editor.text = tiny("odd", seed=60).text
    save_checkpoint(editor, tmp_path / "own-text.safetensors", shared={"vae": "sd.safetensors"})
    assert same_parts(load_checkpoint(tmp_path / "own-text.safetensors"), editor)
    editor.text = base.text
    (tmp_path / "sd.safetensors").unlink()
    assert same_parts(load_checkpoint(tmp_path / "whole.safetensors"), editor)
    assert "sd.safetensors, which is missing beside it" in error_of(tmp_path / "edit.safetensors")
    with pytest.raises(ValueError, match="plain name"):
        save_checkpoint(editor, tmp_path / "x.safetensors", shared={"vae": "../sd.safetensors"})


# ---- the published layouts ----

@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("wrap", ["plain", "nested", "ddp", "noise"])
def test_published_file_without_a_record(tmp_path, kind, wrap, capsys):
    parts = published_like(kind)
    state = public(parts)
    if wrap == "noise":        # what the original files hold beside the weights
        state |= {name: torch.ones(3) for name in (
            "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod", "posterior_variance",
            "log_one_minus_alphas_cumprod", "logvar", "lvlb_weights", "model_ema.decay", "model_ema.num_updates",
            "first_stage_model.loss.logvar", "cond_stage_model.logit_scale", "cond_stage_model.model.attn_mask",
            "cond_stage_model.transformer.text_model.embeddings.position_ids")}
    if wrap == "ddp":
        state = {f"module.{k}": v for k, v in state.items()}
    torch.save({"state_dict": {"state_dict": state}} if wrap == "nested" else {"state_dict": state}, tmp_path / "m.ckpt")
    loaded = load_checkpoint(tmp_path / "m.ckpt", parameterization="eps")
    assert same_parts(loaded, parts) and loaded.metadata == {}
    assert capsys.readouterr().err == ""


def test_position_ids_of_any_kind_and_names_without_text_model(tmp_path):
    parts = published_like("sd1")
    state = {k.replace(".text_model.", "."): v for k, v in public(parts).items()}
    state["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(12.0)[None]
    torch.save(state, tmp_path / "m.ckpt")
    assert same_parts(load_checkpoint(tmp_path / "m.ckpt"), parts)


def test_ema_is_preferred_and_must_be_complete(tmp_path):
    parts, averaged = published_like("sd1"), published_like("sd1")
    randomised(averaged.unet, 99)
    ema = {"model_ema." + f"diffusion_model.{k}".replace(".", ""): v for k, v in averaged.unet.state_dict().items()}
    ema |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    assert "model_ema.diffusion_modelinput_blocks00weight" in ema             # as in the published files
    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": public(parts) | ema}, path)
    assert same(load_checkpoint(path).unet, averaged.unet)
    less = {k: v for k, v in ema.items() if not k.startswith("model_ema.diffusion_modeltime_embed")}
    torch.save({"state_dict": public(parts) | less}, path)
    assert "EMA copy lacks keys: 4 (model_ema.diffusion_modeltime_embed0bias" in error_of(path)
    torch.save({"state_dict": public(parts) | ema | {"model_ema.odd": torch.ones(1)}}, path)
    assert "unknown EMA keys: 1 (odd)" in error_of(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision(tmp_path, saved, dtype):
    parts = tiny("sd1")
    for model in (parts.unet, parts.vae, parts.text):
        model.to(dtype)
    for name in ("m.safetensors", "m.ckpt"):
        save_checkpoint(parts, tmp_path / name)
        assert {t.dtype for t in read_state_dict(tmp_path / name)[0].values()} == {dtype}
        loaded, kept = load_checkpoint(tmp_path / name), load_checkpoint(tmp_path / name, dtype=dtype)
        for model in ("unet", "vae", "text"):
            assert {p.dtype for p in getattr(loaded, model).parameters()} == {torch.float32}
            assert same(getattr(kept, model), getattr(parts, model))
        assert same(loaded.unet, parts.unet.to(torch.float32))
        parts.unet.to(dtype)


def test_saving_at_another_precision(tmp_path, saved):
    parts = saved[0]
    for name in ("m.safetensors", "m.ckpt"):
        save_checkpoint(parts, tmp_path / name, dtype=torch.float16)
        assert {t.dtype for t in read_state_dict(tmp_path / name)[0].values()} == {torch.float16}
        loaded = load_checkpoint(tmp_path / name)
        assert torch.equal(loaded.unet.out[2].weight, parts.unet.out[2].weight.half().float())
    assert parts.unet.out[2].weight.dtype == torch.float32


def test_autoencoder_alone(tmp_path, saved):
    vae = tiny("odd").vae
    save_vae(vae, tmp_path / "vae.safetensors", {"steps": 5})
    assert same(load_vae(tmp_path / "vae.safetensors"), vae)
    assert read_state_dict(tmp_path / "vae.safetensors")[1]["steps"] == 5
    for path in (saved[1], saved[2], saved[2] / "vae"):
        assert same(load_vae(path), saved[0].vae)


def test_separate_vae(tmp_path, saved):
    parts, file, folder = saved
    other = randomised(tiny("sd1").vae, 77)
    changed = tiny("sd1")
    changed.vae = other
    save_checkpoint(changed, tmp_path / "whole.safetensors")
    save_checkpoint(changed, tmp_path / "whole", "diffusers")
    for vae in ("whole.safetensors", "whole", "whole/vae"):
        loaded = load_checkpoint(file, vae=tmp_path / vae)
        assert same(loaded.vae, other) and same(loaded.unet, parts.unet)
        assert same(load_checkpoint(folder, vae=tmp_path / vae).vae, other)
    standard = published_like("sd1").vae                                      # files that say nothing of their shape
    state, theirs = standard.state_dict(), keys.vae_to_diffusers(standard.state_dict(), standard.config)
    torch.save({"state_dict": state | {"loss.logvar": torch.ones(1)}}, tmp_path / "bare.ckpt")
    torch.save({f"first_stage_model.{k}": v for k, v in state.items()}, tmp_path / "prefixed.pt")
    torch.save({k: v.clone() for k, v in theirs.items()}, tmp_path / "diffusers.bin")
    for vae in ("bare.ckpt", "prefixed.pt", "diffusers.bin"):
        assert same(load_checkpoint(file, vae=tmp_path / vae).vae, standard)
    assert "its VAE lacks the key encoder.conv_in.weight" in error_of(file, vae=folder / "unet")
    small = folder / "vae/diffusion_pytorch_model.safetensors"                # narrow, and without the config beside it
    assert str(small) in error_of(file, vae=small)


def test_widened_input_ignores_what_is_new(saved, tmp_path):
    parts = tiny("sd1", in_channels=4)
    save_checkpoint(parts, tmp_path / "four.safetensors")
    wide = load_checkpoint(tmp_path / "four.safetensors", in_channels=8)
    assert wide.unet.config == replace(parts.unet.config, in_channels=8)
    assert torch.equal(wide.unet.input_blocks[0][0].bias, parts.unet.input_blocks[0][0].bias)
    generator = torch.Generator().manual_seed(1)
    x, image, context = (torch.randn(s, generator=generator) for s in ((2, 4, 8, 8), (2, 4, 8, 8), (2, 5, 64)))
    t = torch.tensor([10, 900])
    assert relative_error(wide.unet(torch.cat([x, image], 1), t, context), parts.unet(x, t, context)) < 1e-6
    save_checkpoint(wide, tmp_path / "eight.safetensors")                     # the record now says eight
    assert same_parts(load_checkpoint(tmp_path / "eight.safetensors"), wide)
    assert "has 8 input channels, which cannot be narrowed to 4" in error_of(saved[1], in_channels=4)


def test_parameterization_and_size_are_told_or_guessed(tmp_path, capsys):
    parts = published_like("sd2")
    path = tmp_path / "v2.ckpt"

    def opened(top=(), **kwargs):
        torch.save({"state_dict": state, **dict(top)}, path)
        loaded = load_checkpoint(path, **kwargs)
        assert loaded.metadata == {}
        return loaded.parameterization, loaded.image_size, capsys.readouterr().err

    state = public(parts)
    kind, size, message = opened()
    assert (kind, size) == ("v", 768) and message.count("\n") == 1 and 'parameterization="eps"' in message
    kind, size, message = opened({"global_step": 875000})
    assert (kind, size) == ("eps", 512) and 'parameterization="v"' in message
    assert opened({"global_step": 110000})[0] == "v"
    assert opened(parameterization="eps") == ("eps", 512, "")
    torch.save({"state_dict": state, "ip2p": {"parameterization": "eps", "image_size": 640}}, path)
    told = load_checkpoint(path)
    assert (told.parameterization, told.image_size, capsys.readouterr().err) == ("eps", 640, "")
    assert load_checkpoint(path, parameterization="v").parameterization == "v"
    state = public(published_like("sd1"))
    assert opened() == ("eps", 512, "")
    assert opened(parameterization="v") == ("v", 512, "")
    assert "must be" in error_of(path, parameterization="epsilon")


# ---- memory and randomness ----

def test_opening_draws_no_random_numbers_and_copies_nothing(tmp_path, saved):
    parts, file, folder = saved
    save_checkpoint(parts, tmp_path / "m.ckpt")
    before = torch.get_rng_state()
    for path in (file, tmp_path / "m.ckpt", folder):
        loaded = load_checkpoint(path)
        assert torch.equal(torch.get_rng_state(), before)
        if not sys.platform.startswith("linux"):
            continue
        name = str(path / "unet/diffusion_pytorch_model.safetensors" if path == folder else path)
        maps = [line.split() for line in open("/proc/self/maps") if line.rstrip().endswith(name)]
        ranges = [tuple(int(x, 16) for x in fields[0].split("-")) for fields in maps]
        assert all(any(a <= p.data_ptr() < b for a, b in ranges) for p in loaded.unet.parameters())
    loaded = load_checkpoint(file)
    with torch.no_grad():
        loaded.unet.out[2].bias.fill_(7)                       # writing to a parameter leaves the file alone
    assert same_parts(load_checkpoint(file), parts)


# ---- pickles ----

class Evil:
    def __init__(self, how, canary):
        self.how, self.canary = how, canary

    def __reduce__(self):
        command = f"touch {self.canary}"
        if self.how == "system":
            return os.system, (command,)
        if self.how == "eval":
            return eval, (f"__import__('os').system({command!r})",)
        return functools.partial(os.system, command), ()       # calls what a call has made


def torch_zip(path, data_pkl, root="archive"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", data_pkl)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("how", ["system", "eval", "partial"])
def test_a_pickle_that_runs_a_command_does_not(tmp_path, saved, how, zipped):
    canary = tmp_path / "canary"
    for protocol in (2, 4):
        evil = pickle.dumps(Evil(how, canary), protocol)
        pickle.loads(evil)                                     # the file would do it
        canary.unlink()
        state = public(published_like("sd1"))
        torch.save({"hook": Evil(how, canary), "state_dict": state}, tmp_path / "m.ckpt", pickle_protocol=protocol,
                   _use_new_zipfile_serialization=zipped)
        assert same_parts(load_checkpoint(tmp_path / "m.ckpt"), published_like("sd1"))
        (tmp_path / "raw.ckpt").write_bytes(evil)
        assert "not one of torch.save" in error_of(tmp_path / "raw.ckpt")
        torch_zip(tmp_path / "zip.ckpt", evil)
        assert "holds no" in error_of(tmp_path / "zip.ckpt")
        assert not canary.exists()


def test_no_opcode_reaches_a_real_function(tmp_path):
    canary = tmp_path / "canary"
    s = f"S'touch {canary}'\n".encode()
    u = f"touch {canary}".encode()
    programs = {
        "INST": b"(" + s + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + s + b"o.",
        "REDUCE": b"cos\nsystem\n(" + s + b"tR.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(u)]) + u + b"\x85R.",
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c" + bytes([len(u)]) + u + b"\x85R.",
    }
    for name, program in programs.items():
        pickle.loads(program) if name != "dotted" else None    # each but the last, whose name is not there, would run it
        assert name == "dotted" or canary.exists(), name
        canary.unlink(missing_ok=True)
        torch_zip(tmp_path / "m.ckpt", program)
        error_of(tmp_path / "m.ckpt")
        (tmp_path / "m.ckpt").write_bytes(b"\x80\x02" + program)
        error_of(tmp_path / "m.ckpt")
        assert not canary.exists(), name
    # BUILD on a class of ours must not change how the next file is read
    torch_zip(tmp_path / "m.ckpt", b"ccollections\nOrderedDict\n(N}S'update'\ncos\nsystem\nstb.")
    error_of(tmp_path / "m.ckpt")
    torch.save({"state_dict": public(published_like("sd1"))}, tmp_path / "m.ckpt")
    assert same_parts(load_checkpoint(tmp_path / "m.ckpt"), published_like("sd1"))


def test_what_a_training_program_left_in_the_file_is_ignored(tmp_path):
    numpy = pytest.importorskip("numpy")
    import argparse
    import collections
    module = types.ModuleType("lightning_like")

    class ModelCheckpoint:
        def __init__(self):
            self.best = numpy.float64(0.5)
    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = "lightning_like", "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint
    sys.modules["lightning_like"] = module
    parts = published_like("sd1")
    try:
        torch.save({"epoch": numpy.int64(3), "global_step": 470000, "callbacks": {ModelCheckpoint: ModelCheckpoint()},
                    "state_dict": collections.OrderedDict({k: torch.nn.Parameter(v) for k, v in public(parts).items()}),
                    "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3), "step": 4}}, "groups": {1, 2}}],
                    "hyper_parameters": argparse.Namespace(lr=collections.defaultdict(list, a=[1])),
                    "rng": numpy.arange(3), "loops": collections.deque([1]), "dtype": torch.float32,
                    "array": numpy.array(["x", None], dtype=object)}, tmp_path / "m.ckpt")
    finally:
        del sys.modules["lightning_like"]
    loaded = load_checkpoint(tmp_path / "m.ckpt")
    assert same_parts(loaded, parts) and loaded.metadata == {} and "lightning_like" not in sys.modules


def test_every_container_of_torch_save(tmp_path):
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {"whole": base, "transposed": base.mT, "slice": base[1:3, ::2], "half": base.half(), "bf16": base.bfloat16(),
               "long": torch.arange(3), "bool": torch.tensor([True, False]), "scalar": torch.tensor(3.0),
               "empty": torch.zeros(0, 3), "double": base.double(), "byte": torch.arange(5, dtype=torch.uint8)}
    torch.save(tensors, tmp_path / "new.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "new.pt") as source, \
            zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    for name in ("new.pt", "old.pt", "small.pt"):
        read, record = read_state_dict(tmp_path / name)
        assert read.keys() == tensors.keys() and record == {}, name
        assert all(torch.equal(read[k], t) and read[k].dtype == t.dtype for k, t in tensors.items()), name


# ---- bad files ----

def test_what_is_not_a_checkpoint_is_refused_by_name(tmp_path, saved):
    good = saved[1].read_bytes()
    torch.save({"state_dict": public(published_like("sd1"))}, tmp_path / "good.ckpt")
    torch.save({"state_dict": public(published_like("sd1"))}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    zipped, old = (tmp_path / "good.ckpt").read_bytes(), (tmp_path / "old.ckpt").read_bytes()
    header = int.from_bytes(good[:8], "little")
    lie = json.loads(good[8:8 + header])
    lie["model.diffusion_model.out.2.bias"]["shape"] = [5]
    lie = json.dumps(lie).encode()
    cases = {
        "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 42\n", "Git-LFS pointer"),
        "page.ckpt": (b"<!DOCTYPE html><html><body>Sign in", "a web page"),
        "page2.ckpt": (b"\n\n <HTML>\nSign in", "a web page"),
        "empty.ckpt": (b"", "empty"),
        "half.safetensors": (good[:len(good) // 2], "truncated"),
        "header.safetensors": (good[:100], "truncated"),
        "one.safetensors": (good[:-1], "truncated"),
        "tiny.safetensors": (good[:5], "neither safetensors nor"),
        "half.ckpt": (zipped[:len(zipped) // 2], "truncated"),
        "one.ckpt": (zipped[:-30], "truncated"),
        "halfold.ckpt": (old[:len(old) // 2], "truncated"),
        "text.ckpt": (b"just some words in a file", "neither safetensors nor"),
        "json.safetensors": (good[:9] + b"!!" + good[11:], "malformed safetensors header"),
        "lie.safetensors": (len(lie).to_bytes(8, "little") + lie + good[8 + header:], "bias of shape [5] takes 16 bytes"),
        "list.ckpt": (None, "holds no state_dict"),
        "nothing.ckpt": (None, "holds no tensors"),
        "other.zip.ckpt": (None, "not one of torch.save"),
        "script.pt": (None, "TorchScript"),
        "pickle.ckpt": (pickle.dumps({"state_dict": 3}), "not one of torch.save"),
        "broken.ckpt": (b"\x80\x02}q\x00(X\xff\xff", "damaged"),
        "short.ckpt": (old[:150], "truncated"),
        "memo.ckpt": (b"\x80\x02Nr\xff\xff\xff\x7f.", "not one of torch.save"),      # asks the C unpickler for 34 GB
    }
    torch.save([torch.ones(1)], tmp_path / "list.ckpt")
    torch.save({"state_dict": {"a": 1}}, tmp_path / "nothing.ckpt")
    for name, inner in (("other.zip.ckpt", ("a.txt",)), ("script.pt", ("m/data.pkl", "m/constants.pkl", "m/code/a.py"))):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for entry in inner:
                archive.writestr(entry, "x")
    for name, (content, words) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        message = error_of(tmp_path / name)
        assert words in message and message.startswith(str(tmp_path / name)), message
    for name in ("missing.safetensors", "./models/missing", "no such/thing here"):
        assert "no such file or folder" in error_of(tmp_path / name)


def test_keys_are_strict_both_ways(tmp_path, saved):
    state, record = read_state_dict(saved[1])

    def refused(**changes):
        torch.save({"state_dict": {k: v for k, v in (state | changes).items() if v is not None}, "ip2p": record},
                   tmp_path / "m.ckpt")
        return error_of(tmp_path / "m.ckpt")

    unet = "model.diffusion_model."
    assert "UNet has missing keys: 1 (time_embed.0.bias)" in refused(**{unet + "time_embed.0.bias": None})
    assert "VAE has missing keys: 4 (decoder.conv_in.bias, decoder.conv_in.weight, decoder.conv_out.bias, ...)" in refused(
        **{f"first_stage_model.decoder.{a}.{b}": None for a in ("conv_in", "conv_out") for b in ("weight", "bias")})
    assert "text encoder has missing keys: 1 (ln_final.bias)" in refused(
        **{"cond_stage_model.transformer.text_model.final_layer_norm.bias": None})
    assert "UNet has unknown keys: 1 (label_emb.weight)" in refused(**{unet + "label_emb.weight": torch.ones(1)})
    assert "unknown keys: 1 (lora.up)" in refused(**{"lora.up": torch.ones(1)})
    message = refused(**{unet + "out.2.bias": torch.ones(3), unet + "out.0.bias": None, unet + "x": torch.ones(1)})
    for words in ("out.2.bias is (3,) instead of (4,)", "missing keys: 1 (out.0.bias)", "unknown keys: 1 (x)"):
        assert words in message
    assert "holds no VAE" in refused(**{k: None for k in state if k.startswith("first_stage_model")})
    assert "holds no text encoder" in refused(**{k: None for k in state if k.startswith("cond_stage_model")})
    both = {"cond_stage_model.model." + k: v for k, v in saved[0].text.state_dict().items()}
    assert "holds two text encoders" in refused(**both)
    assert "holds no UNet" in refused(**{k: None for k in state if k.startswith(unet)})
    record["unet"]["colour"] = "green"
    assert "unknown UNetConfig fields: colour" in refused()
    record["unet"] = [1]
    assert "malformed" in refused()
    record.clear()                                            # sizes must then be read from tensors
    assert "lacks the key input_blocks.0.0.weight" in refused(**{unet + "input_blocks.0.0.weight": None})


def test_folders_of_the_wrong_kind(tmp_path, saved):
    folder = tmp_path / "f"
    (tmp_path / "pictures").mkdir()
    assert "not a diffusers folder" in error_of(tmp_path / "pictures")

    def spoilt(change):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved[2], folder)
        change()
        return error_of(folder)

    def edit(name, **values):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    assert "no vae/" in spoilt(lambda: shutil.rmtree(folder / "vae"))
    assert "no weights" in spoilt(lambda: (folder / "unet/diffusion_pytorch_model.safetensors").unlink())
    assert "not JSON" in spoilt(lambda: (folder / "unet/config.json").write_text("{"))
    assert "norm_eps must be 1e-05, got 0.001" in spoilt(lambda: edit("unet/config.json", norm_eps=1e-3))
    assert "hidden_act" in spoilt(lambda: edit("text_encoder/config.json", hidden_act="relu"))
    assert "got 'sample'" in spoilt(lambda: edit("scheduler/scheduler_config.json", prediction_type="sample"))
    assert "beta_end must be 0.012" in spoilt(lambda: edit("scheduler/scheduler_config.json", beta_end=0.02))


def test_hub_ids(tmp_path, saved, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def offline(repo_id, **kwargs):
        raise ConnectionError("no route to host\nsecond line")

    def half_only(repo_id, allow_patterns):
        asked.append(allow_patterns)
        if not any("fp16" in pattern for pattern in allow_patterns):
            (tmp_path / "snapshot/unet").mkdir(parents=True)
            return str(tmp_path / "snapshot")
        return str(saved[2])

    monkeypatch.setattr(hub, "snapshot_download", offline)
    message = error_of("timbrooks/instruct-pix2pix")
    assert "timbrooks/instruct-pix2pix" in message and "no route to host" in message and "local copy" in message
    monkeypatch.setattr(hub, "snapshot_download", half_only)
    assert same_parts(load_checkpoint("timbrooks/instruct-pix2pix"), saved[0])
    assert len(asked) == 2 and not any(p.startswith("safety_checker") or p.endswith((".bin", ".ckpt")) for p in asked[0])


# ---- diffusers folders ----

def test_shards_variants_pickles_and_old_names(tmp_path, saved):
    parts, _, good = saved
    unet = "diffusion_pytorch_model"

    def fresh():
        shutil.rmtree(tmp_path / "f", ignore_errors=True)
        return shutil.copytree(good, tmp_path / "f")

    folder = fresh()
    state, _ = read_state_dict(folder / f"unet/{unet}.safetensors")
    (folder / f"unet/{unet}.safetensors").unlink()
    names = sorted(state)
    shards = {f"{unet}-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, inside in shards.items():
        torch.save({name: state[name].clone() for name in inside}, folder / "unet" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, inside in shards.items() for name in inside}}
    (folder / f"unet/{unet}.bin.index.json").write_text(json.dumps(index))
    assert same_parts(load_checkpoint(folder), parts)
    (folder / "unet" / list(shards)[1]).unlink()
    assert "00002-of-00002.bin: no such file" in error_of(folder)

    folder = fresh()
    half = folder / f"unet/{unet}.fp16.safetensors"
    (folder / f"unet/{unet}.safetensors").rename(half)                            # there is only this one
    shutil.copy(half, folder / "vae")                                             # not to be read: there is a full one
    text, _ = read_state_dict(folder / "text_encoder/model.safetensors")
    text = {name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    text["embeddings.position_ids"] = torch.arange(12)
    torch.save(text, folder / "text_encoder/pytorch_model.bin")
    (folder / "text_encoder/model.safetensors").unlink()
    vae, _ = read_state_dict(folder / f"vae/{unet}.safetensors")
    (folder / f"vae/{unet}.safetensors").unlink()
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        vae = {name.replace(new, old): tensor for name, tensor in vae.items()}
    assert "decoder.mid_block.attentions.0.query.weight" in vae
    torch.save(vae, folder / f"vae/{unet}.bin")
    assert same_parts(load_checkpoint(folder), parts)


def test_folder_configs_are_optional_for_published_shapes(tmp_path):
    parts = published_like("sd1")
    save_checkpoint(parts, tmp_path / "f", "diffusers")
    for name in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler", "tokenizer", "ip2p.json",
                 "model_index.json"):
        path = tmp_path / "f" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert same_parts(load_checkpoint(tmp_path / "f"), parts)


@pytest.fixture(scope="module")
def diffusers():
    import_open_clip()
    pytest.importorskip("transformers")
    module = pytest.importorskip("diffusers")
    module.utils.logging.disable_progress_bar()
    return module


@pytest.mark.parametrize("kind", ["sd1", "sd2", "odd"])
def test_diffusers_opens_what_we_save(tmp_path, diffusers, kind):
    parts = tiny(kind)
    parts.text = randomised(parts.text, 3)
    save_checkpoint(parts, tmp_path / "f", "diffusers")
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "f")
    generator = torch.Generator().manual_seed(2)
    z = parts.vae.config.z_channels
    x, context, pixels, latents = (torch.randn(s, generator=generator) for s in (
        (2, parts.unet.config.in_channels, 8, 8), (2, 12, 64), (1, 3, 32, 32), (1, z, 8, 8)))
    t, ids = torch.tensor([3, 801]), torch.randint(0, 700, (2, 12), generator=generator)
    with torch.no_grad():
        assert relative_error(pipe.unet(x, t, context).sample, parts.unet(x, t, context)) < PARITY
        theirs, ours = pipe.vae.encode(pixels).latent_dist, parts.vae.encode(pixels)
        assert relative_error(theirs.mean, ours.mean) < PARITY and relative_error(theirs.logvar, ours.logvar) < PARITY
        assert relative_error(pipe.vae.decode(latents).sample, parts.vae.decode(latents)) < PARITY
        assert relative_error(pipe.text_encoder(ids)[0], parts.text(ids)) < PARITY
    assert pipe.vae.config.scaling_factor == parts.vae.config.scale_factor
    assert pipe.scheduler.config.prediction_type == {"eps": "epsilon", "v": "v_prediction"}[parts.parameterization]
    prompts = ["make it NIGHT!", "", "!! a fox's cafés, 12 & 日本 ?!", "word " * 30, "what about snow ?"]
    theirs = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(theirs, Tokenizer(parts.text.config)(prompts))
    four = tiny(kind, in_channels=4)
    if kind == "sd1":
        save_checkpoint(four, tmp_path / "four", "diffusers")
        assert diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "four").unet.config.in_channels == 4
        for change, words in (({"in_channels": 5}, "no diffusers pipeline for 5"), ({"channel_mult": (2, 1)}, "wider than")):
            four.unet = on_meta(lambda: UNet(replace(parts.unet.config, **change)))
            with pytest.raises(ValueError, match=words):
                save_checkpoint(four, tmp_path / "never", "diffusers")
            assert not list(tmp_path.glob("*never*"))


@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt"])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_diffusers_opens_our_single_files(tmp_path, diffusers, kind, name):
    parts = tiny(kind)
    save_checkpoint(parts, tmp_path / name)
    save_checkpoint(parts, tmp_path / "f", "diffusers")                           # its configs: a file of theirs has none
    models = diffusers.UNet2DConditionModel, diffusers.AutoencoderKL
    unet, vae = (model.from_single_file(tmp_path / name, config=str(tmp_path / "f"), subfolder=part)
                 for model, part in zip(models, ("unet", "vae")))
    generator = torch.Generator().manual_seed(2)
    x, context, z = (torch.randn(s, generator=generator) for s in ((2, 8, 8, 8), (2, 12, 64), (1, 4, 8, 8)))
    t = torch.tensor([3, 801])
    with torch.no_grad():
        assert relative_error(unet(x, t, context).sample, parts.unet(x, t, context)) < PARITY
        assert relative_error(vae.decode(z).sample, parts.vae.decode(z)) < PARITY


@pytest.mark.parametrize("prefix", ["text_model.", ""])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_we_open_what_diffusers_saves(tmp_path, diffusers, kind, prefix):
    import transformers
    sd2 = kind == "sd2"
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, block_out_channels=(32, 64, 64), layers_per_block=2, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=64,
        attention_head_dim=(2, 4, 4) if sd2 else 8, use_linear_projection=sd2)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16), layers_per_block=2, latent_channels=4, norm_num_groups=4, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, vocab_size=700,
        max_position_embeddings=20, hidden_act="gelu" if sd2 else "quick_gelu", bos_token_id=698, eos_token_id=699,
        pad_token_id=0))
    for i, (name, model) in enumerate((("unet", unet), ("vae", vae), ("text_encoder", text))):
        randomised(model, 20 + i).save_pretrained(tmp_path / name)
    state, _ = read_state_dict(tmp_path / "text_encoder/model.safetensors")       # transformers 4 and 5 differ here
    torch.save({prefix + k.removeprefix("text_model."): v.clone() for k, v in state.items()},
               tmp_path / "text_encoder/pytorch_model.bin")
    (tmp_path / "text_encoder/model.safetensors").unlink()
    diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                            prediction_type="v_prediction" if sd2 else "epsilon").save_pretrained(tmp_path / "scheduler")
    (tmp_path / "tokenizer").mkdir()
    special = {"pad_token": "!" if sd2 else {"content": "<|endoftext|>"}, "eos_token": {"content": "<|endoftext|>"}}
    (tmp_path / "tokenizer/special_tokens_map.json").write_text(json.dumps(special))

    parts = load_checkpoint(tmp_path)
    assert (parts.parameterization, parts.image_size, parts.metadata) == ("v" if sd2 else "eps", 64, {})
    assert parts.vae.config.scale_factor == 0.5 and parts.text.config.pad_with_end != sd2
    generator = torch.Generator().manual_seed(2)
    x, context, pixels, latents = (torch.randn(s, generator=generator) for s in (
        (2, 4, 16, 16), (2, 20, 64), (1, 3, 32, 32), (1, 4, 8, 8)))
    t, ids = torch.tensor([999, 0]), torch.randint(0, 700, (2, 20), generator=generator)
    with torch.no_grad():
        assert relative_error(parts.unet(x, t, context), unet(x, t, context).sample) < PARITY
        assert relative_error(parts.vae.encode(pixels).mean, vae.encode(pixels).latent_dist.mean) < PARITY
        assert relative_error(parts.vae.decode(latents), vae.decode(latents).sample) < PARITY
        assert relative_error(parts.text(ids), text(ids)[0]) < PARITY
    save_checkpoint(parts, tmp_path / "m.safetensors")                            # and on to a single file
    assert same_parts(load_checkpoint(tmp_path / "m.safetensors"), parts)


# ---- full size, without weights ----

def on_meta(build):
    with torch.device("meta"):
        return build()


SD2 = UNetConfig(context_dim=1024, num_heads=None, head_channels=64, linear_proj=True)
FULL = {"sd1": UNetConfig(), "ip2p": UNetConfig(in_channels=8), "sd2": SD2}


@pytest.mark.parametrize("kind", list(FULL))
def test_full_size_unet_names_and_sizes(kind):
    state = on_meta(lambda: UNet(FULL[kind])).state_dict()
    assert len(state) == 686
    if kind == "sd1":
        assert sum(t.numel() for t in state.values()) == 859_520_964             # 859.5 M, as published
    for name, shape in {
            "input_blocks.0.0.weight": (320, FULL[kind].in_channels, 3, 3), "input_blocks.3.0.op.weight": (320, 320, 3, 3),
            "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1), "input_blocks.11.0.out_layers.3.bias": (1280,),
            "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3), "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
            "output_blocks.8.2.conv.bias": (640,), "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
            "output_blocks.11.1.transformer_blocks.0.attn1.to_out.0.bias": (320,), "out.2.weight": (4, 320, 3, 3),
            "time_embed.2.weight": (1280, 1280), "middle_block.0.emb_layers.1.weight": (1280, 1280),
            "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, FULL[kind].context_dim)}.items():
        assert state[name].shape == shape, name
    assert keys.config_from(UNetConfig, state, {}) == FULL[kind]
    assert len(set(map(keys.ema_name, state))) == 686                             # dotless, and still different
    there = keys.unet_to_diffusers(state, FULL[kind])
    assert not set(there) & set(state)
    back = keys.unet_from_diffusers(there)
    assert {k: t.shape for k, t in back.items()} == {k: t.shape for k, t in state.items()}


def test_full_size_vae_and_text_names():
    vae = on_meta(lambda: AutoencoderKL()).state_dict()
    assert len(vae) == 248 and sum(t.numel() for t in vae.values()) == 83_653_863
    assert keys.config_from(VAEConfig, vae, {}) == VAEConfig()
    assert keys.vae_from_diffusers(keys.vae_to_diffusers(vae, VAEConfig())).keys() == vae.keys()
    import_open_clip()
    sd2 = TextConfig(width=1024, layers=24, heads=16, quick_gelu=False, skip_last=1, pad_with_end=False, projection_dim=1024)
    for config, count in ((TextConfig(), 123_060_480), (sd2, 354_032_640)):       # with SD 2's projection of 1024 x 1024
        text = on_meta(lambda: TextEncoder(config)).state_dict()
        assert sum(t.numel() for t in text.values()) == count
        assert keys.text_from_hf(keys.text_to_hf(text)).keys() == text.keys()
        rule = {k: getattr(config, k) for k in ("quick_gelu", "skip_last", "pad_with_end")}
        assert keys.config_from(TextConfig, text, rule) == config


def test_full_size_names_are_those_of_diffusers(diffusers):
    import transformers
    sd1 = dict(sample_size=64, cross_attention_dim=768)
    sd2 = dict(sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
    for config, theirs in ((UNetConfig(), sd1), (SD2, sd2)):
        model = on_meta(lambda: diffusers.UNet2DConditionModel(**theirs)).state_dict()
        ours = keys.unet_to_diffusers(on_meta(lambda: UNet(config)).state_dict(), config)
        assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in model.items()}
    model = on_meta(lambda: diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4)).state_dict()
    ours = keys.vae_to_diffusers(on_meta(lambda: AutoencoderKL()).state_dict(), VAEConfig())
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in model.items()}
    model = on_meta(lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))).state_dict()
    ours = keys.text_to_hf(on_meta(lambda: TextEncoder()).state_dict())
    assert {k.removeprefix("text_model."): t.shape for k, t in ours.items()} == {
        k.removeprefix("text_model."): t.shape for k, t in model.items() if not k.endswith("position_ids")}


def test_the_layer_that_diffusers_drops_from_sd2_is_made_good():
    import_open_clip()
    config = TextConfig(width=1024, layers=23, heads=16, quick_gelu=False, pad_with_end=False)
    tensors, published = _as_published(on_meta(lambda: TextEncoder(config)))
    assert published == replace(config, layers=24, skip_last=1)
    assert tensors.keys() == on_meta(lambda: TextEncoder(published)).state_dict().keys()
    # what is added, a layer of zeros, leaves its input alone whether a program runs it or not
    small = tiny("sd2").text
    ids = torch.arange(24).view(2, 12)
    before = small(ids)
    with torch.no_grad():
        for p in small.transformer.resblocks[2].parameters():
            p.zero_()
    small.config = replace(small.config, skip_last=0)
    assert torch.equal(small(ids), before)
    assert _as_published(small)[1] == small.config                               # narrow models stay as they are
