"""`gpuckpt prune`."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from pathlib import Path

from rich.console import Console

from gpuckpt.cli.output import print_json, printable
from gpuckpt.pruning import Pruning, parse_keep, plan_prune, prune_root
from gpuckpt.seal import make_seal
from gpuckpt.sizes import format_nbytes
from gpuckpt.stores.opening import open_store
from gpuckpt.tiers import Root

_MOST_STEPS = 20


def prune_steps(
    root: Root,
    keep: str,
    console: Console,
    *,
    dry_run: bool,
    as_json: bool,
    key: Path | None = None,
) -> int:
    """Delete what isn't kept, or say what that would be; 0 in any case."""
    store, wanted, seal = open_store(root), parse_keep(keep), make_seal(key)
    found = (plan_prune if dry_run else prune_root)(store, wanted, seal)
    if as_json:
        print_json(
            {
                "root": store.root,
                "dry_run": dry_run,
                "deleted": list(found.doomed),
                "kept": list(found.kept),
                "files": dict(found.files),
                "nbytes": found.nbytes,
                "unnamed_files": dict(found.unnamed),
                "unnamed_nbytes": found.unnamed_nbytes,
                "unread": found.spared or None,
            }
        )
        return 0
    for line in _lines(found, store.root, dry_run=dry_run):
        console.print(printable(line), markup=False, soft_wrap=True)
    return 0


def _lines(found: Pruning, root: str, *, dry_run: bool) -> list[str]:
    would = "would be deleted" if dry_run else "deleted"
    lines = [
        f"{root}: {_steps(found.doomed)} {would}, {_steps(found.kept)} kept",
        f"{_files(found.files)} {would}: {format_nbytes(found.nbytes)} in all",
    ]
    if found.unnamed:
        size = format_nbytes(found.unnamed_nbytes)
        what = f"{_files(found.unnamed)} that no checkpoint names: {size}"
        lines.append(what + (", unless a run writes them just now" if dry_run else ", freed too"))
    if found.spared:
        lines.append(f"no data {would}, since a step that stays can't be read: {found.spared}")
    return lines


def _steps(steps: Sequence[int]) -> str:
    if not steps:
        return "no step"
    told = [str(step) for step in steps]
    if len(told) > _MOST_STEPS:
        told[_MOST_STEPS - 2 : -1] = ["…"]
    return f"{len(steps)} step{'s' if len(steps) > 1 else ''} ({', '.join(told)})"


def _files(files: Sized) -> str:
    count = len(files)
    return f"{count} file{'' if count == 1 else 's'}"
