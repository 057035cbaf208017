"""The training loop, the loss of a diffusion model, and the examples of a step."""
import argparse
import json
import math
import os
import signal
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from ip2p import distributed
from ip2p.muon import Muon, orthogonalize
from ip2p.run_folder import list_checkpoints
from ip2p.stages import Pool, commit, diffusion_loss, draw_timesteps, is_settling
from ip2p.training import EMA, fit, lr_scale, seeded


def make_run(folder, steps, minutes=None, stop_after=None, signals=(signal.SIGTERM,), accumulate=1, spoil=None, **settings):
    """A small regression. `stop_after` sends this process signals in the middle; `spoil` makes a step's loss infinite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4))

    def loss_fn(step, rows):
        if step == stop_after:
            for number in signals:
                os.kill(os.getpid(), number)
        x = torch.randn(32, 8, generator=seeded(0, step))[rows]
        loss = (model(x) - x[:, :4] ** 2).square().mean()
        return (loss * math.inf if step == spoil else loss), {}

    make_run.model = model
    settings = dict(optimizer="muon", lr=1e-2, warmup=5, cooldown=0.3) | settings
    result = fit(model, loss_fn, folder, steps=steps, batch_size=32, accumulate=accumulate, minutes=minutes,
                 config=dict(steps=steps), **settings)
    return model.state_dict(), result


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resume_equals_uninterrupted_run(tmp_path):
    whole, result = make_run(tmp_path / "whole", 60)
    assert result["finished"] and result["step"] == 60
    for stop_after in (17, 40, 58):
        with pytest.raises(KeyboardInterrupt, match=f"stopped at step {stop_after + 1}"):
            make_run(tmp_path / "parts", 60, stop_after=stop_after)
    parts, second = make_run(tmp_path / "parts", 60)
    assert second["finished"] and same(whole, parts)
    losses = [[(row["step"], row["loss"]) for row in read_metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_who_presses_ctrl_c_again_does_not_wait_for_the_step(tmp_path, capfd):
    whole, _ = make_run(tmp_path / "whole", 30)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 10"):
        make_run(tmp_path / "parts", 30, stop_after=9, signals=[signal.SIGINT])
    assert "stopping after this step; Ctrl-C again does not wait for it" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt, match="stopped at step 15"):                  # SIGTERM may come from several
        make_run(tmp_path / "parts", 30, stop_after=14, signals=[signal.SIGINT, signal.SIGTERM, signal.SIGTERM])
    with pytest.raises(KeyboardInterrupt, match="stopped at once"):
        make_run(tmp_path / "parts", 30, stop_after=20, signals=[signal.SIGINT, signal.SIGINT])
    assert [p.name for p in list_checkpoints(tmp_path / "parts")] == ["step-0000010.pt", "step-0000015.pt"]
    parts, _ = make_run(tmp_path / "parts", 30)
    assert same(whole, parts)


def test_what_was_logged_after_the_last_checkpoint_is_forgotten(tmp_path):
    """As after a kill: metrics go on to step 60, checkpoints to 40."""
    make_run(tmp_path, 60)
    before = read_metrics(tmp_path)
    (tmp_path / "step-0000060.pt").unlink()
    (tmp_path / ".step-0000061.pt.1.tmp").write_bytes(b"half a checkpoint")
    with pytest.raises(KeyboardInterrupt):
        make_run(tmp_path / "short", 60, stop_after=39)
    (tmp_path / "short" / "step-0000040.pt").rename(tmp_path / "step-0000040.pt")
    make_run(tmp_path, 60)
    assert [row["step"] for row in read_metrics(tmp_path)] == [20, 40, 60]
    assert read_metrics(tmp_path)[2]["loss"] == before[2]["loss"]
    assert not list(tmp_path.glob(".*"))


def test_a_folder_with_other_settings_is_refused(tmp_path):
    make_run(tmp_path, 4)
    with pytest.raises(ValueError, match="other settings .steps."):
        make_run(tmp_path, 6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_offloading_changes_where_numbers_are_and_none_of_them(tmp_path, optimizer):
    whole, _ = make_run(tmp_path / "a", 12, optimizer=optimizer)
    assert same(whole, make_run(tmp_path / "b", 12, optimizer=optimizer, offload=True)[0])
    with pytest.raises(KeyboardInterrupt):
        make_run(tmp_path / "c", 12, optimizer=optimizer, offload=True, stop_after=5)
    assert same(whole, make_run(tmp_path / "c", 12, optimizer=optimizer, offload=True)[0])


@pytest.mark.parametrize("offload", [False, True])
def test_sheets_are_of_the_average_and_leave_the_run_alone(tmp_path, offload):
    """One after every step: the module then holds the averaged weights, and goes on with its own."""
    seen = []

    def sheet(path):
        assert path.name == f"sheet-{len(seen) + 1:07d}.png"
        seen.append({name: p.clone() for name, p in make_run.model.state_dict().items()})

    plain, _ = make_run(tmp_path / "plain", 12, offload=offload)
    drawn, _ = make_run(tmp_path / "drawn", 12, offload=offload, sheet=sheet, sheet_minutes=0.0, save_minutes=0.0, keep=99)
    assert same(plain, drawn) and len(seen) == 12
    for path, weights in zip(list_checkpoints(tmp_path / "drawn"), seen):
        assert same(torch.load(path, weights_only=True)["ema"], weights)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_goes_on_where_weights_lie_otherwise_in_memory(tmp_path, optimizer):
    """A run that began on a GPU, with channels last, goes on without them as if it had never had them."""
    def make_run(name, layout, steps):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).to(memory_format=layout)
        targets = [torch.randn(p.shape) for p in model.parameters()]

        def loss_fn(step, rows):
            if step == steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return sum((p - t).square().sum() * (1 + step) for p, t in zip(model.parameters(), targets)), {}

        fit(model, loss_fn, tmp_path / name, steps=8, optimizer=optimizer, lr=1e-2, warmup=1, clip_norm=0)
        return model.state_dict()

    whole = make_run("whole", torch.contiguous_format, None)
    with pytest.raises(KeyboardInterrupt):
        make_run("parts", torch.channels_last, 3)
    assert same(whole, make_run("parts", torch.contiguous_format, None))


def go_on_in_a_folder_of_its_own(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        make_run(folder / str(rank), steps=4)
    except ValueError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    distributed.end()                                          # as train.py does: gloo's threads may abort a process without it


def test_processes_that_do_not_share_a_folder_are_told(tmp_path):
    """As on two machines, of which the second does not see the first's checkpoint and would begin anew beside it."""
    make_run(tmp_path / "0", steps=4)
    torch.multiprocessing.spawn(go_on_in_a_folder_of_its_own, (tmp_path,), nprocs=2)
    for rank in "01":
        assert "not all processes see its checkpoints" in (tmp_path / f"{rank}.txt").read_text()


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_accumulation_is_the_whole_batch_in_parts(tmp_path, clip_norm):
    """Up to rounding: float32's, through 40 steps of AdamW."""
    whole, _ = make_run(tmp_path / "whole", 40, optimizer="adamw", clip_norm=clip_norm)
    parts, _ = make_run(tmp_path / "parts", 40, optimizer="adamw", clip_norm=clip_norm, accumulate=4)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5)
    assert not same(whole, make_run(tmp_path / "other", 40, optimizer="adamw", clip_norm=0.5 * clip_norm + 0.02)[0])


