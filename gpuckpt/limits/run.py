"""All limits of a machine and a directory, one after the other, in a directory that goes again."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpuckpt.errors import InvalidError, StorageError
from gpuckpt.hostmemory import available_nbytes
from gpuckpt.limits.rates import Rate, bus_rates, disk_rates, has_gpu, memory_rate
from gpuckpt.limits.saves import CODECS, SaveCost, make_state, save_cost
from gpuckpt.sizes import format_nbytes

PREFIX = "gpuckpt-bench-"
# Two checkpoints are there for a moment, and a file beside them.
_DISK_TIMES, _MEMORY_TIMES = 3, 3

Found = Rate | SaveCost


@dataclass(frozen=True, slots=True)
class Limits:
    """What was measured; `nbytes` is the state's size, `where` it was: `cpu` or `gpu`."""

    directory: str
    nbytes: int
    where: str
    cores: int
    overhead: float
    rates: tuple[Rate, ...]
    saves: tuple[SaveCost, ...]

    def best(self, *, busy: bool) -> SaveCost:
        """The saves that may come most often."""
        return min((one for one in self.saves if one.busy == busy), key=lambda one: one.interval)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        best = {
            "busy" if busy else "waiting": asdict(self.best(busy=busy)) for busy in (False, True)
        }
        return asdict(self) | {"best": best}


def measure(
    directory: Path,
    nbytes: int,
    overhead: float = 0.01,
    tell: Callable[[Found], None] = lambda _: None,
) -> Limits:
    """Measure inside `directory`, which exists; `tell` is given each figure at once.

    Needs three times `nbytes` there and in memory; takes about a minute for 256 MiB.
    Removes what it made.

    Raises:
        InvalidError: it isn't a directory, or there is no room for such a state.
        StorageError: nothing can be made there.
    """
    _check(directory, nbytes, overhead)
    gpu, rates, saves = has_gpu(), list[Rate](), list[SaveCost]()
    try:
        place = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory))
    except OSError as error:
        raise StorageError(f"can't make a directory in {directory}: {error.strerror}") from error
    try:
        for some in (memory_rate(nbytes), *bus_rates(nbytes), *disk_rates(place, nbytes)):
            rates.append(some)
            tell(some)
        state = make_state(nbytes, _library(gpu=gpu))
        for busy in (False, True):
            for codec in CODECS:
                saves.append(save_cost(place, state, codec, busy=busy, overhead=overhead))
                tell(saves[-1])
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return Limits(
        *(str(directory), nbytes, "gpu" if gpu else "cpu", len(os.sched_getaffinity(0)), overhead),
        *(tuple(rates), tuple(saves)),
    )


def _library(*, gpu: bool) -> Any:
    if gpu:
        import cupy

        return cupy
    return np


def _check(directory: Path, nbytes: int, overhead: float) -> None:
    if not directory.is_dir():
        raise InvalidError(f"{directory}: a directory that exists is wanted")
    if not 0 < overhead < 1:
        raise InvalidError(f"the overhead is a share between 0 and 1, got {overhead}")
    if nbytes < 1 << 20:
        raise InvalidError(f"a state of {nbytes} bytes says nothing: take 1 MiB or more")
    rooms = {
        "the host": (available_nbytes(), _MEMORY_TIMES),
        str(directory): (shutil.disk_usage(directory).free, _DISK_TIMES),
    }
    for what, (room, times) in rooms.items():
        if room is not None and room < times * nbytes:
            raise InvalidError(
                f"{what} has {format_nbytes(room)} left, and a state of {format_nbytes(nbytes)} "
                f"wants {times} times as much: give a smaller --size"
            )
