"""What doctor reads: npu-smi's tables, and versions. No machine is asked."""

from __future__ import annotations

from typing import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doctor_machines import RECORDED, recorded
from openpangu_sft.doctor import ascend, resources
from openpangu_sft.doctor.ascend import in_series, is_older
from openpangu_sft.doctor.npu_smi import Chip, Process, parse_fields, parse_info
from openpangu_sft.util import ascend as ascend_files
from openpangu_sft.util.ascend import VARIABLE, visible


def test_a_healthy_machine() -> None:
    listing = parse_info(recorded("healthy.txt"))
    assert listing.driver == "24.1.rc3"
    assert [chip.npu for chip in listing.chips] == list(range(8))
    assert {(chip.name, chip.health, chip.chip) for chip in listing.chips} == {("910B1", "OK", 0)}
    assert listing.chips[7] == Chip(7, "910B1", "OK", 0, 3378, 65536)
    assert listing.processes == ()


def test_a_busy_machine() -> None:
    assert parse_info(recorded("busy.txt")).processes == (
        Process(0, 919717, "python", 3969),
        Process(1, 920633, "python", 3969),
    )


def test_a_faulty_card() -> None:
    health = [chip.health for chip in parse_info(recorded("faulty.txt")).chips]
    assert health == ["OK"] * 5 + ["Alarm"] + ["OK"] * 2


def test_a_chip_without_its_second_row_or_its_values() -> None:
    lines = recorded("healthy.txt").splitlines()
    (row,) = [number for number, line in enumerate(lines) if line.startswith("| 5     910B1")]
    lines[row] = lines[row].replace("OK     ", "UNKNOWN").replace("97.1        47 ", "NA          NA ")
    del lines[row + 1]
    chips = parse_info("\n".join(lines)).chips
    assert [chip.npu for chip in chips] == list(range(8))
    assert chips[5] == Chip(5, "910B1", "UNKNOWN")


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
    assert chip == Chip(96, "310P3", "OK", 0, 1836, 21527, 0)


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
    listing = parse_info(text)
    assert listing.chips == ()
    assert said in listing.problem
    assert remedy in listing.remedy


TABLES = "\n".join(recorded(file.name) for file in sorted(RECORDED.glob("*.txt")))
CELL = st.sampled_from(sorted({cell for line in TABLES.splitlines() for cell in line.split("|")})) | st.text(max_size=9)
ROW = st.lists(CELL, max_size=6).map(lambda cells: "|" + "|".join(cells) + "|")
ANY_TEXT = st.text() | st.lists(ROW | st.sampled_from(TABLES.splitlines())).map("\n".join)


@given(ANY_TEXT)
def test_any_text_is_parsed_to_something(text: str) -> None:
    listing = parse_info(text)
    assert all(isinstance(chip.npu, int) and chip.name for chip in listing.chips)
    assert bool(listing.chips) != bool(listing.problem)
    parse_fields(text)


PARSERS: list[Callable[[str], object]] = [
    resources.limit,
    resources.inactive_file,
    lambda text: in_series(text, "24.1.RC3"),
    lambda text: is_older(text, "24.1.RC3"),
    lambda text: ascend.judge_driver(ascend_files.parse_info(text), text),
    lambda text: ascend.judge_driver({"version": "25.0", "compatible_version": text}),
    lambda text: visible({VARIABLE: text}, 8),
    lambda text: ascend.judge_cann(text, "x"),
]


@pytest.mark.parametrize("parser", PARSERS)
@given(st.text() | st.text(alphabet="0123456789.-,[] =rcalpha²\n"))
def test_no_text_is_too_strange(parser: Callable[[str], object], text: str) -> None:
    parser(text)


def test_limits_of_control_groups() -> None:
    assert resources.limit("max\n") is None
    assert resources.limit("9223372036854771712\n") is None  # v1 has no other word for it
    assert resources.limit("4096\n") == 4096
