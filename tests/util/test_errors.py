"""Errors as the user sees them: one line, with a remedy."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from openpangu_sft.util.errors import UserError, explain_os_error


def test_a_user_error_is_one_line() -> None:
    assert str(UserError("what")) == "what"
    assert str(UserError("what", where="file:3", remedy="fix it")) == "file:3: what -> fix it"
    assert str(UserError("汉字 “quoted”", where=Path("数据"))) == "数据: 汉字 “quoted”"
    assert str(UserError("a\nb\r\nc\u2028d\x85e\n\nf")) == "a b c d e f"
    assert str(UserError("\x1b[31mred\x07\t\udcff")) == r"\x1b[31mred\x07\t\udcff"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "/x: no room left on the disk -> free some space, then run the stage again"),
        (errno.EDQUOT, "/x: no room left on the disk -> free some space, then run the stage again"),
        (
            errno.EFBIG,
            "/x: File too large for this disk or its limit (ulimit -f) -> raise the limit or use another disk",
        ),
        (errno.EACCES, "/x: no permission -> check the owner and mode of this path"),
        (errno.EPERM, "/x: no permission -> check the owner and mode of this path"),
        (errno.EROFS, "/x: this file system is read-only -> choose another path in the recipe, or mount it writable"),
        (errno.ENOENT, "/x: no such file or directory -> check the path in the recipe"),
        (errno.ENOTDIR, "/x: a part of this path is not a directory -> check the path in the recipe"),
        (errno.EEXIST, "/x: is in the way -> remove it or choose another path in the recipe"),
        (errno.EIO, f"/x: {os.strerror(errno.EIO)}"),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_operating_system_errors_are_explained(number: int, message: str) -> None:
    assert str(explain_os_error(OSError(number, os.strerror(number), "/x"))).startswith(message)
    assert "None" not in str(explain_os_error(OSError(number, os.strerror(number))))


def test_an_os_error_with_nothing_but_a_text() -> None:
    assert str(explain_os_error(OSError("only text"))) == "only text"
