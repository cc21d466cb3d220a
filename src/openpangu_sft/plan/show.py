"""The plan on a terminal of 80 columns: tables, and a line for each thing to know or to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from openpangu_sft.plan.choose import Choice, recomputed, split_of
from openpangu_sft.plan.estimate import on_this_cpu
from openpangu_sft.plan.memory import GIB, Part
from openpangu_sft.plan.report import Report
from openpangu_sft.recipe.schema import ChosenRecipe
from openpangu_sft.util.console import print_rows, print_table

NOT_COUNTED = {
    "mindspeed": "Not counted: CANN's context, workspaces of operators, fragmentation in torch_npu's allocator; 1/10 "
    "of a device is left for them. An estimate, not yet compared with an NPU.",
    "transformers": "Not counted: CUDA's context, workspaces of operators, fragmentation in torch's allocator; 1/10 of "
    "a device is left for them. Compared with torch's allocations on a CPU, not yet with a GPU.",
}
SHOWN = 5  # splits of the table
LEGEND = (
    "GFLOP: per token, waiting of pipeline stages included. GB sent: per device and iteration, of ulysses and tensor "
    "parallel layers; work: GFLOP, and what could be computed meanwhile. act.: and activation functions of the other "
    "layers. Another TP or PP: run make convert again."
)


def show_report(report: Report, to: Console) -> None:
    _memory(report, to)
    _splits(report, to)
    _data(report, to)
    if report.recipe.train.iterations:
        _time(report, to)
    for line in report.warnings:
        to.print(line, style="yellow")
    no_npu = report.recipe.train.engine == "mindspeed" and not any(Path("/dev").glob("davinci[0-9]*"))
    if no_npu and not on_this_cpu(report.recipe):
        to.print("There is no NPU here. To try every stage on this machine: RECIPE=recipes/cpu.yaml, or make demo")


def _memory(report: Report, to: Console) -> None:
    memory, recipe, parallel = report.memory, report.recipe, report.recipe.parallel
    device = "NPU" if recipe.train.engine == "mindspeed" else "process"
    title = f"{recipe.train.engine}, {report.parameters:,} parameters, {parallel.world} x {device}"
    to.print(f"{title}: {split_of(recipe)}", style="bold")
    if rank := recipe.train.lora.rank:
        to.print(f"LoRA of rank {rank}: {report.trained:,} parameters in adapters are trained")
    rows = [_row(part) for part in (*memory.static, *memory.fullest.parts)]
    rows.append(("peak of tensors", _gib(memory.peak), f"in phase {memory.fullest.name}"))
    rows += [_row(part) for part in memory.outside]
    rest = memory.needed - memory.fullest.size
    others = (f"{one.name} {_gib(rest + one.size, 1)}" for one in memory.phases if one is not memory.fullest)
    rows.append(("total", _gib(memory.needed), f"in other phases: {', '.join(others)}"))
    of = f" (stage {memory.stage})" if parallel.pipeline > 1 else ""
    print_rows(f"memory of {'an' if device == 'NPU' else 'a'} {device}{of}", ["", "GiB", "how"], rows, to)
    for gib, best in report.best.items():
        verdict = memory.verdict(gib)
        words = {
            "yes": f"fits {gib:g} GiB, with {_gib(memory.left(gib), 1)} left",
            "tight": f"fits {gib:g} GiB only with less than 1/10 of it left",
            "no": f"does not fit {gib:g} GiB",
        }
        to.print(words[verdict], style="green" if verdict == "yes" else "yellow")
        if verdict != "yes":
            to.print(f"  to fit: {advice(best, gib)}")
    if report.speed.memory:
        to.print(f"the run in {recipe.path('run')}: {report.speed.memory}")
    to.print(NOT_COUNTED[recipe.train.engine])


def advice(best: Sequence[Choice], gib: float) -> str:
    """What to do where a recipe does not fit a device; `best` are the splits of `auto`, best first."""
    if not best or not best[0].fits(gib):
        return "take more devices, or a shorter data.seq_length"
    return f'SET="train.device_memory={gib:g} parallel=auto train.recompute=auto", then make convert'


def _splits(report: Report, to: Console) -> None:
    if isinstance(report.recipe, ChosenRecipe):
        to.print(report.recipe.chosen)
    head = ["", "split", "recompute", "GiB", "GFLOP", "GB sent", "work"]
    for gib, best in report.best.items():
        fitting = {f"{number}": one for number, one in enumerate(best[:SHOWN], 1) if one.fits(gib)}
        rows = [(name, *_figures(one)) for name, one in {"now": report.now, **fitting}.items()]
        takes = "takes 1" if fitting else "nothing fits" if best else "no other split is valid"
        print_rows(f"auto, on devices of {gib:g} GiB: {takes}", head, rows, to)
    to.print(LEGEND)


def _figures(one: Choice) -> tuple[str, ...]:
    flops, sent, work = f"{one.flops / 1e9:.2f}", f"{one.sent / 1e9:,.0f}", f"{one.work / 1e9:.2f}"
    return split_of(one.recipe), recomputed(one.recipe), _gib(one.memory.needed), flops, sent, work


def _data(report: Report, to: Console) -> None:
    recipe, train, disk = report.recipe, report.recipe.train, report.disk
    rows = {"iterations": f"of {train.epochs:g} epochs: known after make merge"}
    if train.iterations:
        rows["iterations"] = f"{train.iterations:,}, {train.warmup / train.iterations:.0%} of them warm-up"
        packs = train.iterations * train.global_batch_size
        rows["packs seen"] = f"{packs:,}, {train.global_batch_size:,} per iteration"
    if report.course and report.counts:
        counts, course = report.counts, report.course
        tokens = f"{counts['tokens']:,} tokens, {counts['trained_tokens']:,} trained"
        rows["dataset"] = f"{counts['packs']:,} packs, {tokens}"
        rows["epochs"] = f"{course.epochs:,.2f}, one in {course.iterations_per_epoch:,.1f} iterations"
        rows["tokens seen"] = f"{course.tokens:,.0f}, {course.trained_tokens:,.0f} trained"
    else:
        rows["dataset"] = f"none yet in {recipe.path('dataset')} -> make preprocess, make merge"
    rows["a checkpoint"] = f"{disk.checkpoint / 1e9:,.3g} GB on disk"
    if train.iterations:
        rows["checkpoints"] = f"{disk.written:,} written, {disk.kept:,} kept: {disk.most / 1e9:,.3g} GB at most"
    print_table("data and checkpoints", rows, to)


def _time(report: Report, to: Console) -> None:
    speed, recipe = report.speed, report.recipe
    share = f"{recipe.parallel.world} x {recipe.train.device_tflops:g} TFLOP/s, MFU 100%"
    rows, cpu = {}, on_this_cpu(recipe)
    if not cpu:
        rows["at least"] = f"{_duration(report.least_seconds)}: {report.highest_rate:,.0f} tokens/s, {share}"
    if report.seconds is None:
        rows["likely"] = f"{speed.source} -> make plan TOKENS_PER_SECOND=…, or after the first iterations of make sft"
    else:
        used = f", MFU {speed.tokens / report.highest_rate:.1%}" if speed.tokens and not cpu else ""
        rows["likely"] = f"{_duration(report.seconds)}: {speed.tokens:,.0f} tokens/s ({speed.source}){used}"
    if not report.counts:
        rows["tokens"] = "packs are assumed to be full, as there is no dataset"
    print_table("time of all iterations", rows, to)


def _row(part: Part) -> tuple[str, str, str]:
    return part.name, _gib(part.size), part.how


def _gib(size: float, digits: int = 2) -> str:
    return f"{size / GIB:.{digits}f}"


def _duration(seconds: float) -> str:
    minutes = f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
    return f"{seconds:.0f} s" if seconds < 120 else minutes
