"""A tiny model, tokenizer and recipe that tests share; built once per test process, in a second or two."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from hypothesis import settings

import small_disk as small_disks
from openpangu_sft.dataset.index_file import PREFIX, PackedWriter
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.mindspeed.sources import VARIABLES
from openpangu_sft.util.errors import UserError
from parameter_ids import LONGEST, long_ids, shortened
from small_disk import SmallDisk
from small_upstream import SmallUpstream
from stamp import pytest_addoption, pytest_configure  # noqa: F401  # pytest finds them here

# Its library warns on stderr when a process that has used it forks, as stages do here after whatever tests came before.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OPENPANGU_YES"] = "1"  # the tests' own tokenizers may run
os.environ["XDG_STATE_HOME"] = os.devnull  # what this machine's user has agreed to changes no test

# A background job of a script ignores these, and so would the processes that tests start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(_number, signal.SIG_DFL)

# Property tests draw the same input in every run, so that what was green stays green; `make test-random` draws other.
settings.load_profile("ci")
settings.register_profile("random", settings.get_profile("ci"), derandomize=False)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

TINY = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.kv_channels=8",
    "model.vocab_size=1536",
    "data.seq_length=128",
    "data.validation_share=0",
    "data.seed=1234",
    "data.workers=1",
    "train.global_batch_size=2",
    "train.iterations=6",
    "train.lr_warmup_iterations=2",
    "train.save_interval=3",
    "train.device=cpu",
]

PATIENCE = 600.0
"""Seconds after which a process that a test waits for hangs, however busy the machine is."""

MakeRecipe = Callable[..., Recipe]


def example_texts() -> list[str]:
    """Texts of both example files."""
    from openpangu_sft.demo.base_model import texts_of

    records = json.loads((ROOT / "examples/instructions_en.json").read_text("utf-8"))
    records += map(json.loads, (ROOT / "examples/service_zh.jsonl").read_text("utf-8").splitlines())
    return list(texts_of(records))


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face checkpoint in openPangu's form: two layers, random fp32 weights, a tokenizer. Read only."""
    from openpangu_sft.demo.base_model import make_base_model

    directory = tmp_path_factory.mktemp("tiny") / "hf"
    make_base_model(load_recipe(ROOT / "recipes/demo.yaml", [*TINY, f"paths.hf={directory}"]), example_texts())
    return directory


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_hf: Path) -> MakeRecipe:
    """Gives tiny recipes whose paths lie in the test's own directory, with the given overrides."""

    def make(*overrides: str) -> Recipe:
        own = [f"paths.cache={tmp_path}", f"paths.hf={tiny_hf}"]
        return load_recipe(ROOT / "recipes/demo.yaml", [*TINY, *own, *overrides])

    return make


@pytest.fixture
def wheel() -> None:
    """Skips where PyPI's megatron-core, or git, which patches it, is not installed."""
    try:
        metadata.distribution("megatron-core")
    except metadata.PackageNotFoundError:
        pytest.skip("megatron-core has wheels for Python 3.10 and 3.11 on x86-64 only")
    if not shutil.which("git"):
        pytest.skip("git is not installed: it applies the patches")


@pytest.fixture(scope="session")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the patched megatron-core, as make verify finds it. Read only."""
    from openpangu_sft.verify.megatron import find_core

    try:
        return find_core(tmp_path_factory.mktemp("megatron"))
    except UserError as error:
        pytest.skip(str(error))


def write_samples(path: Path, samples: list[Any]) -> None:
    """Writes records as jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples), "utf-8")


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    """Makes a disk of so many KiB, which is gone with the test."""
    disk = SmallDisk(tmp_path / "disk", monkeypatch)
    yield disk
    disk.remove()


def pytest_make_parametrize_id(val: object) -> Optional[str]:
    """Long values give short ids; pytest names the others itself."""
    return shortened(val) if isinstance(val, (str, bytes)) and len(ascii(val)) > LONGEST // 5 else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Fails the collection of a file with long test ids; pytest-xdist would lose an error of a later hook."""
    report = yield
    if complaint := long_ids(node.nodeid for node in report.result):
        report.outcome, report.longrepr, report.result = "failed", complaint, []
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Optional[bool]:
    """Runs what mounts a small disk where this user may do so."""
    if "small_disk" not in pyfuncitem.fixturenames or small_disks.means() != "namespace":
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    small_disks.run_in_namespace(lambda: pyfuncitem.obj(**arguments))
    return True


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallUpstream:
    """Small repositories in the place of upstream's, and no others."""
    if not shutil.which("git"):
        pytest.skip("git is not installed: it fetches and patches the sources")
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    return SmallUpstream(tmp_path)


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real MindSpeed-LLM, where its sources are at hand. Read only."""
    from upstream import checkout

    return checkout(tmp_path_factory.mktemp("upstream"))


def write_packs(
    directory: Path, packs: list[list[tuple[np.ndarray, np.ndarray]]], seq_length: int, pad_id: int
) -> dict[str, np.ndarray]:
    """Writes packs of (input_ids, labels) segments, the last pack first; returns the rows of every field."""
    shape = (len(packs), seq_length)
    rows = {"input_ids": np.full(shape, pad_id), "attention_mask": np.zeros(shape), "labels": np.full(shape, -100)}
    rows = {field: values.astype(np.int32) for field, values in rows.items()}
    for pack, segments in enumerate(packs):
        begin = 0
        for number, (input_ids, labels) in enumerate(segments, 1):
            inside = slice(begin, begin := begin + len(input_ids))
            rows["input_ids"][pack, inside] = input_ids
            rows["attention_mask"][pack, inside] = number
            rows["labels"][pack, inside] = labels
    writer = PackedWriter(directory, PREFIX, len(packs), seq_length)
    for pack in reversed(range(len(packs))):
        writer.write(pack, **{field: values[pack : pack + 1] for field, values in rows.items()})
    return rows


def conversation(*contents: str, system: str = "") -> dict[str, Any]:
    """A sample in which user and assistant take turns."""
    roles = ["user", "assistant"]
    messages = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return {"meta_prompt": [system], "data": messages}
