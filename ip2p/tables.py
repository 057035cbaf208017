"""Rows of scores: as a Markdown table on the screen, as jsonl in a file."""
import json
from pathlib import Path

from .tensorfiles import replacing


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def decimal(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def print_table(header: list[str], rows: list[list[str]]):
    """The first column to the left, the others to the right."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    print("\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines), flush=True)


def write_rows(path, rows: list[dict]):
    """A jsonl file, if there is a path."""
    if path:
        with replacing(path) as temporary:
            Path(temporary).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
