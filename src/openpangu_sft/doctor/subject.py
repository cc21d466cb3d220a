"""What is examined: a recipe, on a machine. What several checks need is asked for once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from openpangu_sft.doctor.machine import Machine, Ran
from openpangu_sft.doctor.npu_smi import Chip, Listing, parse_info, reason
from openpangu_sft.recipe import Recipe
from openpangu_sft.sft.provenance import IMAGE as IN_CONTAINER_OF_MAKE
from openpangu_sft.visible_npus import VARIABLE, visible

NPU_SMI_SECONDS = 20.0
"""Healthy ones answer in a second or two."""

IMAGE = "/opt/openpangu"
"""Where the project's image has what it adds to its base."""


@dataclass(frozen=True)
class Answer:
    """What npu-smi says, or why it says nothing and what to do."""

    listing: Listing
    problem: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Subject:
    """A recipe on a machine.

    Args:
        recipe: says what is needed.
        machine: says what is there.
        peers: other machines to reach, as host or host:port.
    """

    recipe: Recipe
    machine: Machine
    peers: tuple[str, ...] = ()

    @property
    def wants_npus(self) -> bool:
        """Whether training uses NPUs; the stand-in does not."""
        return self.recipe.train.engine == "mindspeed" and self.recipe.train.device != "cpu"

    @property
    def no_npus(self) -> str:
        """Why none are needed, for the lines about them."""
        train = self.recipe.train
        device = " train.device=cpu" if train.engine == "mindspeed" else ""
        return f"not needed by train.engine={train.engine}{device}"

    @property
    def in_image(self) -> bool:
        """Whether this is a container of the project's image."""
        return self.machine.path(f"{IMAGE}/versions.json").is_file()

    @property
    def in_container(self) -> bool:
        marks = ("/.dockerenv", "/run/.containerenv")
        kubernetes = "KUBERNETES_SERVICE_HOST" in self.machine.environment
        return self.in_image or kubernetes or any(self.machine.path(mark).exists() for mark in marks)

    @cached_property
    def npu_smi(self) -> str:
        """Where npu-smi is; empty where it is not installed."""
        return self.machine.program("npu-smi", "/usr/local/sbin", "/usr/local/bin") or ""

    @cached_property
    def npus(self) -> Answer:
        """What npu-smi lists."""
        nothing = Listing("", (), None)
        if not self.npu_smi:
            remedy = "install the Ascend driver on the host; a container gets npu-smi from it (make does so)"
            return Answer(nothing, "npu-smi is not installed", remedy)
        ran = self.machine.run(self.npu_smi, "info", seconds=NPU_SMI_SECONDS)
        listing = parse_info(ran.text)
        if listing.chips:
            return Answer(listing)
        if ran.problem and not ran.text.strip():
            remedy = "a card or the driver hangs: as root, see dmesg; reboot the host"
            return Answer(nothing, f"npu-smi info: {ran.problem}", remedy)
        said, remedy = reason(ran.text)
        return Answer(nothing, f"npu-smi info: {said}", remedy)

    @cached_property
    def visible(self) -> tuple[Chip, ...]:
        """The chips that CANN shows to a process here: those that npu-smi lists, or fewer."""
        chips = self.npus.listing.chips
        return tuple(chips[place] for place in visible(self.machine.environment, len(chips)))

    @property
    def used(self) -> tuple[Chip, ...]:
        """The chips that training takes: each process the one with its own number, of those that it sees."""
        return self.visible[: self.recipe.parallel.devices_per_node]

    @cached_property
    def device_files(self) -> list[Path]:
        """/dev/davinci0 and so on, in the order of their numbers; those that CANN shows to a process here."""
        files = [file for file in self.machine.path("/dev").glob("davinci[0-9]*") if file.name[7:].isdigit()]
        files.sort(key=lambda file: int(file.name[7:]))
        return [files[place] for place in visible(self.machine.environment, len(files))]

    def choice(self, chips: Sequence[Chip]) -> str:
        """What makes training take these chips: make gives them to its containers, elsewhere CANN is told."""
        if self.machine.environment.get(IN_CONTAINER_OF_MAKE):
            return f"NPUS={','.join(str(chip.device) for chip in chips)}"
        return f"export {VARIABLE}={','.join(str(self.npus.listing.chips.index(chip)) for chip in chips)}"

    def ask_npu_smi(self, *arguments: str) -> Ran:
        """Another question to npu-smi; not after it has failed once."""
        if self.npus.problem:
            return Ran("", self.npus.problem)
        return self.machine.run(self.npu_smi, *arguments, seconds=NPU_SMI_SECONDS)