@pytest.mark.parametrize("spoil", [0, 30])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path, spoil):
    """Saving after every step, and reading the loss after every twentieth: it is found when it would be saved."""
    with pytest.raises(ValueError) as stopped:
        make_run(tmp_path, 60, spoil=spoil, save_minutes=0)
    where = f"{tmp_path}/step-0000030.pt holds the last good state" if spoil else "nothing was saved yet"
    assert str(stopped.value) == f"the loss or its gradient is no longer finite, seen at step {spoil + 1}; {where}"
    for path in tmp_path.glob("*.pt"):
        saved = torch.load(path, weights_only=True)
        assert saved["step"] <= spoil and all(t.isfinite().all() for t in [*saved["model"].values(), *saved["ema"].values()])
    with pytest.raises(ValueError, match="seen at step 40"):                # without saving, when it is logged
        make_run(tmp_path / "unsaved", 60, spoil=30)
    assert not list((tmp_path / "unsaved").glob("*.pt"))


def test_the_last_checkpoints_are_kept_and_load_with_weights_only(tmp_path):
    make_run(tmp_path, 7, save_minutes=0, keep=3)
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"step-{i:07d}.pt" for i in (5, 6, 7)]
    saved = torch.load(tmp_path / "step-0000007.pt", weights_only=True)
    assert {"model", "ema", "opt", "step", "config"} <= set(saved)


