"""`save` and `load`: near drop-ins for `torch.save` and `torch.load` of state dicts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from gpuckpt.api import load as load_checkpoint
from gpuckpt.api import save as save_checkpoint
from gpuckpt.commit import steps
from gpuckpt.errors import InvalidError
from gpuckpt.pending import Checkpoint
from gpuckpt.seal import Key
from gpuckpt.stores.opening import is_local, is_url, local_path, open_store

MapLocation: TypeAlias = str | torch.device | Mapping[str, str] | None
_ZIP = b"PK\x03\x04"


def save(
    obj: Any,
    f: str | os.PathLike[str],
    *,
    codec: str = "auto",
    memory: int | str = "256 MiB",
    key: Key | None = None,
) -> Checkpoint:
    """Save `obj`, as `torch.save(obj, f)` does, into the directory or URL `f`; durable on return.

    `obj` is a state dict or any nesting of dicts, lists and tuples with
    tensors, plain values (`int`, `float`, `str`, `bytes`, `bool`, `None`, …)
    and objects that have a `state_dict`, in whose place it is saved.  A
    checkpoint that is there is replaced in one instant.  Nothing is pickled.

    Raises:
        InvalidError: `f` is an open file, a file, or the root of a training run.
        UnsupportedError: a leaf can't be saved; it is named, and nothing was written.
        StorageError: the storage refused; what was there is as it was.
    """
    place = _place(f)
    if (path := _local(place)) is not None and path.is_file():
        raise InvalidError(f"{place} is a file; a checkpoint is a directory: choose another path")
    if any(steps(open_store(place))):
        raise InvalidError(
            f"{place} has the checkpoints of a training run; choose a directory of its own"
        )
    return save_checkpoint(place, obj, codec=codec, memory=memory, key=key)


def load(
    f: str | os.PathLike[str],
    map_location: MapLocation = None,
    *,
    weights_only: bool = True,  # noqa: ARG001 - as torch.load has them
    mmap: bool | None = None,  # noqa: ARG001
    memory: int | str = "256 MiB",
    key: Key | None = None,
) -> Any:
    """Load what `save` saved into `f`: new torch tensors in new dicts, lists and tuples.

    Tensors go where they were saved from, or where `map_location` says: a
    device, or a dict of devices by devices.  One tensor under two names comes
    back as one; other views of one storage each have memory of their own.
    Parameters come back as tensors without gradient.  `weights_only` and
    `mmap` are taken for the sake of programs that pass them: no code is ever
    loaded, and files aren't mapped.

    `f` may also be the root of a training run: then its newest step.

    Raises:
        InvalidError: `map_location` is a function, or `f` isn't a directory.
        NotFoundError: there is no checkpoint, or no such device here.
        CorruptError: bytes aren't what was saved.
    """
    place = _place(f)
    if (path := _local(place)) is not None and path.is_file():
        with path.open("rb") as file:
            pickled = file.read(4) == _ZIP
        told = "torch.save wrote it: read it by torch.load" if pickled else "give the directory"
        raise InvalidError(f"{place} is a file, and a checkpoint is a directory; {told}")
    device, moved = _where(map_location)
    state = load_checkpoint(place, device=device, like="torch", memory=memory, key=key)
    return _moved(state, moved, {}) if moved else state


def _place(f: object) -> str | Path:
    """A path, or a URL as it is: `Path` would take one of its slashes."""
    if not isinstance(f, str | os.PathLike):
        raise InvalidError(
            f"a checkpoint is a directory, and a {type(f).__qualname__} isn't the path of one"
        )
    text = os.fsdecode(f)
    return text if is_url(text) else Path(text)


def _local(place: str | Path) -> Path | None:
    """The path of a place on this machine; None of another one."""
    if isinstance(place, Path):
        return place
    return local_path(place) if is_local(place) else None


def _where(map_location: MapLocation) -> tuple[str | None, dict[str, str]]:
    """The device for all tensors, or where those of each device go."""
    if map_location is None or isinstance(map_location, Mapping):
        return None, dict(map_location or {})
    if callable(map_location):
        raise InvalidError("map_location can't be a function; give a device, or a dict of devices")
    return str(torch.device(map_location)), {}


def _moved(node: Any, moved: Mapping[str, str], seen: dict[int, torch.Tensor]) -> Any:
    """A state with its tensors on other devices; what was one tensor is one still."""
    if isinstance(node, torch.Tensor):
        if id(node) not in seen:
            seen[id(node)] = node.to(moved.get(str(node.device), node.device))
        return seen[id(node)]
    if isinstance(node, dict):
        return {key: _moved(child, moved, seen) for key, child in node.items()}
    if isinstance(node, list | tuple):
        return type(node)([_moved(child, moved, seen) for child in node])
    return node
