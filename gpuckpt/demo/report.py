"""What the demonstration found, as facts and as tables."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from gpuckpt.demo.child import Event, Record

ENDS = 10  # steps whose mean loss stands for the beginning and for the end

NAMED = 5  # differences that the last line names


@dataclass(frozen=True, slots=True)
class Report:
    """The records of the four processes, and the final digests of the three trainings."""

    plain: Record
    saving: Record
    crashed: Record
    resumed: Record
    digests: list[dict[str, str]]

    @property
    def differences(self) -> list[str]:
        """The tensors, generators and values that are not the same after all the trainings."""
        names = sorted({name for digests in self.digests for name in digests})
        return [name for name in names if len({d.get(name) for d in self.digests}) > 1]

    @property
    def losses_equal(self) -> bool:
        """Whether every step of the killed run had the very loss of the run without checkpoints."""
        losses = self.plain.losses()
        again = [*self.crashed.losses().items(), *self.resumed.losses().items()]
        return all(losses[step] == loss for step, loss in again)

    @property
    def resumed_from(self) -> int:
        """The step that the killed run came back with."""
        return int(self.resumed.one("begin")["step"])

    @property
    def newest(self) -> int:
        """The newest step that was committed when the process was killed."""
        assert self.crashed.killed is not None
        return self.crashed.killed.newest

    @property
    def equal(self) -> bool:
        """Whether the killed run went on from the right step and ended in the same bits."""
        went_on = 0 < self.resumed_from == self.newest
        return went_on and self.losses_equal and not self.differences

    def facts(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        assert self.crashed.killed is not None
        begin = self.plain.one("begin")
        first, last = losses(self.plain)
        return {
            "equal": self.equal,
            "compared": len(self.digests[0]),
            "differences": self.differences,
            "losses_equal": self.losses_equal,
            "killed_step": self.crashed.killed.step,
            "killed_nbytes": self.crashed.killed.nbytes,
            "resumed_from": self.resumed_from,
            "resume_seconds": self.resumed.one("begin")["resume_seconds"],
            "arrays": begin["arrays"],
            "parameters": begin["parameters"],
            "loss_first": first,
            "loss_last": last,
            "saves": self.saving.of("saved"),
            "without": times(self.plain),
            "with": times(self.saving),
        }


def losses(record: Record) -> tuple[float, float]:
    """Return the mean loss of the first steps and of the last."""
    values = list(record.losses().values())
    return mean(values[:ENDS]), mean(values[-ENDS:])


def times(record: Record) -> dict[str, float]:
    """Return the seconds of a whole run."""
    end = record.one("end")
    steps = [event["seconds"] for event in record.of("step")]
    return {
        "loop_seconds": end["loop_seconds"],
        "drain_seconds": end["drain_seconds"],
        "median_step_seconds": median(steps),
        "median_step_beside_save_seconds": median(steps_beside_saves(record) or steps),
        "longest_step_seconds": max(steps),
    }


def steps_beside_saves(record: Record) -> list[float]:
    """Return the seconds of the steps that began no save and ran while one was in flight."""
    seconds, in_flight, due = [], 0, {event["step"] for event in record.of("saving")}
    for event in record.events:
        in_flight += {"saving": 1, "saved": -1}.get(event["event"], 0)
        if event["event"] == "step" and in_flight and event["step"] not in due:
            seconds.append(event["seconds"])
    return seconds


def show(report: Report, console: Console) -> None:
    """Print the saves, the times and the verdict."""
    facts = report.facts()
    console.print(saves_table(facts["saves"]))
    console.print(times_table(facts["without"], facts["with"]))
    console.print(
        f"{facts['parameters']:,} parameters on {facts['arrays']}; the loss fell from "
        f"{facts['loss_first']:.2f} to {facts['loss_last']:.2f} nats a character."
    )
    console.print(
        f"Killed with SIGKILL in the save of step {facts['killed_step']}, whose files held "
        f"{megabytes(facts['killed_nbytes'])} MB; resumed from step "
        f"{facts['resumed_from']} in {facts['resume_seconds'] * 1e3:.0f} ms."
    )
    console.print(verdict(report))


def verdict(report: Report) -> str:
    """Return the last line."""
    if report.equal:
        count = len(report.digests[0])
        return f"[green]equal[/] bit for bit: {count} tensors and generators' values, every loss"
    if report.resumed_from != report.newest:
        return f"[red]resumed from {report.resumed_from}, but {report.newest} was committed"
    if not report.differences:
        return "[red]different[/]: the losses of some steps"
    names = ", ".join(report.differences[:NAMED])
    return f"[red]different[/]: {len(report.differences)} values, such as {names}"


def saves_table(saves: list[Event]) -> Table:
    """Return a row for each save of the run that was never interrupted."""
    table = Table(title="saves of the run that was never interrupted")
    for name in ("step", "stall ms", "background ms", "MB raw", "MB on disk", "ratio"):
        table.add_column(name, justify="right")
    for save in saves:
        table.add_row(
            str(save["step"]),
            milliseconds(save["stall_seconds"]),
            milliseconds(save["background_seconds"]),
            megabytes(save["raw_nbytes"]),
            megabytes(save["encoded_nbytes"]),
            f"{save['ratio']:.3f}",
        )
    return table


def times_table(without: dict[str, float], with_saves: dict[str, float]) -> Table:
    """Return the times with and without checkpoints, side by side."""
    table = Table(title="training time")
    for name in ("", "without", "with", "more"):
        table.add_column(name, justify="right")
    for key, title, unit in (
        ("loop_seconds", "all steps, s", 1.0),
        ("median_step_seconds", "median step, ms", 1e-3),
        ("median_step_beside_save_seconds", "median step beside a save, ms", 1e-3),
        ("longest_step_seconds", "longest step, ms", 1e-3),
        ("drain_seconds", "last saves' end, s", 1.0),
    ):
        a, b = without[key], with_saves[key]
        more = f"{(b / a - 1) * 100:+.1f} %" if key != "drain_seconds" else ""
        table.add_row(title, f"{a / unit:.2f}", f"{b / unit:.2f}", more)
    return table


def milliseconds(seconds: float) -> str:
    """Return `seconds` in ms, to the tenth."""
    return f"{seconds * 1e3:.1f}"


def megabytes(nbytes: int) -> str:
    """Return `nbytes` in MB, to the tenth."""
    return f"{nbytes / 1e6:.1f}"
