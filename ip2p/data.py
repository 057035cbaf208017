"""Pairs of pictures with an instruction, on disk: what `make_data.py` writes and `train.py` reads.

Three layouts are read:
- the published one: folders `0000012/` with `prompt.json`, pictures `{seed}_0.jpg` and `{seed}_1.jpg` and their scores in
  `metadata.jsonl`; `seeds.json` beside them lists [[folder, [seed, ...]], ...];
- a folder with one .jsonl file (or that file's path): a line names an input picture, an edited picture, both relative to
  the file, and an instruction, under any of the names in KEYS;
- Parquet files as on the Hugging Face hub, one or a folder of them: the same names are columns, pictures {bytes, path}.
  They are held in memory. Where some are named train-*, the others are left alone.
"""
import copy
import hashlib
import io
import json
import math
import os
import random
from itertools import chain, islice
from pathlib import Path
from typing import Iterator

import torch
from PIL import Image
from torch import Tensor

from .images import contact_sheet, open_image, save_image, to_pixels

KEYS = {"input picture": ("input_image", "original_image", "source_image", "source_img", "input"),
        "edited picture": ("edited_image", "output_image", "target_image", "target_img", "output"),
        "instruction": ("edit_prompt", "edit", "instruction", "prompt")}
SPLITS = {"train": (0.0, 0.9), "val": (0.9, 0.95), "test": (0.95, 1.0)}               # as published


class PairedDataset(torch.utils.data.Dataset):
    """(input, edited, instruction): pixels (3, crop_res, crop_res) float32 in [-1, 1], and a string.

    An epoch has one random pair of each prompt. Both pictures are resized so that their shorter side is a random number in
    min_resize_res..max_resize_res, cropped at one random place, and mirrored together with probability flip_prob.
    All of that depends on (seed, epoch, index) alone: `example` gives it for any epoch, indexing for `self.epoch`.

    split: "train", "val" or "test", the first 90%, the next 5% and the last 5% of the prompts, or "all". Raises ValueError
    for what is no data set, and, when it comes to an example, for a picture that cannot be read, naming its file.
    """

    def __init__(self, path, split="train", *, min_resize_res=256, max_resize_res=256, crop_res=256, flip_prob=0.5, seed=0):
        if not crop_res <= min_resize_res <= max_resize_res:
            raise ValueError(f"needed crop_res <= min_resize_res <= max_resize_res, got {crop_res}, {min_resize_res} and "
                             f"{max_resize_res}")
        if split != "all" and split not in SPLITS:
            raise ValueError(f"split must be all, {', '.join(SPLITS)}, got {split!r}")
        self.pairs = find_pairs(path)
        self.prompts = self._prompts(split)
        self.sizes, self.crop_res, self.flip_prob, self.seed = (min_resize_res, max_resize_res), crop_res, flip_prob, seed
        self.epoch = 0

    def _prompts(self, split):
        first, last = SPLITS.get(split, (0, 1))
        return range(math.floor(first * len(self.pairs)), math.floor(last * len(self.pairs)))

    def split(self, name: str, flip_prob: float) -> "PairedDataset":
        """Another split of the same pairs, which are not read again."""
        other = copy.copy(self)
        other.prompts, other.flip_prob = self._prompts(name), flip_prob
        return other

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, index):
        return self.example(self.epoch, range(len(self))[index])

    def order(self, epoch: int) -> list[int]:
        """The indices of an epoch, shuffled."""
        return random.Random(f"order/{self.seed}/{epoch}").sample(range(len(self)), len(self))

    def example(self, epoch: int, index: int) -> tuple[Tensor, Tensor, str]:
        """The example of an epoch. The same arguments give the same example."""
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        before, after, instruction = rng.choice(self.pairs[self.prompts[index]])
        if isinstance(instruction, Path):
            instruction, = prompt_texts(read_json(instruction), instruction, ["edit"])
        size, before, after = rng.randint(*self.sizes), open_image(before), open_image(after)
        width, height = (max(size, round(side * size / min(before.size))) for side in before.size)
        left, top = rng.randint(0, width - self.crop_res), rng.randint(0, height - self.crop_res)
        rows, columns = slice(top, top + self.crop_res), slice(left, left + self.crop_res)
        mirror = rng.random() < self.flip_prob
        both = (to_pixels(picture, width, height)[:, rows, columns] for picture in (before, after))
        return *(pixels.flip(2) if mirror else pixels for pixels in both), instruction

    def whole_example(self, epoch: int, index: int) -> tuple[tuple, list[str]]:
        """The example of an epoch, or the first of its stand-ins whose files can be read; and what is wrong with those
        before it. ValueError if none can be."""
        complaints = []
        for i in chain([index], self.stand_ins(epoch, index)):
            try:
                return self.example(epoch, i), complaints
            except ValueError as error:
                complaints.append(str(error))
        raise ValueError(f"no pair can be read; the first: {complaints[0]}" if complaints else "a data set without pairs")

    def stand_ins(self, epoch: int, index: int) -> Iterator[int]:
        """All indices, in an order of its own for each example: what takes the place of one that cannot be read. So where
        many are missing in a row, no single other comes in place of all."""
        rng, count = random.Random(f"{self.seed}/{epoch}/{index}/stand-ins"), len(self)
        first, stride = rng.randrange(count), rng.randrange(1, count + 1)
        while math.gcd(stride, count) > 1:
            stride = rng.randrange(1, count + 1)
        return ((first + i * stride) % count for i in range(count))

    def fingerprint(self, look=True) -> str:
        """A hash of what the examples depend on: the settings, the instructions and names of the files; look: and what their
        sizes and times are."""
        found = hashlib.sha256(repr((self.prompts, self.sizes, self.crop_res, self.flip_prob, self.seed)).encode())
        for i in self.prompts:
            found.update(repr([[_describe(part, look) for part in pair] for pair in self.pairs[i]]).encode())
        return found.hexdigest()


