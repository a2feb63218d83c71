"""Lightning's checkpoints as gpuckpt's: what `ModelCheckpoint` and `save_checkpoint` write."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO as BaseCheckpointIO
from lightning.fabric.plugins import TorchCheckpointIO

from gpuckpt.adapters.bridge import pack, unpack
from gpuckpt.adapters.lightning.forms import lightning_forms
from gpuckpt.api import load as load_checkpoint
from gpuckpt.checkpointer import Checkpointer
from gpuckpt.commit import delete, open_step, steps
from gpuckpt.errors import CheckpointError, InvalidError
from gpuckpt.groups import Alone
from gpuckpt.layout import LOCK
from gpuckpt.manifest import Manifest
from gpuckpt.retention import Keep
from gpuckpt.stores.opening import is_url, local_path, open_store

log = logging.getLogger("gpuckpt")

Place = str | os.PathLike[str]
Where = Any  # a device, or a function or a dict that leads from one to another


class CheckpointIO(BaseCheckpointIO):
    """Writes each of Lightning's checkpoints as a root of gpuckpt's, a directory or a URL.

    `save_checkpoint` returns as soon as the state may change; the rest is done
    in the background, one save at a time: the next save, load and `teardown`
    wait for it, and raise if it failed (with `on_error="warn"`, warn).  What
    Lightning has deleted is there until the save begun before is durable.

    Nothing is pickled: what isn't a tensor, a plain value or a container of
    these is converted without loss (sets, paths, namespaces, torch's sizes,
    dtypes and devices) or refused.  Of your enums, dataclasses, named tuples
    and subclasses of dict, pass the classes as `types`.

    `options` are a `Checkpointer`'s: `codec`, `memory`, `snapshot`, `key`, …
    """

    def __init__(self, *, types: Iterable[type] = (), **options: Any) -> None:
        self._forms = lightning_forms(types)
        self._options = {"group": Alone(), **options}
        self._saving: tuple[Checkpointer, Place, int] | None = None
        self._doomed: list[Place] = []

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Place, storage_options: Any | None = None
    ) -> None:
        """Save a checkpoint in the background; on return its tensors may change.

        Raises:
            UnsupportedError: it names the path of what can't be saved; nothing was written.
            CheckpointError: the save before failed.
        """
        if storage_options is not None:
            raise InvalidError("storage_options are CheckpointIO(…)'s own options; pass them there")
        self._settle()
        state = pack(checkpoint, self._forms)
        step = int(checkpoint.get("global_step", 0))
        saver = Checkpointer(_root(path), **{**self._options, "keep": _Only(1, step=step)})
        try:
            saver.save(step, state)
        except BaseException:
            with contextlib.suppress(CheckpointError):
                saver.close()
            raise
        self._saving = saver, path, step

    def load_checkpoint(
        self,
        path: Place,
        map_location: Where = None,
        weights_only: bool | None = None,  # noqa: FBT001
    ) -> dict[str, Any]:
        """A checkpoint's dict, with tensors on the CPU or on the device `map_location`.

        A file is one that Lightning wrote itself before, and torch reads it
        (`weights_only`, unless that is False).

        Raises:
            NotFoundError: there is none.
            CorruptError: bytes aren't what was written.
        """
        self._settle()
        if not is_url(path) and Path(path).is_file():
            only = weights_only is not False
            return dict(TorchCheckpointIO().load_checkpoint(path, map_location, weights_only=only))
        step = _made_last(_root(path))
        state = load_checkpoint(_root(path), step, _device(map_location), key=self._key)
        return unpack(state, self._forms)

    def remove_checkpoint(self, path: Place) -> None:
        """Delete a checkpoint, once the save in flight is durable; at once if there is none."""
        self._doomed.append(path)
        if self._saving is None or _root(self._saving[1]) == _root(path):
            self._settle()

    def teardown(self) -> None:
        """Wait until all is durable and deleted."""
        self._settle()

    @property
    def _key(self) -> Any:
        return self._options.get("key")

    def _settle(self) -> None:
        """Wait for the save in flight; then delete what was to be deleted."""
        saving, self._saving = self._saving, None
        doomed, self._doomed = self._doomed, []
        if saving is not None:
            saver, path, step = saving
            try:
                saver.close()
                if (found := steps(open_store(_root(path)))) != [step]:
                    _forget_others(path, step, found)
            except BaseException:
                if doomed:
                    log.warning("%s stay, since a newer one failed", ", ".join(map(str, doomed)))
                raise
        for path in doomed:
            _delete(path)


def load(
    path: Place,
    *,
    types: Iterable[type] = (),
    device: str = "cpu",
    key: Any = None,
) -> dict[str, Any]:
    """The dict of a checkpoint that a `CheckpointIO` or a `Checkpoint` has saved.

    Its `state_dict` is what `LightningModule.load_state_dict` takes, its
    `hyper_parameters` what the module was made with.
    """
    state = load_checkpoint(_root(path), device=device, key=key)
    return unpack(state, lightning_forms(types))


def _root(path: Place) -> str:
    return str(path) if is_url(path) else os.fspath(Path(path))


def _device(where: Where) -> str:
    """Lightning gives a function that leaves each tensor on the CPU, where torch reads it."""
    if where is None or callable(where):
        return "cpu"
    if isinstance(where, dict):
        raise InvalidError("map_location is one device, like 'cuda:0'; a dict of them isn't taken")
    return str(where)


@dataclass(frozen=True)
class _Only(Keep):
    """Once a step is committed no other survives; until then all do."""

    step: int = 0

    def survivors(
        self, manifests: Sequence[Manifest], now: Callable[[], float] = time.time
    ) -> set[int]:
        """As `Keep`'s own."""
        del now
        found = {manifest.step for manifest in manifests}
        return {self.step} if self.step in found else found


def _made_last(root: str) -> int | None:
    """The step to load, if there are several: a crash came before those of an older run went."""
    store = open_store(root)
    found = steps(store)
    if len(found) < 2:
        return None
    return max(found, key=lambda step: open_step(store, step, parts=False).created)


def _forget_others(path: Place, step: int, found: Iterable[int]) -> None:
    """A path has one checkpoint: what was there before goes, once the new one is durable."""
    store = open_store(_root(path))
    others = [other for other in found if other != step]
    if step in found and others:
        with store.lock():
            delete(store, others)


def _delete(path: Place) -> None:
    """Make a checkpoint none, and then remove its files, and the directory."""
    root = _root(path)
    local = None if is_url(root) and not root.startswith("file:") else _local(root)
    if local is not None and local.is_symlink():
        local.unlink()
        return
    if local is not None and not local.is_dir():
        local.unlink(missing_ok=True)
        return
    store = open_store(root)
    with store.lock():
        delete(store, steps(store))
        for name in _unlocked(store.names()):
            store.remove(name)
    if local is not None:
        shutil.rmtree(local, ignore_errors=True)


def _local(root: str) -> Path:
    return local_path(root) if is_url(root) else Path(root)


def _unlocked(names: Iterable[str]) -> Iterator[str]:
    """What isn't the lock, which is held."""
    return (name for name in names if name != LOCK)
