"""What a save cost."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from gpuckpt.spans import Lap, Spans

_RATE_NBYTES = 1 << 20
_HOST_WORK = ("filter", "encode")
# Stages, and the figures that they are parts of.
_WHOLE = dict.fromkeys(("wait", "inventory", "share", "snapshot", "held"), ("stall",))
_WHOLE |= dict.fromkeys(("index", "sync", "manifest"), ("commit",))


@dataclass(slots=True)
class Stats:
    """What one save cost, in seconds and bytes; complete once it has committed or failed.

    `mode`: `copy` or `hold`; `codec`: what was asked for, or of a save before a
    preemption what it was saved with.

    `stall_seconds`: the caller was blocked, of that by the save before
    `wait_seconds`, by listing the state `inventory_seconds`, by sharing out with
    other ranks what several hold `share_seconds`, by freezing it (on the host,
    copying) `snapshot_seconds`, by starting the save, or until `hold` had read
    the state, `held_seconds`.  `slowdown_seconds`: what the loop's steps beside
    the save took more than the median of those without one; known at the first
    `step` after it.  `staged_seconds`: from the call until nothing of the state
    was read any more.  `background_seconds`: from the end of the stall until the
    save was durable, or had failed.

    Of these the save's own thread spent `write_seconds` writing chunks,
    `index_seconds` making the segments' indices, `sync_seconds` syncing them,
    and `manifest_seconds` on names and manifest; the last three are
    `commit_seconds`; `starved_seconds` it waited for encoders, and `ranks_seconds`
    for other ranks: until all had written, and until the first had committed.
    Sums over the `workers` threads, which work at the same time: `copy_seconds`
    (until chunks have come to the host; `hold` copies there), `filter_seconds`
    (fingerprints and statistics, where the host takes them), `encode_seconds`
    (choosing, splitting, compressing and checksums), and `reread_seconds`
    (`hold`'s second look).  `off_cpu_seconds` is the part of filter and encode in
    which a thread had no CPU: it waited for a core or for the interpreter.
    `cpu_seconds` are the CPU seconds of all of them.

    `raw_nbytes` is the state in memory, of `tensors` tensors in `chunks` chunks,
    `unchanged_nbytes` of which weren't
    written again and `delta_nbytes` as what they differ by, and `derived_nbytes` not at all,
    since they are other tensors, rounded; `brought_nbytes` what of its chunks came from
    GPUs to the host; `filter_nbytes` what the host
    fingerprinted, `encode_nbytes` what was given to the encoder,
    `encoded_nbytes` its chunks on disk, `written_nbytes` those written now,
    `freed_nbytes` were deleted for want of room, before the save or for a second attempt at it,
    `host_nbytes` the arena and bases, `copy_nbytes` what the devices keep for copies and
    for chunks on their way.  `shares`: the rates of `rates`, each as a share of
    the highest that the same checkpointer's saves have had.  `remarks` are
    sentences about what was saved: values that aren't finite, a state that
    hasn't changed.  `left_seconds` and `predicted_seconds`: of the save before a
    preemption, how much time was left for it, and how long such a save should
    take.  `spans` are kept if they were asked for.
    """

    step: int
    mode: str = ""
    codec: str = ""
    stall_seconds: float = 0.0
    wait_seconds: float = 0.0
    inventory_seconds: float = 0.0
    share_seconds: float = 0.0
    snapshot_seconds: float = 0.0
    held_seconds: float = 0.0
    slowdown_seconds: float = 0.0
    staged_seconds: float = 0.0
    background_seconds: float = 0.0
    starved_seconds: float = 0.0
    copy_seconds: float = 0.0
    filter_seconds: float = 0.0
    encode_seconds: float = 0.0
    reread_seconds: float = 0.0
    off_cpu_seconds: float = 0.0
    write_seconds: float = 0.0
    index_seconds: float = 0.0
    sync_seconds: float = 0.0
    manifest_seconds: float = 0.0
    commit_seconds: float = 0.0
    ranks_seconds: float = 0.0
    cpu_seconds: float = 0.0
    raw_nbytes: int = 0
    unchanged_nbytes: int = 0
    delta_nbytes: int = 0
    derived_nbytes: int = 0
    brought_nbytes: int = 0
    filter_nbytes: int = 0
    encode_nbytes: int = 0
    encoded_nbytes: int = 0
    written_nbytes: int = 0
    freed_nbytes: int = 0
    tensors: int = 0
    chunks: int = 0
    workers: int = 0
    left_seconds: float = 0.0
    predicted_seconds: float = 0.0
    host_nbytes: int = 0
    copy_nbytes: int = 0
    shares: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    spans: Spans | None = field(default=None, repr=False, compare=False)

    @property
    def ratio(self) -> float:
        """Bytes in memory for each byte on disk."""
        return self.raw_nbytes / self.encoded_nbytes if self.encoded_nbytes else 1.0

    @property
    def rates(self) -> dict[str, float]:
        """Bytes per second: of a worker in `filter` and `encode`, and of `write` with its sync.

        None of less than 1 MiB, which would say more of the calls than of the bytes.
        """
        found = {
            "filter": (self.filter_nbytes, self.filter_seconds),
            "encode": (self.encode_nbytes, self.encode_seconds),
            "write": (self.written_nbytes, self.write_seconds + self.sync_seconds),
        }
        return {
            name: nbytes / took
            for name, (nbytes, took) in found.items()
            if nbytes >= _RATE_NBYTES and took
        }

    def begin_again(self) -> None:
        """Forget the chunks of an attempt that failed; what it cost in time stays."""
        self.chunks = self.encoded_nbytes = self.written_nbytes = self.delta_nbytes = 0
        self.unchanged_nbytes = self.derived_nbytes = self.brought_nbytes = 0

    def add(self, lap: Lap, *, again: bool = False) -> None:
        """Count a thread's marks, each as its stage's seconds and as those of what it is part of.

        `again` says that many laps are like it.  Two threads at a time may add
        different stages.
        """
        for span in lap.spans:
            for name in (span.stage, *_WHOLE.get(span.stage, ())):
                self._count(f"{name}_seconds", span.seconds)
            if span.stage in _HOST_WORK:
                self._count(f"{span.stage}_nbytes", span.nbytes)
                self.off_cpu_seconds += max(span.seconds - span.cpu_seconds, 0.0)
        if self.spans is not None:
            (self.spans.add if again else self.spans.once)(lap)

    def _count(self, name: str, more: float) -> None:
        setattr(self, name, getattr(self, name) + more)

    def as_dict(self) -> dict[str, Any]:
        """All figures but the spans, for a log."""
        figures = {one.name: getattr(self, one.name) for one in fields(self)}
        del figures["spans"]
        return {
            **figures,
            "shares": dict(self.shares),
            "remarks": list(self.remarks),
            "ratio": self.ratio,
        }

    @classmethod
    def from_dict(cls, figures: dict[str, Any]) -> Stats:
        """The figures from what `as_dict` made of them: undoes it; what it doesn't know is left.

        Raises:
            TypeError: a figure isn't of its kind.
            ValueError: `step` is missing.
        """
        known = {}
        for one in fields(cls):
            if one.name in figures and one.name != "spans":
                known[one.name] = _checked(one.name, figures[one.name], str(one.type))
        if "step" not in known:
            raise ValueError("there is no step")
        return cls(**known)


def _checked(name: str, value: Any, kind: str) -> Any:
    expected = {
        "int": lambda one: isinstance(one, int) and not isinstance(one, bool),
        "float": lambda one: isinstance(one, int | float) and not isinstance(one, bool),
        "str": lambda one: isinstance(one, str),
    }
    expected["dict[str, float]"] = lambda one: (
        isinstance(one, dict) and all(map(expected["float"], one.values()))
    )
    expected["list[str]"] = lambda one: isinstance(one, list) and all(map(expected["str"], one))
    if not expected[kind](value):
        raise TypeError(f"{name} is {value!r}")
    return value


class Fastest:
    """The highest rate of each stage that saves have had so far: what was seen, not guessed."""

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}

    def compare(self, stats: Stats) -> None:
        """Take note of a save's rates, and say in its `shares` what they are of the highest."""
        for name, rate in stats.rates.items():
            self._rates[name] = max(rate, self._rates.get(name, 0.0))
            stats.shares[name] = rate / self._rates[name]
