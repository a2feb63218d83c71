"""`python -m bench.peers.report FILE...`: tables of what `bench.peers` measured.

Writes bench/RESULTS.md (or `--out`), and prints the short table of the first
workload of the first file.  Medians over the rounds, least and most in
brackets; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.peers.catalogue import RIVALS
from bench.peers.loops import THREADS
from bench.peers.ratios import Rounds, figure, limits, paired, rival, select
from bench.peers.rotation import Row
from bench.timing import Spread

Cell = Callable[[Rounds], str]
Columns = dict[str, Cell]

DASH = "\N{EN DASH}"
LOOPS = {"gil": "GIL-bound loop", "matmul1": "1-thread matmul", "matmul2": "2-thread matmul"}
HEAD = """# gpuckpt beside its peers

Made by `python -m bench.peers.report`; what is measured and how: [README.md](README.md).
Medians over the rounds, least and most in brackets; a ratio is of two figures of the same round.
*rival*: `clone_thread_safetensors`, or, where that didn't run, `clone_thread_numpy`.
*durable*: every file and directory is synced, and by whom: the peer itself, or, (+), the benchmark.
*others*: most of the machine's CPU time that other processes used during a row.
"""


def main() -> None:
    """Read, write, print."""
    made = argparse.ArgumentParser("python -m bench.peers.report", description=__doc__)
    made.add_argument("files", nargs="+", type=Path)
    made.add_argument("--out", type=Path, default=Path("bench/RESULTS.md"))
    options = made.parse_args()
    reports = [json.loads(path.read_text("utf-8")) for path in options.files]
    sections = [section(path.name, one) for path, one in zip(options.files, reports, strict=True)]
    options.out.write_text("\n".join([HEAD, *sections]), encoding="utf-8")
    print(short(reports))


def section(name: str, report: dict[str, Any]) -> str:
    """All tables of one file."""
    where, rows = report["machine"], report["rows"]
    versions = ", ".join(f"{one} {number}" for one, number in where["packages"].items())
    about = (
        f"{where['date']}, {where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB, "
        f"{where['file_system']}, Python {where['python']}, gpuckpt at {where['commit']}; "
        f"{versions}. `{where['command']}`"
    )
    tables = [part for one in report["workloads"] for part in _workload(report, one)]
    loud = sum(not row["quiet"] for row in rows)
    quiet = (
        f"Others used more than {report['settings']['quiet_share']:.0%} of the machine's CPU time "
        f"during {loud} of {len(rows)} rows."
    )
    return "\n\n".join([f"## {name}", about, quiet, *tables, _absent(rows)]) + "\n"


def short(reports: Sequence[dict[str, Any]]) -> str:
    """The table for README.md: the first workload of the first report, all its peers.

    What a loop lost is taken from all reports.
    """
    workload = next(iter(reports[0]["workloads"]))
    report = reports[0] | {"rows": _with_losses(reports, workload)}
    rows = report["rows"]
    base = select(rows, workload, rival(rows, workload, RIVALS))
    columns: Columns = {
        "blocked": lambda rounds: seconds(figure(rounds, "blocked_s")),
        "durable": lambda rounds: seconds(figure(rounds, "durable_s")),
        "durable ÷ rival": lambda rounds: ratio(paired(rounds, "durable_s", base, "durable_s")),
        "bytes on disk": _share_of(report, workload, "disk_nbytes"),
        "memory over the state": _memory,
        "restore, cold": lambda rounds: seconds(figure(rounds, "restore_cold_s")),
        "restore, warm": lambda rounds: seconds(figure(rounds, "restore_warm_s")),
        "lost beside a GIL-bound loop": lambda rounds: seconds(figure(rounds, "lost_gil_s")),
        "a 2-thread matmul": lambda rounds: seconds(figure(rounds, "lost_matmul2_s")),
    }
    return _table(report, workload, columns)


def _with_losses(reports: Sequence[dict[str, Any]], workload: str) -> list[Row]:
    """The first report's rows, and from all what loops lost, as figures of saves."""
    rows = list(reports[0]["rows"])
    for row in (one for report in reports for one in report["rows"]):
        if row["loop"] and row["workload"] == workload and not row["failure"]:
            for save in row["figures"].get("saves", [row["figures"]]):
                figures = {f"lost_{row['loop']}_s": save["lost_s"]}
                at = (row["loop"], len(rows))
                rows.append(row | {"loop": "", "round": at, "figures": figures})
    return rows


def seconds(value: Spread | None) -> str:
    """`0.12 s (0.11-0.2)`, in milliseconds below a tenth."""
    if value is None:
        return DASH
    scale, unit = (1e3, "ms") if value["median"] < 0.0995 else (1.0, "s")
    least, middle, most = (_digits(value[one] * scale) for one in ("min", "median", "max"))
    return f"{middle} {unit} ({least}{DASH}{most})"


def ratio(value: Spread | None) -> str:
    """`1.2 (1.1-1.3)`."""
    if value is None:
        return DASH
    least, middle, most = (f"{value[one]:.2f}" for one in ("min", "median", "max"))
    return f"{middle} ({least}{DASH}{most})"


