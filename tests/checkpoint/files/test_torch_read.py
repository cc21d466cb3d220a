"""Loading a checkpoint never executes code in it, and loads everything that real checkpoints contain."""

from __future__ import annotations

import collections
import contextlib
import enum
import importlib
import io
import os
import pickle
import random
import subprocess
import sys
import types
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openpangu_sft.checkpoint.files.arrays import BF16, same_bits
from openpangu_sft.checkpoint.files.inert import Inert
from openpangu_sft.checkpoint.files.torch_read import load_checkpoint_file
from openpangu_sft.model.tensors import tensors_in, to_array, to_tensor
from openpangu_sft.training.portable.state import ENGINE_FILE, load_engine_state
from openpangu_sft.util.errors import UserError
from refusals import refusal_of

PROTO_2, PROTO_4 = b"\x80\x02", b"\x80\x04"
GETATTR = b"c__builtin__\ngetattr\n"


class Call:
    """Pickles as a function call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.args


def text(value: str) -> bytes:
    """The opcode of a string, in protocols 2 and 4."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def named(module: str, name: str) -> bytes:
    """The opcode of a class or function."""
    return b"c" + f"{module}\n{name}\n".encode()


def call(module: str, name: str, *args: str) -> bytes:
    """A pickle that calls module.name. In protocol 4 the stock unpickler resolves dotted names."""
    return PROTO_4 + named(module, name) + b"(" + b"".join(map(text, args)) + b"tR."


def write_zip(path: Path, data: bytes, **more: bytes) -> Path:
    """Writes a zip archive like that of torch.save, with the given pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", **more}.items():
            archive.writestr(f"archive/{name.replace('__', '/')}", content)
    return path


def refusal(path: Path) -> str:
    """The error message of loading a file; it has the path."""
    message = refusal_of(load_checkpoint_file, path)
    assert str(path) in message
    return message


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that code in a checkpoint would create; it must not exist after the test."""
    path = tmp_path / "code-has-run"
    yield path
    assert not path.exists()


def attacks(marker: Path) -> dict[str, tuple[object, str]]:
    """Malicious objects, which create the marker or import code when unpickled, and the name that the message gives.

    torch.save uses pickle protocol 2, in which some modules have their Python 2 names.
    """
    shell, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    return {
        "os.system": (Call(os.system, shell), "posix.system"),
        "popen": (Call(os.popen, shell), "os.popen"),
        "subprocess": (Call(subprocess.check_call, ["touch", str(marker)]), "commands.check_call"),
        "eval": (Call(eval, code), "__builtin__.eval"),
        "exec": (Call(exec, code), "__builtin__.exec"),
        "open": (Call(open, str(marker), "w"), "io.open"),
        "getattr": (Call(getattr, Namespace(), "x"), "__builtin__.getattr"),
        "import": (Call(__import__, "os"), "__builtin__.__import__"),
        "import_module": (Call(importlib.import_module, "os"), "importlib.import_module"),
        "nested": ({"args": [Namespace(deep=(Call(Call, Call(os.system, shell)),))]}, f"{__name__}.Call"),
        "pickle": (Call(pickle.loads, pickle.dumps(Call(os.system, shell))), "pickle.loads"),
        "torch.load": (Call(torch.load, str(marker)), "torch.serialization.load"),
        "torch.hub": (Call(torch.hub.load, str(marker.parent), "x"), "torch.hub.load"),
        "torch.jit": (Call(torch.jit.load, str(marker)), "torch.jit._serialization.load"),
        "torch.compile": (Call(torch.compile), "torch.compile"),
        "torch.from_file": (Call(torch.UntypedStorage.from_file, str(marker), True, 1), "torch._C.StorageBase"),
        "numpy.load": (Call(np.load, str(marker)), "numpy.load"),
        "numpy.memmap": (Call(np.memmap, str(marker), "uint8", "w+", 0, (1,)), "numpy.memmap"),
        "module": (Call(types.SimpleNamespace), "types.SimpleNamespace"),
        "codecs": (Call(importlib.import_module("codecs").open, str(marker), "w"), "codecs.open"),
        "defaultdict": (collections.defaultdict(list), "collections.defaultdict"),
    }  # fmt: skip


