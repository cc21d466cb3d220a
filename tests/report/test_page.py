"""The report of a run: read back from its page, by a parser and by a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from browser import HOSTILE, POLICY, browse, measured, needs_browser, require_harmless
from conftest import ROOT, TINY, conversation, write_samples
from openpangu_sft import __version__
from openpangu_sft.artifacts.artifact import MANIFEST, Manifest
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.sharding import parameter_count
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.evaluate.record import EVALUATION, read_evaluation
from openpangu_sft.evaluate.stage import run_evaluate
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.report.charts import MOST_POINTS, charts_of, thinned
from openpangu_sft.report.page import _names, run_report
from openpangu_sft.report.run import Run, read_run
from openpangu_sft.training.run.metrics import METRICS, read_metrics
from openpangu_sft.training.run.provenance import RECIPE, STARTS, read_starts, record_start
from openpangu_sft.training.stage import run_sft
from refusals import refusal_of

EVALUATED = ["data.validation_share=0.2", "chat.max_new_tokens=3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path) -> list[str]:
    """Overrides of a run that was trained in two goes and evaluated, on samples that hold markup."""
    cache = tmp_path_factory.mktemp("report")
    overrides = [*TINY, f"paths.cache={cache}", f"paths.hf={tiny_hf}", *EVALUATED]
    recipe = load_recipe(ROOT / "recipes/demo.yaml", overrides)
    samples = [conversation(f"第 {n} 个问题？{HOSTILE}", f"第 {n} 个回答。") for n in range(30)]
    write_samples(recipe.path("samples") / "all.jsonl", samples)
    long = load_recipe(ROOT / "recipes/demo.yaml", [*overrides, "data.seq_length=512"])
    run_preprocess(long)
    run_merge(long)
    run_convert(long)
    overrides.append("data.seq_length=512")
    run_sft(load_recipe(ROOT / "recipes/demo.yaml", [*overrides, "train.iterations=3"]), ["sft", "--set", "first go"])
    run_sft(load_recipe(ROOT / "recipes/demo.yaml", overrides), ["sft", "--set", "second go"])
    run_evaluate(load_recipe(ROOT / "recipes/demo.yaml", overrides), None, "all")
    return overrides


@pytest.fixture
def recipe(trained: list[str], tmp_path: Path) -> Recipe:
    """Of a copy of the run, in a directory whose name is markup too."""
    original = load_recipe(ROOT / "recipes/demo.yaml", trained).path("run")
    run = tmp_path / "run <b>&amp;"
    shutil.copytree(original, run)
    return load_recipe(ROOT / "recipes/demo.yaml", [*trained, f"paths.run={run}"])


@pytest.fixture
def other(recipe: Recipe, tmp_path: Path) -> Path:
    """A second run: other metrics, another learning rate, and never evaluated."""
    run = tmp_path / "other"
    shutil.copytree(recipe.path("run"), run)
    (run / EVALUATION).unlink()
    manifest = json.loads((run / MANIFEST).read_text("utf-8"))
    manifest["settings"]["train.lr"] = 0.123
    (run / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    rows = [{**row, "loss": row["loss"] + 1} for row in read_metrics(run)]
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return run


class Texts(HTMLParser):
    """The texts of a page, and its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page_of(path: Path) -> Texts:
    return Texts(path.read_text("utf-8"))


def test_the_page_says_what_the_run_left(recipe: Recipe) -> None:
    path = run_report(recipe)
    assert path == recipe.path("run") / "report.html"
    page = page_of(path)
    text = "\n".join(page.texts)
    rows = read_metrics(recipe.path("run"))
    assert f"{rows[0]['loss']:.4f} → {rows[-1]['loss']:.4f}" in text
    assert "6 of 6" in page.texts
    evaluation = read_evaluation(recipe.path("run"))
    assert evaluation
    for result in evaluation.results:
        assert f"{result.loss:.4f} (perplexity " in text
    for number, question in enumerate(evaluation.questions):
        assert question.turns[-1][1] in page.texts
        assert question.reference in page.texts
        for result in (evaluation.results[0], evaluation.results[-1]):
            assert result.answers[number] in page.texts
    manifest = json.loads((recipe.path("run") / MANIFEST).read_text("utf-8"))
    for digest in manifest["inputs"].values():
        assert digest in page.texts
    for key in manifest["settings"]:
        assert key in page.texts
    for version in read_starts(recipe.path("run"))[-1]["versions"].values():
        assert version in page.texts


