"""Files of named tensors: .safetensors, and PyTorch's own .ckpt, .pt, .pth and .bin.

Tensors are memory-mapped: opening a file reads only its table of contents, and a tensor's bytes when it is used. The
mapping is private, so writing to a tensor does not change the file.

PyTorch's files are pickles, and a pickle can name any function of any module and have it called. The unpickler here
imports nothing: every name in the file becomes an inert `Stub` that remembers what it was called with. Tensors are made
afterwards from the stubs that say `_rebuild_tensor_v2`; everything else (training callbacks, numpy scalars) stays a stub.
"""
import contextlib
import io
import json
import math
import mmap
import os
import pickle
import re
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
STORAGES = {"torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
            "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
            "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
            "torch.BoolStorage": torch.bool}
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)      # that of x86 and ARM, where Python has no name for it
LEGACY_MAGIC = 0x1950a86a20f9469cfc6c                      # the first object in a file of torch.save before 1.6


def read_state_dict(path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a file, memory-mapped and by name, and its `ip2p` record ({} if it has none).

    Of a training checkpoint only its `state_dict` is read; where it counts steps, the record has `global_step`.
    Raises ValueError, one line naming the file, for whatever is not a whole file of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    with open(path, "rb") as file:
        data = _map(file)
    start = data[:64].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git-LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path}: a web page saved under a checkpoint's name; download the file again")
    try:
        if data[:4] == b"PK\x03\x04":
            tensors, record = _read_zip(path, data)
        elif data[8:9] == b"{":
            tensors, record = _read_safetensors(data)
        elif data[:1] == b"\x80":
            tensors, record = _read_legacy(path, data)
        else:
            raise ValueError("neither safetensors nor a file of torch.save")
        if not isinstance(record, dict):
            raise ValueError("its ip2p record is malformed")
        return tensors, record
    except Exception as error:      # whatever a broken pickle leads to: the file is at fault, and nothing of it has run
        ours = type(error) is ValueError
        reason = " ".join((str(error) if ours else f"damaged ({type(error).__name__}: {error})").split())
        raise ValueError(f"{path}: {reason}") from error


def _map(file):
    """The file as memory of ours that may be written to, which never reaches the file. Linux is told to set nothing aside
    for that, or it would refuse a file larger than its free memory."""
    if sys.platform == "linux":
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _values(data, dtype, start, count):
    """`count` numbers of a buffer as a 1-D tensor; shared with it, unless they are not aligned."""
    size = count * dtype.itemsize
    if min(start, count) < 0 or start + size > len(data):
        raise ValueError(f"truncated: {start + size:,} bytes needed, {len(data):,} there")
    if count == 0:
        return torch.empty(0, dtype=dtype)
    if start % dtype.itemsize:
        data, start = bytearray(data[start:start + size]), 0
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start)


