"""The checkpointer: what a training loop holds on to."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, Self

from gpuckpt import layout
from gpuckpt.background import BackgroundSave
from gpuckpt.census import Census
from gpuckpt.commit import open_step, steps, writing
from gpuckpt.errors import CheckpointError, ClosedError
from gpuckpt.governor import Governor
from gpuckpt.inventory import Inventory, Snapshot
from gpuckpt.journal import Log, open_journal
from gpuckpt.loading import restore_state
from gpuckpt.manifest import Manifest
from gpuckpt.matching import Rename
from gpuckpt.options import FULL_EVERY, Options, make_header
from gpuckpt.pending import Checkpoint, Pending, checkpoint_of
from gpuckpt.plan import Plan, largest_nbytes
from gpuckpt.remarks import conclude, remarks_on
from gpuckpt.resources import Resources
from gpuckpt.retention import Keep, prune_quietly
from gpuckpt.save import DELTA, Header, save_snapshot
from gpuckpt.schedule import Every
from gpuckpt.snapshot import Planner, capture, reserve
from gpuckpt.spans import Lap, Spans
from gpuckpt.stats import Fastest, Stats
from gpuckpt.stores import Store
from gpuckpt.stores.local import LocalStore

log = logging.getLogger("gpuckpt")

Root = str | os.PathLike[str]


class Checkpointer:
    """Saves a training run's state in the background, and brings it back.

    One save is in flight at a time.  `codec` is `auto` (planes that a sample
    shows to be worth it are compressed, as long as that doesn't make the disk
    wait, nor takes a core from the loop), `delta` (all of these, and what a
    chunk differs by from the save before, where that is less and `memory` has
    room for that one's bytes), `zstd` (all planes) or `raw` (none).
    `snapshot` is `copy` (the state is copied on its device before `save`
    returns or, on a GPU, before its stream goes on), `hold` (it is read where
    it is; `update` makes the next update wait; a loop that doesn't use
    `update` waits in `save`), or `auto` (copy where there is room).  `memory`
    bounds the host memory that gpuckpt takes, whatever the state's size.
    With a save in flight, `step` waits for it or, `when_busy="skip"`, skips.
    A failed save is raised by the next call, or, `on_error="warn"`, warned
    of; the last committed checkpoint stays in any case.  Chunks that haven't
    changed since the save before aren't written again, and their segments
    stay; with `full_every=1` each checkpoint has files of its own alone.  `log` is a
    file, or True for one in the root, that gets a line for each save; with
    `trace`, its stages' beginnings and ends as well.

    Not for use by several threads at once.  A root has one writer at a time.
    """

    def __init__(
        self,
        root: Root,
        *,
        every: Every | None = None,
        keep: Keep | None = None,
        codec: str = "auto",
        snapshot: str = "auto",
        memory: int | str = "1 GiB",
        when_busy: Literal["wait", "skip"] = "wait",
        on_error: Literal["raise", "warn"] = "raise",
        full_every: int = FULL_EVERY,
        log: Log = None,
        trace: bool = False,
        store: Store | None = None,
        chunk_nbytes: int = layout.CHUNK_NBYTES,
    ) -> None:
        """Take the root for writing, and sweep away what a crash may have left there.

        Raises:
            LockedError: another writer has the root.
            InvalidError: an option makes no sense.
        """
        self._options = Options(codec, snapshot, when_busy, on_error, full_every)
        self._resources = Resources(memory, chunk_nbytes=chunk_nbytes)
        self._census = Census()
        self._planner = Planner(chunk_nbytes, split=codec != "raw")
        self._store = store if store is not None else LocalStore(root)
        self._journal, self._trace, self._fastest = open_journal(log, self._store), trace, Fastest()
        self._governor = Governor(every, codec, self._resources.workers)
        self._keep = keep
        self._save: BackgroundSave | None = None
        self._previous: Manifest | None = None
        self._updates_seen = False
        self._process = os.getpid()
        self._open = contextlib.ExitStack()
        self._open.enter_context(writing(self._store))
        # The interpreter's exit doesn't cut off a save, also if nobody calls `close`.
        atexit.register(self._at_exit)

    def __enter__(self) -> Self:
        """Itself."""
        self._check_open()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Close; a failed save doesn't hide the error that ends the block."""
        try:
            self.close()
        except CheckpointError:
            if error is None:
                raise
            log.exception("a save failed while the training loop was failing")

    def step(
        self,
        step: int,
        state: Any,
        epoch: int | None = None,
        metrics: dict[str, float] | None = None,
    ) -> Pending | None:
        """Tell that `state` has seen `step` training steps; saves it if that is due.

        Returns at once if not, or if a save is in flight and `when_busy` is
        `skip`.  Else as `save`.
        """
        self._check_open()
        step = layout.check_step(step)
        self._governor.step(busy=self._save is not None)
        self._reap(wait=False)
        if not self._governor.is_due(step, epoch):
            return None
        if self._save is not None and self._options.when_busy == "skip":
            log.info("step %d isn't saved: step %d still is", step, self._save.pending.step)
            return None
        return self._begin(step, state, epoch, metrics)

    def save(
        self,
        step: int,
        state: Any,
        metrics: dict[str, float] | None = None,
        epoch: int | None = None,
    ) -> Pending:
        """Save `state` in the background, due or not; waits for a save in flight first.

        On return the caller may go on and, but for `hold`, change the state;
        `Pending.stats.stall_seconds` says how long it took.

        Raises:
            UnsupportedError: a leaf can't be saved; nothing has been written.
            CheckpointError: the save before failed, with `on_error="raise"`.
        """
        self._check_open()
        return self._begin(step, state, epoch, metrics)

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Change the state inside this block: it is ordered after a copy in flight.

        On a GPU the current stream waits for the copies, not the host.
        """
        self._updates_seen = True
        if self._save is not None and self._process == os.getpid():
            self._save.snapshot.order_update()
        yield

    def resume(self, state: Any) -> int:
        """Restore the newest committed checkpoint into `state`; its step, or 0 if there is none.

        With `every`, also takes the memory for copies, so that the first
        snapshot stalls the loop no longer than the next.
        """
        self._check_open()
        self._reap(wait=True)
        done = self.restore(state) if steps(self._store) else 0
        self._reserve(state)
        return done

    def restore(
        self,
        state: Any,
        step: int | None = None,
        names: Iterable[str] | None = None,
        rename: Rename = None,
        strict: bool = True,  # noqa: FBT001, FBT002 (the public interface fixes its place)
    ) -> int:
        """Restore a committed step (the newest unless named) into `state`, in place; its step.

        `names` are names or globs of leaves of `state`; all others stay as
        they are.  `rename` leads from the checkpoint's names to the state's: a
        mapping of names or of beginnings of names, or a function.

        Raises:
            NotFoundError: no such step, or a name that fits nothing.
            MismatchError: with `strict`, the two don't fit; nothing was changed.
            CorruptError: bytes aren't what was written; the state may have
                been overwritten in part.
        """
        self._check_open()
        self._reap(wait=True)
        manifest = open_step(self._store, step)
        found = restore_state(
            *(state, manifest, self._store, self._resources),
            names=names,
            rename=rename,
            strict=strict,
        )
        for name in [*found.missing, *found.mismatched]:
            log.warning("%s keeps its value: step %d doesn't fit it", name, manifest.step)
        self._previous = manifest
        self._governor.resumed(manifest.step, manifest.epoch)
        return manifest.step

    def steps(self) -> list[int]:
        """All committed steps, ascending."""
        if self._save is not None and self._save.pending.committed.is_set():
            self._save.join()  # it may still delete some
        return steps(self._store)

    def latest(self) -> Checkpoint | None:
        """The newest committed checkpoint."""
        if not self.steps():
            return None
        return checkpoint_of(open_step(self._store), self._store.root)

    def wait(self) -> None:
        """Wait until no save is in flight; raises if it failed, as `on_error` says."""
        self._check_open()
        self._reap(wait=True)

    def close(self) -> None:
        """Wait for a save in flight, then give the root back; safe to call twice."""
        if self._process != os.getpid():
            return  # a forked child: the parent's save and lock are not its own
        try:
            self._reap(wait=True)
        finally:
            if self._save is None:  # else Ctrl-C cut the wait short: the save goes on, and the lock
                self._open.close()
                self._process = -1
                atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        if self._process == os.getpid() and self._save is not None:
            self._save.join()

    def _begin(
        self, step: int, state: Any, epoch: int | None, metrics: dict[str, float] | None
    ) -> Pending:
        lap = Lap()
        header = make_header(step, epoch, metrics)
        stats = Stats(step, codec=self._options.codec, spans=Spans() if self._trace else None)
        self._reap(wait=True)
        self._governor.begin()
        lap.mark("wait")
        inventory = self._census.take(state)
        plans = self._planned(inventory)
        lap.mark("inventory")
        stats.raw_nbytes, stats.tensors = inventory.nbytes, len(inventory.specs)
        snapshot = capture(
            *(inventory, plans, self._resources.devices),
            mode=self._options.snapshot,
            host_room_nbytes=self._resources.host_room_nbytes,
        )
        del inventory  # it refers to the state's arrays
        lap.mark("snapshot", stats.raw_nbytes)
        stats.add(lap)
        stats.mode = snapshot.mode
        if snapshot.mode == "copy":
            snapshot.order_update()  # before it can become a checkpoint
        pending = Pending(stats, snapshot.staged)
        self._save = BackgroundSave(
            *(snapshot, pending, lambda: self._write(snapshot, header, stats), self._store.root),
            after=partial(prune_quietly, self._store, self._keep),
            beside=True,
            journal=self._journal,
        )
        lap = Lap()
        self._save.start()
        if snapshot.mode == "hold" and not self._updates_seen:
            # A loop that announces no updates would change what is being read.
            snapshot.staged.wait_out()
        self._updates_seen = False
        lap.mark("held")
        stats.add(lap)
        self._governor.saved()
        return pending

    def _write(self, snapshot: Snapshot, header: Header, stats: Stats) -> Manifest:
        effort = self._governor.effort
        with self._governor.beside(stats):
            manifest = save_snapshot(
                *(snapshot, header, self._store, self._resources),
                codec=effort.codec,
                workers=effort.workers,
                previous=self._previous,
                full_every=self._options.full_every,
                stats=stats,
            )
        # Here, so that the loop needn't take the one before apart.
        before, self._previous = self._previous, manifest
        stats.remarks = remarks_on(manifest, before)
        self._fastest.compare(stats)
        return manifest

    def _reap(self, *, wait: bool) -> None:
        """Take note of a save that has ended; wait for it if asked to."""
        save = self._save
        if save is None:
            return
        save.cancel_unless_begun()
        if not (wait or save.ended):
            return
        save.join()
        self._save = None
        self._governor.ended(save.pending.stats, failed=save.pending.failure is not None)
        conclude(save.pending, self._options.on_error, stacklevel=5)

    def _planned(self, inventory: Inventory) -> Mapping[str, Plan]:
        """Plans for the state, and the slots that its chunks will need."""
        plans = self._planner.plans(inventory.roster)
        self._resources.arena(plans, largest_nbytes(plans))
        if self._options.codec == DELTA and self._options.full_every > 1:
            self._resources.prepare_bases(plans, self._options.snapshot)
        return plans

    def _reserve(self, state: Any) -> None:
        if self._governor.plans_saves:
            plans = self._planned(self._census.take(state))
            reserve(
                *(plans, self._resources.devices, self._options.snapshot),
                host_room_nbytes=self._resources.host_room_nbytes,
            )

    def _check_open(self) -> None:
        if self._process != os.getpid():
            why = "it was closed" if self._process == -1 else "it belongs to the parent process"
            raise ClosedError(f"this Checkpointer can't be used: {why}; open another")