def test_the_page_says_what_was_trained(recipe: Recipe) -> None:
    assert "all" in page_of(run_report(recipe)).texts
    path = recipe.path("run") / MANIFEST
    manifest = json.loads(path.read_text("utf-8"))
    assert manifest["counts"]["trained_parameters"] == parameter_count(recipe.model)
    manifest["settings"]["train.lora"] = {"rank": 8, "alpha": 16, "targets": ["all-linear"]}
    manifest["counts"]["trained_parameters"] = 12345
    path.write_text(json.dumps(manifest), "utf-8")
    assert "12,345 (LoRA, rank 8)" in page_of(run_report(recipe)).texts


def test_every_start_is_noted_and_the_recipe_repeats_the_run(recipe: Recipe, tmp_path: Path) -> None:
    run = recipe.path("run")
    starts = read_starts(run)
    assert [start["iteration"] for start in starts] == [0, 3]
    assert [start["command"][-1] for start in starts] == ["first go", "second go"]
    assert starts[0]["versions"]["openpangu-sft"] == __version__
    text = "\n".join(page_of(run_report(recipe)).texts)
    assert "from iteration 3:  openpangu-sft sft --set 'second go'" in text
    again = load_recipe(run / RECIPE, [f"paths.run={tmp_path / 'again'}"])
    run_sft(again, [])
    losses = [[row["loss"] for row in read_metrics(path)] for path in (run, tmp_path / "again")]
    assert losses[0] == losses[1]


def test_two_runs_side_by_side(recipe: Recipe, other: Path) -> None:
    path = run_report(recipe, None, other)
    assert path == recipe.path("run") / "comparison.html"
    source = path.read_text("utf-8")
    differences = source[source.index('id="differences"') : source.index("<h2>Data</h2>")]
    assert re.findall("<tr[^>]*><th>([^<]+)</th>", differences) == ["train.lr"]
    assert "<td>0.003</td><td>0.123</td>" in differences
    text = "\n".join(page_of(path).texts)
    for run in (recipe.path("run"), other):
        rows = read_metrics(run)
        assert f"{rows[0]['loss']:.4f} → {rows[-1]['loss']:.4f}" in text
    assert "not evaluated" in text
    same = run_report(recipe, other, _copied(other), other / "same.html").read_text("utf-8")
    assert "Nothing: settings, inputs and versions are the same." in same


def test_a_page_says_when_a_run_learns_by_heart(recipe: Recipe, other: Path) -> None:
    file = recipe.path("run") / EVALUATION
    evaluation = json.loads(file.read_text("utf-8"))
    rows = read_metrics(recipe.path("run"))
    assert rows[-1]["loss"] < rows[0]["loss"]
    for last, said in ((7.0, False), (9.0, True)):
        evaluation["results"][0]["loss"], evaluation["results"][-1]["loss"] = 8.0, last
        file.write_text(json.dumps(evaluation), "utf-8")
        assert ("Validation loss has risen while" in run_report(recipe).read_text("utf-8")) == said
    named = f">{escape(recipe.path('run').name)}: Validation loss has risen"
    assert named in run_report(recipe, None, other).read_text("utf-8")


def test_two_runs_of_one_name_are_told_apart(recipe: Recipe, other: Path, tmp_path: Path) -> None:
    alike = tmp_path / "elsewhere" / recipe.path("run").name
    shutil.copytree(other, alike)
    texts = page_of(run_report(recipe, None, alike)).texts
    assert f"elsewhere/{alike.name}" in texts
    assert f"{tmp_path.name}/{alike.name}" in texts


