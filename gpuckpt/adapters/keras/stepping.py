"""What stands for a model's train function while batches are passed over, or may be the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any


class Stepping:
    """Does nothing for so many calls, then calls `begin` and trains.

    torch's argument is data that was read; JAX's are the state, and what data is
    read from.  With `before`, that is called before each training step whose
    data are there: where a dataset has no length, only then is it known that
    the batch before wasn't the epoch's last.
    """

    def __init__(
        self,
        train: Callable[..., Any],
        together: int,
        begin: Callable[[], None],
        before: Callable[[], None] | None,
        passing: int = 0,
    ) -> None:
        """`together` is how many batches a call of `train` reads."""
        self.train = train
        self._begin, self._before = begin, before
        self._left, self._together = passing, together

    def __call__(self, *arguments: Any) -> Any:
        """Do nothing, or train."""
        if self._left:
            self._left -= 1
            return {} if len(arguments) == 1 else self._passed(*arguments)
        self._begin()
        if self._before is None:
            return self.train(*arguments)
        if len(arguments) == 1:
            self._before()
            return self.train(*arguments)
        state, batches = arguments
        first = next(batches)
        self._before()
        return self.train(state, chain([first], batches))

    def _passed(self, state: Any, batches: Iterator[Any]) -> Any:
        next(batches)
        for _ in range(self._together - 1):
            next(batches, None)
        return {}, state