def _digits(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.2g}" if abs(value) < 1 else f"{value:.3g}"


def _workload(report: dict[str, Any], workload: str) -> Iterable[str]:
    about, rows = report["workloads"][workload], report["rows"]
    yield f"### {workload}: {about['nbytes'] / 1e9:.3g} GB in {about['tensors']} tensors"
    yield about["what"] + "."
    if limits(rows, workload):
        yield _limits(rows, workload)
        yield _table(report, workload, _saves(report, workload))
        yield _table(report, workload, _restores(rows, workload))
    for loop in THREADS:
        if any(row["loop"] == loop and row["workload"] == workload for row in rows):
            yield f"Beside a {LOOPS[loop]}:"
            yield _table(report, workload, _beside(), loop)


def _limits(rows: Sequence[Row], workload: str) -> str:
    there = limits(rows, workload)
    names = {
        "memcpy_s": "memcpy into warm memory, 1 thread",
        "write_s": "O_DIRECT write + fsync",
        "read_cold_s": "cold read",
        "read_warm_s": "read from the cache",
    }
    said = [f"{words} {seconds(figure(there, name))}" for name, words in names.items()]
    return f"Limits for the same bytes: {'; '.join(said)}."


def _saves(report: dict[str, Any], workload: str) -> Columns:
    rows = report["rows"]
    machine, base = limits(rows, workload), select(rows, workload, rival(rows, workload, RIVALS))
    return {
        "rounds": lambda one: str(len(one)),
        "blocked": lambda one: seconds(figure(one, "blocked_s")),
        "÷ memcpy": lambda one: ratio(paired(one, "blocked_s", machine, "memcpy_s")),
        "state free to change": lambda one: seconds(figure(one, "free_s")),
        "durable": lambda one: seconds(figure(one, "durable_s")),
        "÷ rival": lambda one: ratio(paired(one, "durable_s", base, "durable_s")),
        "÷ write": lambda one: ratio(paired(one, "durable_s", machine, "write_s")),
        "CPU": lambda one: seconds(figure(one, "cpu_s")),
        "bytes": _share_of(report, workload, "disk_nbytes"),
        "memory": _memory,
        "others": _others,
    }


def _restores(rows: Sequence[Row], workload: str) -> Columns:
    machine, base = limits(rows, workload), select(rows, workload, rival(rows, workload, RIVALS))
    return {
        "rounds": lambda one: str(len(one)),
        "restore, cold": lambda one: seconds(figure(one, "restore_cold_s")),
        "cold ÷ rival": lambda one: ratio(paired(one, "restore_cold_s", base, "restore_cold_s")),
        "÷ cold read": lambda one: ratio(paired(one, "restore_cold_s", machine, "read_cold_s")),
        "restore, warm": lambda one: seconds(figure(one, "restore_warm_s")),
        "warm ÷ rival": lambda one: ratio(paired(one, "restore_warm_s", base, "restore_warm_s")),
        "of it, copying into the state": lambda one: seconds(figure(one, "restore_warm_put_s")),
    }


def _beside() -> Columns:
    return {
        "saves": lambda one: str(len(one)),
        "lost": lambda one: seconds(figure(one, "lost_s")),
        "in flight": lambda one: seconds(figure(one, "in_flight_s")),
        "longest step, in steps": lambda one: ratio(figure(one, "longest_over_step")),
        "a step": lambda one: seconds(figure(one, "step_s")),
        "others": _others,
    }


def _share_of(report: dict[str, Any], workload: str, name: str) -> Cell:
    nbytes = report["workloads"][workload]["nbytes"]

    def cell(rounds: Rounds) -> str:
        value = figure(rounds, name)
        return f"{value['median'] / nbytes:.3f}" if value else DASH

    return cell


def _memory(rounds: Rounds) -> str:
    own, below = (figure(rounds, name) for name in ("peak_nbytes", "children_peak_nbytes"))
    if own is None or below is None:
        return DASH
    child = f" + {below['median'] / 1e6:.0f} MB" if below["max"] else ""
    return f"{own['median'] / 1e6:.0f} MB{child}"


def _others(rounds: Rounds) -> str:
    value = figure(rounds, "others_share")
    return f"{value['max']:.0%}" if value else DASH


def _table(report: dict[str, Any], workload: str, columns: Columns, loop: str = "") -> str:
    lines = [f"| peer | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for peer, about in report["peers"].items():
        rounds = select(report["rows"], workload, peer, loop)
        if rounds:
            name = peer if about["syncs"] else f"{peer} (+)"
            cells = [cell(rounds) for cell in columns.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _absent(rows: Iterable[Row]) -> str:
    lines = [
        f"- {row['peer']} {row['loop']} on {row['workload']}: {row['failure']}".replace("  ", " ")
        for row in rows
        if row["failure"]
    ]
    return "\n".join(["Not measured:", "", *lines]) if lines else "Every peer ran in every round."


if __name__ == "__main__":
    main()
