"""Write a directory by torch.distributed.checkpoint itself, a tensor at a time in memory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex

from gpuckpt.conversion.port import Source, read_whole
from gpuckpt.conversion.states import filled
from gpuckpt.names import plain_name
from gpuckpt.structure import Mark, from_json


def save(folder: Path, source: Source) -> None:
    """Save what a source has into an empty folder, in this thread."""
    specs = source.outline.specs
    # On torch's device without memory: they are all that DCP plans with.
    outlines = [
        torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in specs
    ]
    positions = {id(tensor): at for at, tensor in enumerate(outlines)}
    state = filled(_plain(from_json(source.outline.structure)), outlines)
    planner = _Planner(source, positions)
    writer = FileSystemWriter(folder, thread_count=1)
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

    def __init__(self, source: Source, positions: dict[int, int]) -> None:
        """`positions` are by the ids of the tensors that stand for them."""
        super().__init__()
        self._source, self._positions = source, positions
        self.failure: BaseException | None = None

    def lookup_object(self, index: MetadataIndex) -> Any:
        """An object of the state; of a tensor, one in host memory."""
        found = super().lookup_object(index)
        at = self._positions.get(id(found))
        if at is None:
            return found
        try:
            return _read(self._source, at)
        except BaseException as error:  # DCP makes another of it
            self.failure = error
            raise


def _read(source: Source, at: int) -> torch.Tensor:
    spec = source.outline.specs[at]
    dtype = getattr(torch, spec.dtype)
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=dtype)
    raw = read_whole(source, at).reshape(-1).view(np.uint8)
    return torch.from_numpy(raw).view(dtype).reshape(spec.shape)


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
