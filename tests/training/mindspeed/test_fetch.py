"""Where `make sources` fetches from: mirrors, servers that refuse, other places; and what of the user's reaches git."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from openpangu_sft.training.mindspeed.sources import VARIABLES
from refusals import refusal_of
from small_upstream import SmallUpstream, run_git

NOBODY_THERE = "http://127.0.0.1:9/x"


def pin(small: SmallUpstream, **changes: object) -> str:
    """Changes what is pinned of MindSpeed; gives the commit."""
    small.pins["mindspeed"].update(changes)
    small.write_pins()
    return str(small.pins["mindspeed"]["commit"])


def test_mirrors_are_asked_in_their_order(small: SmallUpstream, capsys: pytest.CaptureFixture[str]) -> None:
    place, other = str(small.repository("mindspeed")), str(small.repository("mindspeed-llm"))
    pin(small, url=NOBODY_THERE, mirrors=[other, place, "/never/asked"])
    small.make()
    asked = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mindspeed:")]
    assert [line.rsplit(" ", 1)[1] for line in asked] == [NOBODY_THERE, other, place]


def test_no_place_answers(small: SmallUpstream, capsys: pytest.CaptureFixture[str]) -> None:
    commit = pin(small, url=NOBODY_THERE, mirrors=["/no/such/folder", f"file://{small.patches}"])
    said = refusal_of(small.make)
    assert said.startswith(f"mindspeed, commit {commit}: {NOBODY_THERE}: fatal: unable to access")
    assert "; /no/such/folder: fatal: '/no/such/folder' does not appear to be a git repository" in said
    assert f"; file://{small.patches}: fatal: " in said
    assert said.endswith(
        " -> check the network; or name a repository that has this commit: make sources MINDSPEED_URL=…"
    )
    assert "branch" not in capsys.readouterr().err  # asked once each
    assert small.left() == set()


@pytest.mark.parametrize("what", ["no such commit", "a tag", "a tree"])
def test_what_is_pinned_is_not_a_commit_there(small: SmallUpstream, what: str) -> None:
    repository = small.repository("mindspeed")
    run_git(repository, "tag", "-a", "-m", "x", "v1")
    names = {"a tag": "refs/tags/v1", "a tree": "HEAD^{tree}"}
    commit = run_git(repository, "rev-parse", names[what]) if what in names else "0123456789" * 4
    pin(small, commit=commit)
    assert f"mindspeed, commit {commit}: " in refusal_of(small.make)
    assert small.left() == set()


# Servers that give by its id only what a branch points to.


@pytest.fixture
def refusing(small: SmallUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallUpstream:
    """The first protocol has this rule; the second lets anything be asked for."""
    (tmp_path / "gitconfig").write_text("[protocol]\nversion = 0\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    run_git(small.repository("mindspeed"), "config", "uploadpack.allowAnySHA1InWant", "false")
    pin(small, url=f"file://{small.repository('mindspeed')}")
    return small


def test_a_server_that_refuses_ids_is_asked_for_the_branch(
    refusing: SmallUpstream, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing.make()
    assert not (refusing.target / "mindspeed/README.md").exists()  # of the branch's tip
    assert (
        f"branch main, to look for it there, from file://{refusing.repository('mindspeed')}" in capsys.readouterr().err
    )


def test_a_server_that_refuses_ids_and_has_the_commit_in_no_branch(refusing: SmallUpstream) -> None:
    repository = refusing.repository("mindspeed")
    run_git(repository, "checkout", "--quiet", "--orphan", "aside")
    commit = pin(refusing, commit=refusing.commit("mindspeed", 10**9))
    run_git(repository, "checkout", "--quiet", "main")
    run_git(repository, "branch", "-D", "aside")
    said = refusal_of(refusing.make)
    assert "Server does not allow request for unadvertised object" in said
    assert f"; branch main: fatal: Not a valid object name {commit}" in said
    pin(refusing, branch="gone")
    assert "; branch gone: fatal: couldn't find remote ref refs/heads/gone" in refusal_of(refusing.make)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class WantsPassword(Quiet):
    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="x"')
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def serve(small: SmallUpstream, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[type[Quiet]], str]]:
    """Serves the folder of the repositories over HTTP; gives host and port."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(handler: type[Quiet]) -> str:
        directory = str(small.root / "repositories")
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=directory))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_files_on_a_plain_web_server(small: SmallUpstream, serve: Callable[[type[Quiet]], str]) -> None:
    run_git(small.repository("mindspeed"), "update-server-info")
    pin(small, url=f"http://{serve(Quiet)}/mindspeed/.git")
    small.make()
    assert not (small.target / "mindspeed/README.md").exists()


