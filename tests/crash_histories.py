"""Histories of a root, from its first save on, each with what it promised at every moment.

Every save is of another version of one state, which is known from its number
alone.  A history is repeatable, byte for byte: tokens are counted and the clock
stands still.  So what one reboot finds is often what another one found.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import gpuckpt
from gpuckpt.layout import manifest_step
from gpuckpt.manifest import Manifest
from gpuckpt.merging import merge_stores
from gpuckpt.pending import Checkpoint, Pending
from gpuckpt.replicas.copies import bring, drop
from gpuckpt.replicas.shelf import every_item, parts_of
from gpuckpt.resources import Resources
from gpuckpt.save import save_snapshot
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.tierstats import TierStats
from tests.crash_store import CrashStore, DeadError, Operation, Promise
from tests.versions import CHUNK, FROZEN, State, set_to, state_at, version_of

NOW = 1_700_000_000.0


def expected(step: int) -> Manifest:
    return Manifest(step, {"dict": []}, (), metrics={"loss": loss(step)}, created=NOW)


def loss(step: int) -> float:
    return float(step * 5 % 7)


class Life:
    """A process that saves to a store, and what has been promised so far.

    `number` makes its tokens its own.  `begun` is what others promised before.
    """

    def __init__(self, store: CrashStore, number: int = 1, begun: Promise | None = None) -> None:
        self.store, self.number = store, number
        self.version = 100 * (number - 1)
        self.said = dict(begun or ())
        self._tokens = 0
        self._saving: dict[int, int] = {}
        self._keep: gpuckpt.Keep | None = None
        self._up = False
        self.stats: list[gpuckpt.Stats] = []

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Until the end of the block tokens are this life's, and the end of a save is a promise."""
        finish = Pending.finish

        def finish_and_say(
            pending: Pending, result: Checkpoint | None, failure: BaseException | None
        ) -> None:
            if failure is None and not self._up:
                self._say(pending.step, self._saving[pending.step])
            finish(pending, result, failure)

        with (
            mock.patch("gpuckpt.save.secrets", SimpleNamespace(token_hex=self._token)),
            mock.patch("gpuckpt.options.time", SimpleNamespace(time=lambda: NOW)),
            mock.patch.object(Pending, "finish", finish_and_say),
        ):
            yield

    @contextlib.contextmanager
    def open(self, keep: gpuckpt.Keep | None = None, **options: Any) -> Iterator[Run]:
        """A checkpointer of this life; its state is resumed, if there is something to resume."""
        self._keep = keep
        defaults: dict[str, Any] = {"memory": "4 MiB", "chunk_nbytes": CHUNK, "codec": "raw"}
        store: Any = self.store
        with gpuckpt.Checkpointer("", store=store, keep=keep, **(defaults | options)) as ckpt:
            yield Run(self, ckpt)

    def begins(self, keep: gpuckpt.Keep | None) -> None:
        """What is promised is what comes up to the store, not what is saved elsewhere."""
        self._keep, self._up = keep, True

    def is_durable(self, step: int) -> None:
        """A step has come up."""
        self._say(step, self._saving[step])

    def alone(self, step: int, keep: gpuckpt.Keep | None = None) -> None:
        """Save without a checkpointer."""
        self._keep = keep
        store: Any = self.store
        gpuckpt.save("", self.next(step), step, store=store, codec="raw", keep=keep)

    def next(self, step: int) -> State:
        """The next version of the state, which is about to be saved as `step`."""
        self.version += 1
        self._saving[step] = self.version
        return state_at(self.version)

    def resumed(self, step: int, version: int) -> None:
        """What somebody went on from is promised, too, whoever committed it."""
        self.said[step] = version
        self.store.promise(frozenset(self.said.items()))

    def _say(self, step: int, version: int) -> None:
        self.said[step] = version
        kept = set(self.said)
        if self._keep is not None:
            facts = [expected(one) for one in self.said]
            kept = self._keep.survivors(facts, lambda: NOW) | {step}
        self.said = {one: self.said[one] for one in kept}
        self.store.promise(frozenset(self.said.items()))

    def _token(self, _: int) -> str:
        self._tokens += 1
        return f"{self.number:02x}{self._tokens:06x}"


class Run:
    """A training loop's use of a checkpointer."""

    def __init__(self, life: Life, ckpt: gpuckpt.Checkpointer) -> None:
        self.life, self.ckpt, self.state = life, ckpt, state_at(0)

    def save(self, step: int, *, wait: bool = True) -> gpuckpt.Pending:
        """Go on to the next version and save it; without `wait` only until it is durable."""
        self.life.next(step)
        with self.ckpt.update():
            set_to(self.state, self.life.version)
        pending = self.ckpt.save(step, self.state, metrics={"loss": loss(step)})
        pending.result(60)
        if wait:
            self.ckpt.wait()
        self.life.stats.append(pending.stats)
        return pending

    def resume(self, step: int | None = None) -> int:
        """Go on from the newest, or from `step`; its number, or 0."""
        done = self.ckpt.resume(self.state) if step is None else self.ckpt.restore(self.state, step)
        if done:
            self.life.resumed(done, version_of(self.state))
        return done


