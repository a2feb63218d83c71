"""Work on items in several threads, and hand the results on in order."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(
    work: Callable[[T], R],
    items: Iterable[T],
    *,
    workers: int,
    drop: Callable[[T], None] = lambda _: None,
) -> Generator[R, None, None]:
    """Yield `work(item)` for each item, in order, made by `workers` threads.

    `items` is drawn from in a thread of its own, which is free to wait (for
    an arena's slot, say) until the caller has taken results.  The first
    failure, of `items` or of `work`, is raised when its turn comes.  Leaving
    early, or a failure, stops everything; `drop` is then called on each item
    whose result the caller didn't get.
    """
    line = _Line(work, items, workers, drop)
    try:
        yield from line.results()
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
        self._threads: list[threading.Thread] = []
        try:
            for at in range(workers):
                self._start(self._run, f"gpuckpt-work-{at}")
            self._start(self._draw, "gpuckpt-draw")
        except BaseException:
            self._end_workers()
            self._ended = True
            self.stop()
            raise

    def results(self) -> Iterator[R]:
        """The results, in order."""
        while isinstance(task := self._next(), _Task):
            task.done.wait()
            if task.failure is not None:
                self._drop(task.item)
                raise task.failure
            yield task.result
        if task is not None:
            raise task

    def stop(self) -> None:
        """Drop what is left, so that a source that waits for room gets it; join all threads."""
        self._stopped.set()
        while not self._ended and isinstance(task := self._next(), _Task):
            task.done.wait()
            self._drop(task.item)
        for thread in self._threads:
            thread.join()

    def _start(self, run: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=run, name=name)
        thread.start()
        self._threads.append(thread)

    def _end_workers(self) -> None:
        for _ in range(self._workers):
            self._tasks.put(None)

    def _next(self) -> _Task[T, R] | BaseException | None:
        task = self._results.get()
        self._ended = not isinstance(task, _Task)
        return task

    def _draw(self) -> None:
        end: BaseException | None = None
        try:
            with _closing(self._items):
                for item in self._items:
                    task: _Task[T, R] = _Task(item)
                    self._results.put(task)
                    self._tasks.put(task)
                    if self._stopped.is_set():
                        break
        except BaseException as error:
            end = error
        finally:
            self._results.put(end)
            self._end_workers()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if not self._stopped.is_set():
                try:
                    task.result = self._work(task.item)
                except BaseException as error:
                    task.failure = error
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
