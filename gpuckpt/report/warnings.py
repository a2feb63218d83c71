"""What of a run somebody should look at, each thing once."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gpuckpt.report.gather import Facts
from gpuckpt.report.markup import Html, details, el, join, shorten

# Sentences that are seen at once, and those that are there at all.
_SEEN_MAX, _MOST = 12, 300
_STEP = re.compile(r"step [0-9]+ ")


def warnings_html(facts: Facts) -> Html:
    """What is wrong, worst first."""
    told = list(_sentences(facts))
    if not told:
        return el("p", "Nothing: no failed save, no damage seen, no NaN or infinity.", class_="ok")
    items = [el("li", shorten(one, 400)) for one in told[:_MOST]]
    first = el("ul", *items[:_SEEN_MAX], class_="warnings")
    if len(told) <= _SEEN_MAX:
        return first
    more = f"{len(told) - _SEEN_MAX} more"
    more += f", the first {_MOST - _SEEN_MAX} of which are here" if len(told) > _MOST else ""
    return join([first, details(more, el("ul", *items[_SEEN_MAX:], class_="warnings"))])


def _sentences(facts: Facts) -> Iterator[str]:
    for told in facts.checkpoints.damaged.values():
        yield f"damaged: {told}"
    for record in reversed(facts.saves.failed):
        yield f"step {record.stats.step} was not saved: {record.error}"
    yield from _not_finite(facts)
    yield from _remarks(facts)
    if facts.saves.skipped:
        newer = f", {facts.saves.newer} of them of a newer gpuckpt" if facts.saves.newer else ""
        yield f"{facts.saves.skipped} lines of the log could not be read{newer}"


def _not_finite(facts: Facts) -> Iterator[str]:
    """Each tensor that holds NaNs or infinities in a step that is there."""
    seen: dict[str, list[tuple[int, str]]] = {}
    for row in facts.checkpoints.rows:
        for name, what in row.not_finite.items():
            seen.setdefault(name, []).append((row.step, what))
    for name, found in seen.items():
        step, what = found[-1]
        since = f", and in {len(found) - 1} steps before, from {found[0][0]} on"
        yield f"{name} has {what} at step {step}" + (since if len(found) > 1 else "")


def _remarks(facts: Facts) -> Iterator[str]:
    """What saves remarked: of those that say the same the last, and how many there are."""
    seen: dict[str, list[str]] = {}
    for record in facts.saves.records:
        for told in record.stats.remarks:
            seen.setdefault(_STEP.sub("", told, count=1), []).append(told)
    for found in seen.values():
        more = f" (and {len(found) - 1} saves before it said so)" if len(found) > 1 else ""
        yield found[-1] + more
