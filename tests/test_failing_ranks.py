"""Each rank fails, dies, or hears nothing, at each place in turn; the others say so and go on."""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

import gpuckpt
from gpuckpt.commit import open_step, steps
from gpuckpt.errors import CheckpointError, RankError, StorageError
from gpuckpt.holdings import FIRST_ASKED
from gpuckpt.layout import manifest_name, manifest_step
from gpuckpt.sharing import Shares
from tests.crash_histories import once
from tests.crash_ranks import NodesLife, NodeStore, RankRun, RanksLife
from tests.crash_store import CrashStore, DeadError, Operation
from tests.often import some
from tests.relay import GathersOnly, Relay, RelayGroup, values
from tests.versions import CHUNK, set_to, state_at, version_of

RANKS = 3
STEPS = range(1, 9)


def refusal(code: int) -> StorageError:
    error = StorageError("can't write: no luck; see to the disk")
    error.errno = code
    return error


class Tries:
    """What the saves of all ranks came to: by attempt, by rank; None for success."""

    def __init__(self) -> None:
        self.found: dict[str, dict[int, BaseException | None]] = {}

    def save(self, run: RankRun, step: int, label: str = "") -> BaseException | None:
        failure: BaseException | None = None
        try:
            run.save(step)
        except CheckpointError as error:
            failure = error
            with contextlib.suppress(CheckpointError):
                run.ckpt.wait()
        self.found.setdefault(label or str(step), {})[run.rank] = failure
        return failure

    def failed(self, label: str) -> set[int]:
        return {rank for rank, error in self.found[label].items() if error is not None}


def whole(store: Any) -> dict[int, int]:
    """Each step with its version, checked bit for bit."""
    return {
        step: version_of(gpuckpt.load("", step, store=store, memory="64 MiB"))
        for step in steps(store)
    }


def left_over(store: Any) -> set[str]:
    named = {manifest_name(step) for step in steps(store)}
    named |= {name for step in steps(store) for name in open_step(store, step).files}
    return set(store.names()) - named


def changing(store: CrashStore) -> int:
    return sum(one.kind != "promise" for one in store.record)


def count_of_operations(rank: int) -> int:
    """How many a rank has in its second save."""
    seen: Counter[int] = Counter()
    life = RanksLife(CrashStore())

    def work(run: RankRun) -> None:
        run.save(1)
        run.store.refuses = lambda one: seen.update([one.client])
        run.save(2)

    with life.alive():
        life.together(RANKS, work, gpuckpt.Keep(last=2))
    values(life.ended)
    return seen[rank]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("failing", range(RANKS))
def test_a_rank_that_fails_at_any_operation_is_named_and_the_next_save_works(failing, code):
    for at in range(count_of_operations(failing)):
        life, tries = RanksLife(CrashStore()), Tries()

        def work(run: RankRun, at: int = at, tries: Tries = tries) -> None:
            tries.save(run, 1)
            if run.rank == failing:
                count = itertools.count()

                def refuses(_: Operation) -> None:
                    if next(count) == at:
                        raise refusal(code)

                run.store.refuses = refuses
            tries.save(run, 2)
            run.store.refuses = lambda _: None
            tries.save(run, 3)

        with life.alive():
            life.together(RANKS, work, gpuckpt.Keep(last=5))
        values(life.ended)
        assert tries.failed("1") == set()
        assert tries.failed("2") in (set(), set(range(RANKS))), at
        for rank, error in tries.found["2"].items():
            if rank == failing or error is None:
                assert error is None or isinstance(error, StorageError)
            else:
                assert isinstance(error, RankError)
                assert error.ranks == (failing,)
                assert "no luck" in str(error)
        assert tries.failed("3") == set(), at
        found = whole(life.store)
        assert found[1] == 1
        assert found[3] == 3
        assert left_over(life.store) == set(), at


