"""Norms of layers over steps: a row for each, with a small line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gpuckpt.report.checkpoints import Checkpoints, spread
from gpuckpt.report.markup import Html, details, el, join, scrolled, shorten
from gpuckpt.report.scale import write_count

_WIDTH, _HEIGHT = 160, 34
_POINTS_MAX = 60
# Rows that are seen at once; the others are folded.
_SEEN_MAX = 16


def norms_html(found: Checkpoints) -> Html:
    """A row for each layer, those whose norm has moved most first."""
    rows = sorted(found.norms.items(), key=lambda one: -_moved(one[1]))
    if not rows:
        return el("p", "No tensor has statistics: they are of floating-point types alone.")
    steps = f"Norms at {len(found.rows)} steps, from {found.rows[0].step} to {found.rows[-1].step}"
    seen = _table(f"{steps}; what has moved most comes first", rows[:_SEEN_MAX], found)
    rest = rows[_SEEN_MAX:]
    if not rest:
        return seen
    folded = _table("Norms of the other layers", rest, found)
    return el("div", seen, details(f"{len(rest)} more layers", folded))


def metrics_html(found: Checkpoints) -> Html:
    """A row for each metric that saves were given."""
    metrics: dict[str, dict[int, float]] = {}
    for row in found.rows:
        for name, value in row.metrics.items():
            metrics.setdefault(name, {})[row.step] = value
    if not metrics:
        return Html()
    return _table("Metrics that saves were given", sorted(metrics.items())[:40])


def _table(
    caption: str,
    rows: Sequence[tuple[str, Mapping[int, float]]],
    found: Checkpoints | None = None,
) -> Html:
    found = found or Checkpoints()
    titles = ["name", "over steps", "first", "last", "least", "most"]
    head = el("tr", *(el("th", title, scope="col") for title in titles))
    body = [
        _row(name, points, found.counts.get(name, 0), found.not_finite.get(name, ""))
        for name, points in rows
    ]
    inside = join([el("thead", head), el("tbody", *body)])
    return scrolled(caption, inside, "scroll sparks")


def _row(name: str, points: Mapping[int, float], count: int, bad: str) -> Html:
    values = [value for value in points.values() if math.isfinite(value)]
    several = f" ({count} tensors)" if count > 1 else ""
    shown = el("bdi", shorten(name, 48), title=shorten(name, 300))
    told = [*points.values()][:1] + [*points.values()][-1:]
    ends = [write_count(value) if math.isfinite(value) else str(value) for value in told]
    span = [write_count(one(values)) for one in (min, max)] if values else ["", ""]
    return el(
        "tr",
        el("th", shown, el("small", several), el("b", f" {bad}") if bad else "", scope="row"),
        el("td", _spark(points, name)),
        *(el("td", cell) for cell in ends + span),
    )


def _spark(points: Mapping[int, float], name: str) -> str:
    """A line from the first step to the last; alone, it is a dot."""
    steps = spread([step for step, value in points.items() if math.isfinite(value)], _POINTS_MAX)
    if not steps:
        return ""
    low, high = min(points[step] for step in steps), max(points[step] for step in steps)
    places = [
        (_place(step, steps[0], steps[-1], _WIDTH), _place(points[step], low, high, _HEIGHT))
        for step in steps
    ]
    drawn = [(4 + x, 3 + _HEIGHT - y) for x, y in places]
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in drawn)
    last = drawn[-1]
    about = (
        f"{shorten(name)}: {write_count(points[steps[0]])} at step {steps[0]}, "
        f"{write_count(points[steps[-1]])} at step {steps[-1]}"
    )
    return el(
        "svg",
        el("title", about),
        el("path", d=f"M{line}", class_="line s1"),
        el("circle", cx=f"{last[0]:.1f}", cy=f"{last[1]:.1f}", r="2.6", class_="mark m1"),
        viewBox=f"0 0 {_WIDTH + 8} {_HEIGHT + 6}",
        role="img",
        aria_label=about,
        class_="spark",
    )


def _place(value: float, low: float, high: float, size: float) -> float:
    width = high - low
    return (value - low) / width * size if 0 < width < math.inf else size / 2


def _moved(points: Mapping[int, float]) -> float:
    """By which factor the norm has moved; infinite if it is not finite any more."""
    values = [value for value in points.values() if math.isfinite(value)]
    if len(values) < len(points):
        return math.inf
    least, most = min(values, default=0.0), max(values, default=0.0)
    return 0.0 if least == most else math.inf if least <= 0 else math.log(most / least)
