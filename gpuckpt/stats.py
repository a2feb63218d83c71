"""What a save cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Stats:
    """What one save cost, in seconds and bytes; complete once it has committed or failed.

    `stall_seconds`: the caller was blocked, `wait_seconds` of it by the save
    before.  `slowdown_seconds`: what the loop's steps beside the save took more
    than the median of those without one; known at the first `step` after it.
    `staged_seconds`: from the call until nothing of the state was read any
    more.  `background_seconds`: from the end of the stall until the save was
    durable, `starved_seconds` of it the writer waited for
    encoders.  `encode_seconds` and `cpu_seconds` are sums over threads;
    `write_seconds` and `commit_seconds` (syncs and manifest) are not.
    `raw_nbytes` is the state in memory, `unchanged_nbytes` of which weren't
    written again and `delta_nbytes` as what they differ by; `encoded_nbytes`
    its chunks on disk, `written_nbytes` those written now, `host_nbytes` the
    arena and bases, `copy_nbytes` what the devices keep for copies and for
    chunks on their way.  `remarks` are sentences about what was saved: values
    that aren't finite, a state that hasn't changed.
    """

    step: int
    mode: str = ""
    stall_seconds: float = 0.0
    wait_seconds: float = 0.0
    slowdown_seconds: float = 0.0
    staged_seconds: float = 0.0
    background_seconds: float = 0.0
    starved_seconds: float = 0.0
    encode_seconds: float = 0.0
    write_seconds: float = 0.0
    commit_seconds: float = 0.0
    cpu_seconds: float = 0.0
    raw_nbytes: int = 0
    unchanged_nbytes: int = 0
    delta_nbytes: int = 0
    encoded_nbytes: int = 0
    written_nbytes: int = 0
    tensors: int = 0
    chunks: int = 0
    host_nbytes: int = 0
    copy_nbytes: int = 0
    remarks: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Bytes in memory for each byte on disk."""
        return self.raw_nbytes / self.encoded_nbytes if self.encoded_nbytes else 1.0

    def as_dict(self) -> dict[str, Any]:
        """All figures, for a log."""
        return {**asdict(self), "ratio": self.ratio}
