"""A run that is told to end saves what there is time for, and says so."""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuckpt
from gpuckpt import Every
from gpuckpt.background import BackgroundSave
from gpuckpt.deadline import MARGIN, Taken, Took, Way, choose, remaining, turn
from gpuckpt.effort import AUTO, RAW
from gpuckpt.journal import read_journal
from gpuckpt.notice import SAME_SECONDS, Notice
from gpuckpt.resources import Resources
from gpuckpt.save import DELTA
from gpuckpt.stats import Stats
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryAppender, MemoryStore
from gpuckpt.verify import verify_step
from tests.test_checkpointer import FullStore
from tests.test_governor import Clock
from tests.versions import set_to, state_at, version_of

# Which way


seconds = st.floats(0, 1e4)
ways = st.lists(
    st.builds(Way, st.sampled_from([DELTA, AUTO, RAW]), st.none() | seconds), min_size=1, max_size=4
)


@given(ways, st.floats(-1e3, 1e4))
def test_no_way_is_taken_that_should_be_late_if_another_should_be_in_time(ways, left):
    way = choose(ways, left)
    known = [one.seconds for one in ways if one.seconds is not None]
    if known:
        assert way.seconds is not None
        assert way.seconds <= left or way.seconds == min(known)
    assert way in ways


@pytest.mark.parametrize(
    ("left", "codec"), [(30 * MARGIN, DELTA), (29 * MARGIN, AUTO), (11, RAW), (9, RAW), (-1, RAW)]
)
def test_the_way_with_the_fewest_bytes_is_taken_that_is_in_time_for_sure(left, codec):
    ways = [Way(DELTA, 30), Way(AUTO, 20), Way(RAW, 10)]
    assert choose(ways, left).codec == codec


def test_fewer_bytes_are_taken_to_a_slow_disk_though_nothing_is_in_time():
    assert choose([Way(DELTA, 20), Way(AUTO, 60), Way(RAW, 80)], 10).codec == DELTA


def test_of_two_that_are_late_by_the_same_the_one_with_less_work_is_taken():
    assert choose([Way(DELTA, 30), Way(AUTO, 20), Way(RAW, 20)], 10).codec == RAW


def test_while_nothing_is_known_it_is_encoded_as_long_as_the_disk_has_work():
    assert choose([Way(DELTA), Way(AUTO), Way(RAW)], 30).codec == AUTO
    assert choose([Way(RAW)], 30).codec == RAW


def stats_of(background: float, **facts: Any) -> Stats:
    return Stats(1, background_seconds=background, raw_nbytes=100 << 20, **facts)


def test_what_encoders_take_is_known_to_be_saved_by_leaving_chunks_as_they_are():
    taken = Taken()
    facts = {"stall_seconds": 1.5, "wait_seconds": 0.5, "filter_seconds": 4.0}
    taken.note("zstd", stats_of(20, starved_seconds=18, written_nbytes=80 << 20, **facts))
    asked, auto, raw = taken.ways("zstd", 2)
    assert asked == Way("zstd", 21)
    assert (auto.codec, raw.codec) == (AUTO, RAW)
    assert auto.seconds == raw.seconds == pytest.approx(1 + 2 * 100 / 80)


def test_what_a_slow_disk_takes_is_known_to_grow_with_the_bytes():
    taken = Taken()
    facts = {"unchanged_nbytes": 40 << 20, "derived_nbytes": 10 << 20}
    taken.note(DELTA, stats_of(20, starved_seconds=1, written_nbytes=10 << 20, **facts))
    asked, _, raw = taken.ways(DELTA, 2)
    assert asked.seconds == 20
    assert raw.seconds == 19 * 5


def test_the_slowest_of_the_last_saves_counts_and_each_codec_has_its_own():
    taken = Taken()
    for background in (90, 4, 6, 5):
        taken.note(AUTO, stats_of(background))
    taken.note(RAW, stats_of(3))
    assert taken.ways(AUTO, 1) == (Way(AUTO, 6), Way(RAW, 3))
    assert taken.ways(RAW, 1) == (Way(RAW, 3),)
    assert Taken().ways(AUTO, 1) == (Way(AUTO), Way(RAW))


# The save in flight


