"""The directory of a run, and what a machine must have, without training."""

from __future__ import annotations

import re
import struct
import threading
import zipfile
from pathlib import Path
from typing import Optional

import pytest

from conftest import MakeRecipe, SmallDisk
from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.checkpoint.mcore import iteration_directory, rank_file
from openpangu_sft.recipe.model_config import TRACKER
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.training.mindspeed import start
from openpangu_sft.training.mindspeed.start import environment_of, require_devices, require_network
from openpangu_sft.training.run.launch import torchrun_options
from openpangu_sft.training.run.retention import iterations, prune
from refusals import refusal_of


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    devices = ["parallel.devices_per_node=4", "parallel.tensor=2", "parallel.pipeline=2"]
    return make_recipe("train.engine=mindspeed", "train.device=auto", "train.global_batch_size=2", *devices)


def checkpoint(recipe: Recipe, iteration: int, without: str = "") -> None:
    """The files that upstream leaves."""
    for pp in range(2):
        for tp in range(2):
            file = iteration_directory(recipe.path("run"), iteration) / rank_file(tp, pp, 2)
            file.parent.mkdir(parents=True)
            for path in (file, file.with_name("distrib_optim.pt")):
                if f"{path.parent.name}/{path.name}" != without:
                    with zipfile.ZipFile(path, "w") as archive:
                        archive.writestr("model/data.pkl", bytes(500))


def tracker(recipe: Recipe) -> Path:
    return recipe.path("run") / TRACKER


def test_nothing_to_go_on_from(recipe: Recipe) -> None:
    assert start.newest_complete(recipe, True) is None


def test_the_newest_that_is_whole(recipe: Recipe) -> None:
    for iteration in (5, 10):
        checkpoint(recipe, iteration)
    tracker(recipe).write_text("10")
    checkpoint(recipe, 15)  # not finished: the tracker file does not name it
    assert start.newest_complete(recipe, True) == 10


def test_without_the_tracker_file_the_newest_that_is_whole(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    for iteration in (5, 10):
        checkpoint(recipe, iteration)
    checkpoint(recipe, 15, without="mp_rank_00_001/model_optim_rng.pt")
    assert start.newest_complete(recipe, False) == 10
    assert not tracker(recipe).exists()
    assert start.newest_complete(recipe, True) == 10
    assert f"there is no {TRACKER}" in capsys.readouterr().err
    assert tracker(recipe).read_text() == "10"


SPANS_DISKS = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 2) + b"PK\x05\x06" + bytes(18)
"""The end of a zip archive of two disks, which zipfile refuses with an exception."""


@pytest.mark.parametrize("harm", ["cut off", "of two disks"])
def test_a_file_that_is_damaged_is_not_whole(recipe: Recipe, harm: str) -> None:
    for iteration in (5, 10):
        checkpoint(recipe, iteration)
    tracker(recipe).write_text("10")
    file = next(iteration_directory(recipe.path("run"), 10).rglob("distrib_optim.pt"))
    file.write_bytes(file.read_bytes()[:-100] if harm == "cut off" else SPANS_DISKS)
    assert start.newest_complete(recipe, True) == 5


def test_a_first_checkpoint_that_is_cut_off_is_made_again(recipe: Recipe) -> None:
    checkpoint(recipe, 5, without="mp_rank_00_001/model_optim_rng.pt")
    assert start.newest_complete(recipe, True) is None


@pytest.mark.parametrize("named", ["10", None])
def test_checkpoints_none_of_which_is_whole_are_not_written_over(recipe: Recipe, named: Optional[str]) -> None:
    for iteration in (5, 10):
        checkpoint(recipe, iteration, without="mp_rank_00_001/model_optim_rng.pt")
    if named:
        tracker(recipe).write_text(named)
    assert "no checkpoint here is complete" in refusal_of(start.newest_complete, recipe, True)


def test_a_tracker_file_that_names_no_number(recipe: Recipe) -> None:
    checkpoint(recipe, 5)
    tracker(recipe).write_text("five")
    assert "not a number" in refusal_of(start.newest_complete, recipe, True)


