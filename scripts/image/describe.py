"""Describes an image: versions.json, sbom.json (CycloneDX 1.5) and provenance.json (SLSA 1).

Adds Python, its libraries, the patched upstream sources and the base image to the packages listed by cyclonedx-py.

Run as: python describe.py TARGET COMMIT BASE DIRECTORY
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any


def main(target: str, commit: str, base: str, directory: str) -> None:
    """Reads packages.json and, if present, sources.json from the working directory."""
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
    libraries = Path("/opt/openpangu/python/lib/libraries.txt")  # of a compiled Python: "libssl3 3.0.2-0ubuntu1.18"
    for line in libraries.read_text("utf-8").splitlines() if libraries.is_file() else []:
        sbom["components"].append(component("library", *line.split()))
    described = (("versions.json", versions), ("sbom.json", sbom), ("provenance.json", provenance(versions)))
    for file, content in described:
        (Path(directory) / file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def provenance(versions: dict[str, Any]) -> dict[str, Any]:
    """A predicate of SLSA 1, see https://slsa.dev/spec/v1.0/provenance."""
    name, _, sha256 = versions["base"].partition("@sha256:")
    base: dict[str, Any] = {"uri": f"docker://{name}", **({"digest": {"sha256": sha256}} if sha256 else {})}
    commits = {"openpangu-sft": versions["commit"]}
    commits.update({name: pin["commit"] for name, pin in versions["upstream"].items()})
    sources = [{"uri": f"pkg:generic/{name}", "digest": {"gitCommit": commit}} for name, commit in commits.items()]
    return {
        "buildDefinition": {
            "buildType": "urn:openpangu-sft:make-image",
            "externalParameters": {key: versions[key] for key in ("target", "commit", "machine", "base")},
            "resolvedDependencies": [base, *sources],
        },
        "runDetails": {"builder": {"id": "urn:openpangu-sft:scripts/image/build.sh"}},
    }


def component(kind: str, name: str, version: str) -> dict[str, str]:
    """A CycloneDX component, see https://cyclonedx.org/docs/1.5/json/#components."""
    return {"type": kind, "bom-ref": name, "name": name, "version": version}


if __name__ == "__main__":
    main(*sys.argv[1:])
