"""A bar on a terminal while bytes are read; nothing in a pipe."""

from __future__ import annotations

import types
from typing import Self

from rich import progress
from rich.console import Console


class Progress:
    """A bar of so many bytes on standard error, if that is a terminal and nobody wants quiet."""

    def __init__(self, what: str, nbytes: int | None, *, quiet: bool) -> None:
        errors = Console(stderr=True)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.DownloadColumn(binary_units=True),
            progress.TransferSpeedColumn(),
            console=errors,
            transient=True,
            disable=quiet or not errors.is_terminal,
        )
        self._task = self._bar.add_task(what, total=nbytes)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, nbytes: int) -> None:
        """So many more are done."""
        self._bar.advance(self._task, nbytes)