def _copied(run: Path) -> Path:
    copy = run.with_name("copy")
    shutil.copytree(run, copy)
    return copy


def evaluated_alike(run: Path, other: Path, answers: dict[int, str]) -> int:
    """Gives the other run the evaluation of a run, with other answers; returns the number of questions."""
    evaluation = json.loads((run / EVALUATION).read_text("utf-8"))
    questions = len(evaluation["questions"])
    for result in evaluation["results"]:
        if result["iteration"] in answers:
            result["answers"] = [answers[result["iteration"]]] * questions
    (other / EVALUATION).write_text(json.dumps(evaluation), "utf-8")
    return questions


def test_answers_of_two_runs_to_the_same_question(recipe: Recipe, other: Path) -> None:
    questions = evaluated_alike(recipe.path("run"), other, {6: "answer of the other"})
    page = page_of(run_report(recipe, None, other))
    assert page.texts.count("before training") == questions + 1, "once for each question, once in the table of losses"
    assert page.texts.count("answer of the other") == questions
    for run in (recipe.path("run"), other):
        assert page.texts.count(f"{run.name}, iteration 6") == questions


def test_answers_of_two_runs_that_began_with_different_models(recipe: Recipe, other: Path) -> None:
    questions = evaluated_alike(recipe.path("run"), other, {0: "first answer of the other"})
    page = page_of(run_report(recipe, None, other))
    assert page.texts.count("first answer of the other") == questions
    for run in (recipe.path("run"), other):
        assert page.texts.count(f"{run.name}, before training") == questions


def scored(run: Path, *answers: list[str]) -> None:
    """Scores the first two questions of a run, and puts their answers of each checkpoint in place."""
    evaluation = json.loads((run / EVALUATION).read_text("utf-8"))
    for question in evaluation["questions"][:2]:
        question.update(score="exact", reference="12")
    for result, first in zip(evaluation["results"], answers):
        result["answers"][:2] = first
    (run / EVALUATION).write_text(json.dumps(evaluation), "utf-8")


def cards(path: Path) -> list[list[str]]:
    """Name of each question on the page, and its verdicts."""
    source = path.read_text("utf-8")
    found = re.findall(r'<section class="card question">\s*<h3>(.*?)</h3>', source)
    return [[text.strip() for text in Texts(heading).texts if text.strip()] for heading in found]


def test_scores_and_what_has_changed_first(recipe: Recipe) -> None:
    scored(recipe.path("run"), ["12", "1"], ["1", "1"], ["[unused16]5?[unused17]12", "12."])
    path = run_report(recipe)
    source = path.read_text("utf-8")
    rows = re.findall("<tr[^>]*><th>([^<]+)</th><td>([^<]+)</td>", source[source.index('id="scores"') :])
    assert rows[:3] == [("before training", "1/2"), ("iteration 3", "0/2"), ("iteration 6", "2/2")]
    first, second, *others = [question.source for question in read_evaluation(recipe.path("run")).questions]
    assert cards(path) == [[second, "became right"], [first, "right"], *([other] for other in others)]
    texts = [text for text in page_of(path).texts if text.strip()]
    thinking = texts.index("iteration 6, thinking")
    assert texts[thinking : thinking + 4] == ["iteration 6, thinking", "5?", "iteration 6", "12"]
    assert (texts.count("expected"), texts.count("reference")) == (2, len(others))


def test_a_page_without_scores_has_no_table_of_them(recipe: Recipe) -> None:
    path = run_report(recipe)
    assert 'id="scores"' not in path.read_text("utf-8")
    assert all(len(card) == 1 for card in cards(path))


