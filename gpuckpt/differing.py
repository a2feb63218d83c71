"""What two checkpoints differ by, leaf by leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from gpuckpt.apart import Apart
from gpuckpt.comparing import Comparison, Pair, Side
from gpuckpt.contents import Contents
from gpuckpt.dtypes import to_numpy
from gpuckpt.matching import select
from gpuckpt.moves import Moved, are_numbers
from gpuckpt.resources import Resources
from gpuckpt.tensors import TensorEntry
from gpuckpt.values import encode_value

Kind = Literal["equal", "moved", "retyped", "reshaped", "added", "removed"]


@dataclass(frozen=True, slots=True)
class Change:
    """A leaf's difference: what it is before and after, rows of tensors or plain values.

    `equal` bit for bit; `moved`: of the same type and shape, with other bits (a value: it is
    another); `retyped`: of another dtype, or a tensor in the place of a value;
    `reshaped`: of another shape.  `by` says how far a tensor's numbers moved, where
    both sides have as many that can be compared, and something was read.
    """

    name: str
    kind: Kind
    before: Any = None
    after: Any = None
    by: Moved | None = None

    @property
    def is_tensor(self) -> bool:
        """Whether it is one on either side."""
        return isinstance(self.before, TensorEntry) or isinstance(self.after, TensorEntry)


def diff(
    before: Side,
    after: Side,
    names: Iterable[str] | None = None,
    *,
    memory: int | str = "256 MiB",
    progress: Callable[[int], None] = lambda _: None,
) -> list[Change]:
    """What each leaf of two checkpoints differs by, in the order of the later one's.

    Tensors of which all chunks have equal fingerprints aren't read, and of
    others only chunks that differ, as long as both sides' norms are known.
    Takes at most `memory` of host memory, whatever their size.  `names` (names
    or globs, of either side) pick leaves.  `progress` is told of raw bytes.

    Raises:
        CorruptError: bytes aren't what was written.
        NotFoundError: one of `names` picks nothing.
    """

    def work() -> list[Change]:
        comparison = Comparison(before, after, Resources(memory), progress)
        return _diff(comparison, names)

    return Apart(work).run()


def _diff(comparison: Comparison, names: Iterable[str] | None) -> list[Change]:
    before, after = comparison.contents
    every = [*after.leaves, *(name for name in before.leaves if name not in after.leaves)]
    chosen = select(names, every) if names else every
    found = {name: _first_look(name, comparison) for name in every if name in chosen}
    pairs: dict[Pair, str] = {}  # tied tensors are compared once
    for name, change in found.items():
        if change.kind in ("moved", "retyped") and _fit(change.before, change.after):
            pairs.setdefault(_pair(name, before, after), name)
    moves = comparison.moves({name: pair for pair, name in pairs.items()})
    for name, change in found.items():
        by = moves.get(pairs.get(_pair(name, before, after), ""))
        if by is not None and change.kind in ("moved", "retyped"):
            same = change.kind == "moved" and not by.changed
            found[name] = replace(change, by=by, kind="equal" if same else change.kind)
    return list(found.values())


def _pair(name: str, before: Contents, after: Contents) -> Pair:
    return before.positions.get(name, -1), after.positions.get(name, -1)


def _first_look(name: str, comparison: Comparison) -> Change:
    """What the manifests say."""
    before, after = (side.leaves for side in comparison.contents)
    if name not in before:
        return Change(name, "added", None, after[name])
    if name not in after:
        return Change(name, "removed", before[name], None)
    one, other = before[name], after[name]
    if not isinstance(one, TensorEntry) and not isinstance(other, TensorEntry):
        return Change(name, "equal" if _same_value(one, other) else "moved", one, other)
    return Change(name, _kind_of_tensors(name, comparison, one, other), one, other)


def _kind_of_tensors(name: str, comparison: Comparison, one: Any, other: Any) -> Kind:
    if not isinstance(one, TensorEntry) or not isinstance(other, TensorEntry):
        return "retyped"
    if one.spec.full_shape != other.spec.full_shape:
        return "reshaped"
    if one.spec.dtype != other.spec.dtype:
        return "retyped"
    return "equal" if comparison.equal(_pair(name, *comparison.contents)) else "moved"


def _fit(before: Any, after: Any) -> bool:
    """Whether both sides are tensors with as many elements that can be compared."""
    if not isinstance(before, TensorEntry) or not isinstance(after, TensorEntry):
        return False
    one, other = before.spec, after.spec
    if one.full_shape != other.full_shape:
        return False
    if one.dtype == other.dtype:
        return True
    complex_ = [to_numpy(spec.dtype).kind == "c" for spec in (one, other)]
    return are_numbers(one.dtype) and are_numbers(other.dtype) and complex_[0] == complex_[1]


def _same_value(one: Any, other: Any) -> bool:
    """Whether plain values are saved alike: NaN is NaN, and 1 isn't 1.0 or True."""
    return type(one) is type(other) and bool(encode_value(one) == encode_value(other))
