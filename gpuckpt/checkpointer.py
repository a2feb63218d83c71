"""The checkpointer: what a training loop holds on to."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal, Self

from gpuckpt import layout
from gpuckpt.crew import Crew
from gpuckpt.cutting import Reshard, check_reshard
from gpuckpt.errors import CheckpointError
from gpuckpt.governor import Governor
from gpuckpt.journal import Log, open_journal
from gpuckpt.lifetime import Lifetime, TimeLeft
from gpuckpt.matching import Rename
from gpuckpt.notice import Preempt
from gpuckpt.observers import Observer
from gpuckpt.options import FULL_EVERY, Options, make_header
from gpuckpt.pending import Checkpoint, Pending
from gpuckpt.preemption import PREEMPTED, LastSave, Preemption
from gpuckpt.resources import Resources
from gpuckpt.restoring import Restores
from gpuckpt.retention import Keep
from gpuckpt.saving import Saves
from gpuckpt.schedule import Every
from gpuckpt.seal import Key, make_seal
from gpuckpt.sizes import parse_seconds
from gpuckpt.stores import Store
from gpuckpt.tiered import Tiers
from gpuckpt.tiers import Root, Tier, arranged

log = logging.getLogger("gpuckpt")


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
    With a save in flight, `step` waits for it or, `when_busy="skip"`, skips.  A failed save
    is raised by the next call, or, `on_error="warn"`, warned of; the last committed
    checkpoint stays in any case.  Chunks that haven't changed since the save before aren't
    written again, and their segments stay; with `full_every=1` each checkpoint has files of
    its own alone. `log` is a file, or True for one in the root, that gets a line for each
    save; with `trace`, its stages' beginnings and ends as well; `observers` are told of
    each save (see `gpuckpt.metrics`), in a thread of their own.  With a `key` (32 bytes or
    more, or the path of a file that holds them) checkpoints are sealed, and none is read
    that isn't sealed with it.

    `tiers` are further roots, or `Tier`s: each step goes up to them once it is
    durable in the nearest, `root` or else the first of `tiers`.  Nobody waits for
    that: one that can't be reached is warned of, and tried again.  A restore takes
    the newest step that any has, from the nearest that has it whole.

    `preempt` is how the process is told to end soon: True for SIGTERM or
    SIGUSR1, a signal, a function that `step` and `save` ask whether (or in how
    many seconds) it is to end, or several of these.  It has `grace` from then
    on.  The next `step` saves, due or not, in a way that saves before have
    shown to be in time, and returns once that is durable; then `should_stop`.

    Of several ranks each opens one, and calls the same methods in the same order;
    `group` says which they are (`gpuckpt.groups.detect`), if the program and its
    launcher don't.  All wait for each other where a checkpoint is committed or
    restored, but not in `step`, unless clocks or announcements are to be agreed
    on, and at most `group_timeout`.  They may have one root, or each machine its
    own; `metrics` and `epoch` are those of rank 0.  With `replicas=1` each has a
    copy of its files on the next machine's disk, and has them back in `resume`.
    Shards are saved so that other ranks read little more than they need: by
    `reshard` along `any` axes, or the `same`, or `none`; `auto`: any, but the
    same of deltas and where there is a `key` (docs/RANKS.md).

    Not for use by several threads at once.  A root has one writer at a time.
    """

    def __init__(
        self,
        root: Root | None = None,
        *,
        tiers: Sequence[Root | Tier] = (),
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
        observers: Sequence[Observer] = (),
        preempt: Preempt = None,
        grace: float | str | timedelta = "30 s",
        store: Store | None = None,
        key: Key | None = None,
        group: object = None,
        group_timeout: float | str | timedelta = "10 min",
        replicas: int = 0,
        reshard: Reshard | Literal["auto"] = "auto",
        chunk_nbytes: int = layout.CHUNK_NBYTES,
    ) -> None:
        """Take the root for writing, and sweep away what a crash may have left there.

        Raises:
            LockedError: another writer has the root.
            InvalidError: an option makes no sense, or signals are to be caught
                and this isn't the main thread.
        """
        self._seal, key = make_seal(key), None  # so that no traceback's locals have it
        self._options = Options(codec, snapshot, when_busy, on_error, full_every, trace)
        self._resources = Resources(memory, chunk_nbytes=chunk_nbytes)
        nearest, *higher = arranged(root, tiers, keep=keep, store=store)
        self._store = nearest.open()
        self._tiers = Tiers(self._store, higher, seal=self._seal)
        self._governor = Governor(every, codec, self._resources.workers)
        crew = Crew.of(group, group_timeout, self._store)
        self._saves = Saves(
            *(self._store, self._resources, self._options, self._governor),
            keep=nearest.keep,
            journal=open_journal(log, self._store, crew.rank),
            seal=self._seal,
            tiers=self._tiers,
            spares=crew.spare(self._store, replicas),
            observers=observers,
            joint=crew.joint(
                *(self._store, nearest.keep, self._seal, self._tiers),
                check_reshard(reshard, parts=self._seal is None and codec != "delta"),
            ),
        )
        self._restores = Restores(
            *(self._tiers, self._resources, self._saves, self._governor),
            seal=self._seal,
            concord=crew.concord(),
        )
        notice, self._pace = crew.pace(self._governor, preempt, grace, skips=when_busy == "skip")
        self._last = LastSave(notice, self._saves, self._pace)
        entered = partial(crew.entered, self._store)
        self._life = Lifetime(entered, self._saves, self._last, crew.leave)
        self._life.begin()

    def __enter__(self) -> Self:
        """Itself."""
        self._life.check()
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
        `skip`.  Else as `save`.  If the process is to end soon, saves in any
        case, and returns once that is durable: see `preempt`.
        """
        self._life.check()
        self._tiers.tell(self._options.on_error, stacklevel=3)
        step = layout.check_step(step)
        save = self._saves.save
        self._governor.step(busy=save is not None)
        self._last.ask()
        due = self._pace.is_due(step, epoch, busy=save is not None and not save.ended)
        if self._last.is_due():
            return self._last.save(make_header(step, epoch, metrics), state, anyway=False)
        self._saves.reap(wait=False)
        if not due:
            return None
        return self._last.save(make_header(step, epoch, metrics), state, anyway=False)

    def save(
        self,
        step: int,
        state: Any,
        metrics: dict[str, float] | None = None,
        epoch: int | None = None,
    ) -> Pending:
        """Save `state` in the background, due or not; waits for a save in flight first.

        If the process is to end soon, returns once that is durable: see `preempt`.

        On return the caller may go on and, but for `hold`, change the state;
        `Pending.stats.stall_seconds` says how long it took.

        Raises:
            UnsupportedError: a leaf can't be saved; nothing has been written.
            CheckpointError: the save before failed, with `on_error="raise"`.
        """
        self._life.check()
        self._tiers.tell(self._options.on_error, stacklevel=3)
        self._last.ask()
        self._pace.hear(step)
        pending = self._last.save(make_header(step, epoch, metrics), state, anyway=True)
        assert pending is not None
        return pending

    @property
    def should_stop(self) -> bool:
        """Whether the process was told to end, and all was saved that there was time for.

        Then the loop should end, the process too, with `exit_code`.
        """
        return self._last.outcome is not None

    @property
    def preemption(self) -> Preemption | None:
        """Once it `should_stop`: who told so, and which step is durable."""
        return self._last.outcome

    @property
    def exit_code(self) -> int:
        """`PREEMPTED` (75) once it `should_stop`, for a scheduler that starts it again; else 0."""
        return PREEMPTED if self.should_stop else 0

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Change the state inside this block: it is ordered after a copy in flight.

        On a GPU the current stream waits for a copy, and the host only for reads by `hold`.
        """
        if self._life.is_ours:
            self._saves.order_update()
        yield

    def resume(self, state: Any, *, fallback: bool = False) -> int:
        """Restore the newest committed checkpoint into `state`; its step, or 0 if there is none.

        With `fallback` the newest that is intact, as `restore` says.  With
        `every`, also takes the memory for copies, so that the first snapshot
        stalls the loop no longer than the next.
        """
        self._life.check()
        return self._restores.newest(state, fallback=fallback, stacklevel=3)

    def restore(
        self,
        state: Any,
        step: int | None = None,
        names: Iterable[str] | None = None,
        rename: Rename = None,
        strict: bool = True,  # noqa: FBT001, FBT002 (the public interface fixes its place)
        *,
        fallback: bool = False,
    ) -> int:
        """Restore a committed step (the newest unless named) into `state`, in place; its step.

        `names` are names or globs of leaves of `state`; all others stay as
        they are.  `rename` leads from the checkpoint's names to the state's: a
        mapping of names or of beginnings of names, or a function.  With
        `fallback`, if that step is damaged, the newest before it is restored
        that is intact and fills every array that may have been written to
        meanwhile; a RuntimeWarning says so.

        Raises:
            NotFoundError: no such step, or a name that fits nothing.
            MismatchError: with `strict`, the two don't fit; nothing was changed.
            CorruptError: bytes aren't what was written, and with `fallback` no
                older step could be taken; the state may have been overwritten
                in part.  The next save writes everything anew.
            AuthenticationError: they aren't sealed with the key; the same.
        """
        self._life.check()
        return self._restores.restore(
            *(state, step),
            names=names,
            rename=rename,
            strict=strict,
            fallback=fallback,
            stacklevel=3,
        )

    def replicated(self, timeout: float | str | timedelta = 0) -> bool:
        """Whether another machine has a copy of this rank's files; waits for that so long."""
        return self._saves.is_replicated(parse_seconds(timeout))

    def steps(self) -> list[int]:
        """All committed steps, ascending."""
        return self._saves.steps()

    def latest(self) -> Checkpoint | None:
        """The newest committed checkpoint."""
        return self._saves.latest()

    def wait(
        self,
        *,
        tier: Literal["nearest", "all"] = "nearest",
        timeout: float | str | timedelta | None = None,
    ) -> None:
        """Wait until no save is in flight; raises if it failed, as `on_error` says.

        With `tier="all"` also until every tier has what is to go up.

        Raises:
            BusyError: that takes longer than `timeout` (seconds, or `"5 min"`); it goes on.
            StorageError: a tier can't be written to, with `on_error="raise"`.
        """
        self._life.check()
        on_error = self._options.on_error
        self._tiers.tell(on_error, stacklevel=3)
        time = TimeLeft(timeout)
        self._saves.reap(wait=True, seconds=time.whole)
        if tier == "all":
            self._tiers.complete(time.left, on_error, stacklevel=3)
            self._tiers.tell(on_error, stacklevel=3)

    def close(self, timeout: float | str | timedelta | None = None) -> None:
        """Wait for a save in flight, then give the root back; safe to call twice.

        Without a `timeout` (seconds, or a text like `"5 min"`) it waits until
        the save has ended, however long that takes; each minute in which the
        save makes no progress, the log says what it waits for.  Then it waits
        for what goes up to other tiers, at most their `linger`, and logs what isn't up.

        Raises:
            BusyError: the save goes on for longer, and holds the lock until it
                has ended; this can be used, and closed, as before.
            CheckpointError: the save failed, with `on_error="raise"`; it is closed.
        """
        time = TimeLeft(timeout)
        if not self._life.is_ours:
            return  # a forked child: the parent's save and lock are not its own
        try:
            self._saves.reap(wait=True, seconds=time.whole)
        finally:
            # Else the wait was cut short: the save goes on, and the lock.
            if self._saves.is_idle:
                self._life.end(time.left)
