"""Reading Megatron-core checkpoints: what conversion and training leave, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import pytest
import torch

from checkpoint_files import assert_same_bits, read_hf, read_mcore
from conftest import MakeRecipe
from openpangu_sft.artifacts.artifact import MANIFEST
from openpangu_sft.checkpoint import convert
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.mcore_reader import latest_iteration, open_mcore
from openpangu_sft.checkpoint.sharding import Layout
from openpangu_sft.recipe.schema import Recipe
from refusals import refusal_of

ITERATION = "iter_0000001"
FILE = "model_optim_rng.pt"
TP2_PP2 = ("train.engine=mindspeed", "parallel.devices_per_node=4", "parallel.tensor=2", "parallel.pipeline=2")


@pytest.fixture
def converted(make_recipe: MakeRecipe) -> Recipe:
    """A checkpoint of TP 2, PP 2 that a test may spoil: as of training, without this project's manifest."""
    recipe = make_recipe(*TP2_PP2)
    run_convert(recipe)
    (recipe.path("mcore") / MANIFEST).unlink()
    return recipe


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes a file as training would have written it."""
    content = torch.load(path)
    change(content)
    torch.save(content, path)


def refusal(recipe: Recipe, iteration: Optional[int] = None) -> str:
    message = refusal_of(open_mcore, recipe.path("mcore"), recipe.model, iteration)
    assert str(recipe.path("mcore")) in message
    return message


def rank(recipe: Recipe, name: str) -> Path:
    return recipe.path("mcore") / ITERATION / name


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda content: content["model"].pop("decoder.final_layernorm.weight"), "final_layernorm.weight is missing"),
        (lambda content: content["model"].update(more=torch.zeros(1)), "unexpected tensor more"),
        (
            lambda content: content["model"].update({"decoder.final_layernorm.weight": torch.zeros(31)}),
            "tensor decoder.final_layernorm.weight has shape (31,), expected (32,)",
        ),
        (
            lambda content: content["model"].update({"decoder.final_layernorm.weight": torch.zeros(32).long()}),
            "tensor decoder.final_layernorm.weight is int64, expected one of float32, bfloat16, float16",
        ),
        (lambda content: content.pop("model"), "holds no model"),
        (lambda content: content.update(model=[]), "holds no model"),
        (
            lambda content: content.update(model0=content.pop("model"), model1={}),
            "holds no model, or several parts of one (--num-layers-per-virtual-pipeline-stage)",
        ),
    ],
    ids=[
        "missing tensor",
        "unexpected tensor",
        "wrong shape",
        "wrong dtype",
        "no model",
        "list as model",
        "virtual pipeline",
    ],
)
def test_unfit_ranks_are_refused(converted: Recipe, spoil: Callable[[Any], Any], complaint: str) -> None:
    file = rank(converted, "mp_rank_01_001") / FILE
    edit(file, spoil)
    message = refusal(converted)
    assert complaint in message
    assert str(file) in message


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda args: setattr(args, "num_attention_heads", 8), "has num_attention_heads 8, the recipe says 4"),
        (lambda args: setattr(args, "num_query_groups", 4), "has num_query_groups 4, the recipe says 2"),
        (lambda args: setattr(args, "kv_channels", 16), "has kv_channels 16, the recipe says 8"),
        (lambda args: setattr(args, "rotary_base", 10000), "has rotary_base 10000, the recipe says 4000000.0"),
        (
            lambda args: setattr(args, "rotary_seq_len_interpolation_factor", 4),
            "has rotary_seq_len_interpolation_factor 4, the recipe says None",
        ),
        (lambda args: setattr(args, "norm_epsilon", 1e-6), "has norm_epsilon 1e-06, the recipe says 1e-05"),
        (
            lambda args: vars(args).update(kv_channels=16, norm_epsilon=1e-6),
            "has kv_channels 16, the recipe says 8; has norm_epsilon 1e-06, the recipe says 1e-05 -> ",
        ),
    ],
    ids=["heads", "query groups", "head size", "rope base", "interpolation", "norm epsilon", "two of them"],
)
def test_sizes_that_no_shape_tells_are_compared(converted: Recipe, spoil: Callable[[Any], Any], complaint: str) -> None:
    edit(rank(converted, "mp_rank_00_000") / FILE, lambda content: spoil(content["args"]))
    assert complaint in refusal(converted)


def test_arguments_that_upstream_leaves_out_are_not_missed(converted: Recipe) -> None:
    """Its converter writes rotary_base None."""
    for path in rank(converted, "").iterdir():
        edit(path / FILE, lambda content: setattr(content["args"], "rotary_base", None))
    assert open_mcore(converted.path("mcore"), converted.model).layout == Layout(2, (1, 1), 1536)


def test_without_arguments_the_ranks_tell_the_layout(converted: Recipe, tiny_hf: Path) -> None:
    for path in rank(converted, "").iterdir():
        edit(path / FILE, lambda content: content.pop("args"))
    assert_same_bits(read_mcore(converted.path("mcore"), converted.model), read_hf(tiny_hf, converted.model))


@pytest.mark.parametrize("lost", ["mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"])
def test_a_missing_rank_is_refused_by_name(converted: Recipe, lost: str) -> None:
    shutil.rmtree(rank(converted, lost))
    message = refusal(converted)
    assert f"{rank(converted, lost)}: is half-written: of TP 2, PP 2 this rank is missing" in message


def test_a_rank_too_many_is_refused(converted: Recipe) -> None:
    shutil.copytree(rank(converted, "mp_rank_00_000"), rank(converted, "mp_rank_02_000"))
    assert f"{rank(converted, 'mp_rank_02_000')}: belongs to no rank of TP 2, PP 2" in refusal(converted)


def test_any_number_of_ranks_may_be_claimed(converted: Recipe) -> None:
    edit(
        rank(converted, "mp_rank_00_000") / FILE,
        lambda content: setattr(content["args"], "tensor_model_parallel_size", 10**18),
    )
    assert f"is half-written: of TP {10**18}, PP 2 this rank is missing" in refusal(converted)


def test_ranks_of_two_checkpoints_are_refused(converted: Recipe) -> None:
    """A norm is on all tensor ranks: without shared storage, old and new files mix easily."""

    def change(content: Any) -> None:
        content["model"]["decoder.layers.0.input_layernorm.weight"][7] = 3.5

    edit(rank(converted, "mp_rank_01_000") / FILE, change)
    message = refusal(converted)
    assert "model.layers.0.input_layernorm.weight[7] is 3.5 here, 1.0 there" in message
    assert str(rank(converted, "mp_rank_01_000") / FILE) in message
    assert str(rank(converted, "mp_rank_00_000") / FILE) in message


def test_a_tied_copy_that_differs_is_refused(converted: Recipe) -> None:
    def change(content: Any) -> None:
        content["model"]["output_layer.weight"][3, 5] += 1

    edit(rank(converted, "mp_rank_01_001") / FILE, change)
    assert "model.embed_tokens.weight[771, 5] is" in refusal(converted)  # the second tensor rank begins at row 768


def test_another_number_of_layers_is_refused(converted: Recipe) -> None:
    model = converted.model.model_copy(update={"num_layers": 4})
    message = refusal_of(open_mcore, converted.path("mcore"), model)
    assert "has num_layers 2, the recipe says 4" in message
    for path in rank(converted, "").iterdir():
        edit(path / FILE, lambda content: content.pop("args"))
    message = refusal_of(open_mcore, converted.path("mcore"), model)
    assert "has 2 layers, the recipe says model.num_layers 4" in message


def test_a_larger_vocabulary_is_refused(converted: Recipe) -> None:
    model = converted.model.model_copy(update={"vocab_size": 1600})
    message = refusal_of(open_mcore, converted.path("mcore"), model)
    assert "has 1536 rows in its embedding, the recipe says model.vocab_size 1600" in message


# What training leaves.


@pytest.fixture
def trained(converted: Recipe) -> Recipe:
    """Iterations 100 and 200 as training leaves them, the second one the newest, with the optimizer beside."""
    root = converted.path("mcore")
    for number in (100, 200):
        shutil.copytree(root / ITERATION, root / f"iter_{number:07d}")
        for path in (root / f"iter_{number:07d}").iterdir():
            edit(path / FILE, lambda content, number=number: content.update(iteration=number, optimizer={"step": 1}))
            torch.save({"bucket": torch.zeros(1000), "args": Namespace()}, path / "distrib_optim.pt")
    shutil.rmtree(root / ITERATION)
    (root / "latest_checkpointed_iteration.txt").write_text("200")
    return converted


def test_the_newest_or_a_given_iteration_is_read(trained: Recipe, tiny_hf: Path) -> None:
    wanted = read_hf(tiny_hf, trained.model)
    for given, found in ((None, 200), (100, 100), (200, 200)):
        assert open_mcore(trained.path("mcore"), trained.model, given).iteration == found
        assert_same_bits(read_mcore(trained.path("mcore"), trained.model, given), wanted)


def test_an_iteration_that_is_not_there(trained: Recipe) -> None:
    assert refusal(trained, 150).endswith("iter_0000150: iteration 150 is not there -> take another one: ITERATION=200")


def test_an_iteration_after_the_newest_is_not_finished(trained: Recipe) -> None:
    """The tracker is written last: training was killed between the two."""
    (trained.path("mcore") / "latest_checkpointed_iteration.txt").write_text("100")
    message = refusal(trained, 200)
    assert "iter_0000200: is not finished: latest_checkpointed_iteration.txt names iteration 100" in message
    assert message.endswith("ITERATION=100")


@pytest.mark.parametrize("file", [FILE, "distrib_optim.pt"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_that_was_being_written_is_refused_by_name(trained: Recipe, file: str, share: float) -> None:
    """Training was killed, or the disk was full."""
    path = trained.path("mcore") / "iter_0000200/mp_rank_01_001" / file
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert refusal(trained) == (f"{path}: is half-written: this file has no end -> take another one: ITERATION=100")


def test_a_rank_without_its_model_is_refused_by_name(trained: Recipe) -> None:
    """The optimizer's file is written first."""
    path = trained.path("mcore") / "iter_0000200/mp_rank_00_001" / FILE
    path.unlink()
    assert f"{path}: is half-written: this file is missing" in refusal(trained)