@pytest.mark.parametrize("wrap", [lambda group: group, GathersOnly], ids=["own", "gathers only"])
@pytest.mark.parametrize("dying", range(RANKS))
def test_a_rank_that_dies_at_any_operation_is_named_and_others_go_on_anew(dying, wrap):
    for at in range(count_of_operations(dying)):
        life, tries = RanksLife(CrashStore()), Tries()
        life.wrap = wrap

        def work(run: RankRun, at: int = at, tries: Tries = tries) -> None:
            tries.save(run, 1)
            if run.rank == dying:
                count = itertools.count()
                run.store.kills = lambda _: next(count) == at
            tries.save(run, 2)

        with life.alive():
            life.together(RANKS, work, gpuckpt.Keep(last=2))
        for rank in set(range(RANKS)) - {dying}:
            error = tries.found["2"][rank]
            assert isinstance(error, RankError), at
            assert error.ranks == (dying,)
        found = whole(life.store)
        assert found in ({1: 1}, {1: 1, 2: 2})
        anew = RanksLife(life.store, number=2)

        def goes_on(run: RankRun, found: dict[int, int] = found) -> None:
            assert left_over(run.store) == set()
            assert run.resume() == max(found)
            run.save(3)

        with anew.alive():
            anew.together(RANKS, goes_on, gpuckpt.Keep(last=1))
        values(anew.ended)
        assert left_over(life.store) == set()
        assert list(whole(life.store)) == [3]


def gathers_of(stores: Callable[[RanksLife], list[CrashStore]], wrap: Any) -> list[str]:
    life = RanksLife(CrashStore())
    life.wrap = wrap
    with life.alive():
        relay = saves_three_times(life, Tries(), stores(life))
    return relay.gathers


def saves_three_times(
    life: RanksLife, tries: Tries, stores: list[CrashStore], refuses: Any = lambda *_: ()
) -> Relay:
    """Three saves, each tried at most twice more, and the state is another one each time."""
    relay = Relay(RANKS, refuses)

    def live(group: RelayGroup) -> None:
        store: Any = stores[group.rank]
        try:
            ckpt = gpuckpt.Checkpointer(
                *("",), store=store, group=life.wrap(group), memory="4 MiB", chunk_nbytes=CHUNK
            )
        except CheckpointError:
            return
        with ckpt:
            run = RankRun(life, ckpt, group.rank, stores[group.rank])
            for step in STEPS:
                tries.save(run, step)
                # Another layout, so that the ranks have more to say to each other.
                run.state.pop("more", None)
                if step == 1:
                    run.state["more"] = state_at(0)["dense"]

    values(relay.run(live))
    return relay


def as_it_is(group: RelayGroup) -> Any:
    return group


def one_root(life: RanksLife) -> list[CrashStore]:
    return [life.store.of_client(rank) for rank in range(RANKS)]


def two_roots(life: RanksLife) -> list[CrashStore]:
    return [NodeStore(life.store, node) for node in NodesLife.NODES]


