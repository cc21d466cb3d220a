"""What doctor reads: npu-smi's tables, and files of the system. No machine is asked."""

from __future__ import annotations

from pathlib import PurePath
from typing import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doctor_machines import RECORDED, recorded
from openpangu_sft.doctor import ascend, linux, npu_smi
from openpangu_sft.doctor.ascend import in_series, version_key
from openpangu_sft.doctor.npu_smi import Chip, Process, parse_fields, parse_info
from openpangu_sft.util import ascend as ascend_files
from openpangu_sft.util.ascend import VARIABLE, visible


def test_a_healthy_machine() -> None:
    listing = parse_info(recorded("healthy.txt"))
    assert listing.driver == "24.1.rc3"
    assert [chip.npu for chip in listing.chips] == list(range(8))
    assert {(chip.name, chip.health, chip.chip) for chip in listing.chips} == {("910B1", "OK", 0)}
    assert listing.chips[7] == Chip(7, "910B1", "OK", 96.4, 47, 0, "0000:42:00.0", 0, 3378, 65536)
    assert listing.processes == ()


def test_a_busy_machine() -> None:
    assert parse_info(recorded("busy.txt")).processes == (
        Process(0, 919717, "python", 3969),
        Process(1, 920633, "python", 3969),
    )


def test_a_faulty_card() -> None:
    health = [chip.health for chip in parse_info(recorded("faulty.txt")).chips]
    assert health == ["OK"] * 5 + ["Alarm"] + ["OK"] * 2


def test_other_drivers() -> None:
    assert parse_info(recorded("other_driver.txt")).driver == "23.0.7"
    newer = parse_info(recorded("newer_driver.txt"))
    assert (newer.driver, newer.chips[0].name, newer.chips[0].total) == ("25.3.rc1", "910B4", 32768)


def test_no_table_of_processes_is_not_no_process() -> None:
    listing = parse_info(recorded("busy_unseen.txt"))
    assert listing.processes is None
    assert listing.chips[4].used == 31859  # the number stands right before its slash


def test_several_processes_of_an_npu() -> None:
    listing = parse_info(recorded("some_npus.txt"))
    assert [chip.npu for chip in listing.chips] == [3, 6]
    assert [(process.npu, process.name) for process in listing.processes or ()] == [
        *((3, name) for name in ("python", "vllm", "python")),
        (6, "python"),
    ]


def test_cards_of_two_chips() -> None:
    chips = parse_info(recorded("a3.txt")).chips
    assert [(chip.npu, chip.chip) for chip in chips] == [(npu, chip) for npu in range(8) for chip in range(2)]
    assert (chips[0].power, chips[1].power) == (165.3, None)
    assert chips[15].bus == "0000:83:00.0"
    assert [chip.device for chip in chips] == list(range(16))


def test_the_chip_that_a_process_holds() -> None:
    idle = "| No running processes found in NPU 0 "
    busy = "| 0       1                 | 77            | python                   | 5                       |\n"
    assert parse_info(recorded("a3.txt").replace(idle, busy + idle)).processes == (Process(0, 77, "python", 5, 1),)


def test_numbers_of_device_files() -> None:
    assert [chip.device for chip in parse_info(recorded("some_npus.txt")).chips] == [3, 6]
    assert [chip.device for chip in parse_info(recorded("310p.txt")).chips] == [0]


def test_an_inference_card_has_another_table() -> None:
    (chip,) = parse_info(recorded("310p.txt")).chips
    assert chip == Chip(96, "310P3", "OK", None, 46, 0, "0000:04:00.0", 0, 1836, 21527, 0)


def test_a_process_without_a_name_as_containers_show_them() -> None:
    line = "| 0       0                 | 919717        | python                   | 3969                    |"
    text = recorded("busy.txt").replace(line, line.replace("python", "      "))
    assert (parse_info(text).processes or ())[0] == Process(0, 919717, "", 3969)


def test_what_npu_smi_says_of_a_board() -> None:
    fields = parse_fields(recorded("board.txt"))
    assert (fields["Firmware Version"], fields["Compatibility"]) == ("7.1.0.7.220", "OK")
    assert fields["PCIe Bus Info"] == "0000:61:00.0"


