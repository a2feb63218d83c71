"""Machines with roots of their own, and tiers above that they share."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuckpt
from gpuckpt import Keep, Tier
from gpuckpt.carrier import Carrier
from gpuckpt.commit import open_step, steps
from gpuckpt.convoy import Call
from gpuckpt.groups import Group
from gpuckpt.layout import is_marker, manifest_name, up_name
from gpuckpt.resources import Resources
from gpuckpt.stores import Store
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryAppender, MemoryStore
from gpuckpt.stores.objects import ObjectStore
from gpuckpt.stores.opening import open_store
from gpuckpt.uploader import GivenUpError
from gpuckpt.verify import verify_step
from tests.ranks import run_ranks
from tests.test_tiers import told

SHAPE = (900, 40)
NODES = (0, 0, 1)  # the machine of each rank


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again at once, and others are looked at often."""
    monkeypatch.setattr("gpuckpt.uploader.PAUSES_SECONDS", (0.001, 0.01))
    monkeypatch.setattr("gpuckpt.convoy.LOOKS_SECONDS", (0.001, 0.01))
    monkeypatch.setattr("gpuckpt.carrier.LOOKS_SECONDS", (0.001, 0.02))
    monkeypatch.setattr("gpuckpt.carrier.WANTED_SECONDS", 0.01)


