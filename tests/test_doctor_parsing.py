"""What doctor reads: npu-smi's tables, versions, files of the Ascend stack and the system. No machine is asked."""

from __future__ import annotations

from pathlib import PurePath
from typing import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doctor_machines import RECORDED, recorded
from openpangu_sft import ascend_files
from openpangu_sft.doctor import ascend, files, npu_smi
from openpangu_sft.doctor.finding import State
from openpangu_sft.doctor.npu_smi import Chip, Process, parse_fields, parse_info
from openpangu_sft.doctor.versions import in_series, version_key

IN_ORDER = [
    *("23.0.7", "24.1.rc1", "24.1.rc2", "24.1.rc2.2", "24.1.rc3.alpha001", "24.1.RC3", "24.1.rc3.1", "24.1.rc3.7"),
    *("24.1.rc12", "24.1.0", "24.1.0.3", "24.1.1", "25.0.rc1", "25.0.rc1.1", "25.2.0", "25.3.rc1", "26.0.rc2"),
]


def test_order_of_versions() -> None:
    shuffled = sorted(IN_ORDER, key=lambda version: version[::-1])
    assert shuffled != IN_ORDER
    assert sorted(shuffled, key=version_key) == IN_ORDER
    assert len({version_key(version) for version in IN_ORDER}) == len(IN_ORDER)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("8.0.RC3.alpha001", "8.0.RC3.alpha002"),
        ("8.0.RC3.alpha002", "8.0.RC3.beta1"),
        ("8.0.RC3.beta1", "8.0.RC3"),
        ("8.0.RC3", "8.0.0"),
        ("8.0.0", "8.1.RC1"),
        ("2.1.0", "2.1.0.post8"),
        ("2.1.0.post8", "2.1.0.post10"),
        ("7.1.0.11.220", "7.5.0.1.129"),
    ],
)
def test_order_of_other_versions(older: str, newer: str) -> None:
    assert version_key(older) < version_key(newer)


def test_case_does_not_count() -> None:
    assert version_key("24.1.RC3") == version_key("24.1.rc3")


@pytest.mark.parametrize(
    ("version", "series", "of_it"),
    [
        ("24.1.rc3", "24.1.RC3", True),
        ("24.1.rc3.7", "24.1.RC3", True),
        ("24.1.rc3.b999", "24.1.RC3", True),
        ("24.1.0", "24.1.RC3", False),
        ("24.1.rc2.2", "24.1.RC3", False),
        ("8.0.RC3.alpha001", "8.0.RC3", False),
        ("24.1.rc31", "24.1.RC3", False),
        ("", "24.1.RC3", False),
    ],
)
def test_series(version: str, series: str, of_it: bool) -> None:
    assert in_series(version, series) is of_it


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


def test_an_inference_card_has_another_table() -> None:
    (chip,) = parse_info(recorded("310p.txt")).chips
    assert chip == Chip(96, "310P3", "OK", None, 46, 0, "0000:04:00.0", 0, 1836, 21527)


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
    files.memory_available,
    files.limit,
    files.inactive_file,
    files.port_ranges,
    lambda text: in_series(text, "24.1.RC3"),
    lambda text: files.mount_of(PurePath("/a/b"), text),
    lambda text: ascend.judge_driver(ascend_files.parse_info(text), text),
    lambda text: ascend.judge_firmware(text, text, {"compatible_version_fw": text}),
    lambda text: ascend.judge_cann(text, "x"),
]


@pytest.mark.parametrize("parser", PARSERS)
@given(st.text() | st.text(alphabet="0123456789.-,[] =rcalpha²\n"))
def test_no_text_is_too_strange(parser: Callable[[str], object], text: str) -> None:
    parser(text)


