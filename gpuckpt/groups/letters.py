"""What ranks say to each other, as bytes: a head in JSON, and what was given.

A *message* is what a rank other than 0 gives for one round.  *Gone* takes its
place if the rank doesn't wait any longer.  An *answer* of rank 0 ends a round.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpuckpt.errors import RankError
from gpuckpt.groups import UndecidedError

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Message:
    """What a rank gives for the round `what`; it has seen answers up to number `seen`."""

    what: str
    seen: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Gone:
    """A rank that doesn't wait any longer, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a round failed, and all the things that its ranks were at, which failed with it.

    Rank 0 `may_have_decided` before.
    """

    ranks: tuple[int, ...]
    reason: str
    whats: tuple[str, ...]
    may_have_decided: bool = False

    def error(self) -> RankError:
        """The same, to be raised."""
        kind = RankError if self.may_have_decided else UndecidedError
        return kind(self.ranks, self.reason)


@dataclass(frozen=True, slots=True)
class Answer:
    """How a round ended.

    `taken` has for each rank the number of the message of it that was taken, 0
    for none and for rank 0; `outcome` what all gave, or alone what rank 0 has
    made of that, or the failure.
    """

    taken: tuple[int, ...]
    outcome: tuple[bytes, ...] | Failure


def pack_letter(letter: Message | Gone) -> bytes:
    """What a rank says to rank 0."""
    if isinstance(letter, Gone):
        return _pack({"gone": letter.reason})
    return _pack({"what": letter.what, "seen": letter.seen}, [letter.data])


def unpack_letter(data: bytes) -> Message | Gone:
    """The inverse of `pack_letter`; `ValueError` if it is none."""
    head, data = _unpack(data)
    try:
        if "gone" in head:
            return Gone(str(head["gone"]))
        return Message(str(head["what"]), int(head["seen"]), data)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no message: {error!r}") from error


def pack_answer(answer: Answer) -> bytes:
    """What rank 0 says to all; short where all ranks gave the same number of bytes."""
    head: dict[str, Any] = {"ranks": len(answer.taken), "taken": _same(answer.taken)}
    if isinstance(answer.outcome, Failure):
        failure = answer.outcome
        head["failed"] = {"ranks": failure.ranks, "why": failure.reason, "what": failure.whats}
        if failure.may_have_decided:
            head["failed"]["decided"] = True
        return _pack(head)
    head["values"] = len(answer.outcome)
    head["lengths"] = _same([len(value) for value in answer.outcome])
    return _pack(head, answer.outcome)


def unpack_answer(data: bytes) -> Answer:
    """The inverse of `pack_answer`; `ValueError` if it is none."""
    head, data = _unpack(data)
    try:
        size = int(head["ranks"])
        taken = tuple(_each(head["taken"], size))
        if failed := head.get("failed"):
            ranks = tuple(int(rank) for rank in failed["ranks"])
            whats = tuple(str(what) for what in failed["what"])
            decided = bool(failed.get("decided", False))
            return Answer(taken, Failure(ranks, str(failed["why"]), whats, decided))
        count = int(head["values"])
        if count not in (1, size):
            raise ValueError(f"{count} values of {size} ranks")
        return Answer(taken, tuple(_cut(data, _each(head["lengths"], count))))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no answer: {error!r}") from error


def _same(numbers: Sequence[int]) -> list[Any]:
    """The most common number, and the others by where they are."""
    most = Counter(numbers).most_common(1)[0][0] if numbers else 0
    return [most, {str(at): one for at, one in enumerate(numbers) if one != most}]


def _each(same: list[Any], count: int) -> list[int]:
    """The inverse of `_same`."""
    most, others = same
    if not others:
        return [int(most)] * count
    return [int(others.get(str(at), most)) for at in range(count)]


def _cut(data: bytes, lengths: Sequence[int]) -> list[bytes]:
    if min(lengths, default=0) < 0 or sum(lengths) != len(data):
        raise ValueError(f"{len(data)} bytes for values of {sum(lengths)}")
    values, at = [], 0
    for length in lengths:
        values.append(data[at : at + length])
        at += length
    return values


def _pack(head: dict[str, Any], values: Sequence[bytes] = ()) -> bytes:
    text = json.dumps(head, separators=(",", ":")).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *values])


def _unpack(data: bytes) -> tuple[dict[str, Any], bytes]:
    if len(data) < _LENGTH.size:
        raise ValueError("it ends in its head")
    end = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    head = json.loads(data[_LENGTH.size : end])
    if not isinstance(head, dict):
        raise ValueError("its head isn't an object")  # noqa: TRY004
    return head, data[end:]
