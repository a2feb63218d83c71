"""Copies of host memory by several threads: every byte, once, and nobody left behind."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt import copying as shares
from gpuckpt.copying import copy_shares, share_out
from gpuckpt.stores.memory import MemoryStore


@pytest.fixture
def eager(monkeypatch):
    """A thread for every few bytes."""
    monkeypatch.setattr(shares, "_LEAST_NBYTES", 64)


def copied(arrays: list[Any], threads: int | None) -> list[Any]:
    targets = [np.zeros_like(array) for array in arrays]
    made = share_out([array.nbytes for array in arrays], threads)
    where = (np.array([one.ctypes.data for one in group], np.uint64) for group in (targets, arrays))
    copy_shares(made, *where)
    return targets


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 700), max_size=12), st.integers(1, 6))
def test_every_byte_is_copied_once(sizes, threads):
    rng = np.random.default_rng(len(sizes))
    arrays = [rng.integers(0, 256, size).astype(np.uint8) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares, "_LEAST_NBYTES", 64)
        made = share_out(sizes, threads)
        assert len(made) == max(min(threads, 4, sum(sizes) // 64), 1)
        assert sum(sum(share.nbytes) for share in made) == sum(sizes)
        found = copied(arrays, threads)
    assert [one.tobytes() for one in found] == [one.tobytes() for one in arrays]


def test_little_is_copied_by_the_caller_alone(monkeypatch):
    monkeypatch.setattr(_thread, "start_new_thread", None)
    (found,) = copied([np.arange(1000)], 4)
    assert (found == np.arange(1000)).all()


def test_shares_are_of_about_the_same_size(eager):
    made = share_out([10_000, 1, 3, 10_000_000, 64], 4)
    sizes = [sum(share.nbytes) for share in made]
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) <= 128


def test_without_threads_the_caller_copies_all(eager, monkeypatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    (found,) = copied([np.arange(1000)], 4)
    assert (found == np.arange(1000)).all()


def test_an_interrupt_comes_out_when_the_other_threads_are_done(eager, monkeypatch):
    copy, main = shares._copy, threading.get_ident()
    entered: set[int] = set()
    ended: list[int] = []
    begun, gate = threading.Event(), threading.Event()

    def interrupted_in_the_caller(moves: Any) -> None:
        if threading.get_ident() == main:
            assert begun.wait(30)
            signal.raise_signal(signal.SIGINT)
        entered.add(moves[0][0])
        begun.set()
        gate.wait(0.2)
        copy(moves)
        ended.append(moves[0][0])

    monkeypatch.setattr(shares, "_copy", interrupted_in_the_caller)
    with pytest.raises(KeyboardInterrupt):
        copied([np.arange(1000)], 3)
    assert entered
    assert entered == set(ended)


def test_an_interrupt_while_one_thread_is_waited_for_waits_for_the_others_too(eager, monkeypatch):
    copy, main = shares._copy, threading.get_ident()
    ended: list[int] = []
    at = iter((0.0, 0.3, 0.6, 0.9))

    def slow(moves: Any) -> None:
        time.sleep(next(at) + 0.05)
        copy(moves)
        ended.append(len(moves))

    monkeypatch.setattr(shares, "_copy", slow)
    striker = threading.Timer(0.15, lambda: signal.pthread_kill(main, signal.SIGINT))
    striker.start()
    with pytest.raises(KeyboardInterrupt):
        copied([np.arange(1000)], 4)
    striker.join()
    assert len(ended) == 4


def test_a_copied_state_is_what_it_was(eager):
    store = MemoryStore()
    rng = np.random.default_rng(1)
    state: dict[str, Any] = {
        f"w{at}": rng.standard_normal(5000 + at, np.float32) for at in range(7)
    }
    state["t"] = rng.standard_normal((70, 90)).T
    wanted = {name: array.tobytes() for name, array in state.items()}
    with gpuckpt.Checkpointer("", store=store, snapshot="copy") as ckpt:
        pending = ckpt.save(1, state)
        for array in state.values():
            array[...] = 0
        pending.result(60)
    found = gpuckpt.load("", store=store)
    assert {name: array.tobytes() for name, array in found.items()} == wanted