@pytest.mark.parametrize(
    ("stores", "wrap"), [(one_root, as_it_is), (one_root, GathersOnly), (two_roots, as_it_is)]
)
@pytest.mark.parametrize("deaf", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_a_gather_that_some_do_not_hear_costs_three_saves_at_most_and_nobody_hangs(
    stores, wrap, deaf
):
    every = gathers_of(stores, wrap)
    assert any(what.startswith(FIRST_ASKED) for what in every)
    assert any("rows of" in what for what in every)
    for at, what in some(enumerate(every)):
        life, tries = RanksLife(CrashStore()), Tries()
        life.wrap = wrap
        with life.alive():
            saves_three_times(
                *(life, tries, stores(life)), lambda number, _, at=at: deaf if number == at else ()
            )
        if len(tries.found.get("1", ())) < RANKS:  # some couldn't open, the others fail
            assert "root" in what or what == "options"
            continue
        failed = [step for step in STEPS if tries.failed(str(step))]
        assert len(failed) <= 3, (what, failed)
        about = what.removesuffix(", as rank 0 decides")
        late = any(about.endswith(f"step {one}") for one in STEPS[-3:])
        assert late or tries.failed(str(STEPS[-1])) == set(), what
        there = whole(life.store) if stores is one_root else {}
        for step, found in tries.found.items():
            promised = [rank for rank, error in found.items() if error is None]
            if promised and stores is one_root:
                assert int(step) in there, (what, step)


def test_the_lead_that_fails_after_its_rename_says_that_it_may_be_there():
    life, tries = RanksLife(CrashStore()), Tries()

    def work(run: RankRun) -> None:
        if run.rank == 0:
            run.store.refuses = once(
                lambda one: one.kind == "sync_names" and manifest_step(latest(life)) == 1
            )
        tries.save(run, 1)
        tries.save(run, 2)

    with life.alive():
        life.together(2, work)
    values(life.ended)
    assert all("may be there" in str(error) for error in tries.found["1"].values())
    assert tries.failed("2") == set()
    assert whole(life.store)[2] == 2


def latest(life: RanksLife) -> str:
    return life.store.record[-1].new


def test_a_root_that_cannot_commit_takes_the_step_back_from_the_others():
    life, tries = NodesLife(), Tries()

    def work(run: RankRun) -> None:
        tries.save(run, 1)
        if run.rank == 2:
            run.store.refuses = once(lambda one: one.name.endswith(".manifest.json.tmp"))
        tries.save(run, 2)
        tries.save(run, 3)

    with life.alive():
        life.together(3, work, gpuckpt.Keep(last=1), stores=life.stores)
    values(life.ended)
    assert tries.failed("2") == {0, 1, 2}
    assert tries.failed("3") == set()
    for store in life.stores[1:]:
        assert steps(store) == [3]
        ranks = open_step(store, 3).parts
        assert len(ranks) == 3
    assert NodesLife.found(life.store.image()) == (3, 3)


def test_an_interrupted_rank_tells_the_others_and_can_go_on():
    life, tries = RanksLife(CrashStore()), Tries()

    class Interrupting:
        """A leaf whose state is asked for while Ctrl-C comes."""

        def state_dict(self) -> Any:
            raise KeyboardInterrupt

        def load_state_dict(self, state: Any) -> None: ...

    def work(run: RankRun) -> None:
        tries.save(run, 1)
        if run.rank == 1:
            with pytest.raises(KeyboardInterrupt):
                run.ckpt.save(2, {"odd": Interrupting()})
            run._saves += 1
        else:
            tries.save(run, 2)
        tries.save(run, 3)

    with life.alive():
        life.together(3, work)
    values(life.ended)
    assert all("KeyboardInterrupt" in str(error) for error in tries.found["2"].values())
    assert tries.failed("2") == {0, 2}
    assert tries.failed("3") == set()


def test_a_rank_that_fails_once_all_is_told_still_says_so():
    """Whatever it is: here a share that one rank alone can't work out."""
    life, tries = RanksLife(CrashStore()), Tries()
    init = Shares.__init__

    def fails(self: Shares, rank: int, *rest: Any) -> None:
        if rank == 1:
            raise gpuckpt.CheckpointError("no luck")
        init(self, rank, *rest)

    def work(run: RankRun) -> None:
        tries.save(run, 1)

    with life.alive(), mock.patch.object(Shares, "__init__", fails):
        life.together(3, work)
    values(life.ended)
    assert all("no luck" in str(error) for error in tries.found["1"].values())


def test_a_rank_at_another_step_is_found_and_all_meet_again():
    life, tries = RanksLife(CrashStore()), Tries()

    def work(run: RankRun) -> None:
        tries.save(run, 1)
        tries.save(run, 3 if run.rank == 1 else 2, "odd")
        tries.save(run, 4)
        tries.save(run, 5)

    with life.alive():
        life.together(3, work)
    values(life.ended)
    assert tries.failed("odd") == {0, 1, 2}
    assert tries.failed("5") == set()
    assert set(whole(life.store)) >= {1, 5}


def test_a_dead_lead_leaves_its_mark_to_the_next_run_which_removes_it():
    life = RanksLife(CrashStore())

    def kills(store: CrashStore) -> None:
        store.kills = lambda one: one.kind == "remove"

    stores = one_root(life)
    kills(stores[0])
    with life.alive():
        life.together(3, lambda run: None, stores=stores)
    assert isinstance(life.ended[0].error, DeadError)
    assert all(isinstance(one.error, RankError) for one in life.ended[1:])
    assert any(name.endswith(".here") for name in life.store.names())
    again = RanksLife(life.store, number=2)
    with again.alive():
        again.together(2, lambda run: run.save(1))
    values(again.ended)
    assert left_over(life.store) == set()


def test_a_tensor_that_one_rank_loses_is_missed_before_the_commit():
    life, tries = RanksLife(CrashStore()), Tries()

    def work(run: RankRun) -> None:
        tries.save(run, 1)
        if run.rank == 1:
            run.state["dense"] = run.state["dense"][:100]
        with pytest.raises(RankError, match="dense"):
            run.ckpt.save(2, run.state).result(60)
        with pytest.raises(RankError, match="dense"):
            run.ckpt.wait()
        run.state["dense"] = state_at(0)["dense"]
        set_to(run.state, 3)
        run.ckpt.save(3, run.state).result(60)

    with life.alive():
        life.together(3, work)
    values(life.ended)
    assert whole(life.store) == {1: 1, 3: 3}
    assert left_over(life.store) == set()
