"""Initialise a model, also a different one, by name from checkpoints and single data files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gpuckpt.errors import MismatchError
from gpuckpt.loading import fill_match
from gpuckpt.matching import Match, Rename, match
from gpuckpt.resources import Resources
from gpuckpt.seal import Key, make_seal
from gpuckpt.sources import Source, open_sources
from gpuckpt.structure import Path
from gpuckpt.tree import Flat, flatten


@dataclass(frozen=True, slots=True)
class Report:
    """What `warm_start` did, by names of the state.

    `matched` maps a name to the source that it was filled from, `unmatched`
    a name that kept its initial value to the reason, and `unused` lists the
    names that sources had and the state doesn't.
    """

    matched: dict[str, str] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} matched, {len(self.unmatched)} kept their initial value"]
        lines += [f"  = {name}  from {source}" for name, source in self.matched.items()]
        lines += [f"  - {name}  {reason}" for name, reason in self.unmatched.items()]
        lines += [f"  + {name}  not in the state" for name in self.unused]
        return "\n".join(lines)


def warm_start(
    state: Any,
    sources: Source | Sequence[Source],
    *,
    rename: Rename = None,
    strict: bool = False,
    memory: int | str = "256 MiB",
    key: Key | None = None,
) -> Report:
    """Fill the leaves of `state` that a source has under the same name; later sources win.

    A source is a root (its newest step), a pair of root and step, a
    `Checkpoint`, the path of a manifest, or the path of one segment, which
    needs no manifest.  Segments of one save that hold parts of a tensor each
    are taken together, and so are shards of one tensor that several sources
    have, unless one source has them all.  With a `key`, every source must be sealed with it.
    What doesn't match keeps its value and is reported.

    Raises:
        MismatchError: with `strict`, some leaf of the state has no match;
            nothing has been changed.
        AuthenticationError: a source isn't sealed with `key`.
    """
    seal, key = make_seal(key), None  # so that no traceback's locals have it
    opened = open_sources(sources, seal)
    flat = flatten(state)
    found = [match(flat, one.manifest, rename=rename, whole_objects=False) for one in opened]
    report = _report(flat, found, [one.label for one in opened])
    if strict and report.unmatched:
        raise MismatchError(
            "warm_start: some leaves of the state have no match",
            mismatched=[f"{name}: {reason}" for name, reason in report.unmatched.items()],
        )
    resources = Resources(memory)
    placed: dict[Path, Any] = {}
    for one, result in zip(opened, found, strict=True):
        result.leaves = placed | result.leaves  # what an earlier source put there stays
        opened_of = one.manifest, one.store, resources, one.elsewhere
        placed = fill_match(state, flat, result, *opened_of)
    return report


def _report(flat: Flat, found: Sequence[Match], labels: Sequence[str]) -> Report:
    matched: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for result, label in zip(found, labels, strict=True):
        matched |= dict.fromkeys(result.matched, label)
        reasons |= {name: f"{label}: {why}" for name, why in result.mismatched.items()}
    names = flat.names
    unmatched = {
        name: reasons.get(name, "no source has it") for name in names if name not in matched
    }
    used = {*matched, *unmatched}
    unused = {name: None for result in found for name in result.unexpected if name not in used}
    return Report(matched, unmatched, tuple(unused))
