"""Stage merge: the shards of exactly these samples files, in the order of their names, whatever lies around."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from conftest import ROOT, TINY, MakeRecipe, SmallDisk, conversation, write_samples
from openpangu_sft.artifacts.artifact import read_manifest
from openpangu_sft.cli.main import app
from openpangu_sft.dataset import preprocess
from openpangu_sft.dataset.index_file import FIELDS, read_rows
from openpangu_sft.dataset.inspect import run_inspect
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.model.batches import PackedDataset
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.template import TEMPLATE_DIGEST
from openpangu_sft.util.errors import explain_os_error
from parameter_ids import named_by
from refusals import refusal_of


def samples(name: str, count: int) -> list[dict[str, Any]]:
    return [conversation(f"{name} {number}", f"answer {number}" * (number % 4 + 1)) for number in range(count)]


def tree(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(directory: Path, field: str) -> np.ndarray:
    return np.array(read_rows(directory, "data", field, 128))


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    """Samples in three files whose order by name, by age and by size differ, and their shards."""
    recipe = make_recipe()
    for name, count in (("c", 5), ("a", 40), ("b", 20)):
        write_samples(recipe.path("samples") / f"{name}.jsonl", samples(name, count))
    run_preprocess(recipe)
    return recipe


def test_full_packs_are_joined_in_the_order_of_their_shards(recipe: Recipe) -> None:
    write_samples(recipe.path("samples") / "d.jsonl", samples("d", 1))
    run_preprocess(recipe)
    manifest = run_merge(recipe)
    shards = [recipe.path("shards") / name for name in "abcd"]
    full = np.concatenate([rows(shard, "attention_mask")[:, -1] > 0 for shard in shards])
    for field in FIELDS:
        merged = rows(recipe.path("dataset"), field)
        assert (merged[: full.sum()] == np.concatenate([rows(shard, field) for shard in shards])[full]).all()
    parts = [read_manifest(shard, "shard", "") for shard in shards]
    notes: dict[str, object] = {"reasons": {}, "ignored_keys": {}, "changes": {}}
    summed = {key: sum(part.counts[key] for part in parts) for key in parts[0].counts if key not in notes}
    before, again = summed["packs"], np.count_nonzero(~full)
    packs = len(rows(recipe.path("dataset"), "labels"))
    assert before - again < packs < before
    assert manifest.counts == {**summed, **notes, "packs": packs, "packs_in_shards": before, "packed_again": again}
    assert manifest.counts["packed"] == 66
    assert list(manifest.inputs) == ["a", "b", "c", "d"]
    assert read_manifest(recipe.path("dataset"), "dataset", "") == manifest
    assert len(PackedDataset(recipe.path("dataset"), 128)) == manifest.counts["packs"]


def test_many_small_files_need_hardly_more_packs_than_one(
    make_recipe: MakeRecipe, tiny_hf: Path, tmp_path: Path
) -> None:
    """Of training data and of validation; the result passes and is the same with two workers."""
    split = ["data.validation_share=0.3", "data.seq_length=256"]
    all_samples = samples("small", 60)
    one = make_recipe(*split, "paths.samples=one", "paths.shards=one_shards", "paths.dataset=one_merged")
    write_samples(one.path("samples") / "all.jsonl", all_samples)
    many = make_recipe(*split)
    for number, sample in enumerate(all_samples):
        write_samples(many.path("samples") / f"{number:02}.jsonl", [sample])
    for recipe in (one, many):
        run_preprocess(recipe)
        run_merge(recipe)
    wanted = read_manifest(one.path("dataset"), "dataset", "").counts
    counts = read_manifest(many.path("dataset"), "dataset", "").counts
    for found, best in ((counts, wanted), (counts["validation"], wanted["validation"])):
        assert found["packs"] <= best["packs"] + 1
        assert found["packs_in_shards"] == found["packed"] == found["packed_again"]
        assert (best["packs_in_shards"], best["packed_again"]) == (best["packs"], 0)
        assert [found[key] for key in ("packed", "tokens")] == [best[key] for key in ("packed", "tokens")]
    assert not run_inspect(many).findings
    first = tree(many.path("dataset"))
    sets = [
        f"--set={one}" for one in (*TINY, f"paths.cache={tmp_path}", f"paths.hf={tiny_hf}", *split, "data.workers=2")
    ]
    done = CliRunner().invoke(app, ["merge", "--recipe", str(ROOT / "recipes/demo.yaml"), *sets], standalone_mode=False)
    assert done.exception is None, done.output
    saved = 60 - counts["packs"] - counts["validation"]["packs"]
    assert f"; {saved} saved by packing underfilled packs of the shards again" in done.output
    assert tree(many.path("dataset")) == first


def test_one_file_needs_no_other_way(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    write_samples(recipe.path("samples") / "only.jsonl", samples("x", 9))
    run_preprocess(recipe)
    run_merge(recipe)
    shard, dataset = tree(recipe.path("shards") / "only"), tree(recipe.path("dataset"))
    assert {name: shard[name] for name in shard if name != "manifest.json"} == {
        name: dataset[name] for name in dataset if name != "manifest.json"
    }


def test_merging_again_gives_the_same_bytes_and_touches_no_shard(recipe: Recipe) -> None:
    """Upstream's second merge into the folder of its inputs copies its own output until the disk is full."""
    shards = tree(recipe.path("shards"))
    run_merge(recipe)
    first = tree(recipe.path("dataset"))
    assert len(first) == 8  # six of Megatron's, the roles, the manifest
    for _ in range(2):
        run_merge(recipe)
        assert tree(recipe.path("dataset")) == first
    run_preprocess(recipe)
    run_merge(recipe)
    assert tree(recipe.path("dataset")) == first
    assert tree(recipe.path("shards")) == shards


