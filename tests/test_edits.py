"""Writing edits: text formats and encodings against the published ones, resuming, seeding, and the shipped model."""
import json
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch

from ip2p.clip_filter import import_open_clip
from ip2p.edits import (DELIMITER_0, DELIMITER_1, STOP, EditWriter, completion_loss, edit_kind, generate_edits,
                        make_completion, make_prompt, parse_completion, read_captions, read_triples, rejected_path,
                        world_captions)
from ip2p.encodings import find_encoding, gpt2_encoding, pack_encoding, train_encoding, unpack_encoding
from ip2p.gpt import GPT, GPTConfig
from ip2p.world import World
from ip2p.world_reader import judge

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "weights" / "mini-gpt.safetensors"
UNICODE = ["a fox at night", "  two  spaces\n\n##\nEND", "naïve café, 日本語, émoji 🦊🏽",
           "\x00\x7f\tøre’s don't 1234", "\U0010ffff"]


@pytest.fixture(scope="module")
def encoding():
    texts = [caption for (caption, _), _ in zip(world_captions(World()), range(300))]
    return train_encoding(texts, 500)


def tiny(encoding, seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=encoding.n_vocab, context_length=64, width=32, layers=1, heads=2)).eval()
    return EditWriter(model.requires_grad_(False), encoding)


# ---- formats

def test_delimiters_are_the_published_ones():
    """timothybrooks/instruct-pix2pix, dataset_creation/generate_txt_dataset.py."""
    assert (DELIMITER_0, DELIMITER_1, STOP) == ("\n##\n", "\n%%\n", "\nEND")
    text = make_prompt("a fox") + make_completion("make it night", "a fox at night")
    assert text == "a fox\n##\nmake it night\n%%\na fox at night\nEND"


@pytest.mark.parametrize("completion, expected", [
    ("make it night\n%%\na fox at night\nEND", ("make it night", "a fox at night")),
    ("make it night\n%%\na fox at night\nEND\nwhatever", ("make it night", "a fox at night")),
    ("make it night\n%%\na fox at night", None),                      # cut off
    ("make it night\nEND", None),                                     # one part
    ("make\n%%\nit\n%%\nnight\nEND", None),                           # three
    ("do nothing\n%%\n A Fox! \nEND", None),                          # only case and punctuation differ
    ("\n%%\na fox at night\nEND", None),
    ("make it night\n%%\na fox\nat night\nEND", None),
    ("", None)])
def test_acceptance(completion, expected):
    assert parse_completion("a fox", completion) == expected


def test_triples_are_read_under_both_published_keys(tmp_path):
    rows = [{"input": "a fox", "edit": "make it night", "output": "a fox at night", "url": None},
            {"caption": "a cat", "edit": "make it a dog", "output": "a dog", "input": None}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_triples([tmp_path / "t.jsonl"]) == [{"input": "a fox", "edit": "make it night", "output": "a fox at night"},
                                                    {"input": "a cat", "edit": "make it a dog", "output": "a dog"}]


@pytest.mark.parametrize("line, complaint", [
    ("{", "not a line of JSON"), ("[1]", "needed an object"), ("\udcff", "not a line of JSON"), ('{"input": "a fox", "edit": "x"}', "lacks output"),
    ('{"input": "a fox", "edit": 3, "output": "a cat"}', "lacks edit"),
    ('{"input": "a fox", "edit": "leave it", "output": "A fox."}', "the edited caption is the caption")])
def test_bad_triples_are_reported_in_one_line(tmp_path, line, complaint):
    file = tmp_path / "bad.jsonl"
    text = '{"input": "a fox", "edit": "make it night", "output": "a fox at night"}\n' + line + "\n"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))                         # one of them is not UTF-8
    with pytest.raises(ValueError, match=complaint) as error:
        read_triples([file])
    assert str(error.value).startswith(f"{file}:2: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("name, text", [
    ("c.txt", "a fox\n\n  a  cat \n"), ("c.csv", 'URL,TEXT\nhttp://x,a fox\nhttp://y,\n,"a\n cat"\n'),
    ("c.jsonl", '{"caption": "a fox", "url": "http://x"}\n{"caption": " "}\n{"input": "a cat"}\n')])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_captions_are_read_from_every_kind_of_file(tmp_path, name, text, encoding):
    (tmp_path / name).write_text(text, encoding)
    rows = list(read_captions(tmp_path / name))
    assert [caption for caption, _ in rows] == ["a fox", "a cat"]
    assert [url or None for _, url in rows] == ([None, None] if name == "c.txt" else ["http://x", None])


