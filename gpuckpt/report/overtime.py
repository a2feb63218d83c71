"""The charts of a log: what saves took, cost and wrote, over time and steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from gpuckpt.journal import Record
from gpuckpt.report.charts import Chart, Line
from gpuckpt.report.saves import whole_seconds
from gpuckpt.report.scale import NBYTES, RATIO, SECONDS, Unit, write_time
from gpuckpt.stats import Stats


def durations(good: Sequence[Record], failed: Sequence[Record]) -> Chart:
    """How long saves took until they were durable, and which have failed, over the time."""
    first, last = good[0].ended, good[-1].ended
    day = "%Y-%m-%d"
    days = list(dict.fromkeys(write_time(at, day) for at in (first, last)))
    return Chart(
        "Until a save is durable",
        f"From the call until the step is committed; {' to '.join(days)}, UTC.",
        [record.ended for record in good],
        [f"{write_time(record.ended)}, step {record.stats.step}" for record in good],
        [Line("durable after", [whole_seconds(record) for record in good])],
        SECONDS,
        *("time", True),
        marks=[
            (record.ended, f"step {record.stats.step} was not saved: {record.error}")
            for record in failed
        ],
    )


def by_step(good: Sequence[Record]) -> Iterator[Chart]:
    """The other charts: over steps or, where a run went back to an older one, over saves."""
    stats = [record.stats for record in good]
    steps = [one.step for one in stats]
    rising = all(a < b for a, b in pairwise(steps))
    xs = steps if rising else list(range(1, len(steps) + 1))
    names = [
        str(at) if rising else f"{at} (step {step})" for at, step in zip(xs, steps, strict=True)
    ]
    for title, about, unit, lines in _each(stats):
        yield Chart(title, about, xs, names, lines, unit, "step" if rising else "save")


def _each(stats: Sequence[Stats]) -> Iterator[tuple[str, str, Unit, list[Line]]]:
    yield (
        "What saves cost the loop",
        "The caller was blocked; steps beside the save took longer (of the last: not known yet).",
        SECONDS,
        [
            Line("stall", [one.stall_seconds for one in stats], 2),
            Line("slow-down", [one.slowdown_seconds for one in stats], 3),
        ],
    )
    yield (
        "What threads did",
        "Workers together: on fingerprints and coding, of that without a CPU; and the disk.",
        SECONDS,
        [
            Line("filter, encode", [one.filter_seconds + one.encode_seconds for one in stats], 1),
            Line("off CPU", [one.off_cpu_seconds for one in stats], 2),
            Line("write, commit", [one.write_seconds + one.commit_seconds for one in stats], 3),
        ],
    )
    yield (
        "Bytes",
        "Of the state in memory, of its chunks on disk, and of those written by the save.",
        NBYTES,
        [
            Line("in memory", [one.raw_nbytes for one in stats], 1),
            Line("on disk", [one.encoded_nbytes for one in stats], 4),
            Line("written", [one.written_nbytes for one in stats], 3),
        ],
    )
    yield (
        "What was not written in full",
        "Bytes of the state that are as in the step before, saved as differences, or derived.",
        NBYTES,
        [
            Line("unchanged", [one.unchanged_nbytes for one in stats], 1),
            Line("as deltas", [one.delta_nbytes for one in stats], 2),
            Line("derived", [one.derived_nbytes for one in stats], 3),
        ],
    )
    ratios = [Line("ratio", [one.ratio for one in stats], 4)]
    yield "Ratio", "Bytes in memory for each byte on disk.", RATIO, ratios
