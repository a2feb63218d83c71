"""Orbax, and TensorStore used directly."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.cache import Arrays
from bench.peers.peer import Peer


class Orbax(Peer):
    """`StandardCheckpointer`, which saves in the background; immutable `jax.Array`s."""

    adopts = True

    def __init__(self, arrays: Arrays, directory: Path) -> None:
        super().__init__(arrays, directory)
        import jax
        import orbax.checkpoint

        logging.getLogger("absl").setLevel(logging.ERROR)
        jax.config.update("jax_enable_x64", True)  # else int64 isn't kept
        self._jax = jax
        self._library = orbax.checkpoint
        self._checkpointer = orbax.checkpoint.StandardCheckpointer()
        self._state: dict[str, Any] = {}
        self.changed()

    def changed(self) -> None:
        """Make the arrays that a step of JAX would have made."""
        for name, array in self.arrays.items():
            self._state[name] = self._jax.numpy.array(array, copy=True)

    def begin(self, step: int) -> None:
        """Hand over references."""
        self._checkpointer.save(self.place(step).absolute(), self._state)

    def finish(self) -> None:
        """Wait for the commit."""
        self._checkpointer.wait_until_finished()

    def restore(self, step: int) -> Arrays:
        """Into new arrays."""
        like = {
            name: self._jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=one.sharding)
            for name, one in self._state.items()
        }
        restored = self._checkpointer.restore(self.place(step).absolute(), like)
        return {name: np.asarray(restored[name]) for name in self.arrays}

    def close(self) -> None:
        """End its threads."""
        self._checkpointer.close()


class Tensorstore(Peer):
    """Zarr 3 arrays in one OCDBT database a step, written asynchronously, not compressed."""

    def __init__(self, arrays: Arrays, directory: Path) -> None:
        super().__init__(arrays, directory)
        import tensorstore

        self._library = tensorstore
        self._transaction: Any = None
        self._context = self._new_context()

    def begin(self, step: int) -> None:
        """Start every write, and wait until all have taken their copy."""
        library = self._library
        self._transaction = library.Transaction()
        opened = [
            library.open(
                self._spec(step, name),
                create=True,
                context=self._context,
                dtype=library.dtype(array.dtype.name),
                shape=array.shape,
                chunk_layout=library.ChunkLayout(chunk_shape=array.shape),
                transaction=self._transaction,
            )
            for name, array in self.arrays.items()
        ]
        arrays = self.arrays.values()
        writes = [one.result().write(a) for one, a in zip(opened, arrays, strict=True)]
        for write in writes:
            write.copy.result()

    def finish(self) -> None:
        """Wait for the commit."""
        self._transaction.commit_async().result()

    def restore(self, step: int) -> Arrays:
        """Into new arrays."""
        context = self._new_context()
        specs = [self._spec(step, name) for name in self.arrays]
        opened = [self._library.open(spec, context=context) for spec in specs]
        reads = [one.result().read() for one in opened]
        return {name: read.result() for name, read in zip(self.arrays, reads, strict=True)}

    def _new_context(self) -> Any:
        """One for all arrays: with one each, OCDBT commits them one by one."""
        return self._library.Context({"cache_pool": {"total_bytes_limit": 100_000_000}})

    def _spec(self, step: int, name: str) -> dict[str, Any]:
        base = f"file://{self.place(step).absolute()}/"
        return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
