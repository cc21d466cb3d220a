"""The command that looks at the machine: doctor."""

from __future__ import annotations

import os
from pathlib import Path

import click

from openpangu_sft.commands.base import stage
from openpangu_sft.progress import console
from openpangu_sft.recipe_file import load_recipe
from openpangu_sft.tables import stdout


@stage("doctor")
@click.option("--json", "as_text", is_flag=True, help="for machines: one JSON object on stdout")
@click.option("--peer", "peers", multiple=True, metavar="HOST[:PORT]", help="another machine to reach; may be repeated")
@click.pass_context
def doctor_command(
    context: click.Context, recipe_file: Path, overrides: tuple[str, ...], as_text: bool, peers: tuple[str, ...]
) -> None:
    """What this machine has and lacks for the recipe.

    Each with its remedy. The exit code is 1 when a check has failed, 0 with warnings. Nothing is changed (the sums of a
    checkpoint with checklist.chk are remembered in paths.cache).

    \b
    Example: openpangu-sft doctor --recipe recipes/demo.yaml --json
    """
    from openpangu_sft.doctor.examine import examine
    from openpangu_sft.doctor.finding import State
    from openpangu_sft.doctor.machine import Machine
    from openpangu_sft.doctor.network import split_peer
    from openpangu_sft.doctor.place import where
    from openpangu_sft.doctor.show import as_json, print_table
    from openpangu_sft.doctor.subject import Subject

    for peer in peers:
        split_peer(peer)  # what is mistyped is said before any check runs
    machine = Machine(Path(os.environ.get("HOST_ROOT") or "/"))
    subject = Subject(load_recipe(recipe_file, overrides), machine, peers)
    if console.is_terminal:
        with console.status("") as status:
            findings = examine(subject, lambda name: status.update(f"checking: {name}"))
    else:
        findings = examine(subject)
    if as_text:
        print(as_json(where(subject), findings, subject.npus.listing.chips if subject.wants_npus else ()))
    else:
        print_table(stdout(), where(subject), findings)
    context.exit(int(any(finding.state == State.FAILED for finding in findings)))
