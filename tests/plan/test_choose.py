"""auto: what is chosen, what is said about it, and that a run records it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.test_main import run, sets
from conftest import ROOT, MakeRecipe
from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.plan.choose import all_splits, bytes_sent, choose, recomputed
from openpangu_sft.plan.estimate import memory_of
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import ChosenRecipe
from openpangu_sft.training.run.provenance import RECIPE, record_start

FAST, SEVEN = ROOT / "recipes/openpangu-1b-fast.yaml", ROOT / "recipes/openpangu-7b.yaml"
DATA = ("parallel.tensor=1", "parallel.context=1", "parallel.pipeline=1")
PORTABLE = "train.engine=transformers"


def chosen(path: Path, *overrides: str) -> ChosenRecipe:
    recipe = load_recipe(path, overrides, choose)
    assert isinstance(recipe, ChosenRecipe)
    return recipe


def numbers(recipe: ChosenRecipe) -> tuple[int, int, int, str]:
    """TP, PP, CP, and what is recomputed."""
    parallel = recipe.parallel
    return parallel.tensor, parallel.pipeline, parallel.context, recomputed(recipe)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), (1, 1, 1, "3 + act.")),
        (("train.device_memory=32",), (1, 1, 4, "2 + act.")),
        (("train.device_memory=1000",), (1, 1, 1, "0")),  # ulysses, TP and recompute only where memory asks for them
        (("data.seq_length=4096",), (1, 1, 1, "0")),
        (("train.recompute.granularity=none",), (1, 1, 4, "0")),
        (("train.recompute.granularity=full", "train.recompute.num_layers=26"), (1, 1, 1, "26")),
        (("parallel.context=2",), (1, 1, 2, "0")),
        ((PORTABLE, "data.seq_length=4096"), (1, 1, 1, "0")),
        ((PORTABLE, "train.device_memory=80"), (1, 1, 1, "11")),
        ((PORTABLE, "train.device=cpu"), (1, 1, 1, "0")),
    ],
    ids=["64", "32", "huge", "short", "none", "recompute", "context", "portable", "80-gb-gpu", "cpu"],
)
def test_of_the_1b(overrides: tuple[str, ...], expected: tuple[int, int, int, str]) -> None:
    assert numbers(chosen(FAST, *overrides)) == expected


@pytest.mark.parametrize(
    ("name", "overrides", "expected", "fits"),
    [
        ("1b", (), (1, 1, 1, "0 + act."), True),  # on one NPU
        ("1b", ("train.device_memory=32",), (1, 1, 1, "16 + act."), True),
        ("7b", (), (1, 1, 4, "2 + act."), True),  # on four
        ("7b", ("parallel.devices_per_node=1",), (1, 1, 1, "27 + act."), True),
        ("7b", ("parallel.devices_per_node=1", "train.lora.targets=[q_proj,k_proj,v_proj]"), (1, 1, 1, "27"), True),
        ("7b", ("parallel.devices_per_node=1", "train.lora.rank=0"), (1, 1, 1, "34 + act."), False),
    ],
)
def test_of_lora(name: str, overrides: tuple[str, ...], expected: tuple[int, int, int, str], fits: bool) -> None:
    recipe = chosen(ROOT / f"recipes/openpangu-{name}-lora.yaml", *overrides)
    assert numbers(recipe) == expected
    assert ("nothing fits" not in recipe.chosen) == fits


def test_of_the_7b() -> None:
    assert numbers(chosen(SEVEN)) == (4, 1, 2, "0")
    assert chosen(SEVEN, "parallel=auto").parallel.make_vocab_size_divisible_by == 4


@pytest.mark.parametrize("engine", ["mindspeed", "transformers"])
def test_one_layer_less_would_not_fit(engine: str) -> None:
    given = [f"train.engine={engine}", "train.device_memory=60", *DATA]
    recompute = chosen(FAST, *given).train.recompute
    full = [*given, "train.recompute.granularity=full", f"train.recompute.activation={recompute.activation}"]
    layers = (recompute.num_layers, recompute.num_layers - 1)
    more, fewer = (load_recipe(FAST, [*full, f"train.recompute.num_layers={n}"]) for n in layers)
    assert [memory_of(recipe).verdict(60) for recipe in (more, fewer)] == ["yes", "tight"]


def test_nothing_but_the_recipe_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    before = chosen(FAST)
    monkeypatch.setenv("HCCL_BUFFSIZE", "4000")
    assert chosen(FAST) == before
    monkeypatch.setenv("HCCL_BUFFSIZE", "much")
    assert chosen(FAST) == before


def test_what_is_said() -> None:
    said = chosen(FAST).chosen
    assert said.startswith("auto, for devices of 64 GiB: DP 8, CP 1, TP 1, PP 1, recompute 3 + act.: 56.1 GiB; next DP")
    assert said.endswith(", recompute 0: 9.5% more work")
    least = chosen(FAST, "train.device_memory=2")
    assert least.chosen.endswith("; nothing fits, this takes the least memory")
    assert least.train.recompute.num_layers > 0


def test_bytes_of_ulysses_and_of_tensor_parallel_layers() -> None:
    """Of the published recipe, by hand: 32 micro batches, 26 layers, heads of 128 in bf16."""
    recipe = load_recipe(ROOT / "recipes/openpangu-1b.yaml")
    head = 32768 // 2 * 128 * 2
    passes = 32 * 26 * 3  # forward, again, backward
    for published, heads in ((True, 4 * 12), (False, 2 * 12 + 2 * 6)):  # query, key, value and result; a half stays
        sent = passes * heads * head // 2
        assert bytes_sent(recipe, published) == (sent, sent)
    tensor = load_recipe(ROOT / "recipes/openpangu-1b.yaml", ["parallel.context=1", "parallel.tensor=2"])
    part = 32768 * 1536 * 2 // 2  # of the sequence, of one of two ranks
    assert bytes_sent(tensor) == (32 * 26 * (4 + 4 + 6) * part,) * 2
    four = load_recipe(ROOT / "recipes/openpangu-1b.yaml", ["parallel.context=4"])
    everywhere, to_each = bytes_sent(four)
    assert everywhere == 3 * to_each
    assert bytes_sent(load_recipe(ROOT / "recipes/openpangu-1b.yaml", ["parallel.context=1"])) == (0, 0)


def test_a_run_records_the_numbers_and_that_they_were_chosen(tmp_path: Path) -> None:
    recipe = chosen(FAST, f"paths.run={tmp_path}")
    record_start(recipe, Manifest("run"), 0, ["sft"])
    text = (tmp_path / RECIPE).read_text("utf-8")
    assert f"# {recipe.chosen}\n" in text
    again = load_recipe(tmp_path / RECIPE)
    assert again.model_dump() == recipe.model_dump()
    assert again.train.recompute.num_layers == 3


def test_sizes_that_are_not_known_yet_are_no_obstacle(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    text = FAST.read_text("utf-8")
    begin, end = text.index("model: "), text.index("tokenizer:")
    (tmp_path / "own.yaml").write_text(text[:begin] + text[end:], "utf-8")
    place = f"paths.cache={tmp_path}"
    recipe = load_recipe(tmp_path / "own.yaml", [place], choose)
    assert recipe.data.seq_length == 32768
    # A job without them would have other numbers than convert.
    for command in (["plan"], ["convert"], ["kubernetes", "--claim", "x"]):
        done = run(*command, "--recipe", str(tmp_path / "own.yaml"), *sets(place))
        assert (done.returncode, done.stdout) == (1, "")
        assert "the recipe leaves out sizes of the model" in done.stderr


def test_a_recipe_that_auto_has_no_split_for() -> None:
    """Sixteen devices and one pack: only stages of unequal length are left."""
    sizes = ("nodes=2", "pipeline=4", "num_layer_list=[7,7,6,6]", "tensor=2", "context=2")
    given = [*(f"parallel.{size}" for size in sizes), "train.global_batch_size=1"]
    recipe = load_recipe(ROOT / "recipes/openpangu-1b.yaml", given)
    assert all_splits(recipe) == []
    done = run("plan", *sets(*given), "--memory", "2")
    assert done.returncode == 0
    assert "to fit: take more devices" in done.stdout
    assert "auto, on devices of 2 GiB: no other split is valid" in done.stdout


@pytest.mark.parametrize(("command", "code"), [(["convert"], 1), (["sft", "--dry-run"], 0)], ids=["convert", "sft"])
def test_stages_that_depend_on_it_say_it(tmp_path: Path, command: list[str], code: int) -> None:
    done = run(*command, "--recipe", str(FAST), *sets(f"paths.cache={tmp_path}"))
    assert done.returncode == code  # convert finds no checkpoint
    assert done.stderr.startswith("auto, for devices of 64 GiB: DP 8, CP 1, TP 1, PP 1, recompute 3 + act.")
    assert "auto" not in done.stdout
    assert ("--recompute-num-layers 3" in done.stdout) == (code == 0)