@pytest.mark.parametrize(
    ("text", "said", "remedy"),
    [
        (recorded("device_used.txt"), "because the device is used", "other container"),
        (recorded("no_driver.txt"), "ret is -8005", "dmesg"),
        ("npu-smi: error while loading shared libraries: libc_sec.so: cannot open\n", "libc_sec.so", "driver/lib64"),
        ("", "says nothing", "npu-smi info"),
    ],
    ids=["used", "no driver", "no library", "nothing"],
)
def test_why_npu_smi_lists_nothing(text: str, said: str, remedy: str) -> None:
    assert parse_info(text).chips == ()
    answer = npu_smi.reason(text)
    assert said in answer[0]
    assert remedy in answer[1]


TABLES = "\n".join(recorded(file.name) for file in sorted(RECORDED.glob("*.txt")))
CELL = st.sampled_from(sorted({cell for line in TABLES.splitlines() for cell in line.split("|")})) | st.text(max_size=9)
ROW = st.lists(CELL, max_size=6).map(lambda cells: "|" + "|".join(cells) + "|")
ANY_TEXT = st.text() | st.lists(ROW | st.sampled_from(TABLES.splitlines())).map("\n".join)


@given(ANY_TEXT)
def test_any_text_is_parsed_to_something(text: str) -> None:
    listing = parse_info(text)
    assert all(isinstance(chip.npu, int) and chip.name for chip in listing.chips)
    npu_smi.reason(text)
    parse_fields(text)


PARSERS: list[Callable[[str], object]] = [
    version_key,
    linux.memory_available,
    linux.limit,
    linux.inactive_file,
    linux.port_ranges,
    lambda text: in_series(text, "24.1.RC3"),
    lambda text: linux.mount_of(PurePath("/a/b"), text),
    lambda text: ascend.judge_driver(ascend_files.parse_info(text), ascend_files.parse_info(text), text),
    lambda text: ascend.takes({"compatible_version": text}, {"innerversion": "V100R001C18"}),
    lambda text: visible({VARIABLE: text}, 8),
    lambda text: ascend.judge_firmware(text, text, {"compatible_version_fw": text}),
    lambda text: ascend.judge_cann(text, "x"),
]


@pytest.mark.parametrize("parser", PARSERS)
@given(st.text() | st.text(alphabet="0123456789.-,[] =rcalpha²\n"))
def test_no_text_is_too_strange(parser: Callable[[str], object], text: str) -> None:
    parser(text)


MOUNTS = """\
27 1 254:0 / / rw,relatime - overlay overlay rw
24 27 0:6 / /dev rw,relatime - devtmpfs devtmpfs rw,size=12334460k
31 27 0:30 / /cache rw shared:1 master:2 - nfs4 server:/cache rw
32 27 0:31 / /my\\040disk rw - xfs /dev/vdb rw
33 31 0:32 / /cache/in rw - ext4 /dev/vdc rw
34 31 0:33 / /cache/in rw - tmpfs none rw
"""


@pytest.mark.parametrize(
    ("path", "point", "kind"),
    [
        ("/", "/", "overlay"),
        ("/cachet", "/", "overlay"),
        ("/cache", "/cache", "nfs4"),
        ("/cache/a/b", "/cache", "nfs4"),
        ("/my disk/x", "/my disk", "xfs"),
        ("/cache/in/x", "/cache/in", "tmpfs"),  # mounted over the one before
    ],
)
def test_mounts(path: str, point: str, kind: str) -> None:
    assert linux.mount_of(PurePath(path), MOUNTS) == linux.Mount(point, kind)


def test_ports() -> None:
    assert linux.port_ranges("32768\t60999\n") == [range(32768, 61000)]
    assert linux.port_ranges("60000-60015,61000\n") == [range(60000, 60016), range(61000, 61001)]
    assert linux.port_ranges("\n") == []


def test_memory() -> None:
    assert linux.memory_available("MemTotal:  10 kB\nMemAvailable:     2048 kB\n") == 2 << 20
    assert linux.memory_available("MemTotal:  10 kB\n") is None
    assert linux.limit("max\n") is None
    assert linux.limit("9223372036854771712\n") is None  # v1 has no other word for it
    assert linux.limit("4096\n") == 4096
