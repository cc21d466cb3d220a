"""Python files beside a tokenizer run only with consent: asked on a real terminal, or given by their sha256."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Optional

import pytest

from conftest import MakeRecipe
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.tokenizer import remote_code
from openpangu_sft.tokenizer.remote_code import YES, Trust, classes_of, may_run
from openpangu_sft.training.mindspeed import start
from openpangu_sft.util.errors import UserError
from refusals import refusal_of

CODE = "tokenization_own.py"
ASK = """
import sys
from pathlib import Path
from typing import Optional
from openpangu_sft.tokenizer.remote_code import may_run
from openpangu_sft.util.errors import UserError
try:
    print("may run:", may_run(Path(sys.argv[1]), True))
except UserError as error:
    print("refused:", error)
"""


def sum_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint directory with a Python file, and a user who has agreed to nothing yet."""
    monkeypatch.delenv(YES)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / CODE).write_text("1\n", "utf-8")
    name_class(directory, {"AutoTokenizer": ["tokenization_own.Own", None]})
    monkeypatch.setattr(remote_code, "_agreed", set())
    return directory


def name_class(directory: Path, classes: object, kind: object = "OwnTokenizer") -> None:
    config = {"tokenizer_class": kind, "auto_map": classes}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def on_a_terminal(directory: Path, typed: str) -> str:
    """What a process shows that is asked on a terminal."""
    ours, its = pty.openpty()
    os.write(ours, typed.encode())
    process = subprocess.Popen([sys.executable, "-c", ASK, str(directory)], stdin=its, stdout=its, stderr=its)
    os.close(its)
    shown = b""
    try:
        while read := os.read(ours, 1024):
            shown += read
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return shown.decode()


def test_it_is_asked_once_for_the_same_code(files: Path) -> None:
    first = on_a_terminal(files, "y\n")
    assert json.dumps({CODE: sum_of("1\n")}) in first
    assert "[y/N]" in first
    assert "may run: True" in first
    assert on_a_terminal(files, "") == "may run: True\r\n"
    assert may_run(files, trust=True)
    (files / CODE).write_text("2\n", "utf-8")
    again = on_a_terminal(files, "\n")
    assert sum_of("2\n") in again
    assert f"refused: {files}: its Python code is not run -> read it, then agree to it" in again
    (files / CODE).write_text("1\n", "utf-8")
    (files / "helper.py").write_text("", "utf-8")
    assert "helper.py" in refusal_of(may_run, files, trust=True)


