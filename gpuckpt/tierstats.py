"""What became of a step in one tier."""

from __future__ import annotations

import time
from typing import Any, Literal

from gpuckpt.apart import Flag

Outcome = Literal["", "durable", "passed over", "left out", "failed"]


class TierStats:
    """What became of one save in one tier; complete once it has `ended`.

    `root` is the tier's.  `outcome` is empty until it has ended, then
    `durable`, `passed over` (a newer step went up in its place), `left out`
    (by the tier's `every`) or `failed`, of which `error` says why.  `nbytes`
    and `files` are what was written there for this step, `seconds` how long
    that took, `tries` included, and `durable_at` when it was durable, in
    seconds since 1970.  `buffer_nbytes` is the memory that copying takes.
    """

    def __init__(self, root: str, step: int) -> None:
        self.root, self.step = root, step
        self.outcome: Outcome = ""
        self.error: BaseException | None = None
        self.nbytes, self.files, self.tries, self.buffer_nbytes = 0, 0, 0, 0
        self.seconds = 0.0
        self.durable_at: float | None = None
        self.ended = Flag()
        """Set once the step is durable there, or surely doesn't go there."""

    def finish(self, outcome: Outcome, error: BaseException | None = None) -> None:
        """Say how it ended; only the first word counts."""
        if self.ended.is_set():
            return
        self.outcome, self.error = outcome, error
        if outcome == "durable":
            self.durable_at = time.time()
        self.ended.set()

    def as_dict(self) -> dict[str, Any]:
        """All facts, for a log."""
        return {
            "root": self.root,
            "step": self.step,
            "outcome": self.outcome,
            "error": None if self.error is None else f"{type(self.error).__name__}: {self.error}",
            "nbytes": self.nbytes,
            "files": self.files,
            "tries": self.tries,
            "seconds": self.seconds,
            "durable_at": self.durable_at,
            "buffer_nbytes": self.buffer_nbytes,
        }
