"""One save in a thread of its own, from the snapshot to the commit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from gpuckpt.inventory import Snapshot
from gpuckpt.manifest import Manifest
from gpuckpt.pending import Checkpoint, Pending, checkpoint_of


class BackgroundSave:
    """Runs `write` in a thread that outlives the main one, so that an exit doesn't cut it off."""

    def __init__(
        self, snapshot: Snapshot, pending: Pending, write: Callable[[], Manifest], root: str
    ) -> None:
        """Begins at once."""
        self.snapshot, self.pending = snapshot, pending
        self.manifest: Manifest | None = None
        self._write, self._root = write, root
        self._begun = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="gpuckpt-save")
        try:
            self._thread.start()
        except BaseException:
            snapshot.release()
            raise

    def join(self) -> None:
        """Wait until it has ended."""
        self._thread.join()

    def _run(self) -> None:
        result: Checkpoint | None = None
        failure: BaseException | None = None
        begun, cpu = time.perf_counter(), time.thread_time()
        try:
            self.manifest = self._write()
            result = checkpoint_of(self.manifest, self._root)
        except BaseException as error:
            failure = error
            self.snapshot.release()  # `write` may not have come as far as that
        stats = self.pending.stats
        stats.background_seconds = time.perf_counter() - begun
        stats.cpu_seconds += time.thread_time() - cpu
        self.pending.finish(result, failure)
