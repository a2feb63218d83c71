"""A gate on a stream: what was given to the stream after it waits until the gate opens."""

from __future__ import annotations

import threading
from typing import Any


class Gate:
    """Opens by itself, so that a wait which is right takes a moment and one that isn't is seen."""

    def __init__(self, stream: Any, seconds: float = 0.1) -> None:
        self._opened = threading.Event()
        self._timer = threading.Timer(seconds, self._opened.set)
        self._timer.start()
        stream.launch_host_func(lambda _: self._opened.wait(30), None)

    @property
    def is_open(self) -> bool:
        return self._opened.is_set()

    def open(self) -> None:
        """Open it now, once it has been seen that nobody waited for it."""
        self._timer.cancel()
        self._opened.set()

    def join(self) -> None:
        self._timer.join()


def mode_of(settings: dict[str, Any] | None) -> str:
    """The stand-in's mode in one word; `gpu` on a real one."""
    if settings is None:
        return "gpu"
    return "slow" if settings.get("d2h_gbps") else str(settings["mode"])
