"""The language model against transformers' GPT-2 with the same random weights, and its sampling against formulas."""
import pytest
import torch

from ip2p.clip_filter import import_open_clip
from ip2p.gpt import GPT, Cache, GPTConfig, generate, load_gpt, pick, save_gpt


def tiny(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=50, context_length=24, width=32, layers=2, heads=4)).eval()


@pytest.fixture(scope="module", params=["safetensors", "bin"])
def public(request, tmp_path_factory):
    """A random model as transformers saves it, in either format, and the same one as we open it."""
    import_open_clip()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=120, n_positions=32, n_embd=128, n_layer=3, n_head=2)).eval()
    for p in theirs.parameters():                              # biases and norms too
        torch.nn.init.normal_(p, std=0.1)
    folder = tmp_path_factory.mktemp("gpt2")
    if request.param == "safetensors":
        theirs.save_pretrained(folder)
        return theirs, load_gpt(folder / "model.safetensors")[0]
    tensors = {**theirs.state_dict(), "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32)}      # old files hold the mask
    torch.save(tensors, folder / "pytorch_model.bin")
    return theirs, load_gpt(folder / "pytorch_model.bin")[0]


def test_logits_equal_transformers(public):
    theirs, ours = public
    ids = torch.randint(0, 120, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = theirs(ids).logits, ours(ids)
    assert (logits - expected).norm() / expected.norm() < 1e-5


def test_greedy_generation_equals_transformers(public):
    theirs, ours = public
    prompt = [5, 17, 99, 3]
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert generate(ours, prompt, 20, temperature=0, frequency_penalty=0) == expected[0, 4:].tolist()


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 5], [3, 9]])
def test_cache_changes_nothing(pieces):
    model, ids = tiny(), torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, cache = model(ids), Cache(model.config, 2, model.wte.weight)
        parts = torch.cat([model(piece, cache) for piece in ids.split(pieces, dim=1)], dim=1)
    assert torch.allclose(parts, whole, atol=1e-5)


def test_no_token_sees_a_later_one():
    model, ids = tiny(), torch.arange(10)[None]
    changed = ids.clone()
    changed[0, 6] = 40
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6:], after[:, 6:])


def test_generation_stops_when_told_and_at_the_end_of_the_context():
    model = tiny()
    free = generate(model, [1, 2, 3], 100, temperature=0, frequency_penalty=0)
    assert len(free) == 24 - 3
    stop = lambda tokens: len(tokens) == 6 or tokens[-1] == free[4]
    assert generate(model, [1, 2, 3], 100, temperature=0, frequency_penalty=0, stop=stop) == free[:free.index(free[4]) + 1]
    with pytest.raises(ValueError, match="25 tokens are more than the context's 24"):
        model(torch.zeros(1, 25, dtype=torch.long))


def test_the_same_seed_writes_the_same_text():
    model = tiny()
    texts = [generate(model, [1, 2], 15, temperature=1.0, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_nucleus_holds_the_fewest_tokens_that_reach_top_p():
    """Probabilities .5, .3, .15, .05: top_p of .7 keeps the first two, in the ratio 5 to 3."""
    logits, generator = torch.tensor([0.15, 0.5, 0.05, 0.3]).log(), torch.Generator().manual_seed(0)
    drawn = torch.tensor([pick(logits, 1.0, 0.7, generator) for _ in range(4000)])
    assert set(drawn.tolist()) == {1, 3}
    assert (drawn == 1).float().mean().item() == pytest.approx(5 / 8, abs=0.03)          # 4 standard deviations


def test_frequency_penalty_is_taken_from_the_logit_for_each_use():
    """A model that always prefers token 7 by 1.0 must leave it after ten uses at 0.1 each."""
    class Stubborn(torch.nn.Module):
        config = GPTConfig(vocab_size=9, context_length=64, width=4, layers=1, heads=1)
        wte = torch.nn.Embedding(9, 4)

        def forward(self, ids, cache):
            logits = torch.zeros(1, ids.shape[1], 9)
            logits[..., 7], logits[..., 2] = 1.05, 0.0
            return logits
    out = generate(Stubborn(), [0], 12, temperature=0, frequency_penalty=0.1)
    assert out[:11] == [7] * 11 and out[11] != 7                     # 1.05 - 1.1 < 0


def test_round_trip_keeps_every_weight_and_the_record(tmp_path):
    model = tiny()
    save_gpt(model, tmp_path / "gpt.safetensors", {"steps": 3})
    again, record = load_gpt(tmp_path / "gpt.safetensors")
    assert again.config == model.config and record["steps"] == 3
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_a_file_of_another_kind_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match="not a GPT-2: it lacks wte.weight"):
        load_gpt(tmp_path / "other.bin")
    tensors = tiny().state_dict()
    del tensors["h.1.ln_2.bias"]
    torch.save(tensors, tmp_path / "incomplete.bin")
    with pytest.raises(ValueError, match="1 .h.1.ln_2.bias"):
        load_gpt(tmp_path / "incomplete.bin")


def test_public_sizes():
    """GPT-2 small has 124,439,808 parameters."""
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(GPTConfig()).parameters()) == 124_439_808
