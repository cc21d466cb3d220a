"""The README.md of an exported checkpoint: what it is, how to use it, what made it.

Names of directories and the values of a manifest are untrusted: the template escapes everything it prints.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from openpangu_sft import __version__
from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.checkpoint.hf_export import LLAMA, PEFT, SAME_IDS, VLLM_TEMPLATE
from openpangu_sft.recipe.lora import Adapter
from openpangu_sft.util.errors import printable

_SETTINGS = ("train.engine", "train.precision", "data.seq_length", "train.global_batch_size", "train.lr", "train.seed")


def write_model_card(directory: Path, manifest: Manifest, name: str, base: str, source: str) -> None:
    """Writes README.md with the metadata that model hubs read.

    `name`, `base` and `source` name the export's directory, the base model and the exported checkpoint, which is the
    title unless it is a fine-tuned base; the manifest's inputs and counts are complete.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    card = environment.get_template("model_card.md.jinja").render(
        base=base,
        base_json=Markup(json.dumps(printable(base), ensure_ascii=False)),
        command=Markup(shlex.quote(printable(name))),
        counts=manifest.counts,
        facts=_facts(manifest, base),
        fast=manifest.counts.get("fast_tokenizer") == SAME_IDS,
        licensed=(directory / "LICENSE").is_file(),
        llama=manifest.counts["form"] == LLAMA,
        path=Markup(repr(name)),
        peft=manifest.counts["form"] == PEFT,
        source=source,
        trained="dataset" in manifest.inputs,
        version=__version__,
        vllm_template=(directory / VLLM_TEMPLATE).is_file(),
    )
    (directory / "README.md").write_text(card, "utf-8")


def _facts(manifest: Manifest, base: str) -> Iterator[tuple[str, object]]:
    inputs, counts = manifest.inputs, manifest.counts
    yield "base model", base
    for name, title in (("weights", "its weights"), ("config", "its configuration"), ("tokenizer", "its tokenizer")):
        if digest := inputs.get(f"hf.{name}") or inputs.get(name):
            yield f"{title}, sha256", _code(digest)
    if "dataset" in inputs:
        yield "training data, sha256", _code(inputs["dataset"])
        recipe = json.dumps(manifest.settings, sort_keys=True).encode()
        yield "recipe, sha256", _code(hashlib.sha256(recipe).hexdigest())
        yield from ((key, manifest.settings[key]) for key in _SETTINGS if key in manifest.settings)
    if "lora" in counts:
        yield "LoRA adapters", Adapter(**counts["lora"])
    if isinstance(iteration := counts.get("iteration"), int):
        yield "iterations", f"{iteration:,}"
    if isinstance(loss := counts.get("loss"), (int, float)):
        yield "final loss", f"{loss:.4f}"
    versions = counts.get("versions")
    for name, version in versions.items() if isinstance(versions, dict) else ():
        yield f"trained with {name}", version


def _plain(value: object) -> str:
    """Text that Markdown shows as it is, on one line; `Markup` is taken as it is."""
    if isinstance(value, Markup):
        return value
    return re.sub(r"([\\`*_\[\]<>&|~#$])", r"\\\1", printable(str(value)))


def _code(digest: object) -> object:
    return Markup(f"`{digest}`") if re.fullmatch("[0-9a-f]+", str(digest)) else digest
