"""Tiers: what is saved near goes up, is kept by each tier's own rule, and comes back whole."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt import Every, Keep, Tier
from gpuckpt.commit import open_step, steps
from gpuckpt.errors import CorruptError, StorageError
from gpuckpt.lane import Job, Lane
from gpuckpt.layout import manifest_name
from gpuckpt.manifest import Manifest
from gpuckpt.resources import Resources
from gpuckpt.shipping import copy_step
from gpuckpt.stores import Store
from gpuckpt.stores.memory import MemoryAppender, MemoryStore
from gpuckpt.tierstats import TierStats
from gpuckpt.verify import verify_step
from tests.failing_disks import HOWS, Fault, FaultyStore, refusal
from tests.test_checkpointer import SlowStore
from tests.versions import CHUNK, set_to, state_at, version_of

KEEP = Keep(last=1)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again at once."""
    monkeypatch.setattr("gpuckpt.uploader.PAUSES_SECONDS", (0.001, 0.01))


class Run:
    """A loop over two tiers, near and far."""

    def __init__(
        self, near: Store | None = None, far: Store | None = None, *, tier: Any = (), **options: Any
    ) -> None:
        self.near: Any = near if near is not None else MemoryStore()
        self.far: Any = far if far is not None else MemoryStore()
        self.state = state_at(0)
        tiers = [Tier("near", store=self.near), Tier("far", store=self.far, **dict(tier))]
        defaults: dict[str, Any] = {"memory": "4 MiB", "chunk_nbytes": CHUNK, "keep": KEEP}
        self.ckpt = gpuckpt.Checkpointer(tiers=tiers, **(defaults | options))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for store in (self.near, self.far):
            if isinstance(store, SlowStore):
                store.gate.set()
        self.ckpt.__exit__(kind, error, trace)

    def save(self, step: int, *, up: bool = True) -> gpuckpt.Pending:
        with self.ckpt.update():
            set_to(self.state, step)
        pending = self.ckpt.save(step, self.state)
        pending.result(30)
        self.ckpt.wait(tier="all" if up else "nearest", timeout=30)
        return pending


def outcomes(*pendings: gpuckpt.Pending) -> list[str]:
    return [one.tiers[1].outcome for one in pendings]


def whole(store: Store) -> dict[int, int]:
    """The steps that are there, each checked and with its version; nothing else is there."""
    found, files = {}, set()
    for step in steps(store):
        assert verify_step(store, step, Resources("4 MiB", chunk_nbytes=CHUNK)) == []
        found[step] = version_of(gpuckpt.load("", step, store=store))
        files |= {manifest_name(step), *open_step(store, step).segments}
    assert set(store.names()) - {"lock"} == files
    return found


@contextmanager
def told() -> Iterator[list[str]]:
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(one.message) for one in caught]


# Up


def test_each_tier_has_every_step_and_keeps_what_its_own_rule_says():
    with Run(tier={"keep": Keep(last=3, every=4)}) as run:
        pendings = [run.save(step) for step in range(1, 11)]
        assert whole(run.near) == {10: 10}
        assert whole(run.far) == {step: step for step in (4, 8, 9, 10)}
    assert outcomes(*pendings) == ["durable"] * 10


def test_three_tiers_are_filled_from_the_nearest(tmp_path):
    roots = [tmp_path / name for name in ("a", "b", "c")]
    with gpuckpt.Checkpointer(roots[0], tiers=roots[1:], keep=KEEP) as ckpt:
        pending = ckpt.save(1, state_at(1))
        ckpt.wait(tier="all", timeout=30)
    assert [one.root for one in pending.tiers] == list(map(str, roots))
    for root in roots:
        assert version_of(gpuckpt.load(root)) == 1


