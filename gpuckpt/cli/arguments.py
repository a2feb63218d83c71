"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
KeepOption = Annotated[
    str | None,
    typer.Option(help="Say which steps this would keep: last=2,every=1000,best=loss:min:3, …"),
]
