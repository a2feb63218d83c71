"""When each stage of a save ran, in which thread: bars on a lane for each thread."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from gpuckpt.journal import Record
from gpuckpt.report.markup import Html, details, el, shorten, table
from gpuckpt.report.scale import SECONDS, write_seconds
from gpuckpt.sizes import format_nbytes
from gpuckpt.spans import LAPS_MAX, Span

# What stages are about: each family has a colour, and a letter for those who don't tell it.
FAMILIES = {
    "loop": ("blocks the loop", ("inventory", "share", "snapshot", "held")),
    "bring": ("brings chunks to the host", ("copy", "reread")),
    "look": ("fingerprints, statistics", ("filter",)),
    "code": ("compresses", ("encode",)),
    "disk": ("writes", ("write",)),
    "done": ("commits", ("index", "sync", "manifest")),
    "idle": ("waits", ("wait", "starved", "ranks")),
}
_FAMILY = {stage: family for family, (_, stages) in FAMILIES.items() for stage in stages}
# Bars at most: the closest ones of a stage are drawn as one until there are no more.
BARS_MAX = 500
# Threads that are drawn at most: those that began first.
LANES_MAX = 40
_LANE, _LABEL, _AXIS = 16, 17, 26


def stages_html(record: Record) -> Html:
    """How long each stage took, of all threads together, as bars and as text."""
    stats = record.stats
    spent = {
        stage: float(getattr(stats, f"{stage}_seconds", 0.0))
        for stage in _FAMILY
        if stage in _FAMILY
    }
    spent = {stage: took for stage, took in spent.items() if took > 0}
    most = max(spent.values(), default=1.0)
    rows = [
        el(
            "li",
            el("span", stage, class_="stage"),
            el(
                "span",
                el("span", class_=f"bar f-{_FAMILY[stage]}", style=f"width:{took / most:.2%}"),
                class_="track",
                aria_hidden="true",
            ),
            el("span", write_seconds(took), class_="took"),
        )
        for stage, took in spent.items()
    ]
    return el("ul", *rows, class_="stages")


def timeline_html(which: str, record: Record, number: int) -> Html:
    """The save's spans, drawn for wide and for narrow screens, and as a table."""
    step = record.stats.step
    spans = sorted(span for span in record.spans if span.stage in _FAMILY)
    if not spans:
        return Html()
    begin, end = min(span.start for span in spans), max(span.end for span in spans)
    threads = len({span.thread for span in spans})
    about = (
        f"Step {step}, {which} save with spans: {write_seconds(end - begin)} in {threads} threads"
        + (f", of which {LANES_MAX} are drawn" if threads > LANES_MAX else "")
        + ". Laps of a stage that are close to each other are drawn as one"
        + (", and not all were kept." if len(record.spans) >= LAPS_MAX else ".")
    )
    pictures = [
        _svg(spans, width, f"Timeline of step {step}", ident=f"t{number}{name}", class_=name)
        for width, name in ((1200, "wide"), (400, "narrow"))
    ]
    title = el("figcaption", el("h3", f"When each stage of step {step} ran"), el("p", about))
    return el(
        "figure",
        title,
        _legend(spans),
        *pictures,
        details("Numbers", _numbers(spans)),
        class_="timeline",
    )


def _legend(spans: Sequence[Span]) -> Html:
    there = {_FAMILY[span.stage] for span in spans}
    return el(
        "ul",
        *(
            el(
                "li",
                el("span", class_=f"swatch f-{family}", aria_hidden="true"),
                f"{told}: {', '.join(stages)}",
            )
            for family, (told, stages) in FAMILIES.items()
            if family in there
        ),
        class_="legend",
    )


