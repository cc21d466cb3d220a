"""Called by the patched MindSpeed-LLM in its own processes; see patches/mindspeed-llm."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from openpangu_sft.util.errors import UserError, explain_os_error


@contextlib.contextmanager
def one_line(settings_of: str = "") -> Iterator[None]:
    """Prints a UserError or OSError as one line on stderr and ends the process with exit code 1, as our stages do.

    `settings_of` explains settings of a recipe (data.…) in the message, where the published command has no flag.
    """
    try:
        yield
    except (UserError, OSError) as error:
        refusal = explain_os_error(error) if isinstance(error, OSError) else error
        if settings_of and "data." in f"{refusal.what}{refusal.remedy}":
            note = f"(data.… are settings of {settings_of})"
            refusal.remedy = f"{refusal.remedy} {note}" if refusal.remedy else note
        print(f"openpangu-sft: {refusal}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
