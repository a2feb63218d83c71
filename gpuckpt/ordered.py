"""Work on items in several threads, and hand the results on in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class _Task(Generic[T, R]):
    """An item, and a place for what becomes of it."""

    def __init__(self, item: T) -> None:
        self.item = item
        self.done = threading.Event()
        self.result: R
        self.failure: BaseException | None = None


def ordered_map(
    work: Callable[[T], R],
    items: Iterable[T],
    *,
    workers: int,
    drop: Callable[[T], None] = lambda _: None,
) -> Iterator[R]:
    """Yield `work(item)` for each item, in order, made by `workers` threads.

    `items` is drawn from in a thread of its own, which is free to wait (for
    an arena's slot, say) until the caller has taken results.  The first
    failure, of `items` or of `work`, is raised when its turn comes.  Leaving
    early, or a failure, stops everything; `drop` is then called on each item
    whose result the caller didn't get.
    """
    tasks: queue.SimpleQueue[_Task[T, R] | None] = queue.SimpleQueue()
    results: queue.SimpleQueue[_Task[T, R] | BaseException | None] = queue.SimpleQueue()
    stopped = threading.Event()

    def draw() -> None:
        end: BaseException | None = None
        try:
            for item in items:
                task: _Task[T, R] = _Task(item)
                results.put(task)
                tasks.put(task)
                if stopped.is_set():
                    break
        except BaseException as error:
            end = error
        finally:
            results.put(end)
            for _ in range(workers):
                tasks.put(None)

    def run() -> None:
        while (task := tasks.get()) is not None:
            try:
                if not stopped.is_set():
                    task.result = work(task.item)
                else:
                    task.failure = _StoppedError()
            except BaseException as error:
                task.failure = error
            task.done.set()

    threads = [threading.Thread(target=draw, name="gpuckpt-draw")]
    threads += [threading.Thread(target=run, name=f"gpuckpt-work-{at}") for at in range(workers)]
    for thread in threads:
        thread.start()
    try:
        while (task := results.get()) is not None:
            if isinstance(task, BaseException):
                raise task
            task.done.wait()
            if task.failure is not None:
                drop(task.item)
                raise task.failure
            yield task.result
    finally:
        stopped.set()
        _drain(results, drop, threads)


def _drain(
    results: queue.SimpleQueue[_Task[T, R] | BaseException | None],
    drop: Callable[[T], None],
    threads: list[threading.Thread],
) -> None:
    """Drop what is left, so that a source that waits for room gets it and sees the end."""
    while any(thread.is_alive() for thread in threads) or not results.empty():
        try:
            task = results.get(timeout=0.05)
        except queue.Empty:
            continue
        if isinstance(task, _Task):
            task.done.wait()
            drop(task.item)
    for thread in threads:
        thread.join()


class _StoppedError(Exception):
    """The item was not worked on, since the caller has left."""
