"""`gpuckpt report`: one HTML page about a root."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from gpuckpt.cli.output import print_json
from gpuckpt.errors import StorageError
from gpuckpt.pruning import parse_keep
from gpuckpt.report.gather import gather
from gpuckpt.report.page import page
from gpuckpt.seal import make_seal
from gpuckpt.tiers import Root

DEFAULT = Path("report.html")


def write_report(
    root: Root,
    out: Path | None,
    console: Console,
    *,
    as_json: bool,
    log: Path | None = None,
    keep: str | None = None,
    tiers: Sequence[str] = (),
    key: Path | None = None,
) -> int:
    """Write the page to `out`; with `as_json` print its data, and write it only if asked to."""
    rule = None if keep is None else parse_keep(keep)
    facts = gather(root, log=log, keep=rule, tiers=tiers, seal=make_seal(key))
    if as_json:
        print_json(facts.as_dict())
    if as_json and out is None:
        return 0
    path = out or DEFAULT
    told = page(facts).encode()
    try:
        path.write_bytes(told)
    except OSError as error:
        raise StorageError(f"can't write {path}: {error.strerror}") from error
    if not as_json:
        found = f"{len(facts.saves.records)} saves, {len(facts.checkpoints.steps)} steps"
        console.print(f"{path}: {found}", markup=False, highlight=False, soft_wrap=True)
    return 0
