"""Power loss before every operation of a save, a commit, a prune and a sweep."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.commit import open_step, steps, sweep
from gpuckpt.resources import Resources
from gpuckpt.verify import verify_step
from tests.crash_store import CrashStore, PowerLossError

FROZEN = np.random.default_rng(1).standard_normal(500)
OLD: dict[str, Any] = {"w": np.arange(300, dtype=np.float32), "frozen": FROZEN, "step": 1}
NEW: dict[str, Any] = {"w": np.arange(300, dtype=np.float32) ** 2, "frozen": FROZEN, "step": 2}
LATER: dict[str, Any] = {"w": np.zeros(4), "frozen": np.zeros(2), "step": 3}


def same(one: dict, other: dict) -> bool:
    arrays = (one[name].tobytes() == other[name].tobytes() for name in ("w", "frozen"))
    return bool(one["step"] == other["step"] and all(arrays))


def save_new_beside_old(store: CrashStore) -> None:
    gpuckpt.save("", NEW, 2, store=store)


def save_new_and_prune_old(store: CrashStore) -> None:
    gpuckpt.save("", NEW, 2, store=store, keep=gpuckpt.Keep(last=1))


def replace_old(store: CrashStore) -> None:
    gpuckpt.save("", NEW, 1, store=store)


def save_what_has_changed_and_prune_old(store: CrashStore) -> None:
    """The new checkpoint refers to a segment that only the old one named, which is deleted."""
    state = {"w": OLD["w"].copy(), "frozen": FROZEN.copy(), "step": 0}
    options: dict[str, Any] = {
        "memory": "1 MiB",
        "chunk_nbytes": 4096,
        "keep": gpuckpt.Keep(last=1),
    }
    with gpuckpt.Checkpointer("", store=store, **options) as ckpt:
        ckpt.restore(state)
        state |= {"w": NEW["w"], "step": 2}
        pending = ckpt.save(2, state)
        pending.result()
    assert pending.stats.unchanged_nbytes == FROZEN.nbytes


def save_copies_and_prune_old(store: CrashStore) -> None:
    """The new checkpoint has a tensor that is another one, rounded."""
    state = {**NEW, "master": np.tile(FROZEN.astype(np.float32), 9)}
    state["copy"] = state["master"].astype(np.float16)
    gpuckpt.save("", state, 2, store=store, keep=gpuckpt.Keep(last=1))
    (entry,) = [one for one in open_step(store).tensors if one.spec.name == "copy"]
    assert [chunk.sources != () for chunk in entry.chunks] == [True]


def old_store(deaf_sync: int | None = None) -> CrashStore:
    """A store in which the old state is committed, as a machine that was switched off left it."""
    store = CrashStore()
    gpuckpt.save("", OLD, 1, store=store)
    (settled,) = store.reboots()
    settled.deaf_sync = deaf_sync
    return settled


def crashes(change, deaf_sync: int | None = None) -> Iterator[tuple[CrashStore, bool]]:
    """The store after a power loss before each operation of `change`, and whether it returned."""
    for operation in itertools.count():
        store = old_store(deaf_sync)
        store.crash_before = operation
        try:
            change(store)
        except PowerLossError:
            yield store, False
        else:
            yield store, True
            return


def check(after: CrashStore, *, committed: bool) -> None:
    """A store that a reboot found holds the old state or the new, whole, and goes on working."""
    resources = Resources("1 MiB", chunk_nbytes=4096)
    for step in steps(after):
        assert verify_step(after, step, resources) == []
    newest = gpuckpt.load("", store=after, memory="64 MiB")
    assert same(newest, NEW) or (same(newest, OLD) and not committed)
    sweep(after)
    assert same(gpuckpt.load("", store=after, memory="64 MiB"), newest)
    gpuckpt.save("", LATER, 3, store=after)
    assert same(gpuckpt.load("", store=after, memory="64 MiB"), LATER)


CHANGES = [
    save_new_beside_old,
    save_new_and_prune_old,
    replace_old,
    save_what_has_changed_and_prune_old,
    save_copies_and_prune_old,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_power_loss_leaves_the_old_checkpoint_or_the_new_one(change):
    count = 0
    for store, committed in crashes(change):
        for after in store.reboots():
            check(after, committed=committed)
            count += 1
    print(f"{change.__name__}: {count} reboots")
    assert count > 30


def syncs_of(change) -> int:
    store = old_store()
    change(store)
    return store.syncs


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_kill_and_then_a_power_loss_leave_the_old_checkpoint_or_the_new_one(change):
    """What a killed process left unsynced is what the next one's sweep begins with."""
    for operation in itertools.count():
        killed = old_store()
        killed.crash_before = operation
        with contextlib.suppress(PowerLossError):
            change(killed)
            return
        killed.crash_before = None
        sweep(killed)
        for after in killed.reboots():
            check(after, committed=False)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_sync_that_fails_leaves_every_visible_checkpoint_whole(change):
    for failing in range(syncs_of(change)):
        store = old_store()
        store.failing_sync = failing
        with contextlib.suppress(gpuckpt.StorageError):
            change(store)
        store.failing_sync = None
        for step in steps(store):
            assert verify_step(store, step, Resources("1 MiB", chunk_nbytes=4096)) == []
        newest = gpuckpt.load("", store=store, memory="64 MiB")
        assert same(newest, NEW) or same(newest, OLD)
        gpuckpt.save("", LATER, 3, store=store)
        assert same(gpuckpt.load("", store=store, memory="64 MiB"), LATER)


def find_damage(change, deaf: int) -> None:
    for store, committed in crashes(change, deaf):
        for after in store.reboots():
            check(after, committed=committed)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_without_any_one_of_its_syncs_some_reboot_finds_damage(change):
    for deaf in range(syncs_of(change)):
        with pytest.raises((AssertionError, gpuckpt.CheckpointError)):
            find_damage(change, deaf)
