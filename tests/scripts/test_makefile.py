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
TARGETS = [
    *STAGES,
    "help",
    "setup",
    "doctor",
    "demo",
    "preview",
    "inspect",
    "verify",
    "plan",
    "curve",
    "evaluate",
    "report",
    "chat",
    "test",
    "lint",
    "fmt",
    "lock",
    "clean",
    "bench-data",
    "bench-convert",
    "sources",
    "smoke",
    "slurm",
    "kubernetes",
    "test-upstream",
    "test-image",
    "test-random",
    "shell",
    "image",
    "image-diff",
    "save",
    "load",
    "push",
    "lock-base",
]
VARIABLES = ["RECIPE", "SET", "SHARD", "SAMPLE", "HTML", "DATASET", "PROMPT", "MODEL"]
VARIABLES += [
    "FROM",
    "ITERATION",
    "DTYPE",
    "FORM",
    "PROMPTS",
    "RUN",
    "WITH",
    "HF",
    "MCORE",
    "ONLY",
    "DRY_RUN",
    "CLAIM",
    "NNODES",
    "JSON",
    "PEERS",
]
VARIABLES += ["FROM", "ITERATION", "DTYPE", "FORM", "HF", "MCORE", "ONLY", "DRY_RUN", "CLAIM", "NNODES"]
VARIABLES += ["MEMORY", "TOKENS_PER_SECOND"]
VARIABLES += ["SIZE", "DATA_DIR", "VENV", "PYTHON", "PYPI_INDEX"]
VARIABLES += ["RUNTIME", "TARGET", "NPUS", "CACHE", "DOCKER_FLAGS", "REGISTRY"]
URLS = ["MEGATRON_LM_URL", "MINDSPEED_URL", "MINDSPEED_LLM_URL"]
AWKWARD = 'it\'s "50% off": $HOME $(id) ${x} `id` \\ #1 --set; 你好，世界'


class Make:
    """Runs the Makefile with an openpangu-sft that only notes what it was called with."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls = directory / "calls"
        program = directory / "the venv/bin/openpangu-sft"
        program.parent.mkdir(parents=True)
        program.write_text('#!/bin/sh\nprintf "%s\\0" "$@" >>calls\nexit "${FAKE_EXIT:-0}"\n')
        program.chmod(0o755)
        shutil.copy(ROOT / "Makefile", directory)
        (directory / "scripts/image").mkdir(parents=True)
        for script in ("run.sh", "npus.sh", "image/names.sh", "targets.awk"):
            shutil.copy(ROOT / "scripts" / script, directory / "scripts" / script)
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


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that make is refused with; it has done nothing."""
    assert (done.returncode, done.stdout) == (2, "")
    ours, own = done.stderr.splitlines()
    assert re.fullmatch(r"Makefile:\d+: \*\*\* nothing was done\.  Stop\.", own)
    assert ours.startswith("openpangu-sft: ")
    return ours[len("openpangu-sft: ") :]


def test_help_is_the_default_and_names_every_target(make: Make) -> None:
    shown = make().stdout
    assert shown == make("help").stdout
    for target in TARGETS:
        assert f"\n  {target:13} " in shown
    for variable in VARIABLES:
        assert re.search(rf"^  {variable}(?: |$)", shown, re.MULTILINE)
    assert f"\n  {', '.join(URLS)}\n" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("width", [80, 100, 120])
def test_help_fits_the_terminal(make: Make, width: int) -> None:
    shown = make("help", COLUMNS=str(width)).stdout
    assert width - 20 < max(map(len, shown.splitlines())) <= width
    assert "".join(shown.split()) == "".join(make("help").stdout.split())


