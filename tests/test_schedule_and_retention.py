"""When a loop saves, and which of its checkpoints stay."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections import Counter
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt import Every, Keep
from gpuckpt.commit import commit, steps
from gpuckpt.manifest import Manifest
from gpuckpt.retention import prune
from gpuckpt.schedule import Schedule
from gpuckpt.stores.memory import MemoryStore


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def due(every: Every, last: int, first: int = 1, stride: int = 1) -> list[int]:
    schedule = Schedule(every, Clock())
    return [step for step in range(first, last + 1, stride) if schedule.is_due(step, None)]


# Steps


def test_a_frequency_of_300_after_100_saves_at_400_and_700():
    assert due(Every(steps=300, after=100), 700) == [400, 700]
    assert due(Every(steps=300, after=100), 1000) == [400, 700, 1000]
    assert due(Every(steps=300), 700) == [300, 600]
    assert due(Every(steps=1), 3) == [1, 2, 3]


@given(st.integers(1, 50), st.integers(0, 120), st.integers(1, 300))
def test_the_steps_that_are_due_lie_apart_by_the_interval(interval, after, last):
    wanted = range(after + interval, last + 1, interval)
    assert due(Every(steps=interval, after=after), last) == list(wanted)


@given(st.integers(1, 50), st.integers(0, 60), st.integers(1, 40))
def test_a_loop_in_strides_saves_at_the_first_step_at_or_past_one_that_is_due(
    interval, after, stride
):
    seen = range(0, 400, stride)
    points = range(after + interval, 400, interval)
    wanted = {min((at for at in seen if at >= point), default=None) for point in points}
    found = due(Every(steps=interval, after=after), 399, first=0, stride=stride)
    assert found == sorted(at for at in wanted if at is not None)


@given(st.integers(1, 30), st.integers(0, 60), st.integers(1, 150), st.integers(1, 10))
def test_a_resumed_run_saves_where_the_uninterrupted_one_would_have(interval, after, cut, stride):
    every = Every(steps=interval, after=after)
    schedule = Schedule(every, Clock())
    schedule.begin(cut, None)
    resumed = [s for s in range(cut + stride, 300, stride) if schedule.is_due(s, None)]
    whole = Schedule(every, Clock())
    visited = [*range(1, cut + 1), *range(cut + stride, 300, stride)]
    assert resumed == [s for s in visited if whole.is_due(s, None) and s > cut]


def test_a_run_that_goes_back_to_an_older_step_saves_again_on_its_way():
    schedule = Schedule(Every(steps=10), Clock())
    assert [s for s in range(1, 31) if schedule.is_due(s, None)] == [10, 20, 30]
    schedule.begin(15, None)
    assert [s for s in range(16, 31) if schedule.is_due(s, None)] == [20, 30]


# Epochs


@pytest.mark.parametrize(
    ("interval", "first", "wanted"),
    [(1, 1, [1, 2, 3, 4, 5]), (2, 1, [2, 4]), (2, 0, [2, 4]), (3, 1, [3]), (2, 4, [4])],
)
def test_an_epoch_is_saved_once_when_it_begins(interval, first, wanted):
    schedule = Schedule(Every(epochs=interval), Clock())
    found = []
    for step in range(60):
        epoch = first + step // 10
        if epoch < 6 and schedule.is_due(step, epoch):
            found.append(epoch)
            assert step % 10 == 0
    assert found == wanted


def test_steps_that_tell_no_epoch_are_not_due_and_forget_none():
    schedule = Schedule(Every(epochs=2), Clock())
    assert [schedule.is_due(at, epoch) for at, epoch in enumerate([1, None, 2, None, 2])] == [
        *(False, False, True),
        *(False, False),
    ]


def test_a_run_resumed_within_an_epoch_does_not_save_it_again():
    schedule = Schedule(Every(epochs=2), Clock())
    schedule.begin(100, 2)
    assert not schedule.is_due(101, 2)
    assert not schedule.is_due(150, 3)
    assert schedule.is_due(200, 4)


# Time


@pytest.mark.parametrize("seconds", [600, 600.0, "10 min", "600s", timedelta(minutes=10)])
def test_a_time_since_the_last_save_is_due_until_one_begins(seconds):
    clock = Clock()
    schedule = Schedule(Every(seconds=seconds), clock)
    clock.now += 599.9
    assert not schedule.is_due(1, None)
    clock.now += 0.2
    assert schedule.is_due(2, None)
    assert schedule.is_due(3, None)
    schedule.saved()
    assert not schedule.is_due(4, None)
    clock.now += 600.1
    assert schedule.is_due(5, None)


@given(st.floats(0.001, 0.5), st.floats(0.001, 100))
def test_an_overhead_keeps_the_cost_of_saving_under_its_share(share, cost):
    clock = Clock()
    schedule = Schedule(Every(overhead=share), clock)
    assert schedule.is_due(1, None)
    schedule.saved()
    schedule.cost(cost)
    clock.now += 0.99 * cost / share
    assert not schedule.is_due(2, None)
    clock.now += 0.02 * cost / share
    assert schedule.is_due(3, None)


def test_whatever_is_due_first_saves():
    clock = Clock()
    schedule = Schedule(Every(steps=10, epochs=1, seconds=60), clock)
    schedule.begin(0, 1)
    assert not schedule.is_due(5, 1)
    assert schedule.is_due(10, 1)
    assert schedule.is_due(11, 2)
    clock.now += 61
    assert schedule.is_due(12, 2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"after": 3},
        {"steps": 0},
        {"steps": 1.5},
        {"steps": 10, "after": -1},
        {"epochs": 0},
        {"overhead": 0},
        {"overhead": 1},
        {"seconds": "soon"},
        {"seconds": -5},
    ],
)
def test_an_every_that_makes_no_sense_is_refused(options):
    with pytest.raises(gpuckpt.InvalidError):
        Every(**options)


def test_a_checkpointer_saves_what_is_due_and_goes_on_after_a_resume():
    store, state = MemoryStore(), {"w": np.zeros(3)}
    every = Every(steps=3, after=1)
    with gpuckpt.Checkpointer("unused", store=store, every=every) as ckpt:
        found = [step for step in range(1, 9) if ckpt.step(step, state)]
    assert found == [4, 7]
    with gpuckpt.Checkpointer("unused", store=store, every=every) as ckpt:
        assert ckpt.resume(state) == 7
        assert [step for step in range(8, 14) if ckpt.step(step, state)] == [10, 13]
    assert steps(store) == [4, 7, 10, 13]


def test_a_checkpointer_without_every_saves_when_told_only():
    with gpuckpt.Checkpointer("unused", store=MemoryStore()) as ckpt:
        assert ckpt.step(1, {"a": 1}) is None
        ckpt.save(2, {"a": 1}).result()
        assert ckpt.steps() == [2]


# Retention


def made(step: int, metrics: dict[str, float] | None = None, created: float = 0.0) -> Manifest:
    return Manifest(step, {"dict": []}, (), metrics=metrics or {}, created=created)


def survivors(keep: Keep, **losses: float) -> set[int]:
    return keep.survivors([made(int(s[1:]), {"loss": loss}) for s, loss in losses.items()])


def test_the_last_and_the_divisible_survive():
    every = [made(step) for step in (0, 5, 10, 15, 20, 23)]
    assert Keep(last=2).survivors(every) == {20, 23}
    assert Keep(last=99).survivors(every) == {0, 5, 10, 15, 20, 23}
    assert Keep(every=10).survivors(every) == {0, 10, 20, 23}
    assert Keep(last=1, every=15).survivors(every) == {0, 15, 23}


def test_the_best_survive_by_their_metric():
    losses = {"s1": 0.5, "s2": 0.1, "s3": 0.9, "s4": 0.3, "s5": 0.7}
    assert survivors(Keep(best=("loss", "min", 2)), **losses) == {2, 4, 5}
    assert survivors(Keep(best=("loss", "max", 2)), **losses) == {3, 5}
    assert survivors(Keep(best=("accuracy", "max", 2)), **losses) == {5}


def test_of_equally_good_ones_the_newer_survives():
    for direction in ("min", "max"):
        keep = Keep(best=("loss", direction, 1))
        assert survivors(keep, s1=0.5, s2=0.5, s3=math.nan) == {2, 3}


@pytest.mark.parametrize("direction", ["min", "max"])
def test_a_checkpoint_with_nan_or_without_the_metric_is_never_among_the_best(direction):
    every = [made(1, {"loss": math.nan}), made(2), made(3, {"loss": 1.0}), made(4, {"acc": 1.0})]
    assert Keep(best=("loss", direction, 4)).survivors(every) == {3, 4}
    infinite = [made(1, {"loss": math.inf}), made(2, {"loss": -math.inf}), made(3)]
    wanted = {2, 3} if direction == "min" else {1, 3}
    assert Keep(best=("loss", direction, 1)).survivors(infinite) == wanted


@pytest.mark.parametrize("age", [7200, "2 h", timedelta(hours=2)])
def test_the_young_survive(age):
    every = [made(step, created=1000.0 * step) for step in range(1, 11)]
    assert Keep(newer_than=age).survivors(every, lambda: 12_000.0) == {5, 6, 7, 8, 9, 10}
    assert Keep(newer_than=age).survivors(every, lambda: 1e9) == {10}


_LOSSES = st.one_of(st.none(), st.floats(allow_nan=True))
_MADE = st.dictionaries(
    st.integers(0, 60), st.tuples(_LOSSES, st.floats(0, 1000)), min_size=1, max_size=12
)
_RULES = st.fixed_dictionaries(
    {},
    optional={
        "last": st.integers(1, 5),
        "every": st.integers(1, 9),
        "best": st.tuples(st.just("loss"), st.sampled_from(("min", "max")), st.integers(1, 4)),
        "newer_than": st.floats(0, 1000),
    },
).filter(bool)


def manifests(steps_made: dict[int, Any]) -> list[Manifest]:
    return [
        made(step, {} if loss is None else {"loss": loss}, created)
        for step, (loss, created) in steps_made.items()
    ]


@given(_MADE, _RULES)
def test_the_union_of_all_rules_survives_and_always_the_newest(steps_made, rules):
    every = manifests(steps_made)
    kept = Keep(**rules).survivors(every, lambda: 1000.0)
    alone = [Keep(**{r: v}).survivors(every, lambda: 1000.0) for r, v in rules.items()]
    assert kept == set().union(*alone)
    assert max(steps_made) in kept
    assert kept <= set(steps_made)


@given(_MADE, st.integers(1, 4), st.sampled_from(("min", "max")))
def test_the_best_and_the_newest_survive_and_no_more(steps_made, count, direction):
    every = manifests(steps_made)
    kept = Keep(best=("loss", direction, count)).survivors(every)
    losses = {m.step: m.metrics["loss"] for m in every if "loss" in m.metrics}
    losses = {step: loss for step, loss in losses.items() if not math.isnan(loss)}
    best = sorted(losses.values(), reverse=direction == "max")[:count]
    assert Counter(best) <= Counter(losses[step] for step in kept & losses.keys())
    assert max(steps_made) in kept
    assert len(kept - {max(steps_made)}) <= count


@settings(max_examples=50)
@given(_MADE, _RULES)
def test_pruning_leaves_exactly_the_survivors_and_pruning_again_does_nothing(steps_made, rules):
    store = MemoryStore()
    for manifest in manifests(steps_made):
        commit(store, manifest, abandon=list)
    rules.pop("newer_than", None)
    keep = Keep(**rules) if rules else None
    kept = keep.survivors(manifests(steps_made)) if keep else set(steps_made)
    assert prune(store, keep) == sorted(set(steps_made) - kept)
    assert steps(store) == sorted(kept)
    assert prune(store, keep) == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"last": 0},
        {"last": 1.0},
        {"every": 0},
        {"best": "loss"},
        {"best": ("loss", "min")},
        {"best": ("loss", "least", 1)},
        {"best": ("loss", "min", 0)},
        {"best": (1, "min", 1)},
        {"newer_than": "yesterday"},
    ],
)
def test_a_keep_that_makes_no_sense_is_refused(options):
    with pytest.raises(gpuckpt.InvalidError):
        Keep(**options)


@pytest.mark.parametrize("keep", [1, True, "last=2", ("loss", "min", 3)])
def test_a_keep_that_is_none_is_refused_at_once(keep):
    for options in ({"keep": keep}, {"tiers": ["above"], "keep": keep}):
        with pytest.raises(
            gpuckpt.InvalidError, match=r"keep is like gpuckpt\.Keep\(last=2\), got"
        ):
            gpuckpt.Checkpointer("", store=MemoryStore(), **options)
    with pytest.raises(gpuckpt.InvalidError, match=r"keep is like"):
        gpuckpt.Tier("above", keep=keep)


def test_a_checkpointer_keeps_what_it_was_told_and_its_data_with_it():
    store, state = MemoryStore(), {"w": np.zeros(100)}
    keep = Keep(last=2, best=("loss", "min", 1))
    with gpuckpt.Checkpointer("unused", store=store, keep=keep) as ckpt:
        for step, loss in enumerate((0.9, 0.2, 0.5, 0.6, math.nan), start=1):
            state["w"][:] = step
            ckpt.save(step, state, {"loss": loss}).result()
        ckpt.wait()
        assert ckpt.steps() == [2, 4, 5]
        for step in (2, 4, 5):
            assert (gpuckpt.load("unused", step, store=store)["w"] == step).all()
    assert sum(name.endswith(".segment") for name in store.names()) == 3


def test_save_prunes_as_it_is_told(tmp_path):
    for step in range(1, 6):
        gpuckpt.save(tmp_path, {"step": step}, step, keep=Keep(last=2, every=3))
    assert [gpuckpt.load(tmp_path, step)["step"] for step in (3, 4, 5)] == [3, 4, 5]
    with pytest.raises(gpuckpt.NotFoundError):
        gpuckpt.load(tmp_path, 2)


class KeepingStore(MemoryStore):
    """Deletes nothing before it may: `reached` says that somebody wants it to."""

    def __init__(self) -> None:
        super().__init__()
        self.may, self.reached = threading.Event(), threading.Event()

    def remove(self, name: str) -> None:
        if name in self.files and not name.endswith(".tmp"):
            self.reached.set()
            assert self.may.wait(30)
        super().remove(name)


def test_a_save_is_durable_before_what_it_replaces_is_deleted():
    store, state = KeepingStore(), {"w": np.zeros(100)}
    every = gpuckpt.Every(steps=1)
    with gpuckpt.Checkpointer(
        "", every=every, keep=Keep(last=1), store=store, when_busy="skip", full_every=1
    ) as ckpt:
        ckpt.save(1, state).result()
        pending = ckpt.save(2, state)
        assert pending.result(30).step == 2
        assert store.reached.wait(30)
        assert ckpt.step(3, state) is None  # nor does it wait
        assert steps(store) == [1, 2]
        threading.Timer(0.05, store.may.set).start()
        assert ckpt.steps() == [2]
        ckpt.wait()
        assert ckpt.step(4, state) is not None


def test_the_next_save_begins_while_the_one_before_still_deletes_and_writes_once_it_has():
    store, state = KeepingStore(), {"w": np.zeros(100)}
    with gpuckpt.Checkpointer("", keep=Keep(last=1), store=store, full_every=1) as ckpt:
        ckpt.save(1, state).result()
        ckpt.save(2, state).result(30)
        assert store.reached.wait(30)
        before = set(store.files)
        pending = ckpt.save(3, state)
        state["w"] += 1.0
        assert not pending.committed.wait(0.05)
        assert set(store.files) == before
        threading.Timer(0.05, store.may.set).start()
        assert pending.result(30).step == 3
        assert ckpt.steps() == [3]
    assert steps(store) == [3]
    assert (gpuckpt.load("", store=store)["w"] == 0).all()
    assert sum(name.endswith(".segment") for name in store.files) == 1


def test_a_save_that_is_refused_while_the_one_before_deletes_leaves_the_root_in_order():
    store, state = KeepingStore(), {"w": np.zeros(100)}
    with gpuckpt.Checkpointer("", keep=Keep(last=1), store=store, full_every=1) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state).result(30)
        assert store.reached.wait(30)
        with pytest.raises(gpuckpt.CheckpointError):
            ckpt.save(3, {"w": object()})
        threading.Timer(0.05, store.may.set).start()
    assert steps(store) == [2]


def test_a_save_that_cannot_begin_hides_no_deletion_from_the_next_one(monkeypatch):
    store, state = KeepingStore(), {"w": np.zeros(100)}
    with gpuckpt.Checkpointer(
        "", keep=Keep(last=1), store=store, full_every=1, on_error="warn"
    ) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state).result(30)
        assert store.reached.wait(30)
        before = set(store.files)
        with monkeypatch.context() as patch:
            patch.setattr("gpuckpt.apart._thread", NoThreads())
            with contextlib.suppress(RuntimeError):
                ckpt.save(3, state)
        assert set(store.files) == before
        threading.Timer(0.1, store.may.set).start()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            pending = ckpt.save(4, state)
        assert any("can't start" in str(one.message) for one in told)
        assert store.may.is_set(), "that deletion is still waited for"
        assert pending.result(30).step == 4
    assert steps(store) == [4]
    assert (gpuckpt.load("", store=store)["w"] == 0).all()


class NoThreads:
    """`_thread` where no more threads can be had."""

    allocate_lock = staticmethod(threading.Lock)

    @staticmethod
    def start_new_thread(*_: object) -> int:
        raise RuntimeError("can't start new thread")


def test_to_close_takes_no_longer_than_it_is_given_while_a_save_still_deletes():
    store, state = KeepingStore(), {"w": np.zeros(100)}
    ckpt = gpuckpt.Checkpointer("", keep=Keep(last=1), store=store, full_every=1)
    for step in (1, 2):
        ckpt.save(step, state).result(30)
    assert store.reached.wait(30)
    with pytest.raises(gpuckpt.CheckpointError):
        ckpt.save(3, {"w": object()})
    with pytest.raises(gpuckpt.BusyError, match="step 2"):
        ckpt.close(timeout=0.05)
    with pytest.raises(gpuckpt.LockedError):
        gpuckpt.Checkpointer("", store=store)
    store.may.set()
    ckpt.close()
    gpuckpt.Checkpointer("", store=store).close()
    assert steps(store) == [2]


def test_what_goes_wrong_with_deleting_is_logged_and_no_save_fails(monkeypatch, caplog):
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("gpuckpt.saving.prune_quietly", broken)
    with gpuckpt.Checkpointer("", store=MemoryStore()) as ckpt:
        assert ckpt.save(1, {"w": np.zeros(3)}).result().step == 1
    assert "step 1 is saved" in caplog.text
