"""`python -m bench.scaling.tables FILE`: docs/PERFORMANCE.md's tables of what was measured.

Medians, least and most in brackets.  `--into` puts each in the place of the
table with the same head.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.peers.report import ratio, seconds
from bench.scaling.aims import beside_limits
from bench.scaling.profile import MS

MIB = 1 << 20
Row = dict[str, Any]
STAGES = (
    *("snapshot", "filter", "encode", "off_cpu", "starved", "write", "index", "sync", "manifest"),
)


def main() -> None:
    """Print all tables, or put them in their places."""
    parser = argparse.ArgumentParser("python -m bench.scaling.tables", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--into", type=Path, help="a document that has these tables")
    options = parser.parse_args()
    blocks = ["\n".join(lines) for lines in _blocks(json.loads(options.file.read_text("utf-8")))]
    if options.into is None:
        print("\n\n".join(blocks))
    else:
        options.into.write_text(placed(options.into.read_text("utf-8"), blocks), "utf-8")


def placed(text: str, blocks: Iterable[str]) -> str:
    """A document with each table in the place of those with the same first line."""
    tables = [one for block in blocks for one in block.split("\n\n") if one.startswith("|")]
    for new in tables:
        head = new.split("\n", maxsplit=1)[0]
        for old in re.findall(rf"^{re.escape(head)}\n(?:\|.*(?:\n|\Z))+", text, re.MULTILINE):
            text = text.replace(old, new + "\n")
    return text


def _blocks(report: Row) -> Iterator[Iterable[str]]:
    rows = report["results"]
    yield from (
        *(
            _sizes(rows),
            _restores(rows),
            _limits(rows, report["machine"]["cores"]),
            _counts(rows),
            _cores(rows),
            _memory(rows),
        ),
        *(_chains(rows), _stages(rows), _operations(rows, "save"), _operations(rows, "restore")),
        *(_model(report["model"]), _far(report["extrapolation"])),
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Markdown."""
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"


def _of(rows: Sequence[Row], case: str) -> list[Row]:
    return [row for row in rows if row["case"] == case]


def _sizes(rows: Sequence[Row]) -> Iterator[str]:
    head = ("state", "saved", "stall", "÷ memcpy", "durable", "÷ write", "CPU", "written")
    return table(
        head,
        (
            (
                f"{row['state_nbytes'] / MIB:.0f} MiB",
                f"{row['mode']}, {row['codec']}",
                seconds(row["stall_s"]),
                ratio(row["stall_over_memcpy"]),
                seconds(row["durable_s"]),
                ratio(row["durable_over_write"]),
                seconds(row["cpu_s"]),
                f"{row['written_over_state']['median']:.1%}",
            )
            for row in _of(rows, "size")
        ),
    )


def _restores(rows: Sequence[Row]) -> Iterator[str]:
    head = ("state", "codec", "cold", "÷ cold read", "warm", "÷ memcpy")
    return table(
        head,
        (
            (
                f"{row['state_nbytes'] / MIB:.0f} MiB",
                row["codec"],
                seconds(row["restore_cold_s"]),
                ratio(row["restore_cold_over_read"]),
                seconds(row["restore_warm_s"]),
                ratio(row["restore_warm_over_memcpy"]),
            )
            for row in _of(rows, "size")
            if row["mode"] == "copy"
        ),
    )


def _limits(rows: Sequence[Row], cores: int) -> Iterator[str]:
    head = ("state", "codec", "durable ÷ limit", "limited by", "cold: limit ÷ restore")
    return table(
        (*head, "limited by", "warm: memcpy ÷ restore"),
        (
            (
                f"{row['state_nbytes'] / MIB:.0f} MiB",
                row["codec"],
                ratio(row["durable_over_limit"]),
                row["durable_limit"],
                ratio(row["cold_share_of_limit"]),
                row["restore_cold_limit"],
                ratio(row["warm_share_of_memcpy"]),
            )
            for row in beside_limits(rows, cores)
        ),
    )


def _counts(rows: Sequence[Row]) -> Iterator[str]:
    head = ("tensors", "mode", "stall", "durable", "CPU", "restore, warm")
    return table(
        head,
        (
            (
                f"{row['tensors']:,}",
                row["mode"],
                seconds(row["stall_s"]),
                seconds(row["durable_s"]),
                seconds(row["cpu_s"]),
                seconds(row.get("restore_warm_s")),
            )
            for row in _of(rows, "count")
        ),
    )


def _cores(rows: Sequence[Row]) -> Iterator[str]:
    head = ("cores", "codec", "stall", "durable", "CPU", "restore, warm")
    return table(
        head,
        (
            (
                str(row["cores"]),
                row["codec"],
                *(seconds(row[f"{name}_s"]) for name in ("stall", "durable", "cpu")),
                seconds(row["restore_warm_s"]),
            )
            for row in _of(rows, "cores")
        ),
    )


