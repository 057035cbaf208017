"""What an editor learns from, of a data set: latents of both pictures of a pair, and its instruction or the features of it.

`LivePairs` decodes and encodes pairs as they come, new views of them in each epoch. `CachedPairs` has done so once, for a
few views of each; its files are memory-mapped, fill up from where they were when a run is killed, and lie in a folder named
for all that they depend on: so none is ever out of date, and all runs that need the same share them.

The examples of step s are numbers s * batch_size, ... of the data set's epochs one after the other, each in its own order.
"""
import atexit
import hashlib
import json
import os
import signal
from functools import lru_cache
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .data import PairedDataset
from .distributed import locked

CHUNK = 16                       # examples that are encoded together: the files grow by so many


class _Decoded(Dataset):
    """decode(n) as a data set, for workers."""

    def __init__(self, decode):
        self.decode = decode

    def __getitem__(self, n):
        return self.decode(n)


def _load(decode, collate, batches, workers):
    """collate([decode(n), ...]) of each of the batches of numbers, in order. Workers are forked, as these may be any
    functions, and leave signals to the main process."""
    def leave_alone(_):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    return iter(DataLoader(_Decoded(decode), batch_sampler=batches, num_workers=workers, collate_fn=collate,
                           worker_init_fn=leave_alone, multiprocessing_context="fork" if workers else None))


def _stack(examples):
    """Two tensors of pixels and a list of instructions. An example that is None leaves None in the list and nothing in the
    tensors. Workers do this, as every tensor that they hand over is an open file."""
    whole = [example for example in examples if example]
    before, after = (torch.stack([example[k] for example in whole]) if whole else None for k in (0, 1))
    return before, after, [example and example[2] for example in examples]


def _stack_whole(found):
    """The same of `PairedDataset.whole_example`s, and a list of their complaints."""
    examples, complaints = zip(*found)
    return *_stack(examples), sum(complaints, [])


class Skipped(set):
    """Complaints of what could not be read. Each is printed once, and kept in `file` if there is one, where it outlasts the
    process and is counted with those of others."""

    def __init__(self, file: Path | None = None):
        super().__init__(file.read_text("utf-8").splitlines() if file and file.exists() else ())
        self.file = file

    def note(self, complaints):
        for complaint in set(complaints) - self:
            tqdm.write(f"skipped: {complaint}")
            if self.file:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(complaint + "\n")
        self.update(complaints)

    def count(self) -> int:
        """Those of all processes, since the run began."""
        return len(self | Skipped(self.file))


class LivePairs:
    """Pairs that are decoded and encoded when a step asks for them.

    encode(before, after): pixels (B, 3, H, W) to image latents (B, z, h, w) and a target (B, 2, z, h, w).
    parts: the rows of a step that are asked for, in this order; workers: processes that decode ahead, 0 for none; skipped:
    a file for what cannot be read."""

    def __init__(self, data: PairedDataset, encode: Callable, *, steps: int, batch_size: int, parts: list[slice], workers=0,
                 skipped: Path | None = None):
        self.data, self.encode, self.steps, self.batch_size = data, encode, steps, batch_size
        self.parts, self.workers = parts, workers
        self.order, self.skipped, self.next = lru_cache(2)(data.order), Skipped(skipped), None
        atexit.register(setattr, self, "loader", None)                   # its workers end before they are missed

    def _decode(self, n):
        epoch, position = divmod(n, len(self.data))
        return self.data.whole_example(epoch, self.order(epoch)[position])

    def batch(self, step: int, rows: slice):
        """(image latents, target, list of instructions) of these rows of the step."""
        part = self.parts.index(rows)
        if self.next != (step, part):
            self.loader = _load(self._decode, _stack_whole, self._numbers(step, part), self.workers)
        before, after, instructions, complaints = next(self.loader)
        self.next = (step, part + 1) if rows != self.parts[-1] else (step + 1, 0)
        self.skipped.note(complaints)
        return *self.encode(before, after), instructions

    def _numbers(self, first_step, first_part):
        """The examples of each part of each step, from these on."""
        for step in range(first_step, self.steps):
            for part in self.parts[first_part if step == first_step else 0:]:
                yield range(step * self.batch_size + part.start, step * self.batch_size + part.stop)


