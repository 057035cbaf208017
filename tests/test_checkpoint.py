"""Checkpoints in and out: files of ours, the published layouts, the hub."""
import fnmatch
import json
import os
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from checkpoints import error_of, public, published_like, randomised, relative_error, same, same_parts, tiny

from ip2p import keys
from ip2p.checkpoint import load_checkpoint, load_vae, read_state_dict, save_checkpoint, save_vae
from ip2p.tensorfiles import replacing, small_dtype
from ip2p.text import TextEncoder

pytestmark = pytest.mark.usefixtures("one_thread")


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
    (tmp_path / "f/.git").mkdir()
    with pytest.raises(ValueError, match=r"holds more than a model: 1 \(.git\); not overwritten"):
        save_checkpoint(parts, tmp_path / "f", "diffusers")
    assert (tmp_path / "f/.git").is_dir() and load_checkpoint(tmp_path / "f").metadata["steps"] == 14
    with pytest.raises(ValueError, match="layout"):
        save_checkpoint(parts, tmp_path / "x.safetensors", "onnx")
    with pytest.raises(ValueError, match="ends in"):
        save_checkpoint(parts, tmp_path / "x.png")


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 2])
def test_a_folder_stopped_while_it_is_replaced_is_the_old_one(tmp_path, monkeypatch, at, error):
    (tmp_path / "f").mkdir()
    (tmp_path / "f/old").touch()
    renames, replace_file = [], os.replace

    def replace_or_stop(*paths):
        renames.append(paths)
        if len(renames) == at:
            raise error
        replace_file(*paths)

    monkeypatch.setattr(os, "replace", replace_or_stop)
    with pytest.raises(type(error)), replacing(tmp_path / "f") as temporary:
        temporary.mkdir()
    assert len(renames) >= at and [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["f", "f/old"]


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f/old").touch()
    with pytest.raises(ValueError, match="f: is a folder"), replacing(tmp_path / "f") as temporary:
        temporary.write_text("new")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["f", "f/old"]


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


@pytest.mark.skipif(sys.platform != "linux", reason="about Linux's way of lending memory")
def test_a_file_larger_than_memory_is_opened(tmp_path):
    """A sparse one, of which a number at its end is read."""
    size = 1 << 40
    header = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    x = read_state_dict(tmp_path / "x.safetensors")[0]["x"]
    assert x.shape == (size // 4,) and x[-1] == 0


@pytest.mark.parametrize("layers, run", [(24, 23), (23, 23)], ids=["the original", "made of a diffusers folder"])
def test_sd2_in_a_single_file_runs_the_layers_that_it_should(tmp_path, layers, run):
    """The original runs 23 of its 24 layers; diffusers' folders have those alone, and so has a file made of one."""
    parts = published_like("sd2")
    parts.text = randomised(TextEncoder(replace(parts.text.config, layers=24, skip_last=1)), 7)
    tensors = {name: t for name, t in public(parts).items() if f".resblocks.{layers}." not in name}
    torch.save({"state_dict": tensors}, tmp_path / "x.ckpt")
    text = load_checkpoint(tmp_path / "x.ckpt", parameterization="eps").text
    assert text.config.layers - text.config.skip_last == run
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(text(ids), parts.text(ids))


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
    whole = (tmp_path / "sd.safetensors").read_bytes()
    save_checkpoint(tiny("odd", seed=61), tmp_path / "sd.safetensors")        # another by the same name is noticed
    assert "VAE was stored in sd.safetensors, but the file beside it is another by now" in error_of(tmp_path / "own-text.safetensors")
    (tmp_path / "sd.safetensors").write_bytes(whole)
    assert same(load_vae(tmp_path / "edit.safetensors"), base.vae)            # alone too
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


def test_the_scale_of_the_latents_may_be_a_buffer(tmp_path):
    """Latent diffusion's `scale_by_std` measures it on a run's first batch and stores it with the weights."""
    parts = published_like("sd1")
    state = public(parts) | {"scale_factor": torch.tensor(0.25)}
    torch.save({"state_dict": state}, tmp_path / "m.ckpt")
    parts.vae.config = replace(parts.vae.config, scale_factor=0.25)
    assert same_parts(load_checkpoint(tmp_path / "m.ckpt"), parts)
    for wrong, complaint in ((torch.ones(2), "scale_factor must be one number, got the shape (2,)"),
                             (torch.tensor(-1.0), "scale_factor must be positive, got -1.0")):
        torch.save(state | {"scale_factor": wrong}, tmp_path / "m.ckpt")
        assert complaint in error_of(tmp_path / "m.ckpt")


def test_what_a_merge_of_models_leaves_is_ignored_and_said(tmp_path, capsys):
    parts = published_like("sd1")
    state = public(parts) | {f"{name}.weight": torch.ones(2) for name in ("lora_unet_mid", "control_model.out.0", "embedding_manager.x")}
    torch.save({"state_dict": state}, tmp_path / "m.ckpt")
    assert same_parts(load_checkpoint(tmp_path / "m.ckpt"), parts)
    assert "ignored what is no part of Stable Diffusion: 3 (control_model.out.0.weight, " in capsys.readouterr().err


def test_attention_of_an_autoencoder_as_matrices(tmp_path):
    """As converters write it that forget the original's 1 x 1 convolutions."""
    parts = published_like("sd1")
    state = {name: tensor[:, :, 0, 0] if ".mid.attn_1." in name and tensor.ndim == 4 else tensor
             for name, tensor in public(parts).items()}
    assert sum(tensor.ndim == 2 for name, tensor in state.items() if name.startswith("first_stage_model")) == 8
    torch.save({"state_dict": state}, tmp_path / "m.ckpt")
    assert same_parts(load_checkpoint(tmp_path / "m.ckpt"), parts)


def test_ema_is_preferred_if_it_fits(tmp_path, capsys):
    parts, averaged = published_like("sd1"), published_like("sd1")
    randomised(averaged.unet, 99)
    ema = {"model_ema." + f"diffusion_model.{k}".replace(".", ""): v for k, v in averaged.unet.state_dict().items()}
    ema |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    assert "model_ema.diffusion_modelinput_blocks00weight" in ema             # as in the published files
    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": public(parts) | ema}, path)
    assert same(load_checkpoint(path).unet, averaged.unet)
    assert same(load_checkpoint(path, ema=False).unet, parts.unet)
    assert capsys.readouterr().err == ""
    less = {k: v for k, v in ema.items() if not k.startswith("model_ema.diffusion_modeltime_embed")}
    name = "model_ema.diffusion_modelinput_blocks00weight"                      # of a text-to-image model, before it was widened
    for other in (less, ema | {"model_ema.odd": torch.ones(1)}, ema | {name: ema[name][:, :2]}):
        torch.save({"state_dict": public(parts) | other}, path)
        assert same(load_checkpoint(path).unet, parts.unet)
        assert f"{path}: ignored its averaged weights (EMA), which do not fit the others" in capsys.readouterr().err


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


def test_the_miniature_is_stored_small(tmp_path):
    """A text encoder's matrices and a UNet's convolutions in 8 bits, a power of two and 3 bits of fraction each: they round by
    a sixteenth at most, down to 2^-6, and below it by half of 2^-9."""
    parts = tiny("sd2")
    save_checkpoint(parts, tmp_path / "m.safetensors", dtype=small_dtype)
    stored, _ = read_state_dict(tmp_path / "m.safetensors")
    eight = {name for name, t in stored.items() if t.dtype == torch.float8_e4m3fn}
    inner = {f"cond_stage_model.model.transformer.resblocks.{i}.{name}" for i in range(parts.text.config.layers)
             for name in ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")}
    convolutions = {f"model.diffusion_model.{name}.weight" for name, module in parts.unet.named_modules()
                    if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3)}
    assert eight == inner | convolutions and {t.dtype for n, t in stored.items() if n not in eight} == {torch.float16}
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    for prefix, part, given in (("cond_stage_model.model.", loaded.text, parts.text),
                                ("model.diffusion_model.", loaded.unet, parts.unet)):
        for name, weight in given.state_dict().items():
            error, rounded = (part.state_dict()[name] - weight).abs(), prefix + name in eight
            assert (error <= (weight.abs().clamp(min=2 ** -6) / 16 if rounded else weight.abs() / 1024 + 1e-7)).all()
            assert not rounded or error.any()


def test_a_link_to_a_folder_is_replaced_and_nothing_is_left_behind(tmp_path, saved):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_checkpoint(saved[0], tmp_path / "link", "diffusers")
    assert same_parts(load_checkpoint(tmp_path / "link"), saved[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"] and not any((tmp_path / "real").iterdir())


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


def test_widened_input_ignores_what_is_new(tmp_path):
    parts = tiny("sd1", in_channels=4)
    save_checkpoint(parts, tmp_path / "four.safetensors")
    wide = load_checkpoint(tmp_path / "four.safetensors")
    wide.unet.widen(8)
    assert wide.unet.config == replace(parts.unet.config, in_channels=8)
    assert not any(weight.requires_grad for weight in wide.unet.parameters())
    assert torch.equal(wide.unet.input_blocks[0][0].bias, parts.unet.input_blocks[0][0].bias)
    generator = torch.Generator().manual_seed(1)
    x, image, context = (torch.randn(s, generator=generator) for s in ((2, 4, 8, 8), (2, 4, 8, 8), (2, 5, 64)))
    t = torch.tensor([10, 900])
    assert relative_error(wide.unet(torch.cat([x, image], 1), t, context), parts.unet(x, t, context)) < 1e-6
    save_checkpoint(wide, tmp_path / "eight.safetensors")                     # the record now says eight
    assert same_parts(load_checkpoint(tmp_path / "eight.safetensors"), wide)


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
    assert (kind, size) == ("v", 768) and message.count("\n") == 1 and "--parameterization eps" in message
    kind, size, message = opened({"global_step": 875000})
    assert (kind, size) == ("eps", 512) and "--parameterization v" in message
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
    for name, value in dict(image_size="big", parameterization=["eps"], sample_steps="8", cfg_text=[1], cfg_image=None).items():
        torch.save({"state_dict": state, "ip2p": {"parameterization": "eps", name: value}}, path)
        assert f"{name} must be" in error_of(path)


def test_sample_size_of_old_folders_means_nothing(tmp_path, saved):
    """Before 0.9 diffusers wrote 32 in every folder, and later versions take 64 for it."""
    shutil.copytree(saved[2], tmp_path / "folder")
    config = tmp_path / "folder/unet/config.json"
    told, cell = json.loads(config.read_text()), 2 ** (len(saved[0].vae.config.channel_mult) - 1)
    for version, side in (("0.6.0", 64), ("0.8.1", 64), ("0.9.0", 32), ("0.42.1", 32)):
        config.write_text(json.dumps(told | {"sample_size": 32, "_diffusers_version": version}))
        assert load_checkpoint(tmp_path / "folder").image_size == side * cell


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


# ---- the hub ----

def test_hub_ids_with_pickles_alone_and_of_an_autoencoder(tmp_path, saved, monkeypatch):
    """A snapshot holds what was asked for of these folders: one with .bin files, one with a VAE at its root."""
    hub = pytest.importorskip("huggingface_hub")
    parts, _, folder = saved
    shutil.copytree(folder, tmp_path / "name/pickles")
    for file in list((tmp_path / "name/pickles").rglob("*.safetensors")):
        name = "pytorch_model" if file.stem == "model" else file.stem
        torch.save(read_state_dict(file)[0], file.with_name(f"{name}.bin"))
        file.unlink()
    shutil.copytree(folder / "vae", tmp_path / "name/vae")
    asked = []

    def snapshot(repo_id, allow_patterns):
        asked.append(allow_patterns)
        for file in (tmp_path / repo_id).rglob("*"):
            relative = file.relative_to(tmp_path / repo_id)
            if file.is_file() and any(fnmatch.fnmatch(str(relative), pattern) for pattern in allow_patterns):
                (tmp_path / "cache" / repo_id / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / "cache" / repo_id / relative)
        return str(tmp_path / "cache" / repo_id)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    (tmp_path / "cache").mkdir()
    monkeypatch.chdir(tmp_path / "cache")
    assert same_parts(load_checkpoint("name/pickles"), parts)
    assert same(load_vae("name/vae"), parts.vae)
    assert not any(pattern.endswith(".bin") for pattern in asked[0])
    mixed = shutil.copytree(folder, tmp_path / "name/mixed")                        # one part as .bin alone
    shutil.copy(tmp_path / "name/pickles/text_encoder/pytorch_model.bin", mixed / "text_encoder")
    (mixed / "text_encoder/model.safetensors").unlink()
    assert same_parts(load_checkpoint("name/mixed"), parts)


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
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path / "never made"))
    assert "holds no diffusers folder on Hugging Face; download its .safetensors" in error_of("timbrooks/instruct-pix2pix")
    monkeypatch.setattr(hub, "snapshot_download", half_only)
    assert same_parts(load_checkpoint("timbrooks/instruct-pix2pix"), saved[0])
    assert len(asked) == 2 and not any(p.startswith("safety_checker") or p.endswith((".bin", ".ckpt")) for p in asked[0])
