"""The recipe: one typed YAML file with every setting of a run, checked before any work.

Any key can be overridden on the command line: `--set train.lr=1e-5`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from openpangu_sft.recipe.rules import complaints
from openpangu_sft.recipe.sections import Sections


class Recipe(Sections):
    """Every setting of a run."""

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        for conflict in complaints(self):
            raise conflict
        return self

    def path(self, name: str) -> Path:
        """The absolute path of an entry of `paths`."""
        return self.paths[name]


class ChosenRecipe(Recipe):
    """A recipe whose `auto` values have been chosen."""

    chosen: str = Field(exclude=True)
    """What was chosen, and why."""
