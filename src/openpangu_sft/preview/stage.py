"""`make preview`: reads the merged dataset and writes the page."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional

from openpangu_sft.artifacts.artifact import read_manifest, require_settings
from openpangu_sft.artifacts.atomic import write_durably
from openpangu_sft.artifacts.checks import page_place
from openpangu_sft.dataset.index_file import AGAIN, Rows
from openpangu_sft.dataset.preprocess import data_settings
from openpangu_sft.preview.figures import Figures, figures_of, measure
from openpangu_sft.preview.segments import Segment, read_segment
from openpangu_sft.recipe.schema import Recipe
from openpangu_sft.tokenizer.tokenizer import Tokenizer
from openpangu_sft.util.errors import UserError, naming
from openpangu_sft.util.html import render_page

TEMPLATE = Path(__file__).with_name("page.html")

SHOWN = 3  # samples that are shown by default


class Preview(NamedTuple):
    """What is shown: numbers over a whole dataset, and samples token by token."""

    dataset: Path
    figures: Figures
    segments: list[Segment]


def run_preview(
    recipe: Recipe, sample: Optional[int] = None, count: Optional[int] = None, html: Optional[Path] = None
) -> tuple[Preview, Path]:
    """Makes the preview of `paths.dataset`; returns it and the path of its page.

    Raises `UserError` where there is no dataset, it was made with other settings, there is no such sample, or the page
    must not be written there.

    Args:
        sample: the first one to show, counted from 1 through the packs in their order; default: 1.
        count: how many to show; default: 3, or 1 with `sample`.
        html: the page; default: preview.html in `paths.cache`.
    """
    html = page_place(html, Path(recipe.paths.cache) / "preview.html")
    directory = recipe.path("dataset")
    manifest = read_manifest(directory, "dataset", "run make merge")
    tokenizer = Tokenizer(recipe.path("hf"), recipe.tokenizer.trust_remote_code)
    settings = data_settings(recipe)
    needed = {key: settings[key] for key in ("data.seq_length", "template", "tokenizer")}
    require_settings(directory, manifest.settings, needed, AGAIN)
    rows = Rows(directory, recipe.data.seq_length)
    statistics = measure(rows)
    counted = (len(statistics.fill), len(statistics.lengths), statistics.tokens, statistics.trained_tokens)
    for name, number in zip(("packs", "packed", "tokens", "trained_tokens"), counted):
        if manifest.counts.get(name) != number:
            what = f"holds {name} {number}, its manifest says {manifest.counts.get(name)}"
            raise UserError(what, where=directory, remedy=AGAIN)
    first, samples = 1 if sample is None else sample, len(statistics.lengths)
    if not 1 <= first <= samples:
        raise UserError(f"there is no sample {first}", where=directory, remedy=f"choose one from 1 to {samples:,}")
    last = min(samples, first - 1 + (count or (SHOWN if sample is None else 1)))
    segments = [read_segment(rows, statistics, tokenizer, number) for number in range(first, last + 1)]
    preview = Preview(directory, figures_of(statistics, manifest), segments)
    with naming(html.parent):
        html.parent.mkdir(parents=True, exist_ok=True)  # paths.cache, where the dataset lies elsewhere
    values = {"hf": recipe.path("hf"), "seq_length": recipe.data.seq_length}
    write_durably(html, render_page(TEMPLATE, preview=preview, figures=preview.figures, **values))
    return preview, html
