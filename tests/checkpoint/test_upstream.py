"""MindSpeed-LLM 1.0.0's own converter writes what our convert writes, and its training loads that, in every layout.

Runs where its sources are present (upstream.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint_files import hf_sizes
from conftest import MakeRecipe, write_packs
from openpangu_sft.artifacts.artifact import MANIFEST
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.recipe.sections import Model
from posttrain import layout_flags, losses, posttrain
from upstream import load_upstream, run_upstream

Packs = list[list[tuple[np.ndarray, np.ndarray]]]

OURS_ALONE = {"iteration", "rotary_base"}
"""Arguments in our files that upstream's converter leaves out, or None whatever config.json says."""

SEQ_LENGTH = 32
EOS, IGNORED = 13, -100

PUBLISHED_ONLY = """
    --bf16 --accumulate-allreduce-grads-in-fp32 --loss-scale 1.0 --initial-loss-scale 4096
    --override-opt_param-scheduler --reset-attention-mask --eod-mask-loss --distributed-timeout-minutes 120
    --recompute-granularity full --recompute-method block --recompute-num-layers 2
    --overlap-param-gather --overlap-grad-reduce --manual-gc --manual-gc-interval 100
"""
"""Flags of the published recipe that change no weight before the first step; --bf16 rounds, and so changes the loss."""


def write_hf(directory: Path, model: Model, tokenizer: Path) -> None:
    """Writes random bf16 weights with stock transformers, as upstream's converter will read them with it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**hf_sizes(model), attention_bias=True, pad_token_id=0, eos_token_id=EOS)
    llama = LlamaForCausalLM(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    for parameter in llama.parameters():  # norms and biases too, so that none can be lost or swapped unnoticed
        parameter.data.normal_(generator=generator)
    shutil.copytree(tokenizer, directory, ignore=shutil.ignore_patterns("config.json", "*.safetensors", MANIFEST))
    llama.save_pretrained(directory)


def convert(make_recipe: MakeRecipe, *overrides: str) -> Recipe:
    """Our side: a random checkpoint, and what the convert stage makes of it."""
    training = ["train.engine=mindspeed", f"data.seq_length={SEQ_LENGTH}", "train.lr_warmup_iterations=1"]
    sizes = ["model.num_layers=4", *training, *overrides]
    recipe = make_recipe(*sizes, "paths.hf=random")
    write_hf(recipe.path("hf"), recipe.model, tokenizer=make_recipe().path("hf"))
    run_convert(recipe)
    return recipe


def files(directory: Path) -> dict[str, Path]:
    """All files below a directory but our manifest, by relative path."""
    paths = (path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(directory)): path for path in paths}


def assert_same_model(ours: dict[str, Any], theirs: dict[str, Any], dtype: torch.dtype) -> None:
    """Asserts that two state dicts have the same keys and bits; ours is in bf16, which every dtype here can hold."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor is None:
            assert name.endswith("._extra_state")
            assert ours[name] is None
        else:
            assert ours[name].dtype == torch.bfloat16
            assert tensor.dtype == dtype
            assert torch.equal(ours[name].to(dtype), tensor), name


LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def layout(tensor: int, pipeline: int, *others: str) -> list[str]:
    """Overrides of a recipe."""
    sizes = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    return [*sizes, f"parallel.devices_per_node={tensor * pipeline}", *others]


UNEVEN = "parallel.num_layer_list=[3,1]"
PADDED = ["model.vocab_size=1510", "parallel.make_vocab_size_divisible_by=16"]
"""1520 rows with TP 1, 1536 with TP 2."""


