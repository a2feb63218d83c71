"""The page: one HTML file that needs no other, and runs no script."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from importlib import resources

from gpuckpt._version import __version__
from gpuckpt.journal import Record
from gpuckpt.report.gather import Facts
from gpuckpt.report.markup import Html, el, join, shorten, text
from gpuckpt.report.norms import metrics_html, norms_html
from gpuckpt.report.overtime import by_step, durations
from gpuckpt.report.saves import DIAGNOSED_MAX
from gpuckpt.report.scale import write_count, write_seconds
from gpuckpt.report.sections import disk_html, kept_html, made_at, ranks_html, tiers_html
from gpuckpt.report.timeline import stages_html, timeline_html
from gpuckpt.report.warnings import warnings_html
from gpuckpt.sizes import format_nbytes

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
"""


def page(facts: Facts) -> str:
    """The report as HTML, in ASCII but for names: what a file of it should hold, as UTF-8."""
    title = f"Saves of {facts.root}"
    parts = [part for part in _parts(facts) if part[2]]
    links = [el("li", el("a", name, href=f"#{ident}")) for ident, name, _ in parts]
    body = el(
        "main",
        *(
            el("section", el("h2", name), inside, id=ident, aria_label=name)
            for ident, name, inside in parts
        ),
    )
    style = resources.files("gpuckpt.report").joinpath("style.css").read_text("utf-8")
    head = Html(_HEAD.format(title=text(title), style=style))
    nav = el("nav", el("ul", *links), aria_label="Sections")
    return head + el("header", _heading(facts), nav) + body + _footer() + "</body>\n</html>\n"


def _heading(facts: Facts) -> Html:
    return join(
        [
            el("p", "gpuckpt report", class_="kicker"),
            el("h1", el("bdi", shorten(facts.root, 160))),
            el("p", f"As it was on {made_at(facts)}.", class_="about"),
        ]
    )


def _footer() -> Html:
    return el(
        "footer",
        el(
            "p",
            f"Made by gpuckpt {__version__}. All times are of one machine's clock, in UTC. "
            "Point at a chart, or open its numbers, to see values.",
        ),
    )


def _parts(facts: Facts) -> Iterator[tuple[str, str, Html]]:
    """The sections: an anchor, a heading, and what is inside; nothing of what isn't there."""
    saves, found = facts.saves, facts.checkpoints
    yield "summary", "In short", el("ul", *_tiles(facts), class_="tiles")
    yield "warnings", "To look at", warnings_html(facts)
    if saves.records:
        yield "saves", "Saves over time", _charts(facts)
        yield "pipeline", "Where the time of a save goes", _pipeline(facts)
    else:
        told = "There is no log of saves: Checkpointer(log=True) keeps one, and trace=True adds "
        yield "saves", "Saves over time", el("p", told + "when each stage ran.")
    if found.rows:
        yield "norms", "Norms by layer", join([norms_html(found), metrics_html(found)])
        yield "kept", "What is kept, and why", kept_html(facts)
    yield "disk", "Disk use", disk_html(facts)
    yield "ranks", "Ranks", ranks_html(facts) if facts.ranks or found.parts else Html()
    yield "tiers", "Tiers", tiers_html(facts) if facts.tiers else Html()


def _tiles(facts: Facts) -> Iterator[Html]:
    saves, found = facts.saves, facts.checkpoints
    good = [record.stats for record in saves.good]
    if saves.records:
        failed = f"{len(saves.failed)} failed" if saves.failed else "none failed"
        yield _tile("saves in the log", write_count(len(saves.records)), failed)
    if good:
        for name, what in (("stall_seconds", "blocks the loop"), ("background_seconds", "durable")):
            values = [float(getattr(one, name)) for one in good]
            span = f"{write_seconds(min(values))} to {write_seconds(max(values))}"
            yield _tile(f"{what}, median", write_seconds(statistics.median(values)), span)
        if (share := _share(saves.good)) is not None:
            yield _tile("of the loop's time", f"{share:.2%}", "stall and slow-down")
    if found.rows:
        newest = found.rows[-1]
        yield _tile("committed steps", write_count(len(found.steps)), f"newest {newest.step}")
        sizes = f"{format_nbytes(newest.raw_nbytes)} as {format_nbytes(newest.encoded_nbytes)}"
        yield _tile("ratio of the newest", f"{newest.ratio:.3f}", sizes)
    files = f"data files of {len(facts.disk.segments)} steps"
    yield _tile("on disk", format_nbytes(facts.disk.nbytes), files)


def _tile(what: str, figure: str, more: str) -> Html:
    inside = (el("span", what, class_="what"), el("strong", figure), el("span", more))
    return el("li", *inside)


def _share(records: Sequence[Record]) -> float | None:
    """What stalls and slow-downs took of the time from the first save's end to the last's."""
    whole = records[-1].ended - records[0].ended
    if len(records) < 2 or whole <= 0:
        return None
    costs = [one.stats.stall_seconds + one.stats.slowdown_seconds for one in records[1:]]
    return sum(costs) / whole


def _charts(facts: Facts) -> Html:
    """Durations, the loop's cost, bytes and ratio over the log's saves."""
    good, failed = facts.saves.good, facts.saves.failed
    if not good:
        return el("p", "No save has committed.")
    charts = [durations(good, failed), *by_step(good)]
    return el("div", *(chart.html(at) for at, chart in enumerate(charts)), class_="charts")


def _pipeline(facts: Facts) -> Html:
    """The bottleneck in a sentence, the last save's stages, and when each ran."""
    saves = facts.saves
    last = saves.good[-1] if saves.good else saves.records[-1]
    counted = ", ".join(f"{name} {count}" for name, count in saves.bottlenecks.items())
    number = min(len(saves.records), DIAGNOSED_MAX)
    whole = f"Bottlenecks of the last {number} saves: {counted}."
    return join(
        [
            el("p", saves.sentence + ".", class_="sentence"),
            el("p", whole, class_="about"),
            el("h3", f"Seconds by stage, step {last.stats.step}"),
            el("p", "Of all threads together; they work at the same time.", class_="about"),
            stages_html(last),
            *(timeline_html(which, one, at) for at, (which, one) in enumerate(saves.traced)),
        ]
    )
