"""Fetches one commit of a repository, from its server or from one of its mirrors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from openpangu_sft.util.console import console, say
from openpangu_sft.util.git import GitFailed, fetch, git, nobody_there, without_password


def check_out(folder: Path, repository: Path, urls: Sequence[str], commit: str, branch: str) -> int:
    """Puts a commit's files into a new folder, with its history in a bare `repository`; returns the commit's time.

    Raises `GitFailed`, with what each server said, where the commit is at none of the URLs.
    """
    folder.mkdir()
    git("init", "--quiet", "--bare", "--template=", str(repository), folder=folder)
    _fetch(repository, folder.name, urls, commit, branch)
    git("checkout", "--quiet", "--force", "--detach", commit, folder=folder, repository=repository)
    if (head := git("rev-parse", "HEAD", folder=folder, repository=repository)) != commit:
        raise GitFailed(f"{commit} is no commit, but a name for {head}")
    return int(git("show", "--no-patch", "--format=%ct", "HEAD", folder=folder, repository=repository))


def _fetch(repository: Path, name: str, urls: Sequence[str], commit: str, branch: str) -> None:
    """Fetches the commit alone, by its id, from the first URL that has it.

    Some servers serve by id only the tip of a branch: after all URLs have been asked for the commit, they are asked
    for the branch.
    """
    failures: dict[str, str] = {}
    with console.status(name) as status:  # on a terminal only
        for by_id, url in product((True, False), urls):
            if not by_id and nobody_there(failures[url]):
                continue
            wanted = [commit, "--depth=1"] if by_id else [f"refs/heads/{branch}"]
            what = commit[:12] if by_id else f"branch {branch}, to look for it there,"
            say(f"{name}: fetching {what} from {without_password(url)}")
            try:
                fetch(repository, url, *wanted, note=lambda line: status.update(f"{name}: {line}"))
                git("cat-file", "-e", f"{commit}^{{commit}}", folder=repository, repository=repository)
                return
            except GitFailed as failure:
                failures[url] = str(failure) if by_id else f"{failures[url]}; branch {branch}: {failure}"
    raise GitFailed("; ".join(f"{without_password(url)}: {failure}" for url, failure in failures.items()))
