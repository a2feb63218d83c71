"""`gpuckpt show`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from gpuckpt.cli.output import (
    print_json,
    print_table,
    printable,
    shape_of,
    shown,
    text_of,
    value_facts,
)
from gpuckpt.cli.progress import Progress
from gpuckpt.cli.tables import Columns
from gpuckpt.commit import open_step
from gpuckpt.contents import Contents, Shared, contents_of
from gpuckpt.counting import Summary, count
from gpuckpt.outlining import Branch, encoded_nbytes, tree_of
from gpuckpt.pending import Checkpoint, checkpoint_of
from gpuckpt.seal import make_seal
from gpuckpt.sizes import format_nbytes
from gpuckpt.statistics import Statistics
from gpuckpt.stores import Store
from gpuckpt.stores.opening import open_store
from gpuckpt.tensors import TensorEntry
from gpuckpt.tiers import Root

_LEFT = ("name", "dtype", "shape or value", "from")
_COMPUTED = ("min", "max", "mean", "zeros")
_LEAVES = Columns(
    (
        *("name", "dtype", "shape or value", "in memory", "ratio", "version", "norm"),
        *("NaN", "inf", *_COMPUTED, "from"),
    ),
    left=_LEFT,
    optional=("norm", "NaN", "inf", *_COMPUTED),
    expendable=("from", "version", "mean", "in memory", "zeros", "ratio"),
    flexible=("name", "shape or value"),
)
_BRANCHES = Columns(
    (
        *("name", "dtype", "shape or value", "tensors", "in memory"),
        *("ratio", "norm", "NaN", "inf"),
    ),
    left=_LEFT,
    optional=("tensors", "norm", "NaN", "inf"),
    expendable=("tensors", "ratio"),
    flexible=("name", "shape or value"),
)
_MOST_WARNINGS = 20


@dataclass(frozen=True, slots=True)
class View:
    """How a checkpoint is shown: as a `tree`, of so many levels; its numbers computed anew."""

    tree: bool = False
    depth: int | None = None
    compute: bool = False


def show_step(
    root: Root,
    step: int | None,
    names: Sequence[str] | None,
    console: Console,
    *,
    as_json: bool,
    key: Path | None = None,
    view: View = View(),
) -> int:
    """Print a checkpoint's tensors and plain values."""
    store = open_store(root)
    manifest = open_step(store, step, make_seal(key))
    contents = contents_of(manifest).only(names)
    computed: Mapping[str, Summary] = {}
    if view.compute:
        contents, computed = _computed(store, contents, manifest.step, quiet=as_json)
    leaves = contents.leaves
    facts = checkpoint_of(manifest, store.root)
    shared = Shared.of(manifest.tensors, manifest.step)
    if as_json:
        rows = [_facts(name, leaf, manifest.step, computed) for name, leaf in leaves.items()]
        whole = facts.as_dict() | shared.as_dict() | {"ranks": manifest.ranks}
        tree = {"tree": _tree_facts(tree_of(leaves), view.depth)} if view.tree else {}
        print_json({**whole, "writer": manifest.writer, "leaves": rows, **tree})
        return 0
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts.created))
    head = f"step {facts.step} of {store.root}, {when}, by {manifest.writer}"
    console.print(printable(head), markup=False, soft_wrap=True)
    _print(leaves, computed, view, console)
    for line in _warnings(leaves):
        console.print(line, style="red", soft_wrap=True)
    console.print(_summary(facts, shared), soft_wrap=True)
    return 0


def _computed(
    store: Store, contents: Contents, step: int, *, quiet: bool
) -> tuple[Contents, dict[str, Summary]]:
    """The leaves with statistics of what is read now, and all that was seen of them."""
    rows = [leaf for leaf in contents.leaves.values() if isinstance(leaf, TensorEntry)]
    with Progress(f"step {step}", sum(row.spec.nbytes for row in rows), quiet=quiet) as bar:
        found = count(store, contents, contents.leaves, progress=bar.advance)
    leaves = {
        name: replace(leaf, statistics=found[name].statistics) if name in found else leaf
        for name, leaf in contents.leaves.items()
    }
    return replace(contents, leaves=leaves), found


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
    if shared.oldest_step is not None:
        files = f"{shared.older_files} file{'s' if shared.older_files > 1 else ''}"
        text += f"; {files} of earlier steps belong to it, back to step {shared.oldest_step}"
        text += f", in chains of up to {shared.links} deltas" if shared.links else ""
    return text


