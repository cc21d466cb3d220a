"""How far a step is, for its progress and for a user who stops it."""

from __future__ import annotations

import time

NEVER = 10**9
"""Iterations between evaluations of the mindspeed engine where the recipe has none."""
SLOW = 5.0
"""Seconds after which the micro batches of a step are shown."""


class Step:
    """The micro batches of one iteration. One that has none yet has not begun, or is not known."""

    def __init__(self) -> None:
        self.begin()

    def begin(self, note: str = "") -> None:
        """`note` is that of the step before."""
        self.began, self.done, self.size, self._note = time.monotonic(), 0, 0, note
        self._first = 0, self.began  # micro batches done when they were first counted, and when that was

    def update(self, done: int, size: int) -> str:
        """So many of its micro batches are done; returns a note for the progress bar."""
        if not self.done:
            self._first = done, time.monotonic()
        self.done, self.size = done, size
        slow = time.monotonic() - self.began > SLOW
        return ", ".join(filter(None, [self._note, f"micro-batch {done}/{size}" if slow else ""]))

    def stopping(self) -> str:
        """What to tell after the first signal."""
        seconds = 0.0
        if self.done and (since := self.done - self._first[0]):
            seconds = (time.monotonic() - self._first[1]) / since * (self.size - self.done)
        when = f", in about {seconds:.0f} s" if seconds >= 1 else ""
        return f"stopping: saves after this step{when} (again: stops now, unsaved)"