def _describe(part, look):
    """What tells a picture or an instruction from any that could take its place."""
    if isinstance(part, Path):
        stat = part.stat() if look and part.exists() else None
        return f"{part.parent.name}/{part.name}", stat and (stat.st_size, stat.st_mtime_ns)
    return hashlib.sha256(part.getvalue()).hexdigest() if isinstance(part, EncodedPicture) else part


# ---- the layouts: each a sequence over prompts of lists of (input, edited, instruction)

def find_pairs(path):
    """The pairs of a data set in any layout. Pictures are paths or open files, an instruction may be the Path of a
    prompt.json: none of them has been read. ValueError if there is no data set."""
    path = Path(path)
    if (path / "seeds.json").is_file():
        pairs = PublishedFolder(path)
    elif tables := list_tables(path):
        pairs = ParquetTables(tables)
    elif len(lists := [path] if path.suffix == ".jsonl" else sorted(path.glob("*.jsonl"))) == 1:
        pairs = [[listed_row(row, f"{lists[0]}:{n}", lists[0].parent)] for n, row in read_jsonl(lists[0])]
    else:
        raise ValueError(f"{path}: not a data set: needed a folder with seeds.json, one .jsonl file or .parquet files" +
                         (f"; it has {len(lists)} .jsonl files" if lists else "" if path.exists() else "; there is nothing there"))
    if not len(pairs):
        raise ValueError(f"{path}: a data set without pairs")
    return pairs


def list_tables(path: Path) -> list[Path]:
    """A data set's Parquet files: of several those named train-*, if there are such."""
    tables = [path] if path.suffix == ".parquet" else sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    return [table for table in tables if table.name.startswith("train-")] or tables


