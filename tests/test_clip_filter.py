"""CLIP's similarities against transformers and formulas written out, the filter, and its calibration."""
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ip2p.clip_filter import (SCORES, ClipSimilarity, Thresholds, build_clip, calibrate, import_open_clip, keep, save_clip,
                              store_thresholds)
from ip2p.tensorfiles import read_state_dict

CONFIG = dict(embed_dim=24, vision_cfg=dict(image_size=32, patch_size=16, width=32, layers=2, head_width=16),
              text_cfg=dict(context_length=16, vocab_size=514 + 200, width=32, heads=2, layers=2))
CAPTIONS, EDITED = ["a fox in the snow", "a boat on a lake", "a cat"], ["a fox in the rain", "a red boat on a lake", "a dog"]


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = build_clip(CONFIG)
        for p in clip.parameters():                            # far from its small initial values, so that features differ
            nn.init.normal_(p, std=0.3)
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_clip(clip, CONFIG, path, {})
    return path


@pytest.fixture(scope="module")
def similarity(clip_file):
    return ClipSimilarity.load(clip_file)


def pictures(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- similarities

def test_features_are_those_of_transformers(similarity):
    """The same weights in Hugging Face's CLIPModel, whose projections of q, k and v are three instead of one."""
    transformers = pytest.importorskip("transformers")
    text = dict(vocab_size=714, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=16, hidden_act="gelu", eos_token_id=713)
    vision = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                  patch_size=16, hidden_act="gelu")
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    theirs = transformers.CLIPModel(config).eval()
    ours, state = similarity.clip.state_dict(), {"logit_scale": similarity.clip.logit_scale}
    for here, there in (("visual.transformer.resblocks", "vision_model"), ("transformer.resblocks", "text_model")):
        for i in range(2):
            for kind in ("weight", "bias"):
                a, b = f"{here}.{i}.", f"{there}.encoder.layers.{i}."
                for name, part in zip("qkv", ours[f"{a}attn.in_proj_{kind}"].chunk(3)):
                    state[f"{b}self_attn.{name}_proj.{kind}"] = part
                for x, y in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                             ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                    state[f"{b}{y}.{kind}"] = ours[f"{a}{x}.{kind}"]
    for kind in ("weight", "bias"):
        for x, y in (("visual.ln_pre", "vision_model.pre_layrnorm"), ("visual.ln_post", "vision_model.post_layernorm"),
                     ("ln_final", "text_model.final_layer_norm")):
            state[f"{y}.{kind}"] = ours[f"{x}.{kind}"]
    state |= {"vision_model.embeddings.class_embedding": ours["visual.class_embedding"],
              "vision_model.embeddings.patch_embedding.weight": ours["visual.conv1.weight"],
              "vision_model.embeddings.position_embedding.weight": ours["visual.positional_embedding"],
              "text_model.embeddings.token_embedding.weight": ours["token_embedding.weight"],
              "text_model.embeddings.position_embedding.weight": ours["positional_embedding"],
              "visual_projection.weight": ours["visual.proj"].T, "text_projection.weight": ours["text_projection"].T}
    left = theirs.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and all("position_ids" in key for key in left.missing_keys)
    pixels, ids = pictures(3, 3, 32, 32), similarity.tokenizer(CAPTIONS)
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]
    with torch.no_grad():
        out = theirs(input_ids=ids, pixel_values=((pixels + 1) / 2 - mean) / std)
    assert torch.allclose(similarity.image_features(pixels), out.image_embeds, atol=1e-5)        # of unit length
    assert torch.allclose(similarity.text_features(CAPTIONS), out.text_embeds, atol=1e-5)


def test_scores_are_the_four_cosines(similarity):
    a, b = pictures(3, 3, 48, 40), pictures(3, 3, 48, 40, seed=1)
    rows = similarity(a, b, CAPTIONS, EDITED)
    x, y, u, v = (f.double().numpy() for f in (similarity.image_features(a), similarity.image_features(b),
                                               similarity.text_features(CAPTIONS), similarity.text_features(EDITED)))
    cosine = lambda p, q: (p * q).sum(1) / np.sqrt((p * p).sum(1) * (q * q).sum(1))
    wanted = np.stack([cosine(x, u), cosine(y, v), cosine(y - x, v - u), cosine(x, y)], 1)
    got = np.array([[row[name] for name in SCORES] for row in rows])
    assert np.abs(got - wanted).max() < 1e-5 and np.abs(wanted[:, 2]).min() > 1e-3


