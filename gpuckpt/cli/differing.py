"""`gpuckpt diff`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gpuckpt.cli.output import print_json, print_table, shape_of, shown, text_of, value_facts
from gpuckpt.cli.progress import Progress
from gpuckpt.cli.tables import Columns
from gpuckpt.commit import open_step, steps
from gpuckpt.comparing import Side
from gpuckpt.differing import Change, diff
from gpuckpt.errors import InvalidError, NotFoundError
from gpuckpt.moves import Moved
from gpuckpt.seal import Seal, make_seal
from gpuckpt.stores.opening import is_url, open_store
from gpuckpt.tensors import TensorEntry

_BITS = ("sign", "exp", "mant")
_COLUMNS = Columns(
    (
        *("name", "shape", "changed", "largest", "relative", "cosine", *_BITS),
        *("bytes", "not finite"),
    ),
    left=("name", "shape"),
    optional=(*_BITS, "bytes", "not finite"),
    expendable=("bytes", "shape", "sign", "exp"),
)
_PLACE = re.compile(r"(.+)@([0-9]{1,12})")
# So many rows people look at; of more, those are shown that moved most.
_MOST_ROWS = 40


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of a difference is wanted, and how: `every` row, and of equal leaves too."""

    names: Sequence[str] = ()
    steps: tuple[int, int] | None = None
    every: bool = False
    equal: bool = False
    exit_code: bool = False


def diff_steps(
    one: str,
    other: str | None,
    wanted: Wanted,
    console: Console,
    *,
    as_json: bool,
    key: Path | None = None,
) -> int:
    """Print what two checkpoints differ by; with `exit_code`, 1 if they do."""
    before, after = _sides(one, other, wanted.steps, make_seal(key))
    nbytes = after.manifest.raw_nbytes
    with Progress("comparing", nbytes, quiet=as_json) as bar:
        changes = diff(before, after, list(wanted.names), progress=bar.advance)
    if as_json:
        print_json(_facts(before, after, changes, equal=wanted.equal))
    else:
        console.print(f"{_told(before)} → {_told(after)}", markup=False, soft_wrap=True)
        console.print(_totals(changes), markup=False, soft_wrap=True)
        _print(changes, wanted, console)
    different = any(change.kind != "equal" for change in changes)
    return 1 if different and wanted.exit_code else 0


def parse_place(text: str) -> tuple[str, int | None]:
    """`root@step` as a root and a step; a root that is called so as itself."""
    match = _PLACE.fullmatch(text)
    if match is None or (not is_url(text) and Path(text).is_dir()):
        return text, None
    return match[1], int(match[2])


def _sides(
    one: str, other: str | None, between: tuple[int, int] | None, seal: Seal | None
) -> tuple[Side, Side]:
    first = parse_place(one)
    if other is not None:
        if between is not None:
            raise InvalidError("--steps are two steps of one root; of two, write ROOT@STEP")
        return _side(*first, seal), _side(*parse_place(other), seal)
    if between is None:
        between = _last_two(*first)
    elif first[1] is not None:
        raise InvalidError(f"--steps are two steps of a root, and {one} names one")
    return _side(first[0], between[0], seal), _side(first[0], between[1], seal)


def _last_two(root: str, step: int | None) -> tuple[int, int]:
    """A step, the newest unless named, and the one before it."""
    store = open_store(root)
    found = [at for at in steps(store) if step is None or at <= step]
    if len(found) < 2 or (step is not None and found[-1] != step):
        what = "the newest step" if step is None else f"step {step}"
        raise NotFoundError(
            f"{store.root}: {what} isn't there with one before it to compare it with; "
            f"committed steps: {', '.join(map(str, steps(store)[-10:])) or 'none'}"
        )
    return found[-2], found[-1]


def _side(root: str, step: int | None, seal: Seal | None) -> Side:
    store = open_store(root)
    return Side(store, open_step(store, step, seal))


def _told(side: Side) -> str:
    return f"step {side.manifest.step} of {side.store.root}"


def _totals(changes: Sequence[Change]) -> str:
    """`3 tensors moved, 7 equal; 1 value changed`."""
    tensors = Counter(one.kind for one in changes if one.is_tensor)
    values = Counter(one.kind for one in changes if not one.is_tensor)
    told = []
    for what, counts in (("tensor", tensors), ("value", values)):
        if counts:
            several = "" if counts.total() == 1 else "s"
            parts = ", ".join(f"{number} {kind}" for kind, number in counts.most_common())
            told.append(f"{counts.total()} {what}{several}: {parts}")
    return "; ".join(told) or "nothing on either side"