def test_a_save_says_of_each_tier_when_it_was_durable_and_what_that_took():
    before = time.time()
    with Run() as run:
        pending = run.save(1)
        near, far = pending.tiers
        assert far.nbytes == run.far.size(open_step(run.far).segments[0])
    assert near.nbytes == pending.stats.written_nbytes
    assert near.durable_at is not None
    assert far.durable_at is not None
    assert before <= near.durable_at <= far.durable_at <= time.time()
    assert (far.files, far.tries, far.buffer_nbytes) == (2, 1, 4 << 20)
    assert 0 < far.seconds < 30
    assert set(far.as_dict()) > {"root", "outcome", "nbytes", "seconds", "durable_at", "error"}


def test_only_what_the_tier_lacks_goes_up_and_older_segments_stay_there_while_they_are_named():
    with Run(codec="delta", tier={"keep": KEEP}) as run:
        first, second = run.save(1), run.save(2)
        assert second.stats.unchanged_nbytes > 0
        assert second.tiers[1].nbytes < first.tiers[1].nbytes / 2
        assert len(open_step(run.far).segments) == 2
        assert whole(run.far) == {2: 2}


def test_a_slow_tier_is_given_the_newest_step_and_holds_up_no_save_nor_more_than_two(caplog):
    run = Run(far=SlowStore(), full_every=1)
    with run, caplog.at_level(logging.INFO):
        pendings = [run.save(1, up=False)]
        assert run.far.reached.wait(30)
        for step in range(2, 8):
            pendings.append(run.save(step, up=False))
            assert whole(run.near) == {1: 1, step: step}
        assert outcomes(*pendings) == ["", *["passed over"] * 5, ""]
        run.far.gate.set()
        run.ckpt.wait(tier="all", timeout=30)
        assert whole(run.far) == {1: 1, 7: 7}
        pendings.append(run.save(8))
        assert whole(run.near) == {8: 8}
    assert outcomes(*pendings) == ["durable", *["passed over"] * 5, "durable", "durable"]
    assert "step 3 doesn't go up to" in caplog.text


def test_a_step_that_is_saved_again_while_it_goes_up_goes_up_again():
    with Run(far=SlowStore(), full_every=1) as run:
        run.save(1, up=False)
        assert run.far.reached.wait(30)
        set_to(run.state, 9)
        run.ckpt.save(1, run.state).result(30)
        run.ckpt.wait()
        run.far.gate.set()
        run.ckpt.wait(tier="all", timeout=30)
        assert whole(run.far) == {1: 9}
        run.save(2)
        assert whole(run.near) == {2: 2}


@pytest.mark.parametrize("every", [3, Every(steps=3)])
def test_of_the_steps_those_go_up_that_are_due_there(every):
    with Run(tier={"every": every}) as run:
        pendings = [run.save(step) for step in (1, 2, 4, 5, 6, 7, 8)]
        assert set(whole(run.far)) == {4, 6}
    assert outcomes(*pendings)[:4] == ["left out", "left out", "durable", "left out"]


def test_a_failed_save_has_ended_in_every_tier():
    near = FaultyStore()
    with Run(near=near) as run:
        run.save(1)
        near.fault = Fault(0, only="append")
        failed = run.ckpt.save(2, run.state)
        with pytest.raises(StorageError):
            run.ckpt.wait()
        after = run.save(3)
    assert [one.outcome for one in failed.tiers] == ["failed", "failed"]
    assert outcomes(after) == ["durable"]


def test_a_run_begins_by_bringing_up_what_the_one_before_left_behind():
    far = FaultyStore()
    with told(), Run(far=far, tier={"linger": 0.1}) as run:
        far.fault = Broken()
        run.save(1, up=False)
        near = run.near
    assert steps(far.inner) == []
    far.fault = None
    with Run(near, far) as run:
        run.ckpt.wait(tier="all", timeout=30)
        assert whole(far.inner) == {1: 1}
        again = far.operations.count("sync the names")
    with Run(near, far) as run:
        run.ckpt.wait(tier="all", timeout=30)
    assert far.operations.count("sync the names") == again + 1, "it has it: nothing goes up"


