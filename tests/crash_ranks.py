"""Histories of roots that several ranks save to, with what was promised at every moment.

The ranks take turns (`tests/relay.py`), so a history is repeatable, byte for
byte.  On a shared root each rank is a client of its own, whose syncs of names
make only its own changes durable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import gpuckpt
from gpuckpt.groups import Group
from gpuckpt.layout import manifest_step
from tests.crash_histories import NOW, Life, loss
from tests.crash_store import CrashStore, DeadError, Image
from tests.relay import Outcome, Relay, RelayGroup, values
from tests.versions import CHUNK, set_to, state_at, version_of

PIECE_COUNT = 1 << 10  # so that the small state's tensors are cut, too


class RanksLife(Life):
    """Processes that save together, and what has been promised so far by any of them."""

    def __init__(self, store: CrashStore, **more: Any) -> None:
        super().__init__(store, **more)
        self._versions: list[int] = []
        self.ended: list[Outcome[None]] = []
        self.wrap: Callable[[RelayGroup], Group] = lambda group: group

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Until the end of the block tokens are this life's, and small tensors are cut."""
        tokens = SimpleNamespace(token_hex=self._token)
        with (
            mock.patch("gpuckpt.save.secrets", tokens),
            mock.patch("gpuckpt.entering.secrets", tokens),
            mock.patch("gpuckpt.options.time", SimpleNamespace(time=lambda: NOW)),
            mock.patch("gpuckpt.spreading.PIECE_COUNT", PIECE_COUNT),
            mock.patch("gpuckpt.sharing.SAMPLE_COUNT", PIECE_COUNT // 8),
            mock.patch("gpuckpt.sharing.TINY_NBYTES", PIECE_COUNT),
        ):
            yield

    def together(
        self,
        size: int,
        work: Callable[[RankRun], object],
        keep: gpuckpt.Keep | None = None,
        stores: list[CrashStore] | None = None,
        **options: Any,
    ) -> None:
        """Let ranks open checkpointers, and each do that with its own."""
        self._keep = keep
        self._versions.clear()
        found = stores or [self.store.of_client(rank) for rank in range(size)]

        def live(group: RelayGroup) -> None:
            defaults: dict[str, Any] = {"memory": "4 MiB", "chunk_nbytes": CHUNK, "codec": "raw"}
            store: Any = found[group.rank]
            group.dies = store.check
            with gpuckpt.Checkpointer(
                "", store=store, keep=keep, group=self.wrap(group), **(defaults | options)
            ) as ckpt:
                work(RankRun(self, ckpt, group.rank, found[group.rank]))

        self.ended = Relay(size).run(live)

    def version_at(self, number: int) -> int:
        """The version that all ranks save with their save of that number."""
        while len(self._versions) <= number:
            self.version += 1
            self._versions.append(self.version)
        return self._versions[number]

    def said_durable(self, step: int, version: int) -> None:
        """A rank was told so."""
        if self.said.get(step, 0) <= version:
            self._say(step, version)


class RankRun:
    """A training loop's use of a checkpointer, on one rank."""

    def __init__(
        self, life: RanksLife, ckpt: gpuckpt.Checkpointer, rank: int, store: CrashStore
    ) -> None:
        self.life, self.ckpt, self.rank, self.store = life, ckpt, rank, store
        self.state = state_at(0)
        self._saves = 0

    def save(self, step: int) -> gpuckpt.Pending:
        """Go on to the next version and save it."""
        version = self.life.version_at(self._saves)
        self._saves += 1
        with self.ckpt.update():
            set_to(self.state, version)
        pending = self.ckpt.save(step, self.state, metrics={"loss": loss(step)})
        pending.result(60)
        self.life.said_durable(step, version)
        self.ckpt.wait()
        return pending

    def resume(self) -> int:
        done = self.ckpt.resume(self.state)
        if done:
            self.life.resumed(done, version_of(self.state))
        return done


def two_ranks_save_and_prune(life: RanksLife) -> None:
    life.together(2, lambda run: [run.save(step) for step in (1, 2, 3)], gpuckpt.Keep(last=1))
    values(life.ended)


def three_ranks_save(life: RanksLife) -> None:
    life.together(3, lambda run: [run.save(step) for step in (1, 2)], gpuckpt.Keep(last=1))
    values(life.ended)


def two_ranks_replace_a_step(life: RanksLife) -> None:
    life.together(2, lambda run: [run.save(1), run.save(1)])
    values(life.ended)


def two_ranks_take_differences(life: RanksLife) -> None:
    keep = gpuckpt.Keep(last=2)
    life.together(
        *(2, lambda run: [run.save(step) for step in (1, 2, 3)], keep), codec="delta", full_every=2
    )
    values(life.ended)


def three_go_on_from_what_two_have_saved(life: RanksLife) -> None:
    life.together(2, lambda run: run.save(1))
    values(life.ended)

    def goes_on(run: RankRun) -> None:
        assert run.resume() == 1
        run.save(2)

    life.together(3, goes_on, gpuckpt.Keep(last=1))
    values(life.ended)


def the_lead_is_killed_at_its_rename_and_all_begin_anew(life: RanksLife) -> None:
    """It dies between the rename of a manifest and the sync of the names."""

    def dies(run: RankRun) -> None:
        run.save(1)
        if run.rank == 0:
            record = life.store.record
            run.store.kills = lambda _: manifest_step(record[-1].new) == 2
        run.save(2)

    life.together(2, dies)
    assert [type(one.error) for one in life.ended].count(DeadError) == 1

    def goes_on(run: RankRun) -> None:
        assert run.resume() == 2
        run.save(3)

    life.together(2, goes_on, gpuckpt.Keep(last=1))
    values(life.ended)


RANK_HISTORIES: tuple[Callable[[RanksLife], None], ...] = (
    two_ranks_save_and_prune,
    three_ranks_save,
    two_ranks_replace_a_step,
    two_ranks_take_differences,
    three_go_on_from_what_two_have_saved,
    the_lead_is_killed_at_its_rename_and_all_begin_anew,
)


def rank_record_of(history: Callable[[RanksLife], None]) -> CrashStore:
    """What a history does to an empty store."""
    life = RanksLife(CrashStore())
    with life.alive():
        history(life)
    return life.store


class NodeStore(CrashStore):
    """The directory of one machine, on the disks that lose their power together."""

    def __init__(self, whole: CrashStore, node: int) -> None:
        self.__dict__.update(whole.of_client(node).__dict__)
        self.root, self._prefix = f"node {node}", f"{node}/"

    def create(self, name: str) -> Any:
        return super().create(self._prefix + name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        super().read_into(self._prefix + name, offset, buffer)

    def size(self, name: str) -> int:
        return super().size(self._prefix + name)

    def rename(self, old: str, new: str) -> None:
        super().rename(self._prefix + old, self._prefix + new)

    def remove(self, name: str) -> None:
        super().remove(self._prefix + name)

    def names(self) -> list[str]:
        begins = len(self._prefix)
        return [name[begins:] for name in super().names() if name.startswith(self._prefix)]


class NodesLife(RanksLife):
    """Two machines with a root each, and two ranks on the first of them."""

    NODES = (0, 0, 1)

    def __init__(self, image: Image = (), **more: Any) -> None:
        super().__init__(CrashStore(image), **more)

    @property
    def stores(self) -> list[CrashStore]:
        return [NodeStore(self.store, node) for node in self.NODES]

    @staticmethod
    def found(image: Image) -> tuple[int, int]:
        """The step that the ranks resume from after a reboot, and its version."""
        life = NodesLife(image, number=9)
        seen = set()
        with life.alive():
            life.together(
                *(3, lambda run: seen.add((run.resume(), version_of(run.state)))),
                stores=life.stores,
            )
        values(life.ended)
        ((step, version),) = seen
        return step, version


def two_nodes_save_and_prune(life: NodesLife) -> None:
    keep = gpuckpt.Keep(last=1)
    life.together(
        *(3, lambda run: [run.save(step) for step in (1, 2, 3)], keep), stores=life.stores
    )
    values(life.ended)