def saves_alone(life: Life) -> None:
    life.alone(1)
    life.alone(2)
    life.alone(3, gpuckpt.Keep(last=1))


def replaces_a_step_alone(life: Life) -> None:
    life.alone(1)
    life.alone(1)


def refers_to_what_was_written_and_rewrites_it(life: Life) -> None:
    """What hasn't changed stays in a segment until that is mostly out of use."""
    with life.open(gpuckpt.Keep(last=1)) as run:
        for step in (1, 2, 3):
            run.save(step)
    frozen = FROZEN.nbytes
    assert [one.unchanged_nbytes for one in life.stats] == [0, frozen, 0]
    assert all(one.derived_nbytes for one in life.stats)


def takes_differences(life: Life) -> None:
    """Chains of them, which end and begin anew; older segments are parts of newer checkpoints."""
    with life.open(gpuckpt.Keep(last=2), codec="delta", full_every=2, snapshot="copy") as run:
        for step in range(1, 5):
            run.save(step)
    assert [one.delta_nbytes > 0 for one in life.stats] == [False, True, False, True]
    assert all(one.derived_nbytes for one in life.stats)


def saves_as_soon_as_it_may(life: Life) -> None:
    """Each save is asked for as soon as the one before is durable: what it replaces is still there.

    The last is killed while what it replaces is deleted.
    """
    with life.open(gpuckpt.Keep(last=1), codec="delta", snapshot="hold") as run:
        for step in (1, 2, 3):
            run.save(step, wait=False)


def replaces_a_step_that_it_refers_to(life: Life) -> None:
    """Set back to an older step, and then that one again, whose segments are referred to."""
    with life.open(gpuckpt.Keep(last=2), codec="delta") as run:
        run.save(1)
        run.save(2)
        run.resume(1)
        run.save(2)
        run.save(2)


def deletes_many_at_once(life: Life) -> None:
    with life.open(codec="delta") as run:
        for step in (1, 2, 3):
            run.save(step)
    with life.open(gpuckpt.Keep(last=1), full_every=1) as run:
        run.save(4)


def keeps_some_that_others_refer_to(life: Life) -> None:
    with life.open(gpuckpt.Keep(every=3, best=("loss", "min", 1)), codec="delta") as run:
        for step in range(1, 6):
            run.save(step)


def goes_on_from_what_a_killed_process_left_visible(life: Life) -> None:
    """It died between the rename of a manifest and the sync of the names."""
    with killed(life, lambda done: manifest_step(done.new) == 2), life.open() as run:
        run.save(1)
        run.save(2)
    with life.open(gpuckpt.Keep(last=2)) as run:
        assert run.resume() == 2
        run.save(3)


def goes_on_from_what_a_killed_process_was_deleting(life: Life) -> None:
    """It died between the removal of a manifest and the sync of the names."""
    died = killed(life, lambda done: done.kind == "remove" and manifest_step(done.name) == 1)
    with died, life.open(gpuckpt.Keep(last=1), full_every=1) as run:
        run.save(1)
        run.save(2)
    with life.open(gpuckpt.Keep(last=1)) as run:
        assert run.resume() == 2
        run.save(3)


def writes_several_segments(life: Life) -> None:
    several = mock.patch(
        "gpuckpt.saving.save_snapshot", partial(save_snapshot, segment_nbytes=100_000)
    )
    with several, life.open(gpuckpt.Keep(last=1)) as run:
        run.save(1)
        run.save(2)
    assert sum(name.endswith(".segment") for name in life.store.names()) == 3


def saves_after_a_failed_one(life: Life) -> None:
    """The disk refuses bytes, then a sync of them, then one of the names, before and after it."""
    with life.open(gpuckpt.Keep(last=1), codec="delta", on_error="raise") as run:
        run.save(1)
        for kind, at in (("append", 2), ("sync", 0), ("sync_names", 0), ("sync_names", 1)):
            life.store.refuses = once(lambda one, kind=kind: one.kind == kind, at)  # type: ignore[misc]
            with contextlib.suppress(gpuckpt.StorageError):
                run.save(2)
            with contextlib.suppress(gpuckpt.StorageError):
                run.ckpt.wait()
        run.save(2)


def merges_what_was_saved_elsewhere(life: Life) -> None:
    """Some steps, one after the other, from a root of their own."""
    store, life.store = life.store, CrashStore()
    for step in range(1, 6):
        life.alone(step)
    elsewhere, life.store = life.store, store
    said, life.said = life.said, {}
    for step in said:
        merge_stores([elsewhere], store, step, Resources("64 MiB"))
        life.resumed(step, said[step])