class CachedPairs:
    """Views of each pair, encoded once; an epoch has view `epoch % views`, the one that `data.example` gives for that epoch.

    encode: as for `LivePairs`. encode_text: texts to their features (B, M, D); None if `batch` shall give the texts.
    folder: where caches are; weights: the modules that encode; told: what else the numbers depend on. All is stored in half
    precision: with Stable Diffusion at 256 x 256, 24 KiB for a view and 116 KiB for an instruction.
    """

    def __init__(self, data: PairedDataset, folder, views: int, encode: Callable, encode_text: Callable | None, *,
                 batch_size: int, weights: list, told: dict, workers: int = 0):
        self.data, self.views, self.encode, self.encode_text = data, views, encode, encode_text
        self.batch_size, self.workers, self.skipped, self.order = batch_size, workers, Skipped(), lru_cache(2)(data.order)
        hashes = [hash_weights(module) for module in weights]
        key = json.dumps([views, CHUNK, data.fingerprint(), encode_text is not None, told, hashes])
        self.folder = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:24]
        self.folder.mkdir(parents=True, exist_ok=True)
        blank = torch.zeros(1, 3, data.crop_res, data.crop_res)
        self.shape = (3, *encode(blank, blank)[0].shape[1:])             # image latents; mean, log variance of the target
        self.text_shape = encode_text([""]).shape[1:] if encode_text else (0,)
        with locked(self.folder / "lock"):                               # who needs what another is encoding waits for it
            self._fill()
        self._open()

    def _path(self, name):
        return self.folder / name

    def _fill(self):
        """Encode what is not there yet. An example counts once index.i32, written last, has the number of its text."""
        total, N = self.views * len(self.data), len(self.data)
        sizes = {"latents.f16": 2 * int(np.prod(self.shape)), "index.i32": 4}
        there = min(p.stat().st_size // size if (p := self._path(name)).exists() else 0 for name, size in sizes.items())
        done = there if there == total else there // CHUNK * CHUNK
        index = np.fromfile(self._path("index.i32"), np.int32, done) if done else np.zeros(0, np.int32)
        found = self._read_texts()
        again = next((n for n, i in enumerate(index.tolist()) if i >= len(found) or i < 0 and not self._complaint(n)), None)
        if again is not None:                                            # what was lost, or can be read by now, and all after it
            done = again // CHUNK * CHUNK
            index = index[:done]
        texts = {text: i for i, text in enumerate(found[:max([-1, *index]) + 1])}
        if done == total:
            return
        ends = {name: done * size for name, size in sizes.items()}
        ends |= {"contexts.f16": len(texts) * 2 * int(np.prod(self.text_shape)),
                 "texts.jsonl": sum(len(json.dumps(text)) + 1 for text in texts)}
        for name, end in ends.items():                                   # cut, not written anew: a stop here must not lose texts
            self._path(name).touch()
            os.truncate(self._path(name), end)

        def decode(n):
            try:
                return self.data.example(*divmod(n, N))
            except ValueError:
                return None

        chunks = [range(i, min(i + CHUNK, total)) for i in range(done, total, CHUNK)]
        names = ("latents.f16", "contexts.f16", "texts.jsonl", "index.i32")
        with tqdm(total=total, initial=done, desc="encoding", unit="pair", dynamic_ncols=True) as bar:
            files = [open(self._path(name), "ab") for name in names]
            try:
                for before, after, instructions in _load(decode, _stack, chunks, self.workers):
                    for file, content in zip(files, self._encode_chunk(before, after, instructions, texts)):
                        file.write(content)
                        file.flush()
                    bar.update(len(instructions))
            finally:
                for file in files:
                    file.close()

    def _read_texts(self):
        """The texts that are there with their features."""
        path, size = self._path("texts.jsonl"), 2 * int(np.prod(self.text_shape))
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        encoded = self._path("contexts.f16").stat().st_size // size if lines and size else len(lines)
        return [json.loads(line) for line in lines[:encoded] if line.endswith("\n")]

    def _encode_chunk(self, before, after, instructions, texts):
        """What to append to each file. New texts are added to `texts`."""
        whole = [i for i, instruction in enumerate(instructions) if instruction is not None]
        latents = np.zeros((len(instructions), *self.shape), np.float16)
        if whole:
            image_latents, target = self.encode(before, after)
            latents[whole] = torch.cat([image_latents[:, None], target], 1).half().cpu().numpy()
        new = [text for text in dict.fromkeys(instructions[i] for i in whole) if text not in texts]
        texts.update({text: len(texts) + i for i, text in enumerate(new)})
        contexts = self.encode_text(new).half().cpu().numpy().tobytes() if new and self.encode_text else b""
        index = np.array([-1 if text is None else texts[text] for text in instructions], np.int32)
        return latents.tobytes(), contexts, "".join(json.dumps(text) + "\n" for text in new).encode(), index.tobytes()

    def _open(self):
        N = len(self.data)
        self.index = np.fromfile(self._path("index.i32"), np.int32)
        self.latents = np.memmap(self._path("latents.f16"), np.float16, "r", shape=(len(self.index), *self.shape))
        self.texts = self._read_texts()
        self.row = np.arange(self.views * N).reshape(self.views, N)      # of an example, or of its stand-in
        for view, index in enumerate(self.index.reshape(self.views, N)):
            broken = np.flatnonzero(index < 0).tolist()
            self.skipped.note(list(filter(None, (self._complaint(view * N + i) for i in broken))))
            if len(broken) == N:
                raise ValueError(f"no pair can be read; the first: {min(self.skipped)}")
            for i in broken:
                self.row[view, i] = view * N + next(j for j in self.data.stand_ins(view, i) if index[j] >= 0)
        if self.encode_text:
            self.contexts = np.memmap(self._path("contexts.f16"), np.float16, "r", shape=(len(self.texts), *self.text_shape))

    def _complaint(self, n):
        """Why an example cannot be read; None if it can."""
        try:
            self.data.example(*divmod(n, len(self.data)))
        except ValueError as error:
            return str(error)

    def batch(self, step: int, rows: slice):
        """(image latents, target, instructions or features of them) of these rows of the step, on the CPU."""
        numbers = (divmod(step * self.batch_size + row, len(self.data)) for row in range(rows.start, rows.stop))
        chosen = [self.row[epoch % self.views, self.order(epoch)[position]] for epoch, position in numbers]
        latents = torch.from_numpy(self.latents[chosen]).float()
        which = self.index[chosen]
        texts = torch.from_numpy(self.contexts[which]).float() if self.encode_text else [self.texts[i] for i in which]
        return latents[:, 0].contiguous(), latents[:, 1:].contiguous(), texts          # or a GPU would have to be waited for


def hash_weights(module: torch.nn.Module) -> str:
    """A hash of a module's configuration, names and weights, the same on every device."""
    found = hashlib.sha256(repr(getattr(module, "config", None)).encode())
    for name, tensor in module.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
