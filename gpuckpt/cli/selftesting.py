"""`gpuckpt selftest`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from gpuckpt.cli.output import print_json
from gpuckpt.selftest.run import run_checks
from gpuckpt.selftest.verdicts import Verdict, recommendation
from gpuckpt.sizes import parse_nbytes

STYLES = {"ok": "green", "note": "yellow", "FAILED": "bold red"}


def selftest_directory(directory: Path, size: str, console: Console, *, as_json: bool) -> int:
    """Run every check, show verdicts as they come; 1 if one failed."""

    def tell(verdict: Verdict) -> None:
        if not as_json:
            _print(verdict, console)

    report = run_checks(directory, parse_nbytes(size), tell)
    if as_json:
        print_json(report.facts())
    else:
        console.print(recommendation(report.verdicts), markup=False, soft_wrap=True)
        if report.kept:
            console.print(f"The files are in {report.kept}", markup=False, soft_wrap=True)
    return 0 if report.fit else 1


def _print(verdict: Verdict, console: Console) -> None:
    line = Text(f"{verdict.check:<16}")
    line.append(f"{verdict.outcome:<7}", STYLES[verdict.outcome])
    line.append(verdict.found)
    if verdict.advice:
        line.append(f"; {verdict.advice}", "dim")
    console.print(line, soft_wrap=True)
