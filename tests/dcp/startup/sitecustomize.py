"""Makes gpuckpt torch's file storage in every process that has this folder on its path.

Python imports a module of this name when it starts, and so do processes that
torch's tests spawn.  What is asked for is in the environment: see
`tests.dcp.run_torch_tests`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def substitute() -> None:
    """Put gpuckpt's reader and writer where torch's own are looked up."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import _storage_utils, filesystem, format_utils
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    from gpuckpt.adapters.dcp import StorageReader, StorageWriter

    class FileSystemWriter(StorageWriter, BlockingAsyncStager):  # type: ignore[misc]
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


def fork() -> None:
    """Have ranks forked that torch's tests would spawn, which takes many times as long."""
    from torch import multiprocessing
    from torch.testing._internal.common_distributed import MultiProcessTestCase

    def _forked(self: Any) -> None:
        self._start_processes(multiprocessing.get_context("fork").Process)

    MultiProcessTestCase._spawn_processes = _forked


def on_cpus() -> None:
    """Have tests run that would skip for lack of GPUs; some of them do without."""
    from torch.testing._internal import common_distributed

    def _needs(_: int, **__: Any) -> Callable[[Any], Any]:
        return lambda test: test

    common_distributed.skip_if_lt_x_gpu = _needs


ASKED = os.environ.get("GPUCKPT_TORCH_TESTS", "").split()
if "substitute" in ASKED:
    substitute()
if "fork" in ASKED:
    fork()
if "cpu" in ASKED:
    on_cpus()
