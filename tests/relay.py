"""Ranks as threads that take turns: what they do is the same each time.

One rank runs until it waits for the others, or has ended; then the next one
does.  A rank that has ended is missed at once: nobody waits for a time-out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gpuckpt.errors import RankError
from gpuckpt.groups import Group, UndecidedError

R = TypeVar("R")
PATIENCE_SECONDS = 60.0


@dataclass
class Outcome(Generic[R]):
    """What became of a rank: what its work returned, or the error that ended it."""

    value: R | None = None
    error: BaseException | None = None


class Relay:
    """The ranks, and whose turn it is.

    `refuses` is asked at each gather, with its number from 0 and what it is
    for, which ranks don't hear how it ended: all of them may not have come.
    """

    def __init__(
        self, size: int, refuses: Callable[[int, str], Collection[int]] = lambda *_: ()
    ) -> None:
        self.size, self.refuses = size, refuses
        self.gathers: list[str] = []
        self._changed = threading.Condition()
        self._turn, self._ended = 0, set[int]()
        self._given: dict[int, tuple[str, bytes]] = {}
        self._results: dict[int, list[bytes] | RankError] = {}
        # Of a round that rank 0 is deciding, the others still waiting: who won't hear of it.
        self._deaf: Collection[int] = ()
        self._decides = self._chooses = False
        # As the contract of groups has it: what failed without a rank fails when it comes to it.
        self._failed: list[dict[str, RankError]] = [{} for _ in range(size)]

    def run(self, work: Callable[[RelayGroup], R]) -> list[Outcome[R]]:
        """Let each rank do that, in its turn; how each ended."""
        outcomes: list[Outcome[R]] = [Outcome() for _ in range(self.size)]

        def live(rank: int) -> None:
            with self._changed:
                self._await(lambda: self._turn == rank)
            try:
                outcomes[rank].value = work(RelayGroup(self, rank))
            except BaseException as error:
                outcomes[rank].error = error
            finally:
                self._end(rank)

        threads = [threading.Thread(target=live, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE_SECONDS)
            assert not thread.is_alive(), "a rank hangs"
        return outcomes

    def decide(
        self, group: RelayGroup, data: bytes, choose: Callable[[list[bytes]], bytes], what: str
    ) -> bytes:
        """One rank's round, in which rank 0 decides."""
        if group.rank != 0:
            return self.gather(group.rank, data, what)[0]
        chosen = choose(self.gather(0, data, what, decides=True))
        group.dies()
        with self._changed:
            self._chooses = False
            for rank in self._given:
                self._results[rank] = _deaf(what) if rank in self._deaf else [chosen]
            self._given.clear()
        if 0 in self._deaf:
            raise _deaf(what)
        return chosen

    def gather(self, rank: int, data: bytes, what: str, *, decides: bool = False) -> list[bytes]:
        """One rank's round."""
        with self._changed:
            if what in self._failed[rank]:
                raise self._failed[rank].pop(what)
            self._decides = self._decides or decides
            self._given[rank] = what, data
            self._go_on(rank)
            self._await(lambda: self._turn == rank and rank in self._results)
            result = self._results.pop(rank)
        if isinstance(result, RankError):
            raise result
        return result

    def _await(self, condition: Callable[[], bool]) -> None:
        assert self._changed.wait_for(condition, PATIENCE_SECONDS), "a rank waits for ever"

    def _end(self, rank: int) -> None:
        with self._changed:
            self._ended.add(rank)
            self._go_on(rank)

    def _go_on(self, rank: int) -> None:
        """The next one's turn; if all wait, their round ends."""
        alive = [one for one in range(self.size) if one not in self._ended]
        if alive and all(one in self._given and one not in self._results for one in alive):
            self._finish(alive)
        order = [(rank + at) % self.size for at in range(1, self.size + 1)]
        able = [one for one in order if one in alive and (one not in self._given or self._has(one))]
        self._turn = able[0] if able else -1
        self._changed.notify_all()

    def _has(self, rank: int) -> bool:
        return rank in self._results

    def _finish(self, alive: list[int]) -> None:
        whats = {what for what, _ in self._given.values()}
        what = min(whats)
        self.gathers.append(what)
        deaf = self.refuses(len(self.gathers) - 1, what)
        values = [self._given[rank][1] for rank in alive]
        decides, self._decides = self._decides, False
        if decides and len(alive) == self.size and len(whats) == 1:
            # The others get theirs when it has decided; if it dies, it is missed.
            del self._given[0]
            self._results[0], self._deaf, self._chooses = values, deaf, True
            return
        # Nobody knows what rank 0 did that has died meanwhile, or never came.
        kind = UndecidedError if decides and not self._chooses else RankError
        for rank in alive:
            if len(alive) < self.size:
                result: Any = kind(sorted(self._ended), f"not there, for {what!r}")
            elif len(whats) > 1:
                result = kind([rank], f"ranks are at different things: {sorted(whats)}")
                self._failed[rank] |= dict.fromkeys(whats - {self._given[rank][0]}, result)
            elif rank in deaf:
                result = _deaf(what)
            else:
                result = list(values)
                self._failed[rank].clear()
            self._results[rank] = result
        self._given.clear()


class RelayGroup:
    """A rank's `Group`."""

    def __init__(self, relay: Relay, rank: int) -> None:
        self._relay, self.rank, self.size = relay, rank, relay.size
        self.dies: Callable[[], object] = lambda: None
        """Called before each word; may raise: who is dead says nothing."""

    def all_gather(self, data: bytes, *, what: str, timeout: float) -> list[bytes]:
        assert timeout > 0
        self.dies()
        return self._relay.gather(self.rank, data, what)

    def decide(
        self, data: bytes, choose: Callable[[list[bytes]], bytes], *, what: str, timeout: float
    ) -> bytes:
        assert timeout > 0
        self.dies()
        return self._relay.decide(self, data, choose, what)

    def barrier(self, *, what: str, timeout: float) -> None:
        self.all_gather(b"", what=what, timeout=timeout)


class GathersOnly:
    """A user's own group, which can do what `Group` asks for and no more."""

    def __init__(self, group: Group) -> None:
        self._group, self.rank, self.size = group, group.rank, group.size
        self.rounds: list[str] = []

    def all_gather(self, data: bytes, *, what: str, timeout: float) -> list[bytes]:
        self.rounds.append(what)
        return self._group.all_gather(data, what=what, timeout=timeout)

    def barrier(self, *, what: str, timeout: float) -> None:
        self._group.barrier(what=what, timeout=timeout)


def _deaf(what: str) -> RankError:
    return RankError([0], f"no answer, for {what!r}")


def values(outcomes: list[Outcome[R]]) -> list[R]:
    """What all returned; the first error is raised."""
    for one in outcomes:
        if one.error is not None:
            raise one.error
    return [one.value for one in outcomes]  # type: ignore[misc]
