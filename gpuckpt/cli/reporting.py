"""`gpuckpt report`: one HTML page about a root."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from gpuckpt.cli.output import print_json
from gpuckpt.conversion.placing import new_file
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
    _write(path, told)
    if not as_json:
        found = f"{len(facts.saves.records)} saves, {len(facts.checkpoints.steps)} steps"
        console.print(f"{path}: {found}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _write(path: Path, told: bytes) -> None:
    """The whole page or none of it: what was there stays until it is durable."""
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(told)  # a pipe or a device has no other name to be written under
            return
        with new_file(path.resolve(), force=True) as file:
            file.append([told])
    except OSError as error:
        raise StorageError(f"can't write {path}: {error.strerror}") from error
