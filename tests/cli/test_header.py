"""What `make sft` says before it begins."""

from __future__ import annotations

import pytest

from conftest import MakeRecipe
from openpangu_sft.cli.header import header, show_header

COUNTS = {"packed": 5000, "packs": 600, "tokens": 60_000, "trained_tokens": 15_000, "validation": {"packs": 32}}


def test_of_a_plain_run(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("train.iterations=1500", "train.save_interval=100", "train.keep_checkpoints=3")
    shown = header(recipe, COUNTS)
    assert list(shown) == [
        "model",
        "engine",
        "data",
        "steps",
        "epochs",
        "learning rate",
        "checkpoints",
        "writes to",
        "to stop",
    ]
    assert shown["model"].endswith(" parameters")
    assert shown["engine"] == "transformers, fp32, 1 x process, train.device cpu"
    assert shown["data"] == "5,000 conversations in 600 packs: 60,000 tokens, 25.0% trained"
    assert shown["steps"] == "1,500 of 2 packs (200 tokens)"
    assert shown["epochs"] == "5.00"
    assert shown["learning rate"] == "0.003, warm-up of 2 steps, cosine to 0.0001"
    assert shown["checkpoints"].startswith("every 100 steps, 3 kept: ")
    assert shown["writes to"] == str(recipe.path("run"))


def test_of_lora_on_npus_with_validation(make_recipe: MakeRecipe) -> None:
    several = ["train.engine=mindspeed", "train.device=auto", "train.precision=bf16", "parallel.devices_per_node=4"]
    several += ["parallel.tensor=2", "parallel.context=2", "train.lora.rank=4", "train.lr_decay_style=constant"]
    several += ["train.eval_interval=20", "train.save_interval=40", "train.iterations=400"]
    several += ["train.keep_checkpoints=2", "train.keep_best=true"]
    shown = header(make_recipe(*several), COUNTS)
    assert "in adapters trained" in shown["model"]
    assert shown["engine"] == "mindspeed, bf16, 4 x NPU: CP 2, TP 2"
    assert shown["learning rate"] == "0.003, warm-up of 2 steps, constant"
    assert shown["validation"] == "every 20 steps on 32 packs"
    assert shown["checkpoints"].startswith("every 40 steps, 3 kept: ")


@pytest.mark.parametrize(("iterations", "warned"), [(3000, False), (3001, True)])
def test_more_than_ten_epochs_are_said(
    make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str], iterations: int, warned: bool
) -> None:
    show_header(make_recipe(f"train.iterations={iterations}"), COUNTS)
    said = capsys.readouterr().err
    assert ("every pack is seen 10.0 times: much for fine-tuning" in said.replace("\n", " ")) == warned
