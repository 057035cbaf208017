"""Pickled checkpoints: everything that torch.save writes is read, nothing that a file asks for is run."""
import functools
import os
import pickle
import sys
import types
import zipfile

import pytest
import torch
from checkpoints import error_of, public, published_like, same_parts

from ip2p.checkpoint import load_checkpoint, read_state_dict

pytestmark = pytest.mark.usefixtures("one_thread")


class Evil:
    def __init__(self, how, canary):
        self.how, self.canary = how, canary

    def __reduce__(self):
        command = f"touch {self.canary}"
        if self.how == "system":
            return os.system, (command,)
        if self.how == "eval":
            return eval, (f"__import__('os').system({command!r})",)
        return functools.partial(os.system, command), ()       # calls what a call has made


def test_a_record_that_unfolds_without_end_is_refused(tmp_path):
    nested = []
    for _ in range(40):
        nested = [nested, nested]                              # 2 ** 40 lists in a few hundred bytes
    torch.save({"ip2p": {"data": nested}, "state_dict": {"a": torch.zeros(1)}}, tmp_path / "m.ckpt")
    assert "its record of itself is too long" in error_of(tmp_path / "m.ckpt")


def torch_zip(path, data_pkl, root="archive"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", data_pkl)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("how", ["system", "eval", "partial"])
def test_a_pickle_that_runs_a_command_does_not(tmp_path, saved, how, zipped):
    canary = tmp_path / "canary"
    for protocol in (2, 4):
        evil = pickle.dumps(Evil(how, canary), protocol)
        pickle.loads(evil)                                     # the file would do it
        canary.unlink()
        state = public(published_like("sd1"))
        torch.save({"hook": Evil(how, canary), "state_dict": state}, tmp_path / "m.ckpt", pickle_protocol=protocol,
                   _use_new_zipfile_serialization=zipped)
        assert same_parts(load_checkpoint(tmp_path / "m.ckpt"), published_like("sd1"))
        (tmp_path / "raw.ckpt").write_bytes(evil)
        assert "not one of torch.save" in error_of(tmp_path / "raw.ckpt")
        torch_zip(tmp_path / "zip.ckpt", evil)
        assert "holds no" in error_of(tmp_path / "zip.ckpt")
        assert not canary.exists()


def test_no_opcode_reaches_a_real_function(tmp_path):
    canary = tmp_path / "canary"
    s = f"S'touch {canary}'\n".encode()
    u = f"touch {canary}".encode()
    programs = {
        "INST": b"(" + s + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + s + b"o.",
        "REDUCE": b"cos\nsystem\n(" + s + b"tR.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(u)]) + u + b"\x85R.",
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c" + bytes([len(u)]) + u + b"\x85R.",
    }
    for name, program in programs.items():
        pickle.loads(program) if name != "dotted" else None    # each but the last, whose name is not there, would run it
        assert name == "dotted" or canary.exists(), name
        canary.unlink(missing_ok=True)
        torch_zip(tmp_path / "m.ckpt", program)
        error_of(tmp_path / "m.ckpt")
        (tmp_path / "m.ckpt").write_bytes(b"\x80\x02" + program)
        error_of(tmp_path / "m.ckpt")
        assert not canary.exists(), name
    # BUILD on a class of ours must not change how the next file is read
    torch_zip(tmp_path / "m.ckpt", b"ccollections\nOrderedDict\n(N}S'update'\ncos\nsystem\nstb.")
    error_of(tmp_path / "m.ckpt")
    torch.save({"state_dict": public(published_like("sd1"))}, tmp_path / "m.ckpt")
    assert same_parts(load_checkpoint(tmp_path / "m.ckpt"), published_like("sd1"))


def test_what_a_training_program_left_in_the_file_is_ignored(tmp_path):
    numpy = pytest.importorskip("numpy")
    import argparse
    import collections
    module = types.ModuleType("lightning_like")

    class ModelCheckpoint:
        def __init__(self):
            self.best = numpy.float64(0.5)
    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = "lightning_like", "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint
    sys.modules["lightning_like"] = module
    parts = published_like("sd1")
    try:
        torch.save({"epoch": numpy.int64(3), "global_step": 470000, "callbacks": {ModelCheckpoint: ModelCheckpoint()},
                    "state_dict": collections.OrderedDict({k: torch.nn.Parameter(v) for k, v in public(parts).items()}),
                    "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3), "step": 4}}, "groups": {1, 2}}],
                    "hyper_parameters": argparse.Namespace(lr=collections.defaultdict(list, a=[1])),
                    "rng": numpy.arange(3), "loops": collections.deque([1]), "dtype": torch.float32,
                    "array": numpy.array(["x", None], dtype=object)}, tmp_path / "m.ckpt")
    finally:
        del sys.modules["lightning_like"]
    loaded = load_checkpoint(tmp_path / "m.ckpt")
    assert same_parts(loaded, parts) and loaded.metadata == {} and "lightning_like" not in sys.modules


def test_every_container_of_torch_save(tmp_path):
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {"whole": base, "transposed": base.mT, "slice": base[1:3, ::2], "half": base.half(), "bf16": base.bfloat16(),
               "long": torch.arange(3), "bool": torch.tensor([True, False]), "scalar": torch.tensor(3.0),
               "empty": torch.zeros(0, 3), "double": base.double(), "byte": torch.arange(5, dtype=torch.uint8)}
    torch.save(tensors, tmp_path / "new.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "new.pt") as source, \
            zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    for name in ("new.pt", "old.pt", "small.pt"):
        read, record = read_state_dict(tmp_path / name)
        assert read.keys() == tensors.keys() and record == {}, name
        assert all(torch.equal(read[k], t) and read[k].dtype == t.dtype for k, t in tensors.items()), name
