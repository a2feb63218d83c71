"""What every checkpointer looks like to the benchmark."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench.peers.cache import Arrays


class Peer(abc.ABC):
    """One checkpointer in its best documented configuration.

    `arrays` is the state, which the benchmark owns and changes in place between
    saves; `directory` is empty, and the peer's own.  Memory for later saves is
    taken in `__init__`, if the library can do that.
    """

    adopts: ClassVar[bool] = False  # a run goes on with the arrays that `restore` returns

    def __init__(self, arrays: Arrays, directory: Path) -> None:
        self.arrays = arrays
        self.directory = directory

    @abc.abstractmethod
    def begin(self, step: int) -> None:
        """Save the state as `step`; on return the caller may go on."""

    def update(self) -> contextlib.AbstractContextManager[None]:
        """Inside of it the state may be changed; may wait for a save that still reads it."""
        return contextlib.nullcontext()

    def changed(self) -> None:  # noqa: B027 - most share the memory
        """The state has been changed: for libraries whose arrays can't share its memory."""

    def finish(self) -> None:  # noqa: B027 - most savers are complete when they return
        """Wait until the save is complete."""

    @abc.abstractmethod
    def restore(self, step: int) -> Arrays:
        """Bring a step back: in place where the library can, else into new arrays."""

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """End threads and processes."""

    def place(self, step: int) -> Path:
        """Where a step goes, if each has a directory or a file of its own."""
        return self.directory / f"step-{step}"


@dataclass(frozen=True, slots=True)
class Description:
    """A peer's name, how it is used, and the packages whose versions count."""

    name: str
    make: Callable[[Arrays, Path], Peer]
    how: str
    packages: tuple[str, ...]
    modules: tuple[str, ...] = ()  # imported before any memory is counted
    background: bool = True
    syncs: bool = False  # all is durable once `finish` returns, the directory's names too
