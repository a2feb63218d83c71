"""What ranks say to each other, so that each hears what went wrong with any."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from gpuckpt.errors import RankError
from gpuckpt.groups import Group
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
    wrong = isinstance(answer, BaseException)
    own: Json = {"error": f"{type(answer).__name__}: {answer}"} if wrong else {"answer": answer}
    data: list[bytes] = []
    unheard: UnheardError | None = None
    try:
        data = group.all_gather(json.dumps(own).encode(), what=what, timeout=timeout)
    except RankError as error:
        unheard = UnheardError(error.ranks, error.reason)
    try:
        if isinstance(answer, BaseException):
            raise answer  # it matters more here than who hasn't heard of it
    finally:
        del answer
    if unheard is not None:
        raise unheard
    found = [_read(one, rank) for rank, one in enumerate(data)]
    failed = {rank: one["error"] for rank, one in enumerate(found) if "error" in one}
    if failed:
        raise RankError(list(failed), "; ".join(dict.fromkeys(failed.values())))
    return [one["answer"] for one in found]


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


def _read(data: bytes, rank: int) -> Any:
    try:
        found = json.loads(data)
        if "error" in found or "answer" in found:
            return found
    except (ValueError, TypeError):
        pass
    raise RankError([rank], "what it says can't be read; do all ranks run the same gpuckpt?")
