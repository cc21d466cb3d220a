"""The preview's page, as a parser and as a real browser see it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Optional

import matplotlib.image
import numpy as np
import pytest

from browser import HOSTILE, POLICY, browse, measured, needs_browser, require_harmless
from conftest import MakeRecipe, conversation, write_samples
from openpangu_sft.dataset.merge import run_merge
from openpangu_sft.dataset.preprocess import run_preprocess
from openpangu_sft.preview.stage import Preview, run_preview

SAMPLES = [
    conversation("Ask", HOSTILE, HOSTILE, "done", system=HOSTILE),
    conversation("写一首诗", "床前明月光，\n疑是地上霜。🎉\n" * 4, "Thanks", "  " + "unbroken" * 30),
    conversation("Hi", "Hello"),
]
SEEN = """
  trained: all(".sample .trained", look), ignored: all(".sample .ignored", look),
  middles: all(".chart", (chart) => [".plot", ".ticks span:nth-child(2)"].map((part) => {
    const place = chart.querySelector(part).getBoundingClientRect();
    return (place.left + place.right) / 2;
  })),
"""


@pytest.fixture
def previewed(make_recipe: MakeRecipe) -> tuple[Preview, str]:
    """A preview of hostile and long samples, and its page."""
    recipe = make_recipe("data.seq_length=1024")
    write_samples(recipe.path("samples") / "a.jsonl", SAMPLES)
    run_preprocess(recipe)
    run_merge(recipe)
    preview, path = run_preview(recipe)
    return preview, path.read_text("utf-8")


class Elements(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.tokens: list[list[str]] = []  # classes, text and id of each token of a sample
        self._within: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        names = dict(attrs).get("class") or ""
        if tag in ("meta", "br"):
            return
        self._within.append(names or tag)
        if names.startswith("token ") and "tokens" in self._within:
            self.tokens.append([names])

    def handle_endtag(self, tag: str) -> None:
        self._within.pop()

    def handle_data(self, data: str) -> None:
        if "tokens" in self._within and data.strip():
            self.tokens[-1].append(data)


def test_page_shows_every_token_with_its_id_and_its_mark(previewed: tuple[Preview, str]) -> None:
    preview, page = previewed
    assert page.lstrip().startswith("<!DOCTYPE html>")
    shown = Elements(page).tokens
    expected = []
    for token in (token for segment in preview.segments for turn in segment.turns for token in turn.tokens):
        names = f"token {'trained' if token.trained else 'ignored'}{' control' if token.control else ''}"
        expected.append([names, token.text, str(token.number)])
    assert shown == expected
    assert len(shown) > 500


def test_page_needs_nothing_and_holds_nothing_that_acts(previewed: tuple[Preview, str]) -> None:
    _, page = previewed
    elements = Elements(page)
    assert not elements.tags & {"script", "link", "img", "svg", "iframe", "object", "embed", "base", "form", "a"}
    assert not elements.attributes & {"src", "href", "srcset", "data", "action", "background"}
    assert not [name for name in elements.attributes if name.startswith("on")]
    style = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]
    assert "http" not in POLICY.sub("", page).replace("http-equiv", "")
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in style[0]


@needs_browser
@pytest.mark.parametrize("policy", [True, False], ids=["as it is", "without its policy"])
def test_browser_lays_it_out_and_runs_nothing(previewed: tuple[Preview, str], tmp_path: Path, policy: bool) -> None:
    preview, page = previewed
    found = measured(tmp_path, page if policy else POLICY.sub("", page), SEEN)
    require_harmless(found)
    trained = sum(segment.trained for segment in preview.segments)
    for seen in found.values():
        assert len(seen["middles"]) == 2
        assert all(abs(label - plot) < 1.5 for plot, label in seen["middles"]), seen["middles"]
        assert len(seen["trained"]) == trained
        assert len(seen["ignored"]) == sum(segment.length for segment in preview.segments) - trained
        assert len(set(seen["trained"])) == 1
        assert not set(seen["trained"]) & set(seen["ignored"])
        assert all("rgba(0, 0, 0, 0)" in style for style in seen["ignored"])  # neither background nor underline
        assert "rgba(0, 0, 0, 0)" not in seen["trained"][0]


@needs_browser
def test_browser_would_have_run_what_is_not_escaped(previewed: tuple[Preview, str], tmp_path: Path) -> None:
    """What the test above relies on: the hostile text acts where nothing keeps it from it."""
    _, page = previewed
    found = measured(tmp_path, POLICY.sub("", page).replace("<main>", f"<main>{HOSTILE}"), SEEN)
    assert {seen["acted"] for seen in found.values()} == {"1"}


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshot_is_not_blank(previewed: tuple[Preview, str], tmp_path: Path, scheme: str) -> None:
    picture = tmp_path / f"{scheme}.png"
    options = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(tmp_path / "preview.html", f"--screenshot={picture}", "--window-size=1280,1600", *options)
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape[:2] == (1600, 1280)
    assert len(np.unique((pixels * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 50
    assert (pixels.mean() < 0.4) == (scheme == "dark")
