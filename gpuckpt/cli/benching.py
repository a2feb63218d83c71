"""`gpuckpt bench`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from gpuckpt.cli.output import print_json, print_table
from gpuckpt.cli.tables import Columns
from gpuckpt.limits.rates import Rate
from gpuckpt.limits.run import Found, Limits, measure
from gpuckpt.limits.saves import SaveCost
from gpuckpt.sizes import format_nbytes, parse_nbytes

_COLUMNS = Columns(
    ("beside a loop that", "codec", "stall", "slower", "background", "ratio", "interval"),
    left=("beside a loop that", "codec"),
    flexible=(),
)
_LOOPS = {False: "waits", True: "takes every core"}


def bench_directory(
    directory: Path, size: str, overhead: float, console: Console, *, as_json: bool
) -> int:
    """Measure, show limits as they come, and say which intervals they allow."""

    def tell(found: Found) -> None:
        if as_json or not isinstance(found, Rate):
            return
        rate = f"{found.best / 1e9:6.2f} GB/s at best, {found.worst / 1e9:.2f} at worst"
        console.print(f"{found.what:<20}{rate}", markup=False, soft_wrap=True)

    found = measure(directory, parse_nbytes(size), overhead, tell)
    if as_json:
        print_json(found.as_dict())
        return 0
    for line in _coding(found):
        console.print(line, markup=False, soft_wrap=True)
    console.print()
    print_table(console, _COLUMNS, [_cells(one) for one in found.saves])
    console.print()
    for busy in (False, True):
        console.print(_sentence(found, busy=busy), markup=False, soft_wrap=True)
    return 0


def _coding(found: Limits) -> list[str]:
    """What one thread compresses, where it had a core."""
    rates = [one.encode for one in found.saves if one.codec == "zstd" and not one.busy]
    return [f"{'compress, a thread':<20}{one / 1e9:6.2f} GB/s" for one in rates if one]


def _cells(one: SaveCost) -> tuple[str, ...]:
    return (
        _LOOPS[one.busy],
        one.codec,
        *(f"{seconds:.3f}" for seconds in (one.stall, one.slower, one.background)),
        f"{one.ratio:.3f}",
        _seconds(one.interval),
    )


def _sentence(found: Limits, *, busy: bool) -> str:
    best = found.best(busy=busy)
    return (
        f"{format_nbytes(found.nbytes)} beside a loop that {_LOOPS[busy]}: a save every "
        f"{_seconds(best.interval)} costs {100 * found.overhead:g} % of the time or less "
        f"(codec={best.codec!r}); Every(overhead={found.overhead:g}) finds its own"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.2g} s"
