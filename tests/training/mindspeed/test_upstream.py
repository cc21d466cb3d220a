"""The patched MindSpeed-LLM 1.0.0 trains on what it is meant to: its losses are Hugging Face's and our own engine's.

Real torchrun processes on the stand-in for NPUs, in fp32; runs where the sources are at hand (upstream.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint_files import hf_sizes, read_hf
from openpangu_sft.dataset.index_file import FIELDS, PREFIX, PackedWriter, read_rows
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.dataset.segments import segment_bounds
from openpangu_sft.model.batches import micro_batches, training_order
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.tokenizer import IGNORED
from posttrain import (
    ACTIVATION,
    OVERLAP,
    RECOMPUTE,
    RECOMPUTE_ONE,
    copy_dataset,
    figures,
    losses,
    posttrain,
    several,
)
from training.mindspeed.conftest import ITERATIONS, Engine, MakeRun
from upstream import without_patch

Rows = dict[str, np.ndarray]


def rows_of(recipe: Recipe) -> Rows:
    return {field: read_rows(recipe.path("dataset"), PREFIX, field, recipe.data.seq_length) for field in FIELDS}


def reference(recipe: Recipe, segments: np.ndarray, packs: Sequence[int] = ()) -> tuple[float, float]:
    """Loss and gradient norm of iteration 1 by Hugging Face's Llama, which sees one segment at a time.

    Args:
        segments: int [packs, seq_length]; attention spans what has one number.
        packs: one batch of them instead.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    rows, train = rows_of(recipe), recipe.train
    llama = LlamaForCausalLM(LlamaConfig(**hf_sizes(recipe.model), attention_bias=True))
    keys = llama.load_state_dict(read_hf(recipe.path("hf"), recipe.model), strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["lm_head.weight"], [])  # it is the embedding
    order = training_order(len(segments), train.global_batch_size, train.seed)
    means = []
    size = train.global_batch_size if train.loss == "token" else train.micro_batch_size
    for batch in [packs] if packs else micro_batches(order, 1, train.global_batch_size, size, rank=0, replicas=1):
        logits = []
        for pack in batch:
            for begin, end in segment_bounds(segments[pack]):
                ids = torch.from_numpy(rows["input_ids"][pack, begin:end].astype(np.int64))
                logits.append(llama(ids[None]).logits[0])
            logits[-1] = logits[-1][:-1]  # the last position of a pack predicts nothing
        targets = torch.from_numpy(rows["labels"][batch, 1:].astype(np.int64)).flatten()
        means.append(torch.nn.functional.cross_entropy(torch.cat(logits), targets, ignore_index=IGNORED))
    loss = torch.stack(means).mean()
    loss.backward()
    return loss.item(), torch.nn.utils.clip_grad_norm_(llama.parameters(), torch.inf).item()


MEANS = "train.loss=micro_batch"


@pytest.mark.parametrize(
    ("overrides", "flags"),
    [
        pytest.param([], "", id="one"),
        pytest.param(several(2), "", id="data-parallel"),
        pytest.param(several(2, "parallel.context=2"), "", id="context-parallel"),
        pytest.param(several(2, "parallel.context=2"), "--kv-head-repeat-before-uly-alltoall", id="kv-heads-repeated"),
        pytest.param(several(2, "parallel.tensor=2"), "", id="tensor-parallel"),
        pytest.param(several(2, "parallel.tensor=2"), f"{ACTIVATION} {RECOMPUTE_ONE}", id="activation-recomputed"),
        pytest.param(several(2, "parallel.pipeline=2", "parallel.num_layer_list=[2,1]"), RECOMPUTE, id="pipeline"),
        pytest.param(several(3, "parallel.pipeline=3"), "", id="middle-stage"),
        pytest.param(["train.micro_batch_size=2"], "", id="micro-batch-2"),
        pytest.param(["train.micro_batch_size=4"], OVERLAP, id="micro-batch-4"),
        pytest.param([MEANS], "", id="means"),
        pytest.param([MEANS, *several(2, "parallel.context=2")], "", id="means-context-parallel"),
        pytest.param(
            [MEANS, *several(2, "parallel.pipeline=2", "parallel.num_layer_list=[2,1]")], "", id="means-pipeline"
        ),
        pytest.param([MEANS, "train.micro_batch_size=2"], "", id="means-micro-batch-2"),
    ],
)
def test_its_losses_are_those_of_the_references(
    upstream: Path,
    make_run: MakeRun,
    engine: Engine,
    tmp_path: Path,
    overrides: list[str],
    flags: str,
) -> None:
    recipe = make_run(*overrides)
    posttrain(upstream, recipe, copy_dataset(recipe, tmp_path), *flags.split())
    losses, norms = figures(recipe, "lm loss", "grad-norm")
    others = engine(f"train.loss={recipe.train.loss}", f"train.micro_batch_size={recipe.train.micro_batch_size}")
    assert len(losses) == ITERATIONS
    first = reference(recipe, rows_of(recipe)["attention_mask"])
    for found in ((losses[0], norms[0]), (others[0][0], others[1][0])):
        assert found == pytest.approx(first, rel=1e-6)
    assert losses == pytest.approx(others[0], rel=1e-5)
    assert norms == pytest.approx(others[1], rel=1e-4)  # Adam and clipping hide a wrong scale from losses


