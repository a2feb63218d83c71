"""What a training run is to this benchmark, and how long runs are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
State = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Scale:
    """How large models are, and how many steps are taken: of a table, `table_nbytes`."""

    warmup: int = 30  # steps before the first save
    intervals: tuple[int, ...] = (1, 10, 100)
    saves: tuple[int, ...] = (8, 8, 3)  # at each of the intervals
    width: int = 256
    depth: int = 4
    context: int = 64  # characters
    pairs: int = 8  # of texts in a batch
    tokens: int = 32  # of a text, at most
    table_nbytes: int = 100_000_000
    table_batch: int = 2048

    @property
    def steps(self) -> int:
        """Steps from the first save to the last one."""
        return max(at * (count - 1) for at, count in zip(self.intervals, self.saves, strict=True))


FULL = Scale()
QUICK = Scale(
    warmup=2,
    intervals=(1, 3),
    saves=(3, 2),
    width=64,
    depth=1,
    pairs=4,
    tokens=16,
    table_nbytes=4_000_000,
    table_batch=256,
)


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is made as it goes on.

    `begin` gives, for a number of steps, the state after the first and after
    each that follows, in the same arrays.  `facts` are filled in meanwhile.
    """

    name: str
    what: str
    begin: Callable[[Scale], Iterator[State]]
    facts: dict[str, Any] = field(default_factory=dict)


def nbytes_of(state: State) -> int:
    """Bytes of all arrays."""
    return sum(array.nbytes for array in state.values())


def seeded(seed: int) -> np.random.Generator:
    """Random numbers, the same ones on every machine."""
    return np.random.default_rng(seed)
