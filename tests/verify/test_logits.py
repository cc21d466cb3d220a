"""What the stages write is right in the real megatron-core 0.6.0, with this project's patch: checkpoints and datasets.

Megatron's part runs in a process of its own (megatron_on_cpu.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint_files import Tensors, assert_same_bits, read_mcore, set_config, write_hf
from conftest import PATIENCE, ROOT, MakeRecipe, write_packs
from openpangu_sft.artifacts.artifact import MANIFEST
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.files.torch_read import load_checkpoint_file
from openpangu_sft.checkpoint.sharding import hf_shapes, single
from openpangu_sft.conversations.conversation import Message
from openpangu_sft.dataset.index_file import FIELDS, field_path
from openpangu_sft.model.llama import build_model
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.recipe.sections import Model
from openpangu_sft.tokenizer.template import prompt_spans
from openpangu_sft.tokenizer.tokenizer import IGNORED, Tokenizer
from openpangu_sft.verify import megatron
from openpangu_sft.verify.megatron import find_core, megatron_logits
from refusals import message_of


def run_megatron(command: str, *arguments: object) -> None:
    """Runs megatron_on_cpu.py; TorchScript is off, because Megatron-core compiles at import and that takes a while."""
    subprocess.run(
        [sys.executable, str(ROOT / "tests/megatron_on_cpu.py"), command, *map(str, arguments)],
        env={**os.environ, "PYTORCH_JIT": "0", "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=PATIENCE,
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
    write_hf(hf, tiny_hf, random_tensors(recipe.model, dtype))
    set_config(hf, tie_word_embeddings=tied)
    run_convert(recipe)
    return recipe


def converted(recipe: Recipe) -> Path:
    """Directory of the checkpoint that convert wrote."""
    return recipe.path("mcore") / "iter_0000001"


def make_prompts(tiny_hf: Path) -> list[list[int]]:
    """Token ids of a Chinese and an English conversation."""
    tokenizer = Tokenizer(tiny_hf, trust_remote_code=False)
    conversations = [
        ("你是客服助手，请用简短的话回答。", "你好，我上周买的耳机坏了，可以退货吗？请告诉我需要准备哪些材料。"),
        ("", "Name three large cities in China, and write one sentence about the history of each of them."),
    ]
    return [
        [number for ids in tokenizer.encode(spans) for number in ids]
        for spans in (list(prompt_spans((system,), (Message("user", text),), True)) for system, text in conversations)
    ]


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
    prompts = make_prompts(tiny_hf)
    ours = megatron_logits(converted(recipe), prompts, "fp32", recipe.model, single(recipe.model), core=patched)
    original = random_tensors(recipe.model, dtype)
    weights = {name: tensor.float() for name, tensor in original.items()}
    model = build_model(recipe.path("hf"), weights, "eager", torch.device("cpu")).eval()
    for ids, found in zip(prompts, ours):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        assert len(ids) > 20
        assert found.shape == (len(ids), recipe.model.vocab_size)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()

    file = converted(recipe) / "mp_rank_00/model_optim_rng.pt"
    written = load_checkpoint_file(file)
    run_megatron("gpt", patched, file, tmp_path / "result")
    saved = load_checkpoint_file(tmp_path / "result")
    assert set(saved["model"]) == set(written["model"])  # the empty `_extra_state` entries too
    shutil.copyfile(tmp_path / "result", file)  # as if Megatron had saved it here
    (recipe.path("mcore") / MANIFEST).unlink()
    assert_same_bits(read_mcore(recipe.path("mcore"), recipe.model), original)


@pytest.mark.usefixtures("wheel")
def test_without_the_patch_megatron_refuses_the_checkpoint(
    make_recipe: MakeRecipe, tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = convert_random(make_recipe, tiny_hf, tmp_path / "random", torch.float32, True)
    monkeypatch.setattr(megatron, "SOURCES", tmp_path / "absent")
    monkeypatch.setattr(megatron, "apply_patch", lambda *_: None)
    find_core(tmp_path)
    given = (converted(recipe), [[1, 2]], "fp32", recipe.model, single(recipe.model))
    message = message_of(megatron_logits, *given, core=tmp_path)
    assert "Unexpected key" in message
    biases = {f"decoder.layers.{layer}.self_attention.linear_proj.bias" for layer in range(recipe.model.num_layers)}
    assert biases == set(re.findall(r'"(\S+)"', message))


def test_megatron_reads_and_would_write_the_same_dataset(tmp_path: Path, patched: Path) -> None:
    seq_length, random = 32, np.random.RandomState(1)
    packs = []
    for lengths in ([20, 12], [31], [1, 2, 3], [32]):
        input_ids = [random.randint(0, 153376, length, np.int32) for length in lengths]
        labels = [np.where(random.rand(len(ids)) < 0.5, IGNORED, ids).astype(np.int32) for ids in input_ids]
        packs.append(list(zip(input_ids, labels)))
    expected = write_packs(tmp_path, packs, seq_length, pad_id=7)

    prefixes = [str(field_path(tmp_path, "data", field, "idx"))[: -len(".idx")] for field in FIELDS]
    run_megatron("dataset", patched, *prefixes)
    for prefix, field in zip(prefixes, FIELDS):
        rows = np.load(prefix + ".npy")
        assert rows.dtype == np.int32
        assert np.array_equal(rows, expected[field])
        for suffix in (".bin", ".idx"):
            assert Path(prefix + suffix).read_bytes() == Path(prefix + ".copy" + suffix).read_bytes()
