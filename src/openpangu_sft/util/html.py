"""Self-contained HTML pages: no network, scripts, fonts or other files.

Their content is untrusted: Jinja escapes every value, and the policy in base.html forbids scripts and requests.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from openpangu_sft.util.errors import printable


def render_page(template: Path, **values: object) -> str:
    """Renders a template that extends base.html; values other than Markup are escaped."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(printable=printable, thousands="{:,}".format, share=share)
    return environment.get_template(template.name).render(values)


def share(part: int, whole: int, places: int = 1) -> str:
    return f"{part / max(whole, 1):.{places}%}"
