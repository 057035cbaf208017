"""What a training run leaves in its folder: the last few checkpoints, metrics.jsonl, and loss.png drawn from it."""
import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from .command_line import is_out_of_memory
from .images import save_image
from .tensorfiles import replacing


def list_checkpoints(folder: Path) -> list[Path]:
    """From the oldest to the newest."""
    return sorted(folder.glob("step-*.pt"))


def read_newest(folder: Path, mapped=False) -> dict | None:
    """The newest checkpoint that is whole, or None if there is none at all. One that is cut short or damaged is renamed, so
    that it is not counted among those that are kept. ValueError if all are, or were. mapped: into memory, not read."""
    for path in reversed(found := list_checkpoints(folder)):
        try:
            return torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
        except Exception as error:                           # whatever a damaged file leads to
            if isinstance(error, OSError) or is_out_of_memory(error):
                raise                                        # the file may be good
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
            print(f"{path} is damaged ({reason}); renamed to {path.name}.damaged, going on from the one before", flush=True)
            path.replace(f"{path}.damaged")
    if found or any(folder.glob("step-*.pt.damaged")):
        raise ValueError(f"{folder}: none of its checkpoints can be read; give another --out, or remove it, to start anew")
    return None


def write_checkpoint(folder: Path, record: dict, keep: int) -> Path:
    """Write record["step"]'s checkpoint, and remove all but the last `keep`. ValueError, with the old ones still there, if
    there is no room."""
    path, old = folder / f"step-{record['step']:07d}.pt", list_checkpoints(folder)
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(record, file)
    except (OSError, RuntimeError) as error:
        before = f"{old[-1]} holds the last good state" if old else "nothing is saved yet"
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"{path}: cannot be written ({reason}); {before}: make room and repeat the command") from None
    for outdated in list_checkpoints(folder)[:-keep]:
        outdated.unlink()
    return path


def forget_after(folder: Path, step: int):
    """Drop what a run that was killed had logged beyond the checkpoint it goes on from, and any file it had half written."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    path = folder / "metrics.jsonl"
    if path.exists():
        rows = [line for line in path.read_text().splitlines(keepends=True) if line.startswith("{") and line.endswith("}\n")]
        with replacing(path) as temporary:
            temporary.write_text("".join(line for line in rows if json.loads(line)["step"] <= step))


def draw_loss(folder: Path):
    """loss.png: every logged loss, and over them the mean of the 21 around each."""
    path, width, height, margin = folder / "metrics.jsonl", 640, 320, 40
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if len(rows) < 2:
        return
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    around = [losses[max(0, i - 10):i + 11] for i in range(len(losses))]
    means = [sum(some) / len(some) for some in around]
    low, high = min(losses), sorted(losses)[int(0.98 * (len(losses) - 1))]         # the very first may be far above
    high = high if high > low else low + 1e-6

    def place(step, loss):
        x = margin + (step - steps[0]) / (steps[-1] - steps[0]) * (width - 2 * margin)
        return x, margin + min(1, max(0, (high - loss) / (high - low))) * (height - 2 * margin)

    page = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    draw.rectangle((margin, margin, width - margin, height - margin), outline="lightgray")
    draw.line([place(*point) for point in zip(steps, losses)], fill="lightblue")
    draw.line([place(*point) for point in zip(steps, means)], fill="navy", width=2)
    for text, at, anchor in ((f"{high:.4g}", (margin - 4, margin), "rm"),
                             (f"{low:.4g}", (margin - 4, height - margin), "rm"),
                             (str(steps[0]), (margin, height - margin + 4), "ma"),
                             (str(steps[-1]), (width - margin, height - margin + 4), "ma"),
                             (f"loss by step; at the end {means[-1]:.4g}", (width / 2, margin - 6), "ms")):
        draw.text(at, text, fill="black", font=font, anchor=anchor)
    save_image(page, folder / "loss.png")