def test_a_server_that_wants_a_password_is_not_waited_for_and_none_is_shown(
    small: SmallUpstream, serve: Callable[[type[Quiet]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    host = serve(WantsPassword)
    pin(small, url=f"http://{host}/mindspeed", mirrors=[f"http://me:secret@{host}/mindspeed"])
    said = refusal_of(small.make)
    assert (
        f"http://{host}/mindspeed: fatal: could not read Username for 'http://{host}': terminal prompts disabled"
        in said
    )
    assert "secret" not in said + capsys.readouterr().err


# Other places.


def bare(small: SmallUpstream) -> str:
    run_git(small.root, "clone", "--quiet", "--bare", str(small.repository("mindspeed")), "bare.git")
    return str(small.root / "bare.git")


def shallow(small: SmallUpstream) -> str:
    place = small.root / "shallow"
    place.mkdir()
    run_git(place, "init", "--quiet")
    url, commit = f"file://{small.repository('mindspeed')}", pin(small)
    run_git(place, "fetch", "--quiet", "--depth=1", url, commit)
    return str(place)


def linked_worktree(small: SmallUpstream) -> str:
    run_git(small.repository("mindspeed"), "worktree", "add", "--quiet", "--detach", str(small.root / "tree"))
    return str(small.root / "tree")


def bundle(small: SmallUpstream) -> str:
    run_git(small.repository("mindspeed"), "bundle", "create", "--quiet", str(small.root / "x.bundle"), "main")
    return str(small.root / "x.bundle")


def relative(small: SmallUpstream) -> str:
    os.chdir(small.root)
    return "repositories/mindspeed"


def in_home(small: SmallUpstream) -> str:
    os.environ["HOME"] = str(small.root)
    return "~/repositories/mindspeed"


def of_another_user(small: SmallUpstream) -> str:
    if os.geteuid():
        pytest.skip("only root can give a file to another user")
    for path in [small.repository("mindspeed"), *small.repository("mindspeed").rglob("*")]:
        os.chown(path, 1234, 1234)
    return str(small.repository("mindspeed"))


def of_another_user_as_a_url(small: SmallUpstream) -> str:
    return f"file://{of_another_user(small)}"


PLACES = [bare, shallow, linked_worktree, bundle, relative, in_home, of_another_user, of_another_user_as_a_url]


@pytest.mark.parametrize("place", PLACES)
def test_a_variable_names_another_place(
    small: SmallUpstream, monkeypatch: pytest.MonkeyPatch, place: Callable[[SmallUpstream], str]
) -> None:
    monkeypatch.setenv("HOME", os.environ["HOME"])
    monkeypatch.chdir(small.root)
    monkeypatch.setenv("MINDSPEED_URL", place(small))
    pin(small, url=NOBODY_THERE)
    small.make()
    assert (small.target / "mindspeed/文件.txt").read_bytes().decode() == "以\r\n及\n"
    assert not (small.target / "mindspeed/README.md").exists()


@pytest.mark.parametrize("name", list(VARIABLES))
def test_each_repository_has_its_variable_and_only_that_place_is_asked(
    small: SmallUpstream, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    small.pins[name]["mirrors"] = [small.pins[name]["url"]]
    small.write_pins()
    monkeypatch.setenv(VARIABLES[name], "/no/such/folder")
    said = refusal_of(small.make)
    assert f"{name}, commit {small.pins[name]['commit']}: /no/such/folder: fatal: " in said
    assert said.endswith(f"make sources {VARIABLES[name]}=…")
    assert small.pins[name]["url"] not in said
    monkeypatch.setenv(VARIABLES[name], "")  # as make hands on what is not given
    small.make()


def test_an_address_is_never_taken_for_an_option(small: SmallUpstream, tmp_path: Path) -> None:
    pin(small, url=f"--upload-pack=touch {tmp_path}/harm;", mirrors=[f"ext::touch {tmp_path}/harm"])
    refusal_of(small.make)
    assert not (tmp_path / "harm").exists()


# What of the user's settings reaches git.


def test_proxies_certificates_and_rewritten_addresses_are_kept(
    small: SmallUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gitconfig").write_text(f'[url "{tmp_path}/repositories/"]\ninsteadOf = https://example.org/\n')
    noted, programs = tmp_path / "noted", tmp_path / "programs"
    programs.mkdir()
    (programs / "git").write_text(
        f'#!/bin/sh\ncase "$*" in *" fetch "*) env >{noted};; esac\nexec {shutil.which("git")} "$@"\n'
    )
    (programs / "git").chmod(0o755)
    kept = {"GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig"), "GIT_SSL_CAINFO": "/ca.pem", "GIT_SSH_COMMAND": "ssh -4"}
    kept.update(HTTPS_PROXY="http://proxy:1", SSL_CERT_FILE="/ca.pem", GIT_ASKPASS="/bin/true")
    lost = {"GIT_DIR": "/x", "GIT_INDEX_FILE": "/x", "GIT_OBJECT_DIRECTORY": "/x", "GIT_NAMESPACE": "x"}
    for name, value in {**kept, **lost, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    pin(small, url="https://example.org/mindspeed")
    small.make()
    environment = dict(line.split("=", 1) for line in noted.read_text().splitlines() if "=" in line)
    assert {name: environment.get(name) for name in kept} == kept
    assert environment["GIT_TERMINAL_PROMPT"] == "0"
    assert environment["GIT_DIR"].startswith(str(small.target.parent))
    assert not environment.keys() & lost.keys() - {"GIT_DIR"}


def test_on_a_terminal_it_shows_what_git_does(small: SmallUpstream) -> None:
    code = "import sys; from pathlib import Path; from openpangu_sft.training.mindspeed.sources import make_sources\n"
    code += "make_sources(*map(Path, sys.argv[1:]))"
    master, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(small.target), str(small.patches)],
        stderr=terminal,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(terminal)
    shown = b""
    try:
        while block := os.read(master, 4096):
            shown += block
    except OSError:  # how the end of a terminal shows
        pass
    os.close(master)
    assert process.wait() == 0, shown.decode()
    assert b"mindspeed: fetching" in shown
    assert "⠋".encode() in shown


def test_errors_of_the_disk_are_not_git_errors(small: SmallUpstream) -> None:
    small.target.parent.touch()
    with pytest.raises(OSError, match="clone"):
        small.make()
