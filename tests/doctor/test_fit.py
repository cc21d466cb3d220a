"""Doctor: whether the recipe fits the NPUs of a recording."""

from __future__ import annotations

import pytest

from conftest import ROOT
from doctor_machines import FakeMachine, MakeContext, context, fake
from openpangu_sft.doctor.machine import Context, Machine, State
from openpangu_sft.doctor.npus import npu_memory
from openpangu_sft.plan.choose import choose
from openpangu_sft.recipe.load import load_recipe

__all__ = ["context", "fake"]


def published(fake: FakeMachine, *overrides: str) -> Context:
    recipe = load_recipe(ROOT / "recipes/openpangu-1b.yaml", overrides)
    return Context(recipe, Machine(fake.root, fake.environment))


def test_the_published_recipe_fits_npus_of_64_gb(fake: FakeMachine) -> None:
    fake.add_npus("healthy.txt")
    finding = npu_memory(published(fake))
    assert finding.state == State.OK
    assert finding.found.startswith("64 GiB; ")


def test_it_does_not_fit_npus_of_32_gb_and_what_does_is_said(fake: FakeMachine) -> None:
    fake.add_npus("newer_driver.txt")
    no_recompute = published(fake, "train.recompute.granularity=none")
    finding = npu_memory(no_recompute)
    assert (finding.state, finding.found) == (State.WARNING, "32 GiB")
    advised = 'SET="train.device_memory=32 parallel=auto train.recompute=auto"'
    assert finding.remedy == f"{advised}, then make convert; see make plan"
    recipe = load_recipe(ROOT / "recipes/openpangu-1b.yaml", advised[5:-1].split(), choose)
    assert npu_memory(Context(recipe, no_recompute.machine)).state == State.OK


def test_what_fits_in_no_way_wants_more_devices(fake: FakeMachine) -> None:
    fake.add_npus("some_npus.txt", count=2)
    one = published(fake, "parallel.devices_per_node=1", "parallel.context=1", "model.num_layers=100")
    finding = npu_memory(one)
    assert finding.state == State.WARNING
    assert "more devices" in finding.remedy


@pytest.mark.parametrize("recording", ["no_driver.txt", "device_used.txt"])
def test_without_a_list_nothing_is_known(fake: FakeMachine, context: MakeContext, recording: str) -> None:
    fake.add_npus(recording)
    assert npu_memory(context()).state == State.SKIPPED
