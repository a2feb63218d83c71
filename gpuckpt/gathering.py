"""What ranks say to each other, so that each hears what went wrong with any."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from gpuckpt.errors import RankError
from gpuckpt.groups import Decides, Group, UndecidedError
from gpuckpt.values import Json


class UnheardError(RankError):
    """Some ranks didn't come: what others may have heard of this round isn't known here."""


def gather(group: Group, what: str, answer: Json | BaseException, timeout: float) -> list[Any]:
    """What every rank answered, by rank; an error for all if one has none.

    Raises:
        UnheardError: some ranks said nothing.
        RankError: some ranks said what went wrong; all ranks have heard so.
        BaseException: `answer`, if this is what this rank has to say.
    """
    data: list[bytes] = []
    unheard: UnheardError | None = None
    try:
        data = group.all_gather(_packed(answer), what=what, timeout=timeout)
    except RankError as error:
        unheard = UnheardError(error.ranks, error.reason)
    try:
        if isinstance(answer, BaseException):
            raise answer  # it matters more here than who hasn't heard of it
    finally:
        del answer
    if unheard is not None:
        raise unheard
    return _answers(data)


class Decision(NamedTuple):
    """What rank 0 decided, and whether this rank knows that all hear of it."""

    value: Any
    is_heard: bool = True


def decided(
    group: Group,
    what: str,
    answer: Json | BaseException,
    choose: Callable[[list[Any]], Json],
    timeout: float,
) -> Decision:
    """What rank 0 decides by what every rank answered: `choose` is called there.

    One round of a group that `Decides`, two of another.

    Raises:
        UnheardError: some ranks said nothing; on rank 0, nothing was decided.
        RankError: some ranks said what went wrong, or that some are missing; all
            ranks have heard so, and nothing was decided.
        BaseException: `answer`, if this is what this rank has to say; on rank 0,
            what `choose` raised, of which the others hear as `UnheardError`.
    """
    made: dict[str, Json] = {}
    raised: list[BaseException] = []

    def pack(data: list[bytes]) -> bytes:
        nonlocal made
        try:
            answers = _answers(data)
        except RankError as error:
            made = {"error": error.reason, "ranks": list(error.ranks)}
            return json.dumps(made).encode()
        try:
            made = {"answer": choose(answers)}
        except BaseException as error:
            raised.append(error)
            made = {"unsure": f"{type(error).__name__}: {error}"}
        return json.dumps(made).encode()

    ask = group.decide if isinstance(group, Decides) else _TwoRounds(group).decide
    failure: RankError | None = None
    try:
        made = _read(ask(_packed(answer), pack, what=what, timeout=timeout), 0)
    except RankError as error:
        kind = RankError if isinstance(error, UndecidedError) else UnheardError
        failure = kind(error.ranks, error.reason)
    try:
        if isinstance(answer, BaseException):
            raise answer
    finally:
        del answer
    if raised:
        raise raised.pop()
    if failure is not None and not made:
        raise failure
    return Decision(_decision(made), failure is None)


def _decision(made: dict[str, Any]) -> Any:
    if "unsure" in made:
        raise UnheardError([0], str(made["unsure"]))
    if "error" in made:
        raise RankError(made.get("ranks", [0]), str(made["error"]))
    return made["answer"]


class _TwoRounds:
    """Decides in a group that can only gather."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def decide(
        self, data: bytes, choose: Callable[[list[bytes]], bytes], *, what: str, timeout: float
    ) -> bytes:
        """What rank 0 chose; a `RankError` says nothing of whether it chose."""
        try:
            told = self._group.all_gather(data, what=what, timeout=timeout)
            own = choose(told) if self._group.rank == 0 else b""
            what = f"{what}, as rank 0 decides"
            return self._group.all_gather(own, what=what, timeout=timeout)[0]
        except UndecidedError as error:
            raise RankError(error.ranks, error.reason) from None


def gather_done(group: Group, what: str, do: Callable[[], Json], timeout: float) -> list[Any]:
    """What `do` returned on every rank; raises as `gather`, if it failed on any."""
    answer: Json | BaseException
    try:
        answer = do()
    except BaseException as error:
        answer = error
    try:
        return gather(group, what, answer, timeout)
    finally:
        del answer


def _packed(answer: Json | BaseException) -> bytes:
    if isinstance(answer, BaseException):
        return json.dumps({"error": f"{type(answer).__name__}: {answer}"}).encode()
    return json.dumps({"answer": answer}).encode()


def _answers(data: list[bytes]) -> list[Any]:
    """What all answered, by rank; a `RankError` for what went wrong with some."""
    found = [_read(one, rank) for rank, one in enumerate(data)]
    failed = {rank: one["error"] for rank, one in enumerate(found) if "error" in one}
    if failed:
        raise RankError(list(failed), "; ".join(dict.fromkeys(failed.values())))
    return [one["answer"] for one in found]


def _read(data: bytes, rank: int) -> Any:
    try:
        found = json.loads(data)
        if {"error", "answer", "unsure"} & found.keys():
            return found
    except (ValueError, TypeError):
        pass
    raise RankError([rank], "what it says can't be read; do all ranks run the same gpuckpt?")
