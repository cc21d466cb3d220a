"""Three small repositories instead of upstream's, and a patches folder that pins them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from openpangu_sft.artifacts.artifact import Manifest
from openpangu_sft.training.mindspeed.sources import make_sources

FILES = {
    "megatron-lm": {"megatron/core/config.py": "a = 1\nb = 2\nc = 3\n", "LICENSE": "free\n", "pretrain.py": "#!\n"},
    "mindspeed": {"mindspeed/__init__.py": "", "文件.txt": "以\r\n及\n"},
    "mindspeed-llm": {"mindspeed_llm/__init__.py": "", "convert_ckpt.py": "import megatron\n"},
}
COMMITTED = {"megatron-lm": 1713478088, "mindspeed": 1729482511, "mindspeed-llm": 1748244043}


def run_git(folder: Path, *arguments: str, **environment: str) -> str:
    """Runs git without configuration; returns its output."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    own.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_NOSYSTEM="1", **environment)
    command = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
    return subprocess.run(command, env=own, check=True, capture_output=True, text=True).stdout.strip()


class SmallUpstream:
    """Repositories whose branch has moved on since the pinned commits."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.patches = root / "patches"
        self.target = root / "clone/.sources"
        self.pins: dict[str, dict[str, Any]] = {}
        for name, files in FILES.items():
            repository = self.repository(name)
            repository.mkdir(parents=True)
            run_git(repository, "init", "--quiet", "--initial-branch=main")
            for file, text in files.items():
                self.write(name, file, text)
            (repository / sorted(files)[-1]).chmod(0o755)
            commit = self.commit(name, COMMITTED[name])
            self.pins[name] = {"url": str(repository), "mirrors": [], "branch": "main", "commit": commit, "patches": []}
            self.write(name, "README.md", "moved on\n")
            self.commit(name, COMMITTED[name] + 10**6)
        self.add_patch("megatron-lm", "0001.patch", "b = 2", "b = 22")

    def repository(self, name: str) -> Path:
        return self.root / "repositories" / name

    def write(self, name: str, file: str, text: str) -> None:
        path = self.repository(name) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())

    def commit(self, name: str, seconds: int) -> str:
        """Commits everything at that time; returns the commit's id."""
        when = f"{seconds} +0800"
        run_git(self.repository(name), "add", "--all")
        run_git(self.repository(name), "commit", "--quiet", "-m", "x", GIT_COMMITTER_DATE=when, GIT_AUTHOR_DATE=when)
        return run_git(self.repository(name), "rev-parse", "HEAD")

    def add_patch(self, name: str, file: str, before: str, after: str) -> None:
        """Pins one more patch, of one line of config.py."""
        text = f"Why.\n\ndiff --git a/{CONFIG} b/{CONFIG}\n--- a/{CONFIG}\n+++ b/{CONFIG}\n"
        text += f"@@ -1,3 +1,3 @@\n a = 1\n-{before}\n+{after}\n c = 3\n"
        path = self.patches / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        if f"{name}/{file}" not in self.pins[name]["patches"]:
            self.pins[name]["patches"].append(f"{name}/{file}")
        self.write_pins()

    def write_pins(self) -> None:
        """Writes upstream.toml: JSON strings and lists are valid TOML."""
        lines = []
        for name, pin in self.pins.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in pin.items())]
        (self.patches / "upstream.toml").write_text("\n".join(lines) + "\n", "utf-8")

    def make(self) -> tuple[Manifest, bool]:
        return make_sources(self.target, self.patches)

    def config(self) -> str:
        """The patched line in MindSpeed-LLM's copy."""
        return (self.target / "mindspeed-llm" / CONFIG).read_text("utf-8").splitlines()[1]

    def left(self) -> set[str]:
        """Names in the folder of the result, without the lock."""
        return {path.name for path in self.target.parent.iterdir()} - {"..sources.lock"}


CONFIG = "megatron/core/config.py"


def listing(folder: Path) -> dict[str, tuple[str, int, str]]:
    """Mode, time and sha256 of everything below a folder and of itself, by relative path."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (oct(path.lstat().st_mode), path.lstat().st_mtime_ns, digest)
    return found
