"""Called by the patched MindSpeed-LLM in its own processes; see patches/mindspeed-llm."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from openpangu_sft.util.errors import UserError, explain_os_error


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Prints a UserError or OSError as one line on stderr and ends the process with exit code 1, as our stages do."""
    try:
        yield
    except (UserError, OSError) as error:
        refusal = explain_os_error(error) if isinstance(error, OSError) else error
        print(f"openpangu-sft: {refusal}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
