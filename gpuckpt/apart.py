"""Work in a thread of its own, and wait for it from a thread that signals may interrupt.

Python runs signal handlers in the main thread, between any two of its
instructions, and Ctrl-C raises there.  `threading`'s own waiting isn't made for
that: an interrupted `Thread.join` takes the thread for ended, and an
interrupted `Event.wait` can leave the event's lock held for ever (CPython 3.11).
So whatever must not be cut in half runs apart, and the main thread only waits,
here, by calls that are whole in C and flags that are read before them.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from gpuckpt.errors import CheckpointError, ClosedError

R = TypeVar("R")

# A waiter whose wake-up an interrupt swallowed looks again after this time.
_LOOK_SECONDS = 0.05
# How often a thread looks after one that works.
_WATCH_SECONDS = 1.0


class Flag:
    """What `threading.Event` is, but for `clear`, and safe to be interrupted in."""

    def __init__(self) -> None:
        self._set = False
        self._process = os.getpid()
        self._closed = _thread.allocate_lock()
        self._closed.acquire()

    def is_set(self) -> bool:
        """Whether `set` has been called."""
        return self._set

    def set(self) -> None:
        """Let all who wait go on; safe to call again."""
        self._set = True
        self._open()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, at most `timeout` seconds; whether it is.

        Raises:
            ClosedError: this is a forked child, where nobody will ever set it.
        """
        if not self._set and self._process != os.getpid():
            raise ClosedError("this belongs to the parent process, and its threads aren't here")
        end = None if timeout is None else time.monotonic() + timeout
        while not self._set:
            left = _LOOK_SECONDS if end is None else min(end - time.monotonic(), _LOOK_SECONDS)
            if left <= 0:
                break
            if self._closed.acquire(timeout=left):
                self._open()  # for the next one who waits
        return self._set

    def wait_out(self, begin: Callable[[], object] = lambda: None) -> None:
        """Wait until it is set whatever happens; an interrupt is raised only then.

        `begin` is called before, maybe more than once: so that no interrupt comes between
        what begins and the wait for its end.
        """

        def attempt() -> None:
            begin()
            self.wait()

        _outlast(attempt, self, lambda: None)

    def _open(self) -> None:
        try:
            self._closed.release()
        except RuntimeError:
            return  # it is open already


class Apart(Generic[R]):
    """A function's call in a thread of its own, which signals don't reach."""

    def __init__(
        self,
        work: Callable[[], R],
        failed: Callable[[BaseException], object] = lambda _: None,
        watch: Callable[[], object] = lambda: None,
        *,
        daemon: bool = False,
    ) -> None:
        """Doesn't begin yet: keep this where you'll find it, then `start`.

        `failed` is called if `work` fails, also if no thread can be had for
        it, and before that can be seen; `watch` about once a second while it
        goes on, by another thread.  The interpreter's exit waits for it,
        unless it is a `daemon`.
        """
        self._work, self._failed, self._watch = work, failed, watch
        self._result: R
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="gpuckpt", daemon=daemon)
        # Taken once, to see to the thread, and to do or to refuse the work; reentrant, so that
        # who was interrupted while taking it can take it again.
        self._claimed, self._entered = threading.RLock(), threading.RLock()
        self._over = _thread.allocate_lock()
        self._over.acquire()
        self._asked = False
        self.ended = Flag()

    def start(self) -> None:
        """Begin, once however often it is called.  If no thread can be had, `result` says so."""
        # `Thread.start` waits for the thread by an event, so that is done apart as well.
        try:
            _thread.start_new_thread(self._launch, ())
        except (RuntimeError, MemoryError) as error:
            self._refuse(error)
        self._asked = True

    def cancel_unless_begun(self) -> None:
        """If an interrupt kept it from beginning, see to it that it never does, and has ended."""
        if not self._asked and self._claimed.acquire(blocking=False):
            self._refuse(CheckpointError("an interrupt kept this from beginning; it wasn't done"))

    def run(self, interrupted: Callable[[], object] = lambda: None) -> R:
        """Begin, wait it out, and return what the function returned.

        An interrupt is raised when the function has ended; `interrupted` is
        called at each, to end it soon.
        """
        _outlast(self._start_and_wait, self.ended, interrupted)
        return self.result()

    def result(self) -> R:
        """What the function returned or raised, once it has `ended`; ask once."""
        assert self.ended.is_set()
        # The thread has a moment to live, and would keep what the error's frames refer to.
        failure, self._failure = self._failure, None
        try:
            if failure is not None:
                raise failure
        finally:
            del failure
        return self._result

    def _launch(self) -> None:
        """Start the thread, and then look after it: even one that dies at once leaves word."""
        if not self._claimed.acquire(blocking=False):
            return
        try:
            self._thread.start()
        except BaseException as error:
            self._refuse(error)
            return
        while not self._over.acquire(timeout=_WATCH_SECONDS):
            if not self._thread.is_alive():
                self._make_up()
                return
            with contextlib.suppress(Exception):
                self._watch()

    def _refuse(self, error: BaseException) -> None:
        """See to it that nobody does it any more, unless somebody has begun to."""
        if not self.ended.is_set() and self._entered.acquire(blocking=False):
            try:
                self._fail(error)
            finally:
                self.ended.set()

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        self._failed(error)

    def _make_up(self) -> None:
        """Do what a thread that has died has left undone."""
        if self.ended.is_set():
            return
        try:
            if not hasattr(self, "_result"):
                self._fail(self._failure or CheckpointError("its thread died without a word"))
        finally:
            self.ended.set()

    def _start_and_wait(self) -> None:
        if not self._asked:
            self.start()
        self.ended.wait()

    def _run(self) -> None:
        if not self._entered.acquire(blocking=False):
            return
        try:
            self._result = self._work()
        except BaseException as error:
            self._fail(error)
        del self._work, self._failed, self._watch  # who owns them owns this, too
        self.ended.set()
        self._over.release()


def _outlast(attempt: Callable[[], object], end: Flag, interrupted: Callable[[], object]) -> None:
    """Attempt until `end` is set; the first interrupt is raised then, each tells `interrupted`."""
    first: BaseException | None = None
    while not end.is_set():
        try:
            if first is not None:
                interrupted()
            attempt()
        except ClosedError:
            raise
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first
