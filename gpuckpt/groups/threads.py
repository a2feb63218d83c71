"""A board for ranks that are threads of one process: how tests and simulations have many."""

from __future__ import annotations

import threading


class MemoryBoard:
    """Values in a dictionary."""

    for_threads = True

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def put(self, key: str, value: bytes) -> None:
        """Put a value there."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def wait(self, key: str, timeout: float) -> bytes | None:
        """The value, once it is there; None if it isn't in time."""
        with self._changed:
            self._changed.wait_for(lambda: key in self._values, timeout)
            return self._values.get(key)

    def remove(self, key: str) -> None:
        """Take a value away, if it is there."""
        with self._changed:
            self._values.pop(key, None)

    def sweep(self, run: str, session: str) -> None:
        """Nothing: it lives as long as its ranks."""
