"""train.lora: which adapters a recipe asks for, and one line for those that cannot be."""

from __future__ import annotations

import pytest

from conftest import ROOT
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.lora import LINEARS, Adapter
from refusals import refusal_of

OPENPANGU = ROOT / "recipes/openpangu-1b.yaml"
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora(**given: object) -> list[str]:
    return [f"train.lora.{key}={value}" for key, value in given.items()]


def test_without_a_rank_all_parameters_are_trained() -> None:
    assert load_recipe(OPENPANGU).train.lora.adapter is None
    assert load_recipe(OPENPANGU, lora(alpha=16, targets="[o_proj]")).train.lora.adapter is None


@pytest.mark.parametrize("name", ["openpangu-1b-lora", "openpangu-7b-lora"])
def test_adapters_of_the_recipes(name: str) -> None:
    recipe = load_recipe(ROOT / f"recipes/{name}.yaml", ["parallel.tensor=1", "parallel.context=1"], _first)
    assert recipe.train.lora.adapter == Adapter(32, 32, ALL)
    full = load_recipe(ROOT / f"recipes/{name.replace('-lora', '')}.yaml", choose=_first)
    assert recipe.model == full.model
    assert recipe.train.lr == pytest.approx(10 * full.train.lr)
    for path in ("hf", "dataset"):
        assert recipe.path(path) == full.path(path)
    for path in ("mcore", "run", "export"):
        assert recipe.path(path) != full.path(path)


def test_equal_adapters_are_recorded_alike() -> None:
    given = ("[all-linear]", f"[{','.join(reversed(ALL))}]")
    dumps = [load_recipe(OPENPANGU, lora(rank=8, targets=targets)).train.lora.model_dump() for targets in given]
    assert dumps == [{"rank": 8, "alpha": 32, "targets": [*ALL]}] * 2
    assert load_recipe(OPENPANGU, lora(alpha=16)).train.lora.model_dump() == {"rank": 0}


def test_targets_are_sorted_as_the_layer_has_them() -> None:
    given = lora(rank=8, alpha=16, targets="[down_proj,v_proj,k_proj,q_proj]")
    adapter = load_recipe(OPENPANGU, given).train.lora.adapter
    assert adapter == Adapter(8, 16, ("q_proj", "k_proj", "v_proj", "down_proj"))
    assert adapter.linears == ["linear_qkv", "linear_fc2"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lora(rank=-1), "train.lora.rank = -1: Input should be greater than or equal to 0 -> see docs/recipe.md"),
        (lora(alpha=0), "train.lora.alpha = 0: Input should be greater than 0 -> see docs/recipe.md"),
        (lora(targets="[q]"), "train.lora.targets.0 = 'q': Input should be 'all-linear', 'q_proj', 'k_proj', "),
        (lora(targets="[]"), "train.lora.targets = []: List should have at least 1 item"),
        (lora(targets="all"), "train.lora.targets = 'all': Input should be a valid list"),
        (lora(dropout=0.1), "unknown key train.lora.dropout -> known here: alpha, rank, targets"),
        (["lora_rank=8"], "unknown key lora_rank -> did you mean train.lora.rank?"),
        (["lora_target=all"], "unknown key lora_target -> did you mean train.lora.targets?"),
        (lora(rank=1537), "train.lora.rank 1537 is above model.hidden_size 1536 -> lower train.lora.rank"),
        (
            lora(rank=769),
            "train.lora.rank 769 is above model.num_query_groups x model.kv_channels 768 -> lower train.lora.rank",
        ),
        (
            [*lora(rank=257, targets="[down_proj]"), "model.ffn_hidden_size=256"],
            "train.lora.rank 257 is above model.ffn_hidden_size 256 -> lower train.lora.rank",
        ),
    ],
)
def test_refusals(given: list[str], message: str) -> None:
    assert message in refusal_of(load_recipe, OPENPANGU, given)


def test_ranks_that_fit() -> None:
    assert load_recipe(OPENPANGU, lora(rank=768)).train.lora.rank == 768
    assert load_recipe(OPENPANGU, lora(rank=1536, targets="[o_proj,down_proj]")).train.lora.rank == 1536


@pytest.mark.parametrize("names", [names for names in LINEARS.values() if len(names) > 1])
def test_a_part_of_a_matrix_is_refused(names: tuple[str, ...]) -> None:
    for left in range(len(names)):
        targets = ",".join([*names[:left], *names[left + 1 :]])
        refusal = refusal_of(load_recipe, OPENPANGU, lora(rank=8, targets=f"[o_proj,{targets}]"))
        assert f"train.lora.targets has only a part of {', '.join(names)}, which are one matrix" in refusal


def _first(found: list, recompute: bool) -> object:  # type: ignore[type-arg]
    return found[0]
