"""The result of `make image`: reproducible, described, without traces of build-time secrets."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from image.engine import CANARY, ROOT, Engine, answers
from openpangu_sft import __version__


def test_two_builds_of_a_commit_are_equal(cpu_image: SimpleNamespace) -> None:
    last = cpu_image.said.splitlines()[-1]
    assert last.startswith("image-diff: two builds, ")
    assert last.endswith(" entries each, no difference")
    assert int(last.split()[3]) > 20_000


def test_labels(engine: Engine, bases: dict[str, str], cpu_image: SimpleNamespace) -> None:
    labels = engine.inspect(cpu_image.name)["Config"]["Labels"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout
    assert labels["org.opencontainers.image.revision"] == commit + ("-changed" if changed else "")
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.base.name"] == bases["CPU_BASE"]
    assert re.fullmatch(r"numpy 1\.\S+, torch 2\.1\.0\S*, transformers 4\.53\.2", labels["openpangu-sft.stack"])


def test_versions_and_sbom_are_in_the_image_and_in_dist(engine: Engine, cpu_image: SimpleNamespace) -> None:
    for kind in ("versions", "sbom"):
        inside = engine("run", "--rm", cpu_image.name, "cat", f"/opt/openpangu/{kind}.json")
        assert inside == (ROOT / f"dist/openpangu-sft-{__version__}-cpu.{kind}.json").read_text("utf-8").strip()
    sbom = json.loads(inside)
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.5")
    listed = {component["name"].lower().replace("_", "-"): component for component in sbom["components"]}
    asked = engine("run", "--rm", cpu_image.name, "python", "-c", INSTALLED)
    for line in asked.splitlines():
        name, version = line.split()
        assert listed[name.lower().replace("_", "-")]["version"] == version
    assert listed["transformers"]["version"] == "4.53.2"
    assert listed["torch"]["version"].startswith("2.1.0")
    assert listed["torch"]["licenses"]


INSTALLED = "from importlib.metadata import distributions as d\nfor x in d(): print(x.metadata['Name'], x.version)"


def test_no_secret_is_in_any_layer(engine: Engine, cpu_image: SimpleNamespace, place: Path) -> None:
    history = engine("history", "--no-trunc", "--format", "{{.CreatedBy}}", cpu_image.name)
    assert CANARY not in history + json.dumps(engine.inspect(cpu_image.name))
    names, found = set(), []
    for name, content in files_above_the_base(engine, cpu_image.name, place):
        names.add(name)
        if CANARY.encode() in content:
            found.append(name)
    assert found == []
    assert "opt/openpangu/venv/bin/python" in names
    for left in ("build", "tree", "tmp/", "root/.cache", "run/secrets", "var/cache"):
        assert not [name for name in names if name.startswith(left)]
    assert not [name for name in names if name.endswith(".pyc")]


def files_above_the_base(engine: Engine, image: str, place: Path) -> Iterator[tuple[str, bytes]]:
    """Every file of every layer except the first one, the base."""
    saved = subprocess.Popen([engine.client, "save", image], stdout=subprocess.PIPE)
    assert saved.stdout is not None
    with tarfile.open(fileobj=saved.stdout, mode="r|") as archive:
        layers: dict[str, Path] = {}
        for entry in archive:
            stream = archive.extractfile(entry) if entry.isfile() else None
            if entry.name == "manifest.json":
                assert stream is not None
                order = json.load(io.BytesIO(stream.read()))[0]["Layers"]
            elif stream is not None and entry.size > 10_000:
                layers[entry.name] = place / f"layer{len(layers)}"
                with layers[entry.name].open("wb") as file:
                    while block := stream.read(1 << 20):
                        file.write(block)
    assert saved.wait() == 0
    for layer in order[1:]:
        with tarfile.open(layers[layer]) as archive:
            for entry in archive:
                stream = archive.extractfile(entry) if entry.isfile() else None
                yield entry.name, stream.read() if stream else b""


def test_code_cannot_be_written_by_the_user(engine: Engine, cpu_image: SimpleNamespace) -> None:
    find = "find /opt/openpangu -writable ! -type l | head"
    command = ["run", "--rm", "--env", "HOST_UID=4711", "--env", "HOST_GID=4712", cpu_image.name]
    assert engine(*command, "sh", "-c", find) == ""
    assert engine(*command, "sh", "-c", "id -u; touch /tmp/mine ~/mine && echo can") == "4711\ncan"
    status = engine(*command, "grep", "-E", "^(Uid|Gid|Groups|NoNewPrivs|CapEff)", "/proc/self/status")
    found = {name: values.split() for name, _, values in (line.partition(":") for line in status.splitlines())}
    assert (found["Uid"], found["Gid"], found["Groups"]) == (["4711"] * 4, ["4712"] * 4, ["4712"])
    assert (found["NoNewPrivs"], found["CapEff"]) == (["1"], ["0" * 16])


@pytest.mark.parametrize("command", [["openpangu-sft", "--version"], []])
def test_it_starts(engine: Engine, cpu_image: SimpleNamespace, command: list[str]) -> None:
    said = engine("run", "--rm", "--network", "none", cpu_image.name, *command)
    assert said == __version__ if command else "Usage: openpangu-sft" in said


def test_the_recipes_are_found_from_any_directory(engine: Engine, cpu_image: SimpleNamespace) -> None:
    done = subprocess.run(
        [engine.client, "run", "--rm", cpu_image.name, "openpangu-sft", "merge"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("openpangu-sft: /cache/")


SOURCE = "http://deb.debian.org/debian/pool/main/p/python3.9/python3.9_3.9.2.orig.tar.xz"
SOURCE_SHA256 = "3c2034c54f811448f516668dce09d24008a0716c3a794dd8639b5388cbde247d"


TOOLS = "bin/find bin/xargs bin/perl* bin/setpriv bin/getent bin/getconf bin/awk bin/mawk sbin/useradd sbin/groupadd"
BARE = f"FROM {{base}}\nRUN cd /usr && rm -r {TOOLS}\n"


@pytest.fixture(scope="module")
def newer(engine: Engine, bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base with other libraries than BUILD_BASE and without Python; like openEuler's, without most tools."""
    if bases["BUILD_BASE"] != "openpangu-test/build":
        pytest.skip("the bases were not created here")
    return engine.debootstrap(
        tmp_path_factory.mktemp("newer"), "openpangu-test/newer", "ca-certificates", "", "bookworm"
    )


