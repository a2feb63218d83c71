"""Saves and restores as shares of what disk and cores need at least, in the same run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.timing import Spread

Row = dict[str, Any]


def beside_limits(rows: Sequence[Row], cores: int) -> Iterator[Row]:
    """For each size and codec of `copy`: time over that of the slower of disk and cores.

    The disk's is of the bytes on it, at the rate of a plain write or cold read
    in the same round; the cores' of the state's bytes at a core's measured rate.
    """
    coding = {
        (row["what"], row["codec"]): row["gb_s_core"]["median"]
        for row in rows
        if row["case"] == "profile"
    }
    for row in rows:
        if row["case"] != "size" or row["mode"] != "copy":
            continue
        share, gigabytes = row["written_over_state"]["median"], row["state_nbytes"] / 1e9
        found: Row = {"state_nbytes": row["state_nbytes"], "codec": row["codec"]}
        for what, name, beside in (
            ("save", "durable", "write"),
            ("restore", "restore_cold", "read_cold"),
        ):
            cpu = gigabytes / cores / coding[what, row["codec"]]
            disk = share * row[f"{beside}_s"]["median"]
            paired = row["durable_over_write" if what == "save" else "restore_cold_over_read"]
            by_disk = {one: value / share for one, value in paired.items()}
            by_cpu = {one: value / cpu for one, value in row[f"{name}_s"].items()}
            found[f"{name}_limit"] = "disk" if disk >= cpu else "cores"
            found[f"{name}_over_limit"] = by_disk if disk >= cpu else by_cpu
        found["warm_share_of_memcpy"] = _inverse(row["restore_warm_over_memcpy"])
        found["cold_share_of_limit"] = _inverse(found["restore_cold_over_limit"])
        yield found


def _inverse(spread: Spread) -> Spread:
    return {"min": 1 / spread["max"], "median": 1 / spread["median"], "max": 1 / spread["min"]}
