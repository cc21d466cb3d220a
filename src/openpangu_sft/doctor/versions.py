"""Order of the versions that Ascend's software has: 24.1.rc2 < 24.1.rc3 < 24.1.rc3.7 < 24.1.0 < 25.0.rc1.

PEP 440 knows neither 24.1.rc3.7 nor 8.0.RC3.alpha001, so packaging.version refuses them.
"""

from __future__ import annotations

import re

Key = tuple[tuple[int, int], ...]

_RANKS = {"alpha": -3, "beta": -2, "rc": -1, "post": 2}
"""Of words: what comes before the release that it stands in, and what comes after. Other words do not count."""
_END, _NUMBER = (0, 0), 1


def version_key(version: str) -> Key:
    """Sorts versions; takes any text. Case does not count."""
    parts: list[tuple[int, int]] = []
    for word, digits in re.findall(r"([a-z]+)?([0-9]*)", version.lower().split("+")[0]):
        number = int(digits[:18] or "0")
        if word in _RANKS:
            parts.append((_RANKS[word], number))
        elif digits:
            parts.append((_NUMBER, number))
    return (*parts, _END)


def in_series(version: str, series: str) -> bool:
    """Whether a version is one of a series or of its patches: 24.1.rc3.7 is of 24.1.RC3, 24.1.rc3.alpha1 is not."""
    key, wanted = version_key(version), version_key(series)[:-1]
    return key[: len(wanted)] == wanted and key[len(wanted)] >= _END
