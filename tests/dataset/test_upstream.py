"""The real MindSpeed-LLM 1.0.0 takes our packed files as they are, preprocesses to our bytes, and merges our segments.

Runs where its sources are at hand (upstream.py).
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import MakeRecipe, conversation, write_samples
from openpangu_sft.dataset.index_file import FIELDS, PREFIX, read_rows
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.dataset.segments import segment_runs
from openpangu_sft.model.batches import training_order
from openpangu_sft.recipe.schema import Recipe
from upstream import run_upstream

DRAW = """
import sys
from argparse import Namespace
from mindspeed_llm import megatron_adaptor
import numpy as np
import torch
from megatron.core import parallel_state
from megatron.training import global_vars
from mindspeed_llm.tasks.preprocess import decoder_packed_mtf_dataset as packed

prefix, seq_length, samples, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

class Settings(Namespace):
    def __getattr__(self, name):
        return False  # every flag that is not set


global_vars.set_args(Settings(reset_position_ids=True))
torch.distributed.init_process_group("gloo", init_method=f"file://{output}.rendezvous", rank=0, world_size=1)
parallel_state.initialize_model_parallel()
train, _, _ = packed._build_train_valid_test_datasets(prefix, "100,0,0", seq_length, 0, 2, [samples, 0, 0], 1234)
items = [train[number] for number in range(samples)]
drawn = {name: np.stack([item[name] for item in items]) for name in ("input_ids", "attention_mask", "labels")}
np.savez(output, order=np.asarray(train.shuffle_index[:samples]), **drawn)
"""


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    recipe = make_recipe("data.seq_length=96")
    for name, count in (("b", 30), ("a", 20), ("c", 7)):
        records = [
            conversation(f"{name} 问题 {number}", f"答案 {number} " * (number % 5 + 1)) for number in range(count)
        ]
        write_samples(recipe.path("samples") / f"{name}.jsonl", records)
    run_preprocess(recipe)
    run_merge(recipe)
    return recipe


def preprocess(recipe: Recipe, source: Path, prefix: Path) -> list[str]:
    """The published command, as arguments of Python."""
    flags = f"""
        preprocess_data.py --input {source} --tokenizer-name-or-path {recipe.path("hf")} --output-prefix {prefix}
        --workers 4 --log-interval 1000 --tokenizer-type PretrainedFromHF --handler-name PanguInstructionHandler
        --seq-length {recipe.data.seq_length} --pack
    """
    return flags.split()


def test_its_preprocessing_gives_the_same_bytes(upstream: Path, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run_upstream(upstream, *preprocess(recipe, recipe.path("samples") / "a.jsonl", tmp_path / "out/demo"))
    theirs = sorted((tmp_path / "out").glob("demo_packed_*"))
    assert len(theirs) == 6
    for file in theirs:
        ours = recipe.path("shards") / "a" / f"{PREFIX}{file.name[len('demo') :]}"
        assert file.read_bytes() == ours.read_bytes(), file.name


def test_its_preprocessing_says_what_is_wrong_in_one_line(upstream: Path, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    mixed = [{"meta_prompt": "", "data": conversation("?", "!")["data"]}, conversation("?", "!"), {"data": None}]
    write_samples(tmp_path / "bad.jsonl", mixed)  # the first two are fine, and more than upstream's loader can take
    output = run_upstream(upstream, *preprocess(recipe, tmp_path / "bad.jsonl", tmp_path / "out/demo"), refused=True)
    assert output.splitlines()[-1].startswith(f"openpangu-sft: {tmp_path}/bad.jsonl:3: meta_prompt is missing")
    assert "Traceback" not in output
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_its_merge_gives_the_same_segments(upstream: Path, recipe: Recipe, tmp_path: Path) -> None:
    """In more packs: it does not pack the underfilled ones again."""
    shards = tmp_path / "flat"
    shards.mkdir()
    for shard in (path for path in recipe.path("shards").iterdir() if path.is_dir()):
        for file in shard.glob(f"{PREFIX}_packed_*"):
            shutil.copyfile(file, shards / f"{shard.name}{file.name[len(PREFIX) :]}")
    (tmp_path / "merged").mkdir()
    keys = [f"packed_{field}_document" for field in FIELDS]
    output = tmp_path / f"merged/{PREFIX}"  # not in its input: it would read what it writes, without end
    command = ["--input", str(shards), "--output-prefix", str(output), "--merge-group-keys", *keys]
    run_upstream(upstream, "preprocess_data.py", *command)
    theirs, ours = (
        {field: read_rows(place, PREFIX, field, 96) for field in FIELDS}
        for place in (tmp_path / "merged", recipe.path("dataset"))
    )
    assert len(theirs["labels"]) > len(ours["labels"])
    assert Counter(segments_of(theirs)) == Counter(segments_of(ours))


def segments_of(rows: dict[str, np.ndarray]) -> Iterator[tuple[bytes, bytes]]:
    for row, begin, end in zip(*segment_runs(rows["attention_mask"])):
        yield rows["input_ids"][row, begin:end].tobytes(), rows["labels"][row, begin:end].tobytes()


def test_its_dataset_class_reads_ours_as_it_is(upstream: Path, recipe: Recipe, tmp_path: Path) -> None:
    ours = {field: read_rows(recipe.path("dataset"), PREFIX, field, 96) for field in FIELDS}
    packs = len(ours["labels"])
    copy = tmp_path / "copy"  # it writes an index beside the data
    shutil.copytree(recipe.path("dataset"), copy)
    (tmp_path / "draw.py").write_text(DRAW, "utf-8")
    run_upstream(upstream, str(tmp_path / "draw.py"), str(copy / PREFIX), "96", str(2 * packs), str(tmp_path / "drawn"))
    drawn = np.load(tmp_path / "drawn.npz")
    order = training_order(packs, 2 * packs, 1234)[: 2 * packs]
    assert drawn["order"].tolist() == order.tolist()
    for field in FIELDS:
        assert (drawn[field] == ours[field][order]).all(), field
