"""The options of a save, checked before anything begins."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from gpuckpt import layout
from gpuckpt._version import __version__
from gpuckpt.errors import InvalidError
from gpuckpt.save import Header, choice
from gpuckpt.snapshot import MODES

FULL_EVERY = 8


@dataclass(frozen=True, slots=True)
class Options:
    """Those options of a checkpointer that are one word of a few, or one number."""

    codec: str
    snapshot: str
    when_busy: str
    on_error: str
    full_every: int
    trace: bool = False

    def __post_init__(self) -> None:
        choice(self.codec)
        allowed = {"snapshot": MODES, "when_busy": ("wait", "skip"), "on_error": ("raise", "warn")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise InvalidError(
                    f"{name} is one of {', '.join(values)}; got {getattr(self, name)!r}"
                )
        if type(self.full_every) is not int or self.full_every < 1:
            raise InvalidError(f"full_every is a positive integer, got {self.full_every!r}")


def make_header(step: int, epoch: int | None, metrics: dict[str, float] | None) -> Header:
    """What a manifest says beside the tensors, checked.

    Raises:
        InvalidError: `step` can't be one, or a metric isn't a number.
    """
    step = layout.check_step(step)
    if epoch is not None:
        epoch = layout.check_count(epoch, "an epoch")
    if not isinstance(metrics, Mapping | None):
        raise InvalidError(f"metrics are numbers by name, got {metrics!r}")
    try:
        numbers = {str(name): float(value) for name, value in (metrics or {}).items()}
    except (TypeError, ValueError) as error:
        raise InvalidError(f"metrics are numbers by name: {error}") from error
    return Header(step, epoch, numbers, time.time(), f"gpuckpt {__version__}")
