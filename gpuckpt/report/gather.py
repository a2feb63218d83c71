"""All that a report says of a root, read once; nothing is changed, and no tensor is read."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuckpt._version import __version__
from gpuckpt.commit import steps
from gpuckpt.errors import CheckpointError, NotFoundError
from gpuckpt.report.checkpoints import READ_MAX, Checkpoints, read_checkpoints
from gpuckpt.report.keeping import Disk, disk_use, reasons
from gpuckpt.report.saves import Saves, read_ranks, read_saves
from gpuckpt.retention import Keep
from gpuckpt.seal import Seal
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.opening import open_store
from gpuckpt.tiers import Root


@dataclass(slots=True)
class Facts:
    """What there is to say of a root, and when it was looked at (seconds since 1970).

    `tiers` has for each other root its steps, or why they can't be told;
    `ranks` the logs of ranks, if there are several.
    """

    root: str
    made: float
    saves: Saves
    checkpoints: Checkpoints
    keep: Keep | None
    kept: dict[int, list[str]]
    disk: Disk
    ranks: dict[int, Saves] = field(default_factory=dict)
    tiers: dict[str, list[int] | str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The data of the page, for `--json`."""
        return {
            "gpuckpt": __version__,
            "root": self.root,
            "made": self.made,
            **self.saves.as_dict(),
            **self.checkpoints.as_dict(),
            "keep": None if self.keep is None else repr(self.keep),
            "kept": [{"step": step, "reasons": told} for step, told in self.kept.items()],
            "disk": self.disk.as_dict(),
            "ranks": {str(rank): one.as_dict() for rank, one in self.ranks.items()},
            "tiers": self.tiers,
        }


def gather(
    root: Root,
    *,
    log: Path | None = None,
    keep: Keep | None = None,
    tiers: Sequence[Root] = (),
    seal: Seal | None = None,
) -> Facts:
    """Read what there is of `root`: its manifests, its log (or that at `log`), its files' sizes.

    Manifests that are damaged, and lines of the log that are, are told of in the
    report.  `tiers` are further roots of the same run.

    Raises:
        NotFoundError: there is no committed step, and no log with a save.
        StorageError: the root, or its log, can't be read.
    """
    store = open_store(root)
    here = Path(store.root) if isinstance(store, LocalStore) else None
    where = log if log is not None else here
    saves = Saves() if where is None else read_saves(where)
    # What of `keep` depends on metrics and times can be told only if all are read.
    needs_all = keep is not None and (keep.best, keep.newer_than) != (None, None)
    checkpoints = read_checkpoints(store, seal, sys.maxsize if needs_all else READ_MAX)
    if not checkpoints.steps and not saves.records:
        raise NotFoundError(f"{store.root}: there is no committed checkpoint, and no log of saves")
    ranks = read_ranks(here, saves) if here is not None and log is None else {}
    return Facts(
        *(store.root, time.time(), saves, checkpoints, keep),
        kept=reasons(keep, checkpoints.steps, checkpoints.rows),
        disk=disk_use(store, frozenset(checkpoints.steps)),
        ranks=ranks,
        tiers={str(tier): _steps_of(tier) for tier in tiers},
    )


def _steps_of(tier: Root) -> list[int] | str:
    try:
        return steps(open_store(tier))
    except CheckpointError as error:
        return str(error)
