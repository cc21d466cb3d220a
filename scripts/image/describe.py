"""Writes what an image consists of: versions.json, and sbom.json (CycloneDX 1.5).

cyclonedx-py has listed the Python packages; this adds what it cannot see: Python itself, the upstream sources and their
patches, and the base image.

Run as: python describe.py TARGET COMMIT BASE DIRECTORY
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any


def main(target: str, commit: str, base: str, directory: str) -> None:
    """Reads packages.json and, where it is there, sources.json from the working directory."""
    sbom = json.loads(Path("packages.json").read_text("utf-8"))
    sources = Path("sources.json")
    upstream = json.loads(sources.read_text("utf-8"))["settings"] if sources.is_file() else {}
    versions = {
        "target": target,
        "commit": commit,
        "machine": platform.machine(),
        "base": base,
        "python": platform.python_version(),
        "upstream": upstream,
        "packages": {found["name"]: found["version"] for found in sbom["components"]},
    }
    root = {"type": "container", "bom-ref": "image", "name": f"openpangu-sft {target}", "version": commit}
    sbom.setdefault("metadata", {})["component"] = root
    sbom["components"] += [
        component("container", "base image", base),
        component("platform", "CPython", versions["python"]),
    ]
    for name, pin in upstream.items():
        patches = [{"type": "unofficial", "diff": {"url": f"patches/{patch}"}} for patch in pin["patches"]]
        extra: dict[str, Any] = {"pedigree": {"patches": patches}} if patches else {}
        sbom["components"].append({**component("library", name, pin["commit"]), **extra})
    for file, content in (("versions.json", versions), ("sbom.json", sbom)):
        (Path(directory) / file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def component(kind: str, name: str, version: str) -> dict[str, str]:
    """One entry of CycloneDX's list; see https://cyclonedx.org/docs/1.5/json/#components."""
    return {"type": kind, "bom-ref": name, "name": name, "version": version}


if __name__ == "__main__":
    main(*sys.argv[1:])
