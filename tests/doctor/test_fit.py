"""Doctor: whether the recipe fits the NPUs of a recording."""

from __future__ import annotations

import pytest

from conftest import ROOT
from doctor_machines import FakeMachine, MakeContext, context, fake
from openpangu_sft.doctor.finding import State
from openpangu_sft.doctor.machine import Context, Machine
from openpangu_sft.doctor.npus import npu_memory
from openpangu_sft.plan.estimate import memory_of
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
    finding = npu_memory(published(fake))
    assert (finding.state, finding.found) == (State.WARNING, "32 GiB")
    assert finding.remedy.startswith('SET="parallel.context=4";')
    changed = published(fake, "parallel.context=4")
    assert npu_memory(changed).state == State.OK
    assert memory_of(changed.recipe).verdict(32) == "yes"


def test_what_fits_in_no_way_wants_more_devices(fake: FakeMachine) -> None:
    fake.add_npus("some_npus.txt", count=2)
    one = published(fake, "parallel.devices_per_node=1", "parallel.context=1")
    finding = npu_memory(one)
    assert finding.state == State.WARNING
    assert "more devices" in finding.remedy


@pytest.mark.parametrize("recording", ["no_driver.txt", "device_used.txt"])
def test_without_a_list_nothing_is_known(fake: FakeMachine, context: MakeContext, recording: str) -> None:
    fake.add_npus(recording)
    assert npu_memory(context()).state == State.SKIPPED


def test_where_the_checkpoint_has_to_be_cut_otherwise_that_is_said(fake: FakeMachine) -> None:
    fake.add_npus("newer_driver.txt")
    odd = published(fake, "data.seq_length=32766")  # no multiple of 4, for more context parallel
    assert npu_memory(odd).remedy == 'SET="parallel.tensor=2", then make convert; see make plan'