def test_a_variable_is_shown_at_its_targets_and_by_itself(make: Make) -> None:
    shown = make().stdout
    assert re.search(r"^  preprocess .* \[SHARD\]$", shown, re.MULTILINE)
    assert re.search(r"^  SHARD +for preprocess: ", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["sft", "RECPE=x"], "make knows no variable RECPE -> did you mean RECIPE?"),
        (["sft", "recipe=x y"], "make knows no variable recipe -> did you mean RECIPE?"),
        (["sft", "train.lr=1e-5"], 'make knows no variable train.lr -> write SET="train.lr=1e-5"'),
        (["convert", "ITER=3"], "make knows no variable ITER -> did you mean ITERATION?"),
        (["sft", "LEARNING_RATE=1"], "make knows no variable LEARNING_RATE -> make help lists what there is"),
        (["preproces"], "make knows no target preproces -> did you mean preprocess?"),
        (["sft", "exprot"], "make knows no target exprot -> did you mean export?"),
        (["train"], "make knows no target train -> make help lists what there is"),
        (["sft", "SHARD=1/2"], "make sft takes no SHARD -> it is for preprocess"),
        (["SHARD=1/2"], "make help takes no SHARD -> it is for preprocess"),
        (["sft", "merge", "FROM=$x"], "make sft merge takes no FROM -> it is for convert, export, load"),
        (["sft", "RUNTIME=dokcer"], "RUNTIME is docker or host, not dokcer -> did you mean docker?"),
        (["sft", "TARGET=gpu"], "TARGET is npu or cpu, not gpu -> did you mean npu or cpu?"),
        (["sft", "TARGET=ascend"], "TARGET is npu or cpu, not ascend -> take npu or cpu"),
        (["verify", "ONLY=tensor"], "ONLY is tensors or manifest, not tensor -> did you mean tensors?"),
        (["export", "FORM=lama"], "FORM is llama or openpangu, not lama -> did you mean llama?"),
        (["convert", "DTYPE=bf61"], "DTYPE is fp32, bf16 or fp16, not bf61 -> did you mean bf16?"),
        (["sft", "DRY_RUN=yes"], "DRY_RUN is 0 or 1, not yes -> take 0 or 1"),
    ],
)
def test_a_mistake_is_answered_with_what_is_nearest(make: Make, given: list[str], said: str) -> None:
    assert refusal(make(*given)) == said
    assert not make.calls.exists()


def test_what_the_environment_holds_is_no_mistake(make: Make) -> None:
    assert make("sft", RECPE="x", SHARD="1/2", SIZE="3", EDITOR="vi").returncode == 0


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
    own = {"DRY_RUN": "--dry-run", "JSON": "--json"}.get(variable, value)
    assert own in done.stdout or re.search(rf"\b{variable}\b", reads) or variable in ("PYTEST_ADDOPTS", "PROMPT", *URLS)


@pytest.mark.parametrize("stage", STAGES)
def test_stage(make: Make, stage: str) -> None:
    done = make(stage)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert make.called_with() == [stage, "--recipe", "recipes/openpangu-1b.yaml"]


@pytest.mark.parametrize(
    ("target", "given", "options"),
    [
        ("convert", ["FROM=a b", "ITERATION=400", "DTYPE=bf16"], ["--from=a b", "--iteration=400", "--dtype=bf16"]),
        ("export", ["FROM=x", "ITERATION=4", "DTYPE=fp32"], ["--from=x", "--iteration=4", "--dtype=fp32"]),
        ("export", ["FORM=openpangu"], ["--form=openpangu"]),
        ("verify", ["HF=it's", "MCORE=$x", "ITERATION=3"], ["--hf=it's", "--mcore=$x", "--iteration=3"]),
        ("verify", ["ONLY=tensors"], ["--tensors"]),
        ("verify", ["ONLY=manifest", "MCORE=m"], ["--mcore=m", "--manifest"]),
        ("verify", [], []),
    ],
)
def test_checkpoints(make: Make, target: str, given: list[str], options: list[str]) -> None:
    done = make(target, *given)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert make.called_with() == [target, "--recipe", "recipes/openpangu-1b.yaml", *options]


def test_a_part_of_the_inputs_is_for_preprocess_alone(make: Make) -> None:
    make("preprocess", "SHARD=3/16")
    assert make.called_with() == ["preprocess", "--recipe", "recipes/openpangu-1b.yaml", "--shard=3/16"]
    make.calls.unlink()
    assert refusal(make("merge", "SHARD=3/16")) == "make merge takes no SHARD -> it is for preprocess"
    assert not make.calls.exists()


def test_settings_are_shown_one_by_one(make: Make) -> None:
    shown = make("-n", "sft", "SET=a.b=1 c.d=[1,2]").stdout
    assert "--set 'a.b=1' --set 'c.d=[1,2]'" in shown


def test_settings_arrive_as_they_are(make: Make) -> None:
    settings = ["data.workers=4", "a=[1,2]", "paths.cache=$HOME/x", "b='q'", 'c="q"', "d=(1)", "e=;id", "f=#", "g=*"]
    assert make("sft", f"SET={' '.join(settings)}", "RECIPE=my recipes/$x.yaml").returncode == 0
    expected = [part for setting in settings for part in ("--set", setting)]
    assert make.called_with() == ["sft", "--recipe", "my recipes/$x.yaml", *expected]


def test_preview(make: Make) -> None:
    assert make("preview").returncode == 0
    assert make.called_with() == ["preview", "--recipe", "recipes/openpangu-1b.yaml"]


def test_preview_of_a_sample_into_a_file(make: Make) -> None:
    assert make("preview", "SAMPLE=7", f"HTML={AWKWARD}").returncode == 0
    assert make.called_with()[3:] == ["--sample=7", f"--html={AWKWARD}"]


