"""Run torch's own tests of distributed checkpoints twice: with its file storage, and with gpuckpt.

    python -m tests.dcp.run_torch_tests FOLDER [--fork] [--cpu] [--only NAME …] [--out TABLE.json]

FOLDER is test/distributed/checkpoint of torch's sources, which aren't part of
its wheels and not of this project.  What is printed is docs/DCP.md's table: per
file, how many tests pass with each storage, and which pass with torch's alone.
In both runs, with --fork, ranks are forked from the process of the tests and
not spawned; with --cpu, tests run that would skip for lack of GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree as ET

REPOSITORY = Path(__file__).parents[2]
STARTUP = Path(__file__).parent / "startup"

Outcomes = dict[str, str]


def run(file: Path, asked: str, seconds: float) -> Outcomes:
    """How each test of a file ends: "passed", "skipped: why" or "failed: why"."""
    path = os.pathsep.join([str(STARTUP), str(REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": path, "GPUCKPT_TORCH_TESTS": asked}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider"]
        command += [f"--rootdir={file.parent}", f"--junitxml={report}", str(file)]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment | {"TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return {"(the file)": f"failed: no end within {seconds:g} s"}
        if not report.exists():
            return {"(the file)": f"failed: {said.decode(errors='replace')[-300:]}"}
        return outcomes(report)


def outcomes(report: Path) -> Outcomes:
    """What a report of JUnit's kind says."""
    found = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
        found[name] = "passed"
        for kind, word in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
            if (said := case.find(kind)) is not None:
                found[name] = f"{word}: {reason(said)}"
    return found


def reason(said: ET.Element) -> str:
    """The last line that says why, short."""
    lines = [one for one in (said.get("message") or said.text or "").splitlines() if one.strip()]
    errors = [one for one in lines if "Error" in one or "xception" in one]
    return (errors or lines or ["?"])[-1].strip()[:300]


def count(found: Outcomes, word: str) -> int:
    """How many tests ended that way."""
    return sum(one.startswith(word) for one in found.values())


def main() -> None:
    """Run the files of a folder, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fork", action="append_const", dest="how", const="fork")
    parser.add_argument("--cpu", action="append_const", dest="how", const="cpu")
    parser.add_argument("--seconds", type=float, default=300)
    given = parser.parse_args()
    table = {}
    print("| file | tests | pass with torch's | pass with gpuckpt | skip | only with torch's |")
    print("|---|---|---|---|---|---|", flush=True)
    for file in sorted(given.folder.rglob("test_*.py")):
        if not any(one in file.name for one in given.only):
            continue
        how = " ".join(given.how or [])
        before = run(file, how, given.seconds)
        after = run(file, f"{how} substitute", given.seconds)
        lost = [n for n, how in before.items() if how == "passed" and after.get(n) != "passed"]
        name = str(file.relative_to(given.folder))
        table[name] = {"torch": before, "gpuckpt": after}
        counts = [len(before), count(before, "passed"), count(after, "passed")]
        cells = [name, *counts, count(before, "skipped"), ", ".join(lost) or "none"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        if given.out:
            given.out.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
