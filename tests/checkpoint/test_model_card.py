"""The README.md of an export: what it says is true, and names from outside cannot break it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from checkpoint.test_export import make_run
from conftest import PATIENCE, MakeRecipe
from openpangu_sft import __version__
from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.checkpoint.export import run_export
from openpangu_sft.checkpoint.hf_export import OPENPANGU, SAME_IDS
from openpangu_sft.checkpoint.model_card import write_model_card
from openpangu_sft.checkpoint.source import hf_digests
from openpangu_sft.recipe.model_config import read_config
from openpangu_sft.recipe.schema import Recipe
from pangu_base import FOR_ANY_DEVICE, TRUSTED, make_pangu_base
from pangu_base import own_module_cache as own_module_cache  # a fixture


def parts_of(card: str) -> tuple[Any, str]:
    """The YAML front matter as a model hub parses it, and the text below it."""
    begin, front, *text = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    assert not begin
    return YAML(typ="safe").load(StringIO(front)), text[0]


def table_of(text: str) -> dict[str, str]:
    rows = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows} == {4}
    return {row[1].strip(): row[2].strip() for row in rows[1:]}


def exported(recipe: Recipe, form: str = "llama", source: Any = None) -> tuple[Any, str]:
    run_export(recipe, source, form=form)
    return parts_of((recipe.path("export") / "README.md").read_text("utf-8"))


def test_what_it_says_is_true(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    make_run(recipe, iteration=1200)
    front, text = exported(recipe)
    assert front == {
        "language": ["zh", "en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "hf",
        "license": "other",
        "tags": ["openpangu", "sft"],
    }
    assert "# hf, fine-tuned\n\n64,864 parameters in float32." in text
    base = hf_digests(recipe.path("hf"))
    assert table_of(text) == {
        "base model": "hf",
        "its weights, sha256": f"`{base['weights']}`",
        "its configuration, sha256": f"`{base['config']}`",
        "its tokenizer, sha256": f"`{base['tokenizer']}`",
        "training data, sha256": f"`{'d' * 64}`",
        "recipe, sha256": f"`{sha256(json.dumps({'train.lr': recipe.train.lr}).encode()).hexdigest()}`",
        "train.lr": "0.003",
        "iterations": "1,200",
        "final loss": "1.2500",
        "trained with openpangu-sft": __version__,
        "trained with torch": torch.__version__,
        "trained with transformers": transformers.__version__,
    }
    assert "The fast one, which transformers makes of it" in text
    assert "vllm serve export --chat-template export/chat_template_vllm.jinja\n" in text


def test_it_says_nothing_of_machine_user_and_time(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    make_run(recipe)
    run_export(recipe)
    card = (recipe.path("export") / "README.md").read_text("utf-8")
    assert str(tmp_path) not in card
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", card)
    assert not re.search(r"20\d\d-\d\d|\d\d:\d\d", card)


@pytest.mark.parametrize("form", ["llama", OPENPANGU])
def test_the_snippet_runs_as_it_stands(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe, form: str) -> None:
    """In the directory above, in a process that knows nothing of this project; with an odd name."""
    base = make_pangu_base(tmp_path / "base", tiny_hf, modelling=FOR_ANY_DEVICE)
    name = '盘古\'s "first" | run'
    recipe = make_recipe(f"paths.hf={base}", TRUSTED, f"paths.export={tmp_path / name}")
    make_run(recipe)
    _, text = exported(recipe, form)
    [snippet] = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    snippet = snippet.replace("max_new_tokens=512", "max_new_tokens=2, eos_token_id=[]")
    ran = subprocess.run(
        [sys.executable, "-c", snippet + "print('ids', inputs['input_ids'][0].tolist(), output.shape[1])"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty"), "PATH": os.defpath},
        timeout=PATIENCE,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    ids = ran.stdout.splitlines()[-1]
    assert ids.startswith("ids [1, ")  # with bos


def test_companion_files_are_copied(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    base = make_pangu_base(tmp_path / "openPangu", tiny_hf)
    texts = {
        "LICENSE": "OPENPANGU MODEL LICENSE",
        "NOTICE.txt": "notice",
        "Open Source Software Notice": "others",
        "generation_config.json": f'{{"do_sample": true,  "eos_token_id": {read_config(base)["eos_token_id"]}}}',
        "chat_template.jinja": "{{ messages }}\n",
    }
    for name, text in texts.items():
        (base / name).write_text(text, "utf-8")
    (base / "NOTICES").mkdir()
    (base / "README.md").write_text("of the base", "utf-8")
    recipe = make_recipe(f"paths.hf={base}", TRUSTED)
    make_run(recipe)
    for form in ("llama", OPENPANGU):
        front, _ = exported(recipe, form)
        for name, text in texts.items():
            assert (recipe.path("export") / name).read_text("utf-8") == text
        assert front["license_link"] == "LICENSE"


def test_without_training_it_is_no_fine_tuned_model(tmp_path: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    shutil.copytree(tiny_hf, tmp_path / "original")
    recipe = make_recipe()
    front, text = exported(recipe, source=tmp_path / "original")
    assert front["tags"] == ["openpangu"]
    assert text.startswith("\n\n# original\n")
    assert set(table_of(text)) == {
        "base model", "its weights, sha256", "its configuration, sha256", "its tokenizer, sha256"
    }  # fmt: skip


# Names from outside.

ODD = [
    '"',
    "'",
    "|",
    "`",
    "```",
    "\n",
    "---\n",
    "\\",
    "]",
    "[a](b)",
    "<b>",
    "*",
    "#",
    "{x}",
    ": ",
    "盘古",
    "\u2028",
    "\x85",
]
ODD += ["\x1b[2J", "\udcff", "\U0001f600", "$(ls)", "%s", "- "]
NAMES = st.one_of(st.text(min_size=1, max_size=30), st.lists(st.sampled_from(ODD), max_size=8).map("".join))


@settings(max_examples=150, deadline=None)
@given(NAMES, NAMES, NAMES)
@example("x\n---\nlicense: mit", 'a": b', "| c |\n|---|")
@example("\udcff\ud800", "```\n", "\r\n# Title")
def test_no_name_breaks_it(tmp_path_factory: pytest.TempPathFactory, name: str, base: str, value: str) -> None:
    """The author of a run may have written its manifest by hand."""
    directory = tmp_path_factory.mktemp("card")
    counts = {"parameters": 1, "dtype": "float32", "form": "llama", "fast_tokenizer": SAME_IDS}
    counts.update(iteration=value, loss=value, versions={value: value})
    manifest = Manifest("hf", {"train.engine": value, value: value}, {"dataset": value, "hf.weights": value}, counts)
    write_model_card(directory, manifest, name, base, value)
    front, text = parts_of((directory / "README.md").read_text("utf-8"))
    assert set(front) == {"language", "library_name", "pipeline_tag", "base_model", "license", "tags"}
    assert base.isprintable() is False or front["base_model"] == base
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert [heading.split()[0] for heading in headings] == ["#", "##", "##"]
    rows = table_of(text)
    assert {"base model", "training data, sha256", "recipe, sha256", "train.engine"} <= set(rows)
    assert len(re.findall("^```", text, flags=re.MULTILINE)) == 4
    [path] = re.findall(r"^path = (.*)  # where this file lies$", text, flags=re.MULTILINE)
    assert eval(path, {"__builtins__": {}}) == name


@pytest.mark.parametrize("versions", [None, [], "x", {"a": None}])
def test_a_manifest_of_another_make(tmp_path: Path, versions: Any) -> None:
    counts = {"parameters": 1, "dtype": "float32", "form": "openpangu", "versions": versions, "loss": None}
    write_model_card(tmp_path, Manifest("hf", inputs={"dataset": "x"}, counts=counts), "export", "base", "run")
    assert "final loss" not in (tmp_path / "README.md").read_text("utf-8")