NAMES = sorted(attacks(Path("unused")))


@pytest.mark.parametrize("name", NAMES)
def test_code_in_a_checkpoint_is_refused_and_not_executed(tmp_path: Path, marker: Path, name: str) -> None:
    content, refused = attacks(marker)[name]
    torch.save({"model": {}, "args": content}, tmp_path / "evil.pt")
    assert f"asks for {refused} on loading, which no checkpoint needs" in refusal(tmp_path / "evil.pt")


@pytest.mark.parametrize("name", NAMES)
def test_code_in_the_format_before_torch_1_6_is_not_executed(tmp_path: Path, marker: Path, name: str) -> None:
    torch.save(attacks(marker)[name][0], tmp_path / "evil.pt", _use_new_zipfile_serialization=False)
    assert "no checkpoint of torch 1.6 or later" in refusal(tmp_path / "evil.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(attacks(marker)[name][0]))
    refusal(tmp_path / "bare.pt")


def test_plain_torch_executes_the_attacks(tmp_path: Path) -> None:
    """Control: plain torch.load executes them."""
    for name in ("os.system", "exec", "open", "subprocess"):
        path = tmp_path / name
        torch.save(attacks(path)[name][0], tmp_path / "evil.pt")
        torch.load(tmp_path / "evil.pt")
        assert path.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "serialization.os.system"),
        ("torch", "storage.os.system"),
        ("torch", "storage.os.systemStorage"),
        ("torch", "float32.__class__"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("argparse", "Namespace.__init__.__globals__"),
        ("argparse", "_os.system"),
        ("collections", "OrderedDict.__class__"),
        ("collections", "_sys.modules"),
        ("numpy", "dtype.__class__"),
        ("builtins", "set.__class__"),
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("builtins", "bytearray"),
        ("io", "open_code"),
        ("_io", "open"),
        ("_io", "FileIO"),
        ("torch", "save"),
        ("torch", "os"),
        ("torch", "UntypedStorage"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_rebuild_wrapper_subclass"),
        ("torch._tensor", "_rebuild_from_type_v2"),
        ("numpy.core.multiarray", "fromfile"),
        ("copyreg", "_reconstructor"),
        ("megatronish.evil", "run"),
        ("", "megatron"),
    ],
)
def test_only_allowlisted_names_resolve(tmp_path: Path, marker: Path, module: str, name: str) -> None:
    path = write_zip(tmp_path / "evil.pt", call(module, name, f"touch {marker}"))
    assert f"asks for {module}.{name} on loading" in refusal(path)


def test_the_stock_unpickler_resolves_dotted_names(tmp_path: Path) -> None:
    """Control: pickle resolves the dotted names that the test above tries."""
    pickle.loads(call("torch", "serialization.os.system", f"touch {tmp_path / 'ran'}"))
    assert (tmp_path / "ran").exists()


def test_torchscript_is_refused(tmp_path: Path) -> None:
    """torch.load passes TorchScript archives to torch.jit.load, which bypasses the restricted unpickler."""

    class Script(torch.nn.Module):
        def forward(self) -> int:
            return 1

    torch.jit.save(torch.jit.script(Script()), str(tmp_path / "script.pt"))
    assert "asks for TorchScript" in refusal(tmp_path / "script.pt")
    data = PROTO_2 + b"}."
    refusal(write_zip(tmp_path / "disguised.pt", data, **{"constants.pkl": data}))


def test_persistent_ids_other_than_storages_are_refused(tmp_path: Path, marker: Path) -> None:
    for tag in ("module", "storage", "other"):
        data = PROTO_2 + b"(" + text(tag) + text("os") + text("a") + text("b") + text("c") + b"tQ."
        refusal(write_zip(tmp_path / "evil.pt", data))


# Contents of real checkpoints.


class Color(enum.Enum):
    RED = 1


