"""One state saved in one way, every so many steps: bytes, CPU seconds, and restores."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

import gpuckpt
from bench.training.rivals import Coder, coded
from bench.training.runs import State, nbytes_of

BUFFERS_NBYTES = 256 << 20
FULL_EVERY = 8
# Of so many deltas in a lane the rivals' figures are taken: they are slow.
RIVALS_MOST = 3
Row = dict[str, Any]


class Lane:
    """A root of its own, and the state as it was when it was saved last."""

    def __init__(self, place: Path, state: State, codec: str, interval: int, saves: int) -> None:
        """Saves of `state`, `interval` steps apart, the first one now."""
        self.codec, self._place, self._state = codec, place, state
        self._interval, self._saves = interval, saves
        self._nbytes, self._links = nbytes_of(state), 0
        self._before: State = {}
        self._target = {name: np.ones_like(array) for name, array in state.items()}
        self._rivals = 0
        self._ckpt = gpuckpt.Checkpointer(
            place,
            every=gpuckpt.Every(steps=1),
            codec=codec,
            snapshot="hold",
            memory=self._nbytes + BUFFERS_NBYTES,
            full_every=FULL_EVERY if codec in ("delta", "auto") else 1,
            trace=True,
            log=place.with_suffix(".log"),
        )

    def __enter__(self) -> Self:
        """Nothing more is needed."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Delete what was saved."""
        self._ckpt.close()
        shutil.rmtree(self._place, ignore_errors=True)

    def due(self, step: int) -> bool:
        """Whether it is saved `step` steps after the first time."""
        return not step % self._interval and step // self._interval < self._saves

    def save(self, step: int, rivals: Mapping[str, Coder]) -> Row:
        """Save, restore where that tells something, and let the others code the difference."""
        there = self._stored_nbytes()
        cpu = time.process_time()
        pending = self._ckpt.save(step, self._state)
        pending.result()
        cpu = time.process_time() - cpu
        stats = pending.stats
        self._links = self._links + 1 if stats.delta_nbytes else 0
        row: Row = {
            "codec": self.codec,
            "interval": self._interval,
            "links": self._links,
            "state_nbytes": self._nbytes,
            "written_nbytes": self._stored_nbytes() - there,
            "unchanged_nbytes": stats.unchanged_nbytes,
            "delta_nbytes": stats.delta_nbytes,
            "cpu_s": cpu,
            "encode_cpu_s": _encoding(stats),
        }
        if self._links == 0 or step // self._interval == self._saves - 1:
            row["restore_cpu_s"] = self._restored()
        if self.codec == "delta":
            row["rivals"] = self._others(rivals) if stats.delta_nbytes else {}
            self._before = {name: array.copy() for name, array in self._state.items()}
        return row

    def _others(self, rivals: Mapping[str, Coder]) -> Row:
        self._rivals += 1
        if self._rivals > RIVALS_MOST:
            return {}
        return {name: coded(code, self._before, self._state) for name, code in rivals.items()}

    def _restored(self) -> float:
        """CPU seconds of a restore from the page cache, the better of two, which is compared."""
        times = []
        for _ in range(2):
            begun = time.process_time()
            self._ckpt.restore(self._target)
            times.append(time.process_time() - begun)
        for name, array in self._state.items():
            assert self._target[name].tobytes() == array.tobytes(), name
        return min(times)

    def _stored_nbytes(self) -> int:
        """Of all files: the manifests too."""
        return sum(path.stat().st_size for path in self._place.iterdir())


def _encoding(stats: gpuckpt.Stats) -> float:
    """The CPU seconds of choosing, differences, splitting and compressing, and of checksums."""
    spans = [span for span in stats.spans.all() if span.stage == "encode"] if stats.spans else []
    nbytes = sum(span.nbytes for span in spans)
    # Of many batches only some are kept.
    scale = stats.encode_nbytes / nbytes if nbytes else 0.0
    return scale * sum(span.cpu_seconds for span in spans)
