"""Rank 0 in the rounds of a group."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from gpuckpt.errors import RankError
from gpuckpt.groups.board import Board
from gpuckpt.groups.follower import Grace
from gpuckpt.groups.letters import Answer, Failure, Gone, Message, pack_answer, unpack_letter
from gpuckpt.groups.roll import Keys, Roll


class Limit:
    """How long rank 0 waits in a round: its own time, or that of the first whose is over."""

    def __init__(self, board: Board, over: str, what: str, timeout: float, piece: float) -> None:
        self._piece = piece
        self._board, self._over, self._what = board, over, what
        self._end = time.monotonic() + timeout
        self._stopped = False
        self.missed = f"not there after {timeout:g} s, for {what!r}"

    def piece(self) -> float:
        """Seconds to wait before `passed` is asked."""
        left = 0.0 if self._stopped else self._end - time.monotonic()
        return min(max(left, 0.0), self._piece)

    def hasten(self) -> None:
        """Wait a little for who is about to come, and blame nobody who doesn't: it has failed."""
        self._end, self.missed = min(self._end, time.monotonic() + self._piece), ""

    def passed(self) -> bool:
        """Whether all time is over; to be asked after a piece in which nothing came."""
        if self._stopped or time.monotonic() >= self._end:
            return True
        note = self._board.wait(self._over, 0) if self.missed else None
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(note or b"{}")
            if found["what"] == self._what:
                self._stopped = True
                time_out = f"the {float(found['timeout']):g} s of rank {int(found['rank'])}"
                self.missed = f"not there when {time_out} were over, for {self._what!r}"
        return self._stopped


