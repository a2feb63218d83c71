"""Work on items in several threads, and hand the results on in order."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# How often who waits for a thread sees whether it is still there.
_LOOK_SECONDS = 1.0


def ordered_map(
    work: Callable[[T], R],
    items: Iterable[T],
    *,
    workers: int,
    drop: Callable[[T], None] = lambda _: None,
    ending: Callable[[], object] = lambda: None,
) -> Generator[R, None, None]:
    """Yield `work(item)` for each item, in order, made by `workers` threads.

    `items` is drawn from in a thread of its own, which is free to wait (for
    an arena's slot, say) until the caller has taken results.  The first
    failure, of `items` or of `work`, is raised when its turn comes.  Leaving
    early, or a failure, stops everything; `drop` is then called on each item
    whose result the caller didn't get.  `ending` is called before threads are
    waited for at the end: who waits in `work` for other work must go on then.
    """
    line = _Line(work, items, workers, drop)
    try:
        yield from line.results()
    finally:
        try:
            ending()
        finally:
            line.stop()


def alternated(lines: Iterable[Iterator[T]]) -> Iterator[T]:
    """One item from each in turn, until all have ended; those that haven't are closed."""
    with contextlib.ExitStack() as closings:
        left = [closings.enter_context(_closing(line)) for line in lines]
        while left:
            for line in tuple(left):
                try:
                    item = next(line)
                except StopIteration:
                    left.remove(line)
                    continue
                yield item


class _Task(Generic[T, R]):
    """An item, and a place for what becomes of it."""

    def __init__(self, item: T) -> None:
        self.item = item
        self.done = threading.Event()
        self.result: R
        self.failure: BaseException | None = None


class _Line(Generic[T, R]):
    """One thread that draws items, and some that work on them."""

    def __init__(
        self,
        work: Callable[[T], R],
        items: Iterable[T],
        workers: int,
        drop: Callable[[T], None],
    ) -> None:
        self._work, self._items, self._workers, self._drop = work, items, workers, drop
        self._tasks: queue.SimpleQueue[_Task[T, R] | None] = queue.SimpleQueue()
        # In the order of the items; after the last, None or what `items` raised.
        self._results: queue.SimpleQueue[_Task[T, R] | BaseException | None] = queue.SimpleQueue()
        self._stopped, self._ended = threading.Event(), False
        self._end: BaseException | None = None
        self._current: _Task[T, R] | None = None  # the caller hasn't got its result yet
        self._threads: list[threading.Thread] = []
        try:
            for at in range(workers):
                self._start(self._run, f"gpuckpt-work-{at}")
            self._start(self._draw, "gpuckpt-draw")
        except BaseException:
            self._ended = True
            self.stop()
            raise

    def results(self) -> Iterator[R]:
        """The results, in order."""
        while (task := self._next()) is not None:
            self._wait(task)
            if task.failure is not None:
                raise task.failure
            result, self._current = task.result, None
            yield result
        if self._end is not None:
            raise self._end

    def stop(self) -> None:
        """Drop what is left, so that a source that waits for room gets it; join all threads.

        Whatever fails meanwhile is raised at the end.
        """
        self._stopped.set()
        first: BaseException | None = None
        while not self._ended or self._current is not None:
            try:
                self._drop_one()
            except BaseException as error:
                first = first or error
        self._end_workers()
        for thread in self._threads:
            thread.join()
        if first is not None:
            raise first

    def _drop_one(self) -> None:
        task = self._current or self._next()
        if task is not None:
            self._wait(task)
            self._current = None
            self._drop(task.item)

    def _start(self, run: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=run, name=name)
        thread.start()
        self._threads.append(thread)

    def _end_workers(self) -> None:
        for _ in range(self._workers):
            self._tasks.put(None)

    def _next(self) -> _Task[T, R] | None:
        """The next task; None if there is none, and `_end` says why if that is a failure."""
        while not self._ended:
            try:
                found = self._results.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                if self._threads[-1].is_alive() or not self._results.empty():
                    continue
                found = RuntimeError("the thread that draws chunks died without a word")
            if isinstance(found, _Task):
                self._current = found
                return found
            self._ended, self._end = True, found
        return None

    def _wait(self, task: _Task[T, R]) -> None:
        """Wait until somebody has done it; it has failed if there is nobody left who could."""
        while not task.done.wait(_LOOK_SECONDS):
            workers = self._threads[: self._workers]
            if not any(thread.is_alive() for thread in workers) and not task.done.is_set():
                task.failure = RuntimeError("the threads that encode died without a word")
                return

    def _draw(self) -> None:
        end: BaseException | None = None
        try:
            with _closing(self._items):
                for item in self._items:
                    self._hand_on(item)
                    if self._stopped.is_set():
                        break
        except BaseException as error:
            end = error
        finally:
            self._results.put(end)
            self._end_workers()

    def _hand_on(self, item: T) -> None:
        """Give an item to the workers, and its place to the caller; or neither, and drop it."""
        try:
            task: _Task[T, R] = _Task(item)
            self._results.put(task)
        except BaseException:
            self._drop(item)
            raise
        try:
            self._tasks.put(task)
        except BaseException as error:
            task.failure = error
            task.done.set()
            raise

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                if not self._stopped.is_set():
                    task.result = self._work(task.item)
            except BaseException as error:
                task.failure = error
            finally:
                task.done.set()


@contextlib.contextmanager
def _closing(items: R) -> Iterator[R]:
    """End a generator here and now, in the thread that drew from it; it may raise even then."""
    try:
        yield items
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()
