"""sample.py: pictures of every kind in, edits and sheets out, and one clear line for what cannot work."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import tiny
from pictures import colors
from PIL import Image

from ip2p import InstructPix2Pix, prompt_to_prompt
from ip2p.checkpoint import Parts, load_checkpoint, read_state_dict, save_checkpoint
from ip2p.grid import grid_sheet
from ip2p.images import open_image, to_images, to_pixels
from ip2p.keys import ema_name
from ip2p.samplers import SAMPLERS
from ip2p.text import TextConfig, TextEncoder
from ip2p.unet import UNet, UNetConfig
from ip2p.vae import AutoencoderKL, VAEConfig

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("sample", ROOT / "sample.py")
sample = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sample)


# ---- a model of random weights, pictures, and the command

def write_model(path, in_channels=8, **metadata):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(UNetConfig(in_channels=in_channels, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
                               attention_levels=(True, True), context_dim=32, num_heads=2, norm_groups=8))
        vae = AutoencoderKL(VAEConfig(channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4))
        text = TextEncoder(TextConfig(vocab_size=514 + 200, context_length=16, width=32, layers=2, heads=2))
        save_checkpoint(Parts(unet, vae, text, "eps", 32, metadata), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def cli(model, tmp_path, capsys):
    """Runs sample.py on a 48x32 picture; later flags replace earlier ones. Returns its status, stdout, stderr, results."""
    colors(48, 32).save(tmp_path / "fox.png")
    out = tmp_path / "out"

    def run(*flags):
        before = set(out.glob("*")) if out.is_dir() else set()
        try:
            code = sample.run(["--image", str(tmp_path / "fox.png"), "--prompt", "make it night", "--model", str(model),
                               "--output", str(out), "--steps", "2", "--device", "cpu", *map(str, flags)])
        except SystemExit as end:                              # argparse's
            code = end.code
        text = capsys.readouterr()
        files = sorted(set(out.glob("*")) - before) if out.is_dir() else []
        return SimpleNamespace(code=code, out=text.out, err=text.err, files=files, names=[f.name for f in files])

    return run


@pytest.fixture
def refused(cli):
    """Runs sample.py on what cannot work: exactly one line on stderr and status 2. Returns the line."""
    def run(*flags):
        result = cli(*flags)
        assert result.code == 2 and not result.files, result
        assert result.err.startswith("sample.py: ") and result.err.count("\n") == 1 and result.err.endswith("\n"), result.err
        return result.err
    return run


def record(path):
    return json.loads(Image.open(path).text["ip2p"])


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


# ---- pictures in

def test_edit_takes_a_picture_upright_before_it_takes_its_size(model):
    picture, exif = colors(48, 24), Image.Exif()
    exif[0x0112] = 6
    turned = picture.rotate(90, expand=True)                   # to be shown turned by 90 degrees clockwise
    turned.info["exif"] = exif.tobytes()
    editor = InstructPix2Pix.load(model)
    wanted, got = (editor.edit(p, "night", steps=1, progress=False)[0] for p in (picture, turned))
    assert got.size == (32, 16) and np.array_equal(np.asarray(got), np.asarray(wanted))


def test_animation_gives_its_first_frame(cli, tmp_path):
    frames = [Image.new("RGB", (24, 16), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert set(open_image(tmp_path / "x.gif").getdata()) == {(255, 0, 0)}
    result = cli("--image", tmp_path / "x.gif")
    assert result.code == 0 and Image.open(result.files[0]).size == (24, 16)


# ---- pictures out

def test_result_has_the_size_of_the_input_or_of_the_model(cli, tmp_path):
    colors(100, 41).save(tmp_path / "wide.jpg")
    for flags, size in (([], (100, 41)), (["--keep-model-size"], (32, 16)), (["--keep-model-size", "--size", "64"], (64, 24))):
        result = cli("--image", tmp_path / "wide.jpg", *flags)
        assert result.code == 0 and [Image.open(f).size for f in result.files] == [size]


def test_every_prompt_for_every_picture_and_no_name_taken_twice(cli, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        colors(16, 16).save(tmp_path / folder / "fox.png")
    flags = ["--image", tmp_path / "a", tmp_path / "b" / "fox.png", "--prompt", "Make it night!", "make it night", "下雪"]
    first = cli(*flags)
    assert first.names == ["fox-make-it-night-2.png", "fox-make-it-night-3.png", "fox-make-it-night-4.png",
                           "fox-make-it-night.png", "fox-下雪-2.png", "fox-下雪.png"]
    before = [f.read_bytes() for f in first.files]
    again = cli(*flags)
    assert len(again.files) == 6 and [f.read_bytes() for f in first.files] == before
    assert sorted(again.out.splitlines()[1:]) == sorted(map(str, again.files))           # below the settings


def test_a_name_is_taken_at_once_and_given_back_on_failure(tmp_path):
    """As another process would find it, while the picture is being written."""
    with sample.new_file(tmp_path, ["fox", "make it night"]) as first, sample.new_file(tmp_path, ["fox", "Make it night!"]) as second:
        assert (first.name, second.name) == ("fox-make-it-night.png", "fox-make-it-night-2.png")
    with pytest.raises(OSError), sample.new_file(tmp_path, ["fox", "make it night"]):
        raise OSError("no space left")
    assert sorted(tmp_path.iterdir()) == [second, first]


def test_several_images_have_several_seeds(cli):
    many = cli("--num-images", 3, "--seed", 5, "--batch-size", 2)
    assert many.names == [f"fox-make-it-night-{seed}.png" for seed in (5, 6, 7)]
    alone = cli("--seed", 7)
    assert record(alone.files[0]) == record(many.files[2]) and record(many.files[0])["seed"] == 5
    assert np.abs(pixels(alone.files[0]) - pixels(many.files[2])).max() <= 1             # rounding
    assert np.abs(pixels(many.files[0]) - pixels(many.files[2])).max() > 20


def test_low_memory_makes_the_same_picture(cli):
    plain, sparing = cli(), cli("--low-memory")
    assert np.abs(pixels(plain.files[0]) - pixels(sparing.files[0])).max() <= 1          # rounding


@pytest.mark.parametrize("suffix, format", [(".png", "PNG"), (".jpg", "JPEG"), (".JPEG", "JPEG"), (".webp", "WEBP")])
def test_output_file(cli, tmp_path, suffix, format):
    target = tmp_path / "new" / "folder" / f"night{suffix}"
    assert cli("--output", target).code == 0
    again = cli("--output", target)                            # a result may be replaced where it can be told that it is one
    assert again.code == (0 if suffix == ".png" else 2)
    assert Image.open(target).format == format and Image.open(target).size == (48, 32)
    assert list(target.parent.iterdir()) == [target]


def test_png_tells_how_to_make_it_again(cli, tmp_path):
    made = cli("--prompt", 'add a "ball"', "--negative-prompt", "rain", "--seed", 11, "--steps", 3, "--sampler", "euler-ancestral",
               "--cfg-text", 2.5, "--cfg-image", 1.25, "--size", 40).files[0]
    told = record(made)
    assert told == {"image": "fox.png", "prompt": 'add a "ball"', "negative_prompt": "rain", "seed": 11, "steps": 3, "eta": 1.0,
                    "sampler": "euler-ancestral", "cfg_text": 2.5, "cfg_image": 1.25, "size": 40, "model": "tiny.safetensors",
                    "vae": None, "parameterization": None, "dtype": "fp32", "method": "ip2p"}
    flags = [f for key in ("prompt", "negative_prompt", "seed", "steps", "sampler", "cfg_text", "cfg_image", "size", "dtype")
             for f in (f"--{key.replace('_', '-')}", told[key])]
    again = cli(*flags).files[0]
    assert np.array_equal(pixels(made), pixels(again)) and again != made


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_result_does_not_depend_on_the_batch(cli, tmp_path, sampler):
    """Pictures of three sizes, two instructions for each, two seeds: one result at a time, or six."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i, size in enumerate([(48, 32), (32, 48), (48, 32), (48, 32), (40, 40)]):
        colors(*size, seed=i).save(folder / f"{i}.png")
    flags = ("--image", folder, "--prompt", "make it night", "add a dog", "--num-images", 2, "--sampler", sampler)
    one, many = (cli(*flags, "--batch-size", n).files for n in (1, 6))
    assert len(one) == len(many) == 20
    for i, (a, b) in enumerate(zip(one, many)):
        assert record(a) == record(b) and record(a)["image"] == f"{i // 4}.png"
        assert np.abs(pixels(a) - pixels(b)).max() <= 1        # other sums in larger convolutions


