"""What ranks say to each other, so that each hears what went wrong with any."""

from __future__ import annotations

import json
from typing import Any

from gpuckpt.errors import RankError
from gpuckpt.groups import Group
from gpuckpt.values import Json


def gather(group: Group, what: str, answer: Json | BaseException, timeout: float) -> list[Any]:
    """What every rank answered, by rank; an error for all if one has none.

    Raises:
        RankError: some ranks said what went wrong, or nothing at all.
        BaseException: `answer`, if this is what this rank has to say.
    """
    wrong = isinstance(answer, BaseException)
    own: Json = {"error": f"{type(answer).__name__}: {answer}"} if wrong else {"answer": answer}
    data = group.all_gather(json.dumps(own).encode(), what=what, timeout=timeout)
    if isinstance(answer, BaseException):
        raise answer
    found = [json.loads(one) for one in data]
    failed = {rank: one["error"] for rank, one in enumerate(found) if "error" in one}
    if failed:
        raise RankError(list(failed), "; ".join(dict.fromkeys(failed.values())))
    return [one["answer"] for one in found]
