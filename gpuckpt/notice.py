"""Whether this process was told to end soon: by a signal, or by whatever a cluster has for it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

from gpuckpt.apart import Flag
from gpuckpt.errors import InvalidError
from gpuckpt.sizes import parse_seconds

log = logging.getLogger("gpuckpt")

# True, or the seconds that are left, once the process is to end; None or False before.
Asks = Callable[[], float | bool | None]
Preempt = bool | int | Asks | Sequence[int | Asks] | None

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Launchers pass on what the whole group has got already: twice within this time is once.
SAME_SECONDS = 1.0
_KNOWN = frozenset(signal.Signals)


class Notice:
    """Inside its block, takes note of the first announcement that the process is to end.

    A handler only takes note.  It is put back at the end of the block, in the
    place of the one before.  That one is called for a signal that comes again,
    a second or more after the first; and for all in a forked child, which
    isn't the one that saves.
    """

    def __init__(
        self,
        preempt: Preempt,
        grace: float | str | timedelta,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`grace` is the time from a signal, or from a True, until the process is killed.

        Raises:
            InvalidError: `preempt` or `grace` makes no sense, or there are
                signals in it, and this isn't the main thread.
        """
        self._signals, self._asks = _parse(preempt)
        self._grace, self._clock = parse_seconds(grace), clock
        self._came = Flag()
        self._first: dict[int, float] = {}  # when each signal came first
        self._earlier: dict[int, Any] = {}  # the handlers that were there
        self._asked: tuple[str, float] | None = None  # who has announced it, and until when
        self._process, self._open = os.getpid(), True
        if self._signals and threading.current_thread() is not threading.main_thread():
            raise InvalidError(
                "signals can only be caught in the main thread: open the Checkpointer there, or "
                "give preempt= a function that says whether the process is to end"
            )

    @property
    def expected(self) -> bool:
        """Whether there may be one."""
        return bool(self._signals or self._asks)

    @property
    def announced(self) -> bool:
        """Whether there was one."""
        return self._came.is_set()

    @property
    def by(self) -> str:
        """Who has announced it: a signal's name, or the function's."""
        return self._earliest()[0]

    @property
    def left(self) -> float:
        """Seconds that are left; less than none if that time is over."""
        return self._earliest()[1] - self._clock()

    def ask(self) -> None:
        """Ask the functions, until one has announced it; what they raise is raised."""
        for ask in self._asks if self._asked is None else ():
            answer = ask()
            if answer is None or answer is False:
                continue
            seconds = self._grace if answer is True else answer
            name = getattr(ask, "__name__", type(ask).__name__)
            if not isinstance(seconds, int | float) or not math.isfinite(seconds):
                raise InvalidError(
                    f"preempt: {name} says True or False or how many seconds are left, "
                    f"got {answer!r}"
                )
            self._asked = name, self._clock() + seconds
            self._came.set()
            return

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Have the handlers in place until the end of the block.

        Raises:
            InvalidError: one of the signals can't be caught, or its handler
                couldn't be put back.
        """
        try:
            for number in self._signals:
                self._catch(number)
            yield
        finally:
            self._put_back()

    def handler(self, number: int) -> Any:
        """Ours, or what it passes on to once the block has ended."""
        return self._handle if self._open else self.before(number)

    def before(self, number: int) -> Any:
        """The handler that there would be without us."""
        earlier = self._earlier[number]
        owner = _notice_of(earlier)
        return earlier if owner is None else owner.handler(number)

    def _catch(self, number: signal.Signals) -> None:
        earlier = signal.getsignal(number)
        if earlier is None:
            raise InvalidError(
                f"preempt: {number.name} has a handler that isn't Python's and couldn't be put "
                "back; leave that signal out"
            )
        self._earlier[number] = earlier
        try:
            signal.signal(number, self._handle)
        except (OSError, ValueError) as error:
            del self._earlier[number]
            raise InvalidError(f"preempt: {number.name} can't be caught ({error})") from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Take note.  It runs between any two instructions of the main thread."""
        ours = self._open and os.getpid() == self._process
        again = not ours
        if ours:
            now = self._clock()
            again = now >= self._first.setdefault(number, now) + SAME_SECONDS
            self._came.set()
        earlier = self.before(number)
        # Another checkpointer's wants to know of the first, too.
        if again or _notice_of(earlier) is not None:
            _pass_on(number, frame, earlier)

    def _put_back(self) -> None:
        """Put the handlers back that were there; leave alone who has come after us."""
        self._open = False
        for number in self._earlier:
            if signal.getsignal(number) != self._handle:
                continue  # from now on we only pass on
            try:
                signal.signal(number, self.before(number))
            except ValueError:
                log.warning(
                    "%s keeps gpuckpt's handler, which passes it on: close the Checkpointer in "
                    "the main thread",
                    signal.Signals(number).name,
                )

    def _earliest(self) -> tuple[str, float]:
        """Who has announced it, and until when."""
        found = [
            (signal.Signals(number).name, came + self._grace)
            for number, came in tuple(self._first.items())
        ]
        found += [self._asked] if self._asked is not None else []
        return min(found, key=lambda one: one[1])


def _parse(preempt: Preempt) -> tuple[list[signal.Signals], list[Asks]]:
    if preempt is None or preempt is False:
        return [], []
    if preempt is True:
        preempt = SIGNALS
    several: Sequence[Any] = preempt if isinstance(preempt, Sequence) else [preempt]
    signals: list[signal.Signals] = []
    asks: list[Asks] = []
    for one in several:
        if callable(one):
            asks.append(one)
        elif isinstance(one, int) and one is not True and one in _KNOWN:
            signals.append(signal.Signals(one))
        else:
            raise InvalidError(
                "preempt is True, a signal, a function that says whether the process is to end "
                f"(or in how many seconds), or several of these; got {one!r}"
            )
    return list(dict.fromkeys(signals)), asks


def _notice_of(handler: Any) -> Notice | None:
    """Whose handler it is, if it is one of ours."""
    owner = getattr(handler, "__self__", None)
    return owner if isinstance(owner, Notice) else None


def _pass_on(number: int, frame: FrameType | None, handler: Any) -> None:
    """Do what would have been done without us."""
    if callable(handler):
        handler(number, frame)
    elif handler == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
