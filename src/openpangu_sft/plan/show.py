"""The plan on a terminal of 80 columns: tables, and a line for each thing to know or to do."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from openpangu_sft.plan.memory import room, verdict
from openpangu_sft.plan.parts import GIB, Memory, Part
from openpangu_sft.plan.report import Advice, Report
from openpangu_sft.plan.search import Candidate
from openpangu_sft.plan.transformers_memory import logits_bytes
from openpangu_sft.util.console import print_rows, print_table

NOT_COUNTED = {
    "mindspeed": "Not counted: CANN's context, workspaces of operators, gaps in torch_npu's memory; 1/10 of a device "
    "is left to them. An estimate: no NPU was at hand to compare it with.",
    "transformers": "Not counted: CUDA's context, workspaces of operators, gaps in torch's memory; 1/10 of a device is "
    "left to them. Compared with what torch allocates on a CPU, never with a GPU.",
}


def show_report(report: Report, to: Console) -> None:
    """Prints all of it."""
    _memory(report, to)
    _changes(report, to)
    _data(report, to)
    _time(report, to)
    for line in report.warnings:
        _say(to, line, style="yellow")


def _memory(report: Report, to: Console) -> None:
    memory, recipe = report.memory, report.recipe
    parallel = recipe.parallel
    device = "NPU" if recipe.train.engine == "mindspeed" else "process"
    title = f"{recipe.train.engine}, {report.parameters:,} parameters, {parallel.world} x {device}: DP {parallel.data}"
    if recipe.train.engine == "mindspeed":
        title += f", CP {parallel.context}, TP {parallel.tensor}, PP {parallel.pipeline}"
    _say(to, title, style="bold")
    rows = [_row(part) for part in memory.static]
    rows += [_row(part) for part in memory.fullest.parts]
    rows.append(("tensors at most", _gib(memory.peak), f"at its fullest: {memory.fullest.name}"))
    rows += [_row(part) for part in memory.outside]
    rows.append(("in all", _gib(memory.needed), _other_moments(report)))
    of = f" (stage {memory.stage})" if parallel.pipeline > 1 else ""
    print_rows(f"memory of {'an' if device == 'NPU' else 'a'} {device}{of}", ["", "GiB", "how"], rows, to)
    for advice in report.advice:
        left = room(advice.gib) - memory.needed
        words = {
            "yes": f"fits {advice.gib:g} GiB, with {left / GIB:.1f} left",
            "tight": f"fits {advice.gib:g} GiB only with less than 1/10 of it left",
            "no": f"does not fit {advice.gib:g} GiB",
        }
        _say(to, words[advice.verdict], style="green" if advice.verdict == "yes" else "yellow")
        for line in _advised(report, advice):
            _say(to, f"  {line}")
    if recipe.train.engine == "transformers" and report.counts:
        trained = report.counts["trained_tokens"] / report.counts["packs"] * recipe.train.micro_batch_size
        _say(
            to,
            f"Logits of as many targets as a pack has in the mean: {_gib(logits_bytes(recipe, round(trained)))} GiB.",
        )
    _say(to, NOT_COUNTED[recipe.train.engine])


def _advised(report: Report, advice: Advice) -> Iterator[str]:
    """What to set, to fit or to compute less."""
    if advice.verdict != "yes" and not advice.nearest:
        yield "no recompute, CP, TP, PP or micro batch makes it fit -> more devices, or a shorter data.seq_length"
    if advice.nearest:
        yield f"to fit: {_settings(advice.nearest)}: {_gib(advice.nearest.memory.needed)} GiB{_then(advice.nearest)}"
    for one in advice.lighter:
        less = f", {1 - one.work / report.work:.0%} less to compute" if one.work < report.work else ""
        yield f"faster: {_settings(one)}: {_gib(one.memory.needed)} GiB{less}{_then(one)}"


def _changes(report: Report, to: Console) -> None:
    """One setting at a time, whatever comes of it."""
    gibs = [advice.gib for advice in report.advice]
    rows = [("as it is", _gib(report.memory.needed), *_fit(report.memory, gibs), f"{report.work:.2f}")]
    for one in report.changes:
        name = " ".join(one.settings) + (" *" if one.converts else "")
        rows.append((name, _gib(one.memory.needed), *_fit(one.memory, gibs), f"{one.work:.2f}"))
    print_rows("what if", ["", "GiB", *(f"{gib:g}" for gib in gibs), "work"], rows, to)
    _say(to, "work: operations of an iteration, over those without recompute; what devices exchange is not in it.")
    if any(one.converts for one in report.changes):
        _say(to, "*: another layout of the checkpoint: run make convert again.")


def _data(report: Report, to: Console) -> None:
    recipe, disk = report.recipe, report.disk
    train = recipe.train
    rows = {
        "iterations": f"{train.iterations:,}, of them {train.lr_warmup_iterations / train.iterations:.0%} warm-up",
        "packs seen": f"{train.iterations * train.global_batch_size:,}, {train.global_batch_size:,} an iteration",
    }
    if report.course and report.counts:
        counts, course = report.counts, report.course
        rows["dataset"] = (
            f"{counts['packs']:,} packs, {counts['tokens']:,} tokens, {counts['trained_tokens']:,} trained"
        )
        rows["epochs"] = f"{course.epochs:,.2f}, one in {course.iterations_per_epoch:,.1f} iterations"
        rows["tokens seen"] = f"{course.tokens:,.0f}, {course.trained_tokens:,.0f} trained"
    else:
        rows["dataset"] = f"none yet in {recipe.path('dataset')} -> make preprocess, make merge"
    rows["a checkpoint"] = f"{disk.checkpoint / 1e9:,.3g} GB on disk"
    room_for = f"{disk.most / 1e9:,.3g} GB at most"
    rows["checkpoints"] = f"{disk.written:,} written, {disk.kept:,} kept: {room_for}"
    print_table("data and checkpoints", rows, to)


def _time(report: Report, to: Console) -> None:
    speed, recipe = report.speed, report.recipe
    share = f"{recipe.parallel.world} x {recipe.train.device_tflops:g} TFLOPS used in full"
    rows = {"at least": f"{_duration(report.least_seconds)}: {report.highest_rate:,.0f} tokens/s, {share}"}
    if report.seconds is None:
        rows["likely"] = f"{speed.source} -> make plan TOKENS_PER_SECOND=…, or after the first iterations of make sft"
    else:
        used = f"MFU {speed.tokens / report.highest_rate:.1%}" if speed.tokens else ""
        rows["likely"] = f"{_duration(report.seconds)}: {speed.tokens:,.0f} tokens/s ({speed.source}), {used}"
    if not report.counts:
        rows["tokens"] = "packs taken as full, as there is no dataset"
    print_table("time of all iterations", rows, to)


def _row(part: Part) -> tuple[str, str, str]:
    return part.name, _gib(part.size), part.how


def _other_moments(report: Report) -> str:
    memory = report.memory
    others = [moment for moment in memory.moments if moment is not memory.fullest]
    outside = memory.needed - memory.fullest.size
    return "at other moments: " + ", ".join(f"{one.name} {(outside + one.size) / GIB:.1f}" for one in others)


def _fit(memory: Memory, gibs: list[float]) -> list[str]:
    return [verdict(memory, gib) for gib in gibs]


def _settings(candidate: Candidate) -> str:
    return f'SET="{" ".join(candidate.settings)}"'


def _then(candidate: Candidate) -> str:
    return ", then make convert" if candidate.converts else ""


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def _say(to: Console, line: str, style: str = "") -> None:
    to.print(line, style=style, markup=False)