def test_a_tier_that_is_ahead_is_left_alone_at_the_beginning():
    near, far = MemoryStore(), MemoryStore()
    gpuckpt.save("", state_at(1), 1, store=near)
    gpuckpt.save("", state_at(2), 2, store=far)
    with Run(near, far) as run:
        run.ckpt.wait(tier="all", timeout=30)
        assert whole(far) == {2: 2}
        assert run.ckpt.resume(run.state) == 2


@given(st.lists(st.sampled_from(["offer", "undue", "take", "up", "back", "again"]), max_size=30))
def test_a_lane_holds_two_at_most_the_newest_among_them_and_every_step_ends_once(calls):
    lane, every, flying, due = Lane(), [], None, []
    for at, call in enumerate(calls):
        on_its_way = lane.jobs[0]
        if call in ("offer", "undue"):
            job = Job(Manifest(at, {"dict": []}, ()), TierStats("far", at))
            every.append(job.stats)
            lane.offer(job, due=call == "offer")
            due += [at] if call == "offer" else []
        elif call == "take" and on_its_way is None:
            flying = lane.take()
        elif call == "up" and on_its_way is not None:
            on_its_way.stats.finish("durable")
            lane.let_go()
        elif call == "back":
            lane.put_back()
        elif call == "again" and lane.latest is not None:
            lane.offer_again()
            due += [lane.latest.stats.step]
        assert lane.held().steps == set(lane.steps)
        assert len(lane.steps) <= 2
        assert set(lane.steps) == {one.step for one in every if not one.ended.is_set()} | {
            job.stats.step for job in lane.jobs if job is not None and job.stats not in every
        }
        if lane.jobs[1] is not None:
            assert lane.jobs[1].stats.step == due[-1]
    assert flying is None or flying.stats.step in due


# Back


def both_with(*saved: int, **options: Any) -> tuple[MemoryStore, MemoryStore]:
    """Two tiers with these steps each."""
    with Run(keep=None, **options) as run:
        for step in saved:
            run.save(step)
    return run.near, run.far


def damage(store: MemoryStore, step: int, at: int = 1000) -> None:
    (name,) = [one for one in store.names() if f"{step:012d}." in one and "segment" in one]
    store.files[name][at] ^= 1


def resumed(near: MemoryStore, far: MemoryStore, **options: Any) -> tuple[int, int, list[str]]:
    """The step that is taken, its version, and what was told."""
    with Run(near, far, keep=None) as run:
        with told() as sentences:
            step = run.ckpt.resume(run.state, **options)
        with told() as again:
            loaded = gpuckpt.load(None, tiers=tiers(near, far), **options)
        assert (version_of(loaded), again) == (version_of(run.state), sentences)
        return step, version_of(run.state), sentences


def tiers(*stores: Store) -> list[Tier]:
    return [Tier(str(at), store=store) for at, store in enumerate(stores)]


def test_with_all_whole_the_nearest_is_read_and_no_other():
    near, far = both_with(1, 2)
    for name in [one for one in far.names() if "segment" in one]:
        far.files[name] = bytearray(100)
    assert version_of(gpuckpt.load(None, tiers=tiers(near, far))) == 2


def test_a_new_machine_goes_on_from_the_far_tier_and_its_first_save_needs_nothing_of_that():
    _, far = both_with(1, 2, 3, codec="delta")
    with Run(far=far, codec="delta") as run:
        assert run.ckpt.resume(run.state) == 3
        assert version_of(run.state) == 3
        first = run.save(4)
        assert (first.stats.unchanged_nbytes, first.stats.delta_nbytes) == (0, 0)
        assert whole(run.near) == {4: 4}
        second = run.save(5)
        assert second.stats.unchanged_nbytes > 0
        assert whole(run.near) == {5: 5}
        assert set(whole(far)) == {1, 2, 3, 4, 5}


def mostly_frozen(step: int) -> dict[str, np.ndarray]:
    """A state of which each save after the first writes little."""
    frozen = np.random.default_rng(0).standard_normal(50_000)
    return {"frozen": frozen, "w": np.full(1000, step)}


