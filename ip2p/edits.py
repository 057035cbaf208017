"""Writing edits: a fine-tuned GPT-2 turns a caption into an instruction and the edited caption (InstructPix2Pix, 3.1.1).

A triple is a caption, an instruction and the edited caption; to the model it is the text

    caption \\n##\\n instruction \\n%%\\n edited caption \\nEND

with the delimiters of the published data. The part up to `##` is the prompt, the rest the completion.
"""
import csv
import hashlib
import json
import os
from collections import Counter
from itertools import count as count_from
from pathlib import Path
from typing import Callable, Iterable, Iterator

import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from .data import first_text, read_jsonl
from .encodings import find_encoding, unpack_encoding
from .gpt import GPT, generate, load_gpt
from .world import World
from .world_reader import changes, read

DELIMITER_0, DELIMITER_1, STOP = "\n##\n", "\n%%\n", "\nEND"


# ---- triples as text

def make_prompt(caption: str) -> str:
    return caption + DELIMITER_0


def make_completion(edit: str, output: str) -> str:
    return edit + DELIMITER_1 + output + STOP


def plain(text: str) -> str:
    """A caption as the published rule compares it."""
    return text.strip().strip(".!?").lower()


def parse_completion(caption: str, completion: str) -> tuple[str, str] | None:
    """(instruction, edited caption), or None: unfinished, not of two non-empty lines, or the caption is as it was."""
    text, stop, _ = completion.partition(STOP)
    parts = [part.strip() for part in text.split(DELIMITER_1)]
    if not stop or len(parts) != 2 or not all(parts) or any("\n" in part for part in parts):
        return None
    return None if plain(parts[1]) == plain(caption) else (parts[0], parts[1])


def read_triples(paths: Iterable[str | Path]) -> list[dict]:
    """Triples {"input", "edit", "output"} of jsonl files, the caption under either of its published names, "input" or
    "caption". Raises ValueError with file and line for what is none, or would not be accepted if the model wrote it."""
    triples = []
    for path in paths:
        for number, row in read_jsonl(path):
            triple = {"input": first_text(row, "input", "caption"), "edit": first_text(row, "edit"),
                      "output": first_text(row, "output")}
            missing = [key for key, text in triple.items() if text is None]
            if missing:
                raise ValueError(f"{path}:{number}: a triple needs non-empty texts 'input' (or 'caption'), 'edit' and "
                                 f"'output'; lacks {', '.join(missing)}")
            if parse_completion(triple["input"], make_completion(triple["edit"], triple["output"])) is None:
                raise ValueError(f"{path}:{number}: the edited caption is the caption, or a text has several lines: "
                                 f"{triple}")
            triples.append(triple)
    if not triples:
        raise ValueError(f"no triples in {', '.join(map(str, paths))}")
    return triples