def _read_safetensors(data):
    begin = 8 + int.from_bytes(data[:8], "little")
    if begin > len(data):
        raise ValueError(f"truncated: {begin:,} bytes of header needed, {len(data):,} there")
    try:
        header = json.loads(data[8:begin])
        metadata = header.pop("__metadata__", {})
        entries = [(name, DTYPES[e["dtype"]], [int(n) for n in e["shape"]], *map(int, e["data_offsets"]))
                   for name, e in header.items()]
        record = json.loads(metadata.get("ip2p", "{}"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"malformed safetensors header ({type(error).__name__}: {error})") from error
    tensors = {}
    for name, dtype, shape, start, end in entries:
        count = math.prod(shape)
        if min([0, start, *shape]) < 0 or end - start != count * dtype.itemsize:
            raise ValueError(f"malformed safetensors header: {name} of shape {shape} takes {end - start} bytes")
        tensors[name] = _values(data, dtype, begin + start, count).view(shape)
    return tensors, record


class Stub(dict):
    """Stands for whatever a pickle names: takes any arguments, items and state, and does nothing with them."""

    origin, args = "", ()
    __hash__, __eq__ = object.__hash__, object.__eq__

    def __new__(cls, *args, **kwargs):
        self = dict.__new__(cls)
        self.args = args
        return self

    def __init__(self, *args, **kwargs):
        if self.origin == "collections.OrderedDict" and args:
            self.update(args[0])

    def __call__(self, *args, **kwargs):
        return self

    def __setstate__(*args):
        pass

    append = extend = add = __setstate__


class _Unpickler(pickle._Unpickler):
    """The one written in Python: the one in C sets aside as much memory as a damaged file asks for."""

    dispatch = {code: method for code, method in pickle._Unpickler.dispatch.items() if bytes([code]) not in
                (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)}

    def __init__(self, file):
        super().__init__(file, encoding="latin1")             # Python 2's strings too
        self.stubs, self.storages = {}, {}

    def load(self):
        try:
            return super().load()
        except EOFError as error:
            raise ValueError("truncated: its pickle does not end") from error
        except Exception as error:
            raise ValueError(f"damaged pickle ({type(error).__name__}: {error})") from error

    def find_class(self, module, name):
        origin = f"{module}.{name}"
        return self.stubs.setdefault(origin, type("Stub", (Stub,), {"origin": origin}))

    def persistent_load(self, pid):                           # ("storage", type, key, device, length, ...)
        self.storages[pid[2]] = pid
        return pid


def _state_dict(root, storage):
    """The tensors and the record in an unpickled object; `storage(pid)` gives the numbers a tensor views."""
    if not isinstance(root, dict):
        raise ValueError("holds no state_dict")
    state = root
    for _ in range(2):
        if isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]

    def tensor(stub):
        if stub.origin == "torch._utils._rebuild_parameter":
            return tensor(stub.args[0])
        pid, offset, size, stride = stub.args[:4]
        return storage(pid).as_strided(size, stride, offset)  # refuses to look outside of the storage

    rebuild = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
    tensors = {name: tensor(value) for name, value in state.items()
               if isinstance(name, str) and isinstance(value, Stub) and value.origin in rebuild}
    if not tensors:
        raise ValueError("holds no tensors")
    record = root.get("ip2p", {})
    if isinstance(root.get("global_step"), int):
        record = {"global_step": root["global_step"], **record}
    return tensors, json.loads(_to_json(record))


def _to_json(record, most=2 ** 20):
    """At most so many characters: in a few bytes of pickle a list can hold another twice, that one another twice, and so on."""
    parts, length = [], 0
    for part in json.JSONEncoder().iterencode(record):
        parts.append(part)
        length += len(part)
        if length > most:
            raise ValueError("its record of itself is too long")
    return "".join(parts)


def _read_zip(path, data):
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError("truncated: the end of the zip archive is missing") from error
    with archive:
        names = archive.namelist()
        if any("/code/" in name or name.endswith("constants.pkl") for name in names):
            raise ValueError("a TorchScript program, not a file of weights")
        folder = next((name.removesuffix("data.pkl") for name in names if name.endswith("data.pkl")), None)
        if folder is None:
            raise ValueError("a zip archive, but not one of torch.save")
        if folder + "byteorder" in names and archive.read(folder + "byteorder").decode() != sys.byteorder:
            raise ValueError("written on a machine of the other byte order")
        cache = {}

        def storage(pid):
            kind, key, count = pid[1].origin, pid[2], pid[4]
            if (kind, key) not in cache:
                info = archive.getinfo(f"{folder}data/{key}")
                if info.compress_type == zipfile.ZIP_STORED:
                    name_and_extra = struct.unpack_from("<HH", data, info.header_offset + 26)
                    source, start = data, info.header_offset + 30 + sum(name_and_extra)
                else:
                    source, start = bytearray(archive.read(info)), 0
                if info.file_size < count * STORAGES[kind].itemsize:
                    raise ValueError(f"truncated: storage {key} has {info.file_size:,} bytes")
                cache[kind, key] = _values(source, STORAGES[kind], start, count)
            return cache[kind, key]

        return _state_dict(_Unpickler(io.BytesIO(archive.read(folder + "data.pkl"))).load(), storage)