def _svg(spans: Sequence[Span], width: int, title: str, *, ident: str, class_: str) -> Html:
    begin, end = min(span.start for span in spans), max(span.end for span in spans)
    lanes = _lanes(spans)
    scale = (width - 8) / max(end - begin, 1e-9)
    height = len(lanes) * (_LANE + _LABEL) + _AXIS
    found = [_time_axis(end - begin, scale, width, height)]
    gap, bars = 1.0 / scale, {thread: _merged(own, 1.0 / scale) for thread, own in lanes.items()}
    while sum(map(len, bars.values())) > BARS_MAX:
        gap *= 2
        bars = {thread: _merged(own, gap) for thread, own in lanes.items()}
    for at, (thread, own) in enumerate(bars.items()):
        top = at * (_LANE + _LABEL)
        found.append(el("text", shorten(thread, 40), x=2, y=top + _LABEL - 3))
        found += [_bar(bar, begin, scale, top + _LABEL) for bar in own]
    return el(
        "svg",
        el("title", title, id=ident),
        *found,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_labelledby=ident,
        class_=class_,
    )


def _lanes(spans: Sequence[Span]) -> dict[str, list[Span]]:
    """The spans of each thread, the loop's first."""
    by_thread: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda one: one.start):
        by_thread.setdefault(span.thread, []).append(span)
    return dict(list(by_thread.items())[:LANES_MAX])


def _merged(spans: Sequence[Span], gap: float) -> list[tuple[Span, int]]:
    """Bars of one thread: spans of a stage that are less than `gap` seconds apart are one."""
    found: list[tuple[Span, int]] = []
    for span in spans:
        if found and found[-1][0].stage == span.stage and span.start - found[-1][0].end < gap:
            last, count = found.pop()
            whole = last._replace(end=max(last.end, span.end), nbytes=last.nbytes + span.nbytes)
            found.append((whole, count + 1))
        else:
            found.append((span, 1))
    return found if len(found) < 2 else _without_specks(found, gap)


def _without_specks(bars: list[tuple[Span, int]], gap: float) -> list[tuple[Span, int]]:
    """Without those too short to be seen where one of another stage ends beside them."""
    kept = [bars[0]]
    for bar in bars[1:]:
        if bar[0].seconds >= gap / 2 or bar[0].start - kept[-1][0].end >= gap:
            kept.append(bar)
    return kept


def _bar(bar: tuple[Span, int], begin: float, scale: float, top: int) -> Html:
    span, count = bar
    told = f"{span.stage}: {write_seconds(span.seconds)}"
    told += f", in {count} laps" if count > 1 else ""
    told += f", {format_nbytes(span.nbytes)}" if span.nbytes else ""
    told += f", from {write_seconds(span.start - begin)}"
    return el(
        "rect",
        el("title", told),
        x=f"{4 + (span.start - begin) * scale:.1f}",
        y=top,
        width=f"{max(span.seconds * scale, 0.7):.1f}",
        height=_LANE - 4,
        class_=f"f-{_FAMILY[span.stage]}",
    )


def _time_axis(seconds: float, scale: float, width: int, height: int) -> Html:
    base = height - _AXIS + 4
    found = [el("path", d=f"M4 {base}H{width - 4}", class_="axis")]
    for at in SECONDS.ticks(seconds, 8 if width > 600 else 4):
        x = 4 + at * scale
        if x <= width - 4:
            anchor = "middle" if 20 < x < width - 24 else "end" if x > 20 else None
            found += [
                el("path", d=f"M{x:.1f} 0V{base + 4}", class_="grid"),
                el("text", write_seconds(at), x=f"{x:.1f}", y=base + 18, class_=anchor),
            ]
    return el("g", *found, class_="axes")


def _numbers(spans: Sequence[Span]) -> Html:
    key = _by_stage
    rows = []
    for (thread, stage), some in groupby(sorted(spans, key=key), key=key):
        own = list(some)
        took = sum(span.seconds for span in own)
        on_cpu = sum(span.cpu_seconds for span in own)
        nbytes = sum(span.nbytes for span in own)
        told = format_nbytes(nbytes) if nbytes else ""
        rows.append((thread, stage, len(own), write_seconds(took), write_seconds(on_cpu), told))
    titles = ("thread", "stage", "laps", "took", "on a CPU", "bytes")
    return table("Stages by thread", titles, rows)


def _by_stage(span: Span) -> tuple[str, str]:
    return span.thread, span.stage