def completion_loss(model: GPT, pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean cross-entropy of the completions' tokens, given (prompt, completion) tokens; prompts are not learned."""
    device, total = model.wte.weight.device, 0
    pairs = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
    for part in filter(None, (pairs[:len(pairs) // 2], pairs[len(pairs) // 2:])):       # short ones apart: less padding
        rows = [torch.tensor(prompt + completion) for prompt, completion in part]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        target = [torch.tensor([-100] * len(prompt) + completion) for prompt, completion in part]
        target = nn.utils.rnn.pad_sequence(target, batch_first=True, padding_value=-100).to(device)
        total = total + F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), target[:, 1:].flatten(), reduction="sum")
    return total / sum(len(completion) for _, completion in pairs)


# ---- writing

class EditWriter:
    """A language model with its encoding, that writes an edit for a caption."""

    def __init__(self, model: GPT, encoding: tiktoken.Encoding, record: dict | None = None):
        self.model, self.encoding, self.record = model, encoding, record or {}

    @classmethod
    def load(cls, path: str | Path, device=None) -> "EditWriter":
        """From a file that `save_gpt` wrote, or public GPT-2 weights (`find_encoding`). ValueError names the file."""
        model, record = load_gpt(path, device)
        encoding = unpack_encoding(record["encoding"]) if "encoding" in record else find_encoding(Path(path))
        if encoding.n_vocab > model.config.vocab_size:
            raise ValueError(f"{path} has {model.config.vocab_size} tokens, its encoding {encoding.n_vocab}")
        return cls(model, encoding, record)

    def complete(self, caption: str, seed: int, temperature: float = 0.7) -> str:
        """The model's text for a caption, "" if the caption fills the context. The caption itself is part of the seed: its
        edit depends on no other caption."""
        digest = hashlib.blake2b(f"{seed}\n{caption}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        prompt = self.encoding.encode_ordinary(make_prompt(caption))
        if len(prompt) >= self.model.config.context_length:
            return ""
        done = lambda tokens: STOP in self.encoding.decode(tokens[-len(STOP):])
        return self.encoding.decode(generate(self.model, prompt, 256, stop=done, temperature=temperature, generator=generator))

    def write(self, caption: str, seed: int) -> tuple[str, str] | None:
        """(instruction, edited caption), or None if what the model wrote is no edit."""
        return parse_completion(caption, self.complete(caption, seed))


def read_captions(path: str | Path) -> Iterator[tuple[str, str | None]]:
    """(caption, url or None) of a file: .jsonl or .csv with the caption under "caption", "input" or "TEXT" and the address
    under "url" or "URL", else plain text with a caption a line. Blank ones are left out. Raises ValueError naming file and
    line."""
    path, names = Path(path), ("caption", "input", "TEXT")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with open(path, encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as lines:
            if path.suffix not in (".jsonl", ".csv"):
                yield from ((" ".join(line.split()), None) for line in lines if line.strip())
                return
            rows = read_jsonl(path) if path.suffix == ".jsonl" else enumerate(csv.DictReader(lines), 2)
            for number, row in rows:
                caption = first_text(row, *names)
                if caption is None and not row.keys() & set(names):
                    raise ValueError(f"{path}:{number}: no caption under 'caption', 'input' or 'TEXT'")
                if caption is None:                                             # a blank one
                    continue
                url = row.get("url", row.get("URL"))
                yield " ".join(caption.split()), url and str(url)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:] or 'text'} in UTF-8 ({error})") from None


def world_captions(world: World, seed: int = 0) -> Iterator[tuple[str, None]]:
    """The miniature world's captions, without end."""
    return ((world.caption(seed, i)[1], None) for i in count_from())


def generate_edits(writer: EditWriter, captions: Iterable[tuple[str, str | None]], path: str | Path, *, seed: int = 0,
                   count: int | None = None, admit: Callable[[str], bool] | None = None) -> dict:
    """Append an edit for each caption to a jsonl file {"caption", "edit", "output", "url"}, until there are `count`.

    captions: (caption, url or None); what repeats a caption or a url is passed over. admit: whether an edited caption may be
    kept, any if None. Completions that are no edit, or not admitted, go to `path` with the suffix .rejected.jsonl, so that
    both files together say what was tried: repeated after any kind of end, it goes on, and leaves the files of an
    uninterrupted run. Returns `report`'s dict. Raises ValueError if the files were begun with another seed or model, or if
    none of the first 500 completions is an edit.
    """
    path, rejected = Path(path), rejected_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = hashlib.sha256(b"".join(p.detach().float().cpu().numpy().tobytes() for p in writer.model.parameters()))
    settings = dict(seed=seed, model=weights.hexdigest()[:16])
    if path.exists() and path.stat().st_size and not (rejected.exists() and rejected.stat().st_size):
        raise ValueError(f"{path} holds edits, but {rejected}, which says how they were made, is missing")
    for file in (path, rejected):
        _cut_torn_line(file)
    with open(path, "a", encoding="utf-8") as kept, open(rejected, "a", encoding="utf-8") as others:
        if not others.tell():
            print(json.dumps({"settings": settings}), file=others, flush=True)
        seen, accepted, tried = set(), 0, 0
        for file in (path, rejected):
            for _, row in read_jsonl(file):
                if row.get("settings", settings) != settings:
                    raise ValueError(f"{path} was begun with other settings: {row['settings']}, now {settings}")
                if "caption" in row:
                    seen.update(_keys(row["caption"], row.get("url")))
                    accepted, tried = accepted + (file == path), tried + 1
        with tqdm(total=count, initial=accepted, desc="edits", dynamic_ncols=True, mininterval=1) as bar:
            for caption, url in captions:
                if count is not None and accepted >= count:
                    break
                keys = _keys(caption, url)
                if keys & seen:
                    continue
                seen |= keys
                tried += 1
                completion = writer.complete(caption, seed)
                edit = parse_completion(caption, completion)
                if edit and (admit is None or admit(edit[1])):
                    row = dict(caption=caption, edit=edit[0], output=edit[1], url=url)
                    print(json.dumps(row, ensure_ascii=False), file=kept, flush=True)
                    accepted += 1
                    bar.update()
                else:
                    row = dict(caption=caption, completion=completion, url=url)
                    print(json.dumps(row, ensure_ascii=False), file=others, flush=True)
                    if not accepted and tried >= 500:
                        raise ValueError(f"of {tried} completions none is an edit; the last: {completion[:60]!r}; was this model "
                                         f"fine-tuned on triples?")
    return report(path)


def rejected_path(path: str | Path) -> Path:
    return Path(path).with_suffix(".rejected.jsonl")


def _keys(caption, url):
    """Short hashes by which a caption and its url are known again."""
    texts = ["c" + caption.strip()] + (["u" + url] if url else [])
    return {hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts}


def _cut_torn_line(path):
    """Create the file, or drop what a kill left of its last line."""
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            file.seek(end - 1)
            if file.read(1) == b"\n":
                break
            end -= 1
        file.truncate(end)


def edit_kind(caption: str, output: str) -> str:
    """What an edit changed. A caption of the miniature world is read: kinds as in `ip2p.world.KINDS`, joined by "+". For
    others it is how the words changed: added, taken away, exchanged, or mostly rewritten."""
    a, b = read(caption), read(output)
    if a and b:
        return "+".join(sorted({kind for kind, _, _ in changes(a, b)})) or "none"
    before, after = (Counter(plain(text).replace(",", "").split()) for text in (caption, output))
    gone, new = (before - after).total(), (after - before).total()
    if 2 * gone > before.total():
        return "words rewritten"
    return "words exchanged" if gone and new else "words added" if new else "words taken away" if gone else "words moved"


def report(path: str | Path) -> dict:
    """Of a file of edits: how many captions were tried and accepted, the share, distinct instructions, edits by kind (most
    frequent first), and the first eight to read."""
    accepted, instructions, kinds, shown = 0, set(), Counter(), []
    for _, row in read_jsonl(path):
        accepted += 1
        instructions |= _keys(plain(row["edit"]), None)
        kinds[edit_kind(row["caption"], row["output"])] += 1
        if len(shown) < 8:
            shown.append({key: row[key] for key in ("caption", "edit", "output")})
    tried = accepted + sum("caption" in row for _, row in read_jsonl(rejected_path(path)))
    return dict(tried=tried, accepted=accepted, share=round(accepted / max(tried, 1), 4), instructions=len(instructions),
                kinds=dict(kinds.most_common()), examples=shown)