def test_scores_of_two_runs(recipe: Recipe, other: Path) -> None:
    run = recipe.path("run")
    shutil.copy(run / EVALUATION, other)
    scored(run, ["12", "1"], ["", ""], ["12", "12"])
    scored(other, ["12", "1"], ["", ""], ["12", "1"])
    path = run_report(recipe, None, other)
    source = path.read_text("utf-8")
    assert "<th>iteration 6</th><td>2/2</td><td>1/2</td>" in source
    assert "different questions" not in source
    changed, same, *_ = cards(path)
    assert changed[1:] == [f"{run.name}: became right", "other: wrong"]
    assert same[1:] == [f"{run.name}: right", "other: right"]
    evaluation = json.loads((other / EVALUATION).read_text("utf-8"))
    evaluation["questions"][0]["prompt"].append(1)
    (other / EVALUATION).write_text(json.dumps(evaluation), "utf-8")
    assert "The runs were asked different questions." in run_report(recipe, None, other).read_text("utf-8")


def test_two_runs_whose_paths_differ_far_from_the_end(recipe: Recipe, other: Path, tmp_path: Path) -> None:
    places = [tmp_path / name / "experiment" / "run" for name in ("a", "b")]
    for place, run in zip(places, (recipe.path("run"), other)):
        shutil.copytree(run, place)
    questions = evaluated_alike(*places, {6: "answer of the other"})
    page = page_of(run_report(recipe, *places))
    assert page.texts.count("answer of the other") == questions
    assert page.texts.count("b/experiment/run, iteration 6") == questions


def test_a_path_that_is_the_end_of_another() -> None:
    assert _names([Path("/a/run"), Path("/x/a/run")]) == ["a/run", "x/a/run"]