def is_at(state: dict[str, np.ndarray], step: int) -> bool:
    return all((state[name] == value).all() for name, value in mostly_frozen(step).items())


def save_frozen(ckpt: gpuckpt.Checkpointer, step: int) -> gpuckpt.Pending:
    pending = ckpt.save(step, mostly_frozen(step))
    ckpt.wait(tier="all", timeout=30)
    return pending


def test_a_far_tier_that_is_ahead_is_taken_and_segments_that_are_near_but_rotten_are_not_used():
    near, far = MemoryStore(), MemoryStore()
    with gpuckpt.Checkpointer(tiers=tiers(near, far)) as ckpt:
        save_frozen(ckpt, 1)
        files = {name: bytes(data) for name, data in near.files.items()}
        assert save_frozen(ckpt, 2).stats.unchanged_nbytes == 400_000
    near = MemoryStore(files)
    damage(near, 1, at=5000)
    state = mostly_frozen(0)
    with gpuckpt.Checkpointer(tiers=tiers(near, far), on_error="warn") as ckpt, told():
        assert ckpt.resume(state) == 2
        assert is_at(state, 2)
        assert save_frozen(ckpt, 3).stats.unchanged_nbytes == 0
        assert is_at(gpuckpt.load("", store=near), 3)
        assert save_frozen(ckpt, 4).stats.unchanged_nbytes == 400_000
    assert is_at(gpuckpt.load("", store=far), 4)


class LateStore(SlowStore):
    """A store in which no file is begun before `gate`: nothing of the other is read till then."""

    def create(self, name: str) -> MemoryAppender:
        assert self.gate.wait(30)
        return super().create(name)


def test_a_rotten_segment_that_every_later_step_would_name_is_written_anew():
    near, far = MemoryStore(), LateStore()
    with gpuckpt.Checkpointer(tiers=tiers(near, far), on_error="warn") as ckpt, told():
        ckpt.save(1, mostly_frozen(1)).result(30)
        ckpt.wait()
        damage(near, 1, at=5000)
        far.gate.set()
        ckpt.wait(tier="all", timeout=30)
        assert steps(far) == []
        assert save_frozen(ckpt, 2).stats.unchanged_nbytes == 0
        assert is_at(gpuckpt.load("", store=far), 2)
        assert is_at(gpuckpt.load("", store=near), 2)


@pytest.mark.parametrize("harm", ["damaged", "gone"])
def test_what_the_nearest_has_not_whole_is_taken_from_the_next_and_told(harm):
    near, far = both_with(1, 2, full_every=1)
    if harm == "damaged":
        damage(near, 2)
    else:
        del near.files[open_step(near).segments[0]]
    step, version, sentences = resumed(near, far)
    assert (step, version) == (2, 2)
    (sentence,) = sentences
    assert sentence.startswith("step 2 was taken from memory: ")


def test_a_step_that_no_tier_has_whole_is_an_error_and_with_fallback_the_one_before_is_taken():
    near, far = both_with(1, 2, full_every=1)
    for store in (near, far):
        damage(store, 2)
    damage(near, 1)
    with Run(near, far, keep=None) as run:
        with pytest.raises(CorruptError, match=r"can't be taken from any tier: .*; .*checksum"):
            run.ckpt.resume(run.state)
        with told() as sentences:
            assert run.ckpt.resume(run.state, fallback=True) == 1
        assert version_of(run.state) == 1
    assert sentences[0].startswith("step 1, in place of step 2, was taken from memory: ")


def test_a_step_that_is_named_is_taken_from_whoever_has_it():
    near, far = both_with(1, 2, 3)
    near.files = {name: data for name, data in near.files.items() if "1.manifest" not in name}
    assert version_of(gpuckpt.load(None, 1, tiers=tiers(near, far))) == 1
    with pytest.raises(gpuckpt.NotFoundError, match=r"step 7 isn't there; committed steps: 1, 2"):
        gpuckpt.load(None, 7, tiers=tiers(near, far))