def test_chat_without_a_prompt(make: Make) -> None:
    assert make("chat").returncode == 0
    assert make.called_with() == ["chat", "--recipe", "recipes/openpangu-1b.yaml"]


@pytest.mark.parametrize("prompt", [AWKWARD, "--help", "two\nlines", "three   spaces   "])
def test_prompt_arrives_as_it_is(make: Make, prompt: str) -> None:
    assert make("chat", f"PROMPT={prompt}", "MODEL=the model").returncode == 0
    assert make.called_with()[3:] == ["--model=the model", f"--prompt={prompt}"]


def test_prompt_from_the_environment(make: Make) -> None:
    assert make("chat", PROMPT=AWKWARD).returncode == 0
    assert make.called_with()[-1] == f"--prompt={AWKWARD}"


@pytest.mark.parametrize("dataset", ["/cache/finetune_dataset/demo_data", AWKWARD, "--help", "two  spaces "])
def test_dataset_arrives_as_it_is(make: Make, dataset: str) -> None:
    assert make("inspect", f"DATASET={dataset}", "SET=data.seq_length=64").returncode == 0
    expected = ["inspect", "--recipe", "recipes/openpangu-1b.yaml", "--set", "data.seq_length=64", "--", dataset]
    assert make.called_with() == expected


def test_inspect_without_a_dataset(make: Make) -> None:
    assert make("inspect").returncode == 0
    assert make.called_with() == ["inspect", "--recipe", "recipes/openpangu-1b.yaml"]


def test_demo_has_its_own_recipe(make: Make) -> None:
    for arguments, environment, recipe in (
        ([], {}, "recipes/demo.yaml"),
        (["RECIPE=mine.yaml"], {}, "mine.yaml"),
        ([], {"RECIPE": "theirs.yaml"}, "theirs.yaml"),
    ):
        make.calls.unlink(missing_ok=True)
        assert make("demo", "SET=a=1", *arguments, **environment).returncode == 0
        assert make.called_with() == ["demo", "--recipe", recipe, "--set", "a=1"]


def test_bench_data_is_handed_size_and_place(make: Make) -> None:
    python = make.directory / "the venv/bin/python"
    (make.directory / "the venv/bin/openpangu-sft").rename(python)  # notes its arguments just as well
    for arguments, size, place in ([], "200", "../shared/data"), (["SIZE=0.5", "DATA_DIR=my $x"], "0.5", "my $x"):
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
]
HANDED_ON += ["HCCL_IF_IP", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "OMP_NUM_THREADS"]
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
    kept = {"scripts", "scripts/image", "the venv", "the venv/bin"}
    assert left == {".cache", ".cache/openpangu-1b", "src", "src/a", *whole, *kept}


def test_number_of_machines(make: Make) -> None:
    make("sft", "NNODES=4", "SET=train.lr=1e-5")
    settings = ["--set", "train.lr=1e-5", "--set", "parallel.nodes=4"]
    assert make.called_with() == ["sft", "--recipe", "recipes/openpangu-1b.yaml", *settings]


def test_plan(make: Make) -> None:
    make("plan", "MEMORY=32", "TOKENS_PER_SECOND=5e4")
    expected = ["plan", "--recipe", "recipes/openpangu-1b.yaml", "--memory=32", "--tokens-per-second=5e4"]
    assert make.called_with() == expected


def test_dry_run(make: Make) -> None:
    make("sft", "DRY_RUN=1")
    assert make.called_with() == ["sft", "--recipe", "recipes/openpangu-1b.yaml", "--dry-run"]
    make.calls.unlink()
    make("sft", "DRY_RUN=0")
    assert make.called_with() == ["sft", "--recipe", "recipes/openpangu-1b.yaml"]


def test_a_hand_over_has_what_its_makefile_reads(tmp_path: Path) -> None:
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
    assert refusal(handed("sft", "NPU=0")) == "make knows no variable NPU -> did you mean NPUS?"


def test_a_hand_over_has_no_environment(make: Make) -> None:
    make.setup.unlink()
    done = make("lint")
    assert done.returncode == 2
    assert done.stderr.startswith("openpangu-sft: a hand-over has no code for this target -> take a clone\n")


def test_doctor(make: Make) -> None:
    assert make("doctor").returncode == 0
    assert make.called_with() == ["doctor", "--recipe", "recipes/openpangu-1b.yaml"]
    make.calls.unlink()
    assert make("doctor", "JSON=1", "PEERS=node2 it's:22", "RECIPE=r.yaml", "SET=a=1").returncode == 0
    expected = ["doctor", "--recipe", "r.yaml", "--set", "a=1", "--json", "--peer=node2", "--peer=it's:22"]
    assert make.called_with() == expected


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
