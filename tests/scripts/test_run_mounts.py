"""scripts/run.sh: which folders of the host its container is given, and under which names."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from docker_host import CPU, Host, host
from parameter_ids import named_by

__all__ = ["host"]


def test_cache_and_named_paths_are_mounted(host: Host, tmp_path: Path) -> None:
    for name in ("cache", "data/raw", "models"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models/recipe.yaml").touch()
    inside = str(host.folder / "out.html")
    named = ["--recipe", f"{tmp_path}/models/recipe.yaml", "--set", f"paths.raw={tmp_path}/data/raw"]
    named += [
        f"--set=paths.shards={tmp_path}/data/raw/a=/b",
        f"--set=paths.samples={tmp_path}/data/raw/new",
        f"--html={inside}",
        "--set",
        "paths.run=/cache/run",
    ]
    assert host.run("preview", *named, "--prompt=/etc/passwd?", IMAGES=CPU, CACHE=f"{tmp_path}/cache").returncode == 0
    wanted = [str(host.folder), f"{tmp_path}/models", f"{tmp_path}/data/raw"]
    assert host.mounts() == [*((path, path) for path in wanted), (f"{tmp_path}/cache", "/cache")]


@pytest.mark.parametrize(
    ("argument", "mounted"),
    [
        ("--run=../other/run", "other/run"),
        ("--prompts=../p.txt", ""),
        ("--html=../other/new.html", "other"),
        ("--set=paths.raw=../other/run", "other/run"),
        ("paths.raw=../other/run", "other/run"),  # after --set
        ("paths.raw=recipes/../../other", "other"),
        ("../other/run/a=b", "other/run"),
        ("--run=./../other/", "other"),
        ("--cache=..", ""),
        ("--run={folder}/../other/run", "other/run"),
    ],
)
def test_a_path_that_leads_out_of_this_directory_is_mounted(
    host: Host, tmp_path: Path, argument: str, mounted: str
) -> None:
    """Inside it leads there too: the working directory is the same."""
    (tmp_path / "other/run").mkdir(parents=True)
    (tmp_path / "p.txt").touch()
    argument = argument.format(folder=host.folder)
    assert host.run("report", argument, IMAGES=CPU).returncode == 0
    other = str(tmp_path / mounted)
    assert host.mounts() == [(str(host.folder), str(host.folder)), (other, other)]
    assert host.called_with()[-1] == argument


@pytest.mark.parametrize(
    "argument", ["--run=runs/a", "--run=..a/b", "runs/a..", "--set=data.x=a/..b/c", "--prompt=../../etc?"]
)
def test_what_lies_below_this_directory_or_is_no_path_is_not_mounted(host: Host, argument: str) -> None:
    assert host.run("report", argument, IMAGES=CPU).returncode == 0
    assert host.mounts() == [(str(host.folder), str(host.folder))]


def test_a_path_that_leads_out_of_a_directory_behind_a_link(host: Host, tmp_path: Path) -> None:
    """There .. leads up from the directory itself, and inside there is no link."""
    (tmp_path / "other").mkdir()
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere/link"
    link.symlink_to(host.folder)
    command = f"cd {link} && scripts/run.sh openpangu-sft report --run=../other"
    done = subprocess.run(["bash", "-c", command], env={**host.environment, "IMAGES": CPU}, capture_output=True)
    assert done.returncode == 0
    assert host.mounts() == [(str(path), str(path)) for path in (host.folder, tmp_path / "other")]
    assert host.given("--workdir") == [str(host.folder)]


@pytest.mark.parametrize("name", ["a:b", "a,b", 'a "b"', "a=b,c", "源 数据"])
def test_a_path_of_any_characters_is_mounted(tmp_path: Path, name: str) -> None:
    for directory in ("raw", "cache"):
        (tmp_path / name / directory).mkdir(parents=True)
    host = Host(tmp_path / name / "host")
    given = {"IMAGES": CPU, "CACHE": f"{tmp_path}/{name}/cache"}
    assert host.run("format", f"--set=paths.raw={tmp_path}/{name}/raw", **given).returncode == 0
    raw = f"{tmp_path}/{name}/raw"
    assert host.mounts() == [(str(host.folder), str(host.folder)), (raw, raw), (f"{tmp_path}/{name}/cache", "/cache")]


def test_paths_in_variables_are_mounted(host: Host, tmp_path: Path) -> None:
    for name in ("other/run", "data", "hf"):
        (tmp_path / name).mkdir(parents=True)
    given = {
        "OPENPANGU_RUN": "../other/run",
        "OPENPANGU_HTML": f"{tmp_path}/data/a=b.html",
        "OPENPANGU_PROMPT": "/etc/x",
    }
    given["OPENPANGU_SET"] = f" train.lr=1e-5  paths.hf={tmp_path}/hf\nparallel.nodes=4"
    done = host.run("report", IMAGES=CPU, MAKE_OPTIONS="RUN HTML PROMPT SET", **given)
    assert done.returncode == 0, done.stderr
    assert {path for path, _ in host.mounts()[1:]} == {str(tmp_path / name) for name in ("other/run", "data", "hf")}


@pytest.mark.parametrize(
    ("path", "message"),
    named_by(
        0,
        ("/no/such/file", "/no/such does not exist, so it cannot be mounted -> create it first"),
        ("/etc/hosts", "/etc/hosts: /etc is not mounted into a container -> use an existing directory below it"),
        ("/new", "/new: / is not mounted into a container -> use an existing directory below it"),
    ),
)
def test_paths_that_are_not_mounted(host: Host, path: str, message: str) -> None:
    done = host.run("format", "--set", f"paths.raw={path}", IMAGES=CPU)
    assert (done.returncode, done.stderr) == (1, f"openpangu-sft: {message}\n")
