"""What version 0.5.0 has left in /cache is still read: dataset, checkpoints, and a run that has not ended.

version_0_5_0.tar.xz holds such a folder, made by the stages of commit ad6c4e5: 19 of the example conversations, a model
of two layers, and a run of 6 iterations of which the checkpoint of iteration 3 was kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, load_file

from conftest import PATIENCE
from openpangu_sft.dataset.index_file import PREFIX, VALIDATION, read_rows
from openpangu_sft.dataset.segments import segment_runs

HERE = Path(__file__).parent
SIZES = [
    "model.num_layers=2",
    "model.hidden_size=8",
    "model.ffn_hidden_size=16",
    "model.num_attention_heads=2",
    "model.num_query_groups=1",
    "model.kv_channels=4",
    "model.vocab_size=800",
    "data.seq_length=256",
    "data.workers=1",
    "data.validation_share=0.2",
    "train.global_batch_size=2",
    "train.iterations=6",
    "train.lr_warmup_iterations=2",
    "train.save_interval=3",
    "train.device=cpu",
    "chat.max_new_tokens=8",
]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The folder as 0.5.0 has left it, but for its place."""
    with tarfile.open(HERE / "version_0_5_0.tar.xz") as archive:
        archive.extractall(tmp_path / "cache")
    return tmp_path / "cache"


def stage(cache: Path, name: str, *arguments: str) -> str:
    """Runs a stage on it as its user would; what it has printed."""
    settings = [f"--set={text}" for text in (f"paths.cache={cache}", *SIZES)]
    command = [
        sys.executable,
        "-m",
        "openpangu_sft",
        name,
        "--recipe",
        str(HERE.parent / "recipes/demo.yaml"),
        *settings,
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def content(directory: Path) -> dict[str, str]:
    """Sums of Megatron's files in a packed dataset, or of a checkpoint's."""
    kept = (path for path in sorted(directory.rglob("*")) if path.suffix in (".bin", ".idx", ".pt", ".safetensors"))
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}
    return {name: digest for name, digest in found.items() if not name.endswith("_roles.bin")}


def metrics(cache: Path) -> list[dict[str, Any]]:
    """Lines of the run's metrics."""
    return [json.loads(line) for line in (cache / "sft_outputs/metrics.jsonl").read_text("utf-8").splitlines()]


def test_its_dataset_passes_and_is_shown(cache: Path) -> None:
    stage(cache, "inspect")
    stage(cache, "preview")
    assert "validation" in (cache / "finetune_dataset/merged/manifest.json").read_text("utf-8")


def segments(dataset: Path) -> list[tuple[bytes, ...]]:
    """Token ids and labels of every segment, sorted: training's, then validation's."""
    found = []
    for prefix in (PREFIX, VALIDATION):
        ids, labels, numbers = (
            read_rows(dataset, prefix, field, 256) for field in ("input_ids", "labels", "attention_mask")
        )
        runs = zip(*segment_runs(numbers))
        found += sorted((ids[row, begin:end].tobytes(), labels[row, begin:end].tobytes()) for row, begin, end in runs)
    return found


def test_its_samples_give_the_same_shards_and_a_dataset_of_the_same_segments(cache: Path) -> None:
    """Not of the same packs: since 0.6.0 merge packs the underfilled ones of both shards again."""
    data = cache / "finetune_dataset"
    shards, before = {name: content(data / "shards" / name) for name in ("en", "zh")}, segments(data / "merged")
    shutil.rmtree(data)
    stage(cache, "preprocess")
    stage(cache, "merge")
    assert [len(files) for files in shards.values()] == [12, 12]
    assert {name: content(data / "shards" / name) for name in shards} == shards
    assert len(before) == 19
    assert segments(data / "merged") == before


def test_its_checkpoint_is_converted_to_the_same_bytes(cache: Path) -> None:
    before = content(cache / "ckpts/pangu_model_mcore")
    stage(cache, "verify", "--tensors")
    shutil.rmtree(cache / "ckpts/pangu_model_mcore")
    stage(cache, "convert")
    assert len(before) == 1
    assert content(cache / "ckpts/pangu_model_mcore") == before


def test_its_run_resumes_with_the_same_losses(cache: Path) -> None:
    before = metrics(cache)
    stage(cache, "sft", "--set=train.loss=micro_batch")
    after = metrics(cache)
    assert [line["iteration"] for line in after] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in after] == pytest.approx([line["loss"] for line in before], abs=1e-5)
    stage(cache, "export", "--from", str(cache / "sft_outputs"))
    exported = load_file(cache / "export/model.safetensors")
    with tarfile.open(HERE / "version_0_5_0.tar.xz") as archive:
        weights = archive.extractfile("./export/model.safetensors")
        assert weights
        for name, tensor in load(weights.read()).items():
            np.testing.assert_allclose(exported[name], tensor, atol=1e-5)


def test_its_run_is_evaluated_and_reported(cache: Path) -> None:
    before = json.loads((cache / "sft_outputs/evaluation.json").read_text("utf-8"))
    stage(cache, "report")
    assert "6.6" in (cache / "sft_outputs/report.html").read_text("utf-8")
    stage(cache, "evaluate")
    after = json.loads((cache / "sft_outputs/evaluation.json").read_text("utf-8"))
    assert set(after) == set(before)
