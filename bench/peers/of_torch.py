"""PyTorch's own: `torch.save` and `torch.distributed.checkpoint`; and torchsnapshot."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.cache import Array, Arrays
from bench.peers.peer import Peer


def tensor_of(array: Array) -> Any:
    """A tensor that shares an array's memory."""
    import torch

    if array.dtype.kind == "V":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_of(tensor: Any, dtype: np.dtype[Any]) -> Array:
    """An array that shares a tensor's memory."""
    import torch

    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.uint16).numpy()
        return bits.view(dtype)
    array: Array = tensor.numpy()
    return array


class OfTorch(Peer):
    """A peer whose state is tensors that share the arrays' memory."""

    def __init__(self, arrays: Arrays, directory: Path) -> None:
        super().__init__(arrays, directory)
        self.tensors = {name: tensor_of(array) for name, array in arrays.items()}

    def arrays_of(self, tensors: dict[str, Any]) -> Arrays:
        """The arrays that share the memory of `tensors`."""
        return {name: array_of(tensors[name], self.arrays[name].dtype) for name in self.arrays}


class TorchSave(OfTorch):
    """`torch.save`, `torch.load(weights_only=True)`."""

    def begin(self, step: int) -> None:
        """Write all of it."""
        import torch

        torch.save(self.tensors, self.place(step))

    def restore(self, step: int) -> Arrays:
        """Into new tensors."""
        import torch

        return self.arrays_of(torch.load(self.place(step), weights_only=True))


class Distributed(OfTorch):
    """`torch.distributed.checkpoint`: `sync`, or asynchronous by a `thread` or a `process`."""

    def __init__(self, arrays: Arrays, directory: Path, *, how: str) -> None:
        super().__init__(arrays, directory)
        from torch import distributed
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint import staging, state_dict_saver

        warnings.simplefilter("ignore")
        self._library = checkpoint
        self._options: dict[str, Any] = {}
        self._future: Any = None
        if how == "sync":
            return
        rendezvous = directory.parent / "rendezvous"
        store = distributed.FileStore(str(rendezvous), 1)
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        self._options = {
            "async_checkpointer_type": state_dict_saver.AsyncCheckpointerType[how.upper()],
            # Memory for the copies is taken at the first save and kept, as by the others.
            "async_stager": staging.DefaultStager(
                staging.StagingOptions(
                    use_pinned_memory=False,
                    use_shared_memory=how == "process",
                    use_async_staging=False,
                    use_non_blocking_copy=False,
                )
            ),
        }

    def begin(self, step: int) -> None:
        """Write, or copy and let it be written."""
        writer = self._library.FileSystemWriter(self.place(step))
        if self._options:
            options = self._options
            self._future = self._library.async_save(self.tensors, storage_writer=writer, **options)
        else:
            self._library.save(self.tensors, storage_writer=writer)

    def finish(self) -> None:
        """Wait for the upload."""
        if self._future is not None:
            self._future.result()

    def restore(self, step: int) -> Arrays:
        """In place."""
        reader = self._library.FileSystemReader(self.place(step))
        self._library.load(self.tensors, storage_reader=reader)
        return self.arrays

    def close(self) -> None:
        """End the background process and the group."""
        from torch import distributed

        if self._options:
            self._options["async_stager"].close()
            distributed.destroy_process_group()


class Torchsnapshot(OfTorch):
    """`Snapshot.async_take`."""

    def __init__(self, arrays: Arrays, directory: Path) -> None:
        super().__init__(arrays, directory)
        import torchsnapshot

        warnings.simplefilter("ignore")
        self._library = torchsnapshot
        self._pending: Any = None

    def begin(self, step: int) -> None:
        """Copy, and let it be written."""
        app_state = {"state": self._library.StateDict(**self.tensors)}
        self._pending = self._library.Snapshot.async_take(str(self.place(step)), app_state)

    def finish(self) -> None:
        """Wait for the writer."""
        self._pending.wait()

    def restore(self, step: int) -> Arrays:
        """In place."""
        state = self._library.StateDict(**self.tensors)
        self._library.Snapshot(str(self.place(step))).restore({"state": state})
        return self.arrays_of(state)
