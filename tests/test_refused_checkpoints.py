"""Files and folders that are no checkpoint of ours: each is refused by name, with the reason."""
import json
import pickle
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch
from checkpoints import error_of, public, published_like, tiny

from ip2p.checkpoint import read_state_dict, save_checkpoint
from ip2p.text import TextEncoder

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_parts_that_do_not_go_together(tmp_path):
    mine, other = tiny("sd1"), tiny("odd")
    narrow = TextEncoder(replace(mine.text.config, width=32))
    save_checkpoint(replace(mine, text=narrow), tmp_path / "text.safetensors")
    assert "its UNet reads texts 64 wide, its text encoder's are 32" in error_of(tmp_path / "text.safetensors")
    save_checkpoint(other, tmp_path / "odd.safetensors")
    save_checkpoint(mine, tmp_path / "good.safetensors")
    message = error_of(tmp_path / "good.safetensors", vae=tmp_path / "odd.safetensors")
    assert "odd.safetensors: its autoencoder's latents have 6 channels, those of" in message and message.endswith("UNet 4")


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
    assert "unknown keys: 1 (cond_stage_model.odd)" in refused(**{"cond_stage_model.odd": torch.ones(1)})
    for name, words in (("conditioner.embedders.1.model.ln_final.weight", "is of Stable Diffusion XL"),
                        (unet + "joint_blocks.0.x_block.mlp.fc1.weight", "is of Stable Diffusion 3")):
        message = refused(**{name: torch.ones(1)})
        assert words in message and "needed a whole checkpoint of Stable Diffusion 1 or 2" in message
    message = refused(**{unet + "out.2.bias": torch.ones(3), unet + "out.0.bias": None, unet + "x": torch.ones(1)})
    for words in ("out.2.bias is (3,) instead of (4,)", "missing keys: 1 (out.0.bias)", "unknown keys: 1 (x)"):
        assert words in message
    assert "holds no VAE" in refused(**{k: None for k in state if k.startswith("first_stage_model")})
    assert "holds no text encoder" in refused(**{k: None for k in state if k.startswith("cond_stage_model")})
    both = {"cond_stage_model.model." + k: v for k, v in saved[0].text.state_dict().items()}
    assert "holds two text encoders" in refused(**both)
    no_unet = {k: None for k in state if k.startswith(unet)}
    assert "holds no UNet" in refused(**no_unet)
    for name in ("unet.down_blocks.0.lora_A.weight", "lora_unet_mid.alpha"):
        message = refused(**no_unet, **{name: torch.ones(1)})
        assert "is a LoRA" in message and "needed a whole checkpoint of Stable Diffusion 1 or 2" in message
    for part, name, value, words in (
            ("unet", "num_heads", 7, "channels cannot be shared out among 7 heads"), ("unet", "num_heads", 0, "among 0 heads"),
            ("vae", "scale_factor", 0, "scale_factor must be positive, got 0"), ("vae", "scale_factor", None, "not supported"),
            ("text", "skip_last", 99, "skip_last must be in 0.."), ("text", "skip_last", "1", "not supported")):
        own = record[part].get(name)
        record[part][name] = value
        assert words in (message := refused()), message
        record[part][name] = own
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
    assert "two text encoders, as Stable Diffusion XL" in spoilt(lambda: (folder / "text_encoder_2").mkdir())
    for names in ([], None, {}, {"a": 1}):
        def spoil_index(weights=folder / "unet/diffusion_pytorch_model.safetensors", names=names):
            weights.unlink()
            weights.with_name(f"{weights.name}.index.json").write_text(json.dumps({"weight_map": names}))
        assert "needed a weight_map" in spoilt(spoil_index)
    assert "norm_eps must be 1e-05, got 0.001" in spoilt(lambda: edit("unet/config.json", norm_eps=1e-3))
    for heads in (0, [0, 0], "8", None):
        assert "must be positive integers" in spoilt(lambda: edit("unet/config.json", attention_head_dim=heads, num_attention_heads=None))
    assert "must be positive integers" in spoilt(lambda: edit("unet/config.json", block_out_channels=32))
    assert 'must be "eps" or "v", got [' in spoilt(lambda: edit("scheduler/scheduler_config.json", prediction_type=["epsilon"]))
    assert "hidden_act" in spoilt(lambda: edit("text_encoder/config.json", hidden_act="relu"))
    assert "got 'sample'" in spoilt(lambda: edit("scheduler/scheduler_config.json", prediction_type="sample"))
    assert "beta_end must be 0.012" in spoilt(lambda: edit("scheduler/scheduler_config.json", beta_end=0.02))
