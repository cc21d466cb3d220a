"""`make sources`: the pinned commits, patched, the same anywhere; whole or not at all; refusals in words."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import PATIENCE, ROOT
from openpangu_sft.artifacts.artifact import MANIFEST, Manifest, read_manifest, staged_directory
from openpangu_sft.training.mindspeed.sources import PATCHES, VARIABLES, make_sources, read_pins
from parameter_ids import named_by
from refusals import refusal_of
from small_upstream import COMMITTED, CONFIG, FILES, SmallUpstream, listing, run_git

# What is made.


def test_the_pinned_commits_although_the_branches_have_moved_on(small: SmallUpstream) -> None:
    manifest, made = small.make()
    assert made
    expected = {f"{name}/{file}": text for name, files in FILES.items() for file, text in files.items()}
    for folder in ("megatron-lm", "mindspeed-llm"):
        expected[f"{folder}/{CONFIG}"] = "a = 1\nb = 22\nc = 3\n"
    files = {str(path.relative_to(small.target)): path for path in small.target.rglob("*") if path.is_file()}
    assert {name: path.read_bytes().decode() for name, path in files.items() if name != MANIFEST} == expected
    assert small.left() == {".sources"}

    assert manifest == read_manifest(small.target, "sources", "")
    assert manifest.settings == {
        name: {"commit": pin["commit"], "patches": pin["patches"]} for name, pin in small.pins.items()
    }
    assert list(manifest.inputs) == ["patches/megatron-lm/0001.patch"]
    assert manifest.counts["megatron-lm"] == {"files": 4, "committed": COMMITTED["megatron-lm"]}
    assert str(small.root) not in (small.target / MANIFEST).read_text("utf-8")


def test_modes_and_times_are_those_of_the_commits(small: SmallUpstream) -> None:
    small.make()
    found = {name: (mode, time_ns // 10**9) for name, (mode, time_ns, _) in listing(small.target).items()}
    megatron, llm = COMMITTED["megatron-lm"], COMMITTED["mindspeed-llm"]
    assert found["megatron-lm/pretrain.py"] == ("0o100755", megatron)
    assert found["megatron-lm/LICENSE"] == ("0o100644", megatron)
    assert found["mindspeed"] == ("0o40755", COMMITTED["mindspeed"])
    assert found["mindspeed-llm/megatron"] == found["mindspeed-llm/megatron/core"] == ("0o40755", megatron)
    assert found["mindspeed-llm/convert_ckpt.py"] == ("0o100644", llm)
    assert found["."] == ("0o40755", llm)
    assert found[MANIFEST] == ("0o100644", llm)


HOSTILE = """
[core]
    autocrlf = true
    eol = crlf
    hooksPath = {0}/hooks
    attributesFile = {0}/attributes
    fileMode = false
    sharedRepository = 0666
[init]
    templateDir = {0}/template
[apply]
    whitespace = error-all
[filter "shout"]
    smudge = tr a-z A-Z
[tag]
    gpgSign = true
[log]
    showSignature = true
[fetch]
    recurseSubmodules = true
[safe]
    bareRepository = explicit
