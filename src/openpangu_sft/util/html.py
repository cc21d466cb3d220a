"""Pages that need nothing else: no network, no script, no font or file beside them.

What they show is untrusted. Jinja escapes every value, and the policy in base.html forbids scripts and requests.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from openpangu_sft.util.errors import printable


def render_page(template: Path, **values: object) -> str:
    """The HTML of a page.

    Args:
        template: extends base.html.
        values: for the template; Markup is taken as it is, all else is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(printable=printable, thousands=_thousands, share=_share)
    return environment.get_template(template.name).render(values)


def _thousands(number: int) -> str:
    return f"{number:,}"


def _share(part: int, whole: int, places: int = 1) -> str:
    return f"{part / max(whole, 1):.{places}%}"
