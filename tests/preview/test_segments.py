"""Attention never crosses a segment: the central promise of packing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openpangu_sft.dataset.segments import segment_bounds
from openpangu_sft.model.batches import Batch
from openpangu_sft.model.llama import SEGMENTS, PackLoss, build_model
from openpangu_sft.tokenizer.tokenizer import IGNORED

LENGTHS = (7, 1, 12, 5)


@pytest.fixture
def tensors(tiny_hf: Path) -> dict[str, torch.Tensor]:
    """Weights large enough, biases included, that a leak of attention shows in the loss."""
    generator = torch.Generator().manual_seed(7)
    shapes = {name: tensor.shape for name, tensor in load_file(str(tiny_hf / "model.safetensors")).items()}
    return {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}


@pytest.fixture
def pack_loss(tiny_hf: Path, tensors: dict[str, torch.Tensor]) -> PackLoss:
    return PackLoss(build_model(tiny_hf, tensors, SEGMENTS, torch.device("cpu")))


def samples() -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.RandomState(3)
    made = []
    for length in LENGTHS:
        ids = random.randint(3, 1500, length)
        labels = np.where(random.rand(length) < 0.6, ids, IGNORED)
        labels[0], labels[-1] = IGNORED, ids[-1] if length > 1 else IGNORED
        made.append((ids, labels))
    return made


def pack(rows: list[list[tuple[np.ndarray, np.ndarray]]], seq_length: int) -> Batch:
    ids = np.zeros((len(rows), seq_length), np.int64)
    labels = np.full((len(rows), seq_length), IGNORED)
    bounds = []
    for row, segments in enumerate(rows):
        numbers = np.zeros(seq_length, np.int32)
        begin = 0
        for number, (segment, targets) in enumerate(segments, 1):
            end = begin + len(segment)
            ids[row, begin:end], labels[row, begin:end], numbers[begin:end] = segment, targets, number
            begin = end
        bounds.append(segment_bounds(numbers))
    return Batch.of(ids, labels, bounds, torch.device("cpu"))


def plain_loss_sum(tiny_hf: Path, tensors: dict[str, torch.Tensor], ids: np.ndarray, labels: np.ndarray) -> float:
    """Summed loss of a sample run alone through the model's ordinary attention."""
    model = build_model(tiny_hf, tensors, "eager", torch.device("cpu"))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None]).logits[0, :-1].double()
    targets = torch.from_numpy(labels)[1:]
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED).item()


def test_loss_of_a_pack_is_the_sum_of_those_of_its_samples_alone(
    tiny_hf: Path, tensors: dict[str, torch.Tensor], pack_loss: PackLoss
) -> None:
    expected = sum(plain_loss_sum(tiny_hf, tensors, *sample) for sample in samples())
    with torch.no_grad():
        assert pack_loss(pack([samples()], 32)).item() == pytest.approx(expected, rel=1e-5)
        two_packs = pack([samples()[:2], samples()[2:]], 20)  # micro batch 2
        assert pack_loss(two_packs).item() == pytest.approx(expected, rel=1e-5)


def test_one_segment_over_the_pack_gives_another_loss(pack_loss: PackLoss) -> None:
    """The test above can fail: attention over the whole pack is visible in the loss."""
    batch = pack([samples()], 32)
    whole = replace(batch, position_ids=torch.arange(32)[None], segments=[[(0, 32)]])
    with torch.no_grad():
        assert abs(pack_loss(whole).item() - pack_loss(batch).item()) > 1e-2


def test_a_token_changes_nothing_outside_its_segment_and_before_it(pack_loss: PackLoss) -> None:
    batch = pack([samples()], 32)

    def hidden(ids: torch.Tensor) -> torch.Tensor:
        return pack_loss.model.model(
            input_ids=ids, position_ids=batch.position_ids, segments=batch.segments, use_cache=False
        ).last_hidden_state[0]

    changed = batch.input_ids.clone()
    changed[0, 10] += 1  # in the third segment, which is 8..20
    with torch.no_grad():
        differs = (hidden(batch.input_ids) != hidden(changed)).any(dim=1)
    assert differs.nonzero().flatten().tolist() == list(range(10, 20))


def test_gradients_equal_those_of_an_explicit_mask(
    tiny_hf: Path, tensors: dict[str, torch.Tensor], pack_loss: PackLoss
) -> None:
    batch = pack([samples()], 32)
    pack_loss(batch).backward()
    model = build_model(tiny_hf, tensors, "eager", torch.device("cpu"))
    allowed = torch.zeros(32, 32, dtype=torch.bool)
    for begin, end in batch.segments[0]:
        allowed[begin:end, begin:end] = torch.ones(end - begin, end - begin).tril().bool()
    mask = torch.zeros(1, 1, 32, 32).masked_fill(~allowed, torch.finfo(torch.float32).min)
    logits = model(batch.input_ids, attention_mask=mask, position_ids=batch.position_ids).logits
    torch.nn.functional.cross_entropy(
        logits[0, :-1], batch.labels[0, 1:], ignore_index=IGNORED, reduction="sum"
    ).backward()
    reference = dict(model.named_parameters())
    for name, parameter in pack_loss.model.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=1e-4, atol=1e-6, msg=name)
