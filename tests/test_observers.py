"""Observers are told of each save, and can neither fail nor delay one."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref

import numpy as np
import pytest

import gpuckpt
from gpuckpt.journal import Record
from gpuckpt.observers import WAITING_MAX, Observers
from gpuckpt.stats import Stats
from gpuckpt.stores.memory import MemoryStore
from tests.test_checkpointer import FullStore


class Notes:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.threads: set[str] = set()

    def saved(self, record: Record) -> None:
        self.threads.add(threading.current_thread().name)
        self.records.append(record)

    @property
    def steps(self) -> list[int]:
        return [record.stats.step for record in self.records]


class Broken:
    def saved(self, record: Record) -> None:
        raise ValueError(f"no room for step {record.stats.step}")


class Stuck(Notes):
    """One that takes note of nothing until it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.let = threading.Event(), threading.Event()

    def saved(self, record: Record) -> None:
        self.begun.set()
        self.let.wait(20)
        super().saved(record)


def state() -> dict[str, np.ndarray]:
    return {"w": np.arange(1000.0)}


def test_an_observer_is_told_of_each_save_in_order_in_a_thread_of_its_own(tmp_path):
    notes = Notes()
    with gpuckpt.Checkpointer(tmp_path, observers=[notes], trace=True) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, state())
    assert notes.steps == [1, 2, 3]
    assert notes.threads == {"gpuckpt-tell"}
    for record in notes.records:
        assert record.error is None
        assert abs(record.ended - time.time()) < 60
        assert {span.stage for span in record.spans} >= {"snapshot", "encode", "write"}
        assert all(abs(span.end - record.ended) < 60 for span in record.spans)


def test_what_is_told_is_durable_already(tmp_path):
    found = []

    class Looks:
        def saved(self, record: Record) -> None:
            found.append(gpuckpt.load(tmp_path, record.stats.step).keys())

    with gpuckpt.Checkpointer(tmp_path, observers=[Looks()]) as ckpt:
        ckpt.save(1, state())
    assert found == [state().keys()]


def test_an_observer_is_told_of_a_save_that_failed_and_why():
    store, notes = FullStore(), Notes()
    store.full = True
    with gpuckpt.Checkpointer("", store=store, observers=[notes], on_error="warn") as ckpt:
        ckpt.save(1, state())
        with pytest.warns(RuntimeWarning, match="not saved"):
            ckpt.wait()
    (record,) = notes.records
    assert record.error is not None
    assert "StorageError" in record.error


def test_an_observer_that_raises_fails_nothing_and_the_others_are_told(caplog):
    notes = Notes()
    with gpuckpt.Checkpointer("", store=MemoryStore(), observers=[Broken(), notes]) as ckpt:
        ckpt.save(1, state())
        ckpt.save(2, state())
    assert ckpt.steps() == [1, 2]
    assert notes.steps == [1, 2]
    assert "no room for step 1" in caplog.text


class Ending:
    """Ends the thread that tells it."""

    def saved(self, record: Record) -> None:
        raise SystemExit


def test_an_observer_that_ends_its_thread_doesnt_end_the_telling():
    notes = Notes()
    with gpuckpt.Checkpointer("", store=MemoryStore(), observers=[Ending(), notes]) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, state()).result(20)
    assert notes.steps == [1, 2, 3]


def test_a_root_is_given_back_before_observers_are_waited_for():
    stuck, store = Stuck(), MemoryStore()
    ckpt = gpuckpt.Checkpointer("", store=store, observers=[stuck])
    ckpt.save(1, state()).result(20)
    closing = threading.Thread(target=ckpt.close)
    assert stuck.begun.wait(20)
    closing.start()
    try:
        for _ in range(200):  # the other one waits for nothing but this lock
            try:
                with gpuckpt.Checkpointer("", store=store) as other:
                    assert other.steps() == [1]
                    break
            except gpuckpt.LockedError:
                time.sleep(0.01)
        else:
            pytest.fail("it kept the root")
        assert closing.is_alive()
    finally:
        stuck.let.set()
        closing.join()


def test_an_observer_that_is_stuck_delays_no_save():
    stuck = Stuck()
    with gpuckpt.Checkpointer("", store=MemoryStore(), observers=[stuck]) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, state()).result(20)
        assert stuck.steps == []
        stuck.let.set()
    assert stuck.steps == [1, 2, 3]


def test_closing_goes_on_without_an_observer_that_is_stuck_and_says_so(caplog):
    stuck = Stuck()
    observers = Observers([stuck])
    observers.tell(Stats(1), None)
    assert stuck.begun.wait(20)
    with caplog.at_level(logging.WARNING):
        observers.settle(0.01)
    assert "haven't taken note" in caplog.text
    stuck.let.set()
    observers.settle(20)
    assert stuck.steps == [1]


def test_saves_that_observers_are_too_slow_for_are_passed_over_the_oldest_first(caplog):
    stuck = Stuck()
    observers = Observers([stuck])
    observers.tell(Stats(0), None)
    assert stuck.begun.wait(20)
    for step in range(1, WAITING_MAX + 3):
        observers.tell(Stats(step), None)
    stuck.let.set()
    observers.settle(20)
    assert stuck.steps == [0, *range(3, WAITING_MAX + 3)]
    assert "not told of step 1" in caplog.text


def test_no_thread_stays_and_nothing_keeps_an_observer():
    notes = Notes()
    observers = Observers([notes])
    observers.tell(Stats(1), None)
    observers.settle(20)
    reference = weakref.ref(notes)
    del notes, observers
    for _ in range(200):
        if reference() is None:
            break
        time.sleep(0.01)  # the thread has a moment to live
        gc.collect()
    assert reference() is None


def test_without_a_thread_to_be_had_a_save_is_as_before(caplog, monkeypatch):
    observers = Observers([Notes()])

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    observers.tell(Stats(1), None)
    observers.settle(20)
    assert "can't start new thread" in caplog.text


@pytest.mark.parametrize("wrong", [print, Notes, None, 3])
def test_what_is_no_observer_is_refused(wrong, tmp_path):
    with pytest.raises(gpuckpt.InvalidError, match="observer"):
        gpuckpt.Checkpointer(tmp_path, observers=[wrong])
    gpuckpt.Checkpointer(tmp_path).close()  # and the root is free