def test_a_name_that_fits_nothing_is_that_and_no_damage():
    near, far = both_with(1)
    with pytest.raises(gpuckpt.NotFoundError, match="nothing"):
        gpuckpt.load(None, names="nothing", tiers=tiers(near, far))


def test_a_tier_that_can_not_be_asked_is_told_of_and_is_no_reason_to_begin_anew():
    near, _ = both_with(1)
    far = FaultyStore()
    far.fault = Broken()
    with told() as sentences:
        assert version_of(gpuckpt.load(None, tiers=tiers(near, far))) == 1
    assert "another tier may have newer steps" in sentences[0]
    with told(), Run(far=far, tier={"linger": 0}) as run, pytest.raises(StorageError):
        run.ckpt.resume(run.state)


def test_forgery_in_the_nearest_is_told_and_not_passed_over(tmp_path):
    near, far = both_with(1)
    key = bytes(32)
    with pytest.raises(gpuckpt.AuthenticationError):
        gpuckpt.load(None, tiers=tiers(near, far), key=key)


def test_sealed_steps_are_sealed_in_every_tier():
    key = bytes(range(32))
    with Run(key=key, codec="delta", keep=None) as run:
        for step in (1, 2, 3):
            run.save(step)
    for tier in (run.near, run.far):
        assert version_of(gpuckpt.load("", store=tier, key=key)) == 3
    assert run.near.files == run.far.files


# Damage isn't spread


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_rotten_segment_stays_where_it_is_and_the_next_save_writes_everything_anew(on_error):
    far = SlowStore()
    with Run(far=far, on_error=on_error) as run:
        run.save(1, up=False)
        assert far.reached.wait(30)
        run.save(2, up=False)
        damage(run.near, 2, at=300)
        far.gate.set()
        with told() as sentences:
            if on_error == "raise":
                with pytest.raises(CorruptError, match="step 2: it doesn't go up to memory"):
                    run.ckpt.wait(tier="all", timeout=30)
            else:
                run.ckpt.wait(tier="all", timeout=30)
        assert ("the next save writes everything anew" in " ".join(sentences)) == (
            on_error == "warn"
        )
        assert whole(far) == {1: 1}
        pending = run.save(3)
        assert pending.stats.unchanged_nbytes == 0
        assert whole(far) == {1: 1, 3: 3}
        assert whole(run.near) == {3: 3}


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_whatever_byte_is_flipped_no_other_bytes_ever_go_up(data):
    flips = STORES[data.draw(st.sampled_from(sorted(STORES)))]
    near = MemoryStore({name: bytes(one) for name, one in flips.files.items()})
    name = data.draw(st.sampled_from(near.names()))
    at = data.draw(st.integers(0, len(near.files[name]) - 1))
    near.files[name][at] ^= data.draw(st.integers(1, 255))
    far = MemoryStore()
    with told(), Run(near, far, on_error="warn") as run:
        run.ckpt.wait(tier="all", timeout=30)
    for copied, found in far.files.items():
        assert bytes(found) == bytes(flips.files[copied]), copied
    assert steps(far) in ([], [3])


STORES: dict[str, MemoryStore] = {}


@pytest.fixture(autouse=True, scope="module")
def _stores() -> None:
    for codec in ("raw", "delta", "zstd"):
        with Run(codec=codec) as run:
            for step in (1, 2, 3):
                run.save(step)
        STORES[codec] = run.near


# Tiers that fail


class Broken(Fault):
    """Strikes every operation."""

    def __init__(self) -> None:
        super().__init__(0)

    def strikes(self, what: str) -> bool:
        self.struck = what
        return True