def test_versions_that_have_changed_between_two_starts(recipe: Recipe) -> None:
    path = recipe.path("run") / STARTS
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    lines[1]["versions"] |= {"torch": "9.9", "CANN": "8.0.RC3"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    texts = page_of(run_report(recipe)).texts
    assert f"{lines[0]['versions']['torch']}, then 9.9" in texts
    assert "8.0.RC3" in texts


@pytest.mark.parametrize(("title", "name"), [("Gradient norm", "grad_norm"), ("Learning rate", "lr")])
def test_charts_draw_the_numbers(recipe: Recipe, title: str, name: str) -> None:
    run = read_run(recipe.path("run"))
    heights, values = _heights(dict(charts_of([run]))[title], "#3f7fe0"), [row[name] for row in run.metrics]
    assert len(heights) == len(values) == 6
    assert abs(np.corrcoef(heights, values)[0, 1] + 1) < 1e-6, "SVG counts downwards"


def test_the_axis_of_the_loss_does_not_begin_at_0(recipe: Recipe) -> None:
    """Losses from 6.4 to 6.5 would be a flat line at the top."""
    rows = [{**row, "loss": 6.4 + 0.02 * number} for number, row in enumerate(read_run(recipe.path("run")).metrics)]
    run = read_run(recipe.path("run"))
    charts = dict(charts_of([Run(run.name, run.path, run.manifest, rows, [], None)]))
    heights = _heights(charts["Loss per trained token"], "#3f7fe0")
    assert heights[0] - heights[-1] > 100


def _heights(svg: str, colour: str) -> list[float]:
    """The y of every point of the line of a colour."""
    (path,) = re.findall(rf'<path d="([^"]+)"[^>]*style="fill: none; stroke: {colour}', svg)
    return [float(y) for _, y in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_leaves_a_gap(recipe: Recipe, bad: float) -> None:
    rows = read_metrics(recipe.path("run"))
    rows[2]["grad_norm"] = bad
    (recipe.path("run") / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    heights = _heights(dict(charts_of([read_run(recipe.path("run"))]))["Gradient norm"], "#3f7fe0")
    assert len(heights) == 5
    for row in rows:
        row["loss"] = row["grad_norm"] = bad
    (recipe.path("run") / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert f"{bad:.4f} → {bad:.4f}" in "\n".join(page_of(run_report(recipe)).texts)


@pytest.mark.parametrize("length", [MOST_POINTS, MOST_POINTS + 1, 3 * MOST_POINTS - 1])
def test_a_long_run_is_thinned_by_means(recipe: Recipe, length: int) -> None:
    run = read_run(recipe.path("run"))
    values = [float(number % 7) for number in range(length)]
    rows = [{**run.metrics[0], "iteration": number} for number in range(1, length + 1)]
    iterations, means = thinned(Run(run.name, run.path, run.manifest, rows, [], None), values)
    step = -(-length // MOST_POINTS)
    assert iterations.tolist() == list(range(1, length + 1, step))
    assert means == pytest.approx([np.mean(values[begin : begin + step]) for begin in range(0, length, step)])


def test_a_run_of_version_0_4_0_has_a_report_too(recipe: Recipe) -> None:
    run = recipe.path("run")
    for name in (STARTS, RECIPE, EVALUATION):
        (run / name).unlink()
    manifest = json.loads((run / MANIFEST).read_text("utf-8"))
    del manifest["counts"]["validation"]
    (run / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    text = "\n".join(page_of(run_report(recipe)).texts)
    assert "Its commands were not recorded" in text
    assert "run make evaluate" in text
    assert "no validation split" in text


def test_the_same_run_gives_the_same_page(recipe: Recipe) -> None:
    first = run_report(recipe).read_bytes()
    assert run_report(recipe).read_bytes() == first


def test_what_has_no_report(recipe: Recipe, tmp_path: Path) -> None:
    run = recipe.path("run")
    assert "no such directory" in refusal_of(run_report, recipe, tmp_path / "none")
    assert "is the same run twice" in refusal_of(run_report, recipe, None, run)
    assert "there is no such directory for the page" in refusal_of(
        run_report, recipe, None, None, tmp_path / "no/p.html"
    )
    assert not (tmp_path / "no").exists()
    assert "does not end in .html" in refusal_of(run_report, recipe, None, None, tmp_path / "page")
    nobody = Path("~nobody-here/run.html")
    for arguments in ((nobody,), (None, nobody), (None, None, nobody)):
        assert "begins with an unknown home directory" in refusal_of(run_report, recipe, *arguments)
    inside = next(run.glob("iter_*")) / "page.html"
    assert "which a stage replaces as a whole" in refusal_of(run_report, recipe, None, None, inside)
    (run / EVALUATION).write_text("{", "utf-8")
    assert "not an evaluation" in refusal_of(run_report, recipe)
    (run / METRICS).unlink()
    assert "no iteration yet" in refusal_of(run_report, recipe)
    assert not (run / "report.html").exists()


def test_a_line_cut_off_in_starts_is_left_out_and_later_ones_are_not(recipe: Recipe) -> None:
    path = recipe.path("run") / STARTS
    whole = path.read_bytes()
    path.write_bytes(whole + '{"time": "20", "command": ["问'.encode()[:-1])
    assert len(read_starts(recipe.path("run"))) == 2
    run_report(recipe)
    record_start(recipe, Manifest("run"), 6, ["sft", "\u2028\udcff"])
    starts = read_starts(recipe.path("run"))
    assert [start["iteration"] for start in starts] == [0, 3, 6]
    assert starts[2]["command"] == ["openpangu-sft", "sft", "\u2028\udcff"]
    assert path.read_bytes().startswith(whole)


DROPPED = object()


def with_manifest(run: Path, part: str, name: str, value: object) -> None:
    content = json.loads((run / MANIFEST).read_text("utf-8"))
    content[part][name] = value
    if value is DROPPED:
        del content[part][name]
    (run / MANIFEST).write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize(
    ("part", "name"),
    [("counts", name) for name in ("packs", "packed", "tokens", "trained_tokens")]
    + [("settings", name) for name in ("data.seq_length", "train.iterations", "train.global_batch_size")],
)
def test_a_manifest_that_is_damaged_is_named(recipe: Recipe, part: str, name: str) -> None:
    with_manifest(recipe.path("run"), part, name, "many")
    expected = f"{MANIFEST}: not a manifest: {part}.{name}: Input should be a valid integer"
    assert expected in refusal_of(run_report, recipe)
    with_manifest(recipe.path("run"), part, name, 0)
    assert run_report(recipe).is_file()
    with_manifest(recipe.path("run"), part, name, DROPPED)
    assert f"{MANIFEST}: not a manifest: {name} is missing" in refusal_of(run_report, recipe)


def test_a_run_of_a_version_that_recorded_no_engine(recipe: Recipe) -> None:
    with_manifest(recipe.path("run"), "settings", "train.engine", DROPPED)
    assert "engine unknown" in run_report(recipe).read_text("utf-8")


@pytest.mark.parametrize("line", ["[]", "{}", '"x"', "garbage", '{"time": 1}'])
def test_a_line_of_starts_that_is_damaged_is_named(recipe: Recipe, line: str) -> None:
    with (recipe.path("run") / STARTS).open("a", encoding="utf-8") as stream:
        stream.write(f"{line}\n")
    assert f"{STARTS}:3: " in refusal_of(run_report, recipe)


@pytest.mark.parametrize(("name", "value"), [("seconds", float("nan")), ("seconds", 0), ("loss", 1.7e308)])
def test_figures_that_are_odd_have_a_report_too(recipe: Recipe, name: str, value: float) -> None:
    rows = read_metrics(recipe.path("run"))
    for row in rows[1:]:
        row[name] = value
    (recipe.path("run") / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert run_report(recipe).is_file()


SEEN = """
  charts: all(".chart svg", (svg) => [svg.getBoundingClientRect().width, svg.getBoundingClientRect().height]),
  lines: all('.chart svg path[style*="#3f7fe0"]').length,
  questions: all(".question").length,
  tiles: all(".tile .value", (value) => [value.getBoundingClientRect().height, value.scrollWidth - value.clientWidth]),
"""


@needs_browser
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("policy", [True, False], ids=["as it is", "without its policy"])
def test_a_browser_shows_it_at_every_width_and_runs_nothing(
    recipe: Recipe, other: Path, tmp_path: Path, two: bool, policy: bool
) -> None:
    page = run_report(recipe, None, other if two else None).read_text("utf-8")
    evaluation = read_evaluation(recipe.path("run"))
    assert evaluation
    page = re.sub(r"\d+\.\d{4} → \d+\.\d{4}", "12.3456 → 10.1234", page)  # the longest that is likely
    found = measured(tmp_path, page if policy else POLICY.sub("", page), SEEN)
    require_harmless(found)
    for seen in found.values():
        assert len(seen["charts"]) == 4
        assert all(width > 200 and 100 < height < width for width, height in seen["charts"]), seen["charts"]
        assert all(height < 30 and wider <= 0 for height, wider in seen["tiles"]), seen["tiles"]  # one line each
        assert seen["lines"] >= 4
        assert seen["questions"] == len(evaluation.questions) > 0


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_curves_are_seen_on_light_and_on_dark(recipe: Recipe, tmp_path: Path, dark: bool) -> None:
    path, shot = run_report(recipe), tmp_path / "shot.png"
    browse(
        path,
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        "--window-size=1280,900",
        f"--screenshot={shot}",
    )
    pixels = matplotlib.image.imread(shot)[..., :3]
    blue = np.array([0x3F, 0x7F, 0xE0]) / 255
    assert (np.abs(pixels - blue).max(-1) < 0.06).sum() > 200, "the curves"
    corner = pixels[2, 2].mean()
    assert corner < 0.2 if dark else corner > 0.9


def test_make_report_of_a_run_by_its_recipe(recipe: Recipe, trained: list[str]) -> None:
    make = shutil.which("make")
    assert make
    arguments = [f"RUN={recipe.path('run')}", f"VENV={Path(sys.executable).parents[1]}", "RUNTIME=host"]
    done = subprocess.run([make, "report", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == recipe.path("run") / "report.html"
    assert Path(done.stdout.strip()).is_file()
