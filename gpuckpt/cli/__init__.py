"""The command line.

Exit codes: 0 all is well; 1 damage was found, something is lost, a self-test failed, or the
demo's runs differ; 2 the command could not be carried out, and a line on stderr says why.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gpuckpt.cli.listing import list_steps, printable, show_step
from gpuckpt.cli.merging import merge_roots
from gpuckpt.cli.repairing import repair_step
from gpuckpt.cli.reporting import write_report
from gpuckpt.cli.selftesting import selftest_directory
from gpuckpt.cli.tracing import write_trace
from gpuckpt.cli.verifying import verify_root
from gpuckpt.cli.why import why_slow as tell_why_slow
from gpuckpt.errors import CheckpointError

app = typer.Typer(
    name="gpuckpt",
    help="Checkpoints of GPU training state: look at them, check them, see them work.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

RootArgument = Annotated[
    str, typer.Argument(help="The directory of one run's checkpoints, or their URL.")
]
LogArgument = Annotated[Path, typer.Argument(help="A root with a log of its saves, or a log.")]
StepOption = Annotated[int | None, typer.Option(help="A committed step [default: the newest].")]
KeyOption = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        envvar="GPUCKPT_KEY_FILE",
        help="Take nothing that isn't sealed with the key in this file.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print facts as JSON, for scripts.")]


@app.command()
def ls(
    root: RootArgument,
    key_file: KeyOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """List a root's committed steps: age, size, ratio, epoch, metrics."""
    raise typer.Exit(list_steps(root, Console(), as_json=as_json, key=key_file))


@app.command()
def show(
    root: RootArgument,
    step: StepOption = None,
    names: Annotated[
        list[str] | None, typer.Option(help="Only these names or globs; may be repeated.")
    ] = None,
    key_file: KeyOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Show what is in a checkpoint: names, dtypes, shapes, sizes, versions, plain values."""
    raise typer.Exit(show_step(root, step, names, Console(), as_json=as_json, key=key_file))


@app.command()
def verify(
    root: RootArgument,
    step: Annotated[int | None, typer.Option(help="Only this step [default: all].")] = None,
    key_file: KeyOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Read and check every byte; exit with 1 on damage, naming tensor, file and offset."""
    raise typer.Exit(verify_root(root, step, Console(), as_json=as_json, key=key_file))


@app.command()
def repair(  # noqa: PLR0917 (its options)
    root: RootArgument,
    to: Annotated[str, typer.Option(help="A directory, or a URL, for what is intact.")],
    step: StepOption = None,
    key_file: KeyOption = None,
    fill: Annotated[  # noqa: FBT002
        bool, typer.Option("--fill", help="Take older values of what is lost, where there are any.")
    ] = False,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Salvage what is intact of a damaged checkpoint; exit with 1 if anything is lost.

    ROOT isn't changed: what is intact becomes a checkpoint of another directory.
    """
    done = repair_step(root, step, to, Console(), fill=fill, as_json=as_json, key=key_file)
    raise typer.Exit(done)


@app.command()
def merge(
    roots: Annotated[list[str], typer.Argument(help="Directories of ranks that share none.")],
    to: Annotated[str, typer.Option(help="A directory, or a URL, for the whole checkpoint.")],
    step: Annotated[
        int | None, typer.Option(help="A step [default: the newest that is whole].")
    ] = None,
    key_file: KeyOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Put ranks' own directories together into one checkpoint, checked; they aren't changed."""
    done = merge_roots(roots, to, step, Console(), as_json=as_json, key=key_file)
    raise typer.Exit(done)


@app.command()
def trace(
    log: LogArgument,
    out: Annotated[Path, typer.Option(help="The file to write.")],
    step: Annotated[int | None, typer.Option(help="Only this step's saves.")] = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Write when each stage of the saves ran, as a trace for Perfetto or Chrome."""
    raise typer.Exit(write_trace(log, step, out, Console(), as_json=as_json))


@app.command()
def report(  # noqa: PLR0917 (its options)
    root: RootArgument,
    out: Annotated[
        Path | None, typer.Option(help="The file to write [default: report.html].")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="The log of saves [default: the one in ROOT].")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Say what Keep would keep: last=3,every=1000,best=loss:min:2."),
    ] = None,
    tier: Annotated[
        list[str] | None, typer.Option(help="A further root of the run; may be repeated.")
    ] = None,
    key_file: KeyOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Write one HTML page about a run's saves: times, bytes, norms, what is kept and why.

    With --json its data are printed, and the page is written only with --out.
    """
    roots = tuple(tier or ())
    done = write_report(
        *(root, out, Console()), as_json=as_json, log=log, keep=keep, tiers=roots, key=key_file
    )
    raise typer.Exit(done)


@app.command()
def why_slow(
    log: LogArgument,
    last: Annotated[int, typer.Option(help="So many of the last saves.")] = 10,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Name the bottleneck of the last save in a sentence, and show the last ones' figures."""
    raise typer.Exit(tell_why_slow(log, last, Console(), as_json=as_json))


@app.command()
def selftest(
    directory: Annotated[Path, typer.Argument(help="A directory on the file system to test.")],
    size: Annotated[str, typer.Option(help="Of the state whose speed is measured.")] = "256 MiB",
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """See whether a file system keeps what checkpoints rely on; exit with 1 if it doesn't."""
    raise typer.Exit(selftest_directory(directory, size, Console(), as_json=as_json))


@app.command()
def demo(
    directory: Annotated[
        Path | None, typer.Argument(help="Keep the checkpoints here [default: a temporary one].")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    every: Annotated[int | None, typer.Option(help="Steps between saves.")] = None,
    arrays: Annotated[str, typer.Option(help="numpy, cupy, or auto: cupy if a GPU is there.")] = (
        "auto"
    ),
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """Train a small language model, kill it in mid-save, resume, and compare bit for bit."""
    from gpuckpt.demo.drive import run_demo
    from gpuckpt.demo.settings import Settings

    chosen = {"steps": steps, "every": every}
    try:
        settings = Settings(**{name: value for name, value in chosen.items() if value is not None})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console = Console()
    code = run_demo(directory, console, as_json=as_json, settings=settings, arrays=arrays)
    raise typer.Exit(code)


def main() -> None:
    """Run the command line; errors that gpuckpt raises on purpose are one line each."""
    try:
        app()
    except CheckpointError as error:
        print(f"gpuckpt: {printable(str(error))}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, and wants no more
        sys.exit(0)
