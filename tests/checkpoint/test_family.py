"""The models of the family: their recipes, and sizes that a recipe leaves to the checkpoint's config.json."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from checkpoint_files import hf_sizes, set_config
from conftest import ROOT, SHARED, TINY, MakeRecipe, conversation, write_samples
from documents import blocks
from openpangu_sft.artifacts.artifact import read_manifest
from openpangu_sft.checkpoint.convert import run_convert
from openpangu_sft.checkpoint.sharding import layout_of, mcore_tensors, parameter_count
from openpangu_sft.cli.main import app
from openpangu_sft.doctor.checks import CHECKS
from openpangu_sft.doctor.machine import Context, Machine, State, guarded
from openpangu_sft.plan.choose import choose
from openpangu_sft.plan.estimate import memory_of
from openpangu_sft.plan.memory import GIB
from openpangu_sft.plan.report import Report, as_json
from openpangu_sft.recipe.load import load_recipe
from openpangu_sft.recipe.model_config import model_of
from openpangu_sft.recipe.schema import Recipe
from parameter_ids import named_by
from refusals import refusal_of

CPU = ROOT / "recipes/cpu.yaml"
RECIPES = [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if path != CPU]
SEVEN = ROOT / "recipes/openpangu-7b.yaml"
PARAMETERS = {"demo": 1_612_800, "openpangu-1b": 1_155_912_192, "openpangu-7b": 8_030_887_936}
PARAMETERS["openpangu-1b-fast"] = PARAMETERS["openpangu-1b"]
PARAMETERS["openpangu-1b-lora"] = PARAMETERS["openpangu-1b"]
PARAMETERS["openpangu-7b-lora"] = PARAMETERS["openpangu-7b"]
UNKNOWN = "the recipe leaves out sizes of the model, and there is no config.json -> put the checkpoint there"


def seven(overrides: Sequence[str] = ()) -> Recipe:
    """The 7B's recipe, whose split and recomputation are auto."""
    return load_recipe(SEVEN, overrides, choose)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_planned_without_a_checkpoint(path: Path, tmp_path: Path) -> None:
    report = Report(load_recipe(path, [f"paths.cache={tmp_path}"], choose), [64.0])
    assert report.parameters == PARAMETERS[path.stem]
    assert report.memory.verdict(64) == "yes"
    assert json.dumps(as_json(report))


def test_the_recipe_that_takes_its_sizes_from_the_checkpoint_says_where_to_put_it(tmp_path: Path) -> None:
    recipe = load_recipe(CPU, [f"paths.cache={tmp_path}"], choose)
    said = refusal_of(Report, recipe, [64.0])
    assert said.startswith(f"{tmp_path}/ckpts/pangu_model: the recipe leaves out sizes of the model")


def test_the_7b_recipe_has_the_sizes_of_the_published_config() -> None:
    published = SHARED / "data/openpangu_7b/config.json"
    if not published.is_file():
        pytest.skip("the 7B's config.json is not beside the repository (shared/data)")
    assert model_of(json.loads(published.read_text("utf-8")), published) == seven().model


def test_parameters_of_the_7b() -> None:
    """32 heads and 8 groups of 128; q, k, v, o with biases, the MLP without; both ends of the vocabulary."""
    hidden, groups, ffn = 4096, 8 * 128, 12800
    attention = (hidden + 1) * (hidden + 2 * groups) + (hidden + 1) * hidden
    layer = attention + 3 * hidden * ffn + 2 * hidden
    assert 2 * 153376 * hidden + 34 * layer + hidden == PARAMETERS["openpangu-7b"]


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_the_7b_is_cut_without_padding(tensor: int) -> None:
    split = [f"parallel.tensor={tensor}", "parallel.context=1"]
    recipe = seven([*split, *(["parallel.pipeline=2"] if tensor < 8 else []), *NO_RECOMPUTE])
    layout = layout_of(recipe.model, recipe.parallel)
    assert layout.padded_vocab_size == 153376
    stages = [
        {t.name: t.shape for t in mcore_tensors(recipe.model, layout, tensor - 1, pp)} for pp in range(layout.pipeline)
    ]
    ends = ("embedding.word_embeddings.weight", "output_layer.weight")
    for name, held in zip(ends, ([True, *[False] * (len(stages) - 1)], [*[False] * (len(stages) - 1), True])):
        assert [name in stage for stage in stages] == held
        assert stages[held.index(True)][name] == (153376 // tensor, 4096)
    qkv = stages[0]["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert qkv == ((4 + 2) * 128 * 8 // tensor, 4096)


NO_RECOMPUTE = ["train.recompute.granularity=none"]


def test_34_layers_over_four_stages_need_a_list() -> None:
    split = ["parallel.tensor=1", "parallel.context=2", "parallel.pipeline=4", *NO_RECOMPUTE]
    assert "model.num_layers 34 is not a multiple of parallel.pipeline 4" in refusal_of(seven, split)
    recipe = seven([*split, "parallel.num_layer_list=[9,9,8,8]"])
    assert layout_of(recipe.model, recipe.parallel).stages == (9, 9, 8, 8)
    message = refusal_of(seven, ["parallel.tensor=16", "parallel.nodes=4"])
    assert "model.num_query_groups 8 is not a multiple of parallel.tensor 16" in message


FULL_RECOMPUTE = ["train.recompute.granularity=full", "train.recompute.num_layers=34"]


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        (["parallel.tensor=1", "parallel.pipeline=1", *FULL_RECOMPUTE], "no"),
        (["parallel.tensor=2", "parallel.pipeline=1", *FULL_RECOMPUTE], "yes"),
        ([], "yes"),
        (["parallel.tensor=8", "parallel.context=1", *FULL_RECOMPUTE], "yes"),
        (["parallel.tensor=2", "parallel.pipeline=1", *NO_RECOMPUTE], "no"),
    ],
)
def test_what_fits_64_gib(settings: list[str], fits: str) -> None:
    assert memory_of(seven(settings)).verdict(64) == fits