@pytest.mark.parametrize("how", HOWS)
def test_whatever_operation_of_the_far_tier_fails_the_run_goes_on_and_the_step_goes_up(how):
    struck = set()
    for at in range(1000):
        far = FaultyStore()
        with Run(far=far, tier={"keep": KEEP}) as run:
            run.save(1)
            far.fault = fault = Fault(at, how=how)
            with told() as sentences:
                pending = run.save(2, up=False)
                assert pending.tiers[1].ended.wait(30)
                while run.ckpt._tiers._each[0].lane.steps:
                    time.sleep(0.001)
                run.ckpt.wait()
            far.fault = None
            assert outcomes(pending) == ["durable"]
            failed = [one for one in sentences if "can't be written to" in one]
            assert len(failed) <= 1
            if failed:
                struck.add(fault.struck.partition(" ")[0])
                assert fault.struck in failed[0]
                assert pending.tiers[1].tries >= 1
                assert "faulty is back, and has step 2" in sentences[-1]
            with told():
                run.save(3)
            assert whole(far.inner) == {3: 3}
        if not fault.struck:
            break
    assert struck >= {"create", "append", "sync", "close", "rename", "list"}


def test_a_tier_that_is_away_is_warned_of_once_and_once_when_it_is_back():
    far = FaultyStore()
    with Run(far=far) as run:
        far.fault = Broken()
        with told() as sentences:
            for step in range(1, 6):
                run.save(step, up=False)
                time.sleep(0.02)
            run.ckpt.wait()
            assert set(whole(run.near)) == {5}
            far.fault = None
            run.ckpt.wait(tier="all", timeout=30)
            run.ckpt.wait()
    away, back = sentences
    assert away.startswith("faulty can't be written to: can't ")
    assert "the run goes on" in away
    assert back == "faulty is back, and has step 5"
    assert set(whole(far.inner)) == {5}


def test_who_waits_for_a_tier_that_is_away_is_told():
    far = FaultyStore()
    with told(), Run(far=far, tier={"linger": 0.05}) as run:
        far.fault = Broken()
        run.save(1, up=False)
        with pytest.raises(StorageError, match=r"step 1 isn't in faulty yet: can't"):
            run.ckpt.wait(tier="all", timeout=30)
    with told() as sentences, Run(far=far, on_error="warn", tier={"linger": 0.05}) as run:
        run.save(2, up=False)
        run.ckpt.wait(tier="all", timeout=30)
    assert any("step 2 isn't in faulty yet" in one for one in sentences)


def test_who_waits_for_a_slow_tier_can_stop_waiting():
    with Run(far=SlowStore()) as run:
        run.save(1, up=False)
        with pytest.raises(gpuckpt.BusyError, match="step 1 isn't in memory"):
            run.ckpt.wait(tier="all", timeout=0.05)
        run.far.gate.set()
        run.ckpt.wait(tier="all", timeout=30)


def test_closing_waits_as_long_as_the_tier_lingers_and_says_what_is_not_up(caplog):
    far = SlowStore()
    run = Run(far=far, tier={"linger": 0.1})
    run.save(1, up=False)
    assert far.reached.wait(30)
    run.save(2, up=False)
    threading.Timer(0.3, far.gate.set).start()
    run.ckpt.close()
    assert "memory lacks steps [2], which memory has: it wasn't up after 0.1 s" in caplog.text
    assert steps(far) == []
    with Run(run.near, far) as again:
        again.ckpt.wait(tier="all", timeout=30)
        assert whole(far) == {2: 2}


class Hanging(SlowStore):
    """Hangs for good, whoever asks it to stop."""


def test_a_tier_that_hangs_keeps_its_lock_and_lets_the_run_end(monkeypatch, caplog):
    monkeypatch.setattr("gpuckpt.uploader.WIND_DOWN_SECONDS", 0.05)
    far = Hanging()
    run = Run(far=far, tier={"linger": 0})
    run.save(1, up=False)
    assert far.reached.wait(30)
    run.ckpt.close()
    assert "its storage doesn't answer; it stays locked" in caplog.text
    with pytest.raises(gpuckpt.LockedError):
        gpuckpt.Checkpointer("", store=far)
    gpuckpt.save("", run.state, 2, store=run.near)
    far.gate.set()


