"""The command line as users meet it: help, one line for a mistake, exit codes."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from conftest import PATIENCE, ROOT, TINY, conversation, write_samples
from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.cli.main import app
from openpangu_sft.cli.options import PREFIX, readable, show
from openpangu_sft.recipe.load import load_recipe
from parameter_ids import named_by

STAGES = [
    "format",
    "preprocess",
    "merge",
    "convert",
    "sft",
    "export",
    "chat",
    "preview",
    "inspect",
    "verify",
    "evaluate",
    "report",
    "plan",
    "demo",
    "doctor",
]


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "openpangu_sft", *arguments]
    return subprocess.run(command, text=True, capture_output=True, check=False, cwd=ROOT, **options)  # type: ignore[call-overload]


def sets(*overrides: str) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def test_help_lists_every_stage() -> None:
    output = run("--help").stdout
    for stage in [*STAGES, "sources"]:
        assert re.search(rf"^\W*{stage}\b", output, re.MULTILINE), stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_mistyped_key_is_one_line_and_exit_code_1(stage: str) -> None:
    finished = run(stage, "--recipe", "recipes/demo.yaml", "--set", "train.itertions=5")
    assert finished.returncode == 1
    assert finished.stdout == ""
    expected = "openpangu-sft: --set train.itertions: unknown key train.itertions -> did you mean train.iterations?"
    assert finished.stderr.strip() == expected


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("plan", "demo", "doctor")])
def test_nothing_there_is_one_line_that_names_the_path(stage: str, tmp_path: Path) -> None:
    finished = run(stage, "--recipe", "recipes/demo.yaml", *sets(f"paths.cache={tmp_path}/nowhere"))
    assert finished.returncode == 1
    lines = finished.stderr.strip().splitlines()
    assert len(lines) == 1
    assert f"{tmp_path}/nowhere" in lines[0]
    assert " -> " in lines[0]
    assert not (tmp_path / "nowhere").exists()


def test_a_missing_recipe_and_a_wrong_option() -> None:
    assert "no such recipe file" in run("sft", "--recipe", "recipes/none.yaml").stderr


SEE = "openpangu-sft {} --help shows what there is"
CHOICES = "--dtype (make: DTYPE): 'bf61' is not one of 'fp32', 'bf16', 'fp16'"
MEMORY, SPEED = "plan: --memory (make: MEMORY): ", "plan: --tokens-per-second (make: TOKENS_PER_SECOND): "
CLAIM = "kubernetes: --claim (make: CLAIM)"


@pytest.mark.parametrize(
    ("arguments", "said"),
    named_by(
        0,
        (["sft", "--recipes", "x"], "sft: No such option: --recipes -> did you mean --recipe?"),
        (["sft", "--xyzzy"], f"sft: No such option: --xyzzy -> {SEE.format('sft')}"),
        (["sfft"], "no such command: sfft -> did you mean sft?"),
        (["exprot", "--iteration", "1"], "no such command: exprot -> did you mean export?"),
        (["xyzzy"], "no such command: xyzzy -> openpangu-sft --help shows what there is"),
        (["convert", "--dtype", "bf61"], f"convert: {CHOICES} -> {SEE.format('convert')}"),
        (["kubernetes"], f"{CLAIM} is missing -> {SEE.format('kubernetes')}"),
        *(
            (["plan", "--memory", gib], f"{MEMORY}{gib!r} is not a number from 0.1 to 100000 -> {SEE.format('plan')}")
            for gib in ("64GB", "nan", "inf", "0", "1e6")
        ),
        *(
            (
                ["plan", f"--tokens-per-second={speed}"],
                f"{SPEED}{speed!r} is not a number from 0.001 to 1e+12 -> {SEE.format('plan')}",
            )
            for speed in ("nan", "1e-300", "-1")
        ),
        (
            ["export", "--iteration", "x"],
            "export: --iteration (make: ITERATION): 'x' is neither the number of an iteration nor best -> "
            f"{SEE.format('export')}",
        ),
        (["preview", "--count", "x"], f"preview: --count: 'x' is not a whole number -> {SEE.format('preview')}"),
    ),
)
def test_a_mistyped_call_is_one_line_with_what_is_nearest(arguments: list[str], said: str) -> None:
    finished = run(*arguments)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == f"openpangu-sft: {said}\n"


MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def test_every_exported_option_is_a_variable_of_make_for_its_command() -> None:
    [text] = re.findall(r"^options := (.*\noptions \+= .*)$", MAKEFILE, re.MULTILINE)
    exported = set(re.findall("[A-Z_]{2,}", text))
    found = set()
    for name, command in app.commands.items():
        for option in command.params:
            if isinstance(option.envvar, str):
                variable = option.envvar[len(PREFIX) :]
                takers = "  " if variable in ("RECIPE", "SET", "YES") else rf"  for .*\b{name}\b"
                assert re.search(rf"^##= {variable}{takers}", MAKEFILE, re.MULTILINE), (name, option.opts)
                found.add(variable)
    assert found == exported


AWKWARD = 'it\'s "50% off": $HOME $(id) \\ #1 --set;\n  你好'


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [
        ("chat", {"PROMPT": AWKWARD, "MODEL": "a b"}, {"prompt": AWKWARD, "model": Path("a b")}),
        ("chat", {"PROMPT": "", "RECIPE": ""}, {"prompt": None, "recipe_file": Path("recipes/openpangu-1b.yaml")}),
        ("sft", {"SET": "a.b=1  c=$x", "DRY_RUN": "1"}, {"overrides": ("a.b=1", "c=$x"), "dry_run": True}),
        ("sft", {"SET": "", "DRY_RUN": "0"}, {"overrides": (), "dry_run": False}),
        ("inspect", {"DATASET": "--help"}, {"dataset": Path("--help")}),
        ("verify", {"ONLY": "tensors"}, {"only": "tensors"}),
        ("verify", {"ONLY": "manifest"}, {"only": "manifest"}),
        ("verify", {"ONLY": ""}, {"only": None}),
        ("doctor", {"JSON": "1"}, {"as_text": True}),
        ("plan", {"MEMORY": "32", "TOKENS_PER_SECOND": "5e4"}, {"memory": 32.0, "tokens_per_second": 5e4}),
        ("demo", {}, {"recipe_file": Path("recipes/demo.yaml")}),
    ],
)
def test_variables_of_make_are_options(
    command: str, given: dict[str, str], expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(PREFIX + name, value)
    params = app.commands[command].make_context(command, []).params
    assert {name: params[name] for name in expected} == expected


@pytest.mark.parametrize(("arguments", "only"), [(["--tensors"], "tensors"), (["--manifest"], "manifest")])
def test_what_verify_compares(arguments: list[str], only: str) -> None:
    assert app.commands["verify"].make_context("verify", arguments).params["only"] == only


def test_arguments_come_before_variables_which_child_processes_do_not_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENPANGU_HTML", "x.html")
    monkeypatch.setenv("OPENPANGU_YES", "0")
    monkeypatch.setenv("OPENPANGU_SET", "train.lr=x")
    monkeypatch.setenv("OPENPANGU_SFT_IMAGE", "kept")
    done = CliRunner().invoke(app, ["sft", "--recipe", str(ROOT / "none.yaml"), "--set", "train.lr=1"])
    assert "no such recipe file" in str(done.exception)
    assert [name for name in os.environ if name.startswith(PREFIX)] == ["OPENPANGU_SFT_IMAGE"]
    assert app.commands["sft"].make_context("sft", ["--set", "train.lr=1"]).params["overrides"] == ("train.lr=1",)


def example_of(command: click.Command, name: str) -> list[str]:
    """The words behind `openpangu-sft NAME` in the one example of its help; what is the shell's is left out."""
    shown = command.get_help(click.Context(command, info_name=f"openpangu-sft {name}"))
    [line] = re.findall(r"^ *Example: (.*)$", shown, re.MULTILINE)
    words = shlex.split(line.partition(" > ")[0])
    while "=" in words[0]:
        words.pop(0)
    assert words[:2] == ["openpangu-sft", name]
    return words[2:]