@pytest.mark.parametrize("left", [0, 100, 2000])
def test_a_broken_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, left):
    whole, _ = make_run(tmp_path / "whole", 30)
    with pytest.raises(KeyboardInterrupt):
        make_run(tmp_path / "run", 30, stop_after=11, save_minutes=0)
    newest = tmp_path / "run" / "step-0000012.pt"
    newest.write_bytes(newest.read_bytes()[:left])
    parts, _ = make_run(tmp_path / "run", 30)
    said = capsys.readouterr().out
    assert f"{newest} is damaged" in said and "going on from the one before" in said and "at step 11" in said
    assert same(whole, parts)
    for path in list_checkpoints(tmp_path / "run"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of its checkpoints can be read"):
        make_run(tmp_path / "run", 30)


def test_a_run_of_damaged_checkpoints_is_refused_each_time(tmp_path):
    """Repeating the command is the usual advice; it must not begin anew on top of what was there."""
    make_run(tmp_path, steps=4)
    for path in list_checkpoints(tmp_path):
        path.write_bytes(b"nothing")
    metrics = (tmp_path / "metrics.jsonl").read_text()
    for _ in range(2):
        with pytest.raises(ValueError, match="none of its checkpoints can be read"):
            make_run(tmp_path, steps=4)
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


def test_a_torn_line_of_metrics_is_dropped(tmp_path):
    for name in ("whole", "torn"):
        make_run(tmp_path / name, 40)
    with open(tmp_path / "torn" / "metrics.jsonl", "a") as file:
        file.write("\0\0\0\n")
    make_run(tmp_path / "torn", 40)
    assert len(read_metrics(tmp_path / "torn")) == len(read_metrics(tmp_path / "whole"))


def test_memory_that_lacks_does_not_damage_checkpoints(tmp_path, monkeypatch):
    make_run(tmp_path, 3)

    def load(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="allocate memory"):
        make_run(tmp_path, 5)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-0000003.pt"]


def test_the_loss_is_drawn(tmp_path):
    """The curve falls: its dark line is further down at the right than at the left."""
    make_run(tmp_path, 400)
    page = Image.open(tmp_path / "loss.png").convert("RGB")
    dark = [[y for y in range(page.height) if page.getpixel((x, y)) == (0, 0, 128)] for x in (45, page.width - 45)]
    assert dark[0] and dark[1] and max(dark[0]) + 40 < min(dark[1])


def test_ema_follows_the_published_warm_up():
    """decay_n = min(decay, (1 + n) / (10 + n)), by a scalar recurrence."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    ema, expected = EMA(model, 0.5), 0.0
    for n in range(1, 20):
        nn.init.constant_(model.weight, float(n))
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert ema.weights["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_learning_rate_rises_and_falls():
    assert lr_scale(0, 100, 10, 0.2) == pytest.approx(0.1)
    assert lr_scale(50, 100, 10, 0.2) == 1.0
    assert lr_scale(90, 100, 10, 0.2) == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_muon_updates_are_nearly_orthogonal(shape):
    """All singular values land in 0.3 .. 1.3, and the singular vectors stay: u v^T of the exact decomposition."""
    m = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1, 100])[:, None, None]
    x = orthogonalize(m)
    s = torch.linalg.svdvals(x)
    assert s.min() > 0.3 and s.max() < 1.3
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    assert torch.cosine_similarity((u @ v).flatten(1), x.flatten(1)).min() > 0.95


def test_muon_changes_each_weight_by_its_own_gradient_alone():
    """Weights side by side, of one shape or not, go where each goes alone; without a gradient they stay."""
    shapes, rng = [(8, 4), (8, 2, 2, 1), (4, 8), (8, 4)], torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=rng) for s in shapes]
    gradients = [torch.randn(s, generator=rng) for s in shapes[:3]] + [None]

    def learn(which):
        params = [torch.nn.Parameter(weights[i].clone()) for i in which]
        optimizer = Muon(params, lr=0.1)
        for _ in range(3):
            for p, i in zip(params, which):
                p.grad = gradients[i]
            optimizer.step()
        return [p.detach() for p in params]

    together, alone = learn(range(4)), [learn([i])[0] for i in range(4)]
    for a, b, w, g in zip(together, alone, weights, gradients):
        torch.testing.assert_close(a, b, rtol=0, atol=4e-3)              # bfloat16's rounding of a step of 0.1, three times
        assert torch.equal(a, w) == (g is None)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_the_loss_of_a_diffusion_model_by_hand(parameterization):
    """eps is the noise; v = cos(phi) noise - sin(phi) x0, with cos(phi)^2 = prod (1 - beta): Salimans & Ho 2022."""
    rng = torch.Generator().manual_seed(0)
    x0, noise, image, said = torch.randn(4, 3, 2, 4, 4, generator=rng)
    t, seen = torch.tensor([1, 400, 998]), []
    loss = diffusion_loss(lambda x, *rest: seen.append(x) or said, x0, None, t, noise, parameterization, image)
    a_t = np.cumprod(1 - np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2)[t.numpy()]
    cos, sin = (torch.tensor(x, dtype=torch.float32)[:, None, None, None] for x in (a_t ** 0.5, (1 - a_t) ** 0.5))
    expected = noise if parameterization == "eps" else cos * noise - sin * x0
    assert loss.item() == pytest.approx(((said - expected) ** 2).mean().item(), rel=1e-5)
    torch.testing.assert_close(seen[0], torch.cat([cos * x0 + sin * noise, image], 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distribution", ["uniform", "logit-normal"])
def test_timesteps_are_of_their_distribution_and_uniform_while_settling(distribution):
    """Shares below 300, 500 and 900 against the distribution functions, by 100,000 draws: within 5 standard errors."""
    args = argparse.Namespace(steps=100, cooldown=0.6)
    assert [step for step in range(100) if is_settling(step, args)] == list(range(70, 100))
    for settling in (False, True):
        t = draw_timesteps(distribution, 100_000, seeded(0, 1), settling)
        assert t.dtype == torch.int64 and 0 <= t.min() and t.max() <= 999
        for least in (300, 500, 900):
            share = least / 1000
            if distribution == "logit-normal" and not settling:
                share = NormalDist(0.6, 1).cdf(math.log(share / (1 - share)))
            assert (t < least).double().mean().item() == pytest.approx(share, abs=5 * (share * (1 - share) / 100_000) ** 0.5)


def test_pool_batches_depend_on_the_step_alone():
    """Whatever came before, so that a resumed run sees what it would have seen; each example `reuse` times a block."""
    args = argparse.Namespace(batch_size=3, block=8, reuse=2, seed=0)

    def draw(start, count):
        return torch.arange(start, start + count), [f"caption {i}" for i in range(start, start + count)]

    pool, seen = Pool(draw, args), []
    for step in range(12):
        numbers, captions = pool.batch(step)
        fresh_numbers, fresh_captions = Pool(draw, args).batch(step)
        assert torch.equal(numbers, fresh_numbers) and captions == fresh_captions
        assert captions == [f"caption {i}" for i in numbers.tolist()]
        seen += numbers.tolist()
    assert sorted(seen) == sorted(2 * list(range(18)))            # blocks of 6 (two batches of 3), twice each


def test_without_git_there_is_no_commit(monkeypatch):
    assert commit()                                                   # here there is one
    monkeypatch.setenv("PATH", "")
    assert commit() == ""
