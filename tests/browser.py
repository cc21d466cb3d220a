"""Pages in headless Chromium: laid out at several widths, and looked at for anything that acts."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conftest import PATIENCE

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")

# what each of them would do is seen in the document's data-acted
ACT = "document.documentElement.dataset.acted=1"
HOSTILE = f'<script>{ACT}</script><img src=x onerror="{ACT}"></span></div></section></main><svg onload="{ACT}">"\'&amp;'
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')

WIDTHS = (1280, 420, 320)
MEASURE = """
<body><pre id="result"></pre><script>
const page = PAGE, widths = WIDTHS, found = {};
let left = widths.length;
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.onload = () => {
    const inside = frame.contentDocument, view = frame.contentWindow;
    const look = (element) => {
      const computed = view.getComputedStyle(element);
      return ["color", "backgroundColor", "borderBottomColor"].map((name) => computed[name]).join(" ");
    };
    const all = (selector, of) => Array.from(inside.querySelectorAll(selector), of);
    found[width] = {
      overflow: inside.documentElement.scrollWidth - view.innerWidth,
      scripts: all("script").length,
      acted: inside.documentElement.dataset.acted || document.documentElement.dataset.acted || "",
      requests: view.performance.getEntriesByType("resource").length,
      outside: all("body > :not(main)").length,
      SEEN
    };
    if (!--left) document.getElementById("result").textContent = JSON.stringify(found);
  };
  frame.srcdoc = page;
  document.body.append(frame);
}
</script>
"""


def browse(page: Path, *options: str) -> str:
    """Opens a page in headless Chromium, for which no network is there; returns what it prints."""
    assert BROWSER
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [
        f"--user-data-dir={page.parent / 'profile'}",
        "--proxy-server=127.0.0.1:9",
        "--virtual-time-budget=20000",
    ]
    finished = subprocess.run(
        [*command, *options, page.as_uri()], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    return finished.stdout


def measured(directory: Path, page: str, seen: str) -> dict[int, dict[str, Any]]:
    """Lays a page out in frames of several widths.

    Args:
        directory: for what the browser opens and keeps.
        page: its HTML.
        seen: entries of a JavaScript object, of what is to be found beside the usual; all(selector, of) and
            look(element), its colours, are there.

    Returns:
        What is found in each width.
    """
    script = MEASURE.replace("SEEN", seen).replace("WIDTHS", json.dumps(WIDTHS))
    wrapper = directory / "measure.html"
    wrapper.write_text(script.replace("PAGE", json.dumps(page).replace("<", "\\u003c")), "utf-8")
    result = re.search(r'<pre id="result">(.*?)</pre>', browse(wrapper, "--dump-dom", "--window-size=1400,1000"))
    assert result
    found: dict[str, dict[str, Any]] = json.loads(html.unescape(result.group(1)))
    assert sorted(map(int, found)) == sorted(WIDTHS)
    return {int(width): one for width, one in found.items()}


def require_harmless(found: dict[int, dict[str, Any]]) -> None:
    """Fails where a page is wider than its frame, has run something, asked for something or left its place."""
    for width, seen in found.items():
        assert seen["overflow"] <= 0, width
        assert (seen["scripts"], seen["acted"], seen["requests"], seen["outside"]) == (0, "", 0, 0)
