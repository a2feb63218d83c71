"""Rounds of ranks that meet on a board, which counts what is asked of it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from bench.ranks.alone import Row, taken
from gpuckpt.groups.meeting import Meeting

# What a rank gives in a save that is like the one before.
NBYTES = 400
_STACK_NBYTES = 256 << 10


class CountingBoard:
    """Values in a dictionary; who asks for what is counted, for rank 0 and all others."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[bool, str]] = Counter()
        self.nbytes: Counter[tuple[bool, str]] = Counter()
        self._values: dict[str, bytes] = {}
        self._there: dict[str, threading.Event] = {}
        self._lock = threading.Lock()
        self.lead = 0

    def put(self, key: str, value: bytes) -> None:
        self._count("put", value)
        with self._lock:
            self._values[key] = value
            self._there.setdefault(key, threading.Event()).set()

    def wait(self, key: str, timeout: float) -> bytes | None:
        with self._lock:
            there = self._there.setdefault(key, threading.Event())
        there.wait(timeout)
        found = self._values.get(key)
        self._count("wait", found or b"")
        return found

    def remove(self, key: str) -> None:
        self._count("remove", b"")
        with self._lock:
            self._values.pop(key, None)
            self._there.pop(key, None)

    def sweep(self, run: str, session: str) -> None:
        """Nothing is left of others."""

    def _count(self, what: str, value: bytes) -> None:
        who = threading.get_ident() == self.lead
        with self._lock:
            self.asked[who, what] += 1
            self.nbytes[who, what] += len(value)


def meeting(ranks: int, rounds: int = 3) -> Row:
    """Rounds after the first: seconds of a core for all ranks, requests and bytes of each."""
    return {"case": "meeting", "ranks": ranks} | taken(lambda: _meeting(ranks, rounds))


def _meeting(ranks: int, rounds: int) -> Row:
    board, clock, gate = CountingBoard(), list[float](), threading.Barrier(ranks)
    threading.stack_size(_STACK_NBYTES)

    def rank(number: int) -> None:
        group = Meeting(board, number, ranks)
        if not number:
            board.lead = threading.get_ident()
        group.all_gather(b"0" * NBYTES, what="the first", timeout=300)
        if not gate.wait():
            board.asked.clear()
            board.nbytes.clear()
            clock.append(time.process_time())
        gate.wait()
        for at in range(rounds):
            group.all_gather(b"0" * NBYTES, what=f"round {at}", timeout=300)

    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(rank, range(ranks)))
    seconds = (time.process_time() - clock[0]) / rounds
    row: Row = {"cpu_s": seconds, "given_nbytes": NBYTES}
    for who, name, count in ((True, "lead", 1), (False, "other", max(ranks - 1, 1))):
        for what in ("put", "wait", "remove"):
            row[f"{name}_{what}s"] = board.asked[who, what] / rounds / count
        row[f"{name}_got_nbytes"] = board.nbytes[who, "wait"] / rounds / count
    return row
