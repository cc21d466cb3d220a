"""THIRD_PARTY_NOTICES.md lists the upstream sources and every package of the images, as in the locks and packages."""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from openpangu_sft.training.mindspeed.sources import PATCHES, PINS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "THIRD_PARTY_NOTICES.md").read_text("utf-8")
ROWS = {
    found[0]: found[1:] for found in re.findall(r"^\| (\S+) \| (\S+) \| ([a-z, ]+) \| (.+) \|$", TEXT, re.MULTILINE)
}


def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("notices", ROOT / "scripts/notices.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


NOTICES = script()


@pytest.mark.parametrize("target", ["npu", "cpu"])
def test_every_package_of_an_image_is_listed(target: str) -> None:
    locked = NOTICES.locked(NOTICES.LOCKS[target])
    assert len(locked) > 40
    assert {name: version for name, (version, targets, _) in ROWS.items() if target in targets.split(", ")} == locked


def test_licences_are_what_the_packages_say() -> None:
    compared = 0
    for name, (version, _, licence) in ROWS.items():
        if list(metadata.distributions(name=name)) and metadata.version(name) == version:
            assert NOTICES.licence_of(name) == licence
            compared += 1
    assert compared > len(ROWS) / 2


def test_what_make_sources_fetches_is_listed() -> None:
    commits = re.findall(r'^commit = "(\w+)"', (PATCHES / PINS).read_text("utf-8"), re.MULTILINE)
    assert commits
    assert set(commits) == set(re.findall(r"`([0-9a-f]{40})`", TEXT))


def test_a_package_without_a_licence_is_refused() -> None:
    with pytest.raises(LookupError):
        NOTICES.licence_of("there-is-no-such-package")
