"""How git is called: for what is wanted here, undisturbed by what it is told elsewhere.

Whoever calls git from a hook, or has line endings, templates, filters or hooks set up, would get other files than his
neighbour. What works on files therefore sees no configuration at all. What reaches out keeps the user's, as proxies,
certificates, rewritten addresses and credentials stand there, and never waits for somebody to type.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Callable, Optional

from openpangu_sft.util.errors import UserError

_REACHES_OUT = re.compile(
    r"GIT_(SSL_|PROXY_|HTTP_|SSH|ASKPASS|ALLOW_PROTOCOL|EXEC_PATH|CONFIG_(GLOBAL|SYSTEM|NOSYSTEM|COUNT|KEY_|VALUE_))"
)
"""The only variables of git's own that are kept; a hook's GIT_DIR, GIT_INDEX_FILE and so on would lead astray."""

_SILENT_CONFIG = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
_SILENT_CONFIG.update(HOME=os.devnull, XDG_CONFIG_HOME=os.devnull)  # before 2.32 git knows no GIT_CONFIG_GLOBAL

_FETCH = ["-c", "gc.auto=0", "-c", "color.ui=false"]
_FETCH += ["-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=120"]  # for a server that has gone silent
_FETCH += ["fetch", "--no-tags", "--no-recurse-submodules", "--progress"]

# Another user's repository is read where it was named, on purpose; nothing is run from it. Git takes this setting
# neither from the caller's command line nor from a repository.
_LOCAL = ["--upload-pack", "git -c safe.directory='*' upload-pack"]

_PROGRESS = re.compile(r"(remote: )?(\w+ [\w ]+: +\d+|Total \d+)|From | \* |remote:\s*$")

_NOBODY_THERE = re.compile("unable to access|not found|does not appear|dubious ownership|Could not read from remote")


class GitFailed(Exception):
    """What git said, on one line."""


def require_git(purpose: str) -> None:
    """Raises `UserError` where git is not installed: `purpose` says what it does here."""
    if not shutil.which("git"):
        raise UserError(f"git is not installed: it {purpose}", remedy="install git")


def git(*arguments: str, folder: Path, repository: Optional[Path] = None) -> str:
    """Runs git on files, with no configuration but the repository's own.

    Args:
        arguments: of git.
        folder: where it runs.
        repository: a bare one, of which the folder is then a work tree; without it git knows of none.

    Returns:
        What it printed, without white space around it.

    Raises:
        GitFailed: with what it said.
    """
    environment = {**_environment(), **_SILENT_CONFIG, "GIT_DEFAULT_HASH": "sha1"}
    # Told of none, it would find a clone further up, and then `apply` passes over all files without a word.
    environment["GIT_DIR"] = str(repository or os.devnull)
    if repository:
        environment["GIT_WORK_TREE"] = str(folder)
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode:
        raise GitFailed(_one_line(done.stderr.decode(errors="replace").splitlines()))
    return done.stdout.decode(errors="replace").strip()


def fetch(repository: Path, url: str, *wanted: str, note: Callable[[str], object] = lambda line: None) -> None:
    """Fetches from an address or a folder.

    Args:
        repository: a bare one, that takes what comes.
        url: whatever git takes, or a folder, seen from the current one.
        wanted: what to fetch, and options.
        note: is told how it goes on, line by line.

    Raises:
        GitFailed: with what git said.
    """
    place, how = _place(url)
    process = subprocess.Popen(
        ["git", *_FETCH, *how, *(word for word in wanted if word.startswith("--")), "--", place]
        + [word for word in wanted if not word.startswith("--")],
        cwd=repository,
        env={**_environment(_REACHES_OUT), "GIT_DIR": str(repository), "GIT_TERMINAL_PROMPT": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",  # and any of \r, \n ends a line
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
        process.terminate()  # does nothing to one that has ended
        process.communicate()


def nobody_there(failure: str) -> bool:
    """Whether a fetch failed before there was a repository to ask: asking for something else is in vain."""
    return bool(_NOBODY_THERE.search(failure))


def without_password(text: str) -> str:
    """A text without the user and password of addresses in it."""
    return re.sub(r"(?<=://)[^/\s@]*@", "", text)


def apply_patch(folder: Path, patch: Path, to: str, remedy: str) -> None:
    """Applies a patch to the files in a folder, all of it or nothing.

    Args:
        folder: what the patch's file names are seen from.
        patch: as git makes them; words may stand before it.
        to: what the folder holds.
        remedy: what to do where it does not fit.

    Raises:
        UserError: it does not fit; names the patch and, in git's words, the file and line.
    """
    try:
        git("apply", str(patch.resolve()), folder=folder)
    except GitFailed as failure:
        raise UserError(f"does not apply to {to}: {failure}", where=patch, remedy=remedy) from None


def _environment(kept: Optional[re.Pattern[str]] = None) -> dict[str, str]:
    """This process's environment, but of git's own variables only those kept; messages are English."""
    names = (name for name in os.environ if not name.startswith("GIT_") or (kept and kept.match(name)))
    return {**{name: os.environ[name] for name in names}, "LC_ALL": "C", "LANGUAGE": ""}


def _place(url: str) -> tuple[str, list[str]]:
    """What git is told in the place of an address, and with which options."""
    if url.startswith("file://"):
        return url, _LOCAL
    path = Path(url).expanduser() if url.startswith("~/") else Path(url)  # not every shell has replaced it
    return (str(path.absolute()), _LOCAL) if "://" not in url and path.exists() else (url, [])


def _one_line(lines: list[str]) -> str:
    """Git's words with no line break and no password; what it repeats is left out."""
    words = dict.fromkeys(filter(None, (line.strip().rstrip(".") for line in lines)))
    return without_password("; ".join(words)) or "git gave no reason"
