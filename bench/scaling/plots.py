"""`python -m bench.scaling.plots FILE --out docs/plots`: plots of what `bench.scaling` measured.

Points are medians, bars go from the least to the most, lines without points
are the model's.  Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from bench.scaling.fit import case_of
from bench.scaling.model import Costs, Load, durable, stall

MIB = 1 << 20
COLOURS = {"raw": "tab:blue", "auto": "tab:green", "zstd": "tab:orange"}
Row = dict[str, Any]


class Report:
    """What was measured, and the model that was fitted to it."""

    def __init__(self, path: Path) -> None:
        report = json.loads(path.read_text("utf-8"))
        self.rows: list[Row] = report["results"]
        self.costs = Costs(**report["model"]["costs"])
        self.cores: int = report["machine"]["cores"]

    def of(self, case: str, **facts: object) -> list[Row]:
        """Rows of a case with these facts."""
        return [
            row
            for row in self.rows
            if row["case"] == case and all(row[name] == value for name, value in facts.items())
        ]

    def line(self, rows: Sequence[Row], predict: Callable[..., float], by: str) -> tuple[Any, Any]:
        """The model's figures between the first and the last row's size or number of tensors."""
        ends = [row[by] for row in rows]
        row, at = rows[len(rows) // 2], np.geomspace(min(ends), max(ends), 60)
        load, machine = case_of(self.rows, row, self.cores)
        loads = [
            Load(x, load.tensors, load.ratio)
            if by == "state_nbytes"
            else Load(load.nbytes, round(x), load.ratio)
            for x in at
        ]
        return at, [predict(one, machine, self.costs) for one in loads]


def main() -> None:
    """Draw each, write PNGs."""
    parser = argparse.ArgumentParser("python -m bench.scaling.plots", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/plots"))
    options = parser.parse_args()
    mpl.use("Agg")
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "font.size": 9})
    report = Report(options.file)
    options.out.mkdir(parents=True, exist_ok=True)
    for draw in (stalls, durables, restores, counts, cores, chains):
        figure = draw(report)
        figure.savefig(options.out / f"{draw.__name__}.png", dpi=90, bbox_inches="tight")
        plt.close(figure)


def points(axes: Any, rows: Sequence[Row], by: str, name: str, scale: float, **how: Any) -> None:
    """Medians with bars from the least to the most."""
    middle = np.array([row[name]["median"] for row in rows])
    low = middle - [row[name]["min"] for row in rows]
    high = np.array([row[name]["max"] for row in rows]) - middle
    at = [row[by] * scale for row in rows]
    axes.errorbar(
        at, middle, [low, high], capsize=2.5, markersize=4, fmt=how.pop("fmt", "o"), **how
    )


def _sheet(title: str, x: str, y: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(5.6, 3.6))
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    return figure, axes


def _sizes(report: Report, title: str, y: str) -> tuple[Any, Any]:
    figure, axes = _sheet(title, "state, MiB", y)
    axes.set_xscale("log", base=2)
    ticks = [
        round(row["state_nbytes"] / MIB) for row in report.of("size", codec="raw", mode="copy")
    ]
    axes.set_xticks(ticks, [str(one) for one in ticks])
    return figure, axes


def stalls(report: Report) -> Any:
    """The caller's stall by the state's size."""
    figure, axes = _sizes(report, "How long a save blocks the loop (100 tensors)", "stall, s")
    rows = report.of("size", mode="copy", codec="raw")
    points(axes, rows, "state_nbytes", "stall_s", 1 / MIB, color="tab:blue", label="copy")
    at, line = report.line(rows, stall, "state_nbytes")
    axes.plot(at / MIB, line, color="tab:blue", linewidth=1, label="copy, model")
    how = {"fmt": "_", "color": "black", "label": "memcpy of the state"}
    points(axes, rows, "state_nbytes", "memcpy_s", 1 / MIB, **how)
    rows = report.of("size", mode="hold")
    points(axes, rows, "state_nbytes", "stall_s", 1 / MIB, color="tab:red", label="hold", fmt="s")
    axes.legend()
    return figure


def durables(report: Report) -> Any:
    """Time to durable by the state's size."""
    figure, axes = _sizes(report, "From the call until it is durable (copy)", "seconds")
    for codec, colour in COLOURS.items():
        rows = report.of("size", mode="copy", codec=codec)
        points(axes, rows, "state_nbytes", "durable_s", 1 / MIB, color=colour, label=codec)
        at, line = report.line(rows, durable, "state_nbytes")
        axes.plot(at / MIB, line, color=colour, linewidth=1, label=f"{codec}, model")
    how = {"fmt": "_", "color": "black", "label": "O_DIRECT write + fsync, raw bytes"}
    points(axes, rows, "state_nbytes", "write_s", 1 / MIB, **how)
    axes.set_ylim(top=6 * axes.get_ylim()[1])
    axes.legend(fontsize=8, loc="upper left", ncols=2)
    return figure


