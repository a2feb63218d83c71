"""A manager of a run's steps, with the methods of Orbax's."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import jax

import gpuckpt.checkpointer as engine
from gpuckpt.adapters.orbax.args import Composite
from gpuckpt.adapters.orbax.items import DEFAULT, as_json, is_composite, state_of
from gpuckpt.adapters.orbax.keeping import BEST, by_quality, keep_of, numbers_of
from gpuckpt.adapters.orbax.options import CheckpointManagerOptions
from gpuckpt.adapters.orbax.reading import StepItems
from gpuckpt.commit import delete, open_step, steps
from gpuckpt.errors import CheckpointError, InvalidError, NotFoundError, UnsupportedError
from gpuckpt.manifest import Manifest
from gpuckpt.notice import Notice, Preempt
from gpuckpt.pending import Pending
from gpuckpt.resources import Resources
from gpuckpt.seal import make_seal
from gpuckpt.stores.opening import is_local, is_url, local_path, open_store

log = logging.getLogger("gpuckpt")

_CUSTOM = "__custom_metadata__"
_READING_MEMORY = "256 MiB"


@dataclass(frozen=True)
class StepMetadata:
    """What is known of a step beside its values."""

    item_metadata: Any
    metrics: dict[str, float] | None
    custom_metadata: dict[str, Any] = field(default_factory=dict)


class CheckpointManager:
    """Orbax's `CheckpointManager`, with gpuckpt's files and guarantees.

    `save` returns once the tree may be changed or donated; the rest goes on in
    the background.  `engine` are options of `gpuckpt.Checkpointer` (`codec`,
    `memory`, `key`, …), and `preempt` is how this process is told to end, as
    there: then `reached_preemption` says so, and `should_save` that it is due.

    Not for use by several threads at once.
    """

    def __init__(  # noqa: PLR0917 (Orbax fixes their places)
        self,
        directory: str | Path,
        checkpointers: None = None,
        options: Any = None,
        metadata: None = None,
        item_names: Any = None,
        item_handlers: Any = None,
        logger: None = None,
        handler_registry: None = None,
        *,
        preempt: Preempt = None,
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        """Take a directory for writing, or, `read_only`, for reading.

        Raises:
            LockedError: another writer has it.
            InvalidError: an option makes no sense, or can't be had here.
        """
        _refuse(checkpointers=checkpointers, handler_registry=handler_registry)
        _refuse(item_handlers=item_handlers, logger=logger, metadata=metadata)
        del item_names  # what is saved says it
        self._options = CheckpointManagerOptions.of(options)
        text = os.fspath(directory)
        self.directory: Path | str = text if is_url(text) else Path(text)  # a Path spoils a URL
        self._engine_options = dict(engine or {})
        self._seal, self._store = make_seal(self._engine_options.get("key")), open_store(text)
        if not (self._options.create or self._options.read_only or self._is_there()):
            raise NotFoundError(f"{directory} isn't there, and create=False")
        self._resources = Resources(self._engine_options.get("memory", _READING_MEMORY))
        self._pending: Pending | None = None
        self._latest: int | None = None
        self._ends = contextlib.ExitStack()
        self._notice = Notice(preempt, "30 s")
        self._ends.enter_context(self._notice.watched())
        self._engine = None if self._options.read_only else self._opened()
        self.reload()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Close; a failed save doesn't hide the error that ends the block."""
        try:
            self.close()
        except CheckpointError:
            if error is None:
                raise
            log.exception("a save failed while the block was failing")

    def save(  # noqa: PLR0917 (Orbax fixes their places)
        self,
        step: int,
        items: None = None,
        save_kwargs: None = None,
        metrics: Any = None,
        force: bool = False,  # noqa: FBT001, FBT002 (Orbax fixes its place)
        args: Any = None,
        custom_metadata: dict[str, Any] | None = None,
    ) -> bool:
        """Save a step if that is due, or `force`; whether it was.

        Returns once `args` may be changed or donated: with `args` of JAX's
        arrays on the host, at once.

        Raises:
            InvalidError: `force`, and the step is there already; no `args`, or
                `metrics` that aren't numbers by name.
            UnsupportedError: something can't be saved; nothing has been written.
            CheckpointError: the save before failed.
        """
        _refuse(items=items, save_kwargs=save_kwargs)
        state = state_of(args)
        if self._engine is None or not (force or self.should_save(step)):
            return False
        if force and step in self.all_steps():
            raise InvalidError(f"step {step} is there already; delete it first")
        numbers = numbers_of(metrics, self._options)
        if custom_metadata is not None:
            state[_CUSTOM] = as_json(custom_metadata, "custom_metadata")
        self._pending = self._engine.save(step, state, numbers)
        self._latest = max(step, -1 if self._latest is None else self._latest)
        if not self._options.enable_async_checkpointing:
            self.wait_until_finished()
        return True

    def should_save(self, step: int) -> bool:
        """Whether `step` is due: never one at or below the latest."""
        if self._options.read_only or (self._latest is not None and step <= self._latest):
            return False
        return self.reached_preemption(step) or self._options.is_due(step, self._latest)

    def restore(
        self,
        step: int | None,
        items: None = None,
        restore_kwargs: None = None,
        directory: str | Path | None = None,
        args: Any = None,
    ) -> Any:
        """A step's tree, or a `Composite` of its items; the latest if `step` is None.

        Trees are new, with the sharding of the arrays, or of the
        `jax.ShapeDtypeStruct`s, that `StandardRestore` is given.  Without
        `args` all items come back as nested dicts and lists.

        Raises:
            NotFoundError: no such step, or item.
            MismatchError: a tree doesn't fit.
            CorruptError: bytes aren't what was written.
        """
        _refuse(items=items, restore_kwargs=restore_kwargs)
        self.wait_until_finished()
        store = self._store if directory is None else open_store(directory)
        if step is None:
            step = max(steps(store), default=None)
        if step is None:
            raise NotFoundError(f"{store.root}: there are no steps")
        found = StepItems.of(store, step, self._seal)
        names = [name for name in found.nodes if name != _CUSTOM]
        if is_composite(args) or (args is None and DEFAULT not in names):
            given = dict(args.items()) if args is not None else dict.fromkeys(names)
            pairs = given.items()
            return Composite(
                **{name: found.restored(name, one, self._resources) for name, one in pairs}
            )
        return found.restored(DEFAULT, args, self._resources)

    def latest_step(self) -> int | None:
        """The newest step, which may still be on its way; None if there is none."""
        return self._latest

    def all_steps(self, read: bool = False) -> list[int]:  # noqa: FBT001, FBT002, ARG002
        """All steps, ascending; also the one that is on its way."""
        found = set(steps(self._store))
        if self._pending is not None and self._pending.failure is None:
            found |= {self._pending.step} if not self._pending.committed.is_set() else set()
        return sorted(found)

    def best_step(self) -> int | None:
        """The best step that is durable, by `best_fn`; without one, the latest."""
        if self._options.best_fn is None:
            return self.latest_step()
        manifests = [self._manifest(step) for step in steps(self._store)]
        return next(reversed(by_quality(manifests, self._options)), None)

    def metrics(self, step: int) -> dict[str, float] | None:
        """What a step was saved with; None if that was nothing."""
        self._settle(step)
        found = {
            name: value for name, value in self._manifest(step).metrics.items() if name != BEST
        }
        return found or None

    def item_metadata(self, step: int) -> Any:
        """`jax.ShapeDtypeStruct`s in the places of a step's arrays."""
        self._settle(step)
        found = StepItems.of(self._store, step, self._seal)
        shapes = {name: found.shapes(name) for name in found.nodes if name != _CUSTOM}
        return shapes[DEFAULT] if DEFAULT in shapes else Composite(**shapes)

    def metadata(self, step: int) -> StepMetadata:
        """What is known of a step beside its values."""
        self._settle(step)
        found = StepItems.of(self._store, step, self._seal)
        custom = found.shapes(_CUSTOM) if _CUSTOM in found.nodes else {}
        return StepMetadata(self.item_metadata(step), self.metrics(step), custom)

    def delete(self, step: int) -> None:
        """Delete a step, once no save is in flight; what others need of its files stays.

        Raises:
            NotFoundError: it isn't there.
            UnsupportedError: there are several processes.
        """
        if self._engine is None:
            return
        if jax.process_count() > 1:
            raise UnsupportedError("delete", "of several processes; give options max_to_keep")
        self.wait_until_finished()
        if step not in steps(self._store):
            raise NotFoundError(f"{self._store.root}: step {step} isn't there")
        self._engine.close()  # the next save is to refer to nothing of that step
        try:
            with self._store.lock():
                delete(self._store, [step])
        finally:
            self._engine = self._opened()
            self.reload()

    def reload(self) -> None:
        """Look again which steps are there."""
        self._latest = max(self.all_steps(), default=None)

    def reached_preemption(self, step: int) -> bool:
        """Whether this process, or any, was told to end; of several, call it at the same steps."""
        if self._notice.expected:
            self._notice.ask()
            return self._notice.announced
        if jax.process_count() == 1:
            return False
        from jax.experimental import multihost_utils

        try:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        except RuntimeError:
            return False  # JAX's service for that is off

    def wait_until_finished(self) -> None:
        """Wait until nothing is on its way.

        Raises:
            CheckpointError: the last save failed; its step isn't there.
        """
        try:
            if self._engine is not None:
                self._engine.wait()
        except CheckpointError:
            self._pending = None
            self.reload()
            raise
        self._pending = None

    def is_saving_in_progress(self) -> bool:
        """Whether a save isn't durable yet."""
        return self._pending is not None and not self._pending.committed.is_set()

    def check_for_errors(self) -> None:
        """Raise what a save that has ended failed with."""
        if self._pending is not None and self._pending.committed.is_set():
            self.wait_until_finished()

    def close(self) -> None:
        """Wait for a save in flight, then give the directory back; safe to call twice."""
        with self._ends:
            if self._engine is not None:
                self._engine.close()

    def _opened(self) -> engine.Checkpointer:
        return engine.Checkpointer(
            self.directory, keep=keep_of(self._options), **self._engine_options
        )

    def _is_there(self) -> bool:
        if isinstance(self.directory, Path):
            return self.directory.is_dir()
        if is_local(self.directory):
            return local_path(self.directory).is_dir()
        return bool(self._store.names())  # an object store has no empty directories

    def _settle(self, step: int) -> None:
        """Wait for a step that is on its way."""
        if self._pending is not None and self._pending.step == step:
            self._pending.result()

    def _manifest(self, step: int) -> Manifest:
        return open_step(self._store, step, self._seal, parts=False)


def _refuse(**given: Any) -> None:
    """See that nothing of Orbax's older interface is given."""
    for name, value in given.items():
        if value is not None:
            raise InvalidError(f"{name} isn't supported: {_INSTEAD[name]}")


_INSTEAD = {
    "checkpointers": "give save and restore their args, as StandardSave(tree)",
    "handler_registry": "give save and restore their args, as StandardSave(tree)",
    "item_handlers": "give save and restore their args, as StandardSave(tree)",
    "items": "give args=StandardSave(tree)",
    "save_kwargs": "give args=StandardSave(tree)",
    "restore_kwargs": "give args=StandardRestore(tree)",
    "logger": "gpuckpt logs to the logger 'gpuckpt', and each save with engine={'log': True}",
    "metadata": "save it as an item, by JsonSave, or with a step as custom_metadata",
}