class Leader:
    """Takes the messages of all ranks, each rank's in order, and answers, numbered from 1."""

    def __init__(self, board: Board, size: int, run: str, grace: Grace) -> None:
        self._board, self._size, self._piece = board, size, grace.piece
        self._keys = Keys(run, secrets.token_hex(8))
        self._roll: Roll | None = Roll(board, self._keys, size)
        self._next = [1] * size
        self._answered = self._removed = 0
        # What failed, by the answers that some may not have read.
        self._whats: dict[int, tuple[str, ...]] = {}
        self._failed: dict[str, RankError] = {}
        self._answering = ""
        self._unread: list[str] = []

    def gather(self, data: bytes, what: str, timeout: float) -> list[bytes]:
        """What every rank gave."""
        return self._round(data, what, timeout, None)

    def decide(
        self, data: bytes, choose: Callable[[list[bytes]], bytes], what: str, timeout: float
    ) -> bytes:
        """What `choose` has made of that."""
        return self._round(data, what, timeout, choose)[0]

    def _round(
        self, data: bytes, what: str, timeout: float, choose: Callable[[list[bytes]], bytes] | None
    ) -> list[bytes]:
        """What all are told."""
        if what in self._failed:
            raise self._failed.pop(what)
        if self._answering:  # an answer was interrupted: who knows whether it is there
            self._whats[self._answered] = (self._answering,)
            self._put(_interrupted(self._answering, decided=True))
        over = self._keys.over(self._answered + 1)
        limit = Limit(self._board, over, what, timeout, self._piece)
        try:
            messages, blamed = self._collect(what, limit)
        except BaseException as error:
            with contextlib.suppress(Exception):
                self._fail({}, _interrupted(what, error))
            raise
        blamed |= _disagreeing(what, messages)
        if blamed:
            ranks, reason = _grouped(blamed)
            whats = dict.fromkeys([what, *(one.what for one in messages.values())])
            raise self._fail(messages, Failure(ranks, reason, tuple(whats)))
        values = [data, *(messages[rank].data for rank in range(1, self._size))]
        if choose is not None:
            values = [self._chosen(values, choose, what, messages)]
        self._answer(what, messages, tuple(values))
        if choose is not None:  # it may have taken longer than somebody waits
            self._board.remove(over)
        self._tidy(min(message.seen for message in messages.values()))
        return values

    def _chosen(
        self,
        values: list[bytes],
        choose: Callable[[list[bytes]], bytes],
        what: str,
        messages: Mapping[int, Message],
    ) -> bytes:
        try:
            return choose(values)
        except BaseException as error:
            with contextlib.suppress(Exception):
                self._fail(messages, _interrupted(what, error, decided=True))
            raise

    def linger(self, timeout: float) -> None:
        """Wait until all have read the last answer: with this process it may be gone.

        Each takes its message away once it has.
        """
        end, pause = time.monotonic() + timeout, 0.001
        while self._unread and time.monotonic() < end:
            if self._board.wait(self._unread[-1], 0) is None:
                self._unread.pop()
            else:
                time.sleep(pause)
                pause = min(2 * pause, 0.1)

    def _collect(self, what: str, limit: Limit) -> tuple[dict[int, Message], dict[int, str]]:
        """The ranks' messages for this round, and what is wrong with other ranks."""
        messages: dict[int, Message] = {}
        blamed: dict[int, str] = {}
        if self._roll is not None:
            self._call(self._roll, limit)
        for rank in range(1, self._size):
            found = self._take(rank, limit)
            if isinstance(found, Message):
                messages[rank] = found
                if found.what != what:
                    limit.hasten()
            elif reason := found or limit.missed:
                blamed[rank] = reason if found else reason + self._advice()
        return messages, blamed

    def _advice(self) -> str:
        alone = " (a process that is the only one: group=gpuckpt.Alone())" if self._roll else ""
        return f"; see whether it has ended, hangs, or needs a longer time-out{alone}"

    def _call(self, roll: Roll, limit: Limit) -> None:
        """Welcome who comes, until all have."""
        for rank in roll.missing():
            while not roll.look(rank, limit.piece()) and not limit.passed():
                for other in roll.missing():
                    roll.look(other, 0)
                roll.welcome()
        roll.welcome()

    def _take(self, rank: int, limit: Limit) -> Message | str:
        """A rank's next message that counts; else why there is none, as far as it said so."""
        reason = ""
        while (data := self._wait(rank, limit)) is not None:
            self._next[rank] += 1
            try:
                letter = unpack_letter(data)
            except ValueError as error:
                return f"what it gave can't be read ({error}); do all run one gpuckpt?"
            if isinstance(letter, Message) and not self._late(letter):
                return letter
            reason = letter.reason if isinstance(letter, Gone) else ""
        return reason

    def _wait(self, rank: int, limit: Limit) -> bytes | None:
        key = self._keys.message(rank, self._next[rank])
        while (data := self._board.wait(key, limit.piece())) is None and not limit.passed():
            if self._roll is not None:
                self._roll.look(rank, 0)
                self._roll.welcome()
        if data is not None and self._roll is not None:
            self._roll.heard(rank)
        return data

    def _late(self, message: Message) -> bool:
        """Whether its rank will find that this failed before it came, and give it up."""
        return any(
            message.what in whats for number, whats in self._whats.items() if number > message.seen
        )

    def _fail(self, messages: Mapping[int, Message], failure: Failure) -> RankError:
        """Tell all of a failure; the error to raise."""
        own = failure.whats[0]
        # Before anybody hears of it: whoever does may be gone, and so may the board.
        self._whats[self._answered + 1] = failure.whats
        self._failed |= {what: failure.error() for what in failure.whats if what != own}
        self._answer(own, messages, failure)
        self._board.remove(self._keys.over(self._answered))
        self.linger(self._piece)
        return failure.error()

    def _answer(
        self, what: str, messages: Mapping[int, Message], outcome: tuple[bytes, ...] | Failure
    ) -> None:
        self._answered, self._answering = self._answered + 1, what
        self._put(outcome, messages)

    def _put(
        self,
        outcome: tuple[bytes, ...] | Failure,
        messages: Collection[int] = (),
    ) -> None:
        ranks = range(self._size)
        taken = tuple(self._next[rank] - 1 if rank in messages else 0 for rank in ranks)
        self._board.put(self._keys.answer(self._answered), pack_answer(Answer(taken, outcome)))
        self._answering = ""
        self._unread = [self._keys.message(rank, taken[rank]) for rank in messages]

    def _tidy(self, seen: int) -> None:
        """All ranks are at the same again, and have read the answers up to number `seen`."""
        self._failed.clear()
        for number in range(self._removed + 1, seen + 1):
            self._board.remove(self._keys.answer(number))
            self._whats.pop(number, None)
        self._removed = max(self._removed, seen)
        if self._roll is not None:
            self._roll.close()
            self._roll = None


def _interrupted(
    what: str, error: BaseException | None = None, *, decided: bool = False
) -> Failure:
    """The failure of a round in which rank 0 was interrupted, maybe after it had decided."""
    how = "" if error is None else f": {error!r}"
    return Failure((0,), f"was interrupted at {what!r}{how}", (what,), decided)


def _disagreeing(what: str, messages: Mapping[int, Message]) -> dict[int, str]:
    """Whoever isn't at what most are at; rank 0 is right in doubt."""
    at = {0: what} | {rank: message.what for rank, message in messages.items()}
    common, count = Counter(at.values()).most_common(1)[0]
    common = common if count > len(at) / 2 else what
    return {
        rank: f"at {one!r}, the others at {common!r}; all ranks must do the same in one order"
        for rank, one in at.items()
        if one != common
    }


def _grouped(blamed: Mapping[int, str]) -> tuple[tuple[int, ...], str]:
    """All ranks, and all reasons with the ranks that they are about, if there are several."""
    ranks = tuple(sorted(blamed))
    reasons = dict.fromkeys(blamed[rank] for rank in ranks)
    if len(reasons) == 1:
        return ranks, next(iter(reasons))
    parts = (
        f"{', '.join(str(rank) for rank in ranks if blamed[rank] == reason)}: {reason}"
        for reason in reasons
    )
    return ranks, "; ".join(parts)
