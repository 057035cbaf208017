"""The paths through `attend`, and the text tower that is built on it, against formulas and open_clip."""
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ip2p import attention
from ip2p.attention import CrossAttention, attend, attend_by_products, attend_in_chunks
from ip2p.clip_filter import import_open_clip
from ip2p.text import TextConfig, TextEncoder
from ip2p.unet import UNet, UNetConfig
from ip2p.vae import AttnBlock


class Sizes(TorchDispatchMode):
    """Gathers how many numbers each result has."""
    def __enter__(self):
        super().__enter__()
        self.found = []
        return self.found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found.extend(x.numel() for x in (out if isinstance(out, tuple) else [out]) if torch.is_tensor(x))
        return out


def formula(q, k, v, heads, causal):
    """softmax(q k^T / sqrt(d)) v in float64, one head and one query at a time."""
    q, k, v = (x.double().unflatten(-1, (heads, -1)) for x in (q, k, v))                # (B, tokens, heads, d)
    out = torch.zeros_like(q)
    for b in range(len(q)):
        for h in range(heads):
            for i in range(q.shape[1]):
                seen = slice(0, i + 1) if causal else slice(None)
                weights = (k[b, seen, h] @ q[b, i, h] / q.shape[-1] ** 0.5).softmax(0)
                out[b, i, h] = weights @ v[b, seen, h]
    return out.flatten(2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, trained, tolerance", [(torch.float32, False, 1e-6), (torch.float32, True, 1e-6),
                                                       (torch.bfloat16, False, 1e-2), (torch.bfloat16, True, 1e-2)])
def test_attention_equals_its_formula_forward_and_backward(causal, dtype, trained, tolerance):
    """Relative errors; bfloat16 has 8 bits, so 1e-2 is two of its roundings."""
    rng = torch.Generator().manual_seed(0)
    keys = 5 if causal else 3
    q, k, v = (torch.randn(2, n, 12, generator=rng).to(dtype).requires_grad_(trained) for n in (5, keys, keys))
    out, expected = attend(q, k, v, 3, causal), formula(q, k, v, 3, causal)
    assert out.dtype == dtype and (out - expected).norm() < tolerance * expected.norm()
    if trained:
        weights = torch.randn(out.shape, generator=rng)
        ours = torch.autograd.grad((out.float() * weights).sum(), (q, k, v))
        theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
        assert all((a - b).norm() < 3 * tolerance * b.norm() for a, b in zip(ours, theirs))


@pytest.mark.parametrize("amx, trained, products", [(False, False, True), (False, True, True), (True, False, False), (True, True, True)])
def test_bfloat16_on_a_cpu_goes_by_products_where_these_are_faster(amx, trained, products, monkeypatch):
    """They hold logits in bfloat16 and so err differently than the fused kernel; either way the result is right."""
    monkeypatch.setattr(attention, "has_amx", lambda: amx)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 64, 8, generator=rng).bfloat16().requires_grad_(trained) for _ in range(3))
    out, fused = attend(q, k, v, 1), F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    assert torch.equal(out, fused) != products and (out - fused).norm() < 1e-2 * fused.norm()


@pytest.mark.parametrize("width, dtype", [(width, dtype) for width in (40, 80, 160, 512)      # Stable Diffusion 1's heads, the VAE's
                                          for dtype in (torch.float32, torch.bfloat16, torch.float16)])
def test_logits_are_never_all_in_memory(width, dtype):
    """No result is nearly as large as the 1600 x 1600 logits of a head; those of products hold 2 ** 20 at most."""
    if width == 512:
        layer, x = AttnBlock(width, 32).to(dtype), torch.zeros(1, width, 40, 40, dtype=dtype)
    else:
        layer, x = CrossAttention(2 * width, heads=2).to(dtype), torch.zeros(1, 1600, 2 * width, dtype=dtype)
    with torch.no_grad(), Sizes() as sizes:
        layer(x)
    assert max(sizes) <= 2 ** 20


