"""`gpuckpt ls` and `gpuckpt show`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpuckpt.commit import open_step, steps
from gpuckpt.errors import CheckpointError, NotFoundError
from gpuckpt.layout import segment_step
from gpuckpt.manifest import Manifest
from gpuckpt.matching import select
from gpuckpt.names import names_of
from gpuckpt.pending import Checkpoint, checkpoint_of
from gpuckpt.seal import make_seal
from gpuckpt.shards import Shards
from gpuckpt.sizes import format_nbytes
from gpuckpt.statistics import Statistics
from gpuckpt.stores.opening import open_store
from gpuckpt.structure import walk_json
from gpuckpt.tensors import TensorEntry
from gpuckpt.tiers import Root
from gpuckpt.values import decode_value


@dataclass(frozen=True, slots=True)
class Shared:
    """What of a checkpoint's tensors older files hold, in bytes.

    `older_nbytes` of their chunks on disk are in segments of older steps.
    `delta_nbytes` of their raw bytes are saved as deltas, for which
    `base_nbytes` on disk are read beside the chunks; `derived_nbytes` aren't
    saved, but are other tensors' elements, rounded.
    """

    older_nbytes: int
    delta_nbytes: int
    base_nbytes: int
    derived_nbytes: int

    @classmethod
    def of(cls, tensors: Iterable[TensorEntry], step: int) -> Shared:
        """Of tensors in the checkpoint of `step`."""
        chunks = [chunk for entry in tensors for chunk in entry.chunks]
        older = (chunk for chunk in chunks if segment_step(chunk.extent.segment) != step)
        bases = (link for chunk in chunks for link in chunk.chain[1:])
        return cls(
            older_nbytes=sum(chunk.extent.length for chunk in older),
            delta_nbytes=sum(chunk.nbytes for chunk in chunks if chunk.base is not None),
            base_nbytes=sum(link.extent.length for link in bases),
            derived_nbytes=sum(chunk.nbytes for chunk in chunks if chunk.sources),
        )


def list_steps(root: Root, console: Console, *, as_json: bool, key: Path | None = None) -> int:
    """Print one line for each committed step; 1 if some manifest is damaged."""
    seal = make_seal(key)
    store = open_store(root)
    rows, broken = [], []
    found = steps(store)
    if not found:
        raise NotFoundError(f"{store.root}: there is no committed checkpoint")
    for step in found:
        try:
            manifest = open_step(store, step, seal)
            shared = Shared.of(manifest.tensors, step)
            rows.append((checkpoint_of(manifest, store.root), shared))
        except CheckpointError as error:
            broken.append({"step": step, "error": str(error)})
    if as_json:
        facts = [row.as_dict() | asdict(shared) for row, shared in rows]
        print_json({"checkpoints": facts, "damaged": broken})
        return 1 if broken else 0
    console.print(_steps_table(rows))
    for one in broken:
        console.print(printable(f"damaged: {one['error']}"), markup=False, style="red")
    return 1 if broken else 0


def show_step(
    root: Root,
    step: int | None,
    names: Sequence[str] | None,
    console: Console,
    *,
    as_json: bool,
    key: Path | None = None,
) -> int:
    """Print a checkpoint's tensors and plain values."""
    store = open_store(root)
    manifest = open_step(store, step, make_seal(key))
    leaves = _leaves(manifest)
    if names:
        chosen = select(names, list(leaves))
        leaves = {name: leaf for name, leaf in leaves.items() if name in chosen}
    facts = checkpoint_of(manifest, store.root)
    shared = Shared.of(manifest.tensors, manifest.step)
    if as_json:
        rows = [_facts(name, leaf, manifest.step) for name, leaf in leaves.items()]
        whole = facts.as_dict() | asdict(shared)
        print_json({**whole, "writer": manifest.writer, "leaves": rows})
        return 0
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts.created))
    head = f"step {facts.step} of {store.root}, {when}, by {manifest.writer}"
    console.print(printable(head), markup=False)
    console.print(_leaves_table(leaves))
    for line in _warnings(leaves):
        console.print(line, style="red")
    console.print(_summary(facts, shared), soft_wrap=True)
    return 0


def printable(text: str) -> str:
    """Text without what a terminal would obey: names and errors may be a stranger's."""
    return "".join(
        one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode("ascii")
        for one in text
    )


def print_json(facts: Any) -> None:
    """Facts on standard output, NaN and infinities as words."""
    print(json.dumps(_plain(facts), indent=2))  # noqa: T201


def _steps_table(rows: Sequence[tuple[Checkpoint, Shared]]) -> Table:
    """A row for each checkpoint, and what older files hold of it, if they do of any."""
    titles = ["step", "epoch", "age", "in memory", "on disk", "in older", "deltas", "derived"]
    lines = [_step_cells(row, shared) for row, shared in rows]
    return _table_of([*titles, "ratio", "metrics"], lines, ("in older", "deltas", "derived"))


