"""`torch_checkpointing`: copies by a thread into shared memory, written by a process."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from bench.peers.cache import Arrays
from bench.peers.of_torch import OfTorch


class TorchCheckpointing(OfTorch):
    """`CheckpointManager.save`, asynchronous as is its default, and `load` in place."""

    def __init__(self, arrays: Arrays, directory: Path) -> None:
        super().__init__(arrays, directory)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        # Its direct writes aren't aligned (0.1.1): ext4 and XFS refuse them, and it fails.
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        # It takes page-locked memory where there is a GPU, and keeps what it has taken.
        self._manager: Any = CheckpointManager(CheckpointManager.Config(storage_config=storage))
        self._manager.prewarm_staging({"state": self.tensors})
        self._future: Any = None

    def begin(self, step: int) -> None:
        """Let it be copied, then written."""
        self._future = self._manager.save(str(self.place(step)), {"state": self.tensors})

    def update(self) -> contextlib.AbstractContextManager[None]:
        """Wait until it has been copied."""
        guard: contextlib.AbstractContextManager[None] = self._manager.lock()
        return guard

    def finish(self) -> None:
        """Wait for the process that writes."""
        if self._future is not None:
            self._future.result()

    def restore(self, step: int) -> Arrays:
        """In place."""
        self._manager.load(str(self.place(step)), {"state": self.tensors})
        return self.arrays

    def close(self) -> None:
        """End the thread and the process."""
        self._manager.close()
