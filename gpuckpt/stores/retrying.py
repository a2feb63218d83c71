"""Requests that are tried again, and what their errors are called in the end.

Between two tries lies a random time between nothing and a bound that doubles
("full jitter"): of many writers that a service has turned away, few come back
at once.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from gpuckpt.errors import NotFoundError, StorageError
from gpuckpt.stores.clients import MissingError, PassingError, RefusedError, UnableError

T = TypeVar("T")

_DOWN = "see whether the service and the network are up, and try again"


@dataclass(frozen=True, slots=True)
class Retries:
    """How often a request is tried, and how long the waits between two tries may be at most.

    After `total_seconds` no further try is begun.
    """

    tries: int = 10
    first_seconds: float = 0.1
    most_seconds: float = 10.0
    total_seconds: float = 180.0
    sleep: Callable[[float], object] = time.sleep
    choose: Callable[[float, float], float] = random.uniform

    def run(self, ask: Callable[[], T]) -> T:
        """What `ask` returns, once it doesn't raise `PassingError`; that, after the last try."""
        begun = time.monotonic()
        for at in range(self.tries - 1):
            try:
                return ask()
            except PassingError:
                if time.monotonic() - begun > self.total_seconds:
                    raise
                most = min(self.first_seconds * 2**at, self.most_seconds)
                self.sleep(self.choose(0.0, most))
        return ask()


class Requests:
    """Requests for the objects of one root."""

    def __init__(self, root: str, retries: Retries) -> None:
        """`root` is its URL, for people."""
        self.root, self._retries = root, retries

    def run(self, verb: str, name: str, ask: Callable[[], T]) -> T:
        """What `ask` returns, tried often enough; a `ClashError` is left as it is.

        Raises:
            NotFoundError: there is no such object.
            StorageError: the service refuses or, if it is `maybe`, doesn't answer.
        """
        begun, tries = time.monotonic(), itertools.count()

        def counted() -> T:
            next(tries)
            return ask()

        try:
            return self._retries.run(counted)
        except PassingError as error:
            seconds = time.monotonic() - begun
            tried = f"tried {next(tries)} times in {seconds:.1f} s"
            refusal = StorageError(f"can't {verb} {self.place(name)}: {error} ({tried}); {_DOWN}")
            refusal.maybe = True
            raise refusal from error
        except MissingError as error:
            if verb == "read":
                raise NotFoundError(f"{self.place(name)}: there is no such object") from error
            advice = "see whether the bucket is there, and make it first"
            raise StorageError(f"can't {verb} {self.place(name)}: {error}; {advice}") from error
        except (RefusedError, UnableError) as error:
            raise StorageError(f"can't {verb} {self.place(name)}: {error}") from error

    def place(self, name: str) -> str:
        """An object's URL, or the root's."""
        return f"{self.root}/{name}" if name else self.root
