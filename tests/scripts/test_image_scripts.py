"""Scripts of the image: description, comparison, build, push, and the entrypoint's user."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from openpangu_sft import __version__

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts/image"


def tree(*entries: dict[str, Any]) -> str:
    """The listing of an archive with these entries."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for entry in entries:
            content = entry.pop("content", b"")
            info = tarfile.TarInfo(entry.pop("name"))
            info.size = len(content)
            for key, value in entry.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    done = subprocess.run(
        [sys.executable, SCRIPTS / "tree.py"], input=archive.getvalue(), capture_output=True, check=True
    )
    return done.stdout.decode()


def test_a_tree_does_not_depend_on_the_order_of_its_archive() -> None:
    first, second = {"name": "b", "content": b"1"}, {"name": "a", "type": tarfile.DIRTYPE}
    assert tree(dict(first), dict(second)) == tree(second, first)


@pytest.mark.parametrize(
    "change",
    [
        {"content": b"other"},
        {"mode": 0o755},
        {"uid": 1},
        {"gid": 1},
        {"mtime": 1},
        {"name": "g"},
        {"type": tarfile.SYMTYPE, "linkname": "x"},
    ],
)
def test_every_difference_of_a_file_changes_the_tree(change: dict[str, Any]) -> None:
    file = {"name": "f", "content": b"first", "mode": 0o644}
    assert tree({**file}) != tree({**file, **change})


def test_files_created_by_the_engine_are_ignored() -> None:
    assert tree({"name": "etc/hosts", "content": b"1"}, {"name": ".dockerenv"}) == ""


def test_an_image_is_described(tmp_path: Path) -> None:
    packages = [{"type": "library", "name": "torch", "version": "2.1.0", "bom-ref": "torch"}]
    (tmp_path / "packages.json").write_text(json.dumps({"bomFormat": "CycloneDX", "components": packages}))
    pin = {"commit": "c" * 40, "patches": ["megatron-lm/0001-x.patch"]}
    (tmp_path / "sources.json").write_text(json.dumps({"settings": {"megatron-lm": pin}}))
    command = [sys.executable, SCRIPTS / "describe.py", "npu", "a" * 40, "base:1@sha256:00", "."]
    subprocess.run(command, cwd=tmp_path, check=True)
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert (versions["target"], versions["commit"], versions["base"]) == ("npu", "a" * 40, "base:1@sha256:00")
    assert versions["packages"] == {"torch": "2.1.0"}
    assert versions["upstream"] == {"megatron-lm": pin}
    sbom = json.loads((tmp_path / "sbom.json").read_text())
    assert [component["name"] for component in sbom["components"]] == ["torch", "base image", "CPython", "megatron-lm"]
    assert sbom["components"][-1]["pedigree"]["patches"][0]["diff"]["url"] == "patches/megatron-lm/0001-x.patch"
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["buildDefinition"]["resolvedDependencies"] == [
        {"uri": "docker://base:1", "digest": {"sha256": "00"}},
        {"uri": "pkg:generic/openpangu-sft", "digest": {"gitCommit": "a" * 40}},
        {"uri": "pkg:generic/megatron-lm", "digest": {"gitCommit": "c" * 40}},
    ]


def test_compose_starts_this_version() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    assert set(re.findall(r"VERSION:-([^}]*)}", text)) == {__version__}


