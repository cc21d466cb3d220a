"""The CI definitions call targets that there are, with variables that are documented, and pin what they fetch."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from openpangu_sft import __version__

ROOT = Path(__file__).parents[1]
GITHUB = ".github/workflows/ci.yml"
GITLAB = ".gitlab-ci.yml"
IGNORED = ".trivyignore.yaml"
READ_ONLY = {"contents": "read"}
PINNED_ACTION = re.compile(r" *(- )?uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*")
PINNED_IMAGE = re.compile(r"[\w./-]+:[\w.-]*\d[\w.-]*(@sha256:[0-9a-f]{64})?")
NAMES = r"[A-Z][A-Z_]+(?:, [A-Z][A-Z_]+)*"


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    # YAML 1.2, like GitHub's reader: for PyYAML the key `on` would be the value true.
    content = YAML(typ="safe", pure=True).load(text_of(name))
    assert isinstance(content, dict)
    return content


def entries(content: Any, *keys: str) -> Iterator[Any]:
    """All that stands under one of the keys, however deep."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in keys:
                yield value
            yield from entries(value, *keys)
    elif isinstance(content, list):
        for value in content:
            yield from entries(value, *keys)


def lines(content: Any) -> list[str]:
    """The shell lines, each whole: those that end with a backslash go on."""
    found = []
    for script in entries(content, "run", "script", "before_script", "after_script"):
        for part in [script] if isinstance(script, str) else script:
            found += part.replace("\\\n", " ").splitlines()
    return found


def make_calls(content: Any) -> list[tuple[set[str], list[str]]]:
    """The variables and the targets of every call of make."""
    calls = []
    for line in lines(content):
        for arguments in re.findall(r"(?:^|[;&|(]|\b(?:then|do)\b)\s*make\b([^;&|)#]*)", line):
            words = shlex.split(arguments)
            calls.append(({word.split("=")[0] for word in words if "=" in word}, [w for w in words if "=" not in w]))
    return calls


def image_names(content: dict[str, Any]) -> list[str]:
    used = [*entries(content, "image", "container")]
    used += [service for services in entries(content, "services") for service in services]
    return [name["name"] if isinstance(name, dict) else name for name in used]


@pytest.fixture(scope="module")
def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))


@pytest.fixture(scope="module")
def documented_variables() -> set[str]:
    lists = re.findall(rf"^##= ({NAMES})(?:  |$)", text_of("Makefile"), re.MULTILINE)
    lists += re.findall(rf"^#   ({NAMES})  ", text_of("scripts/image/build.sh"), re.MULTILINE)
    return {name for names in lists for name in names.split(", ")}


@pytest.mark.parametrize("name", [GITHUB, GITLAB])
def test_what_make_is_called_with(name: str, makefile_targets: set[str], documented_variables: set[str]) -> None:
    calls = make_calls(load(name))
    called = {target for _, targets in calls for target in targets}
    assert all(targets for _, targets in calls), "make without a target only lists what there is"
    assert {"test", "image", "push"} <= called <= makefile_targets
    given = set().union(*(variables for variables, _ in calls))
    assert {"TARGET", "REGISTRY"} <= given <= documented_variables
    # A call that was written in a way that make_calls does not see would be checked by nothing.
    assert len(calls) == sum(len(re.findall(r"\bmake [a-z]+", line.split("apt-get")[0])) for line in lines(load(name)))


@pytest.mark.parametrize(
    "line",
    [line for line in text_of(GITHUB).splitlines() if re.match(r"[ -]*uses\b", line)],
    ids=lambda line: line.split("@")[0].strip(),
)
def test_actions_are_pinned_by_commit(line: str) -> None:
    assert PINNED_ACTION.fullmatch(line)


def test_every_action_stands_on_a_line_of_its_own() -> None:
    used = [*entries(load(GITHUB), "uses")]
    assert used  # an action of several jobs is written once, so there are more of them than lines
    assert set(used) == set(re.findall(r"uses: (\S+) # v", text_of(GITHUB)))


@pytest.mark.parametrize("name", [GITHUB, GITLAB])
def test_nothing_is_called_latest(name: str) -> None:
    assert "latest" not in text_of(name)


def test_images_of_jobs_are_pinned_by_version() -> None:
    names = image_names(load(GITLAB))
    assert any("dind" in name for name in names)
    assert [name for name in names if not PINNED_IMAGE.fullmatch(name)] == []


def test_both_scan_with_one_version_of_trivy_and_pass_over_the_same() -> None:
    scan = next(step for step in load(GITHUB)["jobs"]["image"]["steps"] if "trivy" in step.get("uses", ""))["with"]
    other = load(GITLAB)["scan"]
    assert other["image"]["name"].endswith(":" + scan["version"].lstrip("v"))
    [command] = other["script"]
    assert f"--ignorefile {IGNORED} " in command
    assert scan["trivyignores"] == IGNORED
    assert "--severity CRITICAL --ignore-unfixed " in command
    assert (scan["severity"], scan["ignore-unfixed"]) == ("CRITICAL", True)
    # Without an exit code it would only list what it finds.
    assert "--exit-code 1 " in command
    assert scan["exit-code"] == "1"


