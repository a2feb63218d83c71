"""Write a tree by Orbax itself, a part of an array at a time in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import orbax.checkpoint as ocp
import tensorstore

from gpuckpt.boxes import Box
from gpuckpt.conversion.orbax import is_kept
from gpuckpt.conversion.orbax_chunks import SLAB_NBYTES
from gpuckpt.conversion.port import Source
from gpuckpt.conversion.pouring import Stream
from gpuckpt.conversion.slabs import slabs
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import CheckpointError, StorageError
from gpuckpt.names import plain_name
from gpuckpt.structure import Mark, from_json

_NOTHING = object()


@dataclass(frozen=True, slots=True)
class _Leaf:
    """What stands for an array in the tree that Orbax is given."""

    position: int


def save(folder: Path, source: Source) -> None:
    """Save what a source has in the place of an empty folder.

    Raises:
        StorageError: Orbax couldn't.
    """
    tree = _kept(from_json(source.outline.structure))
    leaves, scalars = _Leaves(source), ocp.type_handlers.ScalarHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        (int, scalars),
        (float, scalars),
        (str, ocp.type_handlers.StringHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # there are none; Orbax warns without it
        (_Leaf, leaves),
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ocp.Checkpointer(handler).save(folder, tree, force=True)
    except Exception as error:
        if leaves.failure is not None:
            raise leaves.failure from None
        raise StorageError(
            f"Orbax couldn't write {folder} ({type(error).__name__}: {str(error)[:400]})"
        ) from error


class _Leaves(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]  # Orbax has types if it's there
    """Orbax's handler of arrays, which reads those of a source while it writes them."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self.failure: CheckpointError | None = None

    async def serialize(
        self, values: Sequence[_Leaf], infos: Sequence[Any], args: Any = None
    ) -> Sequence[Any]:
        """Write every array to its end; nothing is left for a thread to do later."""
        del args
        for leaf, info in zip(values, infos, strict=True):
            if hasattr(info, "await_path_creation"):  # since Orbax makes folders beside the loop
                await info.await_path_creation()
            store = self._create(leaf.position, info)
            for box, part in self._boxes(leaf.position):
                store[box.slices].write(part).result()
        return []

    def _create(self, position: int, info: Any) -> Any:
        """A new array of TensorStore's where Orbax wants it, its chunks as long as what is read."""
        spec = self._source.outline.specs[position]
        dtype = to_numpy(spec.dtype)
        wanted = ocp.type_handlers.get_json_tspec_write(
            info,
            use_ocdbt=info.is_ocdbt_checkpoint,
            global_shape=spec.shape,
            local_shape=spec.shape,
            dtype=dtype,
            process_index=0,
        )
        first = next(slabs(spec.shape, dtype.itemsize, SLAB_NBYTES))
        wanted["metadata"]["chunks"] = list(first.shape)
        return tensorstore.open(wanted, create=True, open=True, context=info.ts_context).result()

    def _boxes(self, position: int) -> Iterator[tuple[Box, npt.NDArray[Any]]]:
        """An array box by box; each is valid until the next one."""
        spec = self._source.outline.specs[position]
        dtype = to_numpy(spec.dtype)
        room = np.empty(min(spec.nbytes, max(SLAB_NBYTES, dtype.itemsize)), np.uint8)
        try:
            stream = Stream(self._source, position)
            for box in slabs(spec.shape, dtype.itemsize, SLAB_NBYTES):
                raw = room[: box.count * dtype.itemsize]
                stream.fill(raw)
                yield box, raw.view(dtype).reshape(box.shape)
            stream.end()
        except CheckpointError as error:  # Orbax makes another of it
            self.failure = error
            raise


def _kept(tree: Any) -> Any:
    """A tree as Orbax takes it: without values that it doesn't, with keys of text."""
    if isinstance(tree, Mark):
        return _Leaf(tree.tensor)
    if isinstance(tree, dict):
        rows = {plain_name((key,)): _kept(child) for key, child in tree.items()}
        return {key: child for key, child in rows.items() if child is not _NOTHING}
    if isinstance(tree, list | tuple):
        children = [_kept(child) for child in tree]
        return [None if child is _NOTHING else child for child in children] or type(tree)()
    if isinstance(tree, np.generic) or not is_kept(tree):
        return _NOTHING
    return tree
