"""The command line.

Exit codes: 0 all is well; 1 damage was found, something is lost, a self-test failed, or the
demo's runs differ; 2 the command could not be carried out, and a line on stderr says why.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gpuckpt.cli import pages
from gpuckpt.cli.arguments import (
    JsonOption,
    KeepOption,
    KeyOption,
    LogArgument,
    RootArgument,
    StepOption,
)
from gpuckpt.cli.converting import convert_checkpoint, parse_axes
from gpuckpt.cli.listing import list_steps
from gpuckpt.cli.merging import merge_roots
from gpuckpt.cli.output import leave, make_console, printable
from gpuckpt.cli.repairing import repair_step
from gpuckpt.cli.reporting import write_report
from gpuckpt.cli.selftesting import selftest_directory
from gpuckpt.cli.showing import View, show_step
from gpuckpt.cli.tools import add_tools
from gpuckpt.cli.tracing import write_trace
from gpuckpt.cli.verifying import verify_root
from gpuckpt.cli.why import why_slow as tell_why_slow
from gpuckpt.errors import CheckpointError

app = typer.Typer(
    name="gpuckpt",
    help="Checkpoints of GPU training state: look at them, check them, see them work.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command(help=pages.LS)
def ls(
    root: RootArgument,
    keep: KeepOption = None,
    key_file: KeyOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """See `listing`."""
    raise typer.Exit(list_steps(root, make_console(), as_json=as_json, key=key_file, keep=keep))


@app.command(help=pages.SHOW)
def show(  # noqa: PLR0917 (its options)
    root: RootArgument,
    step: StepOption = None,
    names: Annotated[
        list[str] | None, typer.Option(help="Only these names or globs; may be repeated.")
    ] = None,
    tree: Annotated[  # noqa: FBT002
        bool, typer.Option("--tree", help="Sum up what is below each name.")
    ] = False,
    depth: Annotated[
        int | None, typer.Option(min=1, help="Of the tree, only so many levels.")
    ] = None,
    compute: Annotated[  # noqa: FBT002
        bool, typer.Option("--compute", help="Read the tensors, and count what their numbers are.")
    ] = False,
    key_file: KeyOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """See `showing`."""
    view = View(tree or depth is not None, depth, compute)
    done = show_step(root, step, names, make_console(), as_json=as_json, key=key_file, view=view)
    raise typer.Exit(done)


@app.command(help=pages.VERIFY)
def verify(
    root: RootArgument,
    step: Annotated[int | None, typer.Option(help="Only this step [default: all].")] = None,
    key_file: KeyOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """See `verifying`."""
    raise typer.Exit(verify_root(root, step, make_console(), as_json=as_json, key=key_file))


@app.command(help=pages.REPAIR)
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
    """See `repairing`."""
    done = repair_step(root, step, to, make_console(), fill=fill, as_json=as_json, key=key_file)
    raise typer.Exit(done)


@app.command(help=pages.MERGE)
def merge(
    roots: Annotated[list[str], typer.Argument(help="Directories of ranks that share none.")],
    to: Annotated[str, typer.Option(help="A directory, or a URL, for the whole checkpoint.")],
    step: Annotated[
        int | None, typer.Option(help="A step [default: the newest that is whole].")
    ] = None,
    key_file: KeyOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """See `merging`."""
    done = merge_roots(roots, to, step, make_console(), as_json=as_json, key=key_file)
    raise typer.Exit(done)


@app.command(help=pages.CONVERT)
def convert(  # noqa: PLR0917 (its options)
    source: Annotated[str, typer.Argument(help="A root, or a file or directory of any format.")],
    target: Annotated[str, typer.Argument(help="A new file, directory or root, or its URL.")],
    to: Annotated[
        str | None, typer.Option(help="The target's format, unless its name tells it.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="The step of a root to read (else the newest), or to write.")
    ] = None,
    names: Annotated[
        list[str] | None, typer.Option(help="Only these names or globs; may be repeated.")
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="Of a directory of safetensors: at most so much in a file.")
    ] = None,
    codec: Annotated[str, typer.Option(help="Of a root: auto, zstd or raw.")] = "auto",
    memory: Annotated[str, typer.Option(help="Host memory for tensors' bytes.")] = "128 MiB",
    strict: Annotated[bool, typer.Option("--strict", help="Lose nothing; rather fail.")] = False,  # noqa: FBT002
    verify: Annotated[  # noqa: FBT002
        bool, typer.Option("--verify", help="Read the target back, and compare.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a target that is there.")] = False,  # noqa: FBT002
    ignore_checksums: Annotated[  # noqa: FBT002
        bool,
        typer.Option("--ignore-checksums", help="The source was changed on purpose."),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Of a directory for SINGA: into so many files.")
    ] = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(
            help="Of SINGA's: NAME=1, a parameter that is cut along that axis, not along 0; may "
            "be repeated."
        ),
    ] = None,
    key_file: KeyOption = None,
    target_key_file: Annotated[
        Path | None, typer.Option(help="Seal the root that is written with the key in this file.")
    ] = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """See `converting`."""
    code = convert_checkpoint(
        *(source, target, make_console()),
        as_json=as_json,
        to=to,
        step=step,
        names=names,
        shard_size=shard_size,
        codec=codec,
        memory=memory,
        strict=strict,
        verify=verify,
        force=force,
        ignore_checksums=ignore_checksums,
        workers=workers,
        axes=parse_axes(axis or ()),
        key=key_file,
        target_key=target_key_file,
    )
    raise typer.Exit(code)


@app.command(help=pages.TRACE)
def trace(
    log: LogArgument,
    out: Annotated[Path, typer.Option(help="The file to write.")],
    step: Annotated[int | None, typer.Option(help="Only this step's saves.")] = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """See `tracing`."""
    raise typer.Exit(write_trace(log, step, out, make_console(), as_json=as_json))


@app.command(help=pages.REPORT)
def report(  # noqa: PLR0917 (its options)
    root: RootArgument,
    out: Annotated[
        Path | None, typer.Option(help="The file to write [default: report.html].")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="The log of saves [default: the one in ROOT].")
    ] = None,
    keep: KeepOption = None,
    tier: Annotated[
        list[str] | None, typer.Option(help="A further root of the run; may be repeated.")
    ] = None,
    key_file: KeyOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """See `reporting`."""
    roots = tuple(tier or ())
    done = write_report(
        *(root, out, make_console()), as_json=as_json, log=log, keep=keep, tiers=roots, key=key_file
    )
    raise typer.Exit(done)


@app.command(help=pages.WHY_SLOW)
def why_slow(
    log: LogArgument,
    last: Annotated[int, typer.Option(help="So many of the last saves.")] = 10,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """See `why`."""
    raise typer.Exit(tell_why_slow(log, last, make_console(), as_json=as_json))


@app.command(help=pages.SELFTEST)
def selftest(
    directory: Annotated[Path, typer.Argument(help="A directory on the file system to test.")],
    size: Annotated[str, typer.Option(help="Of the state whose speed is measured.")] = "256 MiB",
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    """See `selftesting`."""
    raise typer.Exit(selftest_directory(directory, size, make_console(), as_json=as_json))


@app.command(help=pages.DEMO)
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
    """See `demo.drive`."""
    from gpuckpt.demo.drive import run_demo
    from gpuckpt.demo.settings import Settings

    chosen = {"steps": steps, "every": every}
    try:
        settings = Settings(**{name: value for name, value in chosen.items() if value is not None})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console = make_console()
    code = run_demo(directory, console, as_json=as_json, settings=settings, arrays=arrays)
    raise typer.Exit(code)


add_tools(app)


def main() -> None:
    """Run the command line; errors that gpuckpt raises on purpose are one line each."""
    try:
        app()
    except CheckpointError as error:
        told = " ".join(printable(str(error)).splitlines())
        print(f"gpuckpt: {told}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except BrokenPipeError:
        leave()