def test_one_bad_picture_in_a_folder(cli, tmp_path):
    folder = tmp_path / "many"
    (folder / "deeper").mkdir(parents=True)
    for name in ("a.png", "c.JPG", ".hidden.png"):
        colors(24, 16).save(folder / name)
    (folder / "b.png").write_text("not a picture")
    (folder / "notes.txt").write_text("not a picture, nor said to be one")
    result = cli("--image", folder, tmp_path / "missing.png", "--batch-size", 1)
    complaints = [line for line in result.err.splitlines() if line.startswith("sample.py:")]
    assert result.code == 2 and result.names == ["a-make-it-night.png", "c-make-it-night.png"]
    assert len(complaints) == 2 and "b.png: not a picture" in complaints[0] and "missing.png: no such" in complaints[1]


# ---- sheets

def test_grid(cli):
    flags = ["--keep-model-size", "--size", 128]
    sheet = cli("--grid", "--cfg-text", 1, 3, "--cfg-image", 1, 1.5, 2, *flags).files
    corner = cli("--cfg-text", 3, "--cfg-image", 2, *flags).files[0]
    assert [f.name for f in sheet] == ["fox-make-it-night-grid.png"]
    assert record(sheet[0])["cfg_text"] == [1, 3] and record(sheet[0])["cfg_image"] == [1, 1.5, 2]
    image = Image.open(sheet[0])
    w, h = Image.open(corner).size
    assert (w, h) == (128, 88)                                 # 128 * 32 / 48 = 85.3
    assert 3 * w < image.width < 5 * w and 3 * h < image.height < 5 * h                  # the rest is for labels
    gap = 6                                                    # half of the smallest type's 13 pixels
    box = (image.width - gap - w, image.height - gap - h, image.width - gap, image.height - gap)
    assert np.array_equal(np.asarray(image.crop(box)), pixels(corner))


