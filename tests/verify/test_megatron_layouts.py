"""Logits of the real megatron-core 0.6.0 for every division into TP and PP ranks, and what it does not load.

The checkpoints are cut by hand (split_checkpoint.py); Megatron's part runs in processes of its own.
"""

from __future__ import annotations

import fcntl
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, NoReturn

import numpy as np
import numpy.typing as npt
import pytest
import torch

from conftest import MakeRecipe
from openpangu_sft.artifacts.artifact import Manifest, write_manifest
from openpangu_sft.checkpoint.mcore import rank_file
from openpangu_sft.checkpoint.sharding import Layout
from openpangu_sft.model.tensors import as_tensor
from openpangu_sft.recipe.sections import Model
from openpangu_sft.training.mindspeed.sources import PATCHES, wanted_manifest
from openpangu_sft.verify import megatron
from openpangu_sft.verify.megatron import find_core, megatron_logits, run_together
from refusals import message_of, refusal_of
from split_checkpoint import random_llama, write_split

PROMPTS = np.random.RandomState(1).randint(0, 1536, (2, 30)).tolist()
PROMPTS[1] = PROMPTS[1][:21]
PADDED = 1600
"""Rows of the embedding, of which 1536 are the vocabulary."""


@pytest.fixture
def tiny(make_recipe: MakeRecipe) -> Model:
    """Sizes of a model with four layers."""
    return make_recipe("model.num_layers=4").model


@torch.no_grad()
def expected_logits(model: Model, dtype: torch.dtype = torch.float32) -> list[npt.NDArray[np.float32]]:
    """transformers' logits."""
    llama = random_llama(model).to(dtype)
    return [llama(torch.tensor([ids])).logits[0].float().numpy() for ids in PROMPTS]


def split(model: Model, directory: Path, tensor: int, *layers: int) -> Path:
    """Writes the random model's checkpoint for TP `tensor` and a stage for each number of layers."""
    return write_split(random_llama(model), model, directory, tensor, layers, PADDED)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a rank's file."""
    content = torch.load(path)
    change(content)
    torch.save(content, path)


def file_of(directory: Path, rank: int, tensor: int, pipeline: int) -> Path:
    """The file of one rank; tensor ranks of one pipeline stage are neighbours."""
    return directory / rank_file(rank % tensor, rank // tensor, pipeline)


def logits(directory: Path, model: Model, tensor: int, layers: list[int], core: Path) -> list[npt.NDArray[np.float32]]:
    """Megatron's logits in fp32."""
    return megatron_logits(directory, PROMPTS, "fp32", model, Layout(tensor, tuple(layers), PADDED), core=core)


@pytest.mark.parametrize(
    ("tensor", "layers", "tied"),
    [
        pytest.param(1, [4], True, id="tp1-pp1"),
        pytest.param(2, [4], True, id="tp2"),
        pytest.param(2, [4], False, id="tp2-untied"),
        pytest.param(1, [2, 2], True, id="pp2"),
        pytest.param(1, [2, 2], False, id="pp2-untied"),
        pytest.param(1, [3, 1], True, id="uneven-pp2"),
        pytest.param(2, [1, 2, 1], True, id="tp2-uneven-pp3"),
    ],
)
def test_every_layout_is_the_same_model(
    tiny: Model, tmp_path: Path, patched: Path, tensor: int, layers: list[int], tied: bool
) -> None:
    tiny = tiny.model_copy(update={"tie_word_embeddings": tied})
    directory = split(tiny, tmp_path / "iter", tensor, *layers)
    ours = logits(directory, tiny, tensor, layers, patched)
    for ids, found, expected in zip(PROMPTS, ours, expected_logits(tiny)):
        assert found.dtype == np.float32
        assert found.shape == expected.shape == (len(ids), tiny.vocab_size)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_two_ranks_swapped_is_another_model(tiny: Model, tmp_path: Path, patched: Path) -> None:
    directory = split(tiny, tmp_path / "iter", 2, 4)
    one, other = (file_of(directory, rank, 2, 1) for rank in (0, 1))
    one.rename(tmp_path / "kept")
    other.rename(one)
    (tmp_path / "kept").rename(other)
    ours = logits(directory, tiny, 2, [4], patched)
    expected = expected_logits(tiny)
    assert np.abs(ours[0] - expected[0]).max() > 0.1 * np.abs(expected[0]).max()


def test_the_last_stage_has_its_own_copy_of_a_tied_embedding(tiny: Model, tmp_path: Path, patched: Path) -> None:
    directory = split(tiny, tmp_path / "iter", 1, 2, 2)
    edit(file_of(directory, 1, 1, 2), lambda content: content["model"]["output_layer.weight"].mul_(2))
    ours = logits(directory, tiny, 1, [2, 2], patched)
    for found, expected in zip(ours, expected_logits(tiny)):
        assert np.abs(found - 2 * expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("tensor", "layers"), [(1, [4]), (2, [2, 2])])
def test_bf16_is_as_exact_as_transformers_own(
    tiny: Model, tmp_path: Path, patched: Path, tensor: int, layers: list[int]
) -> None:
    directory = split(tiny, tmp_path / "iter", tensor, *layers)
    layout = Layout(tensor, tuple(layers), PADDED)
    ours = megatron_logits(directory, PROMPTS, "bf16", tiny, layout, core=patched)
    for found, expected, exact in zip(ours, expected_logits(tiny, torch.bfloat16), expected_logits(tiny)):
        rounding = np.square(expected - exact).mean()
        assert 0 < np.square(found - exact).mean() <= 1.5 * rounding
        assert np.square(found - expected).mean() <= 3 * rounding  # they round in different places


def test_arrays_keep_their_bits() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.random.RandomState(1).randn(3, 4).astype(np.float32)
    for array, dtype in ((values, torch.float32), (values.astype(ml_dtypes.bfloat16), torch.bfloat16)):
        assert as_tensor(array).dtype == dtype
        assert torch.equal(as_tensor(array), torch.from_numpy(values).to(dtype))


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        pytest.param(
            lambda content: content["model"].pop("decoder.layers.0.mlp.linear_fc2.weight"),
            'Megatron-core does not load it: Missing key(s) in state_dict: "decoder.layers.0.mlp.linear_fc2.weight"',
            id="missing",
        ),
        pytest.param(
            lambda content: content["model"].update(
                {f"decoder.layers.{name}.weight": torch.ones(1) for name in "abcde"}
            ),
            'Unexpected key(s) in state_dict: "decoder.layers.a.weight", "decoder.layers.b.weight", '
            '"decoder.layers.c.weight", "decoder.layers.d.weight", "decoder.layers.e.weight"',
            id="unexpected",
        ),
        pytest.param(
            lambda content: content["model"].update({"output_layer.weight": torch.ones(2, 2)}),
            "size mismatch for output_layer.weight: copying a param with shape torch.Size([2, 2])",
            id="shape",
        ),
        pytest.param(lambda content: content.update(args=eval), "asks for __builtin__.eval", id="code"),
    ],
)
def test_refused_as_training_would(
    tiny: Model,
    tmp_path: Path,
    patched: Path,
    change: Callable[[dict[str, Any]], object],
    refusal: str,
) -> None:
    directory = split(tiny, tmp_path / "iter", 1, 3, 1)
    edit(path := file_of(directory, 1, 1, 2), change)
    message = message_of(logits, directory, tiny, 1, [3, 1], patched)
    assert refusal in message
    assert message.startswith(f"{path}: ")


