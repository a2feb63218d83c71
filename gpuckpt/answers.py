"""What ranks tell of the parts that they have written, and whether these make one checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from gpuckpt.errors import RankError
from gpuckpt.manifest import Manifest, Part
from gpuckpt.parts import describe, shared_structure, world_manifest
from gpuckpt.seal import MANIFEST, Seal
from gpuckpt.structure import ConflictError, join
from gpuckpt.values import Json

STRUCTURES, ROWS = "structures", "rows"


def answer_of(
    own: Manifest,
    part: Part,
    *,
    held: str,
    damaged: bool,
    sampled: Collection[str],
    seal: Seal | None,
) -> dict[str, Json]:
    """What a rank says of its part, `own`; some 400 bytes, whatever it lists.

    `held` is a digest of what it holds, `sampled` names what every replica has written.
    """
    return {
        "part": [part.name, part.nbytes, part.check, part.raw_nbytes, part.encoded_nbytes],
        "segments": part.segments,
        "held": held,
        "damaged": damaged,
        "structure": _hash(json.dumps(shared_structure(own)).encode()),
        "samples": {
            entry.spec.label: [chunk.fingerprint for chunk in entry.chunks]
            for entry in own.tensors
            if entry.spec.label in sampled
        },
        "key": None if seal is None else _hash(seal.sealed(b"{}", MANIFEST)),
        "header": [own.epoch, own.metrics, own.created, own.writer],
    }


def check_answers(answers: Sequence[Any]) -> None:
    """See that the ranks have one key, and that replicas are replicas.

    Raises:
        RankError: two ranks have different bytes in what should be one tensor,
            or some seal with another key.
    """
    odd = [rank for rank, one in enumerate(answers) if one["key"] != answers[0]["key"]]
    if odd:
        raise RankError([0, *odd], "they seal with different keys; give all the same key=")
    _check_samples([one["samples"] for one in answers])


def unsure_of(answers: Sequence[Any], held: Sequence[str]) -> list[str]:
    """What ranks must tell each other besides, before anybody knows that all fits.

    `STRUCTURES` if these aren't equal; `ROWS` if they don't hold what they
    told when they shared out, of which `held` are the digests.
    """
    more = [] if is_alike(answers) else [STRUCTURES]
    return more if [one["held"] for one in answers] == list(held) else [*more, ROWS]


def is_alike(answers: Sequence[Any]) -> bool:
    """Whether the ranks' structures are equal, but for what is each one's own."""
    return len({one["structure"] for one in answers}) == 1


def check_structures(told: Sequence[Any]) -> None:
    """See that the ranks' structures fit together, though they aren't equal.

    Raises:
        RankError: two ranks have different things in one place.
    """
    whole = told[0]
    for rank, one in enumerate(told[1:], 1):
        try:
            whole = join(whole, one)
        except ConflictError as error:
            raise RankError(
                [0, rank],
                f"{describe(error)}; give it the same value on every rank, or wrap what is "
                "each rank's own in gpuckpt.PerRank",
            ) from None


def world_of(own: Manifest, answers: Sequence[Any]) -> Manifest:
    """The manifest of all whose ranks answered that."""
    epoch, metrics, created, writer = answers[0]["header"]
    header = replace(own, epoch=epoch, metrics=metrics, created=created, writer=writer)
    header = replace(header, alike=is_alike(answers))
    return world_manifest([_part(one) for one in answers], header)


def _check_samples(told: Sequence[dict[str, list[str]]]) -> None:
    first: dict[str, int] = {}
    for rank, samples in enumerate(told):
        for label, found in samples.items():
            known = first.setdefault(label, rank)
            if told[known][label] != found:
                raise RankError(
                    [known, rank],
                    f"{label} isn't the same on both, so they are no replicas: bring them "
                    "together before they are saved (an all-reduce that was left out?), or wrap "
                    "what is each rank's own in gpuckpt.PerRank",
                )


def _part(answer: Any) -> Part:
    name, nbytes, check, raw_nbytes, encoded_nbytes = answer["part"]
    return Part(name, nbytes, check, raw_nbytes, encoded_nbytes, tuple(answer["segments"]))


def _hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:32]