def test_the_same_data_packed_otherwise_gives_the_same_gradient(
    upstream: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    """With other cuts of the shards and another order, the whole dataset as one batch."""
    found = []
    for number, (seed, share) in enumerate([(1234, 1), (7, 3)]):
        place = tmp_path / str(number)
        recipe = make_run(f"paths.shards={place / 'shards'}", f"paths.dataset={place / 'data'}", f"data.seed={seed}")
        lines = (recipe.path("samples") / "talks.jsonl").read_text("utf-8").splitlines(keepends=True)
        for part in range(share):
            write = place / "samples" / f"{part}.jsonl"
            write.parent.mkdir(parents=True, exist_ok=True)
            write.write_text("".join(lines[part::share]), "utf-8")
        cut = [
            f"paths.samples={place / 'samples'}",
            *(f"paths.{name}={recipe.path(name)}" for name in ("shards", "dataset")),
        ]
        recipe = make_run(*cut, f"data.seed={seed}")
        run_preprocess(recipe)
        run_merge(recipe)
        packs = len(rows_of(recipe)["labels"])
        recipe = make_run(*cut, f"data.seed={seed}", f"train.global_batch_size={packs}", f"paths.run={place / 'run'}")
        posttrain(upstream, recipe, copy_dataset(recipe, place), "--exit-interval", "1")
        found.append([packs, *(values[0] for values in figures(recipe, "lm loss", "grad-norm"))])
    # a segment elsewhere in a pack has other positions, and RoPE rounds their angles
    assert found[0][1:] == pytest.approx(found[1][1:], rel=1e-5)


def test_an_evaluation_keeps_no_gradient_and_gives_the_mean_of_the_packs(
    upstream: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    packs = len(rows_of(make_run())["labels"])
    recipe = make_run("train.iterations=2", f"train.global_batch_size={packs // 2}")
    flags = "--split 50,50,0 --eval-interval 1 --eval-iters 1 --exit-interval 1"
    output = posttrain(upstream, recipe, copy_dataset(recipe, tmp_path), *flags.split())
    (found,) = re.findall(r"validation loss at iteration 1 \| lm loss value: (\S+)", output)
    held_out = np.arange(packs)[-(packs // 2) :]
    expected = np.mean([reference(recipe, rows_of(recipe)["attention_mask"], [pack])[0] for pack in held_out])
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_without_the_patch_attention_is_cut_at_every_message(upstream: Path, make_run: MakeRun, tmp_path: Path) -> None:
    recipe = make_run()
    published = without_patch(upstream, tmp_path / "published", "mindspeed-llm/0002-segments.patch")
    posttrain(published, recipe, copy_dataset(recipe, tmp_path), "--exit-interval", "1")
    ((found,),) = figures(recipe, "lm loss")
    rows = rows_of(recipe)
    ends = rows["input_ids"] == recipe_end(recipe)
    messages = np.cumsum(ends, axis=1) - ends
    assert found == pytest.approx(reference(recipe, messages)[0], abs=1e-5)
    assert abs(found - reference(recipe, rows["attention_mask"])[0]) > 1e-2


def recipe_end(recipe: Recipe) -> int:
    """The tokenizer's eos, which is what ends a message."""
    from openpangu_sft.tokenizer.tokenizer import Tokenizer

    return Tokenizer(recipe.path("hf"), trust_remote_code=False).end_id


def test_a_dataset_without_segment_numbers_is_refused(upstream: Path, make_run: MakeRun, tmp_path: Path) -> None:
    recipe = make_run(*several(2))
    rows = rows_of(recipe)
    (tmp_path / "old").mkdir()
    ids = np.where(rows["attention_mask"] == 0, 1, rows["input_ids"])  # as the published handler writes them
    PackedWriter(tmp_path / "old", PREFIX, len(ids), recipe.data.seq_length).write(0, **{**rows, "attention_mask": ids})
    output = posttrain(upstream, recipe, tmp_path / "old" / PREFIX, refused=True)
    (line,) = (line for line in output.splitlines() if line.startswith("openpangu-sft: "))
    assert "old/data_packed_attention_mask_document.bin: has no segment numbers" in line
    assert " -> make it again: " in line
    assert "Traceback" not in output.split(line)[0]
    assert not losses(output)
