"""Writes the table of packages in THIRD_PARTY_NOTICES.md: packages of both images, with versions and licences.

Versions are those of locks/. Licences are those declared by each package; packages not installed in this environment
(some in the image need Linux, an NPU or an older Python) are downloaded for this, with the hashes of the locks.

Run as: .venv/bin/python scripts/notices.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTICES = ROOT / "THIRD_PARTY_NOTICES.md"
LOCKS = {"npu": "image-npu.txt", "cpu": "image-cpu.txt"}
BEGIN, END = "<!-- made by scripts/notices.py -->\n", "<!-- end -->\n"

SPDX = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "MIT License": "MIT",
    "Python Software Foundation License": "PSF-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "Apache": "Apache-2.0",
    "Apache 2": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "BSD 3-Clause License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
}
UNDECLARED = {"sentencepiece": "Apache-2.0"}
"""Licences missing from package metadata; from the LICENSE of its repository, github.com/google/sentencepiece."""


def locked(lock: str) -> dict[str, str]:
    """Name and version of every package of a lock."""
    text = (ROOT / "locks" / lock).read_text("utf-8")
    return dict(re.findall(r"^([a-z0-9._-]+)==([^ ;\\]+)(?= )(?! ; sys_platform == 'win32')", text, re.MULTILINE))


def licence_of(name: str, places: Sequence[str] = ()) -> str:
    """The licence declared by a package: the expression, else a one-line text, else the classifiers.

    Raises:
        LookupError: it is not installed, or declares none.
    """
    found = next(iter(metadata.distributions(name=name, path=list(places) or sys.path)), None)
    if found is None:
        raise LookupError(f"{name} is not installed")
    says = found.metadata
    if expression := says.get("License-Expression"):
        return expression
    text = (says.get("License") or "").strip()
    if text and "\n" not in text and text != "Dual License":
        return SPDX.get(text, text)
    classifiers = [
        line.rpartition(" :: ")[2] for line in says.get_all("Classifier") or [] if line.startswith("License")
    ]
    if classifiers or name in UNDECLARED:
        return ", ".join(SPDX.get(text, text) for text in classifiers) or UNDECLARED[name]
    raise LookupError(f"{name} declares no licence")


def rows(places: Sequence[str]) -> list[str]:
    """The table's rows, in the order of the names."""
    held = {target: locked(lock) for target, lock in LOCKS.items()}
    versions = {name: version for packages in held.values() for name, version in packages.items()}
    return [
        f"| {name} | {versions[name]} | {', '.join(target for target in held if name in held[target])} "
        f"| {licence_of(name, places)} |"
        for name in sorted(versions)
    ]


def fetch_missing(directory: Path) -> None:
    """Downloads packages that are not installed here into a directory, as locked."""
    text = (ROOT / "locks" / LOCKS["npu"]).read_text("utf-8")
    entries = re.findall(r"^([a-z0-9._-]+)==[^ ;\\]+[^\\\n]*((?: *\\\n +--hash=\S+)+)", text, re.MULTILINE)
    versions = locked(LOCKS["npu"])
    wanted = [
        f"{name}=={versions[name]}{hashes}"
        for name, hashes in entries
        if name in versions and not list(metadata.distributions(name=name, path=sys.path))
    ]
    (directory / "wanted.txt").write_text("\n".join(wanted) + "\n", "utf-8")
    command = [str(Path(sys.prefix) / "bin/uv"), "--no-config", "pip", "install", "--quiet", "--no-deps"]
    command += ["--require-hashes", "--only-binary", ":all:", "--python-version", "3.9", "--target", str(directory)]
    subprocess.run([*command, "-r", str(directory / "wanted.txt")], check=True)


def main() -> None:
    """Replaces the table in the notices."""
    with tempfile.TemporaryDirectory() as name:
        fetch_missing(Path(name))
        table = rows([*sys.path, name])
    before, _, rest = NOTICES.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    head = "\n| package | version | image | licence |\n|---|---|---|---|\n"
    NOTICES.write_text(before + BEGIN + head + "\n".join(table) + "\n\n" + END + after, "utf-8")


if __name__ == "__main__":
    main()
