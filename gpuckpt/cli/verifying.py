"""`gpuckpt verify`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from gpuckpt.cli.output import print_json, printable
from gpuckpt.commit import open_step, steps
from gpuckpt.errors import CheckpointError, NotFoundError
from gpuckpt.resources import Resources
from gpuckpt.seal import Seal, make_seal
from gpuckpt.stores import Store
from gpuckpt.stores.opening import open_store
from gpuckpt.tiers import Root
from gpuckpt.verify import Damage, verify_step


def verify_root(
    root: Root, step: int | None, console: Console, *, as_json: bool, key: Path | None = None
) -> int:
    """Check one step or all, with a progress bar; 1 if there is damage."""
    seal = make_seal(key)
    store = open_store(root)
    found = steps(store) if step is None else [step]
    if not found or not set(found) <= set(steps(store)):
        raise NotFoundError(f"{store.root}: there is no committed checkpoint to verify")
    damage = _verify(store, found, Console(stderr=True, quiet=as_json), seal)
    if as_json:
        rows = [{"step": at, "damage": [asdict(one) for one in damage[at]]} for at in found]
        print_json({"root": store.root, "steps": rows, "intact": not any(damage.values())})
    else:
        for at in found:
            _print(at, damage[at], console)
    return 1 if any(damage.values()) else 0


def _verify(
    store: Store, found: list[int], console: Console, seal: Seal | None
) -> dict[int, list[Damage]]:
    resources = Resources("256 MiB")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    damage = {}
    with Progress(*columns, console=console, transient=True) as bar:
        for step in found:
            task = bar.add_task(f"step {step}", total=_nbytes(store, step))
            advance = partial(bar.advance, task)
            damage[step] = verify_step(store, step, resources, advance, seal)
    return damage


def _nbytes(store: Store, step: int) -> int | None:
    try:
        return open_step(store, step).encoded_nbytes
    except CheckpointError:
        return None


def _print(step: int, damage: list[Damage], console: Console) -> None:
    if not damage:
        console.print(f"step {step}: intact")
    for one in damage:
        what = one.tensor or "its own structure"
        told = f"step {step}: DAMAGED: {what}, in {one.file} at offset {one.offset}: {one.reason}"
        console.print(
            printable(told),
            markup=False,
            style="red",
            soft_wrap=True,
        )
