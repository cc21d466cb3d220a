"""Order of versions; which driver, firmware and CANN go together; and which NPUs CANN shows to a process."""

from __future__ import annotations

from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doctor_machines import recorded
from openpangu_sft.doctor import ascend
from openpangu_sft.doctor.ascend import in_series, version_key
from openpangu_sft.doctor.finding import State
from openpangu_sft.util import ascend as ascend_files
from openpangu_sft.util.ascend import VARIABLE, visible

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


@given(
    st.lists(st.from_regex(r"[0-9]{1,2}(\.(rc|alpha|post)?[0-9]{1,3}){0,4}", fullmatch=True), min_size=2, max_size=5)
)
def test_a_patch_is_newer_than_what_it_patches(versions: list[str]) -> None:
    for version in versions:
        assert version_key(version) < version_key(f"{version}.1")
        assert version_key(f"{version}.rc1") < version_key(version)


CANN = ascend_files.parse_info(recorded("cann_8.0.RC3.info"))


@pytest.mark.parametrize(
    ("file", "seen", "state", "said"),
    [
        ("driver_24.1.rc3.info", "", State.OK, "24.1.rc3"),
        ("", "24.1.rc3.7", State.OK, "24.1.rc3.7"),
        ("", "23.0.7", State.WARNING, "23.0.7, older; the files here do not say"),
        ("driver_24.1.rc2.2.info", "", State.WARNING, "CANN's own file takes it"),
        ("driver_25.3.rc1.info", "", State.OK, "names V100R001C19"),
        ("", "25.3.rc1", State.WARNING, "does not say whether"),
        ("", "", State.WARNING, "not known"),
    ],
)
def test_drivers(file: str, seen: str, state: State, said: str) -> None:
    finding = ascend.judge_driver(ascend_files.parse_info(recorded(file) if file else None), CANN, seen)
    assert finding.state == state
    assert said in finding.found
    assert bool(finding.remedy) == (state != State.OK)


def test_a_driver_that_has_stopped_to_serve_this_cann() -> None:
    info = ascend_files.parse_info(recorded("driver_25.3.rc1.info").replace("[V100R001C19],", ""))
    finding = ascend.judge_driver(info, CANN)
    assert (finding.state, "does not say that" in finding.found) == (State.WARNING, True)


def test_the_recorded_cann_is_of_the_series_that_its_driver_names() -> None:
    assert CANN["version"] == ascend.CANN
    assert CANN["innerversion"].startswith(ascend.CANN_SERIES)
    assert ascend.serves(ascend_files.parse_info(recorded("driver_24.1.rc3.info"))) is True


@pytest.mark.parametrize(
    ("inner", "listed", "taken"),
    [
        ("V100R001C18SPC001B233", CANN["compatible_version"], True),
        ("V100R001C13", CANN["compatible_version"], True),
        ("V100R001C12SPC001B233", CANN["compatible_version"], False),
        ("V100R001C23SPC002B212", CANN["compatible_version"], False),
        ("V100R001C30SPC001B001", CANN["compatible_version"], True),
        ("V100R003C18SPC001B001", CANN["compatible_version"], False),
        ("", CANN["compatible_version"], None),
        ("C18", CANN["compatible_version"], None),
        ("V100R001C18SPC001B233", "", None),
    ],
)
def test_drivers_that_cann_takes(inner: str, listed: str, taken: Optional[bool]) -> None:
    assert ascend.takes({"compatible_version": listed}, {"innerversion": inner}) is taken


def test_an_older_driver_that_neither_file_pairs_with_this_cann() -> None:
    older = ascend_files.parse_info(recorded("driver_24.1.rc2.2.info").replace("V100R001C18SPC", "V100R001C12SPC"))
    assert ascend.judge_driver(older, CANN).state == State.FAILED
    assert ascend.judge_driver(older, {}).state == State.WARNING  # one file says nothing
    older["compatible_version"] += ",[V100R001C19]"
    assert ascend.judge_driver(older, CANN).state == State.WARNING
    del older["compatible_version"]
    assert ascend.judge_driver(older, CANN).state == State.WARNING


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("1", [1]),
        ("0,1,2", [0, 1, 2]),
        ("0,1,5,7", [0, 1]),
        ("1,,", [1]),
        ("1, 2", [1]),
        ("1*", [1]),
        ("0,1$0,", [0, 1]),
        ("0#1,", [0]),
        ("1,-1", [1]),
        *((text, []) for text in ("", ",0", " 1", "-1,3", "10", "1234567891012345678910", "0,1,1", "1,0,1", "2,1")),
    ],
)
def test_npus_that_cann_shows(text: str, places: list[int]) -> None:
    """Of three. All but the last and those with a space are in the tests of CANN's own runtime, with these counts."""
    assert visible({VARIABLE: text}, 3) == places
    assert visible({}, 3) == [0, 1, 2]


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
