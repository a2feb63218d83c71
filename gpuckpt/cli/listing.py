"""`gpuckpt ls`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gpuckpt.cli.output import age, print_json, print_table, printable, shown
from gpuckpt.cli.tables import Columns
from gpuckpt.commit import open_step, steps
from gpuckpt.contents import Shared
from gpuckpt.errors import CheckpointError, NotFoundError
from gpuckpt.pending import Checkpoint, checkpoint_of
from gpuckpt.pruning import parse_keep
from gpuckpt.retention import Keep, outdated
from gpuckpt.seal import make_seal
from gpuckpt.sizes import format_nbytes
from gpuckpt.stores.opening import open_store
from gpuckpt.tiers import Root

__all__ = ["list_steps", "print_json", "printable"]

_COLUMNS = Columns(
    (
        *("step", "epoch", "age", "in memory", "on disk"),
        *("in older", "back to", "deltas", "derived", "ratio", "ranks", "kept", "metrics"),
    ),
    left=("metrics",),
    optional=("epoch", "in older", "back to", "deltas", "derived", "ranks", "kept", "metrics"),
    expendable=("back to", "in memory", "in older", "derived"),
    flexible=("metrics",),
)


@dataclass(frozen=True, slots=True)
class _Row:
    """A committed step; `kept` is None unless somebody asked what would be."""

    checkpoint: Checkpoint
    shared: Shared
    ranks: int
    kept: bool | None

    def facts(self) -> dict[str, Any]:
        found = self.checkpoint.as_dict() | self.shared.as_dict() | {"ranks": self.ranks}
        return found if self.kept is None else found | {"kept": self.kept}


def list_steps(
    root: Root,
    console: Console,
    *,
    as_json: bool,
    key: Path | None = None,
    keep: str | None = None,
) -> int:
    """Print one line for each committed step; 1 if some manifest is damaged."""
    seal = make_seal(key)
    wanted = None if keep is None else parse_keep(keep)
    store = open_store(root)
    found = steps(store)
    if not found:
        raise NotFoundError(f"{store.root}: there is no committed checkpoint")
    doomed = outdated(store, wanted, None, seal)
    rows, broken = [], []
    for step in found:
        try:
            manifest = open_step(store, step, seal)
        except CheckpointError as error:
            broken.append({"step": step, "error": str(error)})
            continue
        shared = Shared.of(manifest.tensors, step)
        kept = _kept(step, wanted, doomed)
        rows.append(_Row(checkpoint_of(manifest, store.root), shared, manifest.ranks, kept))
    if as_json:
        print_json({"checkpoints": [row.facts() for row in rows], "damaged": broken})
        return 1 if broken else 0
    print_table(console, _COLUMNS, [_cells(row) for row in rows])
    for one in broken:
        told = printable(f"damaged: {one['error']}")
        console.print(told, markup=False, style="red", soft_wrap=True)
    return 1 if broken else 0


def _kept(step: int, keep: Keep | None, doomed: Collection[int]) -> bool | None:
    return None if keep is None else step not in doomed


def _cells(row: _Row) -> tuple[str, ...]:
    one, shared = row.checkpoint, row.shared
    metrics = "  ".join(f"{key}={value:.6g}" for key, value in one.metrics.items())
    deltas, derived = (
        f"{100 * nbytes / one.raw_nbytes:.0f} %" if nbytes else ""
        for nbytes in (shared.delta_nbytes, shared.derived_nbytes)
    )
    return (
        str(one.step),
        "" if one.epoch is None else str(one.epoch),
        age(one.created),
        format_nbytes(one.raw_nbytes),
        format_nbytes(one.encoded_nbytes),
        format_nbytes(shared.older_nbytes) if shared.older_nbytes else "",
        "" if shared.oldest_step is None else str(shared.oldest_step),
        *(deltas, derived),
        f"{one.ratio:.3f}",
        str(row.ranks) if row.ranks > 1 else "",
        "" if row.kept is None else "yes" if row.kept else "no",
        shown(metrics, 200),
    )
