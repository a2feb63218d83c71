"""The text to learn from, and the batches that are drawn from it."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SYMBOLS = 256  # a character is a byte


def corpus(nbytes: int) -> npt.NDArray[np.uint8]:
    """Return the first `nbytes` of the standard library's own modules, in the order of names.

    The same bytes on every call with the same Python installation.
    """
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= nbytes:
            break
    if not text:
        raise FileNotFoundError(f"no module's source in {sysconfig.get_path('stdlib')}")
    return np.frombuffer(bytes(text[:nbytes]), dtype=np.uint8)


class Batches:
    """Random windows of a text; where it is in the random sequence is part of a checkpoint."""

    def __init__(self, text: npt.NDArray[np.uint8], *, seed: int) -> None:
        self._text = text
        self._generator = np.random.default_rng(seed)

    def draw(self, batch: int, context: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return int64[batch, context] characters and, of the same shape, those that follow."""
        starts = self._generator.integers(len(self._text) - context, size=batch)
        windows = self._text[starts[:, None] + np.arange(context + 1)].astype(np.int64)
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state as plain values."""
        return {"generator": self._generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on drawing where `state` was taken."""
        self._generator.bit_generator.state = state["generator"]