def test_what_the_scan_passes_over_is_of_one_package_and_has_a_reason() -> None:
    for finding in load(IGNORED)["vulnerabilities"]:
        assert finding["purls"]
        assert finding["statement"]


@pytest.mark.parametrize(("status", "ends"), [(0, 0), (1, 1), (3, 0)])
def test_a_vulnerability_database_that_is_not_reached_is_reported_and_fails_nothing(
    tmp_path: Path, status: int, ends: int
) -> None:
    [github] = [step["run"] for step in load(GITHUB)["jobs"]["audit"]["steps"] if "run" in step]
    local = re.search(r"^audit\(\) \{.*?^\}$", text_of(".ci/run"), re.MULTILINE | re.DOTALL)
    assert local
    stub = f"#!/bin/sh\necho $@ >>{tmp_path}/calls\nexit {status}\n"
    for name in ("python3", ".venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(stub)
        (tmp_path / name).chmod(0o755)
    for script in (github, f"{local[0]}\naudit"):
        command = ["bash", "-eo", "pipefail", "-c", script]
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == ends
        assert ("not checked" in done.stdout.lower()) == (status == 3)
    assert (tmp_path / "calls").read_text() == 2 * "scripts/audit.py\n"
    assert load(GITLAB)["audit"]["script"][-1] == "python3 scripts/audit.py"
    assert load(GITLAB)["audit"]["allow_failure"] == {"exit_codes": 3}


def test_a_job_may_only_read_unless_it_pushes_a_tag_or_proposes_new_bases() -> None:
    workflow = load(GITHUB)
    assert workflow["permissions"] == READ_ONLY
    for name, job in workflow["jobs"].items():
        pushes = any("docker login" in line for line in lines(job))
        extra = {"packages": "write"} if pushes else {}
        if name == "bases":
            extra = {"contents": "write", "pull-requests": "write", "actions": "write"}
            assert job["if"] == "github.event_name == 'schedule'"
        assert job.get("permissions", READ_ONLY) == {**READ_ONLY, **extra}
        assert not pushes or job["if"] == "github.ref_type == 'tag'"


@pytest.mark.parametrize("name", [GITHUB, GITLAB], ids=["github", "gitlab"])
def test_every_week_the_images_are_built_and_the_digests_of_the_bases_looked_up(name: str) -> None:
    content = load(name)
    if name == GITHUB:
        [schedule] = content["on"]["schedule"]
        assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", schedule["cron"])
        assert content["jobs"]["image"]["if"] == "github.ref_type != 'tag'"  # so by the schedule too
        proposes = content["jobs"]["bases"]
    else:
        proposes = content["bases"]
        assert "rules" not in content["build"]
    assert make_calls(proposes) == [(set(), ["lock-base"])]
    said = lines(proposes)
    assert said.index("git add locks/bases.txt") < next(n for n, line in enumerate(said) if "git push" in line)
    assert any("diff --cached --quiet" in line for line in said)


def test_dependabot_changes_actions_and_no_lock() -> None:
    updates = {entry["package-ecosystem"]: entry for entry in load(".github/dependabot.yml")["updates"]}
    assert set(updates) == {"github-actions", "pip"}
    assert updates["pip"]["open-pull-requests-limit"] == 0
    assert updates["pip"]["ignore"] == [{"dependency-name": "*"}]
    assert "/locks" in updates["pip"]["directories"]


def test_nothing_is_pushed_that_no_test_and_no_scan_has_seen() -> None:
    jobs = load(GITHUB)["jobs"]
    publish = jobs["publish"]
    assert {"test", "test-image"} <= set(publish["needs"])
    done = [step.get("uses", step.get("run", "")) for step in publish["steps"]]
    scanned = next(number for number, step in enumerate(done) if "trivy" in step)
    assert scanned < next(number for number, step in enumerate(done) if "make push" in step)
    assert jobs["join"]["needs"] == "publish"


def test_the_joined_name_is_that_of_the_pushed_images(tmp_path: Path) -> None:
    """Both ask names.sh; the job has no image that it could read the base from."""
    [script] = [step["run"] for step in load(GITHUB)["jobs"]["join"]["steps"] if step.get("name") == "Join"]
    (tmp_path / "docker").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "docker").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "REGISTRY": "ghcr.io/x", "TARGET": "npu"}
    command = ["bash", "-eo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    tag = f"ghcr.io/x/openpangu-sft:{__version__}-cann8.0.rc3-torch_npu2.1.0.post8-910b"
    assert done.stdout.splitlines()[0] == f"buildx imagetools create --tag {tag} {tag}-amd64 {tag}-arm64"


def test_every_job_ends_some_time() -> None:
    assert all(job["timeout-minutes"] <= 180 for job in load(GITHUB)["jobs"].values())
    assert load(GITLAB)["default"]["timeout"]


def test_gitlab_has_the_stages_that_its_jobs_name() -> None:
    content = load(GITLAB)
    assert {*entries(content, "stage")} == {*content["stages"]}
