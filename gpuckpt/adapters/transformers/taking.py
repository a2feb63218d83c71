"""How a Trainer is brought to take its state from gpuckpt in the place of a directory of its own.

It reads a directory in several methods of its own, which aren't of its public
interface: they are covered, in this one trainer, until its training has begun.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME


class Taking:
    """A directory for `resume_from_checkpoint`, and what reads it.

    `restore` is called once the optimizer and the schedule are made,
    `generators` where the Trainer sets these.
    """

    def __init__(
        self,
        trainer: Trainer,
        state: npt.NDArray[np.uint8],
        restore: Callable[[], None],
        generators: Callable[[], None],
    ) -> None:
        """`state` is the trainer's, as JSON."""
        self._trainer = trainer
        self._covered: list[str] = []
        self._directory = tempfile.mkdtemp(prefix="gpuckpt-")
        (Path(self.directory) / TRAINER_STATE_NAME).write_bytes(state.tobytes())
        for name, instead in {
            "_load_from_checkpoint": None,
            "_load_optimizer_and_scheduler": restore,
            "_load_scaler": None,
            "_load_rng_state": generators,
        }.items():
            self._cover(name, instead)

    @property
    def directory(self) -> str:
        """Where the trainer's state is."""
        return self._directory

    def end(self) -> None:
        """Let the trainer be as it was; safe to call twice."""
        for name in self._covered:
            vars(self._trainer).pop(name, None)
        self._covered.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _cover(self, name: str, instead: Callable[[], None] | None) -> None:
        before = getattr(self._trainer, name)

        def covered(checkpoint: str | None, *rest: Any, **named: Any) -> Any:
            if checkpoint != self.directory:
                return before(checkpoint, *rest, **named)
            return instead() if instead is not None else None

        self._covered.append(name)
        setattr(self._trainer, name, covered)
