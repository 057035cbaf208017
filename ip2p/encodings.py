"""Encodings of text into tokens: byte-level BPE (Sennrich et al. 2016, Radford et al. 2019), GPT-2's and smaller ones.

All are tiktoken's; only learning the merges, and reading GPT-2's public files without a network, are done here.
"""
import base64
import hashlib
import json
import os
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Iterable

import regex
import tiktoken

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"      # how GPT-2 cuts text into words
PUBLIC_FILES = [f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
                for name in ("encoder.json", "vocab.bpe")]


def train_encoding(texts: Iterable[str], vocab_size: int) -> tiktoken.Encoding:
    """An encoding of at most `vocab_size` tokens, learned from texts: beginning with single bytes, again and again the
    most frequent neighbours within words become one; among equals, the pair that is smaller as bytes."""
    counts = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in sorted(counts.items())]
    ranks, pairs = {bytes([b]): b for b in range(256)}, Counter()
    homes = defaultdict(set)                            # pair -> numbers of the words that hold it

    def tally(number, sign):
        parts, n = words[number]
        for pair in zip(parts, parts[1:]):
            pairs[pair] += sign * n
            homes[pair].add(number)

    for number in range(len(words)):
        tally(number, 1)
    while len(ranks) < vocab_size:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or not pairs[best]:
            break
        ranks[best[0] + best[1]] = len(ranks)
        for number in homes.pop(best):
            tally(number, -1)
            parts, i = words[number][0], 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i:i + 2] = [best[0] + best[1]]
                i += 1
            tally(number, 1)
        pairs = +pairs                                  # drop those that are no more
    return _encoding(ranks)


def _encoding(ranks: dict[bytes, int], special: dict[str, int] | None = None) -> tiktoken.Encoding:
    return tiktoken.Encoding("ip2p", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special or {})


def gpt2_encoding(vocab: str | Path, merges: str | Path) -> tiktoken.Encoding:
    """The encoding of a `vocab.json` and a `merges.txt` as OpenAI published them (there `encoder.json`, `vocab.bpe`).
    Raises ValueError if they do not belong together."""
    ids = json.loads(Path(vocab).read_text("utf-8"))
    # Printable bytes stand for themselves, the others, in order, for the letters from 256 on.
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    lines = Path(merges).read_text("utf-8").split("\n")
    merged = ["".join(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    special = {word: i for word, i in ids.items() if word == "<|endoftext|>"}
    order = [ids.get(word, -1) for word in merged]
    # tiktoken merges by the number of the result: it must rise with the line
    if order != sorted(set(order)) or set(ids) - set(special) != set(byte_of) | set(merged):
        raise ValueError(f"{vocab} and {merges} do not belong together")
    return _encoding({bytes(byte_of[c] for c in word): i for word, i in ids.items() if word not in special}, special)


def find_encoding(weights: Path) -> tiktoken.Encoding:
    """The encoding for public GPT-2 weights: of vocab.json and merges.txt beside them, or else in tiktoken's cache. It does
    not look on the network; ValueError says what to do."""
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
                 or Path(tempfile.gettempdir()) / "data-gym-cache")
    for files in ([weights.parent / name for name in ("vocab.json", "merges.txt")],
                  [cache / hashlib.sha1(url.encode()).hexdigest() for url in PUBLIC_FILES]):
        if all(file.exists() for file in files):
            return gpt2_encoding(*files)
    raise ValueError(f"no encoding for {weights}: put GPT-2's vocab.json and merges.txt beside it, or fill tiktoken's cache "
                     f"({cache}) by tiktoken.get_encoding('gpt2')")


def pack_encoding(encoding: tiktoken.Encoding) -> dict:
    """What a model file's record says of its encoding."""
    tokens = {encoding.encode_single_token(t): t for t in encoding.token_byte_values()}
    assert sorted(tokens) == list(range(len(tokens))), "tokens are numbered without gaps, special ones last"
    return dict(tokens=" ".join(base64.b64encode(tokens[i]).decode() for i in range(len(tokens))),
                special={text: encoding.encode_single_token(text) for text in encoding.special_tokens_set})


def unpack_encoding(record: dict) -> tiktoken.Encoding:
    tokens = [base64.b64decode(token) for token in record["tokens"].split(" ")]
    return _encoding({token: i for i, token in enumerate(tokens)}, record["special"])
