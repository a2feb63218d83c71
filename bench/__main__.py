"""`python -m bench [--out FILE]`: run every case, print a table, write JSON.

Exits with 1 if a limit that a case states isn't kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.cases import roundtrip, stall
from bench.machine import machine

MIB = 1 << 20


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--directory", type=Path, help="a directory on the disk to measure")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        where = machine(Path(name))
        for nbytes, tensors in ((64 * MIB, 16), (512 * MIB, 100)):
            results.append(stall(Path(name) / f"stall-{nbytes}", nbytes, tensors))
            show(results[-1])
        for codec in ("auto", "raw"):
            results.append(roundtrip(Path(name), 512 * MIB, 100, codec))
            show(results[-1])
    report = {"machine": where, "results": results}
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    kept = all(row["stall_over_memcpy"]["median"] <= 1.3 for row in results if "memcpy_s" in row)
    print("every stated limit is kept" if kept else "a stated limit is NOT kept")
    return 0 if kept else 1


def show(result: dict[str, Any]) -> None:
    """One block a case: medians, with the least and the most."""
    print(f"{result['case']}: {result['state_nbytes'] / MIB:.0f} MiB, {result['tensors']} tensors")
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"  {name:24} {value['median']:.3f}  ({value['min']:.3f}..{value['max']:.3f})")
        elif isinstance(value, float):
            print(f"  {name:24} {value:.4f}")


if __name__ == "__main__":
    sys.exit(main())
