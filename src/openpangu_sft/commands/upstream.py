"""The command that gets what the mindspeed engine is made of."""

from __future__ import annotations

from pathlib import Path

from openpangu_sft.commands.base import app, print_table
from openpangu_sft.progress import console


@app.command("sources")
def sources_command() -> None:
    """MindSpeed-LLM and what it needs, pinned and patched.

    The commits of patches/upstream.toml, with the patches applied, in the folder .sources of this clone.
    MEGATRON_LM_URL, MINDSPEED_URL and MINDSPEED_LLM_URL name other places to fetch from.
    """
    from openpangu_sft.upstream import SOURCES, make_sources

    manifest, made = make_sources()
    rows = {}
    for name, chosen in manifest.settings.items():
        rows[name] = f"{chosen['commit'][:12]}, {manifest.counts[name]['files']:,} files"
        if chosen["patches"]:
            rows[name] += f", patched: {', '.join(Path(patch).stem for patch in chosen['patches'])}"
    print_table(f"sources: {SOURCES}", rows)
    if not made:
        console.print("unchanged, not made again")
