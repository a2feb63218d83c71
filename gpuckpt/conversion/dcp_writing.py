"""Write a directory by torch.distributed.checkpoint itself, a tensor at a time.

torch wants a storage for each tensor, and keeps them all until it has written its
file.  So the bytes of a long tensor go to a file that is mapped, which is emptied when
the next tensor is asked for; a short one's are in memory, and are given back then.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex

from gpuckpt.conversion.placing import scratch_file
from gpuckpt.conversion.port import Source
from gpuckpt.conversion.states import filled
from gpuckpt.errors import CorruptError
from gpuckpt.names import plain_name
from gpuckpt.structure import Mark, from_json

# Longer tensors are mapped.
_LONG_NBYTES = 16 << 20


def save(folder: Path, source: Source) -> None:
    """Save what a source has into an empty folder, in this thread."""
    specs = source.outline.specs
    # On torch's device without memory: they are all that DCP plans with.
    outlines = [
        torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in specs
    ]
    positions = {id(tensor): at for at, tensor in enumerate(outlines)}
    state = filled(_plain(from_json(source.outline.structure)), outlines)
    # Nothing is copied ahead, so that each tensor is written before the next one is asked for.
    writer = FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0)
    with contextlib.closing(_Lent(source, folder)) as lent:
        _save(state, writer, _Planner(lent, positions))


def _save(state: Any, writer: FileSystemWriter, planner: _Planner) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group
            dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    except BaseException:
        if planner.failure is not None:
            raise planner.failure from None
        raise


class _Planner(DefaultSavePlanner):  # type: ignore[misc]  # torch has types if it is there
    """DCP's planner, which has each tensor's bytes read when they are to be written."""

    def __init__(self, lent: _Lent, positions: dict[int, int]) -> None:
        """`positions` are by the ids of the tensors that stand for them."""
        super().__init__()
        self._lent, self._positions = lent, positions
        self.failure: BaseException | None = None

    def lookup_object(self, index: MetadataIndex) -> Any:
        """An object of the state; of a tensor, one in host memory."""
        found = super().lookup_object(index)
        at = self._positions.get(id(found))
        if at is None:
            return found
        try:
            return self._lent.take(at)
        except BaseException as error:  # DCP makes another of it
            self.failure = error
            raise


class _Lent:
    """A source's tensors, of which one at a time takes room."""

    def __init__(self, source: Source, folder: Path) -> None:
        """Files for long ones lie beside `folder` meanwhile."""
        self._source, self._folder = source, folder
        self._held = contextlib.ExitStack()

    def take(self, at: int) -> torch.Tensor:
        """The tensor at a position; the one before has no bytes any more."""
        self.close()
        spec = self._source.outline.specs[at]
        dtype = getattr(torch, spec.dtype)
        if not spec.nbytes:
            return torch.empty(spec.shape, dtype=dtype)
        raw = self._mapped(at) if spec.nbytes > _LONG_NBYTES else self._short(at)
        return raw.view(dtype).reshape(spec.shape)

    def close(self) -> None:
        """Give back what the last one took."""
        self._held.close()

    def _short(self, at: int) -> torch.Tensor:
        spec = self._source.outline.specs[at]
        raw = torch.empty(spec.nbytes, dtype=torch.uint8)
        first = 0
        for part in self._source.read(at):  # copied: what numpy has seen can't be given back
            raw[first : first + part.nbytes] = torch.frombuffer(part, dtype=torch.uint8)
            first += part.nbytes
        if first != spec.nbytes:
            raise CorruptError(spec.label, f"{first} bytes came, {spec.nbytes} were expected")
        self._held.callback(raw.untyped_storage().resize_, 0)
        return raw

    def _mapped(self, at: int) -> torch.Tensor:
        path, file = self._held.enter_context(scratch_file(self._folder))
        for part in self._source.read(at):
            file.append([part])
        file.sync()
        with path.open("rb") as opened:
            pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        # torch still has the mapping, but nobody looks at it; its room on the disk is free.
        self._held.callback(os.truncate, path, 0)
        return torch.from_numpy(np.frombuffer(pages, np.uint8))


def _plain(tree: Any) -> Any:
    """A tree as DCP takes it apart by itself.

    Keys are text; tuples with tensors in them, which it would pickle as they
    are, are lists; and numpy's numbers, which are pickled as code, Python's.
    """
    if isinstance(tree, np.generic):
        return tree.item()
    if isinstance(tree, dict):
        return {plain_name((key,)): _plain(child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        children = [_plain(child) for child in tree]
        return tuple(children) if isinstance(tree, tuple) and not _marked(tree) else children
    return tree


def _marked(tree: Any) -> bool:
    """Whether there is a tensor in it."""
    if isinstance(tree, dict):
        return any(map(_marked, tree.values()))
    return any(map(_marked, tree)) if isinstance(tree, list | tuple) else isinstance(tree, Mark)
