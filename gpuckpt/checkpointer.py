"""The checkpointer: what a training loop holds on to."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Self

from gpuckpt import layout
from gpuckpt.commit import open_step, steps, writing
from gpuckpt.errors import CheckpointError, ClosedError
from gpuckpt.governor import Governor
from gpuckpt.journal import Log, open_journal
from gpuckpt.loading import restore_state
from gpuckpt.matching import Rename
from gpuckpt.options import FULL_EVERY, Options, make_header
from gpuckpt.pending import Checkpoint, Pending, checkpoint_of
from gpuckpt.resources import Resources
from gpuckpt.retention import Keep
from gpuckpt.saving import Saves
from gpuckpt.schedule import Every
from gpuckpt.seal import Key, make_seal
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
    `trace`, its stages' beginnings and ends as well.  With a `key` (32 bytes or
    more, or the path of a file that holds them) checkpoints are sealed, and none
    is read that isn't sealed with it.

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
        key: Key | None = None,
        chunk_nbytes: int = layout.CHUNK_NBYTES,
    ) -> None:
        """Take the root for writing, and sweep away what a crash may have left there.

        Raises:
            LockedError: another writer has the root.
            InvalidError: an option makes no sense.
        """
        self._seal, key = make_seal(key), None  # so that no traceback's locals have it
        self._options = Options(codec, snapshot, when_busy, on_error, full_every, trace)
        self._resources = Resources(memory, chunk_nbytes=chunk_nbytes)
        self._store = store if store is not None else LocalStore(root)
        self._governor = Governor(every, codec, self._resources.workers)
        self._saves = Saves(
            *(self._store, self._resources, self._options, self._governor),
            keep=keep,
            journal=open_journal(log, self._store),
            seal=self._seal,
        )
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
        self._governor.step(busy=self._saves.save is not None)
        self._saves.reap(wait=False)
        if not self._governor.is_due(step, epoch):
            return None
        if self._saves.save is not None and self._options.when_busy == "skip":
            log.info("step %d isn't saved: step %d still is", step, self._saves.save.pending.step)
            return None
        return self._saves.begin(make_header(step, epoch, metrics), state)

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
        return self._saves.begin(make_header(step, epoch, metrics), state)

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Change the state inside this block: it is ordered after a copy in flight.

        On a GPU the current stream waits for the copies, not the host.
        """
        if self._process == os.getpid():
            self._saves.order_update()
        yield

    def resume(self, state: Any) -> int:
        """Restore the newest committed checkpoint into `state`; its step, or 0 if there is none.

        With `every`, also takes the memory for copies, so that the first
        snapshot stalls the loop no longer than the next.
        """
        self._check_open()
        self._saves.reap(wait=True)
        done = self.restore(state) if steps(self._store) else 0
        if self._governor.plans_saves:
            self._saves.reserve(state)
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
            AuthenticationError: they aren't sealed with the key; the same.
        """
        self._check_open()
        self._saves.reap(wait=True)
        manifest = open_step(self._store, step, self._seal)
        found = restore_state(
            *(state, manifest, self._store, self._resources),
            names=names,
            rename=rename,
            strict=strict,
        )
        for name in [*found.missing, *found.mismatched]:
            log.warning("%s keeps its value: step %d doesn't fit it", name, manifest.step)
        self._saves.previous = manifest
        self._governor.resumed(manifest.step, manifest.epoch)
        return manifest.step

    def steps(self) -> list[int]:
        """All committed steps, ascending."""
        save = self._saves.save
        if save is not None and save.pending.committed.is_set():
            save.join()  # it may still delete some
        return steps(self._store)

    def latest(self) -> Checkpoint | None:
        """The newest committed checkpoint."""
        if not self.steps():
            return None
        return checkpoint_of(open_step(self._store, seal=self._seal), self._store.root)

    def wait(self) -> None:
        """Wait until no save is in flight; raises if it failed, as `on_error` says."""
        self._check_open()
        self._saves.reap(wait=True)

    def close(self) -> None:
        """Wait for a save in flight, then give the root back; safe to call twice."""
        if self._process != os.getpid():
            return  # a forked child: the parent's save and lock are not its own
        try:
            self._saves.reap(wait=True)
        finally:
            # Else Ctrl-C cut the wait short: the save goes on, and the lock.
            if self._saves.save is None:
                self._open.close()
                self._process = -1
                atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        save = self._saves.save
        if self._process == os.getpid() and save is not None:
            save.join()

    def _check_open(self) -> None:
        if self._process != os.getpid():
            why = "it was closed" if self._process == -1 else "it belongs to the parent process"
            raise ClosedError(f"this Checkpointer can't be used: {why}; open another")
