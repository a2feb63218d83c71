"""The moments at which a process kills itself: the n-th thing that Python does in some place."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from importlib import import_module
from queue import SimpleQueue
from types import CodeType, FrameType
from typing import Any, NamedTuple

# Before each call that hands a chunk, or a result, to another thread, or takes it there.
HAND_OVER = "hand-over"
# Before each call of the operating system for files, locks and directories.
SYSTEM = "system call"
_BUILT_IN: dict[str, Callable[[Any], bool]] = {
    HAND_OVER: lambda called: isinstance(getattr(called, "__self__", None), SimpleQueue),
    SYSTEM: lambda called: getattr(called, "__module__", None) in {"posix", "fcntl"},
}
# Each from when the function is entered until it returns, whatever it calls meanwhile.
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "opening": ("commit:writing",),
    "lock": ("stores.local:LocalStore.lock",),
    "resume": ("checkpointer:Checkpointer.resume",),
    "census": ("census:Census.take",),
    "capture": ("snapshot:capture",),
    "begin": ("saving:Saves.begin",),
    "update": ("saving:Saves.order_update",),
    "stage": ("staging:stage",),
    "encode": ("encoder:Encoder.work",),
    "difference": ("encoder:Encoder._delta",),
    "derive": ("derived:Derivation.take", "derived:Derivation.find"),
    "write": ("segments:Writer.write",),
    "direct": ("stores.direct:DirectFile.append", "stores.direct:DirectFile.flush"),
    "index": ("segments:Writer.finish",),
    "commit": ("commit:commit",),
    "announce": ("pending:Pending.finish",),
    "prune": ("retention:prune_quietly",),
    "close": ("checkpointer:Checkpointer.close",),
}
PLACES = (*FUNCTIONS, *_BUILT_IN)
# Those that only one of several ranks meets.
OF_RANKS: dict[str, tuple[str, ...]] = {
    "entering": ("entering:entered", "entering:_site"),
    "gather": ("gathering:gather",),
    "meeting": ("groups.meeting:Meeting.all_gather",),
    "share": ("joint:Joint.share",),
    "part": ("parts:write_part",),
    "decision": ("groups.meeting:Meeting.decide",),
    "parts": ("deciding:OneRoot._choose",),
    "conclusion": ("deciding:OneRoot._commit",),
    "tidying": ("joint:Joint.tidy",),
    "concord": ("concord:Concord.take",),
}


class Death(NamedTuple):
    """Before the n-th thing (from 1) in a place."""

    place: str
    at: int


class Watch:
    """Counts the calls and returns, of Python and of C, that happen in a place."""

    def __init__(self, place: str, reached: Callable[[int], object] = lambda _: None) -> None:
        """`reached` is called at each with its number, in the thread in which it happens."""
        self._codes = frozenset(map(_code, (FUNCTIONS | OF_RANKS).get(place, ())))
        self._built_in = _BUILT_IN.get(place)
        self._reached, self._depth = reached, threading.local()
        self.count = 0

    def __call__(self, frame: FrameType, event: str, what: Any) -> None:
        """What `sys.setprofile` calls."""
        if self._built_in is not None:
            if event == "c_call" and self._built_in(what):
                self._happened()
            return
        depth = getattr(self._depth, "now", 0)
        own = frame.f_code in self._codes
        if own and event == "call":
            depth += 1
        if depth:
            self._happened()
        if own and event == "return":
            depth = max(depth - 1, 0)
        self._depth.now = depth

    def _happened(self) -> None:
        self.count += 1
        self._reached(self.count)


def die_at(death: Death) -> None:
    """From now on, kill this process by SIGKILL when the moment comes, in whatever thread."""

    def reached(count: int) -> None:
        if count == death.at:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch([Watch(death.place, reached)])


def count_all(places: Iterable[str] = PLACES) -> dict[str, Watch]:
    """From now on, count what happens in each place."""
    watches = {place: Watch(place) for place in places}
    _watch(watches.values())
    return watches


def _watch(watches: Iterable[Watch]) -> None:
    each = list(watches)

    def happened(frame: FrameType, event: str, what: Any) -> None:
        for watch in each:
            watch(frame, event, what)

    threading.setprofile(happened)
    sys.setprofile(happened)


def _code(function: str) -> CodeType:
    module, _, names = function.partition(":")
    found: Any = import_module(f"gpuckpt.{module}")
    for name in names.split("."):
        found = getattr(found, name)
    code: CodeType = inspect.unwrap(found).__code__
    return code