def said_without_an_engine(folder: Path, script: str, **given: str) -> str:
    """The message of a script that fails because no Docker engine answers."""
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "VERSION").write_text("1\n")
    environment = {"PATH": "/usr/bin:/bin", "DOCKER": "false", **given}
    command = [folder / "scripts/image" / script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    return done.stderr


@pytest.mark.parametrize(
    ("script", "given", "message"),
    [
        ("push.sh", {}, "REGISTRY is not given -> make push REGISTRY=registry.example.org/team"),
        ("save.sh", {"LEVEL": "11"}, "LEVEL=11 is not a number from 1 to 9 -> omit it for 6"),
        ("save.sh", {"LEVEL": "-9"}, "LEVEL=-9 is not a number from 1 to 9 -> omit it for 6"),
        (
            "push.sh",
            {"REGISTRY": "x", "COSIGN_KEY": "k"},
            "COSIGN_KEY is given and cosign is not installed -> install it",
        ),
        ("build.sh", {"TARGET": "gpu"}, "TARGET=gpu is neither npu nor cpu -> choose one of them"),
        ("build.sh", {"ARCH": "x86"}, "ARCH=x86 is neither amd64 nor arm64 -> choose one of them"),
    ],
    ids=["no REGISTRY", "LEVEL=11", "LEVEL=-9", "no cosign", "TARGET=gpu", "ARCH=x86"],
)
def test_a_bad_value_is_reported_before_the_engine_is_asked(
    tmp_path: Path, script: str, given: dict[str, str], message: str
) -> None:
    assert said_without_an_engine(tmp_path, script, **given) == f"openpangu-sft: {message}\n"


@pytest.mark.parametrize("script", ["build.sh", "save.sh", "load.sh", "push.sh", "diff.sh", "lock_bases.sh"])
def test_no_engine_is_reported(script: str, tmp_path: Path) -> None:
    assert said_without_an_engine(tmp_path, script, REGISTRY="x").startswith(
        "openpangu-sft: no Docker engine answers ('false version' says why) -> install and start one"
    )


CANN = "quay.io/ascend/cann:"


@pytest.mark.parametrize(
    ("target", "base", "tag"),
    [
        ("npu", f"{CANN}8.0.rc3.beta1-910b-ubuntu22.04-py3.10", "cann8.0.rc3-torch_npu2.1.0.post8-910b"),
        (
            "npu",
            f"{CANN}8.0.rc3.beta1-910b-ubuntu22.04-py3.10@sha256:{'0' * 64}",
            "cann8.0.rc3-torch_npu2.1.0.post8-910b",
        ),
        (
            "npu",
            "mirror:5000/cann:8.0.rc3.beta1-910b-openeuler22.03-py3.10",
            "cann8.0.rc3-torch_npu2.1.0.post8-910b-openeuler22.03",
        ),
        ("npu", f"{CANN}8.1.rc1-a3-ubuntu22.04-py3.10", "cann8.1.rc1-torch_npu2.1.0.post8-a3"),
        ("npu", "localhost:5000/our-own", "torch_npu2.1.0.post8-npu"),
        ("cpu", "docker.io/library/python:3.9-slim-bookworm", "cpu"),
    ],
    ids=["ubuntu", "digest", "openeuler", "a3", "own base", "cpu"],
)
def test_a_published_tag_names_what_users_choose_by(target: str, base: str, tag: str) -> None:
    command = ["bash", "-euc", '. scripts/image/names.sh; published_tag "$1" "$2"', "-", target, base]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{__version__}-{tag}\n"


FAKE_DOCKER = """#!/bin/sh
case "$*" in
*revision*) echo aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ;;
*base.name*) echo quay.io/ascend/cann:8.0.rc3.beta1-910b-ubuntu22.04-py3.10 ;;
*Architecture*) echo arm64 ;;
*RepoDigests*) echo registry/other/openpangu-sft@sha256:11; echo registry/team/openpangu-sft@sha256:22 ;;
create*) echo container ;;
cp*) echo '{}' >"$3" ;;
push*) echo "docker $*" >>"$CALLS" ;;
esac
"""


def pushed(folder: Path, *tools: str, **given: str) -> tuple[list[str], str]:
    """Calls and messages of a push with these tools installed, which record their arguments."""
    (folder / "bin").mkdir()
    programs = {"docker": FAKE_DOCKER, **dict.fromkeys(tools, '#!/bin/sh\necho "${0##*/} $*" >>"$CALLS"\n')}
    for name, content in programs.items():
        (folder / "bin" / name).write_text(content)
        (folder / "bin" / name).chmod(0o755)
    calls = folder / "calls"
    environment = {"PATH": f"{folder}/bin:/usr/bin:/bin", "CALLS": str(calls), "REGISTRY": "registry/team/", **given}
    command = [ROOT / "scripts/image/push.sh"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return re.sub(r"/\S*/(\w+\.json)", r"\1", calls.read_text()).splitlines(), done.stderr


PUSHES = [
    f"docker push --quiet registry/team/openpangu-sft:{__version__}-cann8.0.rc3-torch_npu2.1.0.post8-910b-{suffix}arm64"
    for suffix in ("", "aaaaaaaaaaaa-")
]
DIGEST = "registry/team/openpangu-sft@sha256:22"


def test_a_push_is_signed_with_a_key_and_carries_sbom_and_provenance(tmp_path: Path) -> None:
    calls, said = pushed(tmp_path, "cosign", "oras", COSIGN_KEY="env://KEY", COSIGN_FLAGS="--tlog-upload=false")
    signed = "--yes --key env://KEY --tlog-upload=false"
    assert calls == [
        *PUSHES,
        f"cosign sign {signed} {DIGEST}",
        f"cosign attest {signed} --type cyclonedx --predicate sbom.json {DIGEST}",
        f"cosign attest {signed} --type slsaprovenance1 --predicate provenance.json {DIGEST}",
    ]
    assert f"push: signed {DIGEST}" in said


def test_a_push_without_a_key_attaches_both_with_oras(tmp_path: Path) -> None:
    calls, said = pushed(tmp_path, "oras", "cosign")
    assert calls == [
        *PUSHES,
        f"oras attach --artifact-type application/vnd.cyclonedx+json {DIGEST} sbom.json:application/json",
        f"oras attach --artifact-type application/vnd.in-toto+json {DIGEST} provenance.json:application/json",
    ]
    assert "unsigned" in said


def test_a_push_without_either_names_the_sbom(tmp_path: Path) -> None:
    calls, said = pushed(tmp_path)
    assert calls == PUSHES
    assert "not attached -> give COSIGN_KEY, or install oras" in said


BUILDER = """#!/bin/sh
case "$*" in
*getconf*bullseye*) echo glibc 2.31 ;;
*getconf*openeuler*) echo glibc 2.34 ;;
*getconf*) echo glibc 2.35 ;;
*Architecture*) echo amd64 ;;
*Size*) echo 1 ;;
build*) echo "docker $*" >>"$CALLS" ;;
cp*) echo '{}' >"$3" ;;
*"-s /tmp/python") exit 1 ;; # the base has no Python
esac
"""


def built(folder: Path, **given: str) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """The calls of docker build by build.sh in a small clone, and its result."""
    clone = folder / "clone"
    for name in ("scripts", "locks", "patches"):
        shutil.copytree(ROOT / name, clone / name)
    for name in ("Dockerfile", "src/openpangu_sft/__init__.py"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    (clone / ".sources").mkdir()
    (clone / ".sources/manifest.json").write_text("{}")
    (folder / "bin").mkdir()
    (folder / "bin/docker").write_text(BUILDER)
    (folder / "bin/docker").chmod(0o755)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "x"]):
        subprocess.run([*git, *command], cwd=clone, check=True)
    calls = folder / "calls"
    calls.touch()
    environment = {"PATH": f"{folder}/bin:/usr/bin:/bin", "CALLS": str(calls), **given}
    script = [clone / "scripts/image/build.sh"]
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=environment)
    return calls.read_text().splitlines(), done