@pytest.mark.parametrize("dataset", ["finetune_dataset/shards", "finetune_dataset/shards/merged", "finetune_dataset"])
def test_output_and_input_in_each_other_are_refused(recipe: Recipe, make_recipe: MakeRecipe, dataset: str) -> None:
    before = tree(recipe.path("shards"))
    assert "give paths." in refusal_of(make_recipe, f"paths.dataset={dataset}")
    links = recipe.path("dataset").parent / "links"
    links.symlink_to(recipe.path("shards").parent)  # what the recipe cannot see
    seen = make_recipe(f"paths.dataset={links}{dataset[len('finetune_dataset') :]}")
    assert "paths.shards and paths.dataset are the same or lie in each other" in refusal_of(run_merge, seen)
    assert tree(recipe.path("shards")) == before


def test_a_shard_that_is_left_over(recipe: Recipe) -> None:
    (recipe.path("samples") / "b.jsonl").unlink()
    expected = f"{recipe.path('shards') / 'b'}: belongs to no samples file as they are now -> "
    expected += "remove it, or run make preprocess again"
    assert refusal_of(run_merge, recipe) == expected
    run_preprocess(recipe)
    assert run_merge(recipe).counts["packed"] == 45


def test_a_shard_that_is_missing(recipe: Recipe) -> None:
    write_samples(recipe.path("samples") / "d.jsonl", samples("d", 3))
    assert refusal_of(run_merge, recipe).startswith(f"{recipe.path('shards') / 'd'}: no such directory")
    assert refusal_of(run_merge, recipe).endswith("-> run make preprocess")


