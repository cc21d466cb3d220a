"""The documents are correct: commands run or state what they need, links resolve, both READMEs correspond."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import TINY
from documents import (
    NEEDS,
    ROOT,
    Command,
    anchors,
    blocks,
    commands,
    documents,
    headings,
    inline_commands,
    links,
)
from openpangu_sft.cli.main import app
from openpangu_sft.plan.choose import choose
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.util.errors import UserError
from openpangu_sft.verify.megatron import find_core
from parameter_ids import shortened

README, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
RUN = [README, *(path for path in documents() if path.parent == ROOT / "docs" or path.name == "CONTRIBUTING.md")]
PROSE = [path for path in documents() if path.name != "CHANGELOG.md"]  # it names former files
NAMES = {path: str(path.relative_to(ROOT)) for path in documents()}

SMALL = [
    *TINY,
    "data.seq_length=512",
    "data.validation_share=0.1",
    "model.max_position_embeddings=1024",
    "tokenizer.trust_remote_code=false",
    "train.device=auto",
    "train.precision=fp32",
    "train.global_batch_size=16",
    "train.iterations=100",
    "train.save_interval=50",
    "train.recompute.granularity=none",
    "train.recompute.num_layers=0",
    "chat.max_new_tokens=8",
]
"""Overrides that make the published recipe small enough for a test."""
PORTABLE = [*SMALL, "train.engine=transformers", "train.device=cpu", "train.global_batch_size=2"]
PORTABLE += ["parallel.devices_per_node=1", "parallel.context=1"]


class Place:
    """A copy of the repository as a reader has it, with conversations and checkpoint in /cache and a small recipe.

    Commands run one after another, in document order; the same command runs only once. `make sft` trains with the
    portable engine.
    """

    def __init__(self, directory: Path) -> None:
        self.clone, self.cache = directory / "clone", directory / "cache"
        self.clone.mkdir()
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, self.clone)
        for name in ("scripts", "recipes", "locks", "src", "examples", "patches", "docs"):
            shutil.copytree(ROOT / name, self.clone / name, ignore=shutil.ignore_patterns("__pycache__"))
        published = self.clone / "recipes/openpangu-1b.yaml"
        self.portable = self._recipe(published, "portable.yaml", PORTABLE)
        self._recipe(published, published.name, SMALL)
        lora = published.with_name("openpangu-1b-lora.yaml")
        chosen = [override for override in PORTABLE if not override.startswith("train.recompute")]
        self._recipe(lora, lora.name, [*chosen, "train.lora.rank=4"])
        cpu = published.with_name("cpu.yaml")
        text = cpu.read_text("utf-8").replace("trust_remote_code: true", "trust_remote_code: false")
        cpu.write_text(text.replace("paths:", f"paths:\n  cache: {self.cache}\n  #"), "utf-8")
        self._put_what_the_reader_has(directory)
        self.ran: set[str] = set()

    def _recipe(self, published: Path, name: str, overrides: list[str]) -> Path:
        path = published.with_name(name)
        recipe = load_recipe(published, [*overrides, f"paths.cache={self.cache}"], choose)
        path.write_text(json.dumps(recipe.model_dump(mode="json", exclude_none=True)), "utf-8")  # which is YAML
        return path

    def _put_what_the_reader_has(self, directory: Path) -> None:
        from openpangu_sft.demo.run import prepare

        recipe = load_recipe(self.portable, [])
        prepare(recipe)
        shutil.move(recipe.path("raw"), self.clone / "conversations")
        (self.clone / "prompts.txt").write_text("云雾茶社几点开门？\n", "utf-8")
        questions = next(block.lines for block in blocks(ROOT / "docs/evaluate.md") if block.lines[0].startswith("{"))
        (self.clone / "questions.jsonl").write_text("\n".join(questions), "utf-8")
        shutil.move(recipe.path("hf"), self.clone / "openPangu-Embedded-1B")
        (directory / "home").mkdir()
        (directory / "home/cache").symlink_to(self.cache)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "SET")},
            "HOME": str(directory / "home"),
            "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
            "VENV": sys.prefix,
            "RUNTIME": "host",
            "OMP_NUM_THREADS": "1",
        }
        try:
            find_core(directory)
        except UserError:
            self.environment["ONLY"] = "tensors"  # no make sources here, and PyPI has wheels for some machines only

    def run(self, command: Command, exports: list[str]) -> None:
        text = re.sub(r"(?<![\w/.-])/cache\b", str(self.cache), command.text)
        text = re.sub(r"^\.venv/", f"{sys.prefix}/", text)
        if text in self.ran:
            return
        environment = dict(self.environment)
        if re.match(r"make (sft|report|evaluate)\b(?!.*DRY_RUN)", text):  # of the run trained here
            environment["RECIPE"] = str(self.portable)
        if "DRY_RUN" in text:
            environment["SET"] = "paths.run=other"  # the run trained here is of the other engine
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", "\n".join([*exports, text])],
            cwd=self.clone,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        self.ran.add(text)

    def run_all(self, document: Path) -> None:
        """Runs the unmarked commands of a document in order; exports apply to the following ones."""
        exports: list[str] = []
        for command in commands(document):
            if command.mark is None:
                self.run(command, exports)
                if command.text.startswith("export "):
                    exports.append(command.text)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("reader"))
    place.run_all(README)  # the other documents build on its results
    return place


@pytest.mark.parametrize("document", RUN, ids=NAMES.get)
def test_its_commands_run(document: Path, place: Place) -> None:
    place.run_all(document)


@pytest.mark.parametrize("document", [path for path in RUN if commands(path)], ids=NAMES.get)
def test_a_command_that_is_not_run_is_marked(document: Path) -> None:
    for command in commands(document):
        if command.mark is None:
            continue
        covered = NEEDS.get(command.mark) if command.needs else command.mark
        assert covered, f"{command}: unknown mark “{command.mark}”: {', '.join(NEEDS)}"
        assert (ROOT / covered).exists(), command
        if not command.needs:
            words = shlex.split(command.text)
            assert words[1] in (ROOT / covered).read_text("utf-8"), f"{command}: {covered} does not run it"


def of_make(text: str) -> list[str]:
    """The arguments of make in a command, which may consist of several joined by &&."""
    words: list[str] = []
    for part in re.split(r" && | \| | > ", text):
        if part.split()[0] == "make":
            words += [word for word in shlex.split(re.sub(r"\$\(\(.*?\)\)", "1", part))[1:] if word != "-n"]
    return words


def written_commands() -> list[tuple[str, str]]:
    found = [(str(command), command.text) for path in documents() for command in commands(path)]
    return found + [(f"{NAMES[path]}: `{text}`", text) for path in PROSE for text in inline_commands(path)]


@pytest.mark.parametrize("text", [text for _, text in written_commands() if of_make(text)], ids=shortened)
def test_make_takes_what_is_written(text: str) -> None:
    """Even if it is not run: target, variables and choices are those of the Makefile."""
    call = ["awk", "-v", "mode=check", "-f", "scripts/targets.awk", "Makefile", *of_make(text)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("text", [text for _, text in written_commands() if "openpangu-sft " in text], ids=shortened)
def test_the_command_line_takes_what_is_written(text: str) -> None:
    words = shlex.split(re.split(r" > | \| ", text)[0])
    while words and words[0] != "openpangu-sft":
        words.pop(0)
    if len(words) < 2 or words[1].startswith("-"):
        return
    app.commands[words[1]].make_context(words[1], words[2:])


@pytest.mark.parametrize("document", documents(), ids=NAMES.get)
def test_links_resolve(document: Path) -> None:
    for link in links(document):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{NAMES[document]} names {link}"
        if anchor:
            assert anchor in anchors(target), f"{NAMES[document]} names {link}"


def test_every_document_is_listed_in_the_readme() -> None:
    listed = {(ROOT / link).resolve() for link in links(README)}
    of_its_own = {path for path in documents() if path.parent in (ROOT, ROOT / "docs")}
    assert of_its_own - listed == {README}


def test_both_readmes_correspond() -> None:
    assert len(headings(README)) == len(headings(CHINESE))
    assert [link.replace("README.zh.md", "README.md") for link in links(README)] == [
        link.replace("README.zh.md", "README.md") for link in links(CHINESE)
    ]
    ours, theirs = blocks(README), blocks(CHINESE)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert len(one.lines) == len(other.lines)
        if one.is_commands:
            assert [code(line) for line in one.lines] == [code(line) for line in other.lines]


def code(line: str) -> str:
    """A line of a code block without its comment, which is translated."""
    return line.partition(" #")[0].rstrip()


def test_both_readmes_have_the_same_parts_in_the_same_order() -> None:
    kinds = {"#": "heading", "-": "list", "|": "table", " ": "code", "<": "comment"}

    def parts(document: Path) -> list[str]:
        return [kinds.get(part[0], "text") for part in re.split(r"\n\n+", document.read_text("utf-8"))]

    assert parts(README) == parts(CHINESE)


TROUBLE = ROOT / "docs/troubleshooting.md"


def messages() -> list[tuple[str, str]]:
    """Every message of the tables, with its heading."""
    found, heading = [], ""
    for line in TROUBLE.read_text("utf-8").splitlines():
        heading = line[3:] if line.startswith("## ") else heading
        first = line.split(" | ")[0]
        if line.startswith("| `"):
            found += [(heading, message) for message in re.findall(r"`([^`]+)`", first)]
    return found


def source() -> list[str]:
    """All code with messages, per file, with split string literals joined."""
    files = [
        *(ROOT / "src/openpangu_sft").rglob("*.py"),
        *(ROOT / "scripts").rglob("*.sh"),
        ROOT / "scripts/targets.awk",
    ]
    return [re.sub(r'"\s*\n\s*f?"', "", file.read_text("utf-8")) for file in files]


OURS = [
    message for heading, message in messages() if "not seen here" not in heading and not message.startswith("train.")
]


@pytest.mark.parametrize("message", OURS, ids=shortened)
def test_an_explained_message_exists(message: str) -> None:
    """Its fixed parts occur in one file of the code, in this order."""
    parts = [part.strip(" ,;:") for part in message.split("…")]
    assert max(map(len, parts)) >= 7, "a message without fixed parts would match everywhere"
    pattern = re.compile(".{0,200}?".join(map(re.escape, parts)), re.DOTALL)
    assert any(pattern.search(text) for text in source())


def test_messages_not_seen_here_have_a_source() -> None:
    _, _, table = TROUBLE.read_text("utf-8").partition("not seen here\n")
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) > 10
    for row in rows:
        assert "](https://" in row, row