def test_other_formats_are_named(trained: Recipe) -> None:
    iteration = trained.path("mcore") / "iter_0000200"
    (iteration / "metadata.json").write_text("{}")
    assert "is in Megatron's distributed format (--use-dist-ckpt)" in refusal(trained)
    (iteration / "metadata.json").unlink()
    (iteration / "mp_rank_00_000").rename(iteration / "mp_rank_00_000_000")
    assert "mp_rank_00_000_000: has expert parallelism" in refusal(trained)
    for path in iteration.iterdir():
        shutil.rmtree(path)
    assert "iter_0000200: holds no checkpoint (mp_rank_00)" in refusal(trained)


def test_a_file_of_the_manifest_that_is_cut_is_refused(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    run_convert(recipe)
    manifest = json.loads((recipe.path("mcore") / MANIFEST).read_text("utf-8"))
    manifest["files"][f"{ITERATION}/mp_rank_00/{FILE}"]["bytes"] += 1
    (recipe.path("mcore") / MANIFEST).write_text(json.dumps(manifest))
    assert f"mp_rank_00/{FILE}: " in refusal(recipe)


def test_a_checkpoint_of_parameters_reads_as_plain_tensors(make_recipe: MakeRecipe, tiny_hf: Path) -> None:
    recipe = make_recipe()
    run_convert(recipe)
    (recipe.path("mcore") / MANIFEST).unlink()

    def change(content: Any) -> None:
        for name, value in content["model"].items():
            content["model"][name] = None if value is None else torch.nn.Parameter(value)

    edit(rank(recipe, "mp_rank_00") / FILE, change)
    assert_same_bits(read_mcore(recipe.path("mcore"), recipe.model), read_hf(tiny_hf, recipe.model))


@pytest.mark.parametrize(
    "text", ["", "release", "²", "-1", "1.0", pytest.param("9" * 5000, id="5000 digits"), "\udcff"]
)
def test_a_tracker_that_names_no_iteration_is_refused(tmp_path: Path, text: str) -> None:
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_bytes(text.encode("utf-8", "surrogateescape"))
    message = refusal_of(latest_iteration, tmp_path)
    assert str(tracker) in message
    assert len(message) < 300


def test_no_tracker_is_refused(tmp_path: Path) -> None:
    assert "no checkpoint here" in refusal_of(latest_iteration, tmp_path)


def test_a_release_is_read(converted: Recipe, tiny_hf: Path) -> None:
    """The form that Megatron's own converters leave: no iteration, and the tracker file says so."""
    root = converted.path("mcore")
    (root / ITERATION).rename(root / "release")
    (root / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert_same_bits(read_mcore(root, converted.model), read_hf(tiny_hf, converted.model))
    opened = open_mcore(root, converted.model)
    assert (opened.directory, opened.iteration) == (root / "release", 0)
    assert str(root / "iter_0000005") in refusal(converted, 5)
    again = converted.model_copy(update={"paths": converted.paths.model_copy(update={"mcore": "again"})})
    run_convert(again, root)
    assert_same_bits(read_mcore(again.path("mcore"), again.model), read_hf(tiny_hf, again.model))


def test_a_release_that_is_not_there(converted: Recipe) -> None:
    (converted.path("mcore") / "latest_checkpointed_iteration.txt").write_text("release")
    message = refusal(converted)
    assert message.startswith(f"{converted.path('mcore') / 'release'}: ")
    assert "is not there" in message


def test_a_release_that_changes_while_it_is_read(converted: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    root = converted.path("mcore")
    (root / ITERATION).rename(root / "release")
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    file = root / "release/mp_rank_01_001" / FILE
    monkeypatch.setattr(convert, "require_equal", lambda *_: file.touch())
    again = converted.model_copy(update={"paths": converted.paths.model_copy(update={"mcore": "again"})})
    assert refusal_of(run_convert, again, root).startswith(f"{file}: changed while it was read")
