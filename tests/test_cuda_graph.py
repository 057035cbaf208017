"""A step recorded once and replayed: on a GPU in name, whose graph is a tape, and on a GPU where there is one."""
import pytest
import torch

from ip2p.cuda_graph import CUDAGraphed
from ip2p.guidance import instruct_denoiser
from ip2p.unet import UNet, UNetConfig


def make_denoiser():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(UNetConfig(8, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(True, True),
                               context_dim=32, num_heads=2, norm_groups=8)).eval().requires_grad_(False).to("cuda")
        context, null, latents = (torch.randn(s).to("cuda") for s in ((2, 5, 32), (2, 5, 32), (2, 4, 8, 8)))
    calls = []

    def predict(*args):
        calls.append(None)
        return unet(*args)
    return instruct_denoiser(predict, context, null, latents, 7.5, 1.5, unet.read_text), calls


def steps():
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 4, 8, 8, generator=rng).to("cuda"), torch.tensor(t).to("cuda")) for t in (901, 601, 301, 1)]


def test_replays_follow_their_arguments(gpu):
    """Bit for bit, with the function called twice in four steps and its arguments left as they were."""
    denoise, calls = make_denoiser()
    graphed = CUDAGraphed(denoise)
    inputs = steps()
    results = [graphed(*x).clone() for x in inputs]
    assert len(calls) == 2 and all(torch.equal(x, y) for a, b in zip(inputs, steps()) for x, y in zip(a, b))
    assert all(torch.equal(result, denoise(*x)) for result, x in zip(results, inputs))


def test_other_shapes_are_not_replayed(gpu):
    graphed = CUDAGraphed(torch.neg)
    for size in (2, 2, 2, 3, 2):
        x = torch.arange(size, device="cuda")
        assert torch.equal(graphed(x), -x)


def test_what_cannot_be_recorded_runs_as_usual(gpu, monkeypatch, capsys):
    def refuse(tape, stream, capture_error_mode):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    graphed = CUDAGraphed(torch.neg)
    assert [graphed(torch.tensor(i, device="cuda")).item() for i in range(4)] == [0, -1, -2, -3]
    assert capsys.readouterr().err == ("note: no CUDA graph, steps are run as usual "
                                       "(operation not permitted when stream is capturing)\n")


def test_what_needs_the_cpu_cannot_be_recorded(gpu, capsys):
    for notes in (1, 0):                                       # and no other is tried
        graphed = CUDAGraphed(lambda x: x * x.sum().item())
        assert [graphed(torch.tensor([i], device="cuda")).item() for i in range(4)] == [0, 1, 4, 9]
        assert capsys.readouterr().err.count("note: no CUDA graph") == notes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_graph():
    """To 1e-5 of the largest value, in float32: the same kernels, perhaps chosen anew."""
    denoise, calls = make_denoiser()
    graphed = CUDAGraphed(denoise)
    results = [graphed(*x).clone() for x in steps()]
    assert len(calls) == 2 and graphed.graph is not None
    for result, x in zip(results, steps()):
        expected = denoise(*x)
        assert (result - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_goes_on_after_a_recording_that_failed(capsys, monkeypatch):
    """The last test of graphs: torch before 2.13 could not record again."""
    monkeypatch.setattr(CUDAGraphed, "can_record", True)
    stream = torch.cuda.current_stream()
    test_what_needs_the_cpu_cannot_be_recorded(None, capsys)
    assert torch.cuda.current_stream() == stream
    denoise, _ = make_denoiser()
    graphed = CUDAGraphed(denoise)
    assert all(torch.allclose(graphed(*x), denoise(*x), atol=1e-4) for x in steps()) and graphed.graph is None
