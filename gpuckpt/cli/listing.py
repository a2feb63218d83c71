"""`gpuckpt ls` and `gpuckpt show`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpuckpt.commit import open_step, steps
from gpuckpt.errors import CheckpointError, NotFoundError
from gpuckpt.manifest import Manifest, TensorEntry
from gpuckpt.matching import select
from gpuckpt.names import names_of
from gpuckpt.pending import checkpoint_of
from gpuckpt.sizes import format_nbytes
from gpuckpt.statistics import Statistics
from gpuckpt.stores.local import LocalStore
from gpuckpt.tree import walk_json
from gpuckpt.values import decode_value


def list_steps(root: Path, console: Console, *, as_json: bool) -> int:
    """Print one line for each committed step; 1 if some manifest is damaged."""
    store = LocalStore(root)
    rows, broken = [], []
    found = steps(store)
    if not found:
        raise NotFoundError(f"{store.root}: there is no committed checkpoint")
    for step in found:
        try:
            rows.append(checkpoint_of(open_step(store, step), store.root))
        except CheckpointError as error:
            broken.append({"step": step, "error": str(error)})
    if as_json:
        print_json({"checkpoints": [row.as_dict() for row in rows], "damaged": broken})
        return 1 if broken else 0
    table = _table("step", "epoch", "age", "in memory", "on disk", "ratio", "metrics")
    for row in rows:
        metrics = escape("  ".join(f"{key}={value:.6g}" for key, value in row.metrics.items()))
        epoch = "" if row.epoch is None else str(row.epoch)
        sizes = (format_nbytes(row.raw_nbytes), format_nbytes(row.encoded_nbytes))
        table.add_row(
            *(str(row.step), epoch, _age(row.created), *sizes, f"{row.ratio:.3f}", metrics)
        )
    console.print(table)
    for one in broken:
        console.print(f"damaged: {one['error']}", markup=False, style="red")
    return 1 if broken else 0


def show_step(
    root: Path, step: int | None, names: Sequence[str] | None, console: Console, *, as_json: bool
) -> int:
    """Print a checkpoint's tensors and plain values."""
    store = LocalStore(root)
    manifest = open_step(store, step)
    leaves = _leaves(manifest)
    if names:
        chosen = select(names, list(leaves))
        leaves = {name: leaf for name, leaf in leaves.items() if name in chosen}
    facts = checkpoint_of(manifest, store.root)
    if as_json:
        rows = [_facts(name, leaf) for name, leaf in leaves.items()]
        print_json({**facts.as_dict(), "writer": manifest.writer, "leaves": rows})
        return 0
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts.created))
    console.print(f"step {facts.step} of {store.root}, {when}, by {manifest.writer}", markup=False)
    console.print(_leaves_table(leaves))
    for line in _warnings(leaves):
        console.print(line, style="red")
    whole = (format_nbytes(facts.raw_nbytes), format_nbytes(facts.encoded_nbytes))
    console.print(f"{whole[0]} in memory, {whole[1]} on disk, ratio {facts.ratio:.3f}")
    return 0


def print_json(facts: Any) -> None:
    """Facts on standard output, NaN and infinities as words."""
    print(json.dumps(_plain(facts), indent=2))  # noqa: T201


def _leaves(manifest: Manifest) -> dict[str, Any]:
    every = list(walk_json(manifest.structure))
    names = names_of([path for path, _ in every])
    return {
        name: manifest.tensors[node["tensor"]] if "tensor" in node else decode_value(node["value"])
        for name, (_, node) in zip(names, every, strict=True)
    }


def _facts(name: str, leaf: Any) -> dict[str, Any]:
    if not isinstance(leaf, TensorEntry):
        return {"name": name, "value": leaf if isinstance(leaf, int | float | str) else repr(leaf)}
    spec = leaf.spec
    return {
        "name": name,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "kind": spec.kind,
        "device": spec.device,
        "raw_nbytes": spec.nbytes,
        "encoded_nbytes": _encoded_nbytes(leaf),
        "version": leaf.version,
        **_counted(leaf.statistics),
    }


def _counted(statistics: Statistics | None) -> dict[str, Any]:
    if statistics is None:
        return {"norm": None, "nans": None, "infs": None}
    return {"norm": statistics.norm, "nans": statistics.nans, "infs": statistics.infs}


def _leaves_table(leaves: dict[str, Any]) -> Table:
    """A row for each leaf, and its norm, if that of any is known."""
    titles = ["name", "dtype", "shape or value", "in memory", "ratio", "version", "norm", "from"]
    rows = [_cells(name, leaf) for name, leaf in leaves.items()]
    kept = [
        at for at, title in enumerate(titles) if title != "norm" or any(row[at] for row in rows)
    ]
    table = _table(*(titles[at] for at in kept))
    for row in rows:
        table.add_row(*(row[at] for at in kept))
    return table


def _warnings(leaves: dict[str, Any]) -> Iterator[str]:
    """A line for each tensor that holds NaNs or infinities."""
    for name, leaf in leaves.items():
        if isinstance(leaf, TensorEntry) and leaf.statistics and leaf.statistics.not_finite:
            yield f"{_shown(name)} isn't finite: {leaf.statistics.not_finite}"


def _cells(name: str, leaf: Any) -> tuple[str, ...]:
    if not isinstance(leaf, TensorEntry):
        text = repr(leaf)
        return (_shown(name), type(leaf).__name__, _shown(text), *[""] * 5)
    spec, encoded = leaf.spec, _encoded_nbytes(leaf)
    ratio = f"{spec.nbytes / encoded:.3f}" if encoded else ""
    shape = " × ".join(map(str, spec.shape)) or "scalar"  # noqa: RUF001
    where = f"{spec.kind} {spec.device}"
    size = format_nbytes(spec.nbytes)
    norm = "" if leaf.statistics is None else f"{leaf.statistics.norm:.4g}"
    return (_shown(name), spec.dtype, shape, size, ratio, str(leaf.version), norm, where)


def _encoded_nbytes(entry: TensorEntry) -> int:
    return sum(chunk.extent.length for chunk in entry.chunks)


def _shown(text: str, most: int = 60) -> str:
    """Text for a terminal: printable, and not endless."""
    text = text.encode("unicode_escape").decode("ascii") if not text.isprintable() else text
    return escape(text if len(text) <= most else f"{text[: most - 1]}…")


def _age(created: float) -> str:
    seconds = max(time.time() - created, 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _plain(facts: Any) -> Any:
    if isinstance(facts, float) and facts - facts != 0:
        return repr(facts)
    if isinstance(facts, dict):
        return {key: _plain(value) for key, value in facts.items()}
    return [_plain(value) for value in facts] if isinstance(facts, list) else facts


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        right = title in {
            "step",
            "epoch",
            "age",
            "in memory",
            "on disk",
            "ratio",
            "version",
            "norm",
        }
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    return table