class Rank:
    """A training loop of one of several ranks."""

    def __init__(self, group: Group, near: Any, far: Store, tier: Any, **options: Any) -> None:
        self.group, self.near = group, near
        first, last = (SHAPE[0] * at // group.size for at in (group.rank, group.rank + 1))
        self.rows = np.zeros((last - first, SHAPE[1]), np.float32)
        self.state: dict[str, Any] = {
            "table": gpuckpt.Sharded(self.rows, shape=SHAPE, offset=(first, 0)),
            "w": np.zeros((300, 300)),
            "own": gpuckpt.PerRank({"rank": group.rank}),
        }
        tiers = [Tier("near", store=near), Tier("far", store=far, **tier)]
        defaults: dict[str, Any] = {"memory": "64 MiB", "group_timeout": 20, "keep": Keep(last=1)}
        self.ckpt = gpuckpt.Checkpointer(tiers=tiers, group=group, **(defaults | options))

    def save(self, step: int, *, up: bool = True) -> gpuckpt.Pending:
        with self.ckpt.update():
            self.rows[:], self.state["w"][:] = step, -step
        pending = self.ckpt.save(step, self.state)
        pending.result(20)
        if up:
            self.ckpt.wait(tier="all", timeout=20)
            self.group.barrier(what=f"step {step} is up", timeout=20)
        return pending

    def resume(self) -> int:
        step = self.ckpt.resume(self.state)
        assert (self.rows == step).all()
        assert (self.state["w"] == -step).all()
        return step


class Above(MemoryStore):
    root = "above"


class SlowNames:
    """A store as one machine has it, whose files can't be made until the gate opens."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.reached, self.gate = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def create(self, name: str) -> Any:
        if name.endswith(".segment"):
            self.reached.set()
            assert self.gate.wait(20)
        return self._store.create(name)


def live(
    nodes: Sequence[int],
    disks: Sequence[Store],
    far: Store | Sequence[Store],
    work: Callable[[Rank], Any],
    tier: Any = (),
    **options: Any,
) -> list[Any]:
    """Let a rank on each of these machines do that; what came of it."""

    def one(group: Group) -> Any:
        tiers = far if isinstance(far, Sequence) else [far] * len(nodes)
        rank = Rank(group, disks[nodes[group.rank]], tiers[group.rank], dict(tier), **options)
        with rank.ckpt:
            return work(rank)

    return run_ranks(len(nodes), one)


def whole(store: Store) -> list[int]:
    """The steps that are there, each checked, and nothing else is there."""
    files = {"lock"}
    for step in steps(store):
        assert verify_step(store, step, Resources("64 MiB")) == []
        found = gpuckpt.load("", step, store=store)
        assert (found["table"] == step).all()
        files |= {manifest_name(step), *open_step(store, step).files}
    assert set(store.names()) | {"lock"} == files
    return steps(store)


def test_each_machine_brings_its_files_up_and_each_tier_keeps_what_its_own_rule_says():
    disks, far = [MemoryStore(), MemoryStore()], MemoryStore()
    pendings = live(
        *(NODES, disks, far, lambda rank: [rank.save(step) for step in range(1, 7)]),
        tier={"keep": Keep(last=2, every=3)},
    )
    assert [steps(disk) for disk in disks] == [[6], [6]]
    assert whole(far) == [3, 5, 6]
    assert [one.tiers[1].outcome for one in pendings[0]] == ["durable"] * 6
    assert open_step(far).ranks == 3
    near = open_step(disks[1])
    assert near.absent
    assert set(near.files) == set(open_step(far).files)


# Up


def test_ranks_of_as_many_machines_and_runs_of_other_numbers_go_on_from_the_shared_tier():
    far = MemoryStore()
    done = 0
    for nodes in ((0, 1, 2), (0, 0), (0, 1, 1, 2), (0,), (0, 1)):
        disks = [MemoryStore() for _ in set(nodes)]

        def work(rank: Rank, done: int = done) -> None:
            assert rank.resume() == done
            for step in (done + 1, done + 2):
                rank.save(step)

        live(nodes, disks, far, work, tier={"keep": Keep(last=1)})
        done += 2
        assert whole(far) == [done]
        assert [steps(disk) for disk in disks] == [[done]] * len(disks)


def test_machines_that_are_fast_and_slow_bring_up_the_same_steps_and_hold_them():
    disks = [MemoryStore(), MemoryStore()]
    far = MemoryStore()
    slow = SlowNames(far)
    held: list[list[int]] = []

    def work(rank: Rank) -> list[str]:
        pendings = [rank.save(1, up=False)]
        if rank.group.rank == 2:
            assert slow.reached.wait(20)
        rank.group.barrier(what="reached", timeout=20)
        for step in range(2, 8):
            pendings.append(rank.save(step, up=False))
        rank.ckpt.wait()
        rank.group.barrier(what="saved", timeout=20)
        held.append(steps(rank.near))
        rank.group.barrier(what="looked", timeout=20)
        slow.gate.set()
        rank.ckpt.wait(tier="all", timeout=20)
        rank.group.barrier(what="up", timeout=20)
        return [one.outcome for pending in pendings for one in pending.tiers[1:]]

    found = live(NODES, disks, [far, far, slow], work, full_every=1)
    assert held == [[1, 6, 7]] * 3
    assert found == [["durable", *["passed over"] * 5, "durable"], *[[]] * 2]
    assert whole(far) == [1, 7]


@pytest.mark.parametrize("every", [3, gpuckpt.Every(steps=3)])
def test_rank_0_says_of_which_steps_the_tier_is_to_have_any(every):
    disks, far = [MemoryStore(), MemoryStore()], MemoryStore()
    live(
        *(NODES, disks, far, lambda rank: [rank.save(step) for step in (1, 2, 4, 5, 6, 7)]),
        tier={"every": every},
    )
    assert whole(far) == [4, 6]


def test_closing_waits_until_all_is_up_on_whatever_machine():
    disks, far = [MemoryStore(), MemoryStore()], MemoryStore()
    live(NODES, disks, far, lambda rank: rank.save(1, up=False))
    assert whole(far) == [1]


@pytest.mark.parametrize("slow", range(2))
def test_a_machine_that_does_not_come_is_waited_for_while_closing_and_named(
    slow, monkeypatch, caplog
):
    monkeypatch.setattr("gpuckpt.convoy.LATE_SECONDS", 0.05)
    monkeypatch.setattr("gpuckpt.uploader.WIND_DOWN_SECONDS", 0.1)
    far = MemoryStore()
    fars: list[Any] = [far, far]
    fars[slow] = SlowNames(far)
    disks = [MemoryStore(), MemoryStore()]
    live((0, 1), disks, fars, lambda rank: rank.save(1, up=False), tier={"linger": 0.3})
    assert "lacks steps [1]" in caplog.text
    assert ("the machines of ranks [1]" in caplog.text) == (slow == 1)
    assert steps(far) == []
    fars[slow].gate.set()
    with warnings.catch_warnings(action="ignore"):
        live((0, 1), disks, far, lambda rank: rank.save(2))
    assert steps(far)[-1] == 2


def test_a_run_begins_by_bringing_up_what_the_one_before_left_behind_on_its_machines():
    disks, away = [MemoryStore(), MemoryStore()], MemoryStore()
    live(NODES, disks, away, lambda rank: rank.save(3))
    far = MemoryStore()

    def waits(rank: Rank) -> None:
        rank.ckpt.wait(tier="all", timeout=20)
        rank.group.barrier(what="up", timeout=20)

    live(NODES, disks, far, waits)
    assert whole(far) == [3]
    names = far.names()
    live(NODES, disks, far, waits)
    assert far.names() == names


def test_what_one_machine_alone_has_committed_does_not_go_up_and_the_step_before_does(caplog):
    disks, away = [MemoryStore(), MemoryStore()], MemoryStore()
    live(NODES, disks, away, lambda rank: [rank.save(1), rank.save(2)], keep=Keep(last=2))
    disks[1].remove(manifest_name(2))  # it lost its power just then
    far = MemoryStore()

    def goes_on(rank: Rank) -> None:
        rank.ckpt.wait(tier="all", timeout=20)
        rank.group.barrier(what="up", timeout=20)
        assert rank.resume() == 1
        rank.save(2)

    with warnings.catch_warnings(action="ignore"):
        live(NODES, disks, far, goes_on)
    assert whole(far) == [1, 2]
    assert "the machine of rank 2 doesn't have its files of step 2" in caplog.text


@pytest.mark.parametrize(("nodes", "damaged"), [((0, 0, 1), 1), ((0, 1, 1), 2)])
def test_damage_on_one_machine_is_not_spread_and_all_write_anew(nodes, damaged):
    disks, far = [MemoryStore(), MemoryStore()], MemoryStore()

    def work(rank: Rank) -> None:
        rank.ckpt.save(1, rank.state).result(20)
        if rank.group.rank == damaged:
            name = next(name for name in rank.near.names() if f".r{damaged}.0.segment" in name)
            rank.near.files[name][100] ^= 1
        # The state is the same, so that what is damaged is referred to.
        for step in range(2, 9):
            rank.ckpt.save(step, rank.state).result(20)
            rank.ckpt.wait(tier="all", timeout=20)
            rank.group.barrier(what=f"{step} is up, if it can be", timeout=20)

    with warnings.catch_warnings(action="ignore"):
        live(nodes, disks, far, work, tier={"every": 2}, on_error="warn")
    assert steps(far)[0] > 2
    assert steps(far)[-1] == 8
    for step in steps(far):
        assert verify_step(far, step, Resources("64 MiB")) == []


# Back


def test_a_machine_that_lost_its_disk_has_the_step_from_above_and_others_from_near():
    disks, far = [MemoryStore(), MemoryStore()], MemoryStore()
    live(NODES, disks, far, lambda rank: [rank.save(1), rank.save(2)])
    disks[1].files.clear()
    seen = {}

    def resumes(rank: Rank) -> None:
        with mock.patch.object(far, "read_into", wraps=far.read_into) as reads:
            rank.group.barrier(what="patched", timeout=20)
            assert rank.resume() == 2
            rank.group.barrier(what="resumed", timeout=20)
            seen[rank.group.rank] = {one.args[0] for one in reads.call_args_list}
        rank.save(3)

    live(NODES, disks, far, resumes)
    assert whole(far)[-1] == 3
    own = {name for name in far.names() if ".r2." in name and "000002." in name}
    everything = set().union(*seen.values())
    assert own & everything
    assert not {name for name in everything if ".r0.0.segment" in name}


def test_what_was_not_up_when_a_machine_lost_its_disk_is_gone_for_all(caplog):
    disks, far = [MemoryStore(), MemoryStore()], MemoryStore()
    live(NODES, disks, far, lambda rank: rank.save(1))
    live(NODES, disks, MemoryStore(), lambda rank: [rank.resume(), rank.save(2)])
    disks[1].files.clear()
    with warnings.catch_warnings(action="ignore"):
        live(NODES, disks, far, lambda rank: [rank.resume(), rank.save(2)])
    assert "step 2 isn't taken: ranks [2] don't have it" in caplog.text
    assert whole(far) == [1, 2]


@pytest.mark.parametrize("nodes", [(0,), (0, 0), (0, 2), (0, 2, 3)], ids=str)
def test_fewer_and_other_machines_take_the_newest_step_that_is_whole(nodes):
    """One is gone for good, with what it had not brought up: its rows of step 2 aren't anywhere."""
    disks, far = [MemoryStore() for _ in range(4)], MemoryStore()
    live(NODES, disks, far, lambda rank: rank.save(1))
    live(NODES, disks, MemoryStore(), lambda rank: [rank.resume(), rank.save(2)])

    def goes_on(rank: Rank) -> None:
        assert rank.resume() == 1
        rank.save(2)

    with warnings.catch_warnings(action="ignore"):
        live(nodes, disks, far, goes_on)
    assert whole(far) == [1, 2]
    for node in nodes:
        assert steps(disks[node]) == [2]


def test_what_a_machine_took_with_it_keeps_the_others_from_no_newer_step(caplog):
    disks, far = [MemoryStore() for _ in range(3)], MemoryStore()
    live((0, 1, 2), disks, far, lambda rank: rank.save(1))
    live((0, 1, 2), disks, MemoryStore(), lambda rank: [rank.resume(), rank.save(2)])

    def goes_on(rank: Rank) -> None:
        assert rank.resume() == 1
        rank.ckpt.wait(tier="all", timeout=20)
        assert steps(far) == [1]
        rank.group.barrier(what="looked", timeout=20)
        rank.save(2)

    with told() as found:
        live((0, 1), disks, far, goes_on)
    assert whole(far) == [1, 2]
    assert ".segment is on no machine that is here" in caplog.text
    assert any("step 2 isn't whole, and step 1 was taken in its place" in one for one in found)


def test_a_step_that_is_asked_for_and_is_not_whole_is_refused_by_name():
    disks, far = [MemoryStore(), MemoryStore()], MemoryStore()
    live(NODES, disks, far, lambda rank: rank.save(1))
    live(NODES, disks, MemoryStore(), lambda rank: [rank.resume(), rank.save(2)])

    def asks(rank: Rank) -> None:
        with pytest.raises(gpuckpt.MismatchError, match="table"):
            rank.ckpt.restore(rank.state, 2)

    with warnings.catch_warnings(action="ignore"):
        live((0,), disks, far, asks)


def test_a_rank_whose_own_part_is_not_enough_has_the_rest_from_above():
    """It had rows, and wants columns: of as many ranks as before, on the same machines."""
    disks, far = [MemoryStore(), MemoryStore()], MemoryStore()
    live((0, 1), disks, far, lambda rank: rank.save(1))

    def turns(rank: Rank) -> None:
        columns = np.zeros((SHAPE[0], 20), np.float32)
        offset = (0, 20 * rank.group.rank)
        table = gpuckpt.Sharded(columns, shape=SHAPE, offset=offset)
        assert rank.ckpt.resume(rank.state | {"table": table}) == 1
        assert (columns == 1).all()

    with warnings.catch_warnings(action="ignore"):
        live((0, 1), disks, far, turns)


def test_a_run_that_is_told_to_end_has_its_last_step_up_though_it_would_have_been_left_out():
    disks, far, told = [MemoryStore(), MemoryStore()], Above(), threading.Event()

    def works(rank: Rank) -> tuple[str, ...]:
        rank.save(1)
        rank.group.barrier(what="saved", timeout=20)
        told.set()
        for step in range(2, 100):
            rank.rows[:], rank.state["w"][:] = step, -step
            rank.ckpt.step(step, rank.state)
            if rank.ckpt.should_stop:
                assert rank.ckpt.preemption is not None
                return rank.ckpt.preemption.tiers
        raise AssertionError("it was never told")

    options: dict[str, Any] = {"preempt": told.is_set, "grace": 20}
    found = live(NODES, disks, far, works, {"every": 1000}, **options)
    assert found[0] == ("memory", "above")
    assert whole(far) == steps(disks[0]) == steps(disks[1])


def test_a_neighbour_has_what_was_not_up_and_the_tier_what_both_have_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("GPUCKPT_ADDRESS", "127.0.0.1")
    far = MemoryStore()

    def machines(work: Callable[[Rank], Any]) -> None:
        disks = [LocalStore(tmp_path / str(at) / "root") for at in range(3)]
        tier = {"every": 2}
        with warnings.catch_warnings(action="ignore"):
            live(range(3), disks, far, work, tier, replicas=1)

    def saves(rank: Rank) -> None:
        done = rank.resume()
        for step in (done + 1, done + 2, done + 3):
            rank.save(step)
        assert rank.ckpt.replicated(20)
        rank.group.barrier(what="all is kept", timeout=20)

    machines(saves)
    assert whole(far) == [2]
    shutil.rmtree(tmp_path / "1")
    machines(lambda rank: assert_equal(rank.resume(), 3))
    shutil.rmtree(tmp_path / "1")
    shutil.rmtree(tmp_path / "2")
    machines(lambda rank: assert_equal(rank.resume(), 2))


def test_a_bucket_is_brought_to_by_many_and_published_to_by_one():
    pytest.importorskip("obstore")
    root = f"memory://bucket-{secrets.token_hex(4)}/run"
    disks, fars = [MemoryStore(), MemoryStore()], [open_store(root) for _ in NODES]
    publish, put = ObjectStore.publish, list[tuple[Any, str]]()

    def note(store: ObjectStore, name: str, data: bytes) -> None:
        put.append((store, name))
        publish(store, name, data)

    with mock.patch.object(ObjectStore, "publish", note):
        live(
            *(NODES, disks, fars, lambda rank: [rank.save(step) for step in (1, 2, 3)]),
            tier={"keep": Keep(last=2)},
        )
    assert whole(open_store(root)) == [2, 3]
    assert put == [(fars[0], manifest_name(at)) for at in (1, 2, 3)]
    for disk in disks:
        disk.files.clear()
    live((0,), disks, fars, lambda rank: assert_equal(rank.resume(), 3))


# What one machine does when it is called


class Called:
    """A machine with step 1 on its disk, and a tier in which it is called."""

    def __init__(self, far: MemoryStore | None = None) -> None:
        self.near, self.far = MemoryStore(), far or MemoryStore()
        gpuckpt.save("", {"w": np.arange(100_000.0)}, 1, store=self.near)
        self.far.files["up-00000001"] = bytearray()
        self.call = Call.of("00000001", open_step(self.near))
        self.carrier = Carrier(self.near, Tier("far", store=self.far), "00000001", 2)

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """Until the end of the block it waits to be called."""
        self.carrier.open()
        yield
        self.far.files.pop("up-00000001", None)
        assert self.carrier.close(20) == ""

    def comes(self, name: str) -> bool:
        """Whether there is such a file in the tier, soon."""
        end = time.monotonic() + 20
        while name not in self.far.files and time.monotonic() < end:
            time.sleep(0.001)
        return name in self.far.files


def test_a_machine_answers_once_its_files_are_there():
    one = Called()
    with one.waits():
        one.far.files[one.call.name] = bytearray()
        assert one.comes(one.call.answer(2, here=True))
    (segment,) = open_step(one.near).files
    assert one.far.files[segment] == one.near.files[segment]
    assert steps(one.far) == []


@pytest.mark.parametrize("named", [True, False])
def test_a_file_in_the_tier_is_whole_only_if_a_manifest_there_names_it(named):
    one = Called()
    (segment,) = open_step(one.near).files
    one.far.files[segment] = bytearray(b"begun")
    if named:
        one.far.files[manifest_name(1)] = one.near.files[manifest_name(1)]
    with one.waits():
        one.far.files[one.call.name] = bytearray()
        assert one.comes(one.call.answer(2, here=True))
    assert (one.far.files[segment] == b"begun") == named


@pytest.mark.parametrize("what", ["another step", "another checkpoint", "another run"])
def test_a_machine_says_what_it_does_not_have_and_follows_nobody_else(what):
    one = Called()
    other = {
        "another step": replace(one.call, step=7),
        "another checkpoint": replace(one.call, check="0" * 8),
        "another run": replace(one.call, run="0" * 8),
    }[what]
    with one.waits():
        one.far.files[other.name] = bytearray()
        if what == "another run":
            one.far.files[one.call.name] = bytearray()
            assert one.comes(one.call.answer(2, here=True))
        else:
            assert one.comes(other.answer(2, here=False))
    answers = {other.answer(2, here=here) for here in (True, False)}
    assert len(answers & one.far.files.keys()) == (what != "another run")


def test_a_machine_stops_bringing_what_is_not_called_for_any_more(monkeypatch):
    monkeypatch.setattr("gpuckpt.shipping.BUFFER_NBYTES", 1000)
    one = Called()
    appends, go_on = threading.Event(), threading.Event()

    def append(_: MemoryAppender, __: object) -> None:
        appends.set()
        assert go_on.wait(20)
        time.sleep(0.001)

    with mock.patch.object(MemoryAppender, "append", append), one.waits():
        one.far.files[one.call.name] = bytearray()
        assert appends.wait(20)
        del one.far.files[one.call.name]
        go_on.set()
        assert one.carrier.settle(20)
        left = {name for name in one.far.files if not name.endswith(".segment")}
        assert left == {"up-00000001"}  # and what was begun, which a later try or a sweep removes


def test_a_machine_whose_tier_is_away_tries_again_and_says_so_once():
    one = Called()
    create, count = one.far.create, itertools.count()

    def refuses(name: str) -> Any:
        if next(count) < 3:
            raise gpuckpt.StorageError("can't write: no luck")
        return create(name)

    with mock.patch.object(one.far, "create", refuses), one.waits():
        one.far.files[one.call.name] = bytearray()
        assert one.comes(one.call.answer(2, here=True))
    assert len([said for said in one.carrier.news if "no luck" in said]) == 1


class Clinging(MemoryStore):
    """Refuses once to take a call back."""

    root = "above"
    refused = 0

    def remove(self, name: str) -> None:
        if name.startswith("up-") and name.count("-") == 2 and not name.endswith((".here", ".not")):
            self.refused += name in self.files
            if self.refused == 1 and name in self.files:
                raise gpuckpt.StorageError(f"{name}: a moment's trouble")
        super().remove(name)


def test_a_call_that_could_not_be_taken_back_keeps_no_later_step_down():
    disks, far = [MemoryStore(), MemoryStore()], Clinging()

    def work(rank: Rank) -> list[int]:
        for step in (1, 2, 3):
            rank.save(step)
        return steps(far)

    found = live(NODES, disks, far, work, {"keep": Keep(last=10)})
    assert far.refused
    assert found == [[1, 2, 3]] * len(NODES)
    assert not [name for name in far.files if name.startswith("up-")]


def test_a_machine_that_gives_up_leaves_files_to_who_may_have_them_by_now():
    one = Called()
    create = one.far.create

    def stalls(name: str) -> Any:
        one.carrier._stopped.set()  # it was closed while the storage took its time
        one.far.files[name] = bytearray(b"another's, committed")
        return mock.Mock(wraps=create(f"{name}.own"))

    with mock.patch.object(one.far, "create", stalls), pytest.raises(GivenUpError):
        one.carrier._bring(one.call)
    assert any(bytes(data) == b"another's, committed" for data in one.far.files.values())


@given(st.integers(0, 10**12 - 1), st.binary(min_size=4, max_size=4), st.integers(0, 10**6 - 1))
def test_a_call_is_found_by_its_name_and_is_a_marker(step, check, rank):
    call = Call("0123abcd", step, check.hex())
    assert Call.found([call.name], call.run, rank) == call
    assert Call.found([call.name], "0" * 8, rank) is None
    answers = [call.answer(rank, here=here) for here in (True, False)]
    assert Call.found(answers, call.run, rank) is None
    assert Call.found([call.name, answers[0]], call.run, rank) is None, "answered"
    assert Call.found([call.name, answers[1]], call.run, rank + 1) == call
    assert all(map(is_marker, [call.name, *answers, up_name(call.run)]))


def assert_equal(one: object, other: object) -> None:
    assert one == other