def test_grid_with_single_scales_shows_input_and_result(cli):
    result = cli("--grid")
    assert result.code == 0 and result.names == ["fox-make-it-night-grid.png"]


def test_sheet_grows_by_its_cells():
    picture, cell = colors(128, 96), Image.new("RGB", (128, 96), "red")
    sizes = {(n, m): grid_sheet(picture, [cell] * (n * m), "make it night", [7.5] * n, [1.5] * m).size
             for n in (1, 2, 3) for m in (1, 2)}
    assert all(sizes[n + 1, 1][0] - sizes[n, 1][0] == 128 + 6 for n in (1, 2))
    assert all(sizes[n, 2][1] - sizes[n, 1][1] == 96 + 6 for n in (1, 2, 3))
    sheet = grid_sheet(picture, [cell] * 2, "word " * 1000, [7.5] * 2, [1.5])
    assert sheet.width == sizes[2, 1][0] and sheet.height < sizes[2, 1][1] + 3 * 20     # three lines of title at most
    assert (np.asarray(sheet) == [255, 0, 0]).all(-1).sum() == 2 * 128 * 96


# ---- prompts and settings

def test_empty_prompt_gives_the_picture_through_the_autoencoder(cli, model, tmp_path):
    result = cli("--prompt", " ", "--keep-model-size")
    assert result.code == 0 and result.names == ["fox.png"] and "note: an empty prompt" in result.err
    vae = InstructPix2Pix.load(model).vae
    x = to_pixels(open_image(tmp_path / "fox.png"), 32, 24)[None]
    with torch.no_grad():
        expected, = to_images(vae.decode(vae.encode(x).mode()))
    assert np.array_equal(pixels(result.files[0]), np.asarray(expected))


def test_a_prompt_of_signs_and_a_picture_without_a_name_make_a_file(cli, tmp_path):
    colors(24, 16).save(tmp_path / "-.png")
    assert cli("--image", tmp_path / "-.png", "--prompt", "!").names == ["picture.png"]


