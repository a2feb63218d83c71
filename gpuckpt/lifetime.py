"""A checkpointer's time with its root: from the lock to its return, in one process."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

from gpuckpt.apart import Apart
from gpuckpt.errors import ClosedError
from gpuckpt.observers import SETTLE_SECONDS
from gpuckpt.preemption import LastSave
from gpuckpt.saving import Saves
from gpuckpt.sizes import parse_seconds

log = logging.getLogger("gpuckpt")


class Leave(Protocol):
    """Has those who wait for other ranks wait no longer, or again."""

    def __call__(self, *, leaving: bool) -> object:
        """Whether they leave."""


class TimeLeft:
    """What is left of a time that a caller gave."""

    def __init__(self, timeout: float | str | timedelta | None) -> None:
        """None is for ever."""
        self.whole = None if timeout is None else parse_seconds(timeout)
        self._end = None if self.whole is None else time.monotonic() + self.whole

    @property
    def left(self) -> float | None:
        """So much is left, or None."""
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)


class Lifetime:
    """Holds the lock, signals' handlers, and the threads that bring steps up, until it ends."""

    def __init__(
        self,
        enter: Callable[[], contextlib.AbstractContextManager[None]],
        saves: Saves,
        last: LastSave,
        leave: Leave = lambda **_: None,
    ) -> None:
        """`enter` holds the root for writing, unless an interrupt has it `leave`.

        All are the checkpointer's.
        """
        self._enter, self._saves, self._last, self._leave = enter, saves, last, leave
        self._process = os.getpid()
        self._open = contextlib.ExitStack()

    def begin(self) -> None:
        """Take the root.

        Raises:
            LockedError: another writer has it.
            InvalidError: a signal can't be caught.
        """
        try:
            self._take()
            self._last.open()
            self._saves.tiers.open()
            # The interpreter's exit doesn't cut off a save, also if nobody calls `close`.
            atexit.register(self._at_exit)
        except BaseException:
            self._give_back()
            raise

    def _take(self) -> None:
        # Apart, so that no interrupt can leave a lock that nobody knows of.
        taking = Apart(lambda: self._open.enter_context(self._enter()))
        try:
            taking.run(lambda: self._leave(leaving=True))
        finally:
            self._leave(leaving=False)

    @property
    def is_ours(self) -> bool:
        """Whether it hasn't ended, and this is the process in which it began."""
        return self._process == os.getpid()

    def check(self) -> None:
        """See that it goes on.

        Raises:
            ClosedError: it has ended, or this is a forked child.
        """
        if not self.is_ours:
            why = "it was closed" if self._process == -1 else "it belongs to the parent process"
            raise ClosedError(f"this Checkpointer can't be used: {why}; open another")

    def end(self, seconds: float | None) -> None:
        """Give the root back, with no save in flight; uploads are waited for, at most so long."""
        until = TimeLeft(seconds)
        self._saves.tiers.close(self._last.most_seconds(until.left))
        self._give_back()
        self._process = -1
        atexit.unregister(self._at_exit)
        self._settle(until.left)  # last: who waits for the root needn't wait for observers

    def _give_back(self) -> None:
        """Let others have the root, and signals their handlers."""
        self._last.close()
        self._saves.tiers.close(0.0)
        Apart(self._open.close).run()

    def _at_exit(self) -> None:
        save = self._saves.save
        if self.is_ours:
            if save is not None:
                save.join()
            self._saves.tiers.close(self._last.most_seconds(None))
            self._settle(None)

    def _settle(self, seconds: float | None) -> None:
        """Let observers hear of the last saves, if there is time for that."""
        left = self._last.most_seconds(seconds)
        self._saves.observers.settle(SETTLE_SECONDS if left is None else min(left, SETTLE_SECONDS))