def restores(report: Report) -> Any:
    """Restores by the state's size."""
    figure, axes = _sizes(report, "Restore in place", "seconds")
    for codec, colour in COLOURS.items():
        rows = report.of("size", mode="copy", codec=codec)
        for cache, form in (("cold", "o"), ("warm", "^")):
            label = f"{codec}, {cache}"
            how = {"color": colour, "fmt": form, "label": label}
            points(axes, rows, "state_nbytes", f"restore_{cache}_s", 1 / MIB, **how)
    how = {"fmt": "_", "color": "black", "label": "cold read, raw bytes"}
    points(axes, rows, "state_nbytes", "read_cold_s", 1 / MIB, **how)
    axes.legend(fontsize=8)
    return figure


def counts(report: Report) -> Any:
    """Stall and time to durable by the number of tensors."""
    figure, axes = _sheet("64 MiB in more and more tensors (raw)", "tensors", "seconds")
    for mode, colour in (("copy", "tab:blue"), ("hold", "tab:red")):
        rows = report.of("count", mode=mode)
        points(axes, rows, "tensors", "stall_s", 1, color=colour, label=f"stall, {mode}")
        how = {"color": colour, "fmt": "s", "markerfacecolor": "none"}
        points(axes, rows, "tensors", "durable_s", 1, **how, label=f"durable, {mode}")
        if mode == "copy":
            for predict, dashes in ((stall, "-"), (durable, "--")):
                at, line = report.line(rows, predict, "tensors")
                name = f"{predict.__name__}, copy, model"
                axes.plot(at, line, dashes, color=colour, linewidth=1, label=name)
    axes.legend(fontsize=8)
    return figure


def cores(report: Report) -> Any:
    """Time to durable by cores."""
    figure, axes = plt.subplots(figsize=(5.6, 3.2))
    axes.set(title="Saving 256 MiB on one core and on two", ylabel="durable, s")
    labels: list[str] = []
    for codec, colour in COLOURS.items():
        for row in report.of("cores", codec=codec):
            at, spread = len(labels), row["durable_s"]
            bars = [[spread["median"] - spread["min"]], [spread["max"] - spread["median"]]]
            axes.bar(at, spread["median"], yerr=bars, color=colour, alpha=0.6, capsize=3)
            labels.append(f"{codec}\n{row['cores']} core{'s' * (row['cores'] > 1)}")
            said = durable(*case_of(report.rows, row, report.cores), report.costs)
            axes.plot(at, said, "kD", markersize=5, label="model" if at == 0 else None)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def chains(report: Report) -> Any:
    """Bytes and times by the length of a chain of deltas."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.3))
    rows = report.of("chain")
    about = "32 MiB of bfloat16, fine-tuning at 2e-5"
    label = "deltas before it, in its chain"
    left.set(title=about, xlabel=label, ylabel="written, MiB", yscale="log")
    scaled = [row | {"mib": _scaled(row["written_nbytes"], 1 / MIB)} for row in rows]
    points(left, scaled, "links", "mib", 1, color="tab:blue")
    right.set(title='codec="delta"', xlabel=label, ylabel="seconds")
    for name, colour in (
        ("durable_s", "tab:blue"),
        ("restore_cold_s", "tab:orange"),
        ("restore_warm_s", "tab:green"),
    ):
        words = name.removesuffix("_s").replace("_", ", ")
        points(right, rows, "links", name, 1, color=colour, label=words, fmt="o-")
    right.set_ylim(bottom=0)
    right.legend()
    figure.tight_layout()
    return figure


def _scaled(spread: dict[str, float], by: float) -> dict[str, float]:
    return {name: value * by for name, value in spread.items()}


if __name__ == "__main__":
    main()