@pytest.mark.parametrize("name, content", [("c.txt", b"a caf\xe9"), ("c.jsonl", b'{"caption": "\xe9"}'), ("c.csv", b'TEXT\n"' + b"a" * 200_000)])
def test_captions_that_cannot_be_read_are_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}:(1: not a line of JSON| cannot be read as .* in UTF-8)") as error:
        list(read_captions(tmp_path / name))
    assert "\n" not in str(error.value)


# ---- learning

def test_loss_is_the_cross_entropy_of_the_completion_alone(encoding):
    """By hand: minus the log of each completion token's softmax, summed over both rows, over the number of such tokens."""
    model = tiny(encoding).model
    pairs, total, tokens = [([5, 9, 2], [7, 1]), ([3], [8, 8, 4, 6])], 0.0, 0
    for prompt, completion in pairs:
        logits = model(torch.tensor([prompt + completion]))[0]
        for k, token in enumerate(completion):
            row = logits[len(prompt) + k - 1]
            total += float(row.exp().sum().log() - row[token])
            tokens += 1
    assert completion_loss(model, pairs).item() == pytest.approx(total / tokens, rel=1e-5)


# ---- encodings

def test_pairs_merge_by_frequency():
    """By hand, words "ab" x 3, " abc" x 1, "bc" x 2: ab occurs 4 times, bc 3; once ab is one token, "bc" still has its pair
    twice, and " ab", then " abc", come last."""
    learned = train_encoding(["ab", "ab", "ab abc", "bc", "bc"], 260)
    assert [learned.decode_single_token_bytes(t) for t in range(256, learned.n_vocab)] == [b"ab", b"bc", b" ab", b" abc"]


@pytest.mark.parametrize("text", UNICODE)
def test_any_text_survives_encoding_and_storing(encoding, text):
    again = unpack_encoding(json.loads(json.dumps(pack_encoding(encoding))))
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert again.encode_ordinary(text) == encoding.encode_ordinary(text) and again.n_vocab == encoding.n_vocab


@pytest.fixture(scope="module")
def public_files(tmp_path_factory):
    """A made-up vocab.json and merges.txt in GPT-2's form: bytes, ten merges, in an order that learning could have given,
    and the end-of-text token."""
    from tokenizers.pre_tokenizers import ByteLevel
    letters = sorted(ByteLevel.alphabet())
    merges = ["a t", "Ġ f", "o x", "at i", "ati n", "Ġf ox", "i n", "Ã ©", "Ġ Ġ", "Ċ Ċ"]
    words = letters + ["".join(m.split()) for m in merges] + ["<|endoftext|>"]
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    return folder


@pytest.mark.parametrize("text", UNICODE + ["a fox  eating at a café\n\nfoxes in latin"])
def test_public_vocabulary_gives_the_tokens_of_transformers(public_files, text):
    import_open_clip()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Tokenizer.from_pretrained(public_files)
    ours = gpt2_encoding(public_files / "vocab.json", public_files / "merges.txt")
    assert ours.encode_ordinary(text) == theirs(text)["input_ids"]
    assert ours.n_vocab == 267 and unpack_encoding(pack_encoding(ours)).encode_ordinary(text) == ours.encode_ordinary(text)


