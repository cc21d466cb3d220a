"""docs/recipe.md from the recipe's own types and descriptions.

Run as: python -m openpangu_sft.recipe.reference > docs/recipe.md
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.recipe.sections import Model

HEAD = """# Recipe

Every key of a recipe, generated from the code. Any of them can be overridden:
`make sft SET="train.lr=1e-5 data.workers=8"`, or `openpangu-sft sft --set train.lr=1e-5`. A key without a default has
to be in the file; [recipes/openpangu-1b.yaml](../recipes/openpangu-1b.yaml) is a complete example.
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
            of_the_checkpoint = section is Model and field.is_required()
            default = "config.json" if of_the_checkpoint else _default(field)
            yield f"`{key}`", _values(field), default, field.description or ""


def _default(field: FieldInfo) -> str:
    """As YAML has it."""
    if field.is_required():
        return ""
    if field.default is None:
        return "none"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _values(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(limit, name)}" for limit in field.metadata for name, sign in _SIGNS if hasattr(limit, name)
    ]
    return f"{_named(field.annotation)} {', '.join(limits)}".strip()


def _named(kind: Any) -> str:
    origin, given = get_origin(kind), get_args(kind)
    if origin is Union:
        return ", or ".join(_named(one) for one in given if one is not type(None))
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in given)
    if origin is list:
        return f"a list of {_named(given[0])}{'s' if given[0] in _KINDS else ''}"
    if origin is dict:
        return f"a mapping of {_named(given[0])} to {_named(given[1])}"
    return _KINDS.get(kind) or ", ".join(kind.model_fields)


_KINDS: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "`true`, `false`"}
_SIGNS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))


if __name__ == "__main__":
    print(reference(), end="")
