"""scripts/audit.py looks up every package of the locks, and passes only what SECURITY.md lists with its reach."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
LOCK = """# a comment
torch==2.1.0+cpu ; platform_machine == 'x86_64' \\
    --hash=sha256:aa
safe==1.0 \\
    --hash=sha256:bb
old==0.9 ; python_full_version < '3.10' \\
    --hash=sha256:cc
"""
SECURITY = "| package | vulnerabilities | reach |\n|---|---|---|\n"


def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("audit", ROOT / "scripts/audit.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules["audit"] = module  # typing.NamedTuple looks it up
    specification.loader.exec_module(module)
    return module


AUDIT = script()


class Database:
    """A server with OSV's API. `records` by package and version; `pages`: how many ids are given at a time."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.pages = 1000
        self.html = False
        database = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.answer({"results": [database.ids(query) for query in asked["queries"]]})

            def do_GET(self) -> None:
                found = {each["id"]: each for of_one in database.records.values() for each in of_one}
                self.answer(found[self.path.rpartition("/")[2]])

            def answer(self, content: Any) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"<html>" if database.html else json.dumps(content).encode())

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def ids(self, query: dict[str, Any]) -> dict[str, Any]:
        assert query["package"]["ecosystem"] == "PyPI"
        found = self.records.get((query["package"]["name"], query["version"]), [])
        begin = int(query.get("page_token", 0))
        some = [{"id": each["id"], "modified": ""} for each in found[begin : begin + self.pages]]
        more = {"next_page_token": str(begin + self.pages)} if len(found) > begin + self.pages else {}
        return {"vulns": some, **more} if some else {}


@pytest.fixture
def database() -> Iterator[Database]:
    database = Database()
    thread = threading.Thread(target=database.server.serve_forever)
    thread.start()
    yield database
    database.server.shutdown()
    thread.join()
    database.server.server_close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for folder in ("scripts", "locks"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "scripts/audit.py", tmp_path / "scripts")
    (tmp_path / "locks/one.txt").write_text(LOCK)
    (tmp_path / "locks/two.txt").write_text("torch==2.1.0 \\\n    --hash=sha256:dd\n")
    (tmp_path / "SECURITY.md").write_text(SECURITY)
    return tmp_path