def test_the_layouts_of_the_7b_in_the_docs() -> None:
    text = (ROOT / "docs/plan.md").read_text("utf-8")
    rows = re.findall(r"^\| TP (\d), PP (\d), CP (\d)[^|]* \| (\d) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    assert len(rows) == 8
    for tensor, pipeline, context, data, *said in rows:
        split = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.context={context}"]
        again = [*split, "train.recompute.granularity=full", f"train.recompute.num_layers={34 // int(pipeline)}"]
        found = [seven(settings) for settings in (again, [*split, *NO_RECOMPUTE])]
        assert [f"{memory_of(recipe).needed / GIB:.1f}" for recipe in found] == said
        assert found[0].parallel.data == int(data)


# Sizes from config.json.


def test_the_recipe_without_sizes_in_the_docs(tmp_path: Path, tiny_hf: Path) -> None:
    (block,) = (block for block in blocks(ROOT / "docs/checkpoints.md") if block.lines[0] == "paths:")
    assert "model:" not in block.lines
    (tmp_path / "own.yaml").write_text("\n".join(block.lines), "utf-8")
    place = [f"paths.cache={tmp_path}"]
    base = load_recipe(tmp_path / "own.yaml", place).path("hf")
    base.mkdir(parents=True)
    shutil.copy(tiny_hf / "config.json", base)
    published = load_recipe(ROOT / "recipes/openpangu-1b.yaml").model
    set_config(base, **hf_sizes(published))
    recipe = load_recipe(tmp_path / "own.yaml", place)
    assert recipe.model == published
    assert memory_of(recipe).verdict(64) == "yes"


def own_recipe(tmp_path: Path, **model: Any) -> Path:
    """The demo's recipe with these sizes alone, its paths in the test's directory."""
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load((ROOT / "recipes/demo.yaml").read_text("utf-8"))
    content["paths"] = {"cache": str(tmp_path)}
    if model:
        content["model"] = model
    else:
        del content["model"]
    with (tmp_path / "own.yaml").open("w") as stream:
        yaml.dump(content, stream)
    return tmp_path / "own.yaml"


SMALL = [setting for setting in TINY if not setting.startswith("model.")]


@pytest.fixture
def base(tmp_path: Path, tiny_hf: Path) -> Path:
    """The checkpoint in the place where the recipe looks for it."""
    directory = tmp_path / "ckpts/pangu_model"
    shutil.copytree(tiny_hf, directory)
    return directory


@pytest.mark.parametrize("stated", [{}, {"num_layers": 2}, {"tie_word_embeddings": True, "rotary_base": 4e6}])
def test_what_is_left_out_comes_from_the_checkpoint(
    tmp_path: Path, base: Path, make_recipe: MakeRecipe, stated: dict[str, Any]
) -> None:
    whole = make_recipe(f"paths.hf={base}")
    recipe = load_recipe(own_recipe(tmp_path, **stated), SMALL)
    assert recipe.model == whole.model
    run_convert(recipe)
    found = (recipe.path("mcore") / "manifest.json").read_bytes()
    other = make_recipe(f"paths.hf={base}", "paths.mcore=stated")
    run_convert(other)
    assert (other.path("mcore") / "manifest.json").read_bytes() == found
    assert read_manifest(other.path("mcore"), "mcore", "").settings["model.num_layers"] == 2


def test_what_is_stated_is_checked(tmp_path: Path, base: Path) -> None:
    message = refusal_of(load_recipe, own_recipe(tmp_path, num_layers=3, norm_epsilon=1e-6), SMALL)
    assert message.startswith(f"{base / 'config.json'}: ")
    for part in ("model.num_layers is 3 in the recipe, 2 in", "model.norm_epsilon is 1e-06 in the recipe, 1e-05 in"):
        assert part in message
    assert message.endswith("-> set model.num_layers=2 model.norm_epsilon=1e-05, or leave them out of the recipe")


def test_settings_are_checked_against_sizes_of_the_checkpoint(tmp_path: Path, base: Path) -> None:
    message = refusal_of(load_recipe, own_recipe(tmp_path), [*SMALL, "data.seq_length=2048"])
    assert "data.seq_length 2048 is above model.max_position_embeddings 1024" in message


@pytest.mark.parametrize(
    ("model", "said"),
    named_by(
        0,
        ({"num_layers": "many"}, "model.num_layers = 'many': Input should be a valid integer"),
        ({"layers": 3}, "unknown key model.layers -> did you mean model.num_layers?"),
        ([], "model = []: Input should be a valid dictionary"),
    ),
)
def test_a_wrong_size_is_named_and_not_those_left_out(tmp_path: Path, base: Path, model: Any, said: str) -> None:
    path = own_recipe(tmp_path)
    content = YAML(typ="safe", pure=True).load(path.read_text("utf-8"))
    path.write_text(json.dumps({**content, "model": model}), "utf-8")
    assert said in refusal_of(load_recipe, path, SMALL)
    shutil.rmtree(base)
    assert said in refusal_of(load_recipe, path, SMALL)


@pytest.mark.parametrize("content", ['{"model_type": "qwen2"}', "{"])
def test_a_config_that_gives_no_sizes_is_named_by_what_needs_them(tmp_path: Path, base: Path, content: str) -> None:
    (base / "config.json").write_text(content)
    recipe = load_recipe(own_recipe(tmp_path), SMALL)
    assert refusal_of(parameter_count, recipe.model).startswith(f"{base / 'config.json'}: ")
    finding = guarded("inputs", lambda: CHECKS["inputs"](Context(recipe, Machine(Path("/")))))
    assert finding.state == State.WARNING  # no conversations; the file alone is the next finding
    (tmp_path / "raw").mkdir(exist_ok=True)
    finding = guarded("inputs", lambda: CHECKS["inputs"](Context(recipe, Machine(Path("/")))))
    assert (finding.state, str(base / "config.json") in finding.found) == (State.FAILED, True)


@pytest.mark.parametrize("stated", [{}, {"num_layers": 2}])
def test_without_a_checkpoint_the_first_stage_works_and_what_needs_sizes_says_so(
    tmp_path: Path, stated: dict[str, Any]
) -> None:
    path = own_recipe(tmp_path, **stated)
    write_samples(tmp_path / "raw/a.jsonl", [conversation("问", "答")])
    options = ["--recipe", str(path), *(word for setting in SMALL for word in ("--set", setting))]
    done = CliRunner().invoke(app, ["format", *options])
    assert done.exit_code == 0, done.output
    for command in ("plan", "demo"):
        done = CliRunner().invoke(app, [command, *options])
        message = str(done.exception)
        assert type(done.exception).__name__ == "SizesUnknown", done
        assert message.startswith(f"{tmp_path / 'ckpts/pangu_model'}: {UNKNOWN}")
        assert message.endswith("(paths.hf), or state them under model:")


def test_doctor_skips_what_it_cannot_know_without_sizes(tmp_path: Path) -> None:
    context = Context(load_recipe(own_recipe(tmp_path), SMALL), Machine(Path("/")))
    for name in ("memory", "disk"):
        finding = guarded(name, lambda name=name: CHECKS[name](context))
        assert (finding.state, "no config.json in" in finding.found) == (State.SKIPPED, True)
    assert guarded("inputs", lambda: CHECKS["inputs"](context)).state == State.WARNING


def test_a_job_for_kubernetes_leaves_out_the_same_sizes(tmp_path: Path) -> None:
    options = ["--recipe", str(own_recipe(tmp_path, num_layers=2)), "--claim", "x"]
    done = CliRunner().invoke(app, ["kubernetes", *options])
    assert done.exit_code == 0, done.output
    config, _ = YAML(typ="safe", pure=True).load_all(done.stdout)
    (tmp_path / "pod.yaml").write_text(config["data"]["recipe.yaml"], "utf-8")
    model = YAML(typ="safe", pure=True).load(config["data"]["recipe.yaml"])["model"]
    assert model == {"num_layers": 2, "normalization": "RMSNorm", "activation": "swiglu"}
    assert isinstance(load_recipe(tmp_path / "pod.yaml"), Recipe)


def test_a_recipe_without_sizes_reaches_a_worker_process(tmp_path: Path) -> None:
    recipe = pickle.loads(pickle.dumps(load_recipe(own_recipe(tmp_path, num_layers=2), SMALL)))
    assert recipe.model.num_layers == 2
    assert UNKNOWN in refusal_of(lambda: recipe.model.hidden_size)
    assert UNKNOWN in refusal_of(parameter_count, recipe.model)
