"""Writes what an image consists of: versions.json, and sbom.json in CycloneDX 1.5.

Run as: python describe.py TARGET COMMIT DIRECTORY
"""

import json
import platform
import sys
from importlib import metadata
from pathlib import Path


def main(target, commit, directory):
    """Reads the installed packages of this interpreter."""
    packages = sorted(
        {
            (
                found.metadata["Name"],
                found.version,
                found.metadata.get("License-Expression") or found.metadata.get("License") or "",
            )
            for found in metadata.distributions()
        }
    )
    versions = {
        "target": target,
        "commit": commit,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "packages": {name: version for name, version, _ in packages},
    }
    components = []
    for name, version, licence in packages:
        component = {
            "type": "library",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{name.lower().replace('_', '-')}@{version}",
        }
        first = licence.strip().splitlines()[0][:100] if licence.strip() else ""
        if first:
            component["licenses"] = [{"license": {"name": first}}]
        components.append(component)
    sbom = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components}
    for file, content in (("versions.json", versions), ("sbom.json", sbom)):
        (Path(directory) / file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