def test_where_nothing_can_be_kept_it_is_asked_again(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", os.devnull)
    for _ in range(2):
        shown = on_a_terminal(files, "yes\n")
        assert "[y/N]" in shown
        assert "may run: True" in shown


def test_without_a_terminal_nothing_is_asked(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = json.dumps({CODE: sum_of("1\n")})
    assert refusal_of(may_run, files, trust=True) == (
        f"{files}: its Python code would be run: {sums} -> read it, then give YES=1 (--yes), or the recipe these sums "
        "as tokenizer.trust_remote_code"
    )
    monkeypatch.setenv(YES, "1")
    assert may_run(files, trust=True)
    monkeypatch.setenv(YES, "0")
    assert "would be run" in refusal_of(may_run, files, trust=True)


@pytest.mark.parametrize(
    ("trust", "may"),
    [
        (False, False),
        ({}, None),
        ({CODE: sum_of("1\n")}, True),
        ({CODE: sum_of("1\n"), "modeling_own.py": sum_of("")}, True),
        ({CODE: sum_of("2\n")}, None),
        ({"other.py": sum_of("1\n")}, None),
    ],
)
def test_sums_in_the_recipe(files: Path, trust: Trust, may: Optional[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(YES, "1")  # changes nothing where the recipe has sums
    if may is not None:
        assert may_run(files, trust) is may
    elif trust:
        assert refusal_of(may_run, files, trust).startswith(f"{files / CODE}: its sha256 is {sum_of('1' + chr(10))}, ")
    else:
        assert may_run(files, trust) is False


@pytest.mark.parametrize(
    "classes",
    [
        {"AutoTokenizer": ["sub/tokenization_own.Own", None]},
        {"AutoTokenizer": [None, "/tmp/tokenization_own.Own"]},
        {"AutoTokenizer": ["other/repository--tokenization_own.Own", None]},
        {"AutoTokenizer": ["missing.Own", None]},
        {"AutoTokenizer": "tokenization_own.Own"},
        ["tokenization_own.Own", "..tokenization_own.Own"],
        [["tokenization_own.Own"]],
    ],
)
@pytest.mark.parametrize("trust", [True, {CODE: sum_of("1\n")}])
def test_a_class_that_is_not_in_a_file_here_is_refused(
    files: Path, trust: Trust, classes: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(YES, "1")
    name_class(files, classes)
    (files / "sub").mkdir()
    (files / "sub" / CODE).write_text("1\n", "utf-8")
    assert ": no class of a Python file here -> " in refusal_of(may_run, files, trust)
    assert classes_of(files)  # so MindSpeed-LLM is not started without trust either


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "AutoTokenizer", "RagTokenizer", "pipeline", "models", None, 1])
@pytest.mark.parametrize("trust", [False, True])
def test_what_is_no_tokenizer_is_not_loaded(files: Path, kind: object, trust: bool) -> None:
    """from_pretrained of a model loads the adapter that adapter_config.json names, by torch.load."""
    name_class(files, {}, kind)
    if kind == 1:  # no name at all: transformers says so
        assert may_run(files, trust) is False
    else:
        assert refusal_of(may_run, files, trust).startswith(
            f"{files}/tokenizer_config.json: tokenizer_class is {kind}: no tokenizer"
        )


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"[" * 100_000, b"5"])
def test_a_configuration_that_cannot_be_read(files: Path, content: bytes) -> None:
    (files / "tokenizer_config.json").write_bytes(content)
    assert "the tokenizer does not load: " in refusal_of(may_run, files, trust=False)


def test_without_a_class_of_its_own_nothing_is_asked(files: Path) -> None:
    name_class(files, {"AutoModel": "modeling_own.Own"}, "LlamaTokenizer")
    assert may_run(files, trust=True) is False


def test_code_that_changes_while_it_is_read_is_refused(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_code, "_ask", lambda directory, sums: (directory / CODE).write_text("2\n", "utf-8"))
    assert "its Python files changed meanwhile" in refusal_of(may_run, files, trust=True)


def test_names_of_files_are_printed_without_control_characters(files: Path) -> None:
    (files / "\x1b[31mred.py").write_text("", "utf-8")
    assert "\x1b" not in refusal_of(may_run, files, trust=True)
    assert "\x1b" not in on_a_terminal(files, "\n")


def test_a_stage_without_consent_writes_nothing(files: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    for source in tiny_hf.iterdir():
        if source.name != "tokenizer_config.json":
            (files / source.name).symlink_to(source)
    config = json.loads((tiny_hf / "tokenizer_config.json").read_text("utf-8"))
    config.update(tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    (files / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    code = "from transformers import LlamaTokenizer\nclass OwnTokenizer(LlamaTokenizer):\n    pass\n"
    (files / CODE).write_text(code, "utf-8")
    recipe = make_recipe(f"paths.hf={files}", "tokenizer.trust_remote_code=true")
    samples = recipe.path("samples")
    samples.mkdir(parents=True)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (samples / "a.jsonl").write_text(json.dumps({"meta_prompt": [""], "data": turns}), "utf-8")
    assert "its Python code would be run" in refusal_of(run_preprocess, recipe)
    assert not recipe.path("shards").exists()
    arguments = ["preprocess", "--recipe", "recipes/demo.yaml", "--set", f"paths.hf={files}"]
    for yes, exit_code in (([], 1), (["--yes"], 0)):
        command = [sys.executable, "-m", "openpangu_sft", *arguments, *yes]
        settings = [f"--set=paths.samples={samples}", f"--set=paths.cache={files.parent}"]
        settings += ["--set=tokenizer.trust_remote_code=true", "--set=data.validation_share=0"]
        done = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
        assert done.returncode == exit_code, done.stderr


def test_mindspeed_is_not_started_where_it_would_run_code(
    files: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream loads tokenizers with trust_remote_code, whatever the recipe says."""
    monkeypatch.setattr(start, "require_ready", lambda sources: sources)
    recipe = make_recipe(f"paths.hf={files}", "train.engine=mindspeed", "train.device=auto")
    with pytest.raises(UserError, match="MindSpeed-LLM runs the Python files here"):
        start.run_mindspeed(recipe, None, [])  # type: ignore[arg-type]
