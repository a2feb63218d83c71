"""StorageReader: a checkpoint of gpuckpt's, for DCP to load."""

from __future__ import annotations

import secrets
from typing import Any

from torch import distributed
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from gpuckpt.adapters.dcp.contents import Contents
from gpuckpt.adapters.dcp.filling import fill
from gpuckpt.adapters.dcp.places import CheckpointId, check_goes, store_of
from gpuckpt.adapters.dcp.world import save_id_of
from gpuckpt.commit import open_step, steps
from gpuckpt.errors import NotFoundError
from gpuckpt.resources import Resources
from gpuckpt.seal import Key, make_seal
from gpuckpt.stores import Store


class StorageReader(storage.StorageReader):
    """Reads for `dcp.load`, on any number of ranks, what `StorageWriter` or gpuckpt itself saved.

    `path` (or `checkpoint_id`) is that of a checkpoint of DCP's, or the root of
    a run, of which the newest step is read unless a `step` is named.  `memory`
    bounds the host memory that is taken beside the state, and with a `key`
    nothing is read that isn't sealed with it.

    Objects that are neither tensors nor plain values are stored as `torch.save`
    writes them.  Only those are loaded that torch reads without running code
    (`weights_only`), unless `unpickle` says that the checkpoint is trusted.
    """

    def __init__(
        self,
        path: CheckpointId | None = None,
        *,
        step: int | None = None,
        memory: int | str = "256 MiB",
        key: Key | None = None,
        unpickle: bool = False,
    ) -> None:
        """Read nothing yet."""
        super().__init__()
        make_seal(key)
        self.path, self._step, self._memory, self._key = path, step, memory, key
        self._unpickle = unpickle
        self.load_id = secrets.token_hex(16)
        self._rank: int | None = None
        self._contents: Contents | None = None
        self._resources: Resources | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What another process that loads needs: the options.

        Raises:
            InvalidError: the key would go with it.
        """
        check_goes(self._key)
        return self.__dict__ | {"_resources": None, "_contents": None}

    @property
    def checkpoint_id(self) -> CheckpointId | None:
        """The path."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        """Whether a checkpoint is there."""
        try:
            return bool(steps(store_of(checkpoint_id)))
        except Exception:
            return False

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        """Begin to read another checkpoint, at another path if one is given."""
        if checkpoint_id:
            self.path = checkpoint_id
        self.load_id = secrets.token_hex(16)
        self._contents = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002 - DCP's
        """What the checkpoint has.  With a `rank`, the one that this rank saved alone.

        Raises:
            NotFoundError: there is none.
            CorruptError: its manifest isn't what was written.
        """
        self._rank = kwargs.get("rank")
        store = self._store()
        manifest = open_step(store, self._step, make_seal(self._key))
        where = f"{store.root}, step {manifest.step}"
        whose = distributed.get_rank() if distributed.is_initialized() else 0
        self._contents = Contents(manifest, where, whose)
        metadata = self._contents.metadata()
        metadata.storage_meta = StorageMeta(
            checkpoint_id=self.path, save_id=save_id_of(manifest.writer), load_id=self.load_id
        )
        return metadata

    def set_up_storage_reader(
        self,
        metadata: Metadata,  # noqa: ARG002
        is_coordinator: bool,  # noqa: ARG002, FBT001
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002 - DCP's
    ) -> None:
        """See that the metadata has been read.

        Raises:
            NotFoundError: it hasn't.
        """
        if self._contents is None:
            raise NotFoundError("read_metadata of this reader comes first")

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the planner wants filled; each byte is checked on its way.

        Raises:
            CorruptError: bytes aren't what was written; it names tensor, file and offset.
            InvalidError: an object can only be unpickled.
        """
        if self._contents is None:
            raise NotFoundError("read_metadata of this reader comes first")
        resources = self._resources = self._resources or Resources(self._memory)
        place = self._contents, self._store(), resources
        fill(plan.items, planner, *place, unpickle=self._unpickle)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _store(self) -> Store:
        return store_of(self.path, self._rank)
