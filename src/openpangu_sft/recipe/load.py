"""Loads a recipe: YAML 1.2 (where 2e-5 is a number) plus overrides."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, SequenceNode

from openpangu_sft.artifacts.artifact import MANIFEST, parse_manifest
from openpangu_sft.recipe.auto import AUTO, SECTIONS, recompute_is_auto, valid_splits, with_auto_split
from openpangu_sft.recipe.model_config import CONFIG, model_of, read_config, require_stated
from openpangu_sft.recipe.schema import INSTEAD, Recipe
from openpangu_sft.recipe.section import Conflict
from openpangu_sft.recipe.sections import Model, Paths, UnknownModel
from openpangu_sft.util.errors import UserError, read_utf8

ROOT = Path(__file__).parents[3]
SYNONYMS = ROOT / "recipes/synonyms.txt"


Choose = Callable[[Sequence[Recipe], bool], Recipe]
"""Takes one of the valid recipes; True: and chooses its recomputation."""


def _refuse(recipes: Sequence[Recipe], recompute: bool) -> Recipe:
    raise UserError("the recipe holds auto, which is not chosen here", remedy="give numbers")


def load_recipe(path: Path, overrides: Iterable[str] = (), choose: Choose = _refuse) -> Recipe:
    """Reads and checks a recipe. Sizes of the model that it leaves out come from config.json in `paths.hf`.

    A relative path that does not exist is taken from the folder that contains recipes/. The value of an override,
    `train.lr=1e-5`, is YAML unless the key holds a text. `choose` is called for `auto`. Raises `UserError` for the
    first complaint about file, keys, types and settings.
    """
    if not path.is_file() and (ROOT / path).is_file():
        path = ROOT / path
    if not path.is_file():
        raise UserError("no such recipe file", where=path, remedy="give one with RECIPE=…")
    text = read_utf8(path)
    try:
        content = _parse(text)
    except Exception as error:  # ruamel's constructors pass on errors of int(), float(), date() and chr()
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise UserError(f"not valid YAML: {_one_line(error)}", where=where, remedy="fix it") from None
    if not isinstance(content, dict):
        raise UserError("holds no settings", where=path, remedy="start from recipes/openpangu-1b.yaml")
    if content.get("parallel") == AUTO:
        content["parallel"] = with_auto_split({})
    given = [_apply(content, override) for override in overrides]
    _drop_replaced(content, given)
    try:
        found = valid_splits({**content, "model": _model(content)})
    except ValidationError as error:
        raise _first_complaint(error, text, given, path) from None
    recompute = recompute_is_auto(content)
    recipe = choose(found, recompute) if recompute or len(found) > 1 else found[0]
    return _with_iterations(recipe)


def _drop_replaced(content: dict[str, Any], given: Collection[str]) -> None:
    """An override replaces the key that the file has in its place: train.epochs replaces train.iterations."""
    train = content.get("train")
    for one, other in ({**INSTEAD, **{other: one for one, other in INSTEAD.items()}}).items():
        if one in given and other not in given and isinstance(train, dict):
            train.pop(other.split(".")[1], None)


def _with_iterations(recipe: Recipe) -> Recipe:
    """train.iterations from train.epochs, as soon as there is a dataset; until then they are 0."""
    manifest, train = recipe.path("dataset") / MANIFEST, recipe.train
    if not train.epochs or not manifest.is_file():
        return recipe
    found: object = 0
    with suppress(UserError):  # the stages that read the dataset say what is wrong with it
        found = parse_manifest(manifest, "").counts.get("packs")
    packs = found if isinstance(found, int) else 0
    iterations = math.ceil(round(train.epochs * packs / train.global_batch_size, 6))
    resolved = {"iterations": iterations, "epochs": 0.0 if packs else train.epochs}
    return recipe.model_copy(update={"train": train.model_copy(update=resolved)})


def _parse(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def _apply(content: dict[str, Any], override: str) -> str:
    """Puts one `dotted.key=value` into the content and returns the key."""
    key, equals, text = override.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key=value", remedy="write e.g. train.lr=1e-5")
    where = f"--set {key}"
    *parents, last = parts = key.split(".")
    if text != AUTO or key not in SECTIONS:
        _require_value(parts, where)
    value: Any = text
    if _at(parts) is not str or text[:1] in ("'", '"'):  # a path like /data/#1 or 123 is a text
        try:
            value = _parse(text)
        except Exception as error:
            what = f"value {reprlib.repr(text)} is not valid YAML: {_one_line(error)}"
            raise UserError(what, where=where, remedy="write e.g. train.lr=1e-5") from None
    section = content
    for parent in parents:
        below = section.get(parent)
        if below == AUTO:  # train.recompute; a number of layers is not to be ignored
            if last == "activation":
                what = f"{'.'.join(parents)} is auto, which chooses this too"
                raise UserError(what, where=where, remedy="set train.recompute.granularity=none or full first")
            below = {"granularity": "full"} if last == "num_layers" else {}
        if below is not None and not isinstance(below, dict):
            return key  # not a section in the file: refused by the validation
        section[parent] = dict(below or {})  # a copy: with an alias, two sections of the file are one object
        section = section[parent]
    section[last] = with_auto_split(section.get(last)) if (key, value) == ("parallel", AUTO) else value
    return key


def _model(content: Mapping[str, Any]) -> Any:
    """`model:` of a recipe with all sizes; unchanged if it is wrong, to be refused by the validation."""
    stated = {} if content.get("model") is None else content["model"]
    try:
        Model.model_validate(stated)
        return stated
    except ValidationError as error:
        if any(detail["type"] != "missing" for detail in error.errors()):
            return stated
    try:
        paths = Paths.model_validate(content.get("paths") or {})
    except ValidationError:
        return stated
    checkpoint = paths.under_cache(paths.hf)
    path = checkpoint / CONFIG
    try:
        if not path.is_file():
            what = "the recipe leaves out sizes of the model, and there is no config.json"
            remedy = "put the checkpoint there (paths.hf), or state them under model:"
            raise UserError(what, where=checkpoint, remedy=remedy)
        config = read_config(checkpoint)
        model_of(config, path)
    except UserError as error:
        return UnknownModel.model_construct(reason=error, **stated)
    return require_stated(stated, config, path)


def _require_value(parts: Sequence[str], where: str) -> None:
    """Raises `UserError` unless the recipe has one value under this key."""
    for depth, part in enumerate(parts):
        above = parts[:depth]
        if not _is_section(_at(above)):
            here = ".".join(above)
            raise UserError(f"{here} is one value and has no keys below it", where=where, remedy=f"set {here}=…")
        if part not in _at(above).model_fields:
            raise _unknown_key(above, part, where)
    if _is_section(_at(parts)):
        here, first = ".".join(parts), next(iter(_at(parts).model_fields))
        raise UserError(f"{here} is a section", where=where, remedy=f"set its keys one by one: {here}.{first}=…")


def _first_complaint(error: ValidationError, text: str, given: Collection[str], path: Path) -> UserError:
    details = error.errors(include_url=False)
    unknown = [entry for entry in details if entry["type"] == "extra_forbidden"]
    wrong = [entry for entry in details if entry["type"] != "missing"]
    detail = (unknown or wrong or details)[0]  # a mistyped key is also missing, but that says less
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    holding = [name for name in given if f"{key}.".startswith(f"{name}.")]  # or it is a list, or a section with auto
    override = max(holding, key=len, default=None)
    where = f"--set {override}" if override else f"{path}{_line(text, location)}"
    if detail["type"] == "extra_forbidden":
        return _unknown_key(location[:-1], location[-1], where)
    if detail["type"] == "missing":
        return UserError(f"key {key} is missing", where=where, remedy="add it; see docs/recipe.md")
    conflict = detail.get("ctx", {}).get("error")
    if isinstance(conflict, Conflict):
        overridden = "".join(f" --set {name}" for name in conflict.keys if name in given)
        in_file = [name.split(".") for name in conflict.keys if name not in given]
        where = f"{path}{_line(text, in_file[0]) if in_file else ''}{overridden}"
        return UserError(conflict.what, where=where, remedy=conflict.remedy)
    what = f"{key} = {reprlib.repr(detail['input'])}: {detail['msg']}"
    return UserError(what, where=where, remedy="see docs/recipe.md")


def _unknown_key(above: Sequence[str], part: str, where: str) -> UserError:
    known = sorted(_at(above).model_fields)
    close = [".".join([*above, name]) for name in difflib.get_close_matches(part, known, n=1)]
    close += [name for name in _all_keys(Recipe) if name.split(".")[-1] == part]  # the right key in the wrong section
    close = _synonym(part) or close
    remedy = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
    return UserError(f"unknown key {'.'.join([*above, part])}", where=where, remedy=remedy)


def _synonym(name: str) -> list[str]:
    """The key that other tools call `name`, with its unit if theirs is another one."""
    for line in SYNONYMS.read_text("utf-8").splitlines():
        synonym, key, *unit = line.split(" ", 2)
        if synonym == name.lower():
            return [f"{key} ({unit[0]})" if unit else key]
    return []


def _line(text: str, location: Sequence[str]) -> str:
    """`:line` of a key or an entry of a list in the file, or of its section; empty if the file has neither."""
    node, line = YAML(typ="safe", pure=True).compose(text), ""
    for part in location:
        if isinstance(node, SequenceNode):
            node = node.value[int(part)]
            line = f":{node.start_mark.line + 1}"
            continue
        entries = node.value if isinstance(node, MappingNode) else []
        found = [(key, value) for key, value in entries if key.value == part]
        if not found:
            break
        key, node = found[-1]
        line = f":{key.start_mark.line + 1}"
    return line


def _at(location: Sequence[str]) -> Any:
    """The type of what the recipe holds under a key: a section's class, or a value's type."""
    found: Any = Recipe
    for part in location:
        is_list = get_origin(found) is list
        found = get_args(found)[0] if is_list else found.model_fields[part].annotation
    return found


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _all_keys(section: Any, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if _is_section(field.annotation):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")


def _one_line(error: Exception) -> str:
    if isinstance(error, MarkedYAMLError):
        return str(error.problem or error.context)
    return "nested too deeply" if isinstance(error, RecursionError) else (str(error) or type(error).__name__)
