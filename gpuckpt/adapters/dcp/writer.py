"""StorageWriter: what DCP saves, as a checkpoint of gpuckpt's."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from gpuckpt import layout
from gpuckpt.adapters.dcp.items import Lengths, inventory_of, lengths_of
from gpuckpt.adapters.dcp.places import CheckpointId, check_goes, is_place, step_of, store_of
from gpuckpt.adapters.dcp.world import conclude, prepare, signed
from gpuckpt.errors import InvalidError, RankError
from gpuckpt.inventory import Inventory
from gpuckpt.manifest import Manifest, Part
from gpuckpt.options import make_header
from gpuckpt.parts import world_manifest, write_part
from gpuckpt.resources import Resources
from gpuckpt.save import choice, save_snapshot
from gpuckpt.seal import Key, make_seal
from gpuckpt.snapshot import Planner, capture
from gpuckpt.spans import Lap
from gpuckpt.stats import Stats
from gpuckpt.stores import Store


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the coordinator tells all ranks of a save: how many they are, and the state's lists."""

    ranks: int
    lengths: Lengths

    @property
    def digest(self) -> str:
        """The same for two ranks if they have been told the same."""
        told = repr((self.ranks, sorted(self.lengths.items(), key=repr)))
        return hashlib.sha256(told.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class _Written:
    """What a rank tells the coordinator of its part."""

    part: Part
    told: str


class StorageWriter(storage.StorageWriter):
    """Writes a checkpoint of `dcp.save` or `dcp.async_save`, in gpuckpt's format.

    `path` (or `checkpoint_id`) is a directory that all ranks share, and of this
    checkpoint alone; where its name ends with a step's number (`step-300`),
    that is the checkpoint's step, else it is 0.  With `overwrite`, one that is
    there is replaced, in one instant.  `codec` is `auto`, `zstd` or `raw`,
    `memory` bounds the host memory beside the state (bytes, or like
    "256 MiB"), and with a `key` the checkpoint is sealed; for saves in another
    process give the path of a key file.

    Reads the tensors where they are while DCP's `save` blocks.  The checkpoint
    is durable, and visible, when that returns; if any rank fails there is none,
    and what has been written is deleted by the next save to the same path.
    """

    def __init__(
        self,
        path: CheckpointId | None = None,
        *,
        overwrite: bool = True,
        codec: str = "auto",
        memory: int | str = "256 MiB",
        key: Key | None = None,
    ) -> None:
        """Write nothing yet.

        Raises:
            InvalidError: an option makes no sense.
        """
        super().__init__()
        choice(codec)
        make_seal(key)
        self.path, self.overwrite = path, overwrite
        self._codec, self._memory, self._key = codec, memory, key
        self._resources: Resources | None = None
        self.save_id = secrets.token_hex(16)
        self._rank, self._alone = 0, False
        self._own: Manifest | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What another process that saves needs: the options.

        Raises:
            InvalidError: the key would go with it.
        """
        check_goes(self._key)
        return self.__dict__ | {"_resources": None, "_own": None}

    @property
    def checkpoint_id(self) -> CheckpointId | None:
        """The path."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: CheckpointId) -> bool:
        """Whether a checkpoint can be written there."""
        return is_place(checkpoint_id)

    def reset(self, checkpoint_id: CheckpointId | None = None) -> None:
        """Begin a new checkpoint, at another path if one is given."""
        if checkpoint_id:
            self.path = checkpoint_id
        self.save_id = secrets.token_hex(16)
        self._own = None

    def storage_meta(self) -> StorageMeta:
        """Which checkpoint it is, for planners and logs."""
        return StorageMeta(checkpoint_id=self.path, save_id=self.save_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002, FBT001 - DCP's
        """Take note of this rank's number, and of whether each rank saves alone."""
        self._rank = kwargs.get("rank") or 0
        self._alone = not kwargs.get("use_collectives", True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Sweep the path, and tell all ranks what they must know of each other.

        Raises:
            InvalidError: a checkpoint is there that isn't to be overwritten.
            LockedError: somebody else is writing there.
        """
        prepare(self._store(), overwrite=self.overwrite, seal=make_seal(self._key))
        shared = _Shared(len(plans), lengths_of(plan.planner_data for plan in plans))
        return [replace(plan, storage_data=shared) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items; they are durable when this returns, and nothing names them yet.

        Raises:
            UnsupportedError: it names an item that can't be saved.
            StorageError: the storage refused; what was written is deleted.
        """
        shared = plan.storage_data
        if not isinstance(shared, _Shared):
            raise InvalidError("the plan isn't one that prepare_global_plan of this writer gave")
        inventory = inventory_of(plan, planner, shared.lengths)
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(inventory, shared))
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit what all ranks have written; the coordinator alone.

        Raises:
            RankError: what a rank has written isn't here; nothing was committed.
            StorageError: the storage refused.
        """
        metadata.storage_meta = self.storage_meta()
        own, seal = self._own, make_seal(self._key)
        if own is None:
            raise InvalidError("finish follows write_data of the same writer")
        self._own = None
        written = [one.storage_data for each in results for one in each]
        if len(results) == 1:
            conclude(self._store(), own, seal)
            return
        if len({one.told for one in written}) > 1 or len(written) != len(results):
            raise RankError(
                range(len(results)),
                "they follow plans of different saves; make a new planner, without cached plans",
            )
        parts = [one.part for one in written]
        conclude(self._store(), world_manifest(parts, own), seal)

    def _store(self) -> Store:
        return store_of(self.path, self._rank if self._alone else None)

    def _write(self, inventory: Inventory, shared: _Shared) -> list[WriteResult]:
        store, seal = self._store(), make_seal(self._key)
        resources = self._resources = self._resources or Resources(self._memory)
        header = make_header(step_of(self.path or ""), None, None)
        header = replace(header, writer=signed(header.writer, self.save_id))
        parts: list[Part] = []

        def together(
            manifest: Manifest, token: str, abandon: Callable[[], object], _lap: Lap
        ) -> Manifest:
            rank = 0 if shared.ranks == 1 else self._rank
            if shared.ranks > 1:
                manifest = replace(manifest, ranks=shared.ranks, rank=rank)
                name = layout.part_name(manifest.step, token, rank)
                try:
                    parts.append(write_part(store, name, manifest, seal))
                except BaseException:
                    abandon()
                    raise
            return manifest

        plans = Planner(resources.chunk_nbytes, split=self._codec != "raw").plans(inventory.roster)
        snapshot = capture(inventory, plans, resources.devices, mode="hold", host_room_nbytes=0)
        stats = Stats(header.step, raw_nbytes=inventory.nbytes, tensors=len(inventory.specs))
        self._own = save_snapshot(
            *(snapshot, header, store, resources),
            codec=self._codec,
            previous=None,
            stats=stats,
            seal=seal,
            rank=self._rank,
            together=together,
        )
        return _results(parts, inventory.nbytes, shared.digest)


def _results(parts: Sequence[Part], nbytes: int, told: str) -> list[WriteResult]:
    """One for all that a rank has written: its rows are in its part."""
    index = MetadataIndex("")
    return [WriteResult(index, nbytes, _Written(part, told)) for part in parts]
