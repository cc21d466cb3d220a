"""The limit: SentencePiece on all cores and nothing else. Prints its seconds.

Texts are in memory and distributed before the clock starts, and the ids are discarded: no preprocessing with this
tokenizer can be faster.

Run as: python -m benchmarks.raw MODEL SAMPLES WORKERS
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from benchmarks.corpus import texts_of

BATCH = 1_000_000
"""Bytes of text per call of SentencePiece."""


def main(model: str, samples: str, workers: int) -> None:
    """Encodes all texts of the samples files."""
    processor = SentencePieceProcessor(model_file=model)
    hands = deal(read_texts(Path(samples)), workers)
    gc.freeze()  # otherwise each process's collector would copy the pages it touches
    context = multiprocessing.get_context("fork")
    start = context.Barrier(workers + 1)
    processes = [context.Process(target=_encode, args=(processor, hand, start)) for hand in hands]
    for process in processes:
        process.start()
    start.wait()
    began = time.perf_counter()
    for process in processes:
        process.join()
    print(time.perf_counter() - began)
    sys.exit(any(process.exitcode for process in processes))


def read_texts(directory: Path) -> list[str]:
    """All texts of the samples files in a directory."""
    texts: list[str] = []
    for file in sorted(directory.glob("*.jsonl")):
        with file.open(encoding="utf-8") as stream:
            for line in stream:
                texts += texts_of(json.loads(line))
    return texts


def deal(texts: list[str], workers: int) -> list[list[list[str]]]:
    """Batches per worker, evenly by bytes; smaller batches for few texts, so that every worker has some."""
    sizes = [len(text.encode()) for text in texts]
    limit = min(BATCH, sum(sizes) // (16 * workers) + 1)
    hands: list[list[list[str]]] = [[] for _ in range(workers)]
    held = [0] * workers
    batch: list[str] = []
    weight = 0
    for number, (text, size) in enumerate(zip(texts, sizes), 1):
        batch.append(text)
        weight += size
        if weight >= limit or number == len(texts):
            lightest = held.index(min(held))
            hands[lightest].append(batch)
            held[lightest] += weight
            batch, weight = [], 0
    return hands


def _encode(processor: SentencePieceProcessor, hand: list[list[str]], start: Barrier) -> None:
    start.wait()
    for batch in hand:
        processor.encode(batch, out_type=int, num_threads=1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