@pytest.mark.parametrize(("name", "command"), app.commands.items())
def test_every_command_has_an_example_that_it_takes(name: str, command: click.Command) -> None:
    context = command.make_context(name, example_of(command, name))
    if "overrides" in context.params:
        load_recipe(ROOT / context.params["recipe_file"], context.params["overrides"])


def test_the_list_of_commands_says_in_whole_what_each_is_for() -> None:
    assert "..." not in run("--help").stdout.replace("[ARGS]...", "")


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run("--version").stdout)


def test_ctrl_c_in_a_stage_is_one_line_and_leaves_nothing(tmp_path: Path, tiny_hf: Path) -> None:
    many = [conversation(f"question {number}", "an answer") for number in range(60000)]
    write_samples(tmp_path / "dataset/many.jsonl", many)
    overrides = sets(*TINY, f"paths.cache={tmp_path}", f"paths.hf={tiny_hf}", "data.workers=2")
    process = subprocess.Popen(
        [sys.executable, "-m", "openpangu_sft", "preprocess", "--recipe", "recipes/demo.yaml", *overrides],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    shards = tmp_path / "finetune_dataset/shards"
    deadline = time.monotonic() + PATIENCE
    while not any(file.stat().st_size for file in shards.glob(".many.staging/spool/*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    message = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130, message
    assert message.strip().splitlines()[-1] == "openpangu-sft: interrupted; nothing half-written is left"
    assert "Traceback" not in message
    assert [path.name for path in shards.iterdir()] == [".many.lock"]


def test_a_mistake_in_the_tool_prompt_is_found_before_the_conversion(tmp_path: Path) -> None:
    (tmp_path / "raw.jsonl").write_text('{"prompt": "q", "response": "a"}', "utf-8")
    arguments = ["format", "--recipe", str(ROOT / "recipes/demo.yaml")]
    arguments += sets(*TINY, f"paths.cache={tmp_path}", "paths.raw=raw.jsonl", "data.tool_prompt='{{ tool }}'")
    done = CliRunner().invoke(app, arguments)
    assert str(done.exception).startswith("data.tool_prompt: names tool, and a template is given only tools -> ")
    assert not (tmp_path / "dataset").exists()


def test_a_table_rounds_what_a_stage_has_measured() -> None:
    assert readable({"loss": 0.006728517822921276, "iteration": 1200}) == "loss: 0.0067, iteration: 1,200"


def test_a_table_has_the_highest_counts_and_no_empty_row(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    reasons = {f"reason {number}": number for number in range(1, 9)}
    files = {"a.jsonl": {"read": 9}, "b.jsonl": {"read": 1}}
    counts = {"read": 1200, "reasons": reasons, "files": files, "ignored_keys": {}, "changes": {"joined\x1b": 2}}
    show("samples", tmp_path, Manifest("samples", counts=counts))
    cells = [row.split("│")[1:-1] for row in capsys.readouterr().err.splitlines() if "│" in row]
    assert all(len("│".join(row)) <= 78 for row in cells)
    text = " ".join(" ".join(map(str.strip, row)).strip() for row in cells)
    assert text == (
        "read 1,200 reasons reason 8: 8, reason 7: 7, reason 6: 6, reason 5: 5, reason 4: 4, reason 3: 3, "
        "2 more in manifest.json files 2 changes joined\\x1b: 2"
    )
