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
from openpangu_sft.tokenizer.remote_code import YES, Trust, may_run
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
    return directory


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


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("classes", ["other/repository--own.Own", ["../there--own.Own", None]])
def test_code_of_another_repository_is_refused(files: Path, name: str, classes: object) -> None:
    (files / name).write_text(json.dumps({"auto_map": {"AutoTokenizer": classes}}), "utf-8")
    trust = {CODE: sum_of("1\n")}
    assert refusal_of(may_run, files, trust).startswith(f"{files / name}: auto_map names code in another repository")


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"[" * 100_000, b'{"auto_map": null}'])
def test_other_faults_of_a_configuration_are_left_to_its_reader(files: Path, content: bytes) -> None:
    (files / "tokenizer_config.json").write_bytes(content)
    assert may_run(files, {CODE: sum_of("1\n")})


def test_names_of_files_are_printed_without_control_characters(files: Path) -> None:
    (files / "\x1b[31mred.py").write_text("", "utf-8")
    assert "\x1b" not in refusal_of(may_run, files, trust=True)
    assert "\x1b" not in on_a_terminal(files, "\n")


def test_a_stage_without_consent_writes_nothing(files: Path, tiny_hf: Path, make_recipe: MakeRecipe) -> None:
    for source in tiny_hf.iterdir():
        (files / source.name).symlink_to(source)
    recipe = make_recipe(f"paths.hf={files}", "tokenizer.trust_remote_code=true")
    samples = recipe.path("samples")
    samples.mkdir(parents=True)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (samples / "a.jsonl").write_text(json.dumps({"meta_prompt": [""], "data": turns}), "utf-8")
    assert "its Python code would be run" in refusal_of(run_preprocess, recipe)
    assert not recipe.path("shards").exists()
    arguments = ["preprocess", "--recipe", "recipes/demo.yaml", "--set", f"paths.hf={files}"]
    for yes, code in (([], 1), (["--yes"], 0)):
        command = [sys.executable, "-m", "openpangu_sft", *arguments, *yes]
        settings = [f"--set=paths.samples={samples}", f"--set=paths.cache={files.parent}"]
        settings += ["--set=tokenizer.trust_remote_code=true", "--set=data.validation_share=0"]
        done = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr


def test_mindspeed_is_not_started_where_it_would_run_code(
    files: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream loads tokenizers with trust_remote_code, whatever the recipe says."""
    monkeypatch.setattr(start, "require_ready", lambda sources: sources)
    recipe = make_recipe(f"paths.hf={files}", "train.engine=mindspeed", "train.device=auto")
    with pytest.raises(UserError, match="MindSpeed-LLM runs the Python files here"):
        start.run_mindspeed(recipe, None, [])  # type: ignore[arg-type]