def test_long_prompt_is_cut_with_a_note(cli):
    words = " ".join(["night"] * 1000)
    result = cli("--prompt", words)
    assert result.code == 0 and len(result.files) == 1 and record(result.files[0])["prompt"] == words
    assert "its first 14 are kept" in result.err and max(map(len, result.err.splitlines())) < 300


def test_model_brings_its_own_settings(cli, tmp_path):
    own = write_model(tmp_path / "own.safetensors", cfg_text=4.0, cfg_image=1.2, sample_steps=3, steps=20000)
    told = record(cli("--model", own, "--cfg-image", 2).files[0])
    assert (told["cfg_text"], told["cfg_image"], told["steps"]) == (4.0, 2.0, 2)         # the fixture asks for two steps
    args = sample.parse(["--image", str(tmp_path / "fox.png"), "--prompt", "x", "--model", str(own), "--output", str(tmp_path / "x.png")])
    assert sample.main(args) == 0 and record(tmp_path / "x.png")["steps"] == 3


def test_default_model_says_that_it_is_a_miniature(cli, model, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sample.METHODS, "ip2p", (model, sample.EDITOR[1]))
    args = sample.parse(["--image", str(tmp_path / "fox.png"), "--prompt", "x", "--steps", "1", "--output", str(tmp_path / "x.png")])
    assert sample.main(args) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert "miniature" in line and "--model" in line and "timbrooks/instruct-pix2pix" in line
    assert "miniature" not in cli().out


def test_methods_of_a_text_to_image_model(cli, tmp_path):
    """Each gives a picture of the input's size and records its own settings; a word that is not there is refused."""
    base = write_model(tmp_path / "sd.safetensors", in_channels=4, cfg_text=2.0)
    pictures = {}
    for method in ("sdedit", "p2p", "null-text"):
        source = () if method == "sdedit" else ("--source-prompt", "a fox")
        result = cli("--model", base, "--method", method, *source, "--prompt", "a red fox", "--output", tmp_path / f"{method}.png")
        assert result.code == 0, result.err
        path = tmp_path / f"{method}.png"
        pictures[method] = Image.open(path)
        told = record(path)
        assert pictures[method].size == (48, 32) and told["method"] == method and told["cfg_text"] == 2.0
        assert ("strength" in told) == (method == "sdedit") and ("source_prompt" in told) == (method != "sdedit")
    assert len({np.asarray(picture).tobytes() for picture in pictures.values()}) == 3
    flags = ("--model", base, "--method", "p2p", "--source-prompt", "a fox", "--prompt", "a red fox")
    assert len(cli(*flags, "--blend", "fox", "fox").files) == 1
    missing = cli(*flags, "--blend", "fox", "cat")
    assert missing.code == 2 and "'cat' is not in the prompt" in missing.err and len(missing.err.splitlines()) == 1


@pytest.mark.parametrize("method, self_side, start", [("p2p", 16, 0.0), ("null-text", 32, 0.2)])
def test_either_inversion_has_the_control_of_its_authors(cli, tmp_path, monkeypatch, method, self_side, start):
    made = []
    make = prompt_to_prompt.prompt_to_prompt
    monkeypatch.setattr(prompt_to_prompt, "prompt_to_prompt", lambda *args, **kwargs: made.append(make(*args, **kwargs)) or made[-1])
    base = write_model(tmp_path / "sd.safetensors", in_channels=4)
    result = cli("--model", base, "--method", method, "--source-prompt", "a fox", "--prompt", "a red fox", "--blend", "fox", "fox")
    assert result.code == 0, result.err
    assert made[0].self_side == self_side and made[0].blend.start == start


def test_compile_wraps_the_unet(cli, monkeypatch):
    wrapped = []
    monkeypatch.setattr(torch, "compile", lambda f: wrapped.append(f) or f)
    assert cli("--compile").code == 0 and wrapped[0].__self__.__class__ is UNet


def test_other_vae(cli, model, tmp_path):
    result = cli("--vae", model)
    assert result.code == 0 and record(result.files[0])["vae"] == "tiny.safetensors"


def test_a_model_may_predict_something_else_than_its_file_says(cli, model):
    plain, *told = (pixels(cli(*flags).files[0]) for flags in
                    ((), *(("--parameterization", kind) for kind in ("eps", "v"))))
    own = load_checkpoint(model).parameterization
    for kind, picture in zip(("eps", "v"), told):
        assert np.array_equal(picture, plain) == (kind == own)
    assert record(cli("--parameterization", "v").files[0])["parameterization"] == "v"


