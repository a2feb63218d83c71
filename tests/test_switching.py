"""The interpreter's switch interval while a save goes on beside a loop."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest

import gpuckpt
from gpuckpt.stores.memory import MemoryAppender, MemoryStore
from gpuckpt.switching import SWITCH_SECONDS, switching_often
from tests.test_checkpointer import FullStore

USUAL = 0.005


@pytest.fixture(autouse=True)
def usual_interval() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(USUAL)
    yield
    sys.setswitchinterval(before)


def interval() -> float:
    return round(sys.getswitchinterval(), 7)


class Watching(MemoryStore):
    """Notes the switch interval whenever a file is begun."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[float] = set()

    def create(self, name: str) -> MemoryAppender:
        self.seen.add(interval())
        return super().create(name)


def test_it_is_short_within_and_as_it_was_afterwards():
    with switching_often():
        assert interval() == SWITCH_SECONDS
    assert interval() == USUAL


def test_two_saves_leave_it_as_it_was_in_whatever_order_they_end():
    first, second = switching_often(), switching_often()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert interval() == USUAL


def test_what_somebody_else_set_meanwhile_stays():
    with switching_often():
        sys.setswitchinterval(0.02)
    assert interval() == 0.02


def test_a_shorter_one_stays():
    sys.setswitchinterval(0.00001)
    with switching_often():
        assert interval() == 0.00001
    assert interval() == 0.00001


def test_a_save_beside_a_loop_makes_it_short_and_puts_it_back(tmp_path):
    store = Watching()
    with gpuckpt.Checkpointer(tmp_path, store=store) as ckpt:
        ckpt.save(1, {"w": np.ones(100)}).result()
        ckpt.close()
    assert store.seen == {SWITCH_SECONDS}
    assert interval() == USUAL


def test_a_save_that_fails_puts_it_back(tmp_path):
    store = FullStore()
    store.full = True
    with gpuckpt.Checkpointer(tmp_path, store=store, on_error="warn") as ckpt:
        with pytest.raises(gpuckpt.StorageError):
            ckpt.save(1, {"w": np.ones(100)}).result()
        with pytest.warns(RuntimeWarning, match="not saved"):
            ckpt.wait()
    assert interval() == USUAL


def test_a_save_that_its_caller_waits_for_leaves_it_alone(tmp_path):
    store = Watching()
    gpuckpt.save(tmp_path, {"w": np.ones(100)}, store=store)
    assert store.seen == {USUAL}