@pytest.mark.parametrize("most", [1, 100, 700, 2 ** 26])
@pytest.mark.parametrize("way", [attend_in_chunks, attend_by_products, partial(attend_by_products, causal=True)],
                         ids=["chunks", "products", "causal"])
def test_queries_a_few_at_a_time_are_the_same(way, most):
    """Relative error of float32's rounding; `most` leaves one query at a time, some, and all, products some heads too."""
    rng = torch.Generator().manual_seed(0)
    causal = isinstance(way, partial)
    q, k, v = (torch.randn(2, 3, n, 4, generator=rng).requires_grad_() for n in (33, *[33 if causal else 7] * 2))
    out, expected = way(q, k, v, most=most), F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert (out - expected).norm() < 1e-6 * expected.norm()
    ours, theirs = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected))
    assert all((a - b).norm() < 1e-6 * b.norm() for a, b in zip(ours, theirs))


def test_compiled_attention_is_one_fused_operation(monkeypatch):
    """In bfloat16 on a CPU too, where it goes by three products, of some of the queries each, when it is not compiled."""
    monkeypatch.setattr(attention, "has_amx", lambda: False)
    graphs = []

    def look(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    q, k, v = torch.randn(3, 1, 1600, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        fused = torch.compile(attend, backend=look)(q, k, v, 1)
        assert (fused - attend(q, k, v, 1)).norm() < 1e-2 * fused.norm()
    assert len(graphs) == 1 and F.scaled_dot_product_attention in graphs[0] and torch.cat not in graphs[0]


def test_a_device_without_the_fused_kernels_keeps_few_logits():
    """On the meta device, which writes them out (in name): of 2 ** 28 there are never more than 2 ** 26."""
    layer, x = CrossAttention(32, heads=4).to("meta"), torch.zeros(1, 2 ** 13, 32, device="meta")
    with torch.no_grad(), Sizes() as sizes:
        assert layer(x).shape == x.shape
    assert max(sizes) == 2 ** 26


@pytest.mark.parametrize("quick_gelu, skip_last", [(True, 0), (False, 1)], ids=["SD1", "SD2"])
def test_the_text_tower_equals_open_clips(quick_gelu, skip_last):
    open_clip = import_open_clip()
    width, layers = 64, 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = open_clip.transformer.TextTransformer(
            context_length=16, vocab_size=600, width=width, heads=4, layers=layers, output_dim=None, output_tokens=True,
            act_layer=open_clip.transformer.QuickGELU if quick_gelu else torch.nn.GELU).eval()
        ours = TextEncoder(TextConfig(600, 16, width, layers, 4, quick_gelu, skip_last))
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in ours.state_dict()}, strict=True)
    ids = torch.randint(0, 600, (2, 16), generator=torch.Generator().manual_seed(1))
    x = theirs.token_embedding(ids) + theirs.positional_embedding
    for block in theirs.transformer.resblocks[:layers - skip_last]:
        x = block(x, attn_mask=theirs.attn_mask)
    with torch.no_grad():
        assert (ours(ids) - theirs.ln_final(x)).norm() < 1e-6 * x.norm()


def test_a_text_read_once_is_the_same_to_every_layer():
    unet = UNet(UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(True, True),
                           transformer_depth=2, context_dim=24, num_heads=2, norm_groups=8))
    rng = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 5, 24, generator=rng)
    with torch.no_grad():
        read = unet.read_text(context)
        assert len(read) == 2 * 7                                          # two down, one in the middle, four up; two deep
        assert torch.equal(unet(x, torch.tensor([3, 900]), read), unet(x, torch.tensor([3, 900]), context))


def test_an_editor_starts_without_importing_what_it_does_not_need():
    """open_clip brings torchvision, and transformers where that is installed: twice the time of importing torch. Its compiler
    is another half."""
    code = ("import sys, ip2p; ip2p.InstructPix2Pix.load('weights/mini-ip2p.safetensors').edit; heavy = {'open_clip', 'torchvision', "
            "'transformers', 'diffusers', 'timm', 'torch._dynamo', 'sympy', 'matplotlib'}; print(sorted(heavy & set(sys.modules)))")
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout == "[]\n"
