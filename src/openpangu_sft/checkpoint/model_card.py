"""The README.md of an exported checkpoint: what it is, how to use it, what made it.

Names of directories and whatever a manifest holds come from outside: they are escaped wherever they stand.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openpangu_sft import __version__
from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.checkpoint.hf_export import LLAMA, SAME_IDS
from openpangu_sft.util.errors import printable

_LICENCE = "LICENSE"
_TRAINING = {
    "train.engine": "engine",
    "train.precision": "precision",
    "data.seq_length": "tokens in a pack",
    "train.global_batch_size": "packs in an iteration",
    "train.lr": "highest learning rate",
    "train.seed": "seed",
}
_SNIPPET = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = {path}
tokenizer = AutoTokenizer.from_pretrained(path, {of_tokenizer})
model = AutoModelForCausalLM.from_pretrained(path, {of_model})
messages = [{{"role": "user", "content": "你好"}}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = tokenizer(text, return_tensors="pt")
output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=512)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

Two steps from messages to tokens, because the chat template has no `<s>`: the tokenizer puts it in front, as in
training. `apply_chat_template(..., tokenize=True)` leaves it out."""
_LLAMA_FORM = """
The weights are openPangu's, under the name of the architecture that they equal: Llama with a bias on q, k, v and o.
No remote code is needed, but the packages `sentencepiece` and `protobuf` are.

{of_the_fast_class}

vLLM reads the same files (openpangu-sft did not try it):

```sh
vllm serve {command}
```

In chat requests send `"add_special_tokens": true`: vLLM leaves out `<s>` otherwise."""
_FAST = """\
Training used the slow tokenizer class, `use_fast=False`. The fast one, which transformers and vLLM make of it unless
they are asked for the slow one, gave the same ids for every piece of the vocabulary and for texts in which such classes
may differ."""
_NOT_FAST = """\
Load the tokenizer with `use_fast=False`, as training did, and start vLLM with `--tokenizer-mode slow`: the fast class,
which transformers makes of it otherwise, {found}."""
_OPENPANGU_FORM = """
Configuration and Python files are those of the base model: read them before you let them run."""


def recipe_digest(settings: dict[str, Any]) -> str:
    """sha256 over the settings that a manifest records."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def write_model_card(directory: Path, manifest: Manifest, name: str, base: str, source: str) -> None:
    """Writes README.md with the metadata that model hubs read.

    Args:
        manifest: of the export, its inputs and counts complete.
        name: of the directory that it is put into.
        base: name of the base model.
        source: name of what was exported: the title, unless it is a training of the base.
    """
    counts = manifest.counts
    lines = [
        "---",
        "language:",
        "- zh",
        "- en",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"base_model: {json.dumps(printable(base), ensure_ascii=False)}",
        "license: other",
        *([f"license_link: {_LICENCE}"] if (directory / _LICENCE).is_file() else []),
        "tags:",
        "- openpangu",
        *(["- sft"] if "dataset" in manifest.inputs else []),
        "---",
        "",
        f"# {_plain(base)}, fine-tuned" if "dataset" in manifest.inputs else f"# {_plain(source)}",
        "",
        f"{counts['parameters']:,} parameters in {counts['dtype']}. Made with openpangu-sft {__version__}.",
        "",
        "## How to use it",
        "",
        _use(manifest, name),
        "",
        "## What made it",
        "",
        "| what | value |",
        "|---|---|",
        *(f"| {_plain(what)} | {value} |" for what, value in _facts(manifest, base)),
        "",
        "Every setting, and the sha256 of every file, is in `manifest.json`. The base model's licence holds.",
    ]
    (directory / "README.md").write_text("\n".join(lines) + "\n", "utf-8")


def _use(manifest: Manifest, name: str) -> str:
    path = f"{name!r}  # where this file lies"
    if manifest.counts["form"] != LLAMA:
        trusting = "trust_remote_code=True"
        options = {"of_tokenizer": f"{trusting}, use_fast=False", "of_model": f'torch_dtype="auto", {trusting}'}
        return _SNIPPET.format(path=path, **options) + "\n" + _OPENPANGU_FORM
    found = manifest.counts["fast_tokenizer"]
    command = shlex.quote(printable(name))
    if found != SAME_IDS:
        command += " --tokenizer-mode slow"
    of_the_fast_class = _FAST if found == SAME_IDS else _NOT_FAST.format(found=_plain(found))
    snippet = _SNIPPET.format(path=path, of_tokenizer="use_fast=False", of_model='torch_dtype="auto"')
    return snippet + "\n" + _LLAMA_FORM.format(of_the_fast_class=of_the_fast_class, command=command)


def _facts(manifest: Manifest, base: str) -> Iterator[tuple[str, str]]:
    """What the table says; the values in Markdown."""
    inputs, counts = manifest.inputs, manifest.counts
    yield "base model", _plain(base)
    for name, title in (("weights", "its weights"), ("config", "its configuration"), ("tokenizer", "its tokenizer")):
        if digest := inputs.get(f"hf.{name}") or inputs.get(name):
            yield f"{title}, sha256", _code(digest)
    if "dataset" in inputs:
        yield "training data, sha256", _code(inputs["dataset"])
        yield "recipe, sha256", _code(recipe_digest(manifest.settings))
        for key, title in _TRAINING.items():
            if key in manifest.settings:
                yield title, _plain(manifest.settings[key])
    if isinstance(iteration := counts.get("iteration"), int):
        yield "iterations", f"{iteration:,}"
    if isinstance(loss := counts.get("loss"), (int, float)):
        yield "final loss", f"{loss:.4f}"
    versions = counts.get("versions")
    for name, version in versions.items() if isinstance(versions, dict) else ():
        yield f"trained with {name}", _plain(version)


def _plain(value: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>&|~#$])", r"\\\1", printable(str(value)))


def _code(digest: object) -> str:
    return f"`{digest}`" if re.fullmatch("[0-9a-f]+", str(digest)) else _plain(digest)