def test_public_vocabulary_is_found_in_tiktokens_cache_and_missed_in_one_line(public_files, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="put GPT-2's vocab.json and merges.txt beside it"):
        find_encoding(tmp_path / "model.safetensors")
    # the names that tiktoken 0.14 gives the two files: sha1 of their addresses
    (tmp_path / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6").write_bytes((public_files / "vocab.json").read_bytes())
    (tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").write_bytes((public_files / "merges.txt").read_bytes())
    assert find_encoding(tmp_path / "model.safetensors").encode_ordinary(" fox") == [261]


def test_files_that_do_not_belong_together_are_refused(public_files, tmp_path):
    (tmp_path / "merges.txt").write_text("o x\na t\n")
    with pytest.raises(ValueError, match="do not belong together"):
        gpt2_encoding(public_files / "vocab.json", tmp_path / "merges.txt")


def test_public_weights_load_with_the_vocabulary_beside_them(public_files):
    import_open_clip()
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=267, n_positions=40, n_embd=64, n_layer=1, n_head=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(public_files)
    writer = EditWriter.load(public_files / "model.safetensors")
    assert isinstance(writer.complete("a fox", 0), str) and writer.complete("x" * 50, 0) == ""


# ---- writing

class Scripted(EditWriter):
    """Writes an edit for captions that do not hold "bad", noting what it is asked."""

    def complete(self, caption, seed):
        self.asked = getattr(self, "asked", []) + [caption]
        return "no" if "bad" in caption else make_completion(f"make it {len(caption)}", f"{caption} {len(caption)}")


CAPTIONS = [(f"{'bad' if i % 3 == 1 else 'a'} fox {i}é", f"http://{i}") for i in range(12)]


def test_a_caption_is_seeded_on_its_own(encoding):
    writer = tiny(encoding)
    one, two = writer.complete("a fox", 0, temperature=1.0), writer.complete("a cat", 0, temperature=1.0)
    assert (writer.complete("a cat", 0, temperature=1.0), writer.complete("a fox", 0, temperature=1.0)) == (two, one)
    assert one != two and writer.complete("a fox", 1, temperature=1.0) != one


def test_edits_are_written_once_for_each_caption_and_address(encoding, tmp_path):
    captions = CAPTIONS + [("a fox 0é ", "http://new"), ("something else", "http://0")]
    report = generate_edits(Scripted(tiny(encoding).model, encoding), captions, tmp_path / "edits.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text("utf-8").splitlines()]
    assert rows[0] == {"caption": "a fox 0é", "edit": "make it 8", "output": "a fox 0é 8", "url": "http://0"}
    assert [row["url"] for row in rows] == [url for caption, url in CAPTIONS if "bad" not in caption]
    assert (report["tried"], report["accepted"], report["instructions"], report["kinds"]) == (12, 8, 2, {"words added": 8})
    assert report["share"] == pytest.approx(8 / 12, abs=1e-4) and report["examples"][0]["edit"] == "make it 8"
    assert read_triples([tmp_path / "edits.jsonl"])[0]["input"] == "a fox 0é"


@pytest.mark.parametrize("stopped", range(1, 12, 2))
@pytest.mark.parametrize("torn", [0, 1, 20])
def test_a_killed_run_goes_on_to_the_files_of_one_that_was_not(encoding, tmp_path, stopped, torn):
    """Killed while writing a line: the last `torn` bytes of what was written last are lost."""
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    writer = Scripted(tiny(encoding).model, encoding)
    expected = generate_edits(writer, CAPTIONS, whole)
    generate_edits(writer, CAPTIONS[:stopped], parts)
    last = rejected_path(parts) if "bad" in CAPTIONS[stopped - 1][0] else parts
    last.write_bytes(last.read_bytes()[:-torn or None])
    writer.asked = []
    assert generate_edits(writer, CAPTIONS, parts) == expected
    assert parts.read_bytes() == whole.read_bytes()
    assert rejected_path(parts).read_bytes() == rejected_path(whole).read_bytes()
    assert writer.asked == [caption for caption, _ in CAPTIONS[stopped - (torn > 0):]]           # nothing is tried twice


def test_count_ends_an_endless_source_and_more_can_be_asked_for(encoding, tmp_path):
    writer, endless = Scripted(tiny(encoding).model, encoding), lambda: world_captions(World())
    assert generate_edits(writer, endless(), tmp_path / "edits.jsonl", count=5)["accepted"] == 5
    assert generate_edits(writer, endless(), tmp_path / "edits.jsonl", count=7)["accepted"] == 7
    assert generate_edits(writer, endless(), tmp_path / "at-once.jsonl", count=7)["accepted"] == 7
    assert (tmp_path / "edits.jsonl").read_bytes() == (tmp_path / "at-once.jsonl").read_bytes()


def test_a_model_that_writes_no_edits_is_noticed(encoding, tmp_path):
    with pytest.raises(ValueError, match="of 500 completions none is an edit; the last: 'no'"):
        endless = ((f"bad {i}", None) for i in count())
        generate_edits(Scripted(tiny(encoding).model, encoding), endless, tmp_path / "edits.jsonl", count=1)


def test_edits_of_another_seed_or_model_are_not_mixed(encoding, tmp_path):
    path = tmp_path / "edits.jsonl"
    one, other = (Scripted(tiny(encoding, seed).model, encoding) for seed in (0, 1))
    generate_edits(one, CAPTIONS[:3], path)
    for writer, seed in ((one, 1), (other, 0)):
        with pytest.raises(ValueError, match="begun with other settings"):
            generate_edits(writer, CAPTIONS, path, seed=seed)
    rejected_path(path).unlink()
    path.write_bytes(path.read_bytes().rstrip(b"\n"))                        # as an editor may leave it: nothing of it is lost
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="which says how they were made, is missing"):
        generate_edits(writer, CAPTIONS, path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("caption, output, kind", [
    ("a fox in the forest", "a fox in the forest at night", "time"),
    ("a red fox in the forest", "a blue owl in the forest", "object"),
    ("a fox and an owl in the forest", "an owl in the desert", "place+remove"),
    ("Old barn, Vermont", "Old barn, Vermont, in fog", "words added"),
    ("Girl laughing on a swing", "Girl crying on a swing", "words exchanged"),
    ("Girl laughing on a swing", "Girl on a swing", "words taken away"),
    ("Low poly render of a whale", "Knitted whale", "words rewritten")])
def test_kinds_of_edit(caption, output, kind):
    assert edit_kind(caption, output) == kind


# ---- the stage, and what it left

def train(*flags):
    command = [sys.executable, str(ROOT / "train.py"), "--stage", "edits", "--batch-size", "2", "--score-examples", "1",
               "--device", "cpu", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_stage_writes_a_model_that_opens_and_can_be_trained_further(tmp_path):
    result = train("--out", tmp_path / "a", "--steps", 4, "--pretrain-steps", 2)
    assert result.returncode == 0, result.stderr
    file = tmp_path / "a" / "mini-gpt.safetensors"
    record = EditWriter.load(file).record
    assert record["steps"] == 4 and record["triples"] == 700
    assert set(record["scores"]) == {"train", "combinations", "phrasings"}
    few = tmp_path / "few.jsonl"
    few.write_text('{"caption": "a fox", "edit": "make it night", "output": "a fox at night"}\n')
    result = train("--out", tmp_path / "b", "--steps", 2, "--base", file, "--triples", few)
    assert result.returncode == 0, result.stderr
    assert EditWriter.load(tmp_path / "b" / "mini-gpt.safetensors").record["triples"] == 1
    few.write_text('{"caption": "a fox"}\n')
    result = train("--out", tmp_path / "b", "--steps", 2, "--base", file, "--triples", few)
    assert result.returncode == 2 and result.stderr.startswith(f"train.py: {few}:1: a triple needs non-empty texts 'input'")
    assert result.stderr.endswith("lacks edit, output\n") and result.stderr.count("\n") == 1


@pytest.mark.skipif(not SHIPPED.exists(), reason="no shipped language model")
def test_the_shipped_model_writes_edits_of_new_captions():
    """Of the split "combinations", which no training saw. The file's record has the figures on many more."""
    writer, world = EditWriter.load(SHIPPED), World()
    captions = [world.caption(777, i, "combinations")[1] for i in range(40)]
    completions = [writer.complete(caption, 0) for caption in captions]
    assert sum(text.endswith(STOP) and text.count(DELIMITER_1) == 1 for text in completions) >= 38
    edits = [(caption, edit) for caption, text in zip(captions, completions) if (edit := parse_completion(caption, text))]
    assert len(edits) >= 32                                          # the others leave the caption as it was
    verdicts = [judge(caption, *edit)[1] for caption, edit in edits]
    assert verdicts.count("right") >= 0.85 * len(edits), verdicts
    assert len({instruction for _, (instruction, _) in edits}) >= 25
