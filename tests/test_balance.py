"""Encoding that would make the disk wait is left out, unless bytes were asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.balance import Balance
from gpuckpt.coding import encode
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


def test_a_writer_that_waits_for_busy_encoders_says_that_encoding_costs_time():
    clock = Clock()
    balance = Balance(2, clock)
    drawn = balance.watched(results(clock, 0.2, 0.2, 0.2))
    said = []
    for _ in drawn:
        balance.encoded(0.4)
        said.append(balance.encoding_costs_time)
    assert said == [False, True, True]
    assert balance.waited_seconds == pytest.approx(0.6)


def test_a_writer_that_is_busy_itself_makes_encoding_free():
    clock = Clock()
    balance = Balance(2, clock)
    for _ in balance.watched(results(clock, 0.2, 0.0, 0.0, 0.2)):
        balance.encoded(5.0)
        clock.now += 4  # it writes
    assert balance.waited_seconds == pytest.approx(0.4)
    assert not balance.encoding_costs_time


def test_encoders_that_wait_for_a_device_are_not_what_takes_time():
    clock = Clock()
    balance = Balance(2, clock)
    for _ in balance.watched(results(clock, 1.0, 1.0, 1.0)):
        balance.encoded(0.1)
    assert balance.waited_seconds > 2
    assert not balance.encoding_costs_time


def test_time_makes_up_for_what_was_waited():
    clock = Clock()
    balance = Balance(1, clock)
    for _ in balance.watched(results(clock, 0.5)):
        balance.encoded(20.0)
    assert balance.encoding_costs_time
    clock.now += 10
    assert not balance.encoding_costs_time


@pytest.mark.parametrize(("codec", "mixed"), [("auto", True), ("zstd", False), ("delta", False)])
def test_only_auto_leaves_chunks_as_they_are_where_encoding_is_slow(monkeypatch, codec, mixed):
    def slow(*args: Any) -> Any:
        encoded = encode(*args)
        time.sleep(0.02 if len(encoded.planes) > 1 else 0)
        return encoded

    monkeypatch.setattr("gpuckpt.encoder.encode", slow)
    monkeypatch.setattr("gpuckpt.balance._GRACE_SECONDS", 0.1)
    monkeypatch.setattr("gpuckpt.cores.Cores.left", lambda _: None)  # whatever else runs here
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
    assert stats.starved_seconds > 0.1
    assert (gpuckpt.load("", store=store)["w"] == state["w"]).all()
