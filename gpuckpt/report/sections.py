"""The parts of the page that are about steps and files: kept, disk use, ranks, tiers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from gpuckpt.report.checkpoints import Step
from gpuckpt.report.gather import Facts
from gpuckpt.report.markup import Html, el, join, shorten, table
from gpuckpt.report.saves import Saves
from gpuckpt.report.scale import write_count, write_seconds, write_time
from gpuckpt.sizes import format_nbytes

# Steps, and files' steps, that a table or a chart has at most: the newest.
ROWS_MAX = 60


def kept_html(facts: Facts) -> Html:
    """Which steps there are, why each is kept, and what each needs of older steps' files."""
    found = facts.checkpoints
    rows = {row.step: row for row in found.rows}
    shown = [step for step in sorted(facts.kept, reverse=True) if step in rows][:ROWS_MAX]
    told = [el("p", _count_steps(facts, len(shown)))]
    titles = ["step", "kept as", "age", "in memory", "on disk", "ratio", "needs of older steps"]
    body = [_kept_row(rows[step], facts) for step in shown]
    return join([*told, table("Committed steps, the newest first", titles, body)])


def _count_steps(facts: Facts, shown: int) -> str:
    found = facts.checkpoints
    told = f"{len(found.steps)} committed steps"
    if len(found.rows) + len(found.damaged) < len(found.steps):
        told += f", of which {len(found.rows) + len(found.damaged)} manifests were read"
    if shown < len(found.rows):
        told += f"; the newest {shown} of these are listed"
    if facts.keep is not None:
        doomed = sum(not reasons for reasons in facts.kept.values())
        told += f". By the rule that was asked for, {doomed} of them would be deleted"
    return told + "."


def _kept_row(row: Step, facts: Facts) -> Sequence[str]:
    older = sum(row.older.values())
    needs = ""
    if older:
        steps = sorted(row.older)
        listed = ", ".join(map(str, steps[-4:]))
        needs = f"{format_nbytes(older)} of {'… ' if len(steps) > 4 else ''}{listed}"
        needs += f"; chains of {row.chain}" if row.chain > 1 else ""
    why = "; ".join(facts.kept[row.step])
    return (
        str(row.step),
        why or el("strong", "would be deleted"),
        _age(facts.made - row.created),
        format_nbytes(row.raw_nbytes),
        format_nbytes(row.encoded_nbytes),
        write_count(round(row.ratio, 3)),
        needs,
    )


def _age(seconds: float) -> str:
    if abs(seconds) >= 2 * 86400:
        return f"{seconds / 86400:.0f} d"
    return write_seconds(max(seconds, 0.0))


def disk_html(facts: Facts) -> Html:
    """What files take, by kind and by the step that wrote them."""
    disk = facts.disk
    own = sum(disk.segments.values()) - sum(disk.only_older.values())
    kinds = [
        ("data of committed steps", own, "f-code"),
        ("data of steps that are gone, which others need", sum(disk.only_older.values()), "f-disk"),
        ("manifests and lists of parts", disk.manifests, "f-look"),
        ("logs", disk.logs, "f-done"),
        ("all else", disk.others, "f-idle"),
    ]
    most = max([nbytes for _, nbytes, _ in kinds] + [1])
    rows = [_bar(name, nbytes, most, kind) for name, nbytes, kind in kinds if nbytes]
    steps = list(disk.segments)[-ROWS_MAX:]
    largest = max([disk.segments[step] for step in steps] + [1])
    by_step = [
        _bar(
            f"step {step}" + (", gone" if step in disk.only_older else ""),
            *(disk.segments[step], largest, "f-disk" if step in disk.only_older else "f-code"),
        )
        for step in reversed(steps)
    ]
    title = "Data files by the step that wrote them, the newest first"
    if len(steps) < len(disk.segments):
        title += f" ({len(steps)} of {len(disk.segments)})"
    folded = el("details", el("summary", title), el("ul", *by_step, class_="stages"))
    return join([
        el("p", f"{format_nbytes(disk.nbytes)} in all."),
        el("ul", *rows, class_="stages"),
        folded if by_step else "",
    ])  # fmt: skip


def _bar(name: str, nbytes: int, most: int, kind: str) -> Html:
    drawn = el("span", class_=f"bar {kind}", style=f"width:{nbytes / most:.2%}")
    return el(
        "li",
        el("span", name, class_="stage"),
        el("span", drawn, class_="track", aria_hidden="true"),
        el("span", format_nbytes(nbytes), class_="took"),
    )


def ranks_html(facts: Facts) -> Html:
    """What each rank's saves cost, by its log, and what it holds."""
    titles = ["rank", "saves", "failed", "stall", "background", "waited for ranks", "on disk"]
    parts = facts.checkpoints.parts
    ranks = sorted(facts.ranks.keys() | set(range(len(parts))))[:1024]
    rows = [_rank_row(rank, facts.ranks.get(rank, Saves()), parts) for rank in ranks]
    return table("Medians of each rank's saves; bytes are of the newest step", titles, rows)


def _rank_row(rank: int, saves: Saves, parts: Sequence[tuple[int, int]]) -> Sequence[str]:
    stats = [record.stats for record in saves.good]
    names = ("stall_seconds", "background_seconds", "ranks_seconds")
    medians = [
        write_seconds(statistics.median(getattr(one, name) for one in stats)) if stats else ""
        for name in names
    ]
    size = format_nbytes(parts[rank][1]) if rank < len(parts) else ""
    return (str(rank), str(len(saves.records)), str(len(saves.failed)), *medians, size)


def tiers_html(facts: Facts) -> Html:
    """Which steps each root has."""
    rows = [(facts.root, *_tier_cells(facts.checkpoints.steps, facts))]
    for root, found in facts.tiers.items():
        cells = _tier_cells(found, facts) if isinstance(found, list) else ("", "", found)
        rows.append((root, *cells))
    return table("Roots of this run", ["root", "steps", "newest", "behind"], rows)


def _tier_cells(steps: Sequence[int], facts: Facts) -> tuple[str, str, str]:
    newest = facts.checkpoints.steps[-1:]
    lacks = [step for step in facts.checkpoints.steps if not steps or step > steps[-1]]
    behind = f"{len(lacks)} steps: {shorten(', '.join(map(str, lacks)))}" if lacks else "no"
    return str(len(steps)), str(steps[-1]) if steps else "none", behind if newest else "no"


def made_at(facts: Facts) -> str:
    """When the report was made."""
    return f"{write_time(facts.made)} UTC" if facts.made else time.strftime("%F")
