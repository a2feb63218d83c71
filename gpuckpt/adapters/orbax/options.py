"""The options of a manager: those of Orbax's that mean something here."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, Literal

from gpuckpt.errors import InvalidError

_REFUSED = {
    "step_prefix": "all steps lie in one root; leave it out",
    "step_format_fixed_length": "all steps lie in one root; leave it out",
    "step_name_format": "all steps lie in one root; leave it out",
    "todelete_subdir": "steps share files, which can't be moved; leave it out",
    "todelete_full_path": "steps share files, which can't be moved; leave it out",
    "save_decision_policy": "give save_interval_steps, save_on_steps or should_save_fn",
    "preservation_policy": "give max_to_keep, keep_period, keep_time_interval or best_fn",
    "temporary_path_class": "a step becomes visible in one rename; leave it out",
    "atomicity_options": "a step becomes visible in one rename; leave it out",
}


@dataclass
class CheckpointManagerOptions:
    """Orbax's options, under their own names; what can't be had here is refused.

    `async_options`, `enable_background_delete`, `cleanup_tmp_directories` and
    others that say how Orbax goes about its work have no effect.  Whatever is
    to be kept, the newest step always is.
    """

    save_interval_steps: int = 1
    max_to_keep: int | None = None
    keep_time_interval: timedelta | None = None
    keep_period: int | None = None
    best_fn: Callable[[Any], float] | None = None
    best_mode: Literal["max", "min"] = "max"
    keep_checkpoints_without_metrics: bool = True
    step_prefix: Any = None
    step_format_fixed_length: Any = None
    step_name_format: Any = None
    create: bool = True
    cleanup_tmp_directories: bool = False
    save_on_steps: Container[int] | None = None
    single_host_load_and_broadcast: bool = False
    todelete_subdir: Any = None
    todelete_full_path: Any = None
    enable_background_delete: bool = False
    read_only: bool = False
    enable_async_checkpointing: bool = True
    async_options: Any = None
    multiprocessing_options: Any = None
    should_save_fn: Callable[[int, int | None], bool] | None = None
    file_options: Any = None
    atomicity_options: Any = None
    save_root_metadata: bool = True
    temporary_path_class: Any = None
    save_decision_policy: Any = None
    preservation_policy: Any = None
    prevent_write_metrics: bool = False

    def __post_init__(self) -> None:
        """See that they make sense, and can be had.

        Raises:
            InvalidError: one doesn't, or can't.
        """
        for name, advice in _REFUSED.items():
            if getattr(self, name) is not None:
                raise InvalidError(f"CheckpointManagerOptions: {name} isn't supported: {advice}")
        if self.best_mode not in ("max", "min"):
            raise InvalidError(f"best_mode is 'max' or 'min', got {self.best_mode!r}")
        if self.max_to_keep is not None and self.max_to_keep < 0:
            raise InvalidError(f"max_to_keep can't be negative, got {self.max_to_keep}")
        if self.save_interval_steps < 1 and not self.read_only:
            raise InvalidError(f"save_interval_steps is 1 or more, got {self.save_interval_steps}")

    @classmethod
    def of(cls, options: Any) -> CheckpointManagerOptions:
        """These, or the same of Orbax's own.

        Raises:
            InvalidError: one can't be had here, or they are no options.
        """
        if options is None or isinstance(options, cls):
            return options or cls()
        if not hasattr(options, "save_interval_steps"):
            kind = type(options).__name__
            raise InvalidError(f"options are CheckpointManagerOptions, got a {kind}")
        given = {one.name: getattr(options, one.name) for one in fields(cls) if _has(options, one)}
        return cls(**given)

    def is_due(self, step: int, latest: int | None) -> bool:
        """Whether a step is to be saved; as Orbax's default policy says."""
        if self.should_save_fn is not None:
            return bool(self.should_save_fn(step, latest))
        if latest is None or step % self.save_interval_steps == 0:
            return True
        return self.save_on_steps is not None and step in self.save_on_steps


def _has(options: Any, field: Any) -> bool:
    return hasattr(options, field.name)
