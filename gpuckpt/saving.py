"""The saves of a checkpointer, one in flight at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from gpuckpt.background import BackgroundSave
from gpuckpt.census import Census
from gpuckpt.governor import Governor
from gpuckpt.inventory import Inventory, Snapshot
from gpuckpt.journal import Journal
from gpuckpt.manifest import Manifest
from gpuckpt.options import Options
from gpuckpt.pending import Pending
from gpuckpt.plan import Plan, largest_nbytes
from gpuckpt.remarks import conclude, remarks_on
from gpuckpt.resources import Resources
from gpuckpt.retention import Keep, prune_quietly
from gpuckpt.save import DELTA, Header, save_snapshot
from gpuckpt.seal import Seal
from gpuckpt.snapshot import Planner, capture, reserve
from gpuckpt.spans import Lap, Spans
from gpuckpt.stats import Fastest, Stats
from gpuckpt.stores import Store


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
    ) -> None:
        self._store, self._resources, self._options = store, resources, options
        self._governor, self._keep, self._journal = governor, keep, journal
        self._seal = seal
        self._census, self._fastest = Census(), Fastest()
        self._planner = Planner(resources.chunk_nbytes, split=options.codec != "raw")
        self._updates_seen = False
        self.save: BackgroundSave | None = None
        """The one in flight, or that nobody has taken note of yet."""
        self.previous: Manifest | None = None
        """What the next one refers to for what hasn't changed."""

    def begin(self, header: Header, state: Any) -> Pending:
        """Take a snapshot of `state` and save it in the background.

        Waits for the save before, and, for a `hold` whose loop announces no
        updates, until nothing of the state is read any more.
        """
        lap = Lap()
        spans = Spans() if self._options.trace else None
        stats = Stats(header.step, codec=self._options.codec, spans=spans)
        self.reap(wait=True)
        self._governor.begin()
        lap.mark("wait")
        snapshot = self._capture(state, stats, lap)
        pending = Pending(stats, snapshot.staged)
        self.save = BackgroundSave(
            *(snapshot, pending, lambda: self._write(snapshot, header, stats), self._store.root),
            after=partial(prune_quietly, self._store, self._keep, seal=self._seal),
            beside=True,
            journal=self._journal,
        )
        lap = Lap()
        self.save.start()
        if snapshot.mode == "hold" and not self._updates_seen:
            # A loop that announces no updates would change what is being read.
            snapshot.staged.wait_out()
        self._updates_seen = False
        lap.mark("held")
        stats.add(lap)
        self._governor.saved()
        return pending

    def order_update(self) -> None:
        """Order what the caller does next after the copy in flight."""
        self._updates_seen = True
        if self.save is not None:
            self.save.snapshot.order_update()

    def reap(self, *, wait: bool) -> None:
        """Take note of a save that has ended; wait for it if asked to.

        Raises:
            CheckpointError: it failed, with `on_error="raise"`.
        """
        save = self.save
        if save is None:
            return
        save.cancel_unless_begun()
        if not (wait or save.ended):
            return
        save.join()
        self.save = None
        self._governor.ended(save.pending.stats, failed=save.pending.failure is not None)
        conclude(save.pending, self._options.on_error, stacklevel=6)

    def reserve(self, state: Any) -> None:
        """Take the memory that copies of `state` will need."""
        plans = self._planned(self._census.take(state))
        reserve(
            *(plans, self._resources.devices, self._options.snapshot),
            host_room_nbytes=self._resources.host_room_nbytes,
        )

    def _capture(self, state: Any, stats: Stats, lap: Lap) -> Snapshot:
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
        return snapshot

    def _write(self, snapshot: Snapshot, header: Header, stats: Stats) -> Manifest:
        effort = self._governor.effort
        with self._governor.beside(stats):
            manifest = save_snapshot(
                *(snapshot, header, self._store, self._resources),
                codec=effort.codec,
                workers=effort.workers,
                previous=self.previous,
                full_every=self._options.full_every,
                stats=stats,
                seal=self._seal,
            )
        # Here, so that the loop needn't take the one before apart.
        before, self.previous = self.previous, manifest
        stats.remarks = remarks_on(manifest, before)
        self._fastest.compare(stats)
        return manifest

    def _planned(self, inventory: Inventory) -> Mapping[str, Plan]:
        """Plans for the state, and the slots that its chunks will need."""
        plans = self._planner.plans(inventory.roster)
        self._resources.arena(plans, largest_nbytes(plans))
        if self._options.codec == DELTA and self._options.full_every > 1:
            self._resources.prepare_bases(plans, self._options.snapshot)
        return plans