@contextlib.contextmanager
def uploading(
    life: Life, near: MemoryStore, keep: gpuckpt.Keep | None = None
) -> Iterator[TieredRun]:
    """Saves go up from `near` to the life's store; what is durable there is promised."""
    finish = TierStats.finish

    def finish_and_say(stats: TierStats, outcome: Any, error: Any = None) -> None:
        if outcome == "durable" and stats.root == life.store.root:
            life.is_durable(stats.step)
        finish(stats, outcome, error)

    life.begins(keep)
    tiers = [gpuckpt.Tier("near", store=near), gpuckpt.Tier("far", store=life.store, keep=keep)]
    options: dict[str, Any] = {"memory": "4 MiB", "chunk_nbytes": CHUNK, "on_error": "warn"}
    with (
        mock.patch.object(TierStats, "finish", finish_and_say),
        mock.patch("gpuckpt.uploader.PAUSES_SECONDS", (0.001, 0.01)),
        warnings.catch_warnings(action="ignore"),
        gpuckpt.Checkpointer(tiers=tiers, keep=gpuckpt.Keep(last=2), **options) as ckpt,
    ):
        yield TieredRun(life, ckpt)


class TieredRun(Run):
    """Waits for the upper tier, too, so that a history is repeatable."""

    def save(self, step: int, *, wait: bool = True) -> gpuckpt.Pending:
        pending = super().save(step, wait=False)
        if wait:
            self.ckpt.wait(tier="all", timeout=60)
        return pending


def goes_up(life: Life) -> None:
    """Segments of earlier steps are named by later ones, and go when no manifest names them."""
    with uploading(life, MemoryStore(), gpuckpt.Keep(last=1)) as run:
        for step in (1, 2, 3, 4):
            run.save(step)


def goes_up_after_a_kill_that_left_the_last_one_visible(life: Life) -> None:
    """It died between the rename of a manifest and the sync of the names."""
    near = MemoryStore()
    with uploading(life, near) as run:
        run.save(1)
        life.store.kills = lambda _: manifest_step(life.store.record[-1].new) == 2
        run.save(2)
    life.store.revive()
    with uploading(life, near, gpuckpt.Keep(last=2)) as run:
        run.ckpt.wait(tier="all", timeout=60)
        life.is_durable(2)
        assert run.resume() == 2
        for step in (3, 4):
            run.save(step)


def copies_what_another_has(life: Life) -> None:
    """As ranks keep copies of each other's files."""
    life.begins(gpuckpt.Keep(last=1))
    near, room = MemoryStore(), memoryview(bytearray(50_000))
    for step in (1, 2, 3):
        gpuckpt.save("", life.next(step), step, store=near, codec="raw", keep=gpuckpt.Keep(last=1))
        bring(life.store, every_item(near), lambda item: parts_of(near, item, room))
        life.is_durable(step)
        drop(life.store, [name for name in life.store.names() if name not in near.names()])


@contextlib.contextmanager
def killed(life: Life, after: Callable[[Operation], bool]) -> Iterator[None]:
    """The process in the block dies before what follows such an operation; then another begins."""
    store = life.store

    def kills(_: Operation) -> bool:
        return bool(store.record) and after(store.record[-1])

    store.kills = kills
    with contextlib.suppress(DeadError):
        yield
    store.revive()


def once(which: Callable[[Operation], bool], at: int = 0) -> Callable[[Operation], object]:
    """The disk refuses one such operation, of which so many come before it."""
    count = itertools.count()

    def refuses(operation: Operation) -> None:
        if which(operation) and next(count) == at:
            raise gpuckpt.StorageError(f"can't {operation.kind}: input/output error")

    return refuses


# In these every save is committed, unless its process is killed.
HISTORIES: tuple[Callable[[Life], None], ...] = (
    saves_alone,
    replaces_a_step_alone,
    refers_to_what_was_written_and_rewrites_it,
    takes_differences,
    saves_as_soon_as_it_may,
    replaces_a_step_that_it_refers_to,
    deletes_many_at_once,
    keeps_some_that_others_refer_to,
    goes_on_from_what_a_killed_process_left_visible,
    goes_on_from_what_a_killed_process_was_deleting,
    writes_several_segments,
    merges_what_was_saved_elsewhere,
    goes_up,
    copies_what_another_has,
    goes_up_after_a_kill_that_left_the_last_one_visible,
)

ALL = (*HISTORIES, saves_after_a_failed_one)


def record_of(history: Callable[[Life], None]) -> list[Operation]:
    """What a history does to an empty store."""
    life = Life(CrashStore())
    with life.alive():
        history(life)
    return life.store.record