def audit(place: Path, url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(place / "scripts/audit.py")]
    environment = {"OSV_URL": url, "no_proxy": "*", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def record(name: str, *aliases: str, **more: str) -> dict[str, Any]:
    return {"id": name, "aliases": [*aliases], "summary": "runs code", **more}


def test_a_vulnerability_that_is_not_listed_fails(place: Path, database: Database) -> None:
    database.records["torch", "2.1.0"] = [record("GHSA-a", "CVE-2025-1"), record("PYSEC-1", "CVE-2025-1", "GHSA-a")]
    database.records["old", "0.9"] = [record("PYSEC-2")]  # of a Python that does not run this test
    done = audit(place, database.url)
    assert (done.returncode, done.stdout) == (1, "")
    torch, old, last = sorted(done.stderr.splitlines(), key=lambda line: ("torch" not in line, "old " not in line))
    assert torch == "torch 2.1.0: CVE-2025-1 (one.txt, two.txt): runs code https://osv.dev/PYSEC-1"
    assert old.startswith("old 0.9: PYSEC-2 (one.txt): ")
    assert last.startswith("openpangu-sft: 2 known vulnerabilities are not in SECURITY.md -> ")


@pytest.mark.parametrize("name", ["CVE-2025-1", "GHSA-a", "CVE-2024-9, PYSEC-1"])
def test_a_listed_one_passes_under_any_of_its_ids(place: Path, database: Database, name: str) -> None:
    known = [record("GHSA-a", "CVE-2025-1", "PYSEC-1"), record("PYSEC-1", "CVE-2025-1", "GHSA-a")]
    database.records["torch", "2.1.0"] = known
    (place / "SECURITY.md").write_text(f"{SECURITY}| torch 2.1.0 | {name} | not called |\n")
    done = audit(place, database.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("3 packages of locks/: 2 records in the database, all listed")
    # One that the database does not know is said, and no error: it may be withdrawn, or known under another id.
    said = "SECURITY.md lists for torch 2.1.0 what the database does not: CVE-2024-9\n"
    assert (said in done.stdout) == ("2024" in name)


def test_one_that_is_listed_for_another_package_fails(place: Path, database: Database) -> None:
    database.records["torch", "2.1.0"] = [record("CVE-2025-1")]
    (place / "SECURITY.md").write_text(f"{SECURITY}| safe 1.0 | CVE-2025-1 | not called |\n")
    assert audit(place, database.url).returncode == 1


def test_a_withdrawn_record_is_none(place: Path, database: Database) -> None:
    database.records["safe", "1.0"] = [record("PYSEC-1", withdrawn="2026-01-01T00:00:00Z")]
    assert audit(place, database.url).returncode == 0


def test_answers_of_several_pages_are_read_to_the_end(place: Path, database: Database) -> None:
    database.pages = 1
    database.records["safe", "1.0"] = [record(f"PYSEC-{number}") for number in range(3)]
    database.records["old", "0.9"] = [record(f"PYSEC-{number}") for number in range(10, 12)]
    done = audit(place, database.url)
    assert set(re.findall(r"PYSEC-\d+(?= \()", done.stderr)) == {f"PYSEC-{number}" for number in (0, 1, 2, 10, 11)}


def test_a_row_about_a_package_of_no_lock_fails_even_without_the_database(place: Path, database: Database) -> None:
    (place / "SECURITY.md").write_text(f"{SECURITY}| torch 2.0.0 | CVE-2025-1 | not called |\n")
    for url in (database.url, "http://127.0.0.1:9"):
        done = audit(place, url)
        assert done.returncode == 1
        said = "openpangu-sft: SECURITY.md lists torch 2.0.0, which is in no lock -> remove its rows"
        assert done.stderr.splitlines()[0] == said


def test_a_database_that_is_not_reached_is_no_pass(place: Path, database: Database) -> None:
    database.html = True  # a portal's page in the place of an answer
    for url in (database.url, "http://127.0.0.1:9"):
        done = audit(place, url)
        assert (done.returncode, done.stdout) == (AUDIT.NOT_REACHED, "")
        [line] = done.stderr.splitlines()
        assert line.startswith("openpangu-sft: the vulnerability database was not reached, locks/ is not checked: ")


def test_every_package_of_every_lock_is_looked_up() -> None:
    found = AUDIT.locked()
    for lock in (ROOT / "locks").glob("*.txt"):
        lines = [line for line in lock.read_text("utf-8").splitlines() if re.match(r"[^\s#]", line)]
        named = {package for package, locks in found.items() if lock.name in locks}
        assert {line.partition("==")[0] for line in lines} == {package.name for package in named}
        assert lines


def test_the_list_is_of_locked_packages_and_known_ids() -> None:
    listed = AUDIT.listed()
    assert {"torch", "transformers"} <= {package.name for package in listed}
    assert set(listed) <= set(AUDIT.locked())
    for ids in listed.values():
        for each in ids:
            assert re.fullmatch(r"CVE-20\d\d-\d{4,}|PYSEC-20\d\d-\d+|GHSA(-[0-9a-z]{4}){3}", each)
    # Every row is read: one with another form would be text only.
    rows = re.findall(r"^\|.*(?:CVE|PYSEC|GHSA)-.*\|$", (ROOT / AUDIT.LIST).read_text("utf-8"), re.MULTILINE)
    assert len(AUDIT._ROW.findall("\n".join(rows))) == len(rows)


def test_what_the_image_scan_passes_over_is_listed() -> None:
    passed_over = YAML(typ="safe", pure=True).load((ROOT / ".trivyignore.yaml").read_text("utf-8"))["vulnerabilities"]
    listed = {(package.name, each) for package, ids in AUDIT.listed().items() for each in ids}
    for finding in passed_over:
        assert {(purl.rpartition("/")[2], finding["id"]) for purl in finding["purls"]} <= listed