@pytest.mark.parametrize(
    "overrides",
    [
        *(pytest.param(layout(*sizes), id="tp{}-pp{}".format(*sizes)) for sizes in LAYOUTS),
        pytest.param(layout(1, 2, UNEVEN), id="uneven"),
        pytest.param(layout(2, 2, "model.tie_word_embeddings=false"), id="untied"),
        pytest.param(layout(1, 1, "model.tie_word_embeddings=false", *PADDED), id="untied-padded"),
        pytest.param(layout(2, 1, *PADDED), id="padded"),
        pytest.param(layout(2, 2, *PADDED), id="padded-pp2"),
    ],
)
def test_its_converter_writes_the_same_tensors(
    upstream: Path, make_recipe: MakeRecipe, tmp_path: Path, overrides: list[str]
) -> None:
    recipe = convert(make_recipe, *overrides)
    parallel, hf = recipe.parallel, recipe.path("hf")
    published = "--model-type GPT --load-model-type hf --save-model-type mg --params-dtype bf16 --use-mcore-models"
    command = [*published.split(), "--add-qkv-bias", "--add-dense-bias", "--tokenizer-model", str(hf)]
    command += ["--load-dir", str(hf), "--save-dir", str(tmp_path / "theirs"), *layout_flags(recipe)]
    command += ["--target-tensor-parallel-size", str(parallel.tensor)]
    command += ["--target-pipeline-parallel-size", str(parallel.pipeline)]
    if divisor := getattr(parallel, "make_vocab_size_divisible_by", None):
        command += ["--make-vocab-size-divisible-by", str(divisor)]
    run_upstream(upstream, "convert_ckpt.py", *command)

    ours, theirs = files(recipe.path("mcore")), files(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert len(ours) == 1 + parallel.tensor * parallel.pipeline
    for name, path in theirs.items():
        if path.suffix != ".pt":
            assert ours[name].read_bytes() == path.read_bytes()
            continue
        our, their = load_upstream(ours[name]), load_upstream(path)
        assert our.keys() == their.keys()
        assert_same_model(our.pop("model"), their.pop("model"), torch.bfloat16)
        their_arguments = vars(their.pop("args"))
        our_arguments = {key: value for key, value in vars(our.pop("args")).items() if key not in OURS_ALONE}
        assert our_arguments == {key: their_arguments[key] for key in our_arguments}
        assert our == their


def random_packs(vocab_size: int) -> Packs:
    """Two packs of (input_ids, labels) segments; eos is at their ends alone, where upstream cuts attention."""
    random = np.random.RandomState(1)
    packs = []
    for lengths in ([20, SEQ_LENGTH - 20], [7, 21]):
        pack = []
        for length in lengths:
            ids = random.randint(EOS + 1, vocab_size, length).astype(np.int32)
            ids[-1] = EOS
            pack.append((ids, np.where(random.rand(length) < 0.5, IGNORED, ids).astype(np.int32)))
        packs.append(pack)
    return packs


def expected_loss(recipe: Recipe, packs: Packs) -> float:
    """The mean loss over all trained tokens, by Hugging Face's model."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(recipe.path("hf"), torch_dtype=torch.float32)
    total, trained = 0.0, 0
    for pack in packs:
        with torch.no_grad():
            logits = torch.cat([model(torch.from_numpy(ids)[None].long()).logits[0] for ids, _ in pack])
        labels = torch.from_numpy(np.concatenate([labels for _, labels in pack])).long()
        total += torch.nn.functional.cross_entropy(
            logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum"
        ).item()
        trained += int((labels[1:] != IGNORED).sum())
    return total / trained


def train(upstream: Path, recipe: Recipe, directory: Path, *flags: str, refused: bool = False) -> tuple[str, Packs]:
    """Runs one iteration of posttrain_gpt.py from our checkpoint; it saves to `run`.

    The first iteration of the warm-up has learning rate 0: what it saves is what it has loaded.
    """
    packs = random_packs(recipe.model.vocab_size)
    (directory / "packs").mkdir()
    write_packs(directory / "packs", packs, SEQ_LENGTH, pad_id=0)
    saving = ["--save", str(directory / "run"), "--save-interval", "1", "--exit-interval", "1"]
    return posttrain(upstream, recipe, directory / "packs/data", *saving, *flags, refused=refused), packs


@pytest.mark.parametrize(
    ("overrides", "flags", "dtype"),
    [
        *(pytest.param(layout(*sizes), "", torch.float32, id="tp{}-pp{}".format(*sizes)) for sizes in LAYOUTS),
        pytest.param(layout(1, 2, UNEVEN), "", torch.float32, id="uneven"),
        pytest.param(layout(2, 2), PUBLISHED_ONLY, torch.bfloat16, id="published-flags"),
    ],
)
def test_its_training_loads_ours_as_it_is(
    upstream: Path, make_recipe: MakeRecipe, tmp_path: Path, overrides: list[str], flags: str, dtype: torch.dtype
) -> None:
    recipe = convert(make_recipe, *overrides)
    output, packs = train(upstream, recipe, tmp_path, *flags.split())
    ours, theirs = files(recipe.path("mcore")), files(tmp_path / "run")
    assert ours.keys() == theirs.keys()
    for name, path in theirs.items():
        if path.suffix == ".pt":
            assert_same_model(load_upstream(ours[name])["model"], load_upstream(path)["model"], dtype)
    if dtype == torch.float32:
        (loss,) = losses(output)
        assert loss == pytest.approx(expected_loss(recipe, packs), rel=1e-5)


def test_its_training_refuses_a_checkpoint_without_one_tensor(
    upstream: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = convert(make_recipe, *layout(1, 2))
    path = recipe.path("mcore") / "iter_0000001/mp_rank_00_001/model_optim_rng.pt"
    content = load_upstream(path)
    del content["model"]["decoder.layers.1.self_attention.linear_proj.bias"]
    torch.save(content, path)
    output, _ = train(upstream, recipe, tmp_path, refused=True)
    assert 'Missing key(s) in state_dict: "decoder.layers.1.self_attention.linear_proj.bias"' in output
    assert not files(tmp_path / "run")
