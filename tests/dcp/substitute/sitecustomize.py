"""In every process that has this folder on its path, torch's file storage is gpuckpt.

Python imports a module of this name when it starts, and so do the processes
that torch's tests spawn.
"""

from __future__ import annotations

from typing import Any


def substitute() -> None:
    """Put gpuckpt's reader and writer where torch's own are looked up."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import _storage_utils, filesystem, format_utils
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    from gpuckpt.adapters.dcp import StorageReader, StorageWriter

    class FileSystemWriter(StorageWriter, BlockingAsyncStager):
        """gpuckpt's, with the arguments of torch's; those that only its files know mean nothing."""

        def __init__(self, path: Any, *_: Any, overwrite: bool = True, **named: Any) -> None:
            StorageWriter.__init__(self, path, overwrite=overwrite)
            cached = named.get("cache_staged_state_dict", False)
            BlockingAsyncStager.__init__(self, cache_staged_state_dict=cached)

        def __getstate__(self) -> dict[str, Any]:
            return super().__getstate__() | {"state_dict_cache": None}

    class FileSystemReader(StorageReader):
        """gpuckpt's; objects are unpickled, as torch does."""

        def __init__(self, path: Any, *_: Any) -> None:
            super().__init__(path, unpickle=True)

    for module in (checkpoint, filesystem, _storage_utils, format_utils):
        module.FileSystemWriter = FileSystemWriter
        module.FileSystemReader = FileSystemReader


substitute()