def test_another_python_source_is_refused(engine: Engine, bases: dict[str, str]) -> None:
    if not answers(SOURCE):
        pytest.skip(f"{SOURCE} is not reachable")
    given = {"BUILD_BASE": bases["BUILD_BASE"], "PYTHON_URL": SOURCE, "PYTHON_SHA256": "0" * 64}
    arguments = [part for pair in given.items() for part in ("--build-arg", "=".join(pair))]
    done = subprocess.run(
        [engine.client, "build", "--target", "python-source", *arguments, "."],
        cwd=ROOT,
        env={**engine.environment, "DOCKER_BUILDKIT": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "does not match PYTHON_SHA256" in done.stdout + done.stderr


def test_a_base_needs_no_python_and_no_tools(engine: Engine, newer: str, given: dict[str, str], place: Path) -> None:
    """Compiles Python from a 3.9 on Debian's mirrors, because python.org is not reachable everywhere."""
    if not answers(SOURCE):
        pytest.skip(f"{SOURCE} is not reachable")
    bare, image = "openpangu-test/bare", f"openpangu-sft:{__version__}-test-bare"
    engine("build", "--tag", bare, "-", text=BARE.format(base=newer))
    python = {"PYTHON_URL": SOURCE, "PYTHON_SHA256": SOURCE_SHA256}
    done = engine.make("image", "TARGET=cpu", BASE=bare, TAG=image, **given, **python)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    try:
        # as the owner of /cache, with libraries of BUILD_BASE that this base lacks
        os.chown(place, 4711, 4712)
        program = (
            "import sys, ssl, ctypes, os; print(sys.version); print(ssl.OPENSSL_VERSION); os.system('id -u; id -g')"
        )
        said = engine("run", "--rm", "--volume", f"{place}:/cache", image, "python", "-c", program).splitlines()
        assert said[0].startswith("3.9.2 (default, Jan  1 1970, 00:00:00)")
        assert said[-3].startswith("OpenSSL 1.1.1")
        assert said[-2:] == ["4711", "4712"]
        listed = json.loads(engine("run", "--rm", image, "cat", "/opt/openpangu/sbom.json"))["components"]
        assert {"libssl1.1", "libffi7"} <= {component["name"] for component in listed}
        assert (
            engine("run", "--rm", image, "sh", "-c", "yes | head -n 1; command -v find setpriv getent || true") == "y"
        )
    finally:
        engine("rmi", image, bare)


def test_a_build_base_that_is_newer_than_the_base_is_refused(
    engine: Engine, newer: str, bases: dict[str, str], given: dict[str, str]
) -> None:
    older = bases["BUILD_BASE"]  # its 3.9 cannot create environments, so one would be compiled
    done = engine.make("image", "TARGET=cpu", **{**given, "BASE": older, "BUILD_BASE": newer})
    assert done.returncode != 0
    assert f"{newer} has glibc 2.36 and {older} glibc 2.31" in done.stderr
    assert "-> use an older one, BUILD_BASE=docker.io/library/buildpack-deps:bullseye" in done.stderr
