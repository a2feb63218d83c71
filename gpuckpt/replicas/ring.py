"""Who keeps whose copy."""

from __future__ import annotations

import re
from collections.abc import Sequence

_OF_RANK = re.compile(r"step-[0-9]{12}\.[0-9a-f]{8}\.r([0-9]{1,6})\.")


def rank_of(name: str) -> int | None:
    """The rank whose file it is; None for a manifest, which is of all, and any other file."""
    match = _OF_RANK.match(name)
    return int(match[1]) if match else None


def keepers(hosts: Sequence[str]) -> list[int]:
    """For each rank the one that keeps its copy, given the host of each.

    On the next host, the one with the same place among its own; if there is
    but one host, the next rank.  With one rank, itself, which keeps none.
    """
    places: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        places.setdefault(host, []).append(rank)
    every = list(places)
    if len(every) == 1:
        return [(rank + 1) % len(hosts) for rank in range(len(hosts))]
    found = []
    for rank, host in enumerate(hosts):
        after = places[every[(every.index(host) + 1) % len(every)]]
        found.append(after[places[host].index(rank) % len(after)])
    return found