def _memory(rows: Sequence[Row]) -> Iterator[str]:
    head = ("state", "codec", "budget", "save", "restore")
    names = ("budget_nbytes", "save_peak_nbytes", "restore_peak_nbytes")
    return table(
        head,
        (
            (
                f"{row['state_nbytes'] / MIB:.0f} MiB",
                row["codec"],
                *(f"{row[name] / MIB:.0f} MiB" for name in names),
            )
            for row in _of(rows, "memory")
        ),
    )


def _chains(rows: Sequence[Row]) -> Iterator[str]:
    head = ("deltas before it", "state ÷ written", "durable", "CPU", "cold", "warm", "mean")
    periods = {row["saves"]: row for row in _of(rows, "chain-period")}
    return table(
        head,
        (
            (
                str(row["links"]),
                ratio(row["state_over_written"]),
                *(seconds(row[f"{name}_s"]) for name in ("durable", "cpu")),
                *(seconds(row[f"restore_{name}_s"]) for name in ("cold", "warm")),
                f"{periods[row['links'] + 1]['mean_written_over_state']:.1%}",
            )
            for row in _of(rows, "chain")
        ),
    )


def _stages(rows: Sequence[Row]) -> Iterator[str]:
    wanted = [one for one in _of(rows, "size") if one["mode"] == "copy"]
    sizes = sorted({one["state_nbytes"] for one in wanted})
    nbytes = sizes[max(len(sizes) - 2, 0)]
    wanted = [one for one in wanted if one["state_nbytes"] == nbytes]
    head = (f"seconds of {nbytes / MIB:.0f} MiB", *(one["codec"] for one in wanted))
    return table(
        head,
        (
            (name.replace("_", " "), *(seconds(one[key]) for one in wanted))
            for name, key in (
                *((stage, f"stage_{stage}_s") for stage in STAGES),
                *(("CPU, all", "cpu_s"), ("durable", "durable_s")),
            )
        ),
    )


def _operations(rows: Sequence[Row], what: str) -> Iterator[str]:
    wanted = [one for one in _of(rows, "profile") if one["what"] == what]
    names = list(dict.fromkeys(key for one in reversed(wanted) for key in one if MS in key))
    body = [
        (name.removeprefix(MS), *(_number(one.get(name), "ms") for one in wanted)) for name in names
    ]
    body.append(("a core, all", *(_number(one["gb_s_core"], "GB/s") for one in wanted)))
    return table((f"{what}, a chunk of 4 MiB", *(one["codec"] for one in wanted)), body)


def _number(value: dict[str, float] | None, unit: str) -> str:
    if value is None:
        return "\N{EN DASH}"
    return f"{value['median']:.2f} {unit} ({value['min']:.2f}\N{EN DASH}{value['max']:.2f})"


def _model(model: Row) -> Iterator[str]:
    rates = [
        (f"{codec}: {key}", f"{value:.3g}")
        for codec, one in model["rates"].items()
        for key, value in one.items()
        if value is not None
    ]
    costs = [
        (key, f"{value:.3g}{' s' * key.endswith('_s')}") for key, value in model["costs"].items()
    ]
    yield from table(("rate or cost", "value"), [*rates, *costs])
    yield ""
    head = ("case", "codec", "state", "tensors", "cores", "stall", "model", "durable", "model")
    yield from table(
        (*head, "written", "model", "slowest"),
        map(_checked, model["checked"]),
    )
    yield ""
    for name in ("errors_fitted", "errors"):
        yield f"{name}: {model[name]}"


def _far(far: Row) -> Iterator[str]:
    head = ("nodes", "state", "written", "ratio", "stall", "durable", "slowest stage")
    return table(
        head,
        (
            (
                f"{row['nodes']:,}",
                f"{row['state_tb']:g} TB",
                row["bytes"],
                f"{row['ratio']:.2f}",
                f"{1e3 * row['stall_s']:.0f} ms",
                f"{row['durable_s']:.3g} s",
                row["slowest"],
            )
            for row in far["rows"]
        ),
    )


def _checked(row: Row) -> Sequence[str]:
    times = [
        _plain(row[f"{what}{which}_s"]) for what in ("stall", "durable") for which in ("", "_model")
    ]
    return (
        *(row["case"], row["codec"], f"{row['state_nbytes'] / MIB:.0f} MiB", f"{row['tensors']:,}"),
        *(str(row["cores"]), *times),
        *(f"{100 * row[name]:.1f}%" for name in ("written_over_state", "written_over_state_model")),
        row["slowest"],
    )


def _plain(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.0995 else f"{1e3 * value:.1f} ms"


if __name__ == "__main__":
    main()
