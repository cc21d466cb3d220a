"""Lets the real megatron-core 0.6.0 write what it has read, without CUDA: a checkpoint, or indexed datasets.

Only ever in a process of its own, because the stand-ins would leak.

Run as: python tests/megatron_on_cpu.py gpt     FOLDER_WITH_MEGATRON CHECKPOINT RESULT
        python tests/megatron_on_cpu.py dataset FOLDER_WITH_MEGATRON PREFIX...
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from openpangu_sft.checkpoint.files.torch_read import load_checkpoint_file
from openpangu_sft.model.tensors import as_tensor
from openpangu_sft.verify.rank import build, load_strictly, stand_in


def run_gpt(checkpoint: str, result: str) -> None:
    """Loads a checkpoint of TP 1, PP 1, and writes `model` as Megatron would save it, in the checkpoint's dtype."""
    content = load_checkpoint_file(Path(checkpoint))
    given, found = vars(content["args"]), content["model"]
    state = {name: value if value is None else as_tensor(value) for name, value in found.items()}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model = build(given, [given["num_layers"]], state["embedding.word_embeddings.weight"].dtype)
    load_strictly(model, state, Path(checkpoint))
    torch.save({"model": model.state_dict_for_save_checkpoint()}, result)


def run_datasets(*prefixes: str) -> None:
    """Reads indexed datasets; writes the rows of each to PREFIX.npy, and the dataset to PREFIX.copy.bin and .idx."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))  # every row is a document
        np.save(prefix + ".npy", np.stack([dataset[number] for number in range(len(dataset))]))
        builder = IndexedDatasetBuilder(prefix + ".copy.bin", dtype=np.int32)
        for number in range(len(dataset)):
            builder.add_item(torch.tensor(dataset[number]))
            builder.end_document()
        builder.finalize(prefix + ".copy.idx")


if __name__ == "__main__":
    command, core, *arguments = sys.argv[1:]
    stand_in(Path(core))
    {"gpt": run_gpt, "dataset": run_datasets}[command](*arguments)
