"""Calls git so that the result does not depend on the user's environment.

Line endings, templates, filters, hooks or a call from a hook would change files, so commands on files see no
configuration at all. Commands on the network keep the user's (proxies, certificates, rewritten addresses, credentials)
and never prompt.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Callable, Optional

from openpangu_sft.util.console import console, say
from openpangu_sft.util.errors import UserError

_REACHES_OUT = re.compile(
    r"GIT_(SSL_|PROXY_|HTTP_|SSH|ASKPASS|ALLOW_PROTOCOL|EXEC_PATH|CONFIG_(GLOBAL|SYSTEM|NOSYSTEM|COUNT|KEY_|VALUE_))"
)
"""The only variables of git that are kept, not a hook's GIT_DIR, GIT_INDEX_FILE and so on."""

_SILENT_CONFIG = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
_SILENT_CONFIG.update(HOME=os.devnull, XDG_CONFIG_HOME=os.devnull)  # before 2.32 git knows no GIT_CONFIG_GLOBAL

_FETCH = ["-c", "gc.auto=0", "-c", "color.ui=false"]
_FETCH += ["-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=120"]  # gives up on a silent server
_FETCH += ["fetch", "--no-tags", "--no-recurse-submodules", "--progress"]

# Allows another user's repository, which was named on purpose; nothing in it is run. Git ignores this setting on the
# caller's command line and in a repository.
_LOCAL = ["--upload-pack", "git -c safe.directory='*' upload-pack"]

_PROGRESS = re.compile(r"(remote: )?(\w+ [\w ]+: +\d+|Total \d+)|From | \* |remote:\s*$")

_NOBODY_THERE = re.compile("unable to access|not found|does not appear|dubious ownership|Could not read from remote")


class GitFailed(Exception):
    """Git's error message, on one line."""


def require_git(purpose: str) -> None:
    """Raises `UserError` where git is not installed; `purpose` says what it is for."""
    if not shutil.which("git"):
        raise UserError(f"git is not installed: it {purpose}", remedy="install git")


def git(*arguments: str, folder: Path, repository: Optional[Path] = None) -> str:
    """Runs git in a folder with no configuration but the repository's; returns its output, stripped.

    `repository` is a bare one whose work tree the folder is; without it git sees no repository.
    Raises `GitFailed` where git exits with an error.
    """
    environment = {**_environment(), **_SILENT_CONFIG, "GIT_DEFAULT_HASH": "sha1"}
    # Without GIT_DIR it would find a clone further up, and `apply` would silently skip all files.
    environment["GIT_DIR"] = str(repository or os.devnull)
    if repository:
        environment["GIT_WORK_TREE"] = str(folder)
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        raise GitFailed(_one_line(done.stderr.decode(errors="replace").splitlines()))
    return done.stdout.decode(errors="replace").strip()


def check_out(folder: Path, repository: Path, urls: Sequence[str], commit: str, branch: str, remedy: str) -> int:
    """Puts a commit's files into a new folder, with its history in a bare `repository`; returns the commit's time.

    Raises `UserError`, with what each server said, where the commit is at none of the URLs.
    """
    folder.mkdir()
    try:
        git("init", "--quiet", "--bare", "--template=", str(repository), folder=folder)
        _fetch_any(repository, folder.name, urls, commit, branch)
        git("checkout", "--quiet", "--force", "--detach", commit, folder=folder, repository=repository)
        if (head := git("rev-parse", "HEAD", folder=folder, repository=repository)) != commit:
            raise GitFailed(f"{commit} is no commit, but a name for {head}")
        return int(git("show", "--no-patch", "--format=%ct", "HEAD", folder=folder, repository=repository))
    except GitFailed as failure:
        raise UserError(f"{folder.name}, commit {commit}: {failure}", remedy=remedy) from None


def _fetch_any(repository: Path, name: str, urls: Sequence[str], commit: str, branch: str) -> None:
    """Fetches the commit alone, by its id, from the first URL that has it.

    Some servers serve by id only the tip of a branch: after all URLs have been asked for the commit, they are asked
    for the branch.
    """
    failures: dict[str, str] = {}
    with console.status(name) as status:  # on a terminal only
        for by_id, url in product((True, False), urls):
            if not by_id and _NOBODY_THERE.search(failures[url]):  # another ref would fail too
                continue
            wanted = [commit, "--depth=1"] if by_id else [f"refs/heads/{branch}"]
            what = commit[:12] if by_id else f"branch {branch}, to look for it there,"
            say(f"{name}: fetching {what} from {_without_password(url)}")
            try:
                _fetch(repository, url, *wanted, note=lambda line: status.update(f"{name}: {line}"))
                git("cat-file", "-e", f"{commit}^{{commit}}", folder=repository, repository=repository)
                return
            except GitFailed as failure:
                failures[url] = str(failure) if by_id else f"{failures[url]}; branch {branch}: {failure}"
    raise GitFailed("; ".join(f"{_without_password(url)}: {failure}" for url, failure in failures.items()))


def _fetch(repository: Path, url: str, ref: str, *options: str, note: Callable[[str], object]) -> None:
    """Fetches a ref into a bare repository; raises `GitFailed` where git exits with an error.

    The URL is anything that git accepts, or a folder relative to the current one; `note` gets each line of progress.
    """
    source, local = _source(url)
    process = subprocess.Popen(
        ["git", *_FETCH, *local, *options, "--", source, ref],
        cwd=repository,
        env={**_environment(_REACHES_OUT), "GIT_DIR": str(repository), "GIT_TERMINAL_PROMPT": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",  # universal newlines: \r of a progress bar ends a line too
    )
    said = []
    try:
        assert process.stderr
        for line in process.stderr:
            if not _PROGRESS.match(line):
                said.append(line)
            note(line.strip())
        if process.wait():
            raise GitFailed(_one_line(said))
    finally:
        process.terminate()  # no effect where it has ended
        process.communicate()


def apply_patch(folder: Path, patch: Path, to: str, remedy: str) -> None:
    """Applies a patch in git's format to the files in a folder, completely or not at all.

    Raises `UserError` where it does not apply to this version (`to`): the patch, and in git's words file and line.
    """
    try:
        git("apply", str(patch.resolve()), folder=folder)
    except GitFailed as failure:
        raise UserError(f"does not apply to {to}: {failure}", where=patch, remedy=remedy) from None


def _environment(kept: Optional[re.Pattern[str]] = None) -> dict[str, str]:
    """This process's environment with English messages and, of git's variables, those that match `kept`."""
    names = (name for name in os.environ if not name.startswith("GIT_") or (kept and kept.match(name)))
    return {**{name: os.environ[name] for name in names}, "LC_ALL": "C", "LANGUAGE": ""}


def _source(url: str) -> tuple[str, list[str]]:
    """Git's argument for an address, and options that belong to it."""
    if url.startswith("file://"):
        return url, _LOCAL
    path = Path(url).expanduser() if url.startswith("~/") else Path(url)  # not every shell expands it
    return (str(path.absolute()), _LOCAL) if "://" not in url and path.exists() else (url, [])


def _one_line(lines: list[str]) -> str:
    """Git's messages on one line, without passwords and repetitions."""
    words = dict.fromkeys(filter(None, (line.strip().rstrip(".") for line in lines)))
    return _without_password("; ".join(words)) or "git gave no reason"


def _without_password(text: str) -> str:
    """A text without user names and passwords in its addresses."""
    return re.sub(r"(?<=://)[^/\s@]*@", "", text)