def test_a_tier_that_somebody_else_writes_to_is_waited_for():
    far = MemoryStore()
    with far.lock(), told() as sentences, Run(far=far) as run:
        run.save(1, up=False)
        time.sleep(0.1)
        run.ckpt.wait()
        assert steps(far) == []
        far._writer.release()
        run.ckpt.wait(tier="all", timeout=30)
        assert whole(far) == {1: 1}
        run.ckpt.close()
        far._writer.acquire()
    assert "another writer" in sentences[0]


def test_a_full_far_tier_is_tried_again_and_the_near_one_is_bounded_meanwhile():
    class Full(MemoryStore):
        full = True

        def create(self, name: str) -> Any:
            if self.full:
                raise refusal(28, f"create {name}")
            return super().create(name)

    far = Full()
    with told(), Run(far=far) as run:
        for step in range(1, 6):
            run.save(step, up=False)
        assert len(steps(run.near)) <= 2
        far.full = False
        run.ckpt.wait(tier="all", timeout=30)
        assert set(whole(far)) == {5}


def test_whatever_is_raised_in_its_thread_the_next_step_goes_up(monkeypatch):
    """Errors that aren't the storage's, too."""
    calls = 0

    def struck(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise MemoryError
        return copy(*arguments, **options)

    copy = copy_step
    monkeypatch.setattr("gpuckpt.uploader.copy_step", struck)
    with told(), Run() as run:
        pending = run.save(1, up=False)
        assert pending.tiers[1].ended.wait(30)
        assert outcomes(pending) == ["durable"]


def test_a_thread_that_dies_holds_nothing_and_is_told_of(monkeypatch):
    def dies(*_: Any, **__: Any) -> None:
        raise SystemExit

    monkeypatch.setattr("gpuckpt.uploader.copy_step", dies)
    with told() as sentences, Run() as run:
        first = run.save(1, up=False)
        assert first.tiers[1].ended.wait(30)
        second = run.save(2)
        assert whole(run.near) == {2: 2}
    assert outcomes(first, second) == ["failed", "failed"]
    assert "nothing goes up to memory any more" in sentences[0]


def test_a_thread_that_cannot_be_had_is_told_of_and_saves_go_on(monkeypatch):
    start = threading.Thread.start

    def start_but_daemons(thread: threading.Thread) -> None:
        if thread.name == "gpuckpt" and thread.daemon:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_but_daemons)
    with told() as sentences, Run() as run:
        run.save(1)
        assert whole(run.near) == {1: 1}
    assert "can't start new thread" in sentences[0]


# What makes no sense


def test_a_root_that_can_not_be_had_leaves_the_far_one_alone(caplog):
    near, far = MemoryStore(), FaultyStore()
    with near.lock(), pytest.raises(gpuckpt.LockedError):
        Run(near, far)
    assert (far.operations, caplog.text) == ([], "")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (gpuckpt.Checkpointer, "a root is wanted"),
        (lambda: gpuckpt.Checkpointer(tiers="a"), "tiers are a list"),
        (lambda: gpuckpt.Checkpointer("a", tiers=["b", "./a"]), "twice"),
        (lambda: gpuckpt.Checkpointer(tiers=[Tier("a", every=2), "b"]), "gets every step"),
        (lambda: gpuckpt.Checkpointer(tiers=[Tier("a", keep=KEEP)], keep=KEEP), "keep is given"),
        (lambda: Tier("a", every=0), "positive integer"),
        (lambda: Tier("a", every=True), "every is a number"),
        (lambda: Tier("a", every=Every(overhead=0.1)), "no overhead"),
        (lambda: Tier("a", linger="soon"), "a duration"),
        (lambda: Tier(3), "a tier is a root"),  # type: ignore[arg-type]
    ],
)
def test_what_makes_no_sense_is_refused(
    make: Callable[[], object], why: str, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(gpuckpt.InvalidError, match=why):
        make()
    assert list(Path(tmp_path).iterdir()) == []