class PublishedFolder:
    """The published layout. Only seeds.json is held in memory."""

    def __init__(self, path):
        self.path, self.seeds = Path(path), read_json(Path(path) / "seeds.json")
        if not is_seeds(self.seeds):
            raise ValueError(f"{path}/seeds.json: needed a list of [folder, [seed, ...]]")

    def __len__(self):
        return len(self.seeds)

    def __getitem__(self, i):
        name, seeds = self.seeds[i]
        folder = self.path / name
        return [(folder / f"{seed}_0.jpg", folder / f"{seed}_1.jpg", folder / "prompt.json") for seed in seeds]


def is_seeds(seeds) -> bool:
    return isinstance(seeds, list) and all(
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], list) and entry[1]
        for entry in seeds)


def pick(row: dict, where: str) -> list:
    """Input picture, edited picture and instruction of a row, under whichever of their names it has."""
    found = []
    for what, names in KEYS.items():
        value = next((row[key] for name in names for key in (name, f"{name}_file_name") if row.get(key) is not None), None)
        if value is None or isinstance(value, str) and not value.strip():
            raise ValueError(f"{where}: no {what}: needed one of {', '.join(names)}; there is {', '.join(row) or 'nothing'}")
        found.append(value)
    return found


def listed_row(row, where, folder):
    before, after, instruction = pick(row, where)
    return folder / str(before), folder / str(after), str(instruction)


class EncodedPicture(io.BytesIO):
    """The bytes of a picture file, and what messages call it."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self.name = name

    def __str__(self):
        return self.name


class ParquetTables:
    """Rows of Parquet files, held in memory as encoded as they are. Pictures open anew whenever they are asked for."""

    def __init__(self, paths):
        size = sum(path.stat().st_size for path in paths if path.exists())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if size > memory:                                 # or the system would kill the process, after hours of reading
            raise ValueError(f"{paths[0].parent}: {size / 1e9:.3g} GB of Parquet files, which every process holds in memory, and "
                             f"there are {memory / 1e9:.3g} GB; needed pictures in files, in the published layout or with a .jsonl")
        self.rows = [row for path in paths for row in self._read(path)]

    def _read(self, path):
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{path}: reading Parquet files takes pyarrow: pip install pyarrow") from None
        try:
            columns = [c for c in pyarrow.parquet.read_schema(path).names if any(c in names for names in KEYS.values())]
            rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path}: not a Parquet file that can be read ({' '.join(str(error).split())})") from None
        for n, row in enumerate(rows):
            name = f"{path}, row {n}"
            before, after, instruction = pick(row, name)
            if not all(isinstance(picture, dict) and isinstance(picture.get("bytes"), bytes) for picture in (before, after)):
                raise ValueError(f"{name}: pictures must be structs with the bytes of a file")
            yield name, before["bytes"], after["bytes"], str(instruction)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        name, before, after, instruction = self.rows[i]
        return [(EncodedPicture(before, f"{name}, input"), EncodedPicture(after, f"{name}, edited"), instruction)]


# ---- files

def read_json(path):
    """ValueError, naming the file, if it is not there or is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def read_jsonl(path, problems: list[str] | None = None) -> Iterator[tuple[int, dict]]:
    """(line number from 1, object) of every line that is not blank. Any other line is a ValueError naming file and line, or
    is added to `problems` if that list is given."""
    try:
        with open(path, "rb") as lines:
            for n, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise ValueError("needed an object")
                    except ValueError as error:
                        if problems is None:
                            raise ValueError(f"{path}:{n}: not a line of JSON ({error})") from None
                        problems.append(f"{path}:{n}: not a line of JSON ({error})")
                    else:
                        yield n, row
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None


def prompt_texts(record, where, names=("caption", "edit", "output")) -> list[str]:
    """Caption, instruction and edited caption of a prompt, or those of them that are named. The caption may be called "input", as
    in the published files. ValueError if one is missing or blank."""
    record = record if isinstance(record, dict) else {}
    texts = [first_text(record, *(("caption", "input") if name == "caption" else (name,))) for name in names]
    for name, text in zip(names, texts):
        if text is None:
            raise ValueError(f"{where}: a prompt needs a text as {name!r}")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"{where}: {name!r} has half of a character (a surrogate without its other)")
    return texts


