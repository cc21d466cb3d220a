"""Which NPUs CANN shows to a process: ASCEND_RT_VISIBLE_DEVICES. For stage sft, and for doctor.

By https://www.hiascend.com/document/detail/zh/canncommercial/800/apiref/envvar/envref_07_0028.html the numbers have to
ascend, and what follows another character than a comma, or a number that there is not, is not read; npu-smi and
hccn_tool do not know the variable. The numbers are places in the list of the NPUs that there are, not those of the
device files: in a container that has davinci4 and davinci7, CANN takes 0 and 1
(https://github.com/gpustack/gpustack/issues/3352).
"""

from __future__ import annotations

from collections.abc import Mapping

VARIABLE = "ASCEND_RT_VISIBLE_DEVICES"


def visible(environment: Mapping[str, str], count: int) -> list[int]:
    """Places of the NPUs that a process sees, of `count` that there are; it counts them anew, from 0.

    None where the numbers do not ascend or the variable is set, but empty.
    """
    text = environment.get(VARIABLE)
    if text is None:
        return list(range(count))
    given: list[int] = []
    for word in text.split(","):
        digits = word[: len(word) - len(word.lstrip("0123456789"))][:9]
        if not digits or int(digits) >= count:
            break
        given.append(int(digits))
        if digits != word:
            break
    return given if given == sorted(set(given)) else []
