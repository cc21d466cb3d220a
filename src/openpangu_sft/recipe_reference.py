"""docs/recipe.md from the recipe's own types and descriptions.

Run as: python -m openpangu_sft.recipe_reference > docs/recipe.md
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from openpangu_sft.recipe import Recipe

HEAD = """# Recipe

Every key of a recipe, generated from the code. Any of them can be overridden:
`make sft SET="train.lr=1e-5 data.workers=8"`, or `openpangu-sft sft --set train.lr=1e-5`. A key without a default has
to be in the file; [recipes/openpangu-1b.yaml](../recipes/openpangu-1b.yaml) has them all.
"""


def reference() -> str:
    """The whole page."""
    return HEAD + "".join(_section(name, field.annotation) for name, field in Recipe.model_fields.items())


def _section(name: str, section: Any) -> str:
    rows = "".join(f"| {' | '.join(row)} |\n" for row in _rows(name, section))
    return f"\n## {name}\n\n{section.__doc__}\n\n| key | values | default | meaning |\n|---|---|---|---|\n{rows}"


def _rows(prefix: str, section: Any) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        key = f"{prefix}.{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _rows(key, field.annotation)
        else:
            default = "" if field.is_required() else "none" if field.default is None else f"`{field.default}`"
            yield f"`{key}`", _values(field), default, field.description or ""


def _values(field: FieldInfo) -> str:
    choices = get_args(field.annotation)
    if list[int] in choices:
        return "a list of integers"
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    kind = {str: "text", int: "integer", float: "number", bool: "`true`, `false`"}[field.annotation]  # type: ignore[index]
    limits = [
        f"{sign} {getattr(limit, name)}" for limit in field.metadata for name, sign in _SIGNS if hasattr(limit, name)
    ]
    return " ".join([kind, ", ".join(limits)]).strip()


_SIGNS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))


if __name__ == "__main__":
    print(reference(), end="")