@given(st.none() | seconds, st.none() | seconds, st.floats(-1e3, 1e4))
def test_a_save_is_given_up_only_if_it_should_be_late_and_the_new_one_sooner(in_flight, new, left):
    given_up = turn(left, in_flight, new) == "give up"
    if in_flight is None or new is None:
        assert not given_up
    else:
        assert given_up == (in_flight > left and new < in_flight)


@given(st.floats(0.01, 1e3), st.floats(0.01, 1), st.none() | st.floats(0, 1e3), seconds)
def test_what_is_left_of_a_save_is_told_by_how_far_it_has_come(elapsed, share, total, commit):
    left = remaining(elapsed, share, total, commit)
    assert left is not None
    assert left >= commit
    assert math.isclose(
        left,
        max(elapsed / share - elapsed + commit, elapsed - total if total is not None else 0),
        abs_tol=1e-6,
    )


def test_before_anything_has_come_to_the_disk_what_is_left_is_told_by_those_before():
    assert remaining(2, 0, 10, 1) == 8
    assert remaining(13, 0, 10, 1) == 3
    assert remaining(2, 0, None, 0) is None


# Signals and functions


@contextlib.contextmanager
def handled(number: int = signal.SIGUSR1) -> Iterator[list[int]]:
    """A handler that was there before; the signals that reached it."""
    got: list[int] = []

    def handler(number: int, _: object) -> None:
        got.append(number)

    before = signal.signal(number, handler)
    try:
        yield got
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


def test_the_first_signal_is_taken_and_one_that_comes_again_goes_to_the_earlier_handler():
    clock = Clock()
    with handled() as got, (notice := Notice(signal.SIGUSR1, "30 s", clock)).watched():
        assert notice.expected
        assert not notice.announced
        signal.raise_signal(signal.SIGUSR1)
        assert (notice.announced, notice.by, notice.left, got) == (True, "SIGUSR1", 30, [])
        clock.now += 0.5 * SAME_SECONDS
        signal.raise_signal(signal.SIGUSR1)
        assert (notice.left, got) == (29.5, [])
        clock.now += 0.5 * SAME_SECONDS
        signal.raise_signal(signal.SIGUSR1)
        assert (notice.left, got) == (29, [signal.SIGUSR1])


def test_another_signal_does_not_give_more_time():
    clock = Clock()
    with handled() as got, handled(signal.SIGTERM), (notice := Notice(True, 30, clock)).watched():
        signal.raise_signal(signal.SIGUSR1)
        clock.now += 20
        signal.raise_signal(signal.SIGTERM)
        assert (notice.by, notice.left, got) == ("SIGUSR1", 10, [])


def test_two_checkpointers_of_a_process_both_hear_of_it():
    clock = Clock()
    with handled() as got:
        notices = [Notice(signal.SIGUSR1, 30, clock) for _ in range(2)]
        with notices[0].watched(), notices[1].watched():
            signal.raise_signal(signal.SIGUSR1)
            assert [notice.announced for notice in notices] == [True, True]
            assert got == []
            clock.now += SAME_SECONDS
            signal.raise_signal(signal.SIGUSR1)
            assert got == [signal.SIGUSR1]


@pytest.mark.parametrize("first_closed", [0, 1])
def test_of_two_checkpointers_either_may_be_closed_first(first_closed):
    with handled() as got:
        notices = [Notice(signal.SIGUSR1, 30) for _ in range(2)]
        blocks = [notice.watched() for notice in notices]
        for block in blocks:
            block.__enter__()
        blocks[first_closed].__exit__(None, None, None)
        signal.raise_signal(signal.SIGUSR1)
        assert notices[1 - first_closed].announced
        assert not notices[first_closed].announced
        assert got == []
        blocks[1 - first_closed].__exit__(None, None, None)
        signal.raise_signal(signal.SIGUSR1)
        assert got == [signal.SIGUSR1]


def test_a_handler_that_was_set_meanwhile_stays_and_may_pass_on_to_ours():
    later: list[int] = []
    with handled() as got:
        with (notice := Notice(signal.SIGUSR1, 30)).watched():
            ours: Any = signal.getsignal(signal.SIGUSR1)

            def handler(number: int, frame: Any) -> None:
                later.append(number)
                ours(number, frame)

            signal.signal(signal.SIGUSR1, handler)
            signal.raise_signal(signal.SIGUSR1)
            assert (notice.announced, later, got) == (True, [signal.SIGUSR1], [])
        assert signal.getsignal(signal.SIGUSR1) is handler
        signal.raise_signal(signal.SIGUSR1)
        assert (len(later), got) == (2, [signal.SIGUSR1])
        signal.signal(signal.SIGUSR1, notice.before(signal.SIGUSR1))


