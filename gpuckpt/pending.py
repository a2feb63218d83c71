"""A save that goes on in the background, and the checkpoint that comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gpuckpt.apart import Flag
from gpuckpt.errors import BusyError
from gpuckpt.layout import manifest_name
from gpuckpt.manifest import Manifest
from gpuckpt.stats import Stats
from gpuckpt.stores.opening import beside
from gpuckpt.tierstats import TierStats


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint of `root`: its `step`, with the `epoch` and `metrics` it was given.

    `created` is in seconds since 1970, UTC; `raw_nbytes` what its tensors
    take in memory, `encoded_nbytes` what their chunks take on disk.
    """

    root: str
    step: int
    epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    created: float = 0.0
    raw_nbytes: int = 0
    encoded_nbytes: int = 0

    @property
    def path(self) -> str:
        """Its manifest's place."""
        return beside(self.root, manifest_name(self.step))

    @property
    def ratio(self) -> float:
        """Bytes in memory for each byte on disk."""
        return self.raw_nbytes / self.encoded_nbytes if self.encoded_nbytes else 1.0

    def as_dict(self) -> dict[str, Any]:
        """All facts, for `--json`."""
        return {
            "root": self.root,
            "step": self.step,
            "epoch": self.epoch,
            "metrics": self.metrics,
            "created": self.created,
            "raw_nbytes": self.raw_nbytes,
            "encoded_nbytes": self.encoded_nbytes,
            "ratio": self.ratio,
            "path": self.path,
        }


def checkpoint_of(manifest: Manifest, root: str) -> Checkpoint:
    """What `manifest` says, without its tensors."""
    return Checkpoint(
        root=root,
        step=manifest.step,
        epoch=manifest.epoch,
        metrics=dict(manifest.metrics),
        created=manifest.created,
        raw_nbytes=manifest.raw_nbytes,
        encoded_nbytes=manifest.encoded_nbytes,
    )


class Pending:
    """A save that was begun.

    `staged` is set once nothing of the state is read any more, `committed`
    once the checkpoint is durable; both also if the save failed, so that
    nobody waits for ever: `result` tells.  They have an event's `is_set` and
    `wait`.  `tiers` say what became of it in each tier, the nearest first, and
    are complete once they have `ended`.
    """

    def __init__(self, stats: Stats, staged: Flag, tiers: tuple[TierStats, ...] = ()) -> None:
        self.stats, self.tiers = stats, tiers
        self.staged = staged
        self.committed = Flag()
        self._result: Checkpoint | None = None
        self._failure: BaseException | None = None

    @property
    def step(self) -> int:
        """The step that is being saved."""
        return self.stats.step

    @property
    def failure(self) -> BaseException | None:
        """What went wrong, if the save has failed."""
        return self._failure

    def result(self, timeout: float | None = None) -> Checkpoint:
        """Wait until the save is durable; at most `timeout` seconds.

        Checkpoints that needn't be kept are deleted after that; the next save,
        `wait` and `close` wait for it.

        Raises:
            BusyError (a TimeoutError): it isn't yet; it goes on.
            CheckpointError: it failed; no checkpoint was made.
        """
        if not self.committed.wait(timeout):
            raise BusyError(f"step {self.step} isn't durable after {timeout} s; it goes on")
        if self._failure is not None:
            raise self._failure
        assert self._result is not None
        return self._result

    def finish(self, result: Checkpoint | None, failure: BaseException | None) -> None:
        """Say how it ended: for the writer, once."""
        self._result, self._failure = result, failure
        for tier in self.tiers[:1] if failure is None else self.tiers:
            tier.nbytes = self.stats.written_nbytes if failure is None else 0
            tier.seconds = self.stats.stall_seconds + self.stats.background_seconds
            tier.finish("failed" if failure else "durable", failure)
        try:
            self.staged.set()
        finally:
            self.committed.set()
