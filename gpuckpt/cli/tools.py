"""The commands `diff`, `prune`, `watch` and `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gpuckpt.cli import pages
from gpuckpt.cli.arguments import JsonOption, KeyOption, RootArgument
from gpuckpt.cli.benching import bench_directory
from gpuckpt.cli.differing import Wanted, diff_steps
from gpuckpt.cli.output import make_console
from gpuckpt.cli.pruning import prune_steps
from gpuckpt.cli.watching import Watched, watch_root


def add_tools(app: typer.Typer) -> None:
    """Add them to the command line."""
    app.command("diff", help=pages.DIFF)(_diff)
    app.command("prune", help=pages.PRUNE)(_prune)
    app.command("watch", help=pages.WATCH)(_watch)
    app.command("bench", help=pages.BENCH)(_bench)


def _diff(  # noqa: PLR0917 (its options)
    a: Annotated[str, typer.Argument(metavar="A", help="A root, or ROOT@STEP.")],
    b: Annotated[
        str | None, typer.Argument(metavar="B", help="Another [default: the step before A's].")
    ] = None,
    steps: Annotated[
        tuple[int, int] | None, typer.Option(metavar="X Y", help="Two steps of A.")
    ] = None,
    names: Annotated[
        list[str] | None, typer.Option(help="Only these names or globs; may be repeated.")
    ] = None,
    every: Annotated[  # noqa: FBT002
        bool, typer.Option("--all", help="Every tensor that moved, not only the first 40.")
    ] = False,
    equal: Annotated[  # noqa: FBT002
        bool, typer.Option("--equal", help="Those that are equal, too.")
    ] = False,
    exit_code: Annotated[  # noqa: FBT002
        bool, typer.Option("--exit-code", help="Exit with 1 if they differ, as git diff does.")
    ] = False,
    key_file: KeyOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    wanted = Wanted(names or (), steps, every, equal, exit_code)
    raise typer.Exit(diff_steps(a, b, wanted, make_console(), as_json=as_json, key=key_file))


def _prune(
    root: RootArgument,
    keep: Annotated[
        str, typer.Option(help="What stays: last=2,every=1000,best=loss:min:3,newer_than=2h.")
    ],
    dry_run: Annotated[  # noqa: FBT002
        bool, typer.Option("--dry-run", help="Only say what would be deleted.")
    ] = False,
    key_file: KeyOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    done = prune_steps(root, keep, make_console(), dry_run=dry_run, as_json=as_json, key=key_file)
    raise typer.Exit(done)


def _watch(  # noqa: PLR0917 (its options)
    root: RootArgument,
    log: Annotated[
        Path | None, typer.Option(help="The log of its saves [default: those in the root].")
    ] = None,
    last: Annotated[int, typer.Option(help="So many of the last saves.")] = 15,
    every: Annotated[str, typer.Option(help="How often to look.")] = "2 s",
    once: Annotated[  # noqa: FBT002
        bool, typer.Option("--once", help="One look; so it is where no terminal watches.")
    ] = False,
    key_file: KeyOption = None,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    watched = Watched(log, last, every, once)
    raise typer.Exit(watch_root(root, watched, make_console(), as_json=as_json, key=key_file))


def _bench(
    directory: Annotated[Path, typer.Argument(help="A directory on the disk to measure.")],
    size: Annotated[str, typer.Option(help="Of the state that is saved.")] = "256 MiB",
    overhead: Annotated[
        float, typer.Option(help="The share of the time that saves may cost.")
    ] = 0.01,
    as_json: JsonOption = False,  # noqa: FBT002
) -> None:
    done = bench_directory(directory, size, overhead, make_console(), as_json=as_json)
    raise typer.Exit(done)
