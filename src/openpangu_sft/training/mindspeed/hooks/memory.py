"""Prints the device memory of a run once, as JSON; training/mindspeed/log.py reads the line."""

from __future__ import annotations

from torch import distributed

from openpangu_sft.training.run.memory import MEASURED_AFTER, measure


def report_memory(iterations: int) -> None:
    """To be called by all processes after each iteration, with the number of those since the start."""
    if iterations == MEASURED_AFTER:
        found = measure()
        if distributed.get_rank() == distributed.get_world_size() - 1:  # which also prints the iterations
            print(f"openpangu-sft memory: {found.model_dump_json()}", flush=True)