@pytest.mark.parametrize("missing", ["mp_rank_00_001/model_optim_rng.pt", "mp_rank_01_000/distrib_optim.pt"])
def test_an_earlier_one_where_the_newest_is_not_whole(
    recipe: Recipe, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(recipe, 5)
    checkpoint(recipe, 10, without=missing)
    tracker(recipe).write_text("10")
    assert start.newest_complete(recipe, True) == 5
    assert "iteration 10 is not complete" in capsys.readouterr().err
    assert tracker(recipe).read_text() == "5"  # upstream reads it


def test_only_the_newest_ones_are_kept(recipe: Recipe) -> None:
    run = recipe.path("run")
    for iteration in (5, 10, 15, 20):
        checkpoint(recipe, iteration)
    prune(run, None, 15)
    assert iterations(run) == [5, 10, 15, 20]
    prune(run, 2, 15)
    assert iterations(run) == [10, 15, 20]  # 20 is being written
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_data_of_another_content_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    dataset, run = tmp_path / "dataset", tmp_path / "run"
    dataset.mkdir()
    run.mkdir()
    for field in ("input_ids", "labels", "attention_mask"):
        (dataset / f"data_packed_{field}_document.bin").touch()
    prefix = start.link_data(run, dataset, "a" * 64)
    assert len(list(prefix.parent.iterdir())) == 3
    index = prefix.parent / "data_train_indexmap_48ns_1234s_decoder_packed_shuffle_idx.npy"
    index.touch()
    assert start.link_data(run, dataset, "a" * 64) == prefix
    assert index.exists()
    other = start.link_data(run, dataset, "b" * 64)
    assert other != prefix
    assert not prefix.parent.exists()
    assert list(dataset.glob("*indexmap*")) == []


def test_too_few_npus(recipe: Recipe, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"davinci{number}").touch()
    (tmp_path / "davinci_manager").touch()
    assert "devices_per_node is 4, and there are 3 NPUs here" in refusal_of(require_devices, recipe, tmp_path)
    (tmp_path / "davinci7").touch()
    require_devices(recipe, tmp_path)


def test_npus_that_are_hidden(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        (tmp_path / f"davinci{number}").touch()
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "2,3,4,5")
    require_devices(recipe, tmp_path)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5,6,7")
    assert "devices_per_node is 4, and '4,5,6,7' leaves 2 of 6 NPUs" in refusal_of(require_devices, recipe, tmp_path)


def test_no_room_for_checkpoints_is_said_before_the_start(
    make_recipe: MakeRecipe, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(1000)
    recipe = make_recipe("train.engine=mindspeed", f"paths.run={disk}/run")
    monkeypatch.setattr(start, "require_ready", lambda sources: sources)
    monkeypatch.setattr(start, "read_manifest", lambda *arguments: Manifest("dataset"))
    message = refusal_of(start.run_mindspeed, recipe, Manifest("run"), [])
    assert re.search(r"needs [\d.]+ MB, 1\.0 MB are free on this disk", message)
    assert list((disk / "run").iterdir()) == []


def test_the_stand_in_is_on_the_path_only_where_it_is_asked_for(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for device, wanted in (("cpu", True), ("auto", False)):
        recipe = make_recipe("train.engine=mindspeed", f"train.device={device}")
        _, environment = environment_of(recipe, tmp_path)
        assert ("npu_standin" in environment["PYTHONPATH"]) == wanted


def test_several_machines_meet_where_they_are_told(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe("train.engine=mindspeed", "parallel.nodes=2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "MASTER_ADDR is not set" in refusal_of(torchrun_options, recipe)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("NODE_RANK", "1")
    options = torchrun_options(recipe)
    assert {"--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=6000"} <= set(options)


def test_one_machine_meets_at_loopback(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own name, which torchrun and gloo take otherwise, may be known to no resolver: they wait for ever."""
    recipe = make_recipe("train.engine=mindspeed")
    assert {"--rdzv_endpoint=127.0.0.1:0", "--local_addr=127.0.0.1"} <= set(torchrun_options(recipe))
    for given, wanted in (None, "lo"), ("eth0", "eth0"):
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        if given:
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", given)
        assert environment_of(recipe, tmp_path)[1]["GLOO_SOCKET_IFNAME"] == wanted
    several = make_recipe("train.engine=mindspeed", "parallel.nodes=2")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert "GLOO_SOCKET_IFNAME" not in environment_of(several, tmp_path)[1]


@pytest.fixture
def interfaces(tmp_path: Path) -> Path:
    for name in ("lo", "eth0", "eth10"):
        (tmp_path / name).mkdir()
    (tmp_path / "bonding_masters").touch()  # of the bonding driver, and no interface
    return tmp_path


@pytest.mark.parametrize(
    "value",
    ["eth0", "eth", "l", "=eth0", "=ib0,eth0", "ib0,eth1", "^docker", "^eth", "^eth,docker", "^=lo", "^=eth,lo", ""],
)
def test_interfaces_that_hccl_takes(interfaces: Path, value: str) -> None:
    require_network({"HCCL_SOCKET_IFNAME": value}, interfaces)


@pytest.mark.parametrize(
    "value", ["enp3", "eth00", "=eth", "=l", "=eth1,ib0", "^eth,lo", "^=eth0,eth10,lo", "bond", "="]
)
def test_no_interface_for_hccl(interfaces: Path, value: str) -> None:
    said = refusal_of(require_network, {"HCCL_SOCKET_IFNAME": value}, interfaces)
    assert said == f"HCCL_SOCKET_IFNAME: '{value}' is no network interface here -> one of eth0, eth10, lo"


@pytest.mark.parametrize("value", ["eth0", "eth10,lo", "lo,", ""])
def test_interfaces_that_gloo_takes(interfaces: Path, value: str) -> None:
    require_network({"GLOO_SOCKET_IFNAME": value}, interfaces)


@pytest.mark.parametrize(
    ("value", "wrong"),
    [("l", "l"), ("eth", "eth"), ("=lo", "=lo"), ("^lo", "^lo"), ("lo,nope", "nope"), ("lo,,lo", "")],
)
def test_no_interface_for_gloo(interfaces: Path, value: str, wrong: str) -> None:
    said = refusal_of(require_network, {"HCCL_SOCKET_IFNAME": "eth", "GLOO_SOCKET_IFNAME": value}, interfaces)
    assert said == f"GLOO_SOCKET_IFNAME: '{wrong}' is no network interface here -> one of eth0, eth10, lo"


def test_gloo_wants_every_name_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, of which the rule was taken."""
    from torch import distributed

    def taken(value: str) -> bool:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", value)
        try:
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        except RuntimeError:
            return False
        distributed.destroy_process_group()
        return True

    values = ["lo", "lo,", "loo", "=lo", "^eth", "lo,nope", "lo,,lo"]
    assert [taken(value) for value in values] == [True, True, False, False, False, False, False]


def test_machines_must_share_the_run(tmp_path: Path) -> None:
    said = refusal_of(start.require_shared, tmp_path, seconds=0.2)
    assert said.startswith(f"{tmp_path}: the first node has written nothing here for 0 s -> start it too")
    threading.Timer(0.3, (tmp_path / "manifest.json").touch).start()
    start.require_shared(tmp_path, seconds=30)
