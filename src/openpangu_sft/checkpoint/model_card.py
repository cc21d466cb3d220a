"""The README.md of an exported checkpoint: what it is, what made it, how to load it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openpangu_sft import __version__
from openpangu_sft.artefact import Manifest

_LICENCE = "LICENSE"
_TRAINING = {
    "train.engine": "engine",
    "train.precision": "precision",
    "data.seq_length": "tokens in a pack",
    "train.global_batch_size": "packs in an iteration",
    "train.lr": "highest learning rate",
    "train.seed": "seed",
}
_USE = {
    "llama": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", torch_dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}", use_fast=False)
```

The weights are openPangu's, under the name of the architecture that they equal: Llama with a bias on q, k, v and o.
No remote code is needed. The slow tokenizer class is the one that training used.""",
    "openpangu": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", torch_dtype="auto", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True, use_fast=False)
```

Configuration and Python files are those of the base model; read them before you let them run.""",
}


def recipe_digest(settings: dict[str, Any]) -> str:
    """sha256 over the settings that a manifest records."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def write_model_card(directory: Path, manifest: Manifest, name: str, base: str) -> None:
    """Writes README.md with the metadata that model hubs read.

    Args:
        manifest: of the export, its inputs and counts complete.
        name: of the directory that it is put into.
        base: name of the base model.
    """
    counts = manifest.counts
    lines = [
        "---",
        "language:",
        "- zh",
        "- en",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"base_model: {json.dumps(base, ensure_ascii=False)}",
        "license: other",
        *([f"license_link: {_LICENCE}"] if (directory / _LICENCE).is_file() else []),
        "tags:",
        "- openpangu",
        "- sft",
        "---",
        "",
        f"# {base}, fine-tuned" if "dataset" in manifest.inputs else f"# {base}",
        "",
        f"{counts['parameters']:,} parameters, {counts['dtype']}. Made with openpangu-sft {__version__}.",
        "",
        "## How to load it",
        "",
        _USE[counts["form"]].format(name=name),
        "",
        "## What made it",
        "",
        "| what | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _facts(manifest, base)),
        "",
        "Every setting, and the sha256 of every file, is in `manifest.json`. The base model's licence holds.",
    ]
    (directory / "README.md").write_text("\n".join(lines) + "\n", "utf-8")


def _facts(manifest: Manifest, base: str) -> Iterator[tuple[str, str]]:
    inputs, counts = manifest.inputs, manifest.counts
    yield "base model", _escaped(base)
    for name, title in (("weights", "its weights"), ("config", "its configuration"), ("tokenizer", "its tokenizer")):
        if digest := inputs.get(f"hf.{name}") or inputs.get(name):
            yield f"{title}, sha256", f"`{digest}`"
    if "dataset" in inputs:
        yield "training data, sha256", f"`{inputs['dataset']}`"
    if manifest.settings:
        yield "recipe, sha256", f"`{recipe_digest(manifest.settings)}`"
    for key, title in _TRAINING.items():
        if key in manifest.settings:
            yield title, str(manifest.settings[key])
    if "iteration" in counts:
        yield "iterations", f"{counts['iteration']:,}"
    if "loss" in counts:
        yield "final loss", f"{counts['loss']:.4f}"
    for name, version in counts.get("versions", {}).items():
        yield f"trained with {name}", str(version)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
