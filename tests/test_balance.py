"""Encoding that would make the disk wait is left out, unless bytes were asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.balance import Balance
from gpuckpt.coding import encode_chosen
from gpuckpt.commit import open_step
from gpuckpt.stores.memory import MemoryStore


class Clock:
    """A clock that stands still unless it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def results(clock: Clock, *seconds: float) -> Iterator[float]:
    """Each takes so long to come."""
    for one in seconds:
        clock.now += one
        yield one


class Disk:
    """What waits for a storage."""

    waiting_nbytes = 0

    def __call__(self) -> int:
        return self.waiting_nbytes


def busy(clock: Clock, disk: Disk, **options: Any) -> Balance:
    """Of two encoders, which have worked all the time so far, for a second."""
    balance = Balance(2, disk, clock=clock, **options)
    balance.encoded(2.0, 0)
    clock.now += 1
    return balance


def costs(balance: Balance) -> bool:
    return balance.encoding_costs_time


def test_encoding_is_free_only_while_enough_waits_for_the_disk():
    disk = Disk()
    balance = busy(Clock(), disk, enough_nbytes=10)
    assert costs(balance)
    disk.waiting_nbytes = 10
    assert not costs(balance)
    disk.waiting_nbytes = 9
    assert costs(balance)
    balance.encoded(0.0, 1)
    assert not costs(balance)
    balance.taken(1)
    assert costs(balance)


def test_results_behind_one_that_the_writer_waits_for_are_no_work_for_the_disk():
    balance = busy(Clock(), Disk(), enough_nbytes=10)
    balance.encoded(0.0, 10)

    def said() -> Iterator[bool]:
        yield costs(balance)

    assert list(balance.watched(said())) == [True]
    assert not costs(balance)


def test_what_a_slow_storage_leaves_with_the_writer_waits_as_well():
    balance = busy(Clock(), Disk(), enough_nbytes=10)
    balance.keeps_at_most(8)
    balance.encoded(0.0, 5)
    assert costs(balance)
    balance.encoded(0.0, 1)
    assert not costs(balance)


def test_a_disk_that_had_nothing_to_do_makes_encoding_cost_time_until_that_is_made_up_for():
    clock, disk = Clock(), Disk()
    balance = busy(clock, disk, enough_nbytes=10)
    assert len(list(balance.watched(results(clock, 0.05)))) == 1
    disk.waiting_nbytes = 10
    assert costs(balance)
    balance.encoded(20.0, 0)
    clock.now += 2
    assert not costs(balance)


def test_a_writer_may_wait_while_the_disk_has_something_to_do():
    clock, disk = Clock(), Disk()
    balance = busy(clock, disk, enough_nbytes=10)
    disk.waiting_nbytes = 10
    assert len(list(balance.watched(results(clock, 0.5)))) == 1
    balance.encoded(20.0, 0)
    assert balance.waited_seconds == pytest.approx(0.5)
    assert not costs(balance)


def test_encoders_that_wait_for_a_device_are_not_what_takes_time():
    clock = Clock()
    balance = Balance(2, Disk(), clock=clock)
    for _ in balance.watched(results(clock, 1.0, 1.0, 1.0)):
        balance.encoded(0.1, 0)
    assert balance.waited_seconds > 2
    assert not costs(balance)


def test_as_long_as_a_disk_was_behind_at_the_end_of_a_save_the_next_writer_may_wait():
    clock = Clock()
    first = busy(clock, Disk())
    free = first.next_free_seconds(5.0)
    assert 4.9 < free < 5
    second = busy(clock, Disk(), free_seconds=free)
    assert not costs(second)
    assert len(list(second.watched(results(clock, free + 0.1)))) == 1
    second.encoded(20.0, 0)
    assert costs(second)
    assert second.next_free_seconds(0.0) == pytest.approx(free / 2)
    assert second.next_free_seconds(1.0) > free


def test_a_disk_that_was_not_behind_gives_the_next_writer_nothing():
    assert busy(Clock(), Disk()).next_free_seconds(0.01) == 0


@pytest.mark.parametrize(("codec", "mixed"), [("auto", True), ("zstd", False), ("delta", False)])
def test_only_auto_leaves_chunks_as_they_are_where_encoding_is_slow(monkeypatch, codec, mixed):
    def slow(*args: Any, **options: Any) -> Any:
        encoded = encode_chosen(*args, **options)
        time.sleep(0.02 if len(encoded.planes) > 1 else 0)
        return encoded

    monkeypatch.setattr("gpuckpt.encoder.encode_chosen", slow)
    rng = np.random.default_rng(1)
    state = {"w": rng.standard_normal(1 << 19, np.float32)}
    store = MemoryStore()
    options: dict[str, Any] = {"chunk_nbytes": 32 << 10, "memory": "16 MiB", "codec": codec}
    with gpuckpt.Checkpointer("", store=store, **options) as ckpt:
        stats = ckpt.save(1, state).stats
        ckpt.wait()
    planes = [len(chunk.planes) for chunk in open_step(store, 1).tensors[0].chunks]
    assert planes[0] == 4
    assert (planes.count(1) > len(planes) / 2) == mixed
    assert (planes.count(1) > 0) == mixed
    assert stats.starved_seconds > 0.01
    assert (gpuckpt.load("", store=store)["w"] == state["w"]).all()