def test_averaged_weights_can_be_left_alone(cli, tmp_path):
    """A checkpoint with an average, as a merge of models may have kept that of one of them."""
    parts = tiny("sd1")
    save_checkpoint(parts, tmp_path / "m.safetensors")
    state, record_of = read_state_dict(tmp_path / "m.safetensors")
    averaged = {ema_name(name): 0.9 * weight for name, weight in parts.unet.state_dict().items()}
    torch.save({"state_dict": state | averaged, "ip2p": record_of}, tmp_path / "m.ckpt")
    last, average, left = (cli("--model", tmp_path / name, *flags).files[0] for name, flags in
                           (("m.safetensors", ()), ("m.ckpt", ()), ("m.ckpt", ("--no-ema",))))
    assert np.array_equal(pixels(last), pixels(left)) and not np.array_equal(pixels(last), pixels(average))
    assert record(left)["no_ema"] and "no_ema" not in record(average)


def test_samplers_are_those_of_the_library(cli):
    assert all(cli("--sampler", name).code == 0 for name in SAMPLERS)


# ---- what cannot work

def test_bad_pictures(refused, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (20000, 10)).save(tmp_path / "line.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "nothing").mkdir()
    for name, words in {"missing.png": "no such picture", "text.png": "not a picture", "empty.png": "not a picture",
                        "dot.png": "got 1x1", "line.png": "got 20000x10", "cut.jpg": "truncated",
                        "nothing": "a folder without pictures"}.items():
        line = refused("--image", tmp_path / name, "--model", "missing.safetensors")     # found before the model is opened
        assert name in line and words in line


@pytest.mark.parametrize("flags, words", [
    (["--steps", "0"], "1..1000, got 0"), (["--steps", "-1"], "1..1000, got -1"), (["--steps", "1001"], "1..1000, got 1001"),
    (["--steps", "ten"], "'ten'"), (["--cfg-text", "nan"], "got nan"), (["--cfg-image", "inf"], "got inf"),
    (["--cfg-text=-inf"], "got -inf"), (["--grid", "--cfg-text", "3", "nan"], "got nan"),
    (["--cfg-text", "3", "5"], "--grid"), (["--grid", "--num-images", "2"], "got 2"), (["--num-images", "0"], "got 0"),
    (["--batch-size", "0"], "got 0"), (["--size", "0"], "got 0"), (["--seed", "-1"], "got -1"), (["--seed", str(2 ** 64)], "got 1844"),
    (["--sampler", "heun"], "euler-ancestral"), (["--dtype", "int8"], "bf16"), (["--nonsense"], "--nonsense"),
    (["--image", ""], "needed a path, got nothing"), (["--output", ""], "needed a path"),
    (["--device", "toaster"], "--device toaster"), (["--device", "meta"], "--device meta"),
])
def test_bad_settings(refused, flags, words):
    assert words in refused(*flags, "--model", "missing.safetensors")                    # found before the model is opened


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_without_cuda(refused):
    line = refused("--device", "cuda", "--model", "missing.safetensors")
    assert "--device cuda cannot be used" in line and "there is cpu" in line


def test_bad_models(refused, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "page.safetensors").write_text("<!doctype html>")
    text_to_image = write_model(tmp_path / "sd.safetensors", in_channels=4)
    for path, words in ((tmp_path / "folder", "not a diffusers folder"), (tmp_path / "missing.safetensors", "no such file"),
                        (tmp_path / "page.safetensors", "web page"), (text_to_image, "not an editor"),
                        (tmp_path / "fox.png", "neither safetensors")):
        line = refused("--model", path)
        assert str(path) in line and words in line
    assert "missing.pt" in refused("--vae", tmp_path / "missing.pt")
    inpainting = write_model(tmp_path / "inpainting.safetensors", in_channels=9)
    assert "UNet takes 9 channels and its autoencoder has 4" in refused("--model", inpainting, "--method", "sdedit")
    assert "--method sdedit needs a text-to-image model" in refused("--method", "sdedit")


def test_settings_that_do_not_go_together(refused):
    for flags, words in ((("--method", "p2p"), "needs --source-prompt"), (("--method", "null-text", "--source-prompt", " "), "needs --source-prompt"),
                         (("--method", "sdedit", "--grid"), "goes with --method ip2p, got --method sdedit"),
                         (("--method", "p2p", "--source-prompt", "x", "--sampler", "euler-ancestral"), "--sampler goes with --method ip2p"),
                         (("--method", "sdedit", "--cfg-image", 1), "--cfg-image goes"), (("--strength", .5), "--method sdedit, got"),
                         (("--source-prompt", "x"), "--source-prompt goes with --method p2p or null-text, got --method ip2p"),
                         (("--method", "p2p", "--source-prompt", "x", "--num-images", 2), "must be 1, got 2"),
                         (("--seed", 2 ** 63 - 1, "--num-images", 2), "leaves no seeds for --num-images 2"),
                         (("--method", "sdedit", "--strength", 1.5), "got 1.5")):
        assert words in refused(*flags)


def test_bad_outputs_are_found_before_the_model_is_opened(refused, tmp_path):
    (tmp_path / "file").write_text("")
    for output, words, *flags in ((tmp_path / "file" / "x.png", "cannot be written"), (tmp_path / "file", "cannot be written"),
                                  (tmp_path / "x.png", "2 pictures", "--num-images", 2), (tmp_path / "x.gif", ".png, .jpg"),
                                  (tmp_path / "fox.png", "the picture to edit"), (tmp_path / "cat.png", "is there already"),
                                  (tmp_path / "cat.webp", "is there already")):
        for picture in ("cat.png", "cat.webp"):
            Image.new("RGB", (20, 10)).save(tmp_path / picture)
        line = refused("--image", tmp_path / "fox.png", "--output", output, "--model", "missing.safetensors", *flags)
        assert str(output) in line and words in line
    assert Image.open(tmp_path / "fox.png").size == (48, 32) and Image.open(tmp_path / "cat.png").size == (20, 10)


def test_names_as_long_as_the_system_takes_and_pictures_larger_than_a_format(cli, refused, tmp_path):
    for name in ("a" * 251 + ".png", "語" * 83 + ".png"):                         # of 255 and 253 bytes; 255 may be written
        assert cli("--output", tmp_path / name).code == 0 and Image.open(tmp_path / name).size == (48, 32)
    colors(16390, 1100).save(tmp_path / "fox.png")
    wide = tmp_path / "wide.webp"
    line = refused("--image", tmp_path / "fox.png", "--output", wide, "--model", "missing.safetensors")
    assert str(wide) in line and "sides of up to 16383 pixels, and the result has 16390" in line
    assert cli("--output", wide, "--keep-model-size").code == 0 and Image.open(wide).size == (32, 8)


def test_nothing_half_written_is_left(cli, monkeypatch):
    def full(self, file, *args, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", full)
    result = cli()
    assert result.code == 2 and not result.files and result.err.splitlines()[-1].endswith("No space left on device")


def test_a_lack_of_memory_names_what_to_try(cli, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(InstructPix2Pix, "edit", fail)
    result = cli()
    assert result.code == 2 and "--size" in result.err.splitlines()[-1] and "Traceback" not in result.err


# ---- the command itself

def test_help_mentions_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        sample.parse(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for name, value in vars(sample.parse(["--image", "x.png", "--prompt", "x"])).items():
        description = text.split(f"\n  --{name.replace('_', '-')} ")[1].split("\n  --")[0]
        own = type(value) in (str, int, float) and value != ""
        assert (f"default: {value}" if own else "default") in " ".join(description.split()), name


def test_help_imports_nothing_heavy():
    code = "import sys, sample; sys.exit(any(m in sys.modules for m in ('torch', 'PIL', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_command_edits_an_example(model, tmp_path):
    done = subprocess.run([sys.executable, "sample.py", "--image", "ip2p/assets/examples/fox.png", "--prompt", "make it night",
                           "--model", str(model), "--output", str(tmp_path), "--steps", "2", "--device", "cpu"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "fox-make-it-night.png").size == Image.open(ROOT / "ip2p/assets/examples/fox.png").size
    assert done.stdout.splitlines()[-1] == str(tmp_path / "fox-make-it-night.png") and "Warning" not in done.stderr
