"""Self-contained HTML pages: no network, scripts, fonts or other files.

Their content is untrusted: Jinja escapes every value, and the policy in base.html forbids scripts and requests.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from openpangu_sft.util.errors import TEXT, printable


def render_page(template: Path, **values: object) -> str:
    """Renders a template that extends base.html; values other than Markup are escaped, control characters too."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value), TEXT),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(thousands="{:,}".format, share=share)
    return environment.get_template(template.name).render(values)


def share(part: int, whole: int, places: int = 1) -> str:
    return f"{part / max(whole, 1):.{places}%}"
