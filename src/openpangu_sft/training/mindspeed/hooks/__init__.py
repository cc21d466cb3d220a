"""What the patched MindSpeed-LLM calls, in its own processes: see patches/mindspeed-llm."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from openpangu_sft.util.errors import UserError, explain_os_error


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Ends the process with exit code 1 and one line on stderr where the user can mend something, as our stages do."""
    try:
        yield
    except (UserError, OSError) as error:
        refusal = explain_os_error(error) if isinstance(error, OSError) else error
        print(f"openpangu-sft: {refusal}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
