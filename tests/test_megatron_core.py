"""What the stages write is right in the real megatron-core 0.6.0, with this project's patch: checkpoints and datasets.

Megatron's part runs in a process of its own (megatron_on_cpu.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import torch

from conftest import ROOT, MakeRecipe, upstreams, write_packs
from openpangu_sft.chat_format import prompt_pieces
from openpangu_sft.checkpoint.convert import FIRST_ITERATION, run_convert, to_hf
from openpangu_sft.checkpoint.hf import read_config, write_checkpoint
from openpangu_sft.checkpoint.layout import hf_shapes
from openpangu_sft.checkpoint.mcore import MODEL_FILE, Tensors, iteration_directory, read_model
from openpangu_sft.checkpoint.safe_pickle import load_checkpoint_file
from openpangu_sft.dataset.indexed import FIELDS, field_path
from openpangu_sft.recipe import Model, Recipe
from openpangu_sft.sample import Message
from openpangu_sft.sft.model import build_model
from openpangu_sft.tokenizer import IGNORED, Tokenizer

PATCHES = ROOT / "patches"
UPSTREAM_VERSION = "0.6.0"

CopyCore = Callable[[Path], Path]


@pytest.fixture(scope="session")
def copy_core() -> CopyCore:
    """Copies the Python files of the installed megatron-core into a folder, as `megatron/core`."""
    try:
        installed = metadata.distribution("megatron-core")
    except metadata.PackageNotFoundError:
        pytest.skip("megatron-core is not installed: it has wheels for Python 3.10 and 3.11 on x86-64 only")
    assert installed.version == UPSTREAM_VERSION

    def copy(folder: Path) -> Path:
        for entry in installed.files or []:
            if entry.parts[:2] == ("megatron", "core") and entry.suffix == ".py":
                (folder / entry).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(entry.locate()), folder / entry)
        return folder

    return copy


@pytest.fixture(scope="session")
def patched(copy_core: CopyCore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """megatron-core with every patch that patches/upstream.toml has for Megatron-LM."""
    if not shutil.which("git"):
        pytest.skip("git is not installed: it applies the patches")
    folder = copy_core(tmp_path_factory.mktemp("megatron"))
    for name in upstreams()["megatron-lm"]["patches"]:
        # below a clone, git would skip the patched files without a word
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
        subprocess.run(["git", "apply", str(PATCHES / name)], cwd=folder, env=environment, check=True, timeout=60)
    return folder


def run_megatron(command: str, *arguments: object) -> None:
    """Runs megatron_on_cpu.py; TorchScript is off, because Megatron-core compiles at import and that takes a while."""
    subprocess.run(
        [sys.executable, str(ROOT / "tests/megatron_on_cpu.py"), command, *map(str, arguments)],
        env={**os.environ, "PYTORCH_JIT": "0", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )


def random_tensors(model: Model, dtype: torch.dtype) -> Tensors:
    """Weights, biases and norms of which no two are alike, so that none can be lost or swapped unnoticed."""
    generator = torch.Generator().manual_seed(1)
    tensors: Tensors = {}
    for name, shape in hf_shapes(model).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            values *= 1 if "embed_tokens" in name else shape[1] ** -0.5
        elif "norm" in name:
            values = 1 + values / 4
        tensors[name] = values.to(dtype)
    return tensors


def convert_random(make_recipe: MakeRecipe, tiny_hf: Path, hf: Path, dtype: torch.dtype, tied: bool) -> Recipe:
    """Writes a random Hugging Face checkpoint and converts it."""
    recipe = make_recipe(f"paths.hf={hf}", f"model.tie_word_embeddings={str(tied).lower()}")
    hf.mkdir()
    config = {**read_config(tiny_hf), "tie_word_embeddings": tied}
    write_checkpoint(hf, config, random_tensors(recipe.model, dtype), tiny_hf)
    run_convert(recipe)
    return recipe


def converted_file(recipe: Recipe) -> Path:
    """The checkpoint that convert wrote."""
    return iteration_directory(recipe.path("mcore"), FIRST_ITERATION) / MODEL_FILE


def write_prompts(path: Path, tiny_hf: Path) -> list[torch.Tensor]:
    """Writes token ids of a Chinese and an English conversation."""
    tokenizer = Tokenizer(tiny_hf, trust_remote_code=False)
    conversations = [
        ("你是客服助手，请用简短的话回答。", "你好，我上周买的耳机坏了，可以退货吗？请告诉我需要准备哪些材料。"),
        ("", "Name three large cities in China, and write one sentence about the history of each of them."),
    ]
    prompts = [
        torch.tensor([number for ids in tokenizer.encode(pieces) for number in ids])
        for pieces in (list(prompt_pieces((system,), (Message("user", text),), True)) for system, text in conversations)
    ]
    torch.save(prompts, path)
    return prompts


@pytest.mark.parametrize(
    ("dtype", "tied"),
    [
        pytest.param(torch.float32, True, id="fp32-tied"),
        pytest.param(torch.float32, False, id="fp32-untied"),
        pytest.param(torch.bfloat16, True, id="bf16-tied"),
    ],
)
def test_converted_checkpoint_is_the_same_model_in_megatron(
    make_recipe: MakeRecipe, tiny_hf: Path, tmp_path: Path, patched: Path, dtype: torch.dtype, tied: bool
) -> None:
    recipe = convert_random(make_recipe, tiny_hf, tmp_path / "random", dtype, tied)
    prompts = write_prompts(tmp_path / "prompts", tiny_hf)
    run_megatron("gpt", patched, converted_file(recipe), tmp_path / "prompts", tmp_path / "result")
    result = load_checkpoint_file(tmp_path / "result")

    assert result["refused"] is None
    written = load_checkpoint_file(converted_file(recipe))["model"]
    assert set(result["keys"]) == set(written)  # the empty `_extra_state` entries too

    original = random_tensors(recipe.model, dtype)
    saved_by_megatron = to_hf(read_model(tmp_path / "result", recipe.model), recipe.model)
    assert saved_by_megatron.keys() == original.keys()
    for name, tensor in original.items():
        assert saved_by_megatron[name].dtype == dtype
        assert torch.equal(saved_by_megatron[name], tensor), name

    weights = {name: tensor.float() for name, tensor in original.items()}
    model = build_model(recipe.path("hf"), weights, "eager", torch.device("cpu")).eval()
    for ids, ours in zip(prompts, result["logits"]):
        with torch.no_grad():
            expected = model(ids[None]).logits[0]
        assert len(ids) > 20
        assert ours.shape == (len(ids), recipe.model.vocab_size)
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_without_the_patch_megatron_refuses_the_checkpoint(
    make_recipe: MakeRecipe, tiny_hf: Path, tmp_path: Path, copy_core: CopyCore
) -> None:
    recipe = convert_random(make_recipe, tiny_hf, tmp_path / "random", torch.float32, True)
    result = tmp_path / "result"
    run_megatron("gpt", copy_core(tmp_path / "unpatched"), converted_file(recipe), "no prompts", result)
    content = load_checkpoint_file(result)
    biases = {f"decoder.layers.{layer}.self_attention.linear_proj.bias" for layer in range(recipe.model.num_layers)}
    assert "Unexpected key(s)" in content["refused"]
    assert biases == set(re.findall(r'"(\S+)"', content["refused"]))
    assert set(load_checkpoint_file(converted_file(recipe))["model"]) - set(content["keys"]) == biases


def test_megatron_reads_and_would_write_the_same_dataset(tmp_path: Path, copy_core: CopyCore) -> None:
    seq_length, random = 32, np.random.RandomState(1)
    packs = []
    for lengths in ([20, 12], [31], [1, 2, 3], [32]):
        input_ids = [random.randint(0, 153376, length, np.int32) for length in lengths]
        labels = [np.where(random.rand(len(ids)) < 0.5, IGNORED, ids).astype(np.int32) for ids in input_ids]
        packs.append(list(zip(input_ids, labels)))
    expected = write_packs(tmp_path, packs, seq_length, pad_id=7)

    prefixes = [str(field_path(tmp_path, "data", field, "idx"))[: -len(".idx")] for field in FIELDS]
    run_megatron("dataset", copy_core(tmp_path / "core"), *prefixes)
    for prefix, field in zip(prefixes, FIELDS):
        rows = np.load(prefix + ".npy")
        assert rows.dtype == np.int32
        assert np.array_equal(rows, expected[field])
        for suffix in (".bin", ".idx"):
            assert Path(prefix + suffix).read_bytes() == Path(prefix + ".copy" + suffix).read_bytes()


def test_every_patch_is_listed_and_names_its_upstream() -> None:
    listed = []
    for name, upstream in upstreams().items():
        assert set(upstream) == {"url", "mirrors", "branch", "commit", "patches"}
        assert re.fullmatch("[0-9a-f]{40}", upstream["commit"])
        for patch in upstream["patches"]:
            assert Path(patch).parent.name == name
            header, _, _ = (PATCHES / patch).read_text("utf-8").partition("diff --git")
            assert upstream["commit"] in header
            listed.append(PATCHES / patch)
        assert [patch for patch in listed if patch.parent.name == name] == sorted((PATCHES / name).glob("*.patch"))
    assert sorted(listed) == sorted(PATCHES.rglob("*.patch"))