"""


def test_two_runs_give_the_same_tree_whatever_the_settings_of_git_and_umask(
    small: SmallUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.make()
    first = listing(small.target)
    home = tmp_path / "home"
    for name in ("hooks/post-checkout", "hooks/reference-transaction", "template/hooks/post-checkout"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("#!/bin/sh\necho hooked >>LICENSE\nexit 1\n")
        (home / name).chmod(0o755)
    (home / "attributes").write_text("* filter=shout text=auto\n")
    (home / ".gitconfig").write_text(HOSTILE.format(home))
    monkeypatch.setenv("HOME", str(home))
    for name, value in {"DIR": "repositories/mindspeed/.git", "WORK_TREE": ".", "INDEX_FILE": "index"}.items():
        monkeypatch.setenv(f"GIT_{name}", str(tmp_path / value))  # as a hook has it
    monkeypatch.setenv("GIT_TEMPLATE_DIR", str(home / "template"))
    monkeypatch.setenv("GIT_CONFIG_PARAMETERS", "'core.autocrlf=true'")
    run_git(tmp_path, "init", "--quiet")  # below a clone, as it is in this project
    monkeypatch.chdir(tmp_path)
    umask = os.umask(0o077)
    try:
        make_sources(Path("a clone: mine/elsewhere"), Path("patches"))
    finally:
        os.umask(umask)
    assert listing(tmp_path / "a clone: mine/elsewhere") == first


# Made once.


def test_a_second_run_does_nothing_and_needs_nothing(small: SmallUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, _ = small.make()
    shutil.rmtree(small.root / "repositories")
    monkeypatch.setenv("PATH", str(small.root))
    inode = small.target.stat().st_ino
    assert small.make() == (manifest, False)
    assert small.target.stat().st_ino == inode


def test_another_patch_or_pin_makes_it_anew(small: SmallUpstream) -> None:
    small.make()
    small.add_patch("megatron-lm", "0001.patch", "b = 2", "b = 23")
    assert small.make()[1]
    assert small.config() == "b = 23"
    small.pins["mindspeed"]["commit"] = run_git(small.repository("mindspeed"), "rev-parse", "main")
    small.write_pins()
    manifest, made = small.make()
    assert made
    assert manifest.counts["mindspeed"]["files"] == 3
    assert (small.target / "mindspeed/README.md").is_file()
    assert not small.make()[1]


def test_another_order_of_patches_makes_it_anew(small: SmallUpstream) -> None:
    small.add_patch("megatron-lm", "0002.patch", "b = 22", "b = 2")
    small.make()
    assert small.config() == "b = 2"
    small.pins["megatron-lm"]["patches"].reverse()
    small.write_pins()
    assert "0002.patch: does not apply" in refusal_of(small.make)


@pytest.mark.parametrize("name", ["mindspeed/文件.txt", "mindspeed-llm/new.py", "mindspeed-llm/mindspeed_llm/link"])
@pytest.mark.parametrize("new_pins", [False, True])
def test_what_somebody_has_done_in_there_is_not_lost(small: SmallUpstream, name: str, new_pins: bool) -> None:
    small.make()
    path = small.target / name
    if path.name == "link":
        path.symlink_to("nowhere")
    else:
        path.write_text("my work\n", "utf-8")
    if new_pins:
        small.add_patch("megatron-lm", "0001.patch", "b = 2", "b = 23")
    what = "has been changed" if name in str(FILES) or "文件" in name else "was not made by make sources"
    assert f"{path}: {what}, and would be lost" in refusal_of(small.make)
    assert path.is_symlink() or path.read_text("utf-8") == "my work\n"


def test_bytecode_times_and_modes_are_corrected(small: SmallUpstream) -> None:
    small.make()
    first = listing(small.target)
    (small.target / "mindspeed/mindspeed/__pycache__").mkdir()
    (small.target / "mindspeed/mindspeed/__pycache__/x.pyc").touch()
    (small.target / "megatron-lm/LICENSE").touch()
    (small.target / "megatron-lm/pretrain.py").chmod(0o600)
    assert not small.make()[1]
    assert listing(small.target) == first


def test_what_is_incomplete_is_made_again(small: SmallUpstream) -> None:
    small.make()
    first = listing(small.target)
    (small.target / "mindspeed/文件.txt").unlink()
    assert small.make()[1]
    assert listing(small.target) == first


@pytest.mark.parametrize("content", ["a file of the user's", "another artifact"])
def test_another_folder_is_never_replaced(small: SmallUpstream, content: str) -> None:
    if content == "another artifact":
        with staged_directory(small.target, Manifest("hf")):
            pass
    else:
        small.target.mkdir(parents=True)
        (small.target / "mine").touch()
    before = listing(small.target)
    assert str(small.target) in refusal_of(small.make)
    assert listing(small.target) == before


# Whole or not at all.


@pytest.fixture
def slow_git(small: SmallUpstream, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git that hangs in the fetch of the last repository, and writes its process id to this file.

    It does so as long as there is a file `hold` beside that.
    """
    begun, programs = small.root / "begun", small.root / "programs"
    programs.mkdir()
    (small.root / "hold").touch()
    (programs / "git").write_text(
        f'#!/bin/sh\ncase "$*" in *fetch*mindspeed-llm*)\n'
        f"    [ ! -e {small.root}/hold ] || {{ echo $$ >{begun}; exec sleep 600; }};;\nesac\n"
        f'exec {shutil.which("git")} "$@"\n'
    )
    (programs / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return begun


@pytest.fixture
def started(small: SmallUpstream, slow_git: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a process that makes the sources; returns when it hangs in the middle."""

    def start() -> subprocess.Popen[str]:
        code = (
            "import sys; from pathlib import Path; from openpangu_sft.training.mindspeed.sources import make_sources\n"
        )
        code += "make_sources(*map(Path, sys.argv[1:]))"
        command = [sys.executable, "-c", code, str(small.target), str(small.patches)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        deadline = time.monotonic() + PATIENCE
        while not (slow_git.is_file() and slow_git.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return process

    yield start
    if slow_git.is_file() and Path("/proc", pid := slow_git.read_text().strip()).exists():
        os.kill(int(pid), signal.SIGKILL)


@pytest.mark.parametrize("earlier", [False, True])
def test_killed_in_the_middle_nothing_is_half(
    small: SmallUpstream, started: Callable[[], subprocess.Popen[str]], slow_git: Path, earlier: bool
) -> None:
    hold = small.root / "hold"
    if earlier:
        hold.unlink()
        small.make()
        hold.touch()
        small.add_patch("megatron-lm", "0001.patch", "b = 2", "b = 23")
    before = listing(small.target) if earlier else None
    process = started()
    assert (small.target.parent / "..sources.staging/mindspeed/mindspeed").is_dir()
    assert "another run is writing here" in refusal_of(small.make)
    process.kill()
    os.kill(int(slow_git.read_text()), signal.SIGKILL)
    process.communicate()
    assert (listing(small.target) if small.target.exists() else None) == before

    hold.unlink()
    assert small.make()[1]
    assert small.config() == ("b = 23" if earlier else "b = 22")
    assert small.left() == {".sources"}
    assert not small.make()[1]


def test_interrupted_it_leaves_nothing_and_ends_git(
    small: SmallUpstream, started: Callable[[], subprocess.Popen[str]], slow_git: Path
) -> None:
    process = started()
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=PATIENCE)[1]
    assert small.left() == set()
    deadline = time.monotonic() + PATIENCE  # it has been told to end; its new parent has to notice that it has
    while running(int(slow_git.read_text())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(int(slow_git.read_text()))


def running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Refusals.


def test_a_patch_that_does_not_fit(small: SmallUpstream) -> None:
    small.make()
    before = listing(small.target)
    small.add_patch("megatron-lm", "0002.patch", "b = 2", "b = 3")
    said = refusal_of(small.make)
    patch = small.patches / "megatron-lm/0002.patch"
    assert f"{patch}: does not apply to megatron-lm: error: patch failed: {CONFIG}:1" in said
    assert listing(small.target) == before
    assert small.left() == {".sources"}


def test_no_git(small: SmallUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(small.root))
    assert "git is not installed" in refusal_of(small.make)


@pytest.mark.parametrize("case", ["no package", "two packages"])
def test_sources_that_cannot_be_put_together(small: SmallUpstream, case: str) -> None:
    name = "mindspeed-llm" if case == "two packages" else "megatron-lm"
    repository = small.repository(name)
    if case == "two packages":
        small.write(name, "megatron/x.py", "")
    else:
        (repository / "megatron").rename(repository / "other")
        small.pins[name]["patches"] = []
    small.pins[name]["commit"] = small.commit(name, COMMITTED[name])
    small.write_pins()
    with pytest.raises(OSError, match=f"{name}/megatron"):
        small.make()
    assert small.left() == set()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"commit": "main"}, "mindspeed.commit: String should match pattern"),
        ({"commit": "969686f"}, "mindspeed.commit: String should match pattern"),
        ({"commit": 7}, "mindspeed.commit: Input should be a valid string"),
        ({"url": ""}, "mindspeed.url: String should have at least 1 character"),
        ({"mirrors": [""]}, "mindspeed.mirrors.0: String should have"),
        ({"tag": "v1"}, "mindspeed.tag: Extra inputs are not permitted"),
    ],
)
def test_a_pin_that_is_none(small: SmallUpstream, change: dict[str, object], said: str) -> None:
    small.pins["mindspeed"].update(change)
    small.write_pins()
    assert said in refusal_of(small.make)
    assert not small.target.parent.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    named_by(
        0,
        ("[mindspeed", "not TOML: "),
        ("\x00", "not TOML: "),
        ("", "has nothing, expected megatron-lm, mindspeed, mindspeed-llm"),
        ("[mindspeed]\n[other]", "has mindspeed, other, expected"),
        ("megatron-lm=1\nmindspeed=1\nmindspeed-llm=1", "megatron-lm: Input should be a valid dictionary"),
        (None, "no such file -> run from a clone"),
    ),
)
def test_a_file_that_pins_nothing(small: SmallUpstream, text: str | None, said: str) -> None:
    file = small.patches / "upstream.toml"
    file.unlink()
    if text is not None:
        file.write_text(text, "utf-8")
    line = refusal_of(small.make)
    assert line.startswith(f"{file}: ")
    assert said in line


# The command, and the real thing.


def test_the_command(small: SmallUpstream, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src/openpangu_sft", tmp_path / "clone/src/openpangu_sft")
    shutil.copytree(small.patches, tmp_path / "clone/patches")

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "openpangu_sft", "sources"],
            env={**os.environ, "PYTHONPATH": str(tmp_path / "clone/src"), "COLUMNS": "200"},
            capture_output=True,
            text=True,
        )

    first, second = run(), run()
    assert (first.returncode, first.stdout, second.returncode) == (0, "", 0), first.stderr
    commit = small.pins["megatron-lm"]["commit"][:12]
    for said in (first.stderr, second.stderr):
        assert re.search(rf"megatron-lm +│ {commit}, 4 files, patched: 0001 ", said)
    assert "fetching" in first.stderr
    assert "unchanged" not in first.stderr
    assert "fetching" not in second.stderr
    assert second.stderr.endswith("unchanged, not made again\n")
    assert small.target.is_dir()

    shutil.rmtree(small.target)
    shutil.rmtree(small.repository("mindspeed"))
    failed = run()
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith(
        f"openpangu-sft: mindspeed, commit {small.pins['mindspeed']['commit']}: "
    )
    assert "Traceback" not in failed.stderr
    assert not small.target.exists()


def test_every_patch_is_listed_and_names_its_upstream() -> None:
    listed = []
    for name, pin in read_pins().items():
        for patch in pin.patches:
            assert Path(patch).parent.name == name
            header, _, _ = (PATCHES / patch).read_text("utf-8").partition("diff --git")
            assert pin.commit in header
            listed.append(PATCHES / patch)
        assert [patch for patch in listed if patch.parent.name == name] == sorted((PATCHES / name).glob("*.patch"))
    assert sorted(listed) == sorted(PATCHES.rglob("*.patch"))


def test_the_real_ones(tmp_path: Path) -> None:
    missing = [variable for variable in VARIABLES.values() if not os.environ.get(variable)]
    if missing:
        pytest.skip(f"the upstream sources are not at hand: {', '.join(missing)} not set")
    manifest, _ = make_sources(tmp_path / "sources")
    for name, pin in read_pins().items():
        assert manifest.settings[name]["commit"] == pin.commit
    llm = tmp_path / "sources/mindspeed-llm"
    assert (llm / "convert_ckpt.py").is_file()
    code = "import dataclasses, json; from megatron.core.transformer.transformer_config import TransformerConfig as C\n"
    code += "print(json.dumps({field.name: repr(field.default) for field in dataclasses.fields(C)}))"
    environment = {**os.environ, "PYTHONPATH": str(llm), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert json.loads(printed.splitlines()[-1])["add_dense_bias"] == "False"
    assert not any(path.name == ".git" for path in (tmp_path / "sources").rglob("*"))
    assert not any(path.stat().st_mode & stat.S_IWOTH for path in (tmp_path / "sources").rglob("*"))
