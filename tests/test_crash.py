"""Power loss before every operation of many histories, and the death of what goes on from there.

What is sampled here, `python -m bench.durability reboots` does whole.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from rich.console import Console

import gpuckpt
from gpuckpt.cli.verifying import verify_root
from tests.crash_checks import Checks, Failures
from tests.crash_histories import ALL, HISTORIES, Life, once, record_of
from tests.crash_ranks import RANK_HISTORIES, rank_record_of
from tests.crash_store import CrashStore, Loss, losses, syncs

PACKAGE = Path(gpuckpt.__file__).parent
History = Callable[[Life], None]


def name_of(history: History) -> str:
    return history.__name__


each = pytest.mark.parametrize("history", ALL, ids=name_of)
each_without_errors = pytest.mark.parametrize("history", HISTORIES, ids=name_of)


@pytest.fixture(scope="module")
def checks() -> Checks:
    return Checks()


def sample(found: Iterable, count: int, seed: str) -> list:
    known = list(found)
    return random.Random(seed).sample(known, min(count, len(known)))


@each
def test_a_loss_of_power_leaves_what_was_promised_or_what_comes_next(history, checks):
    found = list(losses(record_of(history)))
    for loss in sample(found, 150, history.__name__):
        checks.held(loss)
    print(f"{history.__name__}: {len(found)} reboots")
    assert len(found) > 40


@each
def test_after_a_loss_of_power_a_run_goes_on_and_nothing_is_left_over(history, checks):
    for loss in sample(losses(record_of(history)), 20, history.__name__):
        checks.goes_on(loss.image)


@each
def test_power_that_is_lost_again_while_a_run_goes_on_costs_no_more(history, checks):
    for first in sample(losses(record_of(history)), 2, history.__name__):
        for second in sample(checks.lost_again(first), 40, history.__name__):
            checks.held(second)


@each
def test_a_kill_and_then_a_loss_of_power_while_the_next_one_goes_on_cost_nothing(history, checks):
    """What a killed process left unsynced is what the next one begins with."""
    record = record_of(history)
    for at in sample(range(len(record)), 2, history.__name__):
        for loss in sample(checks.killed_and_lost(record, at), 40, history.__name__):
            checks.held(loss)


def test_after_a_loss_of_power_the_command_verify_finds_no_damage(checks, tmp_path):
    every = itertools.chain.from_iterable(losses(record_of(one)) for one in ALL)
    for at, loss in enumerate(sample(every, 25, "verify")):
        root = tmp_path / str(at)
        root.mkdir()
        for name, data in loss.image:
            (root / name).write_bytes(data)
        if checks.found(loss.image):
            assert verify_root(root, None, Console(quiet=True), as_json=False) == 0


def is_damaged(checks: Checks, found: Iterable[Loss]) -> bool:
    try:
        for loss in found:
            checks.held(loss)
    except Failures:
        return True
    return False


@each_without_errors
def test_without_any_one_of_its_syncs_some_reboot_finds_damage(history, checks):
    record = record_of(history)
    known = list(syncs(record))
    unneeded = [
        record[at].place for at in known if not is_damaged(checks, losses(record, at, deaf=at))
    ]
    print(f"{history.__name__}: {len(known)} syncs")
    assert unneeded == []


def test_every_sync_that_the_engine_asks_for_is_in_some_history():
    asked = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr in {"sync", "sync_names"}:
                asked.add((str(path), called.lineno))
    records = [*map(record_of, HISTORIES)]
    records += [rank_record_of(history).record for history in RANK_HISTORIES]
    met = {record[at].place for record in records for at in syncs(record)}
    assert len(asked) > 4
    # The files of the first two are thrown away.  The third: see the test of room that is made.
    # The fourth: nothing outlives its processes.  The last two: see tests/convert/test_placing.py
    # and tests/test_crash_tiers.py.
    elsewhere = ("selftest", "limits", "space.py", "groups/instore.py", "conversion/", "carrier.py")
    assert {place for place in asked if not any(one in place[0] for one in elsewhere)} == met


def test_room_is_made_only_once_what_stays_is_durable(checks):
    """Step 3 is visible, and its save failed in its last sync; room is made for step 4."""
    life = Life(CrashStore())
    with life.alive():
        life.alone(1)
        life.alone(2)
        life.store.refuses = once(lambda one: one.kind == "sync_names", 1)
        with pytest.raises(gpuckpt.StorageError, match="may be there"):
            life.alone(3)
        begun, life.store.free = len(life.store.record), 1000
        with pytest.raises(gpuckpt.StorageError, match="are wanted"):
            life.alone(4, gpuckpt.Keep(last=1))
    record = life.store.record
    (first,) = [at for at in syncs(record) if at >= begun and "space" in record[at].place[0]]
    found = [checks.found(loss.image) for loss in losses(record, begun)]
    assert {3: 3} in found
    assert all(max(one) >= 2 for one in found)
    assert {} in [checks.found(loss.image) for loss in losses(record, begun, deaf=first)]


@each_without_errors
def test_a_sync_that_fails_leaves_every_visible_checkpoint_whole(history, checks):
    """Each in turn: what follows is what the loop does that its error ends."""
    for failing in range(len(list(syncs(record_of(history))))):
        life = Life(CrashStore())
        life.store.refuses = once(lambda one: one.is_sync, failing)
        with life.alive(), contextlib.suppress(gpuckpt.StorageError):
            history(life)
        for loss in sample(losses(life.store.record), 4, history.__name__):
            checks.held(loss)
        checks.goes_on(life.store.image())