def _read_legacy(path, data):
    """Four pickles (magic number, version, system, object), a pickled list of storage keys, then the storages: each a
    length and its numbers."""
    with open(path, "rb") as file:
        if _Unpickler(file).load() != LEGACY_MAGIC:
            raise ValueError("a pickle, but not one of torch.save")
        _Unpickler(file).load()
        system = _Unpickler(file).load()
        unpickler = _Unpickler(file)
        root = unpickler.load()
        keys = _Unpickler(file).load()
        position = file.tell()
    if system.get("little_endian") != (sys.byteorder == "little"):
        raise ValueError("written on a machine of the other byte order")
    cache = {}
    for key in keys:
        dtype = STORAGES[unpickler.storages[key][1].origin]
        count = struct.unpack_from("<q" if sys.byteorder == "little" else ">q", data, position)[0]
        cache[key] = _values(data, dtype, position + 8, count)
        position += 8 + count * dtype.itemsize

    def storage(pid):
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError("has views of storages, as torch.save wrote before 0.4; save it again with a newer torch")
        return cache[pid[2]]

    return _state_dict(root, storage)


@contextlib.contextmanager
def replacing(path):
    """A temporary name beside `path`, for a file or a folder, that takes its place when the block has ended well. ValueError
    if that would put a file in the place of a folder."""
    path = Path(path)
    start = path.name[:50]                                     # a name may be as long as the system lets it be
    temporary, old = (path.with_name(f".{start}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        yield temporary
        if path.is_dir():                                     # a folder cannot be replaced in one step
            if not temporary.is_dir():
                raise ValueError(f"{path}: is a folder, and a file was to be written")
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        if old.exists() and not path.exists():                # stopped, or failed, between the two
            os.replace(old, path)
        for leftover in (temporary, old):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


def small_dtype(name: str, tensor: Tensor) -> torch.dtype:
    """How train.py stores the miniature's numbers: in float16, but in float8 (e4m3: 3 bits of fraction) the matrices in the layers of
    CLIP, GPT-2 and text encoders and the UNet's 3 x 3 convolutions, whose rounding their scores do not notice."""
    in_layers = tensor.ndim == 2 and re.search(r"\b(resblocks|h)\.\d+\.", name)
    is_convolution = name.startswith("model.diffusion_model.") and tensor.shape[2:] == (3, 3)
    return torch.float8_e4m3fn if in_layers or is_convolution else torch.float16


def cast(name: str, tensor: Tensor, dtype) -> Tensor:
    """A tensor as the dtype to store it in, which may be a function of name and tensor, such as `small_dtype`, or None."""
    dtype = (dtype(name, tensor) if callable(dtype) else dtype) or tensor.dtype
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(dtype)              # Apple's GPUs have no float8


@torch.no_grad()
def round_weights(module, dtype, prefix=""):
    """A module's weights in place, rounded to what would be stored of them under their names with this prefix."""
    for name, tensor in module.state_dict().items():
        tensor.copy_(cast(prefix + name, tensor, dtype))


def write_state_dict(path, tensors: dict[str, Tensor], record: dict, dtype=None):
    """A safetensors file that `read_state_dict` reads: the tensors as `cast` makes them, and the `ip2p` record."""
    tensors = {name: cast(name, tensor, dtype) for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        write_safetensors(temporary, tensors, {"ip2p": json.dumps(record)})


def write_safetensors(path, tensors: dict[str, Tensor], metadata: dict[str, str]):
    """Writes tensors one at a time, so that no second copy of them all is made."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt", **metadata}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