def _facts(name: str, leaf: Any, step: int, computed: Mapping[str, Summary]) -> dict[str, Any]:
    if not isinstance(leaf, TensorEntry):
        return {"name": name, "value": value_facts(leaf)}
    spec = leaf.spec
    return {
        "name": name,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "kind": spec.kind,
        "device": spec.device,
        "raw_nbytes": spec.nbytes,
        "encoded_nbytes": encoded_nbytes(leaf),
        **Shared.of([leaf], step).as_dict(),
        "version": leaf.version,
        **_counted(leaf.statistics),
        **(computed[name].as_dict() if name in computed else {}),
    }


def _counted(statistics: Statistics | None) -> dict[str, Any]:
    if statistics is None:
        return {"norm": None, "nans": None, "infs": None}
    return {"norm": statistics.norm, "nans": statistics.nans, "infs": statistics.infs}


def _print(
    leaves: Mapping[str, Any], computed: Mapping[str, Summary], view: View, console: Console
) -> None:
    """A row for each leaf, or each branch of their tree."""
    if view.tree:
        tree = tree_of(leaves).walk(view.depth)
        print_table(console, _BRANCHES, [_branch_cells(at, branch) for at, branch in tree])
        return
    rows = [
        (*cells[:-1], *_not_finite(leaf), *_seen(computed.get(name)), cells[-1])
        for name, leaf in leaves.items()
        for cells in [_cells(name, leaf)]
    ]
    print_table(console, _LEAVES, rows)


def _warnings(leaves: Mapping[str, Any]) -> Iterator[str]:
    """A line for each tensor that holds NaNs or infinities, as far as people read them."""
    found = [
        f"{shown(name)} isn't finite: {leaf.statistics.not_finite}"
        for name, leaf in leaves.items()
        if isinstance(leaf, TensorEntry) and leaf.statistics and leaf.statistics.not_finite
    ]
    yield from found[:_MOST_WARNINGS]
    if len(found) > _MOST_WARNINGS:
        yield f"and {len(found) - _MOST_WARNINGS} more tensors aren't finite"


def _cells(name: str, leaf: Any) -> tuple[str, ...]:
    if not isinstance(leaf, TensorEntry):
        return (shown(name), type(leaf).__name__, shown(text_of(leaf)), *[""] * 5)
    spec = leaf.spec
    norm = "" if leaf.statistics is None else f"{leaf.statistics.norm:.4g}"
    size = format_nbytes(spec.nbytes)
    ratio = _ratio(spec.nbytes, encoded_nbytes(leaf))
    where = f"{spec.kind} {spec.device}"
    return (
        shown(name),
        spec.dtype,
        shape_of(spec.shape),
        size,
        ratio,
        str(leaf.version),
        norm,
        where,
    )


def _ratio(raw_nbytes: int, encoded: int) -> str:
    return f"{raw_nbytes / encoded:.3f}" if encoded else "derived" if raw_nbytes else ""


def _not_finite(leaf: Any) -> tuple[str, str]:
    found = leaf.statistics if isinstance(leaf, TensorEntry) else None
    if found is None:
        return "", ""
    return str(found.nans or ""), str(found.infs or "")


def _seen(summary: Summary | None) -> tuple[str, ...]:
    if summary is None or summary.mean is None:
        return ("",) * len(_COMPUTED)
    zeros = f"{100 * summary.zeros / summary.count:.3g} %" if summary.zeros else "0"
    range_ = (f"{one:.4g}" for one in (summary.lowest, summary.highest, summary.mean))
    return (*range_, zeros)


def _branch_cells(at: int, branch: Branch) -> tuple[str, ...]:
    label = "  " * at + shown(branch.label)
    leaf, found = branch.leaf, branch.statistics
    if branch.is_leaf and not isinstance(leaf, TensorEntry):
        return (label, type(leaf).__name__, shown(text_of(leaf)), *[""] * 6)
    one = isinstance(leaf, TensorEntry)
    return (
        label,
        leaf.spec.dtype if one else "",
        shape_of(leaf.spec.shape) if one else "",
        "" if one else str(branch.tensors or ""),
        format_nbytes(branch.raw_nbytes) if branch.tensors else "",
        _ratio(branch.raw_nbytes, branch.encoded_nbytes),
        f"{found.norm:.4g}" if found else "",
        str(found.nans or "") if found else "",
        str(found.infs or "") if found else "",
    )


def _tree_facts(tree: Branch, depth: int | None) -> list[dict[str, Any]]:
    return [
        {
            "name": branch.name,
            "depth": at,
            "tensors": branch.tensors,
            "values": branch.values,
            "raw_nbytes": branch.raw_nbytes,
            "encoded_nbytes": branch.encoded_nbytes,
            **_counted(branch.statistics),
        }
        for at, branch in tree.walk(depth)
    ]