def cubic(x, a=-0.75):
    """Keys' cubic convolution kernel (1981), with the a of PyTorch's bicubic."""
    x = abs(x)
    return ((a + 2) * x - (a + 3)) * x * x + 1 if x <= 1 else ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else 0.0


def test_pictures_are_resized_bicubically_without_antialiasing(similarity):
    """A 64 x 48 picture reaches the tower as the interpolation at 32 x 32 points, not as an average of areas."""
    def weights(n, m):
        rows = np.zeros((m, n))
        for i in range(m):
            centre = (i + 0.5) * n / m - 0.5
            for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
                rows[i, min(max(j, 0), n - 1)] += cubic(centre - j)
        return rows
    pixels = pictures(1, 3, 64, 48) * 0.5
    small = weights(64, 32) @ pixels.double().numpy() @ weights(48, 32).T
    assert torch.allclose(similarity.image_features(pixels), similarity.image_features(torch.tensor(small)), atol=1e-5)


def test_the_pictures_unchanged_give_no_direction(similarity):
    a = pictures(2, 3, 32, 32)
    for row in similarity(a, a, CAPTIONS[:2], EDITED[:2]):
        assert row["clip_sim_dir"] == 0 and abs(row["clip_sim_image"] - 1) < 1e-6


@pytest.mark.parametrize("pixels", [torch.rand(1, 3, 32, 32) * 255, torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
                                    torch.full((1, 3, 32, 32), -2.0)])
def test_pixels_of_another_range_are_refused(similarity, pixels):
    with pytest.raises(ValueError, match=r"floats in \[-1, 1\]"):
        similarity.image_features(pixels)


# ---- the filter

def row(direction, a=0.9, b=0.9, image=0.9):
    return dict(zip(SCORES, (a, b, direction, image)))


def test_keep_takes_the_greatest_direction_similarity_of_those_that_pass():
    rows = [row(0.3), row(0.5), row(0.1), row(0.4), row(0.9, image=0.69), row(0.8, a=0.19), row(0.8, b=0.19),
            row(float("nan"))]
    assert [r["clip_sim_dir"] for r in keep(rows, Thresholds(), 2)] == [0.5, 0.4]
    assert [r["clip_sim_dir"] for r in keep(rows, Thresholds(), 9)] == [0.5, 0.4, 0.3]
    assert keep([row(0.2, 0.2, 0.2, 0.7)], Thresholds(), 1)                # what equals a threshold passes
    assert len(keep(rows, Thresholds(-1, -1, -1), 9)) == 7                 # all but what is not a number
    assert keep([], Thresholds(), 4) == [] == keep(rows, Thresholds(), 0)


# ---- other CLIPs

def test_thresholds_go_with_the_file_and_leave_its_tensors_alone(clip_file, tmp_path):
    path = tmp_path / "clip.safetensors"
    shutil.copy(clip_file, path)
    assert Thresholds.of(path) == Thresholds(0.2, 0.2, 0.7)
    store_thresholds(path, Thresholds(0.5, 0.25, 0.125))
    (before, a), (after, b) = read_state_dict(clip_file), read_state_dict(path)
    assert Thresholds.of(path) == Thresholds(0.5, 0.25, 0.125) and a["clip"] == b["clip"]
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.safetensors"]


