"""`gpuckpt watch`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from gpuckpt.cli.output import print_json, shown
from gpuckpt.cli.tables import Columns, lines_of
from gpuckpt.errors import CheckpointError, InvalidError, NotFoundError
from gpuckpt.overview import Lookout, Overview, SaveSeen
from gpuckpt.seal import make_seal
from gpuckpt.sizes import format_nbytes, parse_seconds
from gpuckpt.stores.opening import open_store
from gpuckpt.tiers import Root

_COLUMNS = Columns(
    (
        *("step", "ago", "stall", "slower", "background", "written", "in memory", "ratio"),
        *("ranks", "bottleneck", "state"),
    ),
    left=("bottleneck", "state"),
    optional=("stall", "slower", "background", "written", "ranks", "bottleneck", "state"),
    expendable=("in memory", "slower", "ranks"),
    flexible=("state",),
)


@dataclass(frozen=True, slots=True)
class Watched:
    """How a root is watched: by which `log`, how many saves, how often; `once` is one frame."""

    log: Path | None = None
    last: int = 15
    every: str = "2 s"
    once: bool = False


def watch_root(
    root: Root, watched: Watched, console: Console, *, as_json: bool, key: Path | None = None
) -> int:
    """Show a run's saves as they come, until Ctrl-C; one frame if nobody watches a terminal."""
    pause = parse_seconds(watched.every)
    if pause <= 0 or watched.last < 1:
        raise InvalidError("--every is longer than nothing, and --last is 1 or more")
    store = open_store(root)
    lookout = Lookout(store, log=watched.log, last=watched.last, seal=make_seal(key))
    if as_json or watched.once or not console.is_terminal:
        found = lookout.look()
        if not found.saves and not found.committed and not found.problem:
            raise NotFoundError(f"{store.root}: there is no committed checkpoint, and no log")
        if as_json:
            print_json(found.as_dict())
        else:
            for line in _lines(found, console.width):
                console.print(line, soft_wrap=True)
        return 0
    _watch(lookout, console, pause)
    return 0


def _watch(lookout: Lookout, console: Console, pause: float) -> None:
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                live.update(_frame(lookout, console), refresh=True)
                time.sleep(pause)
    except KeyboardInterrupt:
        return


def _frame(lookout: Lookout, console: Console) -> Text:
    """What there is now; a storage that refuses is a line of it, since it may answer again."""
    try:
        found = lookout.look()
    except CheckpointError as error:
        return Text(shown(str(error), 500), "red")
    text = Text("\n", no_wrap=True, overflow="ellipsis").join(
        _lines(found, console.width, console.height)
    )
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _lines(found: Overview, width: int, height: int | None = None) -> list[Text]:
    """A frame: the run, what comes next, and its last saves, with the newest at the bottom.

    Of saves, as many as so many lines have room for.
    """
    head, tail = list(_head(found, width)), list(_tail(found))
    room = len(found.saves) if height is None else max(height - len(head) - len(tail) - 2, 1)
    saves = found.saves[-room:]
    title, *rows = lines_of(_COLUMNS, [_cells(one, found.now) for one in saves], width)
    table = [Text(title, "bold"), *map(Text, rows)] if saves else []
    return [*head, *table, *tail]


def _tail(found: Overview) -> Iterator[Text]:
    failed = [one for one in found.saves if one.error]
    if failed:
        yield Text(f"step {failed[-1].step} failed: {shown(failed[-1].error, 300)}", "red")
    if found.problem:
        yield Text(shown(found.problem, 300), "red")


def _head(found: Overview, width: int) -> Iterator[Text]:
    what = f"{found.committed} committed"
    if found.newest is not None:
        what += f", the newest is step {found.newest}"
    yield Text(f"{_end_of(found.root, width - len(what) - 2)}: {what}")
    for step, nbytes in found.writing.items():
        yield Text(f"step {step} isn't committed yet: {format_nbytes(nbytes)} of it are written")
    parts = [*_pace(found), *_room(found)]
    if parts:
        yield Text("; ".join(parts))
    if not found.logs and found.saves:
        yield Text("no log: what saves cost is known with Checkpointer(log=True)", "dim")


def _end_of(root: str, most: int) -> str:
    """A root's last part, which tells it from others, if there is no room for all."""
    text = shown(root, 1000)
    return text if len(text) <= max(most, 8) else f"…{text[1 - max(most, 8) :]}"


def _pace(found: Overview) -> Iterator[str]:
    if found.pace is None or found.due is None:
        return
    yield f"a save every {_seconds(found.pace)}"
    if found.step_rate is not None:
        yield f"{found.step_rate:.3g} steps/s"
    left = found.due - found.now
    late = -left > found.pace
    yield (
        f"none for {_seconds(found.pace - left)}"
        if late
        else f"next in about {_seconds(max(left, 0))}"
    )


def _room(found: Overview) -> Iterator[str]:
    if found.free_nbytes is None:
        return
    told = f"{format_nbytes(found.free_nbytes)} free"
    last = next((one for one in reversed(found.saves) if one.state != "failed"), None)
    nbytes = 0 if last is None else last.written_nbytes or last.encoded_nbytes
    if nbytes and found.free_nbytes < 100 * nbytes:
        told += f", room for {found.free_nbytes // nbytes} such saves"
    yield told


def _cells(one: SaveSeen, now: float) -> tuple[str, ...]:
    seconds = (
        "" if took is None else f"{took:.3f}" for took in (one.stall, one.slower, one.background)
    )
    return (
        str(one.step),
        _seconds(max(now - one.ended, 0)),
        *seconds,
        "" if one.written_nbytes is None else format_nbytes(one.written_nbytes),
        format_nbytes(one.raw_nbytes),
        f"{one.ratio:.3f}",
        str(one.ranks) if one.ranks > 1 else "",
        one.bottleneck,
        "" if one.state == "committed" else one.state,
    )


def _seconds(seconds: float) -> str:
    """For people who look again in a moment: `4 s`, `12 min`, `0.2 s`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    if seconds >= 0.1:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds * 1000:.0f} ms"