class Settings(dict):  # type: ignore[type-arg]
    """A dict subclass."""


class Names(list):  # type: ignore[type-arg]
    """A list subclass."""


class Slots:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 3


class Keywords:
    def __new__(cls, *, value: int = 0) -> Keywords:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        return (), {"value": 1}


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A fake module megatron.core.enums: torch.save pickles the classes above under its name."""
    module = types.ModuleType("megatron.core.enums")
    for kind in (Color, Settings, Names, Slots, Keywords):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    packages = {name: types.ModuleType(name) for name in ("megatron", "megatron.core")}
    with pytest.MonkeyPatch.context() as patch:
        for name, package in {**packages, module.__name__: module}.items():
            patch.setitem(sys.modules, name, package)
        yield module


def round_trip(content: object, path: Path, **options: Any) -> Any:
    torch.save(content, path, **options)
    return load_checkpoint_file(path)


def test_objects_of_megatron_classes_load_as_inert(tmp_path: Path, upstream: types.ModuleType) -> None:
    content = Namespace(
        kind=Color.RED, type=Color, settings=Settings(a=1), names=Names([1, 2, 3]), one=Names([1]), slots=Slots()
    )
    torch.save({"args": content, "after": 7}, tmp_path / "x.pt")
    removed = ("megatron", "megatron.core", "megatron.core.enums")
    for name in removed:
        del sys.modules[name]
    loaded = load_checkpoint_file(tmp_path / "x.pt")
    assert loaded["after"] == 7
    assert (loaded["args"].type.name, loaded["args"].type.args) == ("megatron.core.enums.Color", None)
    for name in ("kind", "settings", "names", "one", "slots"):
        assert type(getattr(loaded["args"], name)) is Inert
    assert loaded["args"].kind.name == "megatron.core.enums.Color"
    assert loaded["args"].kind.args in [(1,), ("RED",)]  # Python 3.11.0 to 3.11.3 pickle enum members by name
    assert not any(name in sys.modules for name in removed)


def test_an_enum_member_saved_by_python_3_11_2_loads(tmp_path: Path) -> None:
    """As a getattr call on a Megatron class: the only getattr that is allowed."""
    kind, name = named("megatron.core.enums", "ModelType"), text("encoder_or_decoder")
    member = write_zip(tmp_path / "x.pt", PROTO_2 + GETATTR + kind + name + b"\x86R.")
    loaded = load_checkpoint_file(member)
    assert (type(loaded), loaded.name, loaded.args) == (Inert, "megatron.core.enums.ModelType", ("encoder_or_decoder",))
    instance = kind + b")R"
    for owner in (instance, text("x"), named("torch", "float32"), named("argparse", "Namespace"), GETATTR, b"N"):
        evil = write_zip(tmp_path / "evil.pt", PROTO_2 + GETATTR + owner + name + b"\x86R.")
        assert "asks for __builtin__.getattr on loading" in refusal(evil)
    for arguments in (b")", kind + b"\x85", kind + b"K\x01\x86", kind + name + b"N\x87"):
        evil = write_zip(tmp_path / "evil.pt", PROTO_2 + GETATTR + arguments + b"R.")
        assert "asks for __builtin__.getattr on loading" in refusal(evil)
    chain = write_zip(tmp_path / "evil.pt", PROTO_2 + GETATTR + GETATTR + kind + name + b"\x86R" + name + b"\x86R.")
    assert "asks for __builtin__.getattr on loading" in refusal(chain)


def test_objects_with_state_load_as_inert(tmp_path: Path, upstream: types.ModuleType) -> None:
    loaded = round_trip([Color.RED, Settings(a=1), Names([1, 2]), Slots()], tmp_path / "x.pt")
    assert [type(item) for item in loaded] == [Inert] * 4


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_opcodes_that_torch_does_not_write_are_refused_by_name(tmp_path: Path, protocol: int) -> None:
    torch.save([b"x"], tmp_path / "x.pt", pickle_protocol=protocol)
    assert ("SHORT_BINBYTES" if protocol == 3 else "FRAME") in refusal(tmp_path / "x.pt")


def test_keyword_arguments_in_protocol_2_are_refused_by_name(tmp_path: Path, upstream: types.ModuleType) -> None:
    torch.save(Keywords(), tmp_path / "x.pt")
    assert "asks for functools.partial" in refusal(tmp_path / "x.pt")


def test_calls_of_megatron_functions_are_not_executed(tmp_path: Path, marker: Path) -> None:
    path = write_zip(tmp_path / "x.pt", call("megatron.training.utils", "os.system", f"touch {marker}"))
    assert type(load_checkpoint_file(path)) is Inert


def test_a_real_checkpoint_loads(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6, dtype=torch.float32).reshape(2, 3))
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    module(torch.ones(1, 3)).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    generator = np.random.RandomState(5)
    buffer = io.BytesIO(b"state")
    buffer.seek(2)
    content = {
        "args": Namespace(
            params_dtype=torch.bfloat16, lr=1e-5, data_path=["a"], nothing=None, flag=True, big=2**70, tags={"a"},
            shape=torch.Size([2, 3]), device=torch.device("cpu"), loss=np.float64(1.5), step=np.int64(3),
        ),
        "checkpoint_version": 3.0,
        "model": collections.OrderedDict(
            weight=weight, half=torch.ones(2, dtype=torch.bfloat16), extra=buffer, none=None, view=weight.detach()[:, 1]
        ),
        "state": module.state_dict(),  # an OrderedDict with the attribute _metadata
        "optimizer": optimizer.state_dict(),
        "rng_state": [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": generator.get_state(),
                "torch_rng_state": torch.get_rng_state(),
                "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
            }
        ],
        "dtypes": [torch.float16, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool],
        "arrays": [np.arange(3), np.zeros((0, 2), np.float32), np.arange(6).reshape(2, 3).T, np.dtype("float32")],
        "bytes": [b"", b"\x00\xff", "汉字"],
    }  # fmt: skip
    loaded = round_trip(content, tmp_path / "x.pt")
    assert list(loaded) == list(content)
    args = vars(loaded["args"])
    assert args["params_dtype"] == BF16
    assert isinstance(args["device"], Inert)
    same = {name: value for name, value in vars(content["args"]).items() if name not in ("params_dtype", "device")}
    assert {name: args[name] for name in same} == same
    assert type(args["loss"]) is np.float64
    for name in ("weight", "half", "view"):
        assert same_bits(loaded["model"][name], to_array(content["model"][name]))  # type: ignore[index]
    assert loaded["model"]["half"].dtype == BF16
    assert loaded["model"]["extra"].state == (b"state", 2, None)
    assert loaded["dtypes"] == [np.dtype(name) for name in ("f2", "f4")] + [BF16] + [
        np.dtype(name) for name in ("i8", "u1", "?")
    ]
    assert [array.tolist() for array in loaded["arrays"][:3]] == [[0, 1, 2], [], [[0, 3], [1, 4], [2, 5]]]
    module.load_state_dict(tensors_in(loaded["state"]))
    optimizer.load_state_dict(tensors_in(loaded["optimizer"]))
    assert tensors_in(loaded["optimizer"]["param_groups"]) == optimizer.state_dict()["param_groups"]
    rng = loaded["rng_state"][0]
    random.setstate(rng["random_rng_state"])
    torch.set_rng_state(to_tensor(rng["torch_rng_state"]))
    torch.set_rng_state(to_tensor(rng["rng_tracker_states"]["model-parallel-rng"]))
    restored = np.random.RandomState()
    restored.set_state(rng["np_rng_state"])
    assert restored.random() == generator.random()
    assert loaded["bytes"] == content["bytes"]


def test_tensors_saved_on_an_npu_load_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their storages have the location npu:0; torch_npu 2.1 passes metadata as the seventh argument of the rebuild."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "npu:0")
    tensor = torch.arange(4.0)
    function, args = tensor.__reduce_ex__(2)
    torch.save([tensor, Call(function, *args, {"npu_format": True})], tmp_path / "x.pt")
    assert b"npu:0" in (tmp_path / "x.pt").read_bytes()
    for loaded in load_checkpoint_file(tmp_path / "x.pt"):
        assert loaded.tolist() == tensor.tolist()


def test_views_share_memory_after_loading(tmp_path: Path) -> None:
    tensor = torch.zeros(4)
    loaded = round_trip([tensor, tensor[1:]], tmp_path / "x.pt")
    assert np.shares_memory(loaded[0], loaded[1])
    assert not loaded[0].flags.writeable  # memory-mapped from the file


def test_an_expanded_tensor_loads(tmp_path: Path) -> None:
    expanded = torch.arange(3.0).expand(5, 3)
    assert np.array_equal(round_trip(expanded, tmp_path / "x.pt"), expanded.numpy())


def test_scalars_saved_by_numpy_2_load(tmp_path: Path) -> None:
    """NumPy 2 has another name for the module that reconstructs them."""
    reduced = pickle.dumps(np.float64(1.5), protocol=2)
    assert b"numpy.core.multiarray" in reduced
    written = write_zip(tmp_path / "x.pt", reduced.replace(b"numpy.core.", b"numpy._core."))
    assert load_checkpoint_file(written) == 1.5


@pytest.mark.parametrize("content", [[1], {"weights": {}}])
def test_an_engine_file_without_optimizer_is_refused(tmp_path: Path, content: object) -> None:
    (tmp_path / "mp_rank_00").mkdir()
    torch.save(content, tmp_path / ENGINE_FILE)
    assert "holds no optimizer state" in refusal_of(load_engine_state, tmp_path)


# Damaged files.


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt").touch()
    assert "is cut short or no checkpoint of torch 1.6 or later" in refusal(tmp_path / "x.pt")


def test_a_missing_file_is_an_os_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_checkpoint_file(tmp_path / "x.pt")
    assert caught.value.filename == str(tmp_path / "x.pt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a small checkpoint file."""
    path = tmp_path_factory.mktemp("saved") / "x.pt"
    torch.save({"args": Namespace(a=1), "model": {"w": torch.arange(50.0), "v": torch.ones(3).bfloat16()}}, path)
    return path.read_bytes()


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path, saved: bytes) -> None:
    for size in [*range(0, len(saved), 41), len(saved) - 1]:
        (tmp_path / "x.pt").write_bytes(saved[:size])
        refusal(tmp_path / "x.pt")


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, zipped: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "random.pt"
    path.write_bytes(b"PK\x03\x04" + content if zipped else content)
    refusal(path)


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=60), st.sampled_from([b"", PROTO_2, PROTO_4]))
def test_random_pickles_load_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, protocol: bytes
) -> None:
    """UserError is the only exception."""
    path = write_zip(tmp_path_factory.getbasetemp() / "random.pt", protocol + content)
    with contextlib.suppress(UserError):
        load_checkpoint_file(path)


def test_corrupted_files_load_or_are_refused(tmp_path: Path, saved: bytes) -> None:
    """In a subprocess: a damaged header must not crash the interpreter either."""
    (tmp_path / "saved").write_bytes(saved)
    script = """
import random, sys
from pathlib import Path
from openpangu_sft.checkpoint.files.torch_read import load_checkpoint_file
from openpangu_sft.util.errors import UserError
saved, refused = Path(sys.argv[1]).read_bytes(), 0
for seed in range(400):
    random.seed(seed)
    damaged = bytearray(saved)
    for _ in range(random.choice([1, 3, 20])):
        damaged[random.randrange(len(saved))] = random.randrange(256)
    Path(sys.argv[2]).write_bytes(damaged)
    try:
        load_checkpoint_file(Path(sys.argv[2]))
    except UserError:
        refused += 1
print(refused)
"""
    arguments = [sys.executable, "-c", script, str(tmp_path / "saved"), str(tmp_path / "damaged")]
    ran = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) > 50