def test_a_clip_of_open_clip_by_name_and_file(tmp_path, monkeypatch):
    open_clip = import_open_clip()
    (tmp_path / "toy.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "toy.json")
    torch.manual_seed(1)
    model = open_clip.create_model("toy")
    torch.save(model.state_dict(), tmp_path / "toy.pt")
    name = f"toy:{tmp_path / 'toy.pt'}"
    similarity = ClipSimilarity.load(name)
    assert Thresholds.of(name) == Thresholds() and similarity.size == (32, 32)
    a = pictures(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model.eval().encode_image(open_clip_normalized(open_clip, model, a), normalize=True)
    assert torch.allclose(similarity.image_features(a), wanted, atol=1e-6)


def open_clip_normalized(open_clip, model, pixels):
    wanted = open_clip.get_model_preprocess_cfg(model)
    return ((pixels + 1) / 2 - torch.tensor(wanted["mean"])[:, None, None]) / torch.tensor(wanted["std"])[:, None, None]


def test_openai_files_are_read_as_they_were_published(tmp_path):
    """A TorchScript archive in half precision, with the sizes among its buffers, and quick GELU unsaid."""
    config = dict(embed_dim=24, vision_cfg=dict(image_size=32, patch_size=16, width=64, layers=2),
                  text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=1, layers=2), quick_gelu=True)
    clip = build_clip(config).half().float().eval()

    def without_code(module):
        bare = nn.Module()
        for name, tensor in module.named_parameters(recurse=False):
            bare.register_parameter(name, nn.Parameter(tensor.detach().half()))
        for name, child in module.named_children():
            bare.add_module(name, without_code(child))
        return bare

    archive = without_code(clip)
    for name, value in dict(input_resolution=32, context_length=77, vocab_size=49408).items():
        archive.register_buffer(name, torch.tensor(value))
    torch.jit.script(archive).save(tmp_path / "ViT-B-32.pt")
    loaded = ClipSimilarity.load(f"ViT-B-32-quickgelu:{tmp_path / 'ViT-B-32.pt'}")
    a = pictures(2, 3, 32, 32)
    with torch.no_grad():
        wanted = clip.encode_image(open_clip_normalized(import_open_clip(), loaded.clip, a), normalize=True)
        assert torch.allclose(loaded.image_features(a), wanted, atol=1e-6)
        ids = loaded.tokenizer(CAPTIONS)
        assert torch.allclose(loaded.clip.encode_text(ids), clip.encode_text(ids), atol=1e-6)


@pytest.mark.parametrize("name, words", [
    ("nothing.safetensors", "no such file"), ("ViT-L-15:openai", "neither a CLIP file nor a name"),
    ("ViT-L-14:", "one of openai"), ("ViT-L-14:openay", "one of openai"), ("ViT-B-32:{file}", "cannot be loaded")])
def test_what_cannot_be_loaded_is_one_line(name, words, clip_file):
    with pytest.raises(ValueError, match=words) as caught:
        ClipSimilarity.load(name.format(file=clip_file))
    assert "\n" not in str(caught.value)


def test_openai_weights_come_with_quick_gelu_and_a_failed_download_is_one_line(monkeypatch, capfd):
    open_clip, asked = import_open_clip(), {}

    def create_model(name, pretrained, **options):
        asked.update(options)
        raise OSError("no\nnetwork")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(ValueError, match=r"ViT-L-14:openai: cannot be loaded \(no network\); download its weights"):
        ClipSimilarity.load("ViT-L-14:openai")
    assert asked["force_quick_gelu"] and capfd.readouterr().err == ""


# ---- thresholds for a CLIP of the miniature

class KnowingClip:
    """Stands for a perfect judge: a pair's score is the share of pixels in which the edited picture is the true one."""

    def __init__(self):
        self.seen = []

    def __call__(self, a, b, captions, edited):
        self.seen.append((a, b, captions, edited))
        true = self.seen[len(self.seen) - 1 - (len(self.seen) - 1) % 4][1]
        right = ((b - true).abs().amax(1) < 0.01).float().mean((1, 2)).tolist()
        return [dict(zip(SCORES, (0.5 + 0.1 * r, 0.6, r, 0.8))) for r in right]


def test_calibration_separates_right_from_wrong():
    from ip2p.world import World
    judge = KnowingClip()
    thresholds, table = calibrate(judge, World(), count=70)
    assert thresholds.caption == 0.6 and thresholds.image == 0.8 and 0.5 < thresholds.direction <= 1
    assert len(judge.seen) == 8 and [len(a) for a, *_ in judge.seen] == [64] * 4 + [6] * 4        # 70 of each kind
    passes = {line[:23].strip(): line.split()[-1] for line in table.splitlines()[1:]}
    assert passes["right"] == "100%" and set(passes) == {"right", "nothing edited", "opposite edit", "another scene"}
    assert all(int(passes[k][:-1]) < 20 for k in passes if k != "right")


def test_the_command_stores_what_calibration_finds(tmp_path, monkeypatch, capsys):
    from making_data import ROOT, make_data

    from ip2p.world import World
    path, few = tmp_path / "clip.safetensors", partial(calibrate, count=4)
    shutil.copy(ROOT / "weights/mini-clip.safetensors", path)
    store_thresholds(path, Thresholds())
    monkeypatch.setattr("ip2p.clip_filter.calibrate", few)
    assert make_data.run(["--calibrate", "--clip", str(path), "--device", "cpu"]) == 0
    thresholds, table = few(ClipSimilarity.load(path), World())
    assert capsys.readouterr().out == f"{table}\n{thresholds}\nstored in {path}\n"
    assert Thresholds.of(path) == thresholds != Thresholds()


def test_the_shipped_clip_is_calibrated():
    path = Path(__file__).parent.parent / "weights" / "mini-clip.safetensors"
    if not path.exists():
        pytest.skip("no shipped weights here")
    assert set(read_state_dict(path)[1]["thresholds"]) == {"caption", "direction", "image"}
