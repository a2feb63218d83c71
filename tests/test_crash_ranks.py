"""Power loss before every operation of saves of several ranks; and each operation that fails."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import gpuckpt
from gpuckpt.commit import open_step, steps
from gpuckpt.layout import manifest_name
from tests.crash_checks import Checks, Failures
from tests.crash_histories import once
from tests.crash_ranks import (
    RANK_HISTORIES,
    NodesLife,
    RankRun,
    RanksLife,
    rank_record_of,
    two_nodes_save_and_prune,
)
from tests.crash_store import CrashStore, Loss, losses, syncs
from tests.relay import values

each = pytest.mark.parametrize("history", RANK_HISTORIES, ids=lambda history: history.__name__)


@pytest.fixture(scope="module")
def checks() -> Checks:
    return Checks()


def sample(found: Iterable, count: int, seed: str) -> list:
    known = list(found)
    return random.Random(seed).sample(known, min(count, len(known)))


@each
def test_ranks_taking_turns_do_the_same_each_time(history):
    assert rank_record_of(history).record == rank_record_of(history).record


@each
def test_a_loss_of_power_leaves_what_any_rank_was_promised_or_what_comes_next(history, checks):
    found = list(losses(rank_record_of(history).record))
    for loss in sample(found, 150, history.__name__):
        checks.held(loss)
    print(f"{history.__name__}: {len(found)} reboots")
    assert len(found) > 40


@each
def test_after_a_loss_of_power_one_process_goes_on_and_nothing_is_left_over(history, checks):
    for loss in sample(losses(rank_record_of(history).record), 15, history.__name__):
        checks.goes_on(loss.image)


@each
def test_after_a_loss_of_power_ranks_go_on_and_nothing_is_left_over(history, checks):
    for loss in sample(losses(rank_record_of(history).record), 15, history.__name__):
        found = checks.found(loss.image)
        life = RanksLife(CrashStore(loss.image), number=3)

        def goes_on(run: RankRun, found: dict[int, int] = found) -> None:
            done = run.resume()
            assert done == max(found, default=0)
            run.save(done + 1)

        with life.alive():
            life.together(3, goes_on, gpuckpt.Keep(last=1), full_every=1)
        values(life.ended)
        assert only_named(life.store)


def is_damaged(checks: Checks, found: Iterable[Loss]) -> bool:
    try:
        for loss in found:
            checks.held(loss)
    except Failures:
        return True
    return False


@each
def test_without_any_one_of_its_syncs_some_reboot_finds_damage(history, checks):
    record = rank_record_of(history).record
    known = list(syncs(record))
    needed: set[tuple[str, int]] = set()
    for at in known:
        place = record[at].place
        if place not in needed and is_damaged(checks, losses(record, at, deaf=at)):
            needed.add(place)
    print(f"{history.__name__}: {len(known)} syncs, of {len(needed)} places that need them")
    files = {Path(place).name for place, _ in needed}
    assert files >= {"segments.py", "__init__.py", "parts.py", "commit.py"}


@each
def test_a_sync_that_fails_on_any_rank_leaves_every_visible_checkpoint_whole(history, checks):
    for failing in range(len(list(syncs(rank_record_of(history).record)))):
        store = CrashStore()
        life = RanksLife(store)
        store.refuses = once(lambda one: one.is_sync, failing)
        with life.alive(), contextlib.suppress(gpuckpt.CheckpointError, AssertionError):
            history(life)
        for loss in sample(losses(store.record), 4, history.__name__):
            checks.held(loss)


def test_machines_with_roots_of_their_own_never_lose_what_was_promised():
    life = NodesLife()
    with life.alive():
        two_nodes_save_and_prune(life)
    found = list(losses(life.store.record))
    for loss in sample(found, 120, "nodes"):
        newest = NodesLife.found(loss.image)
        for promise in (loss.promise, loss.next):
            if all(newest[0] > step or newest == (step, version) for step, version in promise):
                break
        else:
            raise AssertionError(f"promised {set(loss.promise)}, found {newest}")
    assert len(found) > 100


def only_named(store: Any) -> bool:
    named = {manifest_name(step) for step in steps(store)}
    named |= {name for step in steps(store) for name in open_step(store, step).files}
    return set(store.names()) == named
