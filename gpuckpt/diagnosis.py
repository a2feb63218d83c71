"""What kept a save from being faster: told from what it measured, and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpuckpt.journal import Record
from gpuckpt.stats import Stats

# Half: what takes more of a time than all else together is its bottleneck.
_MOST = 0.5
_WORK = {
    "copy": ("bringing chunks to the host", "bringing the state to the host is the bottleneck"),
    "filter": ("fingerprints and statistics", "taking fingerprints is the bottleneck"),
    "encode": ("choosing, splitting and compressing", "coding is the bottleneck"),
    "reread": ("the second look at what was held", "`hold`'s second look is the bottleneck"),
}
_STALLS = {
    "wait": "waiting for the save before: saves take longer than the time between them",
    "inventory": "listing the state",
    "share": "sharing out what several ranks hold, or waiting for them to",
    "snapshot": "freezing the state",
    "held": "until `hold` had read it: announce updates by `update()`, and the loop goes on",
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A save's bottleneck, and the sentence that names it with its figures.

    `bottleneck` is `failed`, `disk`, `ranks`, `index`, a worker's stage (`copy`, `filter`,
    `encode`, `reread`), `off-cpu` or, if no stage explains the time, `unknown`.
    """

    step: int
    bottleneck: str
    sentence: str


def diagnose(records: Sequence[Record]) -> list[Diagnosis]:
    """One for each record, in order; each is compared with the others of the same state."""
    return [_diagnose(record, records) for record in records]


def _diagnose(record: Record, others: Sequence[Record]) -> Diagnosis:
    stats = record.stats
    if record.error is not None:
        return Diagnosis(stats.step, "failed", f"step {stats.step} was not saved: {record.error}")
    bottleneck, reason = _background(stats)
    sentence = (
        f"step {stats.step}: {_seconds(stats.background_seconds)} in the background, {reason}"
    )
    more = [_stall(stats), _slowdown(stats), _other_codec(record, others)]
    return Diagnosis(stats.step, bottleneck, "; ".join([sentence, *filter(None, more)]))


def _background(stats: Stats) -> tuple[str, str]:
    """The bottleneck of what the save's own thread did or waited for."""
    disk = stats.write_seconds + stats.sync_seconds + stats.manifest_seconds
    whole = max(stats.background_seconds, 1e-9)
    if disk >= _MOST * whole:
        took = f"writing and syncing took {_seconds(disk)}{_rate(stats)}"
        return "disk", f"of which {took}: the disk is the bottleneck"
    if stats.ranks_seconds >= _MOST * whole:
        took = f"waiting for other ranks took {_seconds(stats.ranks_seconds)}"
        return "ranks", f"of which {took}: see the logs of those that took longer"
    if stats.index_seconds >= _MOST * whole:
        took = f"making the index of {stats.chunks} chunks took {_seconds(stats.index_seconds)}"
        return "index", f"of which {took}: the number of tensors is the bottleneck"
    return _workers(stats, whole)


def _rate(stats: Stats) -> str:
    """How fast it wrote, beside the fastest of its checkpointer's saves."""
    if "write" not in stats.rates:
        return ""
    share = stats.shares.get("write", 1.0)
    compared = f", {share:.0%} of the fastest seen" if share < 1 else ""
    return f" ({stats.rates['write'] / 1e9:.2g} GB/s{compared})"


def _workers(stats: Stats, whole: float) -> tuple[str, str]:
    """The bottleneck of the workers, for whom the save's thread waited."""
    workers = max(stats.workers, 1)
    spent = {name: float(getattr(stats, f"{name}_seconds")) for name in _WORK}
    busy = sum(spent.values())
    if stats.off_cpu_seconds >= _MOST * busy > 0:
        return "off-cpu", (
            f"in which its {workers} workers had no CPU for {_seconds(stats.off_cpu_seconds)} of "
            f"{_seconds(busy)}: they waited for a core or for the interpreter, which the loop "
            "or other programs had"
        )
    if busy / workers < _MOST * whole:
        parts = f"{_seconds(busy / workers)} by each of {workers} workers"
        return "unknown", (
            f"of which {parts} and {_seconds(stats.write_seconds + stats.commit_seconds)} of "
            "writing and committing: no stage explains the rest"
        )
    name = max(spent, key=lambda one: spent[one])
    what, verdict = _WORK[name]
    return name, f"of which {what} took {_seconds(spent[name])} of {workers} workers: {verdict}"


def _stall(stats: Stats) -> str:
    """What blocked the loop, if that is worth a word."""
    if stats.stall_seconds < 0.1 * stats.background_seconds:
        return ""
    spent = {name: float(getattr(stats, f"{name}_seconds")) for name in _STALLS}
    name = max(spent, key=lambda one: spent[one])
    took = f"{_seconds(stats.stall_seconds)}, of which {_seconds(spent[name])} {_STALLS[name]}"
    return f"it blocked the loop for {took}"


def _slowdown(stats: Stats) -> str:
    if stats.slowdown_seconds < 0.1 * stats.background_seconds:
        return ""
    return f"steps beside it took {_seconds(stats.slowdown_seconds)} longer than others"


def _other_codec(record: Record, others: Sequence[Record]) -> str:
    """The last save of the same state with another codec, as far as it differs."""
    own = record.stats
    for other in reversed(others):
        stats = other.stats
        alike = (stats.raw_nbytes, stats.mode) == (own.raw_nbytes, own.mode)
        if other.error is None and alike and stats.codec != own.codec and own.encoded_nbytes:
            took = _seconds(stats.background_seconds)
            change = _change(stats.encoded_nbytes / own.encoded_nbytes - 1)
            return f"codec={stats.codec!r} (step {stats.step}) took {took} for {change}"
    return ""


def _change(share: float) -> str:
    if abs(share) < 0.005:
        return "as many bytes"
    return f"{abs(share):.0%} {'more' if share > 0 else 'fewer'} bytes"


def _seconds(seconds: float) -> str:
    """For people: `1.9 s`, `150 ms`, `0.35 ms`."""
    if seconds >= 99.5:
        return f"{seconds:.0f} s"
    if seconds >= 0.995:
        return f"{seconds:.2g} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.2g} ms"