OPENEULER = f"{CANN}8.0.rc3.beta1-910b-openeuler22.03-py3.10"


def test_a_build_base_that_is_newer_than_the_base_is_refused_before_a_build(tmp_path: Path) -> None:
    calls, done = built(tmp_path, BASE=OPENEULER)
    assert (calls, done.returncode) == ([], 1)
    assert f"buildpack-deps:jammy has glibc 2.35 and {OPENEULER} glibc 2.34" in done.stderr
    assert "-> use an older one, BUILD_BASE=docker.io/library/buildpack-deps:bullseye" in done.stderr


def test_openeuler_is_built_with_an_older_build_base(tmp_path: Path) -> None:
    older = "docker.io/library/buildpack-deps:bullseye"
    [call], done = built(tmp_path, BASE=OPENEULER, BUILD_BASE=older)
    assert done.returncode == 0, done.stderr
    assert f"--build-arg BASE={OPENEULER} --build-arg PYTHON_FROM=source --build-arg BUILD_BASE={older}" in call
    assert "made for CANN" not in done.stderr
    assert "--platform" not in call


def test_another_machine_and_another_cann(tmp_path: Path) -> None:
    a3 = f"{CANN}8.1.rc1-a3-ubuntu22.04-py3.10"
    [call, *_], done = built(tmp_path, BASE=a3, ARCH="amd64")
    assert done.returncode == 0, done.stderr
    assert "--platform linux/amd64 " in call
    assert f"--tag openpangu-sft:{__version__}-npu-amd64 " in call
    assert f"torch_npu 2.1.0.post8 is made for CANN 8.0.RC3, the base is {a3} -> see docs/image.md" in done.stderr


def become_user(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOST_UID": "0", "HOST_GID": "0"}
    program = [sys.executable, "-IB", str(SCRIPTS / "become_user.py"), *command]
    return subprocess.run(program, capture_output=True, text=True, check=False, env=environment)


def test_a_command_in_the_container_is_run_as_a_shell_would() -> None:
    assert become_user("sh", "-c", "exit 7").returncode == 7
    done = become_user("no-such-command")
    assert (done.returncode, done.stderr) == (127, "openpangu-sft: no-such-command: No such file or directory\n")
    assert become_user("/etc/passwd").returncode == 126
    # Python ignores SIGPIPE, which the command would inherit
    assert become_user("bash", "-c", "yes | head -n 1; echo ${PIPESTATUS[0]}").stdout == "y\n141\n"