@pytest.mark.parametrize("file", ["data_packed_labels_document.bin", "data_packed_input_ids_document.idx"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_shard_that_is_damaged(recipe: Recipe, file: str, damage: Callable[[Path], object]) -> None:
    run_merge(recipe)
    before = tree(recipe.path("dataset"))
    damage(recipe.path("shards") / "b" / file)
    assert refusal_of(run_merge, recipe).startswith(str(recipe.path("shards") / "b" / file))
    assert tree(recipe.path("dataset")) == before


@pytest.mark.parametrize(
    ("override", "said"),
    named_by(
        0,
        ("data.seq_length=64", "made with data.seq_length = 128, the recipe says 64 -> run make preprocess again"),
        ("data.seed=5", "made with data.seed = 1234, the recipe says 5 -> run make preprocess again"),
        ("data.on_bad_sample=skip", "made with data.on_bad_sample = refuse, the recipe says skip"),
    ),
)
def test_shards_made_with_other_settings(recipe: Recipe, make_recipe: MakeRecipe, override: str, said: str) -> None:
    assert refusal_of(run_merge, make_recipe(override)).startswith(f"{recipe.path('shards') / 'a'}: {said}")


def test_only_what_shapes_the_packs_must_be_the_same(recipe: Recipe, make_recipe: MakeRecipe) -> None:
    run_merge(make_recipe("data.workers=3", "train.lr=1e-4", "train.seed=5"))


def test_shards_made_with_another_tokenizer(
    recipe: Recipe, make_recipe: MakeRecipe, tiny_hf: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_hf, tmp_path / "other")
    run_merge(make_recipe(f"paths.hf={tmp_path}/other"))  # the same, elsewhere
    with (tmp_path / "other/tokenizer_config.json").open("a", encoding="utf-8") as stream:
        stream.write("\n")
    assert "made with tokenizer = " in refusal_of(run_merge, make_recipe(f"paths.hf={tmp_path}/other"))
    assert "no such directory" in refusal_of(run_merge, make_recipe(f"paths.hf={tmp_path}/none"))


def test_shards_made_with_another_template(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "TEMPLATE_DIGEST", "another")
    assert f"made with template = {TEMPLATE_DIGEST}, the recipe says another" in refusal_of(run_merge, recipe)


def test_samples_that_changed_since(recipe: Recipe) -> None:
    path = recipe.path("samples") / "b.jsonl"
    before = path.read_bytes()
    path.write_bytes(before.replace(b"answer 3", b"answer 4"))  # as long as before
    shard = recipe.path("shards") / "b"
    assert refusal_of(run_merge, recipe) == f"{shard}: made from another content of b.jsonl -> run make preprocess"
    path.write_bytes(before)
    run_merge(recipe)


def test_samples_renamed_since(recipe: Recipe) -> None:
    (recipe.path("samples") / "b.jsonl").rename(recipe.path("samples") / "z.jsonl")
    assert "belongs to no samples file as they are now" in refusal_of(run_merge, recipe)


def test_samples_edited_after_format(make_recipe: MakeRecipe) -> None:
    """What `make format` left carries a manifest; whoever edits such a file must not lose the edit without a word."""
    from openpangu_sft.conversations.format import run_format

    recipe = make_recipe()
    write_samples(recipe.path("raw") / "a.jsonl", samples("a", 5))
    run_format(recipe)
    run_preprocess(recipe)
    run_merge(recipe)
    with (recipe.path("samples") / "a.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(conversation("more", "yes")) + "\n")
    for stage in (run_preprocess, run_merge):
        message = refusal_of(stage, recipe)
        assert message.startswith(f"{recipe.path('samples') / 'a.jsonl'}: ")
        assert message.endswith("-> run make format again")


def test_what_a_killed_preprocess_left_is_ignored(recipe: Recipe) -> None:
    run_merge(recipe)
    expected = tree(recipe.path("dataset"))
    for name in (".a.staging", ".new.staging", ".old.retired"):
        shutil.copytree(recipe.path("shards") / "b", recipe.path("shards") / name)
    (recipe.path("shards") / ".b.staging").mkdir()
    (recipe.path("shards") / ".b.staging/spool").write_bytes(b"half")
    (recipe.path("shards") / "stray.txt").write_text("not ours", "utf-8")
    run_merge(recipe)
    assert tree(recipe.path("dataset")) == expected


def test_killed_between_the_two_renames_of_a_shard(recipe: Recipe) -> None:
    run_merge(recipe)
    expected = tree(recipe.path("dataset"))
    shard = recipe.path("shards") / "b"
    shard.rename(shard.with_name(".b.retired"))
    run_merge(recipe)
    assert tree(recipe.path("dataset")) == expected


def test_a_full_disk_leaves_the_earlier_result(make_recipe: MakeRecipe, recipe: Recipe, small_disk: SmallDisk) -> None:
    disk = small_disk(200)
    elsewhere = make_recipe(f"paths.dataset={disk}/merged")
    run_merge(elsewhere)
    before = tree(disk / "merged")
    write_samples(recipe.path("samples") / "d.jsonl", samples("d", 400))
    run_preprocess(recipe)
    with pytest.raises(OSError, match="No space left") as caught:
        run_merge(elsewhere)
    said = str(explain_os_error(caught.value))
    assert said.startswith(f"{disk}/")
    assert said.endswith(": no room left on the disk -> free some space, then run the stage again")
    assert tree(disk / "merged") == before


def test_somebody_elses_directory_is_never_replaced(recipe: Recipe, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work", "utf-8")
    assert "was not made by this stage" in refusal_of(run_merge, make_recipe(f"paths.dataset={tmp_path}/mine"))
    assert (tmp_path / "mine/thesis.txt").read_text("utf-8") == "years of work"
    assert run_merge(recipe).kind == "dataset"
