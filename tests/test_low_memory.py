"""Less memory, the same pictures: the autoencoder in strips, parts that visit the device, branches one after another."""
import numpy as np
import pytest
import torch
from checkpoints import relative_error
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ip2p import InstructPix2Pix, low_memory, pipeline
from ip2p.checkpoint import Parts
from ip2p.images import to_images
from ip2p.text import TextConfig, TextEncoder
from ip2p.unet import UNet, UNetConfig
from ip2p.vae import AutoencoderKL, VAEConfig


class Peak(TorchDispatchMode):
    """most: bytes of results that are alive together, each storage counted once. What kernels use inside is not seen."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(x):
                self.alive[x.untyped_storage()] = x.untyped_storage().nbytes()
        self.most = max(self.most, sum(self.alive.values()))
        return out


def make_parts():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = (UNet(UNetConfig(8, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(True, True),
                                 context_dim=32, num_heads=2, norm_groups=8)),
                 AutoencoderKL(VAEConfig(channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4)),
                 TextEncoder(TextConfig(vocab_size=514 + 200, context_length=16, width=32, layers=2, heads=2)))
    return Parts(*(part.eval().requires_grad_(False) for part in parts), "eps", 96, {})


@pytest.mark.parametrize("height, width", [(96, 64), (100, 36), (4, 8)])      # whole strips, a short last one, less than one
def test_strips_give_what_the_whole_picture_gives(height, width):
    """In float32: latents and pixels to 1e-5, pictures to one level of 255."""
    vae, rng = make_parts().vae, torch.Generator().manual_seed(0)
    pixels, z = torch.randn(2, 3, height, width, generator=rng), torch.randn(2, 4, height // 4, width // 4, generator=rng)
    posterior, decoded = vae.encode(pixels), vae.decode(z)
    assert relative_error(low_memory.encode(vae, pixels).mean, posterior.mean) < 1e-5
    assert relative_error(low_memory.encode(vae, pixels).logvar, posterior.logvar) < 1e-5
    assert relative_error(low_memory.decode(vae, z), decoded) < 1e-5
    levels = [np.stack(to_images(x)).astype(int) for x in (low_memory.decode(vae, z), decoded)]
    assert np.abs(levels[0] - levels[1]).max() <= 1


def test_strips_hold_few_feature_maps():
    """In units of the largest map, what the decoder's last Upsample gives: that one and the next block's own, of half its
    width, against three in plain code. The encoder has two maps of half the width, against four. Strips, a sixteenth of
    the picture each, add their share."""
    vae, H, W = make_parts().vae, 512, 16
    largest, z, pixels = 16 * H * W * 4, torch.zeros(1, 4, H // 4, W // 4), torch.zeros(1, 3, H, W)
    most = {}
    for name, run in dict(decode=lambda: low_memory.decode(vae, z), plain_decode=lambda: vae.decode(z),
                          encode=lambda: low_memory.encode(vae, pixels), plain_encode=lambda: vae.encode(pixels)).items():
        with torch.no_grad(), Peak() as peak:
            run()
        most[name] = peak.most / largest
    assert most["decode"] < 1.8 and 3 <= most["plain_decode"]
    assert most["encode"] < 1.4 and 2 <= most["plain_encode"]


def test_an_edit_is_the_same():
    """To one level of 255, for pictures of two sizes with two results each; the UNet sees two of them at a time, not six."""
    rng, batches = np.random.default_rng(0), []
    pictures = [Image.fromarray(rng.integers(0, 256, (height, 96, 3), dtype=np.uint8)) for height in (96, 64)]
    results = []
    for sparing in (False, True):
        model = InstructPix2Pix(make_parts(), low_memory=sparing)
        model.unet.register_forward_pre_hook(lambda unet, inputs: batches.append(len(inputs[0])))
        results.append(model.edit(pictures, ["make it night", "make it rain"], num_images=2, steps=3, progress=False))
    assert batches == [6] * 6 + [2] * 18
    for plain, sparing in zip(*results):
        assert np.abs(np.asarray(plain).astype(int) - np.asarray(sparing)).max() <= 1


def test_parts_visit_the_device_in_turn(monkeypatch):
    """Each is there while it runs and alone; afterwards all have the weights they had.
    The meta device stands in for a GPU."""
    monkeypatch.setattr(pipeline, "to_images", list)
    monkeypatch.setattr(pipeline, "check_finite", lambda pixels: None)                 # which meta's have no answer to
    parts, ran = make_parts(), []
    modules = {"unet": parts.unet, "vae": parts.vae, "text": parts.text}
    addresses = lambda: {name: [p.data_ptr() for p in module.parameters()] for name, module in modules.items()}
    there = lambda: [name for name, module in modules.items() if any(p.is_meta for p in module.parameters())]
    before = addresses()
    for module in (parts.unet, parts.vae.encoder.mid, parts.vae.decoder.mid, parts.text):
        module.register_forward_pre_hook(lambda module, inputs: ran.append(there()))
    model = InstructPix2Pix(parts, "meta", low_memory=True)
    result, = model.edit(Image.new("RGB", (32, 32)), "make it night", steps=1, progress=False)
    assert result.is_meta and ran == [["vae"], ["text"], *[["unet"]] * 3, ["vae"]]
    assert there() == [] and addresses() == before


def test_visits_do_not_compile_anew():
    """What torch.compile has compiled holds for these very parameters."""
    torch._dynamo.reset()
    unet, compiled = make_parts().unet, []
    compiled_unet = torch.compile(unet, backend=lambda graph, _: compiled.append(graph) or graph.forward)
    x, t, context = torch.randn(1, 8, 8, 8), torch.tensor([3]), torch.randn(1, 16, 32)
    weights = {name: weight.clone() for name, weight in unet.named_parameters()}
    for _ in range(3):
        with low_memory.visiting(unet, "cpu"), torch.no_grad():
            compiled_unet(x, t, context)
    assert len(compiled) == 1 and all(torch.equal(weight, weights[name]) for name, weight in unet.named_parameters())


def test_strips_keep_the_layout():
    """Or every convolution of channels last would transpose the map that it gets."""
    conv, x = torch.nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 80, 16)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = low_memory.in_strips(conv.to(memory_format=layout), x.contiguous(memory_format=layout))
        assert found.is_contiguous(memory_format=layout) and relative_error(found, conv(x)) < 1e-6
