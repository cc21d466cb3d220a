"""The Makefile hands what the user gives to openpangu-sft as it was given."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ["format", "preprocess", "merge", "convert", "sft", "export"]
FIRST = ["demo", "doctor", "plan", "setup", "help", "help-all", *STAGES, "chat", "preview", "inspect", "verify"]
FIRST += ["evaluate", "report"]
TARGETS = [*FIRST, "sources", "smoke", "slurm", "kubernetes", "test-upstream", "shell", "image", "image-diff", "save"]
TARGETS += [
    "load",
    "push",
    "lock-base",
    "bench-data",
    "bench-convert",
    "bench-step",
    "bench-train",
    "test",
    "test-random",
    "test-image",
    "lint",
    "audit",
    "fmt",
]
TARGETS += ["lock", "clean"]
VARIABLES = ["RECIPE", "SET", "RUNTIME", "TARGET", "NPUS", "CACHE", "DOCKER_FLAGS", "VENV", "PYTHON", "PYPI_INDEX"]
VARIABLES += [
    "SHARD",
    "SAMPLE",
    "HTML",
    "RUN",
    "WITH",
    "DATASET",
    "PROMPT",
    "MODEL",
    "FROM",
    "ITERATION",
    "DTYPE",
    "FORM",
    "PROMPTS",
    "HF",
    "MCORE",
    "ONLY",
]
VARIABLES += [
    "MEMORY",
    "TOKENS_PER_SECOND",
    "RESUME",
    "DRY_RUN",
    "JSON",
    "CLAIM",
    "REGISTRY",
    "SIZE",
    "DATA_DIR",
    "NNODES",
]
URLS = ["MEGATRON_LM_URL", "MINDSPEED_URL", "MINDSPEED_LLM_URL"]
AWKWARD = 'it\'s "50% off": $HOME $(id) ${x} `id` \\ #1 --set; 你好，世界'


PROGRAM = """#!/bin/sh
{ printf '%s\\0' "$@"; env -0 | grep -z ^OPENPANGU_ | sort -z | sed -z s/OPENPANGU_//; } >>calls
exit "${FAKE_EXIT:-0}"
"""


class Make:
    """Runs the Makefile with an openpangu-sft that only notes its arguments and its OPENPANGU_ variables."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls = directory / "calls"
        program = directory / "the venv/bin/openpangu-sft"
        program.parent.mkdir(parents=True)
        program.write_text(PROGRAM)
        program.chmod(0o755)
        shutil.copy(ROOT / "Makefile", directory)
        (directory / "scripts/image").mkdir(parents=True)
        for script in ("run.sh", "npus.sh", "image/names.sh", "targets.awk"):
            shutil.copy(ROOT / "scripts" / script, directory / "scripts" / script)
        (directory / "recipes").mkdir()
        shutil.copy(ROOT / "recipes/synonyms.txt", directory / "recipes")
        (directory / "VERSION").write_text("1.2.3\n")
        self.setup = directory / "scripts/setup.sh"
        self.setup.write_text("#!/bin/sh\n")
        self.setup.chmod(0o755)

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", "VENV=the venv", *arguments],
            cwd=self.directory,
            env={"PATH": os.environ["PATH"], "RUNTIME": "host", **environment},
            capture_output=True,
            text=True,
            encoding="utf-8",
        )

    def called_with(self) -> list[str]:
        return self.calls.read_text(encoding="utf-8").split("\0")[:-1]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return Make(tmp_path)


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that make is refused with; it has done nothing."""
    assert (done.returncode, done.stdout) == (2, "")
    ours, own = done.stderr.splitlines()
    assert re.fullmatch(r"Makefile:\d+: \*\*\* nothing was done\.  Stop\.", own)
    assert ours.startswith("openpangu-sft: ")
    return ours[len("openpangu-sft: ") :]


def test_help_is_the_default_and_short(make: Make) -> None:
    shown = make().stdout
    assert shown == make("help").stdout
    assert [name for name in TARGETS if f"\n  {name:13} " in shown] == FIRST
    assert len(shown.splitlines()) <= 40
    assert max(map(len, shown.splitlines())) <= 80


def test_help_all_names_every_target_and_variable(make: Make) -> None:
    shown = make("help-all").stdout
    for target in TARGETS:
        assert f"\n  {target:13} " in shown
    for variable in VARIABLES:
        assert re.search(rf"^  {variable}(?: |$)", shown, re.MULTILINE)
    assert f"\n  {', '.join(URLS)}\n" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("width", [80, 100, 120])
def test_help_fits_the_terminal(make: Make, width: int) -> None:
    shown = make("help-all", COLUMNS=str(width)).stdout
    assert width - 20 < max(map(len, shown.splitlines())) <= width
    assert "".join(shown.split()) == "".join(make("help-all").stdout.split())


def test_a_variable_is_shown_at_its_targets_and_by_itself(make: Make) -> None:
    shown = make("help-all").stdout
    assert re.search(r"^  preprocess .* \[SHARD\]$", shown, re.MULTILINE)
    assert re.search(r"^  SHARD +for preprocess: ", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["sft", "RECPE=x"], "make knows no variable RECPE -> make help-all lists them"),
        (["sft", "recipe=x y"], "make knows no variable recipe -> did you mean RECIPE?"),
        (["sft", "train.lr=1e-5"], 'make knows no variable train.lr -> write SET="train.lr=1e-5"'),
        (["sft", "LR=1e-5"], 'make knows no variable LR -> write SET="train.lr=1e-5"'),
        (["sft", "learning_rate=1e-5"], 'make knows no variable learning_rate -> write SET="train.lr=1e-5"'),
        (["sft", "CUTOFF_LEN=9"], 'make knows no variable CUTOFF_LEN -> write SET="data.seq_length=9"'),
        (["sft", "NUM_TRAIN_EPOCHS=3"], 'NUM_TRAIN_EPOCHS -> write SET="train.epochs=3"'),
        (["preproces"], "make knows no target preproces -> make help-all lists them"),
        (["sft", "train"], "make knows no target train -> make help-all lists them"),
        (["sft", "SHARD=1/2"], "make sft takes no SHARD -> it is for preprocess"),
        (["SHARD=1/2"], "make help takes no SHARD -> it is for preprocess"),
        (["sft", "merge", "FROM=$x"], "make sft merge takes no FROM -> it is for convert, export, load"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_call_is_refused_with_a_remedy(make: Make, given: list[str], said: str) -> None:
    assert error_line(make(*given)).endswith(said)
    assert not make.calls.exists()


def test_what_the_environment_holds_is_no_mistake(make: Make) -> None:
    assert make("sft", RECPE="x", SHARD="1/2", SIZE="3", EDITOR="vi").returncode == 0


def test_a_command_gets_its_own_options_only(make: Make) -> None:
    """Variables of the environment that other commands take are meant for something else."""
    assert make("sft", "SET=train.lr=1", MODEL="/opt", JSON="1", HTML="/tmp", DRY_RUN="1").returncode == 0
    assert make.called_with() == ["sft", "DRY_RUN=1", "SET=train.lr=1"]


def test_a_shell_and_the_tests_get_no_options(make: Make) -> None:
    (make.directory / "scripts/run.sh").write_text("#!/bin/sh\nenv | grep ^OPENPANGU_ >calls\n")
    make("shell", "SET=train.lr=9", "RECIPE=x.yaml")
    assert make.called_with() == []


def test_make_within_make_is_not_asked_for_what_it_was_handed(make: Make) -> None:
    (make.directory / "outer.mk").write_text("all:\n\t@$(MAKE) sft\n")
    assert make("-f", "outer.mk", "SHARD=1/2").returncode == 0
    assert make.called_with()[0] == "sft"


@pytest.mark.parametrize(
    "given", [["MASTER_ADDR=10.0.0.1", "NODE_RANK=1"], ["HCCL_IF_IP=x"], ["DOCKER=podman"], ["RUNTIME=", "DRY_RUN=0"]]
)
def test_what_all_targets_take(make: Make, given: list[str]) -> None:
    done = make("sft", *given)
    assert (done.returncode, done.stderr) == (0, "")


def lines_of_variables() -> list[tuple[str, str]]:
    """Every variable with every target that its line names."""
    text = re.sub(r"\n##=  +", "  ", (ROOT / "Makefile").read_text())
    found = re.findall(r"^##= ([A-Z_, ]+?)  +for ([a-z, -]+): ", text, re.MULTILINE)
    return [(name, target) for names, targets in found for name in names.split(", ") for target in targets.split(", ")]


@pytest.mark.parametrize(("variable", "target"), lines_of_variables())
def test_a_target_uses_the_variables_that_its_help_names(make: Make, variable: str, target: str) -> None:
    """They are in the commands that would run, or in the environment that a script of theirs reads."""
    choices = {"DRY_RUN": "1", "JSON": "1", "DTYPE": "bf16", "FORM": "llama", "ONLY": "tensors", "ARCH": "arm64"}
    value = choices.get(variable, "xyzzy")
    done = make("-n", target, f"{variable}={value}")
    assert done.returncode == 0, done.stderr
    scripts = [ROOT / script for script in re.findall(r"scripts/[a-z_/]+\.sh", done.stdout)]
    if "scripts/image/diff.sh" in done.stdout:
        scripts.append(ROOT / "scripts/image/build.sh")
    reads = "".join(script.read_text() for script in scripts)
    if "scripts/run.sh openpangu-sft" in done.stdout:
        make(target, f"{variable}={value}")
        assert f"{variable}={value}" in make.called_with()
    else:
        assert (
            value in done.stdout
            or re.search(rf"\b{variable}\b", reads)
            or variable in ("PYTEST_ADDOPTS", "PANGU_URL", *URLS)
        )


@pytest.mark.parametrize("stage", STAGES)
def test_stage(make: Make, stage: str) -> None:
    done = make(stage)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert make.called_with() == [stage]


@pytest.mark.parametrize("how", ["arguments", "environment"])
@pytest.mark.parametrize("value", [pytest.param(AWKWARD, id="awkward"), "--help", "two\nlines", "three   spaces   "])
def test_values_arrive_as_they_are(make: Make, how: str, value: str) -> None:
    given = {"HTML": value, "RECIPE": "my $x.yaml", "RUN": "--help", "WITH": ""}
    arguments = [f"{name}={text}" for name, text in given.items()] if how == "arguments" else []
    done = make("report", *arguments, **({} if arguments else given))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert make.called_with() == ["report", f"HTML={value}", "RECIPE=my $x.yaml", "RUN=--help"]


def test_make_sees_what_the_environment_has_but_not_the_other_way_around(make: Make) -> None:
    make("merge", "SET=a.b=1")
    make("merge")
    assert make.called_with() == ["merge", "SET=a.b=1", "merge"]


def test_settings_arrive_as_they_are(make: Make) -> None:
    settings = "data.workers=4 a=[1,2] paths.cache=$HOME/x b='q' c=\"q\" d=(1) e=;id f=# g=*"
    assert make("sft", f"SET={settings}", "NNODES=4").returncode == 0
    assert make.called_with() == ["sft", f"SET={settings} parallel.nodes=4"]


def test_a_bad_value_is_refused_where_it_is_used(make: Make) -> None:
    done = make("sft", "RUNTIME=dokcer")
    assert done.returncode == 2
    assert "openpangu-sft: RUNTIME=dokcer is neither docker nor host -> choose one of them\n" in done.stderr
    assert not make.calls.exists()


def test_bench_data_is_handed_size_and_place(make: Make) -> None:
    python = make.directory / "the venv/bin/python"
    (make.directory / "the venv/bin/openpangu-sft").rename(python)  # notes its arguments just as well
    for arguments, size, place in ([], "200", ""), (["SIZE=0.5", "DATA_DIR=my $x"], "0.5", "my $x"):
        make.calls.unlink(missing_ok=True)
        assert make("bench-data", *arguments).returncode == 0
        assert make.called_with() == ["-m", "benchmarks.data", "--size", size, "--data-dir", place]


@pytest.mark.parametrize("how", ["arguments", "environment", "not at all"])
def test_sources_are_told_the_places(make: Make, how: str) -> None:
    program = make.directory / "the venv/bin/openpangu-sft"
    seen = " ".join(f'URL="${url}"' for url in URLS)
    program.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" {seen} >>calls\n')
    given = {} if how == "not at all" else {url: f"{AWKWARD} {url}" for url in URLS}
    if how == "environment":
        make("sources", **given)
    else:
        make("sources", *(f"{name}={value}" for name, value in given.items()))
    assert make.called_with() == ["sources", *(f"URL={given.get(url, '')}" for url in URLS)]


HANDED_ON = [
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "DOCKER",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "HCCL_IF_IP",
]
HANDED_ON += ["GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "OMP_NUM_THREADS", "SWANLAB_MODE", "WANDB_API_KEY"]
FOR_BUILDS = ["BASE", "BUILD_BASE", "TORCH", "TORCH_INDEX", "PYTHON_URL", "PYTHON_SHA256", "CA", "IMAGE_FLAGS", "TAG"]


@pytest.mark.parametrize("how", ["arguments", "environment", "make within make", "not at all"])
@pytest.mark.parametrize(("targets", "names"), [(["sft"], HANDED_ON), (["image", "TARGET=cpu"], FOR_BUILDS)])
def test_what_is_handed_on_arrives_as_it_is(make: Make, how: str, targets: list[str], names: list[str]) -> None:
    """And what nobody gives is not there at all: an empty proxy or rank is something else than none."""
    notes_all = "#!/usr/bin/env python3\nimport json, os\njson.dump(dict(os.environ), open('calls', 'w'))\n"
    for program in ("the venv/bin/openpangu-sft", "scripts/image/build.sh"):
        (make.directory / program).write_text(notes_all)
        (make.directory / program).chmod(0o755)
    (make.directory / "outer.mk").write_text(f"all:\n\t@$(MAKE) {' '.join(targets)}\n")
    given = {} if how == "not at all" else {name: f"http://u:pa$$ss@{name} {AWKWARD}" for name in names}
    if how == "environment":
        done = make(*targets, **given)
    else:
        called = ["-f", "outer.mk"] if how == "make within make" else targets
        done = make(*called, *(f"{name}={value}" for name, value in given.items()))
    assert done.returncode == 0, done.stderr
    found = json.loads(make.calls.read_text("utf-8"))
    assert {name: found[name] for name in names if name in found} == given


def test_failure_of_a_stage_is_a_failure(make: Make) -> None:
    done = make("sft", FAKE_EXIT="3")
    assert done.returncode == 2  # GNU make's only code for it; it names the stage's own:
    assert "Error 3" in done.stderr


def test_no_stage_without_its_environment(make: Make) -> None:
    make.setup.write_text("#!/bin/sh\nexit 1\n")
    assert make("sft").returncode == 2
    assert not make.calls.exists()


def test_clean_keeps_the_environment_and_the_models(make: Make) -> None:
    whole = ["tests", "benchmarks"]
    for name in (".cache/demo", ".cache/openpangu-1b", "src/x.egg-info", "src/a/__pycache__", *whole):
        (make.directory / name).mkdir(parents=True)
    assert make("clean").returncode == 0
    left = {str(path.relative_to(make.directory)) for path in make.directory.rglob("*") if path.is_dir()}
    kept = {"recipes", "scripts", "scripts/image", "the venv", "the venv/bin"}
    assert left == {".cache", ".cache/openpangu-1b", "src", "src/a", *whole, *kept}


def test_an_offline_bundle_has_what_its_makefile_reads(tmp_path: Path) -> None:
    (tmp_path / "scripts/image").mkdir(parents=True)
    copies = re.findall(r'^cp .*"\$folder/[a-z/]*"$', (ROOT / "scripts/image/save.sh").read_text(), re.MULTILINE)
    assert len(copies) > 2
    subprocess.run(
        ["bash", "-ec", "\n".join(copies)], cwd=ROOT, env={**os.environ, "folder": str(tmp_path)}, check=True
    )

    def handed(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"]}
        return subprocess.run(["make", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert "\n  sft " in handed("help").stdout
    assert error_line(handed("sft", "NPU=0")) == "make knows no variable NPU -> make help-all lists them"


def test_an_offline_bundle_has_no_environment(make: Make) -> None:
    make.setup.unlink()
    done = make("lint")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "openpangu-sft: an offline bundle has no code for this target -> use a clone of the repository\n"
    )


def test_doctor_passes_on_that_something_is_lacking(make: Make) -> None:
    done = make("doctor", FAKE_EXIT="1")
    assert done.returncode == 2
    assert "Error 1" in done.stderr


@pytest.mark.parametrize("fails", ["ruff", "mypy", "shellcheck", "hadolint"])
def test_lint_fails_with_each_of_its_tools(make: Make, fails: str) -> None:
    tools = make.directory / "the venv/bin"
    for name in ("ruff", "mypy", "shellcheck", "hadolint"):
        (tools / name).write_text(f"#!/bin/sh\nexit {int(name == fails)}\n")
        (tools / name).chmod(0o755)
    assert make("lint").returncode == 2
    (tools / fails).write_text("#!/bin/sh\n")
    assert make("lint").returncode == 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="shellcheck and hadolint have wheels for x86-64 only")
@pytest.mark.parametrize("lacking", ["shellcheck", "hadolint"])
def test_lint_fails_without_a_tool_that_has_a_wheel(make: Make, lacking: str) -> None:
    tools = make.directory / "the venv/bin"
    for name in {"ruff", "mypy", "shellcheck", "hadolint"} - {lacking}:
        (tools / name).write_text("#!/bin/sh\n")
        (tools / name).chmod(0o755)
    done = make("lint", PATH="/usr/bin:/bin")
    assert done.returncode == 2
    assert f"{lacking}: not found" in done.stderr
