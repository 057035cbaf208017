"""Fixtures that several files use, and what lets tests run side by side."""
import os
from functools import cache

import pytest

# Tests that run side by side (pytest -n) share the cores, and so do the commands that they start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


@pytest.fixture(scope="module")
def one_thread():
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A good checkpoint, a file and a folder of it, for tests that spoil copies."""
    from checkpoints import tiny

    from ip2p.checkpoint import save_checkpoint
    folder = tmp_path_factory.mktemp("saved")
    parts = tiny("sd1")
    save_checkpoint(parts, folder / "good.safetensors")
    save_checkpoint(parts, folder / "good", "diffusers")
    return parts, folder / "good.safetensors", folder / "good"


# Tokenizers by name: CLIP's, and one with a small vocabulary and a short context.
@pytest.fixture(params=["CLIP", "miniature"])
def tokenizer(request):
    return make_tokenizer(request.param)


@pytest.fixture
def clip():
    return make_tokenizer("CLIP")


@cache
def make_tokenizer(name):
    from ip2p.text import TextConfig, Tokenizer
    return Tokenizer() if name == "CLIP" else Tokenizer(TextConfig(vocab_size=2 * 256 + 2 + 2048, context_length=32))


@pytest.fixture
def no_gradients():
    import torch
    with torch.no_grad():
        yield


@pytest.fixture
def gpu(monkeypatch):
    """There is a GPU, in name."""
    from pretended_gpu import PretendedGPU

    from ip2p.cuda_graph import CUDAGraphed, side_stream
    from ip2p.stages import alphas_on
    monkeypatch.setattr(CUDAGraphed, "can_record", True)
    with PretendedGPU(monkeypatch) as mode:
        yield mode
    for kept in (side_stream, alphas_on):                      # a real GPU, if there is one, needs its own
        kept.cache_clear()
