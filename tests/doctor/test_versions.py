"""Order of versions; which driver, firmware and CANN go together; and which NPUs CANN shows to a process."""

from __future__ import annotations

from typing import Optional

import pytest

from doctor_machines import recorded
from openpangu_sft.doctor import ascend
from openpangu_sft.doctor.ascend import in_series, is_older
from openpangu_sft.doctor.finding import State
from openpangu_sft.util import ascend as ascend_files
from openpangu_sft.util.ascend import VARIABLE, visible

OLDER = ("23.0.7", "24.1.rc1", "24.1.rc2", "24.1.rc2.2", "24.1.rc3.alpha001", "24.1.RC3.beta1", "unheard of")
NEWER = ("24.1.rc12", "24.1.0", "24.1.0.3", "24.1.1", "25.0.rc1", "25.0.rc1.1", "25.2.0", "25.3.rc1", "26.0.rc2")


@pytest.mark.parametrize("version", [*OLDER, *NEWER])
def test_versions_outside_of_a_series(version: str) -> None:
    assert not in_series(version, "24.1.RC3")
    assert is_older(version, "24.1.RC3") == (version in OLDER)


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


CANN = ascend_files.parse_info(recorded("cann_8.0.RC3.info"))


@pytest.mark.parametrize(
    ("file", "seen", "state", "said"),
    [
        ("driver_24.1.rc3.info", "", State.OK, "24.1.rc3"),
        ("", "24.1.rc3.7", State.OK, "24.1.rc3.7"),
        ("", "23.0.7", State.WARNING, "23.0.7, older than the one that Huawei pairs with CANN 8.0.RC3"),
        ("driver_24.1.rc2.2.info", "", State.WARNING, "CANN's own file takes it"),
        ("driver_25.3.rc1.info", "", State.OK, "names V100R001C19"),
        ("", "25.3.rc1", State.WARNING, "25.3.rc1, newer than the one that Huawei pairs with CANN 8.0.RC3"),
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
    assert (finding.state, "newer than the one" in finding.found) == (State.WARNING, True)


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