def _print(changes: Sequence[Change], wanted: Wanted, console: Console) -> None:
    moved = [one for one in changes if one.by is not None and one.kind != "equal"]
    rows = moved if wanted.every else _most_moved(moved)
    if rows:
        print_table(console, _COLUMNS, [_cells(one, one.by) for one in rows if one.by is not None])
    if len(rows) < len(moved):
        console.print(f"and {len(moved) - len(rows)} that moved less: --all shows them")
    for lines, more in (
        (list(_other_lines(changes, values=False)), "tensors"),
        (list(_other_lines(changes, values=True)), "values"),
    ):
        most = len(lines) if wanted.every else _MOST_ROWS
        for line in lines[:most]:
            console.print(line, soft_wrap=True)
        if len(lines) > most:
            console.print(f"and {len(lines) - most} more {more}: --all shows them")
    for one in changes if wanted.equal else ():
        if one.kind == "equal":
            console.print(f"{shown(one.name)}: equal", soft_wrap=True)


def _most_moved(moved: Sequence[Change]) -> list[Change]:
    """Those with the largest relative differences, in their order; what broke comes first."""
    if len(moved) <= _MOST_ROWS:
        return list(moved)

    def far(change: Change) -> tuple[int, float, float]:
        by = change.by or Moved()
        return by.broken, -1.0 if by.relative is None else by.relative, by.largest

    most = {id(one) for one in sorted(moved, key=far, reverse=True)[:_MOST_ROWS]}
    return [one for one in moved if id(one) in most]


def _cells(change: Change, by: Moved) -> tuple[str, ...]:
    spec = change.after.spec
    share = _percent(by.changed, by.count)
    bits: tuple[str, ...] = ("", "", "")
    if by.signs or by.exponents or by.mantissas:
        bits = tuple(_percent(one, by.count) for one in (by.signs, by.exponents, by.mantissas))
    planes = " ".join(_percent(one, by.count) for one in reversed(by.bytes_changed))
    far = ("", "", "")
    if by.numeric:
        relative, cosine = by.relative, by.cosine
        far = (
            f"{by.largest:.3g}",
            "" if relative is None else f"{relative:.3g}",
            "" if cosine is None else _cosine(cosine),
        )
    finite = [f"{n} {what}" for n, what in ((by.broken, "lost"), (by.mended, "mended")) if n]
    return (shown(change.name), shape_of(spec.shape), share, *far, *bits, planes, ", ".join(finite))


def _percent(some: int, count: int) -> str:
    """A share in percent; never 0 of something, nor 100 if not all are meant."""
    share = 100 * some / count if count else 0.0
    if not some or some == count:
        return f"{share:.0f}"
    return "<1" if share < 1 else ">99" if share > 99 else f"{share:.0f}"


def _cosine(cosine: float) -> str:
    """With as many digits as tell it from 1, six at most."""
    return "1-" + f"{1 - cosine:.1e}" if 0 < 1 - cosine < 1e-4 else f"{cosine:.4f}"


def _other_lines(changes: Sequence[Change], *, values: bool) -> Iterator[str]:
    for one in changes:
        if one.kind != "equal" and one.is_tensor != values:
            if one.kind == "moved" and one.is_tensor:
                continue
            yield f"{shown(one.name)}: {_sentence(one)}"


def _sentence(change: Change) -> str:
    if change.kind == "added":
        return f"added, {_leaf(change.after)}"
    if change.kind == "removed":
        return f"removed, was {_leaf(change.before)}"
    return f"{_leaf(change.before)} → {_leaf(change.after)}"


def _leaf(leaf: Any) -> str:
    if isinstance(leaf, TensorEntry):
        return f"{leaf.spec.dtype} {shape_of(leaf.spec.shape)}"
    return shown(text_of(leaf))


def _facts(before: Side, after: Side, changes: Sequence[Change], *, equal: bool) -> dict[str, Any]:
    sides = [{"root": one.store.root, "step": one.manifest.step} for one in (before, after)]
    counts = Counter(one.kind for one in changes)
    rows = [_change_facts(one) for one in changes if equal or one.kind != "equal"]
    different = any(one.kind != "equal" for one in changes)
    return {
        "before": sides[0],
        "after": sides[1],
        "different": different,
        "counts": dict(counts),
        "changes": rows,
    }


def _change_facts(change: Change) -> dict[str, Any]:
    found: dict[str, Any] = {"name": change.name, "kind": change.kind, "tensor": change.is_tensor}
    for side, leaf in (("before", change.before), ("after", change.after)):
        if isinstance(leaf, TensorEntry):
            found[side] = {"dtype": leaf.spec.dtype, "shape": list(leaf.spec.shape)}
        elif (side == "before") != (change.kind == "added") or side == "after":
            found[side] = value_facts(leaf)
    return found if change.by is None else found | {"by": _move_facts(change.by)}


def _move_facts(by: Moved) -> dict[str, Any]:
    far = {"largest": by.largest, "relative": by.relative, "cosine": by.cosine}
    return {
        "count": by.count,
        "changed": by.changed,
        **(far if by.numeric else dict.fromkeys(far)),
        "signs": by.signs,
        "exponents": by.exponents,
        "mantissas": by.mantissas,
        "bytes": list(by.bytes_changed),
        "became_not_finite": by.broken,
        "became_finite": by.mended,
    }