def _step_cells(row: Checkpoint, shared: Shared) -> tuple[str, ...]:
    metrics = "  ".join(f"{key}={value:.6g}" for key, value in row.metrics.items())
    metrics = escape(printable(metrics))
    epoch = "" if row.epoch is None else str(row.epoch)
    sizes = (format_nbytes(row.raw_nbytes), format_nbytes(row.encoded_nbytes))
    older = format_nbytes(shared.older_nbytes) if shared.older_nbytes else ""
    deltas, derived = (
        f"{100 * nbytes / row.raw_nbytes:.0f} %" if nbytes else ""
        for nbytes in (shared.delta_nbytes, shared.derived_nbytes)
    )
    ratio = f"{row.ratio:.3f}"
    return (str(row.step), epoch, _age(row.created), *sizes, older, deltas, derived, ratio, metrics)


def _summary(facts: Checkpoint, shared: Shared) -> str:
    """What a checkpoint takes in memory and on disk, and where."""
    text = f"{format_nbytes(facts.raw_nbytes)} in memory, "
    text += f"{format_nbytes(facts.encoded_nbytes)} on disk, "
    if shared.older_nbytes:
        text += f"{format_nbytes(shared.older_nbytes)} of it in older segments, "
    text += f"ratio {facts.ratio:.3f}"
    if shared.delta_nbytes:
        percent = 100 * shared.delta_nbytes / facts.raw_nbytes
        text += (
            f"; {percent:.0f} % deltas, whose bases are {format_nbytes(shared.base_nbytes)} more"
        )
    if shared.derived_nbytes:
        percent = 100 * shared.derived_nbytes / facts.raw_nbytes
        text += f"; {percent:.0f} % derived from other tensors"
    return text


def _leaves(manifest: Manifest) -> dict[str, Any]:
    every = list(walk_json(manifest.structure))
    names, shards = names_of([path for path, _ in every]), Shards(manifest)
    return {
        name: shards.joined(node["tensor"]) if "tensor" in node else decode_value(node["value"])
        for name, (_, node) in zip(names, every, strict=True)
    }


def _facts(name: str, leaf: Any, step: int) -> dict[str, Any]:
    if not isinstance(leaf, TensorEntry):
        return {"name": name, "value": leaf if isinstance(leaf, float | str) else _number(leaf)}
    spec = leaf.spec
    return {
        "name": name,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "kind": spec.kind,
        "device": spec.device,
        "raw_nbytes": spec.nbytes,
        "encoded_nbytes": _encoded_nbytes(leaf),
        **asdict(Shared.of([leaf], step)),
        "version": leaf.version,
        **_counted(leaf.statistics),
    }


def _text(leaf: Any) -> str:
    """A plain value as Python writes it, which it doesn't with integers of 4,300 digits and more.

    They come from strangers, or are keys and generators' states.
    """
    try:
        return repr(leaf)
    except ValueError:
        return hex(leaf) if isinstance(leaf, int) else f"a {type(leaf).__name__} of long integers"


def _number(leaf: Any) -> Any:
    """An integer that any JSON parser reads, or text."""
    return leaf if isinstance(leaf, int) and leaf.bit_length() <= 64 else _text(leaf)


def _counted(statistics: Statistics | None) -> dict[str, Any]:
    if statistics is None:
        return {"norm": None, "nans": None, "infs": None}
    return {"norm": statistics.norm, "nans": statistics.nans, "infs": statistics.infs}


def _leaves_table(leaves: dict[str, Any]) -> Table:
    """A row for each leaf, and its norm, if that of any is known."""
    titles = ["name", "dtype", "shape or value", "in memory", "ratio", "version", "norm", "from"]
    rows = [_cells(name, leaf) for name, leaf in leaves.items()]
    return _table_of(titles, rows, ("norm",))


def _warnings(leaves: dict[str, Any]) -> Iterator[str]:
    """A line for each tensor that holds NaNs or infinities."""
    for name, leaf in leaves.items():
        if isinstance(leaf, TensorEntry) and leaf.statistics and leaf.statistics.not_finite:
            yield f"{_shown(name)} isn't finite: {leaf.statistics.not_finite}"


def _cells(name: str, leaf: Any) -> tuple[str, ...]:
    if not isinstance(leaf, TensorEntry):
        text = _text(leaf)
        return (_shown(name), type(leaf).__name__, _shown(text), *[""] * 5)
    spec, encoded = leaf.spec, _encoded_nbytes(leaf)
    ratio = f"{spec.nbytes / encoded:.3f}" if encoded else "derived" if spec.nbytes else ""
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


def _table_of(
    titles: Sequence[str], rows: Sequence[tuple[str, ...]], optional: Sequence[str]
) -> Table:
    """A table without those optional columns that are empty; words are on the left."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    kept = [
        at for at, title in enumerate(titles) if title not in optional or any(r[at] for r in rows)
    ]
    for title in (titles[at] for at in kept):
        left = title in {"name", "dtype", "shape or value", "from", "metrics"}
        table.add_column(title, justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(row[at] for at in kept))
    return table
