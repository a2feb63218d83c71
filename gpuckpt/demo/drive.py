"""`gpuckpt demo`: three trainings, one of them killed and resumed, must end in the same bits."""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gpuckpt.demo.child import Event, Job, Listener, TrainingError, train
from gpuckpt.demo.report import Report, show
from gpuckpt.demo.settings import Settings

EQUAL, DIFFERENT, FAILED = 0, 1, 2  # exit codes


def run_demo(
    directory: Path | None,
    console: Console,
    *,
    as_json: bool = False,
    settings: Settings | None = None,
    arrays: str = "auto",
) -> int:
    """Train, kill in mid-save, resume, compare bit for bit, and show the facts on `console`.

    The checkpoints stay in `directory`, which must be new or empty; without
    one they go to a temporary directory and away.  Returns an exit code: 0 if
    the run that was killed ended in the same bits as those that were not, 1 if
    it didn't, 2 if there is nothing to compare.
    """
    if directory is not None and directory.exists() and any(directory.iterdir()):
        return fail(console, f"{directory} isn't empty; the demonstration needs a new directory")
    kept = nullcontext(str(directory)) if directory else tempfile.TemporaryDirectory()
    with kept as name:
        Path(name).mkdir(parents=True, exist_ok=True)
        job = Job("plain", Path(name), settings or Settings(), saves=False, arrays=arrays)
        try:
            report = trainings(job, console, as_json=as_json)
        except TrainingError as error:
            return fail(console, str(error))
    if as_json:
        console.print_json(json.dumps(report.facts()))
    else:
        show(report, console)
    return EQUAL if report.equal else DIFFERENT


def fail(console: Console, message: str) -> int:
    """Say why there is nothing to compare."""
    console.print(message, style="red", markup=False, highlight=False)
    return FAILED


def trainings(plain: Job, console: Console, *, as_json: bool) -> Report:
    """Run the training without checkpoints, with them, and with a crash and a resume."""
    saving = replace(plain, name="saving", saves=True)
    crashing = replace(plain, name="crashing", saves=True)
    steps, every = plain.settings.steps, plain.settings.every
    late = max(steps // 2, 2 * every)  # some save is committed by then
    with progress(console, disable=as_json) as bars:
        without = train(plain, follow(bars, "without checkpoints", steps))
        saved = train(saving, follow(bars, "with checkpoints", steps))
        crashed = train(crashing, follow(bars, "to be killed", steps), kill_from=late)
        if crashed.killed is None:
            raise TrainingError("every save was committed before it could be cut off")
        resumed = train(crashing, follow(bars, "resumed", steps))
    return Report(
        plain=without,
        saving=saved,
        crashed=crashed,
        resumed=resumed,
        digests=[json.loads(job.digests.read_text()) for job in (plain, saving, crashing)],
    )


def progress(console: Console, *, disable: bool) -> Progress:
    """Return the bars, one for each process."""
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn())
    loss = TextColumn("loss {task.fields[loss]:.2f}")
    return Progress(*columns, loss, TimeElapsedColumn(), console=console, disable=disable)


def follow(bars: Progress, title: str, steps: int) -> Listener:
    """Return a listener that moves a new bar."""
    task = bars.add_task(title, total=steps, loss=float("nan"))

    def listen(event: Event) -> None:
        if event["event"] in {"begin", "step"}:
            fields = {"loss": event["loss"]} if "loss" in event else {}
            bars.update(task, completed=event["step"], **fields)
        elif event["event"] == "end":
            bars.stop_task(task)
        elif event["event"] == "killed":
            bars.update(task, description=f"killed in save {event['step']}")
            bars.stop_task(task)

    return listen