def first_text(record: dict, *names: str) -> str | None:
    """The first of the entries named that is a text, and not a blank one; None if there is none."""
    return next((text for name in names if isinstance(text := record.get(name), str) and text.strip()), None)


def list_seeds(path) -> list:
    """What seeds.json must say of a published folder: sorted [[folder, [seed, ...]], ...] of the pairs that are there."""
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    seeds = ((name, sorted(p.name.removesuffix("_0.jpg") for p in (Path(path) / name).glob("*_0.jpg"))) for name in names)
    return [[name, found] for name, found in seeds if found]


# ---- writing the published layout

def write_file(path, text: str, scratch: Path):
    """A file that is there whole or not at all. It is made in `scratch`, a folder on the same disk that is the writer's own
    and that the writer empties when it starts: so nothing is ever left over."""
    temporary = scratch / "file"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_rows(path, rows: list[dict], scratch: Path):
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows), scratch)


def find_pictures(folder: Path, row: dict) -> list[Path]:
    """The two pictures of a sample in a prompt's folder: in the folder itself if it is kept, else in rest/, or one in either
    if a run ended while it moved them. [] unless both are there."""
    places = folder, folder / "rest"
    paths = [p for k in range(2) for place in places if (p := place / f"{row['seed']}_{k}.jpg").exists()]
    return paths if len(paths) == 2 else []


def keep_pictures(folder: Path, rows: list[dict], kept: list[dict], scratch: Path):
    """Move the pictures of the rows that are kept into a prompt's folder and all others into rest/, and list the kept in
    metadata.jsonl. Repeated after any kind of end, it completes."""
    (folder / "rest").mkdir(exist_ok=True)
    for row in rows:
        for k in range(2):
            name = f"{row['seed']}_{k}.jpg"
            here, there = (folder, folder / "rest") if row in kept else (folder / "rest", folder)
            if (there / name).exists():
                os.replace(there / name, here / name)
    write_rows(folder / "metadata.jsonl", kept, scratch)


def direction(row: dict) -> float:
    """A row's direction similarity, 0 if it has none."""
    score = row.get("clip_sim_dir")
    return score if isinstance(score, (int, float)) else 0.0


def write_sheet(out: Path, scratch: Path):
    """out/sheet.png: of each of the first prompts the best pair that was kept, up to 40, then the worst that was not, up to 24."""
    cells = [], []
    for file in islice(sorted(out.glob("*/samples.jsonl")), 200):
        folder, (caption, edit, _) = file.parent, prompt_texts(read_json(file.parent / "prompt.json"), file.parent)
        rows = sorted((row for _, row in read_jsonl(file) if "seed" in row), key=direction, reverse=True)
        for cell, place, most_here in zip(cells, (folder, folder / "rest"), (40, 24)):
            ranked = rows if place == folder else rows[::-1]
            found = next((row for row in ranked if [p.parent for p in find_pictures(folder, row)] == [place, place]), None)
            if found and len(cell) < 2 * most_here:
                pictures = [open_image(path) for path in find_pictures(folder, found)]
                for picture in pictures:
                    picture.thumbnail((160, 160))
                verdict = "kept" if place == folder else "not kept" if "clip_sim_dir" in found else "not filtered"
                scores = [f"{name[5:]} {found[name]:.2f}" for name in found
                          if name.startswith("clip_") and isinstance(found[name], (int, float))]
                cell.extend(zip(pictures, (caption, f"[{edit}] {verdict}: {', '.join(scores)}")))
    blank = [(Image.new("RGB", (1, 1), "white"), "")] * (-len(cells[0]) % 8)          # rejected pairs begin a new row
    if any(cells):
        save_image(contact_sheet(cells[0] + blank + cells[1], lines=6), scratch / "sheet.png")
        os.replace(scratch / "sheet.png", out / "sheet.png")
