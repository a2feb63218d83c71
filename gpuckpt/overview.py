"""How a run's saves are going, told from outside: from its logs, its manifests, its files."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpuckpt import layout
from gpuckpt.commit import open_step, steps
from gpuckpt.diagnosis import diagnose
from gpuckpt.errors import CheckpointError, NotFoundError
from gpuckpt.journal import Record, read_journal
from gpuckpt.manifest import Manifest
from gpuckpt.seal import Seal
from gpuckpt.stores import Store, free_nbytes
from gpuckpt.stores.local import LocalStore

# So many intervals between saves are looked at, so that a change of pace is soon seen.
_RECENT = 8


@dataclass(frozen=True, slots=True)
class SaveSeen:
    """One save: seconds and bytes; what isn't known is None.

    `ended` is in seconds since 1970.  Of several ranks, seconds are those of the slowest, whose
    bottleneck it is, and bytes are those of all.  `state` is `committed`, `gone` (it
    was deleted since) or `failed`, and then `error` says why.
    """

    step: int
    ended: float
    state: str
    raw_nbytes: int
    encoded_nbytes: int
    stall: float | None = None
    slower: float | None = None
    background: float | None = None
    written_nbytes: int | None = None
    bottleneck: str = ""
    error: str = ""
    ranks: int = 1

    @property
    def ratio(self) -> float:
        """Bytes in memory for each byte on disk."""
        return self.raw_nbytes / self.encoded_nbytes if self.encoded_nbytes else 1.0


@dataclass(frozen=True, slots=True)
class Overview:
    """A root at one moment: its last saves, and what follows from them.

    `pace` is the median of the seconds from save to save, `step_rate` that of steps for each
    second, and `due` when the next save would end at that pace; `writing` says of
    steps that aren't committed how many bytes their files have, `newest` which step
    `resume` would take.  `saves` are the last ones, in the order in which they ended.
    """

    root: str
    now: float
    committed: int
    newest: int | None
    saves: tuple[SaveSeen, ...]
    pace: float | None = None
    step_rate: float | None = None
    writing: Mapping[int, int] = field(default_factory=dict)
    free_nbytes: int | None = None
    logs: int = 0
    problem: str = ""

    @property
    def due(self) -> float | None:
        """When the next save would end, in seconds since 1970; None if there is no pace yet."""
        return self.saves[-1].ended + self.pace if self.saves and self.pace else None

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        rows = [asdict(one) | {"ratio": one.ratio} for one in self.saves]
        writing = [{"step": step, "nbytes": nbytes} for step, nbytes in self.writing.items()]
        return asdict(self) | {"saves": rows, "writing": writing, "due": self.due}


class Lookout:
    """Looks at a root again and again; what has been read and can't have changed is kept."""

    def __init__(
        self,
        store: Store,
        *,
        log: Path | None = None,
        last: int = 15,
        seal: Seal | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`log` is that of the saves, if it isn't in the root; `last` saves are told of."""
        self._store, self._log, self._last = store, log, max(last, 1)
        self._seal, self._clock = seal, clock
        self._manifests: dict[tuple[int, int], Manifest] = {}
        self._records: dict[Path, tuple[tuple[int, int], list[Record]]] = {}

    def look(self) -> Overview:
        """What there is now; what can't be read is a `problem` of it.

        Raises:
            StorageError: the storage refused.
        """
        there, problems = steps(self._store), list[str]()
        logs = self._read_logs(problems)
        found = _by_step(logs, there)
        wanted = [step for step in there if step not in found][-self._last :]
        for step, manifest in self._read(wanted, problems).items():
            found[step] = _of_manifest(manifest)
        saves = sorted(found.values(), key=lambda one: one.ended)[-max(self._last, _RECENT + 1) :]
        pace, rate = _pace([one for one in saves if one.state != "failed"])
        return Overview(
            root=self._store.root,
            now=self._clock(),
            committed=len(there),
            newest=there[-1] if there else None,
            saves=tuple(saves[-self._last :]),
            pace=pace,
            step_rate=rate,
            writing=self._writing(there),
            free_nbytes=free_nbytes(self._store),
            logs=len(logs),
            problem="; ".join(dict.fromkeys(problems)),
        )

    def _read(self, wanted: Sequence[int], problems: list[str]) -> dict[int, Manifest]:
        """Manifests, of each as much as is told here."""
        found: dict[tuple[int, int], Manifest] = {}
        for step in wanted:
            try:
                known = step, self._store.size(layout.manifest_name(step))
                found[known] = self._manifests.get(known) or open_step(
                    self._store, step, self._seal, parts=False
                )
            except NotFoundError:
                continue  # it was deleted just now
            except CheckpointError as error:
                problems.append(str(error))
        self._manifests = found
        return {step: manifest for (step, _), manifest in found.items()}

    def _read_logs(self, problems: list[str]) -> list[list[Record]]:
        found = []
        for path in self._log_paths():
            try:
                stat = path.stat()
                known = stat.st_size, stat.st_mtime_ns
                before = self._records.get(path)
                if before is None or before[0] != known:
                    self._records[path] = before = known, read_journal(path)
                found.append(before[1])
            except NotFoundError:
                continue
            except (CheckpointError, OSError) as error:
                problems.append(str(error))
        return found

    def _log_paths(self) -> list[Path]:
        if self._log is not None:
            return [self._log]
        if not isinstance(self._store, LocalStore):
            return []
        names = [name for name in self._store.names() if layout.log_rank(name) is not None]
        return [Path(self._store.root) / name for name in names]

    def _writing(self, there: Sequence[int]) -> dict[int, int]:
        """The bytes of files of steps past the newest; those before it, later ones may refer to."""
        newest = there[-1] if there else -1
        found: dict[int, int] = {}
        for name in self._store.names():
            step = layout.data_step(name)
            if step is not None and step > newest:
                with contextlib.suppress(CheckpointError):
                    found[step] = found.get(step, 0) + self._store.size(name)
        return found


def _by_step(logs: Sequence[Sequence[Record]], there: Sequence[int]) -> dict[int, SaveSeen]:
    """Each step's last save, of all ranks."""
    ranks: dict[int, list[tuple[Record, str]]] = {}
    for records in logs:
        own = zip(records, diagnose(records), strict=True)
        for step, one in {r.stats.step: (r, told.bottleneck) for r, told in own}.items():
            ranks.setdefault(step, []).append(one)
    return {step: _of_records(step, some, there) for step, some in ranks.items()}


def _of_records(step: int, some: Sequence[tuple[Record, str]], there: Sequence[int]) -> SaveSeen:
    slowest, bottleneck = max(some, key=lambda one: one[0].stats.background_seconds)
    stats = [record.stats for record, _ in some]
    errors = [record.error for record, _ in some if record.error is not None]
    return SaveSeen(
        step=step,
        ended=max(record.ended for record, _ in some),
        state="failed" if errors else "committed" if step in there else "gone",
        raw_nbytes=sum(one.raw_nbytes for one in stats),
        encoded_nbytes=sum(one.encoded_nbytes for one in stats),
        stall=max(one.stall_seconds for one in stats),
        slower=max(one.slowdown_seconds for one in stats),
        background=slowest.stats.background_seconds,
        written_nbytes=sum(one.written_nbytes for one in stats),
        bottleneck=bottleneck,
        error=errors[0] if errors else "",
        ranks=len(some),
    )


def _of_manifest(manifest: Manifest) -> SaveSeen:
    return SaveSeen(
        step=manifest.step,
        ended=manifest.created,
        state="committed",
        raw_nbytes=manifest.raw_nbytes,
        encoded_nbytes=manifest.encoded_nbytes,
        ranks=manifest.ranks,
    )


def _pace(saves: Sequence[SaveSeen]) -> tuple[float | None, float | None]:
    """Seconds from save to save, and steps for each second: medians of the last few.

    Not across a restart of the run from an older step.
    """
    recent = saves[-_RECENT - 1 :]
    pairs = [
        (after.ended - before.ended, after.step - before.step)
        for before, after in pairwise(recent)
        if after.step > before.step and after.ended > before.ended
    ]
    if not pairs:
        return None, None
    seconds = statistics.median(took for took, _ in pairs)
    return seconds, statistics.median(count / took for took, count in pairs)
