"""Room on the disk for a save: what surely doesn't fit is refused, what nobody needs makes room.

Before a save writes anything, and when the disk turns out to be full in the
middle of it, that may go which is promised to nobody: checkpoints that `Keep`
wouldn't keep even if the new one never came to be, and what no manifest names.
Never the newest committed checkpoint, nor the one that this run saved or
restored last, nor what another tier still needs, nor anything that a manifest
which stays names.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterator

from gpuckpt import layout
from gpuckpt.commit import sweep
from gpuckpt.errors import CheckpointError, LockedError, StorageError
from gpuckpt.increments import Before
from gpuckpt.inventory import Snapshot
from gpuckpt.manifest import Manifest
from gpuckpt.retention import NOTHING, Held, Keep, outdated
from gpuckpt.save import AUTO, RAW, ZSTD
from gpuckpt.seal import Seal
from gpuckpt.sizes import format_nbytes
from gpuckpt.stats import Stats
from gpuckpt.stores import Store, free_nbytes

log = logging.getLogger("gpuckpt")

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Some file systems give what was deleted back a moment later: so often, and so long apart.
_LOOKS, _PAUSE_SECONDS = 5, 0.05


def save_with_room(
    save: Callable[..., Manifest],
    snapshot: Snapshot,
    room: Room,
    stats: Stats,
    *,
    codec: str,
    asked: str,
) -> Manifest:
    """`save(codec=…)`, with room made for it where that runs short; call it holding the lock.

    `asked` is the user's codec, and `codec` what became of it for this save: of
    `auto`, where chunks surely don't fit as they are, all are compressed.  A
    copy that met a full disk is written once more, from its beginning, if room
    could be made.

    Raises:
        StorageError: it surely doesn't fit, and nothing was written; or the
            storage refused.  It names the step.
    """
    smallest = ZSTD if asked == AUTO else asked
    with _naming(stats.step), snapshot.kept():
        if room.lacks(snapshot.inventory.nbytes):
            stats.freed_nbytes += room.make()
            if room.lacks(room.least_nbytes(snapshot, RAW)):
                codec = smallest
            room.check(room.least_nbytes(snapshot, codec))
        try:
            return save(codec=codec)
        except StorageError as error:
            made = room.make() if error.errno in _FULL else 0
            stats.freed_nbytes += made
            if not made or snapshot.live:
                raise
            log.warning("step %d is written anew, since room was made: %s", stats.step, error)
        stats.begin_again()
        return save(codec=smallest)


class Room:
    """What a store has left for one save, and what may go to make more of it."""

    def __init__(
        self,
        store: Store,
        keep: Keep | None,
        previous: Manifest | None,
        full_every: int = 1,
        seal: Seal | None = None,
        *,
        held: Held = NOTHING,
    ) -> None:
        """`previous` is the checkpoint that this run saved or restored last.

        Unless each is to be full, the next may refer to it.  What is `held` stays.
        """
        self._store, self._keep = store, keep
        self._previous, self._full_every, self._seal = previous, full_every, seal
        self._held = held

    def least_nbytes(self, snapshot: Snapshot, codec: str) -> int:
        """Bytes that a save of this snapshot surely writes, whatever is in it.

        Of a chunk that may be what it was before, or another tensor's rounded,
        or that is compressed, nothing is known.  But some bytes are always written.
        """
        if codec != RAW:
            return 1
        specs = snapshot.inventory.specs
        before = Before.of(self._previous, specs, self._store, self._full_every)
        chunks = (
            chunk
            for plan in snapshot.plans.values()
            for batch in plan.batches
            for chunk in batch
            if chunk.tensor not in plan.copies and not before.has(chunk)
        )
        return max(sum(chunk.nbytes for chunk in chunks), 1)

    def lacks(self, nbytes: int) -> bool:
        """Whether the store says that so much doesn't fit; one look."""
        free = free_nbytes(self._store)
        return free is not None and free < nbytes

    def check(self, nbytes: int) -> None:
        """See that so much may fit.

        Raises:
            StorageError: it doesn't.
        """
        for _ in range(_LOOKS):
            free = free_nbytes(self._store)
            if free is None or free >= nbytes:
                return
            time.sleep(_PAUSE_SECONDS)
        refusal = StorageError(
            f"{self._store.root}: at least {nbytes} bytes are wanted, and the disk has {free} "
            "left; nothing was written: free space, keep fewer checkpoints, or use another root"
        )
        refusal.errno = errno.ENOSPC
        raise refusal

    def make(self) -> int:
        """Delete what nobody needs; the bytes of it.  Call it with no save under way."""
        freed: dict[str, int] = {}
        try:
            before = _sizes(self._store)
            try:
                self._delete()
            finally:
                left = frozenset(self._store.names())
                freed = {name: nbytes for name, nbytes in before.items() if name not in left}
        except CheckpointError as error:
            log.warning("room is short, and nothing or little could be deleted: %s", error)
        if freed:
            nbytes = format_nbytes(sum(freed.values()))
            log.warning("room is short: %s were freed by deleting %s", nbytes, ", ".join(freed))
        return sum(freed.values())

    def _delete(self) -> None:
        self._store.sync_names()  # what stays is durable before anything goes
        for step in outdated(self._store, self._keep, self._previous, self._seal):
            if step not in self._held.steps:
                self._store.remove(layout.manifest_name(step))
        # If a rename's outcome is unknown, the manifest that names these may come back.
        spared = self._previous.files if self._previous is not None else ()
        sweep(self._store, spared=self._held.segments.union(spared))


def _sizes(store: Store) -> dict[str, int]:
    """The bytes of all files that hold, or held, checkpoints."""
    names = (name for name in store.names() if name.startswith(layout.BEGINNING))
    return {name: store.size(name) for name in names}


@contextlib.contextmanager
def _naming(step: int) -> Iterator[None]:
    """Let what the storage refuses say of which step it was."""
    try:
        yield
    except StorageError as error:
        kind = LockedError if isinstance(error, LockedError) else StorageError
        refusal = kind(f"step {step} was not saved: {error}")
        refusal.errno = error.errno
        raise refusal from error
