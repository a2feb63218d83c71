"""Lines over steps or time, as SVG: median, band from least to most, ticks with units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from gpuckpt.report.markup import Html, details, el, join, shorten, table
from gpuckpt.report.scale import Point, Unit, number_ticks, spread_of, thin, time_ticks

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 34
# Lines with more points than that have no marks.
_MARKED_MAX = 40


@dataclass(frozen=True, slots=True)
class Line:
    """Values of one kind, one for each x; `style` 1 to 4 is its colour, dash and mark."""

    name: str
    values: Sequence[float]
    style: int = 1


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over the same `xs`, each x with a name for people; `marks` are what failed.

    `x_is_time`: xs are seconds since 1970, else numbers that `x_name` says.
    """

    title: str
    about: str
    xs: Sequence[float]
    names: Sequence[str]
    lines: Sequence[Line]
    unit: Unit
    x_name: str = "step"
    x_is_time: bool = False
    marks: Sequence[tuple[float, str]] = field(default=())

    def html(self, number: int) -> Html:
        """The chart with its heading, legend, and the numbers as a table."""
        lines = [thin(self.xs, line.values, self.names) for line in self.lines]
        frame = _Frame.of(self, lines)
        size = max((point.count for points in lines for point in points), default=1)
        note = f" Each point stands for {size} saves: median, in a band from least to most."
        told = self.about + (note if size > 1 else "")
        return el(
            "figure",
            el("figcaption", el("h3", self.title), el("p", told, class_="about")),
            _legend(self),
            _svg(self, lines, frame, number),
            details("Numbers", _numbers(self, lines)),
            class_="chart",
        )


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where values are on the picture."""

    low: float
    high: float
    ticks: Sequence[float]

    @classmethod
    def of(cls, chart: Chart, lines: Sequence[Sequence[Point]]) -> _Frame:
        xs = [point.x for points in lines for point in points] + [x for x, _ in chart.marks]
        most = max((point.most for points in lines for point in points), default=0.0)
        return cls(min(xs, default=0.0), max(xs, default=0.0), chart.unit.ticks(most))

    def x(self, value: float) -> float:
        if self.high <= self.low:
            return (LEFT + WIDTH - RIGHT) / 2
        share = (value - self.low) / (self.high - self.low)
        return LEFT + 6 + share * (WIDTH - LEFT - RIGHT - 12)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self.ticks[-1] * (HEIGHT - TOP - BOTTOM)


def _svg(chart: Chart, lines: Sequence[Sequence[Point]], frame: _Frame, number: int) -> Html:
    styles = [line.style for line in chart.lines]
    return el(
        "svg",
        el("title", chart.title, id=f"c{number}t"),
        el("desc", _described(chart), id=f"c{number}d"),
        _axes(chart, frame),
        *(_band(points, frame, style) for points, style in zip(lines, styles, strict=True)),
        *(_line(points, frame, style) for points, style in zip(lines, styles, strict=True)),
        _failures(chart, frame),
        _tips(chart, lines, frame),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=f"c{number}t c{number}d",
    )


def _described(chart: Chart) -> str:
    told = [f"{line.name}: {spread_of(line.values, chart.unit.write)}" for line in chart.lines]
    failed = f"; {len(chart.marks)} saves failed" if chart.marks else ""
    return "; ".join(told) + failed + "."


def _legend(chart: Chart) -> Html:
    items = [
        el(
            "li",
            el("svg", _key(line.style), viewBox="0 0 26 12", aria_hidden="true", class_="key"),
            el("span", line.name),
            el("span", spread_of(line.values, chart.unit.write), class_="spread"),
        )
        for line in chart.lines
    ]
    if chart.marks:
        key = el("path", d="M9 2l8 8m0-8l-8 8", class_="bad")
        items.append(
            el(
                "li",
                el("svg", key, viewBox="0 0 26 12", aria_hidden="true", class_="key"),
                el("span", "not saved"),
                el("span", len(chart.marks), class_="spread"),
            )
        )
    return el("ul", *items, class_="legend")


def _key(style: int) -> Html:
    return join([el("path", d="M1 6h24", class_=f"line s{style}"), _mark(style, 13, 6)])


def _mark(style: int, x: float, y: float) -> Html:
    """Each line's own shape, for those who don't tell its colour."""
    if style == 1:
        return el("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="2.6", class_=f"mark m{style}")
    shapes = {
        2: f"M{x - 2.5:.1f} {y - 2.5:.1f}h5v5h-5z",
        3: f"M{x:.1f} {y - 3.2:.1f}l3.2 5.6h-6.4z",
        4: f"M{x:.1f} {y - 3.4:.1f}l3.4 3.4l-3.4 3.4l-3.4 -3.4z",
    }
    return el("path", d=shapes[style], class_=f"mark m{style}")


def _axes(chart: Chart, frame: _Frame) -> Html:
    found: list[Html] = []
    for value in frame.ticks:
        y = frame.y(value)
        found += [
            el("path", d=f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", class_="grid"),
            el("text", chart.unit.write(value), x=LEFT - 6, y=f"{y + 4:.1f}", class_="end"),
        ]
    ticks = (time_ticks if chart.x_is_time else number_ticks)(frame.low, frame.high)
    base = HEIGHT - BOTTOM
    for value, told in ticks:
        x = frame.x(value)
        found += [
            el("path", d=f"M{x:.1f} {base}v4", class_="axis"),
            el("text", told, x=f"{x:.1f}", y=base + 15, class_="middle"),
        ]
    found += [
        el("path", d=f"M{LEFT} {base}H{WIDTH - RIGHT}", class_="axis"),
        el("text", chart.x_name, x=WIDTH - RIGHT, y=HEIGHT - 4, class_="end name"),
    ]
    return el("g", *found, class_="axes")


def _band(points: Sequence[Point], frame: _Frame, style: int) -> Html:
    if all(point.count == 1 for point in points):
        return Html()
    over = [f"{frame.x(one.x):.1f} {frame.y(one.most):.1f}" for one in points]
    under = [f"{frame.x(one.x):.1f} {frame.y(one.least):.1f}" for one in reversed(points)]
    return el("path", d=f"M{'L'.join(over + under)}z", class_=f"band m{style}")


def _line(points: Sequence[Point], frame: _Frame, style: int) -> Html:
    places = [(frame.x(point.x), frame.y(point.median)) for point in points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    marks = [_mark(style, x, y) for x, y in places] if len(places) <= _MARKED_MAX else []
    return join([el("path", d=f"M{path}", class_=f"line s{style}") if path else "", *marks])


def _failures(chart: Chart, frame: _Frame) -> Html:
    y = HEIGHT - BOTTOM - 8
    return join(
        el(
            "path",
            el("title", shorten(told, 200)),
            d=f"M{frame.x(x) - 4:.1f} {y - 4}l8 8m0-8l-8 8",
            class_="bad",
        )
        for x, told in chart.marks[:200]
    )


def _tips(chart: Chart, lines: Sequence[Sequence[Point]], frame: _Frame) -> Html:
    """A column for each x, that says the values of all lines there when it is pointed at."""
    if not lines or not lines[0]:
        return Html()
    xs = [frame.x(point.x) for point in lines[0]]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(xs)), WIDTH - RIGHT]
    found = []
    for at, points in enumerate(zip(*lines, strict=True)):
        told = [_value(p, line, chart) for p, line in zip(points, chart.lines, strict=True)]
        found.append(
            el(
                "rect",
                el("title", "\n".join([_where(points[0], chart), *told])),
                x=f"{edges[at]:.1f}",
                y=TOP,
                width=f"{max(edges[at + 1] - edges[at], 0.1):.1f}",
                height=HEIGHT - TOP - BOTTOM,
            )
        )
    return el("g", *found, class_="tips")


def _where(point: Point, chart: Chart) -> str:
    kind = "" if chart.x_is_time else f"{chart.x_name} "
    return f"{kind}{point.first}" + (f" to {point.last}" if point.count > 1 else "")


def _value(point: Point, line: Line, chart: Chart) -> str:
    write = chart.unit.write
    band = f" ({write(point.least)} to {write(point.most)})" if point.count > 1 else ""
    return f"{line.name}: {write(point.median)}{band}"


def _numbers(chart: Chart, lines: Sequence[Sequence[Point]]) -> Html:
    several = any(point.count > 1 for points in lines for point in points)
    titles = [chart.x_name]
    for line in chart.lines:
        titles += [f"{line.name}, {what}" for what in ("least", "median", "most")] * several
        titles += [] if several else [line.name]
    write = chart.unit.write
    rows = []
    for points in zip(*lines, strict=True):
        row = [_where(points[0], chart).removeprefix(f"{chart.x_name} ")]
        for one in points:
            row += map(write, (one.least, one.median, one.most) if several else (one.median,))
        rows.append(row)
    return table(chart.title, titles, rows)
