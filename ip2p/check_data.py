"""What is wrong with a data set of pairs, file by file: `python make_data.py --check DIR`."""
import contextlib
from collections import Counter
from pathlib import Path

from .data import find_pairs, is_seeds, list_seeds, list_tables, listed_row, prompt_texts, read_json, read_jsonl
from .images import open_image


def check_dataset(path) -> list[str]:
    """What is wrong with a data set in any layout, a line for each thing, naming its file; [] if nothing is."""
    path = Path(path)
    tables, lists = list_tables(path), [path] if path.suffix == ".jsonl" else sorted(path.glob("*.jsonl"))
    named_so = not (tables or lists) and any(path.glob("*/*_0.jpg"))
    if (path / "seeds.json").exists() or any(path.glob("*/prompt.json")) or named_so:
        return _check_published(path)
    problems, pairs, seen = [], [], set()
    if not tables and len(lists) == 1:
        for n, row in read_jsonl(lists[0], problems):
            with _noting(problems):
                pairs.append(listed_row(row, f"{lists[0]}:{n}", lists[0].parent))
                if pairs[-1] in seen:
                    problems.append(f"{lists[0]}:{n}: the same as an earlier line")
                seen.add(pairs[-1])
        if not (pairs or problems):
            problems.append(f"{lists[0]}: a data set without pairs")
    else:
        with _noting(problems):
            found = find_pairs(path)
            pairs = [pair for i in range(len(found)) for pair in found[i]]
    for before, after, _ in pairs:
        _check_pair(before, after, problems)
    return problems


@contextlib.contextmanager
def _noting(problems):
    """A ValueError in the block becomes a problem."""
    try:
        yield
    except ValueError as error:
        problems.append(str(error))


def _check_pair(before, after, problems):
    """Two pictures that can be read, of one size."""
    sizes = []
    for picture in (before, after):
        with _noting(problems):
            sizes.append(open_image(picture).size)
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        problems.append(f"{after}: {sizes[1][0]}x{sizes[1][1]}, but its input is {sizes[0][0]}x{sizes[0][1]}")


def _check_published(path):
    leftovers = sorted([*path.glob(".*.tmp"), *path.glob("*/.*.tmp")])
    problems = [f"{p}: left over by a run that was interrupted, or goes on" for p in leftovers]
    there = {(name, seed) for name, seeds in list_seeds(path) for seed in seeds}
    said, file = set(), path / "seeds.json"
    with _noting(problems):
        seeds = read_json(file)
        if not is_seeds(seeds):
            raise ValueError(f"{file}: needed a list of [folder, [seed, ...]]")
        said = {(name, str(seed)) for name, found in seeds for seed in found}
        if not (said or there):
            drawn = any(path.glob("*/rest/*_0.jpg"))
            problems.append(f"{path}: a data set without pairs" + "; --filter-only chooses from those that were drawn" * drawn)
        if [name for name, _ in seeds] != sorted({name for name, _ in seeds}):
            problems.append(f"{file}: its folders are not sorted, or one comes twice")
        problems += [f"{file}: lists a pair that is not there: {name}/{seed}_0.jpg" for name, seed in sorted(said)
                     if not (path / name / f"{seed}_0.jpg").exists()]
        problems += [f"{file}: does not list {name}/{seed}_0.jpg" for name, seed in sorted(there - said)]
    folders = {p.parent for p in path.glob("*/prompt.json")} | {path / name for name, _ in there | said}
    for folder in sorted(folders):
        _check_prompt(folder, problems)
    return problems


def _check_prompt(folder, problems):
    with _noting(problems):
        prompt_texts(read_json(folder / "prompt.json"), folder / "prompt.json")
    seeds = {}
    for place in (folder, folder / "rest"):
        seeds[place] = sorted({p.name.rpartition("_")[0] for p in place.glob("*_[01].jpg")})
        for seed in seeds[place]:
            _check_pair(place / f"{seed}_0.jpg", place / f"{seed}_1.jpg", problems)
    for name in ("metadata.jsonl", "samples.jsonl"):
        file = folder / name
        if not file.exists():
            if name == "metadata.jsonl" and seeds[folder]:
                problems.append(f"{file}: no such file")
            continue
        rows = [str(row.get("seed")) for _, row in read_jsonl(file, problems)]
        problems += [f"{file}: seed {seed} comes {n} times" for seed, n in Counter(rows).items() if n > 1]
        if name == "metadata.jsonl":
            problems += [f"{file}: no line for {seed}_0.jpg" for seed in seeds[folder] if seed not in rows]
            problems += [f"{file}: no pictures of seed {seed}" for seed in dict.fromkeys(rows) if seed not in seeds[folder]]
