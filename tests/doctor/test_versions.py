"""Order of versions; which driver, firmware and CANN go together; and which NPUs CANN shows to a process."""

from __future__ import annotations

import pytest

from doctor_machines import recorded
from openpangu_sft.doctor import ascend
from openpangu_sft.doctor.ascend import in_series, is_older
from openpangu_sft.doctor.machine import State
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
        ("driver_24.1.rc2.2.info", "", State.WARNING, "24.1.rc2.2, older than the one that Huawei pairs"),
        ("driver_25.3.rc1.info", "", State.OK, "names V100R001C19"),
        ("", "25.3.rc1", State.WARNING, "25.3.rc1, newer than the one that Huawei pairs with CANN 8.0.RC3"),
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
    assert (finding.state, "newer than the one" in finding.found) == (State.WARNING, True)


def test_the_recorded_cann_is_of_the_series_that_its_driver_names() -> None:
    assert CANN["version"] == ascend.CANN
    assert CANN["innerversion"].startswith(ascend.CANN_SERIES)
    assert ascend.CANN_SERIES in ascend_files.parse_info(recorded("driver_24.1.rc3.info"))["compatible_version"]


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
