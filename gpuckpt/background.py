"""One save in a thread of its own, from the snapshot to the commit."""

from __future__ import annotations

import time
from collections.abc import Callable

from gpuckpt.apart import Apart
from gpuckpt.inventory import Snapshot
from gpuckpt.manifest import Manifest
from gpuckpt.pending import Checkpoint, Pending, checkpoint_of


class BackgroundSave:
    """A save that `start` begins, and that no interrupt of the main thread reaches."""

    def __init__(
        self, snapshot: Snapshot, pending: Pending, write: Callable[[], Manifest], root: str
    ) -> None:
        """Keep this where you'll find it, then `start` it."""
        self.snapshot, self.pending = snapshot, pending
        self._write, self._root = write, root
        self._apart = Apart(self._run, self._fail)

    def start(self) -> None:
        """Begin; call it once.  If no thread can be had, that is how the save ends."""
        self._apart.start()

    def cancel_unless_begun(self) -> None:
        """If an interrupt came between this and its `start`, let it have failed."""
        self._apart.cancel_unless_begun()

    def join(self) -> None:
        """Wait until it has ended; an interrupt leaves it running."""
        self.cancel_unless_begun()
        self._apart.ended.wait()

    @property
    def ended(self) -> bool:
        """Whether its thread has nothing left to do."""
        return self._apart.ended.is_set()

    def _run(self) -> None:
        result: Checkpoint | None = None
        failure: BaseException | None = None
        begun, cpu = time.perf_counter(), time.thread_time()
        try:
            result = checkpoint_of(self._write(), self._root)
        except BaseException as error:
            failure = error
        finally:
            self.snapshot.release()  # `write` may not have come as far as that
        stats = self.pending.stats
        stats.background_seconds = time.perf_counter() - begun
        stats.cpu_seconds += time.thread_time() - cpu
        self.pending.finish(result, failure)

    def _fail(self, failure: BaseException) -> None:
        self.snapshot.release()
        self.pending.finish(None, failure)
