"""The functions for those who need no checkpointer: `save` and `load`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from gpuckpt.background import BackgroundSave
from gpuckpt.census import take_inventory
from gpuckpt.commit import open_step
from gpuckpt.errors import CheckpointError
from gpuckpt.loading import load_state
from gpuckpt.manifest import Manifest
from gpuckpt.nearest import take_nearest
from gpuckpt.options import make_header
from gpuckpt.pending import Checkpoint, Pending
from gpuckpt.remarks import remark, remarks_on
from gpuckpt.resources import Resources
from gpuckpt.retention import Keep, prune_quietly
from gpuckpt.save import choice, save_snapshot
from gpuckpt.seal import Key, Seal, make_seal
from gpuckpt.snapshot import Planner, capture
from gpuckpt.sources import is_file, open_source
from gpuckpt.space import Room, save_with_room
from gpuckpt.stats import Stats
from gpuckpt.stores import Store
from gpuckpt.stores.opening import open_store
from gpuckpt.tiers import Root, Tier, arranged


def save(
    root: Root,
    state: Any,
    step: int = 0,
    *,
    epoch: int | None = None,
    metrics: dict[str, float] | None = None,
    codec: str = "auto",
    keep: Keep | None = None,
    memory: int | str = "256 MiB",
    store: Store | None = None,
    key: Key | None = None,
) -> Checkpoint:
    """Save `state` as checkpoint `step` of `root`; on return it is durable.

    Blocks until then, and reads the state where it is.  A step that is there
    already is replaced, in one instant.  Ctrl-C is raised when the save has
    ended: neither a commit nor the reading of the state is cut in half.  With
    a `key` (bytes, or the path of a key file) it is sealed.

    Raises:
        UnsupportedError: a leaf can't be saved; nothing has been written.
        LockedError: another writer has the root.
        StorageError: the storage refused; no checkpoint was made.
    """
    choice(codec)
    seal, key = make_seal(key), None  # so that no traceback's locals have it
    header = make_header(step, epoch, metrics)
    resources = Resources(memory)
    inventory = take_inventory(state)
    store = store if store is not None else open_store(root)
    stats = Stats(step, raw_nbytes=inventory.nbytes, tensors=len(inventory.specs))
    plans = Planner(resources.chunk_nbytes, split=codec != "raw").plans(inventory.roster)
    snapshot = capture(inventory, plans, resources.devices, mode="hold", host_room_nbytes=0)

    def write() -> Manifest:
        with store.lock():
            previous = _newest(store, seal)
            save = partial(
                save_snapshot,
                *(snapshot, header, store, resources),
                previous=previous,
                stats=stats,
                seal=seal,
            )
            room = Room(store, keep, previous, seal=seal)
            manifest = save_with_room(save, snapshot, room, stats, codec=codec, asked=codec)
            stats.remarks = remarks_on(manifest, None)
            prune_quietly(store, keep, manifest, seal)
        return manifest

    pending = Pending(stats, snapshot.staged)
    saving = BackgroundSave(snapshot, pending, write, store.root)
    pending.committed.wait_out(saving.start_or_fail)
    checkpoint = pending.result()
    remark(stats.remarks, stacklevel=3)
    return checkpoint


def _newest(store: Store, seal: Seal | None) -> Manifest | None:
    """What the tensors' versions go on from; a damaged one is no reason not to save."""
    try:
        return open_step(store, seal=seal)
    except CheckpointError:
        return None


def load(
    root: Root | None,
    step: int | None = None,
    device: str | None = None,
    names: str | Iterable[str] | None = None,
    like: str | None = None,
    *,
    fallback: bool = False,
    memory: int | str = "256 MiB",
    store: Store | None = None,
    key: Key | None = None,
    tiers: Sequence[Root | Tier] = (),
) -> Any:
    """Load a committed step (the newest unless named) as a new state.

    Containers come back as they were (objects as the dict of their
    `state_dict`, named tuples as tuples), one array under two names as one
    array.  `device` is `cpu`, `cuda` or `cuda:<n>`; unless given, each array
    goes where it was saved from.  Arrays are of the library that they were
    saved from unless `like` names another: `numpy`, `cupy`, `torch`, `jax`.
    With `names` (names or globs), a flat dict of the leaves that they pick.
    With `fallback`, the newest intact step before one that is damaged, and a
    RuntimeWarning.  `root` may also be one data file, which is read without
    its manifest: a flat dict of the tensors in it.  With `tiers`, as a
    Checkpointer has them, the newest step that any has, from the nearest that has it
    whole; `root`, unless it is None, is the nearest.  With a `key`, nothing is
    loaded that isn't sealed with it; without one, seals aren't looked at.

    Raises:
        NotFoundError: no such root, step, name or device.
        CorruptError: bytes aren't what was written.
        AuthenticationError: they aren't sealed with `key`.
    """
    seal, key = make_seal(key), None  # so that no traceback's locals have it
    resources = Resources(memory)
    if store is None and root is not None and is_file(root):
        one = open_source(root, seal)
        return load_state(one.manifest, one.store, resources, device=device, names=names, like=like)
    stores = [one.open() for one in arranged(root, tiers, store=store)]
    chosen = names if names is None or isinstance(names, str) else list(names)

    def take(store: Store, manifest: Manifest) -> Any:
        return load_state(manifest, store, resources, device=device, names=chosen, like=like)

    _, taken = take_nearest(stores, step, take, fallback=fallback, seal=seal)
    remark(taken.remarks, stacklevel=3)
    return taken.result
