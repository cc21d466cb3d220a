"""A preview as one HTML page that needs nothing else: no network, no script, no font of its own.

What samples hold is untrusted. Jinja escapes every value, and the page's own policy forbids scripts and requests.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined

from openpangu_sft.errors import printable

if TYPE_CHECKING:
    from openpangu_sft.preview.stage import Preview

TEMPLATE = Path(__file__).with_name("page.html")


def render_page(preview: Preview) -> str:
    """The page's HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(printable=printable, thousands=_thousands, share=_share)
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(preview=preview, figures=preview.figures)


def _thousands(number: int) -> str:
    return f"{number:,}"


def _share(part: int, whole: int, places: int = 1) -> str:
    return f"{part / max(whole, 1):.{places}%}"
