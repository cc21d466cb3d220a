"""Looks up every package of locks/ in OSV (osv.dev), a database of known vulnerabilities.

SECURITY.md lists the vulnerabilities that are accepted, with their reach. Exit codes:

    0  every known vulnerability is listed
    1  one is not, or a listed package is in no lock any more
    3  the database was not reached: nothing is known

OSV_URL is another server with OSV's API. Proxies and certificates: HTTPS_PROXY, SSL_CERT_FILE. Needs Python's standard
library only, so that a check of what is installed installs nothing.

Run as: make audit, or python3 scripts/audit.py
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple, Optional
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parents[1]
LIST = "SECURITY.md"
NOT_REACHED = 3
# Without regard to markers: for whatever Python and machine. 2.1.0+cpu is a build of 2.1.0, under which it is known.
_LOCKED = re.compile(r"^([a-z0-9][a-z0-9-]*)==([^\s;+]+)", re.MULTILINE)
_ROW = re.compile(r"^\| ([a-z0-9][a-z0-9-]*) (\d\S*) \| ((?:CVE|GHSA|PYSEC)-[^|]+) \| ([^|]+) \|$", re.MULTILINE)


class Package(NamedTuple):
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def locked(root: Path = ROOT) -> dict[Package, list[str]]:
    """Every package of the locks, with the names of these locks."""
    found: dict[Package, list[str]] = {}
    for lock in sorted((root / "locks").glob("*.txt")):
        for name, version in dict.fromkeys(_LOCKED.findall(lock.read_text("utf-8"))):
            found.setdefault(Package(name, version), []).append(lock.name)
    return found


def listed(root: Path = ROOT) -> dict[Package, set[str]]:
    """The vulnerabilities in SECURITY.md, by package."""
    found: dict[Package, set[str]] = {}
    for name, version, ids, _ in _ROW.findall((root / LIST).read_text("utf-8")):
        found.setdefault(Package(name, version), set()).update(ids.split(", "))
    return found


def ask(path: str, body: Optional[dict[str, Any]] = None) -> dict[str, Any]:
    url = os.environ.get("OSV_URL", "https://api.osv.dev").rstrip("/") + path
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=20) as answer:
        content = json.load(answer)
    if not isinstance(content, dict):
        raise ValueError("not an answer of OSV")
    return content


def records(packages: Iterable[Package]) -> dict[Package, list[dict[str, Any]]]:
    """The database's records of each package with any. One vulnerability may have several, with each other's ids."""
    named = list(packages)
    queries = [{"package": {"name": each.name, "ecosystem": "PyPI"}, "version": each.version} for each in named]
    ids: dict[Package, list[str]] = {}
    while named:
        results = ask("/v1/querybatch", {"queries": queries})["results"]
        if len(results) != len(named):
            raise ValueError("not an answer to every package")
        more = []
        for package, query, result in zip(named, queries, results):
            ids.setdefault(package, []).extend(each["id"] for each in result.get("vulns", ()))
            if result.get("next_page_token"):
                more.append((package, {**query, "page_token": result["next_page_token"]}))
        named, queries = [package for package, _ in more], [query for _, query in more]
    wanted = sorted({each for of_one in ids.values() for each in of_one})
    with ThreadPoolExecutor(8) as pool:
        full = dict(zip(wanted, pool.map(lambda each: ask(f"/v1/vulns/{each}"), wanted)))
    kept = {
        package: [full[each] for each in of_one if not full[each].get("withdrawn")] for package, of_one in ids.items()
    }
    return {package: of_one for package, of_one in kept.items() if of_one}


def names(record: dict[str, Any]) -> set[str]:
    return {record["id"], *record.get("aliases", ())}


def main() -> int:
    packages, accepted = locked(), listed()
    gone = [package for package in accepted if package not in packages]
    for package in gone:
        print(f"openpangu-sft: {LIST} lists {package}, which is in no lock -> remove its rows", file=sys.stderr)
    try:
        known = records(packages)
    except (OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        print(
            f"openpangu-sft: the vulnerability database was not reached, locks/ is not checked: {error}"
            " -> check the network, HTTPS_PROXY and OSV_URL",
            file=sys.stderr,
        )
        return 1 if gone else NOT_REACHED

    for package, ids in accepted.items():
        if unknown := sorted(ids - set().union(*map(names, known.get(package, ())))):
            print(f"{LIST} lists for {package} what the database does not: {', '.join(unknown)}")
    unlisted: dict[str, str] = {}
    for package, found in known.items():
        for record in found:
            if names(record) & accepted.get(package, set()):
                continue
            label = min(names(record), key=lambda each: (not each.startswith("CVE-"), each))
            summary = record.get("summary") or record.get("details") or ""
            summary = "".join(filter(str.isprintable, " ".join(str(summary).split())))  # no line or escape of its own
            unlisted[f"{package}: {label}"] = (
                f" ({', '.join(packages[package])}): {summary[:150]} https://osv.dev/{record['id']}"
            )
    for what, text in unlisted.items():
        print(f"{what}{text}", file=sys.stderr)
    if unlisted:
        print(
            f"openpangu-sft: {len(unlisted)} known vulnerabilities are not in {LIST} -> take fixed versions"
            " (make lock LOCKFLAGS=--upgrade), or list them with their reach",
            file=sys.stderr,
        )
        return 1
    count = sum(map(len, known.values()))
    print(f"{len(packages)} packages of locks/: {count} records in the database, all listed in {LIST}")
    return 1 if gone else 0


if __name__ == "__main__":
    sys.exit(main())
