"""Fit the model's costs to half of what was measured, and check it against the other half."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.scaling.model import CHUNK_NBYTES, Costs, Load, Machine, durable, mixed, stages, stall
from bench.scaling.model import fill as filling

Row = dict[str, Any]
Floats = npt.NDArray[np.float64]
NOTHING = Costs(0, 0, 0, 0, 0)
# What costs are fitted to; `auto` is predicted from both.
CODECS = ("raw", "zstd")
AUTO = "auto"
FACTS = ("case", "state_nbytes", "tensors", "cores")  # rows with the same saved the same
LEAST_NBYTES = 64 << 20  # smaller files and copies say more of caches and calls than of rates


def points(rows: Iterable[Row]) -> list[Row]:
    """The rows that the model is about."""
    return [
        row
        for row in rows
        if row["case"] in {"size", "count", "cores"}
        and row["mode"] == "copy"
        and row["codec"] in (*CODECS, AUTO)
    ]


def machine_of(rows: Sequence[Row], row: Row, cores: int) -> Machine:
    """This machine's rates, of the same run, for a row's codec."""
    sized = [one for one in rows if one["case"] == "size"]
    large = [one for one in sized if one["state_nbytes"] >= LEAST_NBYTES] or sized

    def rate(name: str) -> float:
        rates = [one["state_nbytes"] / 1e9 / one[name]["median"] for one in large]
        return float(statistics.median(rates))

    (coding,) = (
        one["gb_s_core"]["median"]
        for one in rows
        if one["case"] == "profile" and one["what"] == "save" and one["codec"] == row["codec"]
    )
    return Machine(row.get("cores", cores), rate("memcpy_s"), coding, rate("write_s"))


def load_of(row: Row) -> Load:
    """What a row saved."""
    return Load(row["state_nbytes"], row["tensors"], 1 / row["written_over_state"]["median"])


def case_of(rows: Sequence[Row], row: Row, cores: int) -> tuple[Load, Machine]:
    """What a row saved and the machine's rates for it; of `auto`, as others' rows foretell it."""
    if row["codec"] != AUTO:
        return load_of(row), machine_of(rows, row, cores)
    facts = {name: row[name] for name in FACTS if name in row}
    (whole,) = (
        one
        for one in points(rows)
        if one["codec"] == "zstd" and facts == {name: one[name] for name in FACTS if name in one}
    )
    return mixed(
        load_of(whole),
        machine_of(rows, row | {"codec": "raw"}, cores),
        machine_of(rows, row, cores),
    )


def fit(rows: Sequence[Row], some: Sequence[Row], cores: int) -> Costs:
    """Costs of least relative error, none below nothing, for `some` of the rows."""
    loads = [load_of(row) for row in some]
    machines = [machine_of(rows, row, cores) for row in some]
    stalls = np.array([row["stall_s"]["median"] for row in some])
    copies = [stall(a, b, NOTHING) for a, b in zip(loads, machines, strict=True)]
    columns = np.array([[1, a.tensors, b] for a, b in zip(loads, copies, strict=True)])
    fixed, tensor, share = least(columns, stalls, stalls)
    costs = replace(NOTHING, stall_fixed_s=fixed, stall_tensor_s=tensor, copy_share=share)
    ends = np.array([row["durable_s"]["median"] for row in some])
    known = np.array([durable(a, b, costs) for a, b in zip(loads, machines, strict=True)])
    columns = np.array([[1, one.tensors, one.nbytes / CHUNK_NBYTES] for one in loads])
    fixed, tensor, chunk = least(columns, ends - known, ends)
    return replace(costs, durable_fixed_s=fixed, durable_tensor_s=tensor, durable_chunk_s=chunk)


def least(columns: Floats, left: Floats, weights: Floats) -> list[float]:
    """Coefficients, none negative, of least squares of what is left, relative to `weights`.

    Columns are few, so every choice of those that aren't zero is tried.
    """
    count = columns.shape[1]
    target = left / weights
    best, error = [0.0] * count, float(target @ target)
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            part = columns[:, chosen] / weights[:, None]
            found = np.linalg.lstsq(part, target, rcond=None)[0]
            miss = float(np.square(part @ found - target).sum())
            if (found >= 0).all() and miss < error:
                best, error = [0.0] * count, miss
                for at, value in zip(chosen, found, strict=True):
                    best[at] = float(value)
    return best


def fitted(rows: Sequence[Row], cores: int) -> dict[str, Any]:
    """The model's costs and rates, and its errors on the half that it wasn't fitted to."""
    known = points(rows)
    ways = {
        (row["case"], row["codec"])
        for row in known
        if row["case"] != "cores" and row["codec"] != AUTO
    }
    fitted_to = [
        row
        for case, codec in sorted(ways)
        for row in [one for one in known if (one["case"], one["codec"]) == (case, codec)][::2]
    ]
    rest = [row for row in known if not any(row is one for one in fitted_to)]
    costs = fit(rows, fitted_to, cores)
    checked = [_checked(rows, row, cores, costs) for row in rest]
    own = [_checked(rows, row, cores, costs) for row in fitted_to]
    rates = {codec: asdict(machine_of(rows, {"codec": codec}, cores)) for codec in CODECS}
    return {
        "costs": asdict(costs),
        "rates": {codec: one | {"pcie_gb_s": None} for codec, one in rates.items()},
        "fitted_to": own,
        "checked": checked,
        "errors": _errors(checked),
        "errors_fitted": _errors(own),
    }


def _checked(rows: Sequence[Row], row: Row, cores: int, costs: Costs) -> Row:
    load, machine = case_of(rows, row, cores)
    busy = stages(load, machine)
    said = {"stall": stall(load, machine, costs), "durable": durable(load, machine, costs)}
    facts = {name: row[name] for name in ("case", "codec", "state_nbytes", "tensors")}
    facts |= {"cores": machine.cores, "slowest": max(busy, key=lambda one: busy[one])}
    for what, seconds in said.items():
        measured = row[f"{what}_s"]["median"]
        facts |= {f"{what}_s": measured, f"{what}_model_s": seconds}
        facts[f"{what}_error"] = seconds / measured - 1
    facts["written_over_state"] = row["written_over_state"]["median"]
    facts["written_over_state_model"] = 1 / load.ratio
    return facts | {"fill_s": filling(load, machine)}


def _errors(checked: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The median and the worst relative error, of the stall and of the time to durable."""
    found = {}
    for what in ("stall", "durable"):
        sizes = [abs(row[f"{what}_error"]) for row in checked]
        found[what] = {"median": statistics.median(sizes), "worst": max(sizes)}
    return found
