"""Why a step is kept, or would be deleted; and what the files of a root are for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

from gpuckpt import layout
from gpuckpt.errors import CheckpointError
from gpuckpt.manifest import Manifest
from gpuckpt.report.checkpoints import Step
from gpuckpt.retention import Keep
from gpuckpt.stores import Store


def reasons(keep: Keep | None, steps: Sequence[int], rows: Sequence[Step]) -> dict[int, list[str]]:
    """Why each step is kept; nothing of one that `keep` would have deleted.

    Without a `keep` all are kept.  `rows` are the steps whose manifests were
    read: of others, only rules about numbers can be told.
    """
    found: dict[int, list[str]] = {step: [] for step in steps}
    if not steps:
        return found
    newest = max(steps)
    found[newest].append("the newest")
    if keep is None:
        return {step: told or ["no --keep given"] for step, told in found.items()}
    known = {row.step: row for row in rows}
    facts = [_facts(step, known.get(step)) for step in steps]
    for rule in fields(keep):
        value = getattr(keep, rule.name)
        if value is not None:
            kept = Keep(**{rule.name: value}).survivors(facts)
            for step in sorted(kept if rule.name == "last" else kept - {newest}):
                found[step].append(_words(rule.name, value))
    return found


def _facts(step: int, row: Step | None) -> Manifest:
    """As much of a manifest as `Keep` asks for."""
    if row is None:
        return Manifest(step, {"dict": []}, ())
    return Manifest(step, {"dict": []}, (), metrics=row.metrics, created=row.created)


def _words(rule: str, value: Any) -> str:
    if rule == "best":
        metric, direction, count = value
        return f"among the {count} with the {direction}imum of {metric}"
    told = {"last": "among the last {}", "every": "each {}th step", "newer_than": "newer than {}"}
    return told[rule].format(value)


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes of a root's files.

    `segments` by the step that wrote them; of these, `only_older` are of steps
    that are gone, and stay since others need them.  The rest by kind.
    """

    segments: dict[int, int]
    only_older: dict[int, int]
    manifests: int
    logs: int
    others: int

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(self.segments.values()) + self.manifests + self.logs + self.others

    def as_dict(self) -> dict[str, Any]:
        """All facts, for `--json`."""
        return {
            "segments": self.segments,
            "only_for_later_steps": self.only_older,
            "manifests_nbytes": self.manifests,
            "logs_nbytes": self.logs,
            "others_nbytes": self.others,
            "nbytes": self.nbytes,
        }


def disk_use(store: Store, committed: Collection[int]) -> Disk:
    """What the root's files take; one that goes meanwhile counts nothing."""
    segments: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    for name in store.names():
        try:
            nbytes = store.size(name)
        except CheckpointError:
            continue
        step = layout.segment_step(name)
        if step is not None:
            segments[step] += nbytes
        elif layout.manifest_step(name) is not None or layout.part_step(name) is not None:
            kinds["manifests"] += nbytes
        else:
            kinds["logs" if layout.log_rank(name) is not None else "others"] += nbytes
    gone = {step: nbytes for step, nbytes in segments.items() if step not in committed}
    return Disk(
        dict(sorted(segments.items())),
        dict(sorted(gone.items())),
        *(kinds[kind] for kind in ("manifests", "logs", "others")),
    )