def test_handlers_are_put_back_when_the_loop_fails_and_when_the_root_cannot_be_had(tmp_path):
    with (
        handled() as got,
        contextlib.suppress(ZeroDivisionError),
        gpuckpt.Checkpointer(tmp_path, preempt=signal.SIGUSR1),
    ):
        with pytest.raises(gpuckpt.LockedError):
            gpuckpt.Checkpointer(tmp_path, preempt=signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert got == []
        raise ZeroDivisionError
    with handled(), pytest.raises(gpuckpt.InvalidError, match="SIGKILL can't be caught"):
        gpuckpt.Checkpointer(tmp_path, preempt=[signal.SIGUSR1, signal.SIGKILL])
    gpuckpt.Checkpointer(tmp_path).close()  # and the lock was given back


def test_signals_are_refused_outside_the_main_thread_and_functions_are_not(tmp_path):
    errors: list[Exception] = []

    def run() -> None:
        with gpuckpt.Checkpointer(tmp_path, preempt=lambda: True) as ckpt:
            ckpt.step(1, {"w": np.ones(3)})
            assert ckpt.should_stop
        try:
            gpuckpt.Checkpointer(tmp_path, preempt=True)
        except gpuckpt.InvalidError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "main thread" in str(*errors)


def test_a_handler_that_could_not_be_put_back_is_left_alone(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    with pytest.raises(gpuckpt.InvalidError, match="SIGUSR1 has a handler that isn't Python's"):
        Notice(signal.SIGUSR1, 30).watched().__enter__()


@pytest.mark.parametrize("preempt", ["SIGTERM", 1.5, [True], 4096, [[]], {}])
def test_what_is_no_signal_and_no_function_is_refused(preempt):
    with pytest.raises(gpuckpt.InvalidError, match="preempt is True, a signal, a function"):
        Notice(preempt, 30)


@pytest.mark.parametrize("grace", ["soon", -1, None])
def test_a_grace_that_is_no_time_is_refused(grace):
    with pytest.raises(gpuckpt.InvalidError, match="a duration is"):
        Notice(None, grace)


@pytest.mark.parametrize(("answer", "left"), [(True, 30), (12.5, 12.5), (0, 0), (7, 7)])
def test_a_function_says_that_the_process_is_to_end_or_how_many_seconds_are_left(answer, left):
    clock, answers = Clock(), iter([None, False, answer])

    def spot() -> Any:
        return next(answers)

    notice = Notice(spot, 30, clock)
    for announced in (False, False, True, True):
        notice.ask()
        assert notice.announced == announced
    clock.now += 5
    assert (notice.by, notice.left) == ("spot", left - 5)


@pytest.mark.parametrize("answer", ["soon", math.nan, math.inf])
def test_a_function_that_says_something_else_is_told_so(answer):
    with pytest.raises(gpuckpt.InvalidError, match="True or False or how many seconds"):
        Notice([lambda: answer], 30).ask()


# The last save


class RatedStore(MemoryStore):
    """Takes so many seconds for a byte, by a clock of its own, and 0.1 s for a sync.

    Files of step `hangs` hang after their first chunks, `late` seconds, and until `gate` opens.
    """

    def __init__(self, clock: Clock, nbytes_per_second: float) -> None:
        super().__init__()
        self.clock, self.rate = clock, nbytes_per_second
        self.hangs, self.late, self.late_appends = -1, 0.0, 0
        self.gate, self.reached = threading.Event(), threading.Event()

    def create(self, name: str) -> MemoryAppender:
        appender, store, hangs = super().create(name), self, f"step-{self.hangs:012d}" in name

        class Rated(MemoryAppender):
            appends = 0

            def append(self, parts: Sequence[memoryview | bytes]) -> None:
                self.appends += 1
                store.clock.now += sum(len(part) for part in parts) / store.rate
                super().append(parts)
                store.late_appends += hangs and store.gate.is_set()
                if hangs and self.appends == 5:
                    store.clock.now += store.late
                    store.reached.set()
                    assert store.gate.wait(30)

            def sync(self) -> None:
                store.clock.now += 0.1

        appender.__class__ = Rated
        return appender


class Run:
    """A loop that saves at every tenth step, and a clock that only its store moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.clock = Clock()
        moved = SimpleNamespace(perf_counter=self.clock, thread_time=lambda: 0.0, time=lambda: 0.0)
        for module in ("spans", "background"):
            monkeypatch.setattr(f"gpuckpt.{module}.time", moved)
        monkeypatch.setattr("gpuckpt.cores.Cores.left", lambda _: None)
        self.store = RatedStore(self.clock, 1e6)
        rng = np.random.default_rng(0)
        self.state = {"w": rng.standard_normal(250_000).astype(np.float32)}  # a megabyte
        defaults: dict[str, Any] = {"codec": RAW, "chunk_nbytes": 64 << 10, "memory": "4 MiB"}
        options = defaults | options
        self.ckpt = gpuckpt.Checkpointer("", store=self.store, preempt=signal.SIGUSR1, **options)
        self.ckpt._last._notice._clock = self.clock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.gate.set()
        self.ckpt.close()

    def save(self, *steps: int) -> None:
        for step in steps:
            self.move(step)
            self.ckpt.save(step, self.state).result(30)

    def move(self, step: int) -> None:
        self.state["w"] += np.float32(step)

    def begin_one_that_hangs(self, step: int, late: float = 0.0) -> gpuckpt.Pending:
        self.store.hangs, self.store.late = step, late
        self.move(step)
        pending = self.ckpt.save(step, self.state)
        assert self.store.reached.wait(30)
        return pending

    def last(self, step: int) -> gpuckpt.Pending | None:
        signal.raise_signal(signal.SIGUSR1)
        self.move(step)
        return self.ckpt.step(step, self.state)

    def is_saved(self, step: int) -> bool:
        """Whether that is the newest step, it is the state, and no file is of no use."""
        found = gpuckpt.load("", store=self.store)["w"].tobytes() == self.state["w"].tobytes()
        files = {name[:17] for name in self.store.names()}
        return found and files == {f"step-{one:012d}" for one in self.ckpt.steps()}


def test_the_next_step_is_saved_due_or_not_and_the_loop_is_told_to_stop(monkeypatch):
    with Run(monkeypatch, every=Every(steps=10)) as run:
        assert run.ckpt.step(9, run.state) is None
        assert (run.ckpt.should_stop, run.ckpt.exit_code, run.ckpt.preemption) == (False, 0, None)
        pending = run.last(11)
        assert pending is not None
        assert pending.committed.is_set()
        assert run.is_saved(11)
        assert (run.ckpt.should_stop, run.ckpt.exit_code) == (True, gpuckpt.PREEMPTED)
        outcome = run.ckpt.preemption
        assert outcome is not None
        assert (outcome.by, outcome.step, outcome.saved, outcome.newest) == (
            "SIGUSR1",
            11,
            True,
            11,
        )
        assert outcome.left_seconds == pytest.approx(30 - 1.2, abs=0.1)
    assert run.ckpt.exit_code == 75


@pytest.mark.parametrize(("grace", "in_time"), [(10, True), (1, False)])
def test_what_was_decided_stands_in_the_log_and_in_the_stats(monkeypatch, caplog, grace, in_time):
    caplog.set_level(logging.INFO, "gpuckpt")
    with Run(monkeypatch, grace=grace) as run:
        run.save(1, 2)
        pending = run.last(3)
        assert pending is not None
        stats = pending.stats
        assert (stats.codec, stats.left_seconds) == (RAW, grace)
        assert stats.predicted_seconds == pytest.approx(1.2, abs=0.1)
        assert run.is_saved(3)
    tried = "it is tried all the same" in caplog.text
    assert tried == (not in_time)
    assert f"SIGUSR1: the process is to end in {grace}.0 s, the run at step 3" in caplog.text
    assert "step 3 is saved: with codec='raw' that takes 1." in caplog.text
    assert "step 3 is durable" in caplog.text


@pytest.mark.parametrize(("left", "codec"), [(20, DELTA), (4, AUTO), (2.1, RAW), (0, RAW)])
def test_less_time_is_made_up_for_by_less_work(monkeypatch, left, codec):
    with Run(monkeypatch, codec=DELTA, grace=left) as run:
        for codec_, background in ((DELTA, 8.0), (AUTO, 2.5), (RAW, 2.0)):
            run.ckpt._saves._taken.note(codec_, stats_of(background))
        pending = run.last(3)
        assert pending is not None
        assert pending.stats.codec == codec
        assert (pending.stats.encoded_nbytes == pending.stats.raw_nbytes) == (codec == RAW)
        assert run.is_saved(3)


def test_differences_are_saved_where_there_is_no_time_for_more(monkeypatch):
    """A slow disk, on which what has changed since the save before is there in time."""
    with Run(monkeypatch, codec=DELTA, grace="1 s", memory="16 MiB") as run:
        run.move(1)
        run.ckpt.save(1, run.state).result(30)
        for step in (2, 3, 4):
            run.state["w"] *= np.float32(1 + 1e-7)
            run.ckpt.save(step, run.state).result(30)
        run.state["w"] *= np.float32(1 + 1e-7)
        signal.raise_signal(signal.SIGUSR1)
        pending = run.ckpt.step(5, run.state)
        assert pending is not None
        assert pending.stats.codec == DELTA
        assert pending.stats.delta_nbytes > 0
        assert run.ckpt.preemption is not None
        assert run.ckpt.preemption.left_seconds > 0
        assert run.is_saved(5)


def open_when_looked_at(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save that hangs goes on once it was decided what becomes of it."""
    look = run.ckpt._saves.remaining_seconds

    def look_and_open() -> float | None:
        found = look()
        run.store.gate.set()
        return found

    monkeypatch.setattr(run.ckpt._saves, "remaining_seconds", look_and_open)


def test_a_save_in_flight_finishes_first_if_there_is_time_for_both(monkeypatch):
    with Run(monkeypatch, grace=10) as run:
        run.save(1, 2)
        before = run.begin_one_that_hangs(3)
        open_when_looked_at(run, monkeypatch)
        assert run.last(4) is not None
        assert before.result().step == 3
        assert run.ckpt.steps() == [1, 2, 3, 4]
        assert run.is_saved(4)


def test_a_save_in_flight_finishes_if_there_is_time_for_one_alone(monkeypatch, caplog):
    with Run(monkeypatch, grace=1.8) as run:
        run.save(1, 2)
        run.begin_one_that_hangs(3)
        saved = run.state["w"].copy()
        open_when_looked_at(run, monkeypatch)
        assert run.last(4) is None
        assert run.ckpt.steps() == [1, 2, 3]
        assert gpuckpt.load("", store=run.store)["w"].tobytes() == saved.tobytes()
        outcome = run.ckpt.preemption
        assert outcome is not None
        assert (outcome.step, outcome.saved, outcome.newest) == (4, False, 3)
        assert run.ckpt.exit_code == gpuckpt.PREEMPTED
    assert "step 4 isn't saved" in caplog.text


def test_a_save_in_flight_that_should_be_late_gives_way_to_one_that_should_not(monkeypatch, caplog):
    with Run(monkeypatch, grace=5) as run:
        run.save(1, 2)
        before = run.begin_one_that_hangs(3, late=50)
        give_up = BackgroundSave.give_up

        def give_up_and_go_on(save: BackgroundSave) -> None:
            give_up(save)
            run.store.gate.set()

        monkeypatch.setattr(BackgroundSave, "give_up", give_up_and_go_on)
        assert run.last(4) is not None
        with pytest.raises(gpuckpt.PreemptedError, match="step 3 was given up"):
            before.result()
        assert run.store.late_appends == 0, "it ended at once"
        assert run.ckpt.steps() == [1, 2, 4]
        assert run.is_saved(4)
        assert gpuckpt.load("", 2, store=run.store)["w"].size == run.state["w"].size
    assert "the save of step 3 gives way to step 4" in caplog.text


def test_a_loop_that_waits_for_a_save_hears_of_its_end_meanwhile(monkeypatch):
    with Run(monkeypatch, grace=5) as run:
        run.save(1, 2)
        run.begin_one_that_hangs(3, late=50)
        give_up = BackgroundSave.give_up

        def give_up_and_go_on(save: BackgroundSave) -> None:
            give_up(save)
            run.store.gate.set()

        monkeypatch.setattr(BackgroundSave, "give_up", give_up_and_go_on)
        strike = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
        strike.start()
        run.move(4)
        assert run.ckpt.save(4, run.state).committed.is_set()
        strike.join()
        assert run.ckpt.should_stop
        assert run.ckpt.steps() == [1, 2, 4]
        assert run.is_saved(4)


@pytest.mark.parametrize("waited", [True, False])
def test_a_step_that_is_saved_already_is_not_saved_again(monkeypatch, waited):
    with Run(monkeypatch) as run:
        pending = run.ckpt.save(3, run.state)
        if waited:
            pending.result(30)
        signal.raise_signal(signal.SIGUSR1)
        names = set(run.store.names()) if waited else set()
        assert run.ckpt.step(3, run.state) is None
        assert pending.committed.is_set()
        assert names <= set(run.store.names())
        assert run.ckpt.preemption is not None
        assert run.ckpt.preemption.saved
        assert len(run.store.names()) == 2


def test_a_step_that_comes_again_after_a_restore_is_saved_again(monkeypatch):
    with Run(monkeypatch) as run:
        run.save(1, 2)
        run.ckpt.restore(run.state, step=1)
        run.move(9)
        assert run.last(2) is not None
        assert run.is_saved(2)


def test_a_save_of_this_very_step_is_waited_for_though_it_should_be_late(monkeypatch):
    with Run(monkeypatch, grace=5) as run:
        run.save(1, 2)
        before = run.begin_one_that_hangs(3, late=50)
        opener = threading.Timer(0.2, run.store.gate.set)
        opener.start()
        signal.raise_signal(signal.SIGUSR1)
        assert run.ckpt.step(3, run.state) is None
        opener.join()
        assert before.result().step == 3
        assert run.ckpt.preemption is not None
        assert run.ckpt.preemption.saved
        assert run.is_saved(3)


def test_a_signal_while_a_save_begins_is_seen_to_in_that_step(monkeypatch):
    with Run(monkeypatch, every=Every(steps=1)) as run:
        begin = run.ckpt._governor.begin

        def begin_and_strike() -> None:
            begin()
            signal.raise_signal(signal.SIGUSR1)

        monkeypatch.setattr(run.ckpt._governor, "begin", begin_and_strike)
        pending = run.ckpt.step(1, run.state)
        assert pending is not None
        assert pending.committed.is_set()
        assert run.ckpt.should_stop
        assert run.is_saved(1)


def test_the_last_step_is_saved_though_steps_beside_a_save_are_skipped(monkeypatch):
    with Run(monkeypatch, every=Every(steps=1), when_busy="skip") as run:
        run.save(1, 2)
        run.begin_one_that_hangs(3)
        assert run.ckpt.step(4, run.state) is None
        open_when_looked_at(run, monkeypatch)
        assert run.last(5) is not None
        assert run.is_saved(5)


def test_the_failure_of_a_save_before_does_not_keep_the_last_state_from_being_saved(tmp_path):
    store = FullStore()
    with gpuckpt.Checkpointer(tmp_path, store=store, preempt=signal.SIGUSR1) as ckpt:
        store.full = True
        pending = ckpt.save(1, {"w": np.ones(10)})
        assert pending.committed.wait(30)
        store.full = False
        signal.raise_signal(signal.SIGUSR1)
        with pytest.warns(RuntimeWarning, match="step 1 was not saved"):
            ckpt.step(2, {"w": np.ones(10)})
        assert ckpt.preemption is not None
        assert ckpt.preemption.saved
        assert ckpt.steps() == [2]


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_last_save_that_fails_says_so_and_the_loop_may_stop(tmp_path, on_error):
    store, state = FullStore(), {"w": np.ones(10)}
    says = pytest.raises(gpuckpt.StorageError, match="no space left")
    if on_error == "warn":
        says = pytest.warns(RuntimeWarning, match="step 2 was not saved: can't write")  # type: ignore[assignment]
    options: dict = {"store": store, "preempt": signal.SIGUSR1, "on_error": on_error}
    with gpuckpt.Checkpointer(tmp_path, **options) as ckpt:
        ckpt.save(1, state).result(30)
        signal.raise_signal(signal.SIGUSR1)
        store.full = True
        with says:
            ckpt.step(2, {"w": np.zeros(10)})
        assert ckpt.should_stop
        assert ckpt.preemption is not None
        assert (ckpt.preemption.saved, ckpt.preemption.newest) == (False, 1)
        assert ckpt.exit_code == gpuckpt.PREEMPTED
        assert ckpt.steps() == [1]


def test_a_state_that_cannot_be_saved_is_said_and_the_loop_may_stop(tmp_path):
    with gpuckpt.Checkpointer(tmp_path, preempt=lambda: True) as ckpt:
        with pytest.raises(gpuckpt.UnsupportedError):
            ckpt.step(1, {"w": object()})
        assert ckpt.preemption is not None
        assert (ckpt.preemption.saved, ckpt.preemption.newest) == (False, None)


def test_a_signal_after_the_last_step_lets_the_run_end_as_it_would_have(tmp_path, caplog):
    with handled():
        with gpuckpt.Checkpointer(tmp_path, preempt=signal.SIGUSR1) as ckpt:
            ckpt.save(1, {"w": np.ones(10)})
            signal.raise_signal(signal.SIGUSR1)
        assert (ckpt.should_stop, ckpt.exit_code) == (False, 0)
        assert gpuckpt.load(tmp_path)["w"].size == 10
    assert "SIGUSR1 came after the last step" in caplog.text


def test_a_run_that_has_not_saved_yet_knows_from_its_log_how_long_a_save_takes(tmp_path):
    state = {"w": np.arange(10**6)}
    with gpuckpt.Checkpointer(tmp_path, log=True) as ckpt:
        ckpt.save(1, state)
    (record,) = read_journal(tmp_path)
    with gpuckpt.Checkpointer(tmp_path, log=True, preempt=lambda: 60) as ckpt:
        ckpt.resume(state)
        pending = ckpt.step(2, state)
        assert pending is not None
        assert pending.stats.predicted_seconds == Took.of(record.stats).seconds


def test_a_loop_that_saves_by_itself_alone_is_served_as_well(tmp_path):
    answers = iter([None, 3.5])
    with gpuckpt.Checkpointer(tmp_path, preempt=lambda: next(answers)) as ckpt:
        ckpt.save(1, {"w": np.ones(10)})
        assert ckpt.preemption is None
        assert ckpt.save(2, {"w": np.zeros(10)}).committed.is_set()
        assert ckpt.should_stop
        assert ckpt.steps() == [1, 2]


# Processes


def in_a_child(tmp_path: Path, program: str, *, code: int) -> str:
    """What a program prints, which has `root`, and ends with that exit code."""
    preamble = "import os, signal, sys, time, numpy as np, gpuckpt\nroot = sys.argv[1]\n"
    command = [sys.executable, "-c", preamble + textwrap.dedent(program), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert finished.returncode == code, finished.stderr
    return finished.stdout


def test_a_second_signal_ends_the_process_as_without_gpuckpt_and_leaves_a_good_root(tmp_path):
    program = """
        from tests.test_checkpointer import SlowStore
        from gpuckpt.notice import SAME_SECONDS
        ckpt = gpuckpt.Checkpointer(root, preempt=True)
        ckpt.save(1, {"w": np.ones(10)}).result()
        os.kill(os.getpid(), signal.SIGTERM)
        ckpt._last._notice._first = {signal.SIGTERM: -9.0}
        print("goes on", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        print("never")
    """
    assert in_a_child(tmp_path, program, code=-signal.SIGTERM) == "goes on\n"
    assert gpuckpt.load(tmp_path)["w"].size == 10


def test_a_forked_child_dies_of_the_signal_and_its_parent_hears_nothing(tmp_path):
    program = """
        with gpuckpt.Checkpointer(root, preempt=True) as ckpt:
            ready, tell = os.pipe()
            child = os.fork()
            if child == 0:
                ckpt.close()
                os.write(tell, b"!")
                time.sleep(30)
                os._exit(0)
            os.read(ready, 1)
            os.kill(child, signal.SIGTERM)
            print(os.waitpid(child, 0)[1])
            ckpt.step(1, {"w": np.ones(10)})
            print(ckpt.should_stop)
            ckpt.save(2, {"w": np.ones(10)})
            os.kill(os.getpid(), signal.SIGTERM)
            ckpt.step(3, {"w": np.ones(10)})
            sys.exit(ckpt.exit_code)
    """
    assert in_a_child(tmp_path, program, code=75) == f"{signal.SIGTERM:d}\nFalse\n"
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        assert ckpt.steps() == [2, 3]


def test_the_documentations_loop_ends_as_one_that_was_never_stopped(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "PREEMPTION.md").read_text()
    program = tmp_path / "train.py"
    program.write_text(text.split("```python\n")[1].split("```")[0])

    def run(root: str, *, stop: bool) -> tuple[int, str, str]:
        """Its exit code, what it says first, and what it says last."""
        command = [sys.executable, str(program), str(tmp_path / root), "40"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            if stop:
                process.send_signal(signal.SIGTERM)
            last, _ = process.communicate(timeout=60)
        return process.returncode, first, last

    code, first, last = run("stopped", stop=True)
    assert (code, first) == (gpuckpt.PREEMPTED, "from step 0\n")
    assert last.startswith("Preemption(by='SIGTERM', step=")
    newest = last.split("newest=")[1].split(",")[0]
    assert run("stopped", stop=False) == (0, f"from step {newest}\n", "")
    assert run("whole", stop=False) == (0, "from step 0\n", "")
    stopped, whole = (gpuckpt.load(tmp_path / root)["w"] for root in ("stopped", "whole"))
    assert stopped.tobytes() == whole.tobytes()


def train(root: str, announce: Connection) -> None:
    """Train until told to stop; announce each step that was left behind."""
    state = state_at(0)
    options: dict[str, Any] = {"chunk_nbytes": 64 << 10, "memory": "8 MiB"}
    keep = gpuckpt.Keep(last=2)
    with gpuckpt.Checkpointer(
        root, every=Every(steps=3), keep=keep, preempt=True, **options
    ) as ckpt:
        for step in range(ckpt.resume(state) + 1, 10**6):
            with ckpt.update():
                set_to(state, step)
            ckpt.step(step, state)
            announce.send(step)
            if ckpt.should_stop:
                sys.exit(ckpt.exit_code)


def stopped_after(root: Path, *waits: float, number: int = signal.SIGTERM) -> int:
    """Run `train` in a process, and signal it so long after its first step and again after that.

    The last step that it announced.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpuckpt", "numpy", "tests.test_preemption"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(str(root), sender))
    process.start()
    sender.close()
    newest: int = receiver.recv()
    pid = process.pid
    assert pid is not None

    def send() -> None:
        with contextlib.suppress(ProcessLookupError):  # it may have ended after the first
            os.kill(pid, number)

    threads = [threading.Timer(wait, send) for wait in waits]
    for thread in threads:
        thread.start()
    with contextlib.suppress(EOFError):
        while True:
            newest = receiver.recv()
    for thread in threads:
        thread.join()
    process.join(60)
    # A second signal may find the handlers put back, and the process on its way out.
    late = {-number} if len(waits) > 1 else set()
    assert process.exitcode in {gpuckpt.PREEMPTED, *late}
    process.close()
    receiver.close()
    return newest


def check_root(root: Path, newest: int) -> None:
    """The newest step is the last that the run has seen, bit for bit, and nothing is broken."""
    resources = Resources("32 MiB")
    state = state_at(0)
    with gpuckpt.Checkpointer(root) as ckpt:
        assert ckpt.resume(state) == newest
        assert version_of(state) == newest
        for step in ckpt.steps():
            assert verify_step(LocalStore(root), step, resources) == []


def test_a_run_that_is_stopped_goes_on_from_the_last_step_that_it_has_seen(tmp_path):
    first = stopped_after(tmp_path, 0.02)
    check_root(tmp_path, first)
    second = stopped_after(tmp_path, 0.02, number=signal.SIGUSR1)
    assert second > first
    check_root(tmp_path, second)


def test_a_signal_at_any_moment_leaves_the_last_step_and_no_broken_root(tmp_path):
    moments = random.Random(34)
    for turn_ in range(50):
        root = tmp_path / str(turn_ % 10)
        waits = [moments.uniform(0, 0.04)]
        if turn_ % 2:
            waits.append(waits[0] + moments.uniform(0, 0.01))  # a launcher that passes it on
        check_root(root, stopped_after(root, *waits))
