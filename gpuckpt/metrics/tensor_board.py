"""Scalars for TensorBoard."""

from __future__ import annotations

import os
from typing import Any, Protocol

from gpuckpt.errors import InvalidError
from gpuckpt.journal import Record
from gpuckpt.metrics.figures import PREFIX, Before, figures


class Writer(Protocol):
    """What PyTorch's and tensorboardX's `SummaryWriter` have in common."""

    def add_scalar(self, tag: str, value: float, step: int, when: float, /) -> Any:
        """Add a point; `when` is in seconds since 1970."""
        ...

    def flush(self) -> Any:
        """See that it is in the file."""
        ...


class TensorBoard:
    """Writes each save's figures as scalars `gpuckpt/…` at its step, and flushes them."""

    def __init__(self, writer: Writer | str | os.PathLike[str]) -> None:
        """`writer` is a `SummaryWriter`, which stays its owner's to close, or a directory.

        For a directory the package tensorboard is used, or else tensorboardX.

        Raises:
            InvalidError: it is neither, or neither package is installed.
        """
        if isinstance(writer, str | os.PathLike):
            writer = _writer_in(os.fspath(writer))
        elif not callable(getattr(writer, "add_scalar", None)):
            raise InvalidError(f"TensorBoard takes a SummaryWriter or a directory, got {writer!r}")
        self._writer, self._before = writer, Before()

    def saved(self, record: Record) -> None:
        """Write the figures of a save, and the slow-down of the one before."""
        step, when = record.stats.step, record.ended
        for name, value in figures(record).items():
            self._writer.add_scalar(PREFIX + name, value, step, when)
        if (found := self._before.slowdown(record)) is not None:
            before, seconds = found
            name = f"{PREFIX}slowdown_seconds"
            self._writer.add_scalar(name, seconds, before.stats.step, before.ended)
        self._writer.flush()


def _writer_in(directory: str) -> Writer:
    try:
        return _EventFile(directory)
    except ImportError:
        pass
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InvalidError(
            "TensorBoard(directory) needs a package that writes its files: "
            "pip install tensorboard (or tensorboardX), or give a SummaryWriter"
        ) from error
    writer: Writer = SummaryWriter(directory)
    return writer


class _EventFile:
    """TensorBoard's own writer of event files, without PyTorch."""

    def __init__(self, directory: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._file = EventFileWriter(directory)

    def add_scalar(self, tag: str, value: float, step: int, when: float, /) -> None:
        one = self._summary.Value(tag=tag, simple_value=value)
        self._file.add_event(
            self._event(wall_time=when, step=step, summary=self._summary(value=[one]))
        )

    def flush(self) -> None:
        self._file.flush()
