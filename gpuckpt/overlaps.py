"""Which tensors are restored into memory that another one is restored into, too."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from gpuckpt.arrays import are_apart
from gpuckpt.reading import Job


def overlapping(jobs: Sequence[Job]) -> frozenset[int]:
    """The jobs, by identity, with targets that share memory with a target of another tensor.

    As views of it do.  Parts of one array that one tensor fills don't.
    """
    if are_apart([one for job in jobs for one in job.targets if one.spec.nbytes]):  # mostly
        return frozenset()
    spans: dict[tuple[Any, ...], tuple[int, int, set[int]]] = {}
    for job in jobs:
        for target in job.targets:
            spec, (first, last) = target.spec, target.span
            if spec.nbytes:
                key = spec.device, id(target.owner), spec.tensor
                low, high, users = spans.setdefault(key, (first, last, set()))
                users.add(id(job))
                spans[key] = min(low, first), max(high, last), users
    found: set[int] = set()
    furthest: tuple[int, set[int]] = (0, set())  # that of those before which ends last
    before: object = None
    every = ((key[0], *span) for key, span in spans.items())
    for device, first, last, users in sorted(every, key=itemgetter(0, 1, 2)):
        if device == before:
            if first < furthest[0]:
                found |= furthest[1] | users
            if last <= furthest[0]:
                continue
        before, furthest = device, (last, users)
    return frozenset(found)