@given(
    st.lists(st.from_regex(r"[0-9]{1,2}(\.(rc|alpha|post)?[0-9]{1,3}){0,4}", fullmatch=True), min_size=2, max_size=5)
)
def test_a_patch_is_newer_than_what_it_patches(versions: list[str]) -> None:
    for version in versions:
        assert version_key(version) < version_key(f"{version}.1")
        assert version_key(f"{version}.rc1") < version_key(version)


@pytest.mark.parametrize(
    ("file", "seen", "state", "said"),
    [
        ("driver_24.1.rc3.info", "", State.OK, "24.1.rc3"),
        ("", "24.1.rc3.7", State.OK, "24.1.rc3.7"),
        ("", "23.0.7", State.FAILED, "23.0.7, older"),
        ("", "24.1.rc2.2", State.FAILED, "older"),
        ("driver_25.3.rc1.info", "", State.OK, "names V100R001C19"),
        ("", "25.3.rc1", State.WARNING, "does not say whether"),
        ("", "", State.WARNING, "not known"),
    ],
)
def test_drivers(file: str, seen: str, state: State, said: str) -> None:
    finding = ascend.judge_driver(ascend_files.parse_info(recorded(file) if file else None), seen)
    assert finding.state == state
    assert said in finding.found
    assert bool(finding.remedy) == (state != State.OK)


def test_a_driver_that_has_stopped_to_serve_this_cann() -> None:
    info = ascend_files.parse_info(recorded("driver_25.3.rc1.info").replace("[V100R001C19],", ""))
    finding = ascend.judge_driver(info)
    assert (finding.state, "does not say that" in finding.found) == (State.WARNING, True)


def test_the_recorded_cann_is_of_the_series_that_its_driver_names() -> None:
    cann = ascend_files.parse_info(recorded("cann_8.0.RC3.info"))
    assert cann["version"] == ascend.CANN
    assert cann["innerversion"].startswith(ascend.CANN_SERIES)
    assert ascend.serves(ascend_files.parse_info(recorded("driver_24.1.rc3.info"))) is True


@pytest.mark.parametrize(
    ("version", "compatibility", "state"),
    [
        ("7.5.0.1.129", "OK", State.OK),
        ("7.5.0.1.129", "", State.OK),
        ("7.5.0.1.129", "NOK", State.FAILED),
        ("7.1.0.7.220", "OK", State.WARNING),
        ("7.7.0.1.231", "UNKNOWN", State.FAILED),  # above the range of driver 24.1.rc3
        ("6.4.12.1.241", "NOT SUPPORT", State.FAILED),
        ("", "", State.WARNING),
        ("NA", "NA", State.WARNING),
    ],
)
def test_firmware(version: str, compatibility: str, state: State) -> None:
    driver = ascend_files.parse_info(recorded("driver_24.1.rc3.info"))
    assert ascend.judge_firmware(version, compatibility, driver).state == state


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("8.0.RC3", State.OK),
        ("8.0.RC3.20", State.OK),
        ("8.0.RC3.alpha001", State.FAILED),
        ("7.0.0", State.FAILED),
        ("8.0.0", State.WARNING),
        ("8.5.0", State.WARNING),
        ("", State.WARNING),
    ],
)
def test_cann(version: str, state: State) -> None:
    assert ascend.judge_cann(version, "the image").state == state


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
    assert files.mount_of(PurePath(path), MOUNTS) == files.Mount(point, kind)


def test_ports() -> None:
    assert files.port_ranges("32768\t60999\n") == [range(32768, 61000)]
    assert files.port_ranges("60000-60015,61000\n") == [range(60000, 60016), range(61000, 61001)]
    assert files.port_ranges("\n") == []


def test_memory() -> None:
    assert files.memory_available("MemTotal:  10 kB\nMemAvailable:     2048 kB\n") == 2 << 20
    assert files.memory_available("MemTotal:  10 kB\n") is None
    assert files.limit("max\n") is None
    assert files.limit("9223372036854771712\n") is None  # v1 has no other word for it
    assert files.limit("4096\n") == 4096
