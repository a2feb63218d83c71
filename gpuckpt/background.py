"""One save in a thread of its own, from the snapshot to the commit."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from gpuckpt.apart import Apart, Flag
from gpuckpt.errors import PreemptedError
from gpuckpt.inventory import Snapshot
from gpuckpt.journal import Journal
from gpuckpt.manifest import Manifest
from gpuckpt.observers import Observers
from gpuckpt.pending import Checkpoint, Pending, checkpoint_of
from gpuckpt.spans import Lap
from gpuckpt.switching import switching_often
from gpuckpt.watch import Watch

log = logging.getLogger("gpuckpt")


class BackgroundSave:
    """A save that `start` begins, and that no interrupt of the main thread reaches."""

    def __init__(
        self,
        snapshot: Snapshot,
        pending: Pending,
        write: Callable[[], Manifest],
        root: str,
        *,
        after: Callable[[Manifest], object] = lambda _: None,
        beside: bool = False,
        journal: Journal | None = None,
        observers: Observers | None = None,
    ) -> None:
        """Keep this where you'll find it, then `start` it.

        `after` is called, in the same thread, once a save is durable and all
        who wait for that go on.  `beside` says that the caller goes on
        meanwhile, perhaps with the GIL in its hands nearly all the time.
        `journal` gets a line when the save has ended, and `observers` are told.
        """
        self.snapshot, self.pending = snapshot, pending
        self._write, self._root, self._beside, self._journal = write, root, beside, journal
        self._after, self._observers = after, observers or Observers()
        self._given_up = Flag()
        self._begun = time.perf_counter()
        self._watch = Watch(pending.stats)
        self._apart = Apart(self._run, self._fail, self._watch.look)

    def start(self) -> None:
        """Begin, once however often it is called; without a thread, that is how the save ends."""
        self._apart.start()

    def start_or_fail(self) -> None:
        """As `start`; if an interrupt keeps it from beginning, it has failed at once."""
        try:
            self.start()
        except BaseException:
            self.cancel_unless_begun()
            raise

    def cancel_unless_begun(self) -> None:
        """If an interrupt came between this and its `start`, let it have failed."""
        self._apart.cancel_unless_begun()

    def give_up(self) -> None:
        """Have it fail soon, unless it has come as far as its commit; doesn't wait for that."""
        self._given_up.set()

    def check(self) -> None:
        """For its own thread: fail if it was given up."""
        if self._given_up.is_set():
            raise PreemptedError(self.pending.step)

    def join(self) -> None:
        """Wait until it has ended; an interrupt leaves it running."""
        self.cancel_unless_begun()
        self._apart.ended.wait()

    def ends_within(self, seconds: float) -> bool:
        """Wait until it has ended, at most so long; whether it has."""
        self.cancel_unless_begun()
        return self._apart.ended.wait(seconds)

    @property
    def waits_for(self) -> str:
        """What its thread is at, in a few words."""
        return self._watch.stage()

    @property
    def ended(self) -> bool:
        """Whether its thread has nothing left to do."""
        return self._apart.ended.is_set()

    @property
    def elapsed_seconds(self) -> float:
        """How long it has gone on, snapshot apart."""
        return time.perf_counter() - self._begun

    @property
    def share(self) -> float:
        """How much of the state has come to the disk, from 0 to 1; 1 only once all has."""
        plans = self.snapshot.plans.values()
        sizes = [chunk.nbytes for plan in plans for batch in plan.batches for chunk in batch]
        done = sum(sizes[: self.pending.stats.chunks])
        return done / sum(sizes) if done else 0.0

    def _run(self) -> None:
        manifest: Manifest | None = None
        failure: BaseException | None = None
        lap = Lap()
        self._watch.begin()
        try:
            with switching_often() if self._beside else contextlib.nullcontext():
                manifest = self._write()
        except BaseException as error:
            failure = error
        finally:
            self.snapshot.release()  # `write` may not have come as far as that
        lap.mark("background")
        stats = self.pending.stats
        stats.add(lap)
        stats.cpu_seconds += lap.cpu_seconds
        self._finish(checkpoint_of(manifest, self._root) if manifest else None, failure)
        if manifest is not None:
            try:
                self._after(manifest)
            except Exception:
                log.exception("step %d is saved; what belongs after that failed", manifest.step)

    def _fail(self, failure: BaseException) -> None:
        """Whatever has failed, also in the midst of the end: who waits is told."""
        if self.pending.committed.is_set():
            log.error("step %d: after its end: %r", self.pending.step, failure)
            return
        try:
            self.snapshot.release()
        finally:
            self._finish(None, failure)

    def _finish(self, result: Checkpoint | None, failure: BaseException | None) -> None:
        try:
            if self._journal is not None:
                self._journal.append(self.pending.stats, failure)
        finally:
            self.pending.finish(result, failure)
            self._observers.tell(self.pending.stats, failure)
