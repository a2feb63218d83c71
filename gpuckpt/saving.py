"""The saves of a checkpointer, one in flight at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from gpuckpt.background import BackgroundSave
from gpuckpt.census import Census
from gpuckpt.commit import open_step, steps
from gpuckpt.deadline import REMEMBERED, Taken, Way
from gpuckpt.effort import Effort
from gpuckpt.errors import BusyError, CheckpointError, PreemptedError
from gpuckpt.governor import Governor
from gpuckpt.inventory import Inventory, Snapshot
from gpuckpt.joint import Joint
from gpuckpt.journal import Journal, read_journal
from gpuckpt.manifest import Manifest
from gpuckpt.observers import Observer, Observers
from gpuckpt.options import Options
from gpuckpt.pending import Checkpoint, Pending, checkpoint_of
from gpuckpt.plan import Plan, largest_nbytes
from gpuckpt.remarks import conclude, remarks_on
from gpuckpt.resources import Resources
from gpuckpt.retention import Keep, prune_quietly
from gpuckpt.save import DELTA, Header, save_snapshot
from gpuckpt.seal import Seal
from gpuckpt.snapshot import Planner, capture, reserve
from gpuckpt.space import Room, save_with_room
from gpuckpt.spans import Lap, Spans
from gpuckpt.spares import Spares
from gpuckpt.stats import Fastest, Stats
from gpuckpt.stores import Store
from gpuckpt.tiered import Tiers


class Saves:
    """Begins a save once the one before has ended, and says how each went."""

    def __init__(
        self,
        store: Store,
        resources: Resources,
        options: Options,
        governor: Governor,
        *,
        keep: Keep | None,
        journal: Journal | None,
        seal: Seal | None = None,
        tiers: Tiers | None = None,
        joint: Joint | None = None,
        spares: Spares | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._spares, self.observers = spares, Observers(observers)
        self.tiers, self._joint = tiers or Tiers(store), joint
        self._store, self._resources, self._options = store, resources, options
        self._governor, self._keep, self._journal = governor, keep, journal
        self._seal = seal
        self._census, self._fastest = Census(), Fastest()
        self._planner = Planner(resources.chunk_nbytes, split=options.codec != "raw")
        self._updates_seen = self._anew = False
        self._taken = Taken()
        self.committed: int | None = None
        """The step that was saved last, as far as that was taken note of; None after a restore."""
        self.save: BackgroundSave | None = None
        """The one in flight, or that nobody has taken note of yet."""
        self._tail: BackgroundSave | None = None  # committed; it may still delete older ones
        self.previous: Manifest | None = None
        """What the next one refers to for what hasn't changed."""

    def begin(
        self,
        header: Header,
        state: Any,
        *,
        lap: Lap | None = None,
        way: Way | None = None,
        left: float = 0.0,
    ) -> Pending:
        """Take a snapshot of `state` and save it in the background.

        Waits until the save before is durable, and, for a `hold` whose loop
        announces no updates, until nothing of the state is read any more.  `lap` has run
        since the caller was blocked.  With `left` seconds until the process is
        to end, it is saved by `way`.
        """
        lap = lap or Lap()
        spans = Spans() if self._options.trace else None
        stats = Stats(header.step, codec=self._options.codec, spans=spans)
        self.reap(wait=True, deletes=False)
        self._governor.begin()
        if self.tiers.damaged:
            self.tiers.damaged, self._anew = False, True
            if self._joint is not None:
                self._joint.damaged = True
        if way is not None:
            self._governor.effort = Effort(self._resources.workers, way.codec)
            stats.codec, stats.left_seconds = way.codec, max(left, 0.0)
            stats.predicted_seconds = way.seconds or 0.0
        lap.mark("wait")
        with self._telling(header.step):
            snapshot = self._capture(state, stats, lap)
        pending = Pending(stats, snapshot.staged, self.tiers.begin(header.step))
        self.save = BackgroundSave(
            *(snapshot, pending, lambda: self._write(snapshot, header, stats), self._store.root),
            after=partial(self._committed, pending),
            beside=True,
            journal=self._journal,
            observers=self.observers,
        )
        lap = Lap()
        if snapshot.mode == "hold" and not self._updates_seen:
            # A loop that announces no updates would change what is being read.
            snapshot.staged.wait_out(self.save.start_or_fail)
        else:
            self.save.start()
        self._updates_seen = False
        lap.mark("held")
        stats.add(lap)
        self._governor.saved()
        return pending

    def steps(self) -> list[int]:
        """All committed steps, ascending."""
        for save in (self.save, self._tail):  # in this order: another thread may move it on
            if save is not None and save.pending.committed.is_set():
                save.join()  # it may still delete some
        return steps(self._store)

    def latest(self) -> Checkpoint | None:
        """The newest committed checkpoint."""
        if not self.steps():
            return None
        return checkpoint_of(open_step(self._store, seal=self._seal), self._store.root)

    def go_on_from(self, manifest: Manifest | None, *, anew: bool = False) -> None:
        """The state is that of a committed step now, or of none.

        With `anew` the next save refers to none of its files: they may not be here.
        """
        self.previous, self.committed = manifest, None
        self._anew = self._anew or anew

    def is_replicated(self, seconds: float) -> bool:
        """Whether a copy of all that was committed is on another machine; waits for that."""
        return self._spares is not None and self._spares.is_kept(seconds)

    def recall(self) -> None:
        """Take note of how long saves of runs before have taken, if there is a log of them."""
        if self._journal is not None:
            with contextlib.suppress(CheckpointError):
                for record in read_journal(self._journal.path)[-REMEMBERED:]:
                    if record.error is None:
                        self._taken.note(record.stats.codec, record.stats)

    def order_update(self) -> None:
        """Order what the caller does next after the copy in flight."""
        self._updates_seen = True
        if self.save is not None:
            self.save.cancel_unless_begun()  # else nobody would ever let this go on
            self.save.snapshot.order_update()

    def ways(self) -> tuple[Way, ...]:
        """How the next save can be made, and how long each takes."""
        return self._taken.ways(self._options.codec, self._resources.workers)

    def remaining_seconds(self) -> float | None:
        """Seconds until the save in flight is durable, if that can be said."""
        assert self.save is not None
        return self._taken.remaining(
            *(self.save.elapsed_seconds, self.save.share, self._governor.effort.codec)
        )

    def reap(
        self,
        *,
        wait: bool,
        seconds: float | None = None,
        on_error: str = "",
        deletes: bool = True,
    ) -> None:
        """Take note of a save that has ended; wait for it if asked to, or at most some `seconds`.

        Without `deletes` one that is durable has ended, though it may still
        delete what needn't be kept.

        Raises:
            BusyError: it hasn't ended by then; it goes on.
            CheckpointError: it failed, with `on_error="raise"`: this one or, unless
                it is given, the option.
        """
        save = self.save
        if save is None:
            if wait:
                self._end_tail(seconds)
                self._tell_of(CheckpointError("it was interrupted before it had begun"))
            return
        save.cancel_unless_begun()
        if not (wait or save.ended):
            return
        if self._joint is not None and not wait and save.pending.failure is not None:
            return  # it is raised where all ranks wait for it, and so at the same step
        self._end(save, seconds, deletes=deletes)
        self.save = None
        failure = save.pending.failure
        if failure is not None:
            self._tell_of(failure)  # no thread may have come as far as that
        self._governor.ended(save.pending.stats, failed=failure is not None)
        if isinstance(failure, PreemptedError):
            return  # as was decided here
        if failure is None:
            self.committed = save.pending.step
            self._taken.note(self._governor.effort.codec, save.pending.stats)
        conclude(save.pending, on_error or self._options.on_error, stacklevel=6)

    def _end(self, save: BackgroundSave, seconds: float | None, *, deletes: bool) -> None:
        """Wait until a save has ended, or is durable, at most some `seconds`."""
        if seconds is not None and not save.ends_within(seconds):
            raise self._busy(save, seconds)
        if deletes:
            save.join()
        else:
            save.pending.committed.wait()
            self._end_tail()  # if the save never came to wait for the one before
            self._tail = save

    def _end_tail(self, seconds: float | None = None) -> None:
        """Wait until the save before has deleted what needn't be kept, at most some `seconds`."""
        if self._tail is not None:
            if seconds is not None and not self._tail.ends_within(seconds):
                raise self._busy(self._tail, seconds)
            self._tail.join()
            self._tail = None

    @staticmethod
    def _busy(save: BackgroundSave, seconds: float) -> BusyError:
        return BusyError(
            f"step {save.pending.step} is still being saved after {seconds:g} s (it waits "
            f"for {save.waits_for}); it goes on, and keeps the root locked until it has "
            "ended: close again, or let the process end, which waits for it"
        )

    @property
    def is_idle(self) -> bool:
        """Whether no save is in flight, nor deletes anything."""
        return self.save is None and (self._tail is None or self._tail.ended)

    def settle(self) -> None:
        """Wait until none is in flight; nobody takes note of it yet."""
        for save in (self.save, self._tail):
            if save is not None:
                save.join()

    def reserve(self, state: Any) -> None:
        """Take the memory that copies of `state` will need."""
        plans = self._planned(self._census.take(state))
        reserve(
            *(plans, self._resources.devices, self._options.snapshot),
            host_room_nbytes=self._resources.host_room_nbytes,
        )

    def _capture(self, state: Any, stats: Stats, lap: Lap) -> Snapshot:
        inventory = self._census.take(state)
        if self._joint is not None:
            lap.mark("inventory")
            inventory = self._joint.share(inventory, stats.step)
            lap.mark("share")
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
        return snapshot

    def _write(self, snapshot: Snapshot, header: Header, stats: Stats) -> Manifest:
        self._end_tail()  # it mustn't take what is being written for something left behind
        effort, begun = self._governor.effort, self.save
        full_every = 1 if self._anew else self._options.full_every
        assert begun is not None
        with self._governor.beside(stats), self._telling(header.step):
            save = partial(
                save_snapshot,
                *(snapshot, header, self._store, self._resources),
                workers=effort.workers,
                previous=self.previous,
                full_every=full_every,
                stats=stats,
                check=begun.check,
                seal=self._seal,
                rank=self._joint.group.rank if self._joint else 0,
                together=self._joint.commit if self._joint else None,
            )
            held = self.tiers.held()
            room = Room(self._store, self._keep, self.previous, full_every, self._seal, held=held)
            asked = self._options.codec
            if self._joint is not None:  # room can't be made beside other ranks
                manifest = save(codec=effort.codec)
            else:
                codec = effort.codec
                manifest = save_with_room(save, snapshot, room, stats, codec=codec, asked=asked)
        # Here, so that the loop needn't take the one before apart.
        before, self.previous, self._anew = self.previous, manifest, False
        if self._joint is not None:
            self._anew, self._joint.anew = self._joint.anew, False
        # What one of several ranks writes may well stand still.
        stats.remarks = remarks_on(manifest, None if self._joint is not None else before)
        self._fastest.compare(stats)
        return manifest

    def _committed(self, pending: Pending, manifest: Manifest) -> None:
        """Let a step go up before any that it replaces may be deleted."""
        if self._joint is not None:
            if self._joint.site.is_lead and self._joint.world is not None:
                self.tiers.offer(self._joint.world, pending.tiers)
            self._joint.tidy()
            if self._spares is not None:
                self._spares.after_commit()
            return
        self.tiers.offer(manifest, pending.tiers)
        prune_quietly(self._store, self._keep, manifest, self._seal, self.tiers.held())

    def _tell_of(self, failure: BaseException) -> None:
        """Tell the other ranks, if they still wait for this one."""
        if self._joint is not None:
            self._joint.tell(failure)

    def _telling(self, step: int) -> contextlib.AbstractContextManager[None]:
        """If the block fails, the other ranks hear of it."""
        return self._joint.telling(step) if self._joint else contextlib.nullcontext()

    def _planned(self, inventory: Inventory) -> Mapping[str, Plan]:
        """Plans for the state, and the slots that its chunks will need."""
        plans = self._planner.plans(inventory.roster)
        self._resources.arena(plans, largest_nbytes(plans))
        if self._options.codec == DELTA and self._options.full_every > 1:
            self._resources.prepare_bases(plans, self._options.snapshot)
        return plans