WAITS = "import time; print('begun', flush=True); time.sleep(1e6)"


def between_two(program: str) -> list[list[str]]:
    """Commands of three processes: the program, and one before and after it that wait."""
    return [[sys.executable, "-c", code] for code in (WAITS, program, WAITS)]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os.kill(os.getpid(), 9)", "process of megatron-core was killed"),
        ("import sys; print('a'); print('one\x1b[1m line'); sys.exit(3)", r"^one\\x1b\[1m line$"),
    ],
    ids=["killed", "exit code"],
)
def test_when_one_fails_the_others_are_ended(tmp_path: Path, program: str, words: str) -> None:
    assert re.search(words, message_of(run_together, between_two(program), tmp_path))
    assert not [line for line in processes() if WAITS in line]


def test_when_one_raises_the_others_are_ended(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ValueError: ours"):
        run_together(between_two("raise ValueError('ours')"), tmp_path)
    assert not [line for line in processes() if WAITS in line]


def test_an_interrupt_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(megatron, "time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        run_together([[sys.executable, "-c", WAITS]] * 2, tmp_path)
    assert not [line for line in processes() if WAITS in line]


def processes() -> list[str]:
    """Command lines of the children of this process."""
    children = [number for path in Path("/proc/self/task").glob("*/children") for number in path.read_text().split()]
    return [Path(f"/proc/{number}/cmdline").read_text() for number in children]


def test_ranks_end_with_their_parent(tmp_path: Path) -> None:
    """Each holds the lock of its output while it runs: once this process has both, both have ended."""
    rank = f"import fcntl; fcntl.flock(1, fcntl.LOCK_EX); {WAITS}"
    code = f"import sys; from pathlib import Path; from {megatron.__name__} import run_together; "
    code += f"run_together([[sys.executable, '-c', {rank!r}]] * 2, Path(sys.argv[1]))"
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    outputs = [tmp_path / "rank0.txt", tmp_path / "rank1.txt"]
    while not all(output.is_file() and output.read_bytes() for output in outputs):
        assert parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    for output in outputs:
        with output.open() as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)


def test_without_megatron_core_or_git_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> NoReturn:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(megatron, "SOURCES", tmp_path / "absent")
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "distribution", missing)
        message = refusal_of(find_core, tmp_path)
        assert "megatron-core 0.6.0 is not installed" in message
        assert "run make sources" in message
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git is not installed" in refusal_of(find_core, tmp_path)


def test_the_sources_of_training_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "SOURCES", tmp_path)
    write_manifest(tmp_path, wanted_manifest(PATCHES))
    assert find_core(tmp_path / "scratch") == tmp_path / "mindspeed-llm"
    write_manifest(tmp_path, Manifest("sources", inputs={"commit": "another"}))
    assert "other pins" in refusal_of(find_core, tmp_path / "scratch")


@pytest.mark.usefixtures("wheel")
def test_patches_apply_below_a_clone_and_one_that_does_not_is_named(
    patched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron, "SOURCES", tmp_path / "absent")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as git's hooks have it
    attention = "megatron/core/transformer/attention.py"
    assert (find_core(tmp_path / "core") / attention).read_bytes() == (patched / attention).read_bytes()

    (tmp_path / "patches").mkdir()
    (tmp_path / "patches/0001.patch").write_text(
        "--- a/megatron/core/absent.py\n+++ b/megatron/core/absent.py\n@@ -1 +1 @@\n-a\n+b\n"
    )
    own = SimpleNamespace(patches=[tmp_path / "patches/0001.patch"])
    monkeypatch.setattr(megatron, "read_pins", lambda: {"megatron-lm": own})
    message = refusal_of(find_core, tmp_path / "other")
    assert "0001.patch: does not apply to megatron-core 0.6.0: " in message
    assert "absent.py" in message
