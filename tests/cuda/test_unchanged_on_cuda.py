"""What hasn't changed stays on the GPU: its digests say that it is on the disk already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
import pytest

import gpuckpt
from gpuckpt.commit import open_step
from gpuckpt.devices import kernels
from gpuckpt.devices.stream import OwnStream
from gpuckpt.errors import TornError
from gpuckpt.layout import LEAF_NBYTES
from gpuckpt.resources import Resources
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.verify import verify_step

CHUNK = 256 << 10
COUNT = 40
each_way = pytest.mark.parametrize("snapshot", ["copy", "hold"])


class Crossed:
    """Bytes that were copied to the host so far."""

    nbytes = 0


@pytest.fixture
def crossed(monkeypatch) -> Crossed:
    counted, to_host = Crossed(), OwnStream.to_host

    def count(self: OwnStream, room: Any, address: int) -> None:
        counted.nbytes += room.nbytes
        to_host(self, room, address)

    monkeypatch.setattr(OwnStream, "to_host", count)
    return counted


def new_state() -> dict[str, Any]:
    """Half of it is frozen, in turn with the other half; small and strided ones among them."""
    rng = np.random.default_rng(1)
    state = {
        f"{at:02}.{name}": cupy.asarray(rng.standard_normal(CHUNK // 4 + at, np.float32))
        for at in range(COUNT // 2)
        for name in ("frozen", "w")
    }
    state["small"] = cupy.arange(100, dtype=np.int16)
    state["t"] = cupy.asarray(rng.standard_normal((300, 140), np.float32)).T
    return state


def checkpoints(store: MemoryStore, snapshot: str, **options: Any) -> gpuckpt.Checkpointer:
    options = {"memory": "24 MiB"} | options
    return gpuckpt.Checkpointer("", store=store, snapshot=snapshot, chunk_nbytes=CHUNK, **options)


def change(state: dict[str, Any]) -> None:
    for name, array in state.items():
        if name.endswith(".w"):
            cupy.add(array, np.float32(1), out=array)


def known(state: dict[str, Any]) -> dict[str, bytes]:
    return {name: bytes(array.get().tobytes()) for name, array in state.items()}


def save(ckpt: gpuckpt.Checkpointer, step: int, state: Any, work: Callable[[Any], None]) -> Any:
    with ckpt.update():
        work(state)
    pending = ckpt.save(step, state)
    pending.result(60)
    return pending.stats


def nothing(state: Any) -> None:
    """Change nothing of it."""


@each_way
@pytest.mark.parametrize("codec", ["auto", "delta", "raw"])
def test_a_state_that_hasnt_changed_isnt_brought_to_the_host(crossed, snapshot, codec):
    store, state = MemoryStore(), new_state()
    with checkpoints(store, snapshot, codec=codec) as ckpt:
        first = save(ckpt, 1, state, nothing)
        crossed.nbytes = 0
        second = save(ckpt, 2, state, nothing)
    nbytes = sum(array.nbytes for array in state.values())
    assert first.brought_nbytes == first.raw_nbytes == nbytes
    assert second.unchanged_nbytes == nbytes
    assert second.brought_nbytes == second.written_nbytes == 0
    leaves = nbytes // LEAF_NBYTES + len(state)
    assert crossed.nbytes <= leaves * (kernels.SUMMARY.itemsize + 2 * kernels.DIGEST_NBYTES)
    found = gpuckpt.load("", device="cpu", store=store)
    assert {name: array.tobytes() for name, array in found.items()} == known(state)


@each_way
def test_of_a_state_that_has_changed_in_part_that_part_is_brought(crossed, snapshot):
    store, state = MemoryStore(), new_state()
    with checkpoints(store, snapshot) as ckpt:
        save(ckpt, 1, state, nothing)
        wanted = known(state)
        for step in (2, 3):
            crossed.nbytes = 0
            stats = save(ckpt, step, state, change)
            part = sum(array.nbytes for name, array in state.items() if name.endswith(".w"))
            assert stats.brought_nbytes == stats.raw_nbytes - stats.unchanged_nbytes == part
            assert part <= crossed.nbytes < 1.1 * part
    entries = {entry.spec.name: entry.statistics for entry in open_step(store, 3).tensors}
    before = {entry.spec.name: entry.statistics for entry in open_step(store, 1).tensors}
    frozen = [name for name in entries if name.endswith(".frozen")]
    assert frozen
    assert [entries[name] for name in frozen] == [before[name] for name in frozen]
    assert {name: bytes_ for name, bytes_ in known(state).items() if "frozen" in name} == {
        name: bytes_ for name, bytes_ in wanted.items() if "frozen" in name
    }
    found = gpuckpt.load("", device="cpu", store=store)
    assert {name: array.tobytes() for name, array in found.items()} == known(state)
    assert verify_step(store, 3, Resources("64 MiB", chunk_nbytes=CHUNK)) == []


@each_way
def test_where_each_checkpoint_is_full_everything_is_brought(snapshot):
    store, state = MemoryStore(), new_state()
    with checkpoints(store, snapshot, full_every=1) as ckpt:
        for step in (1, 2):
            stats = save(ckpt, step, state, nothing)
            assert stats.brought_nbytes == stats.raw_nbytes


@each_way
def test_after_a_resume_what_the_host_keeps_for_deltas_is_brought_once(snapshot):
    store, state = MemoryStore(), new_state()
    with checkpoints(store, snapshot, codec="delta") as ckpt:
        save(ckpt, 1, state, nothing)
    with checkpoints(store, snapshot, codec="delta") as ckpt:
        ckpt.resume(state)
        brought = [save(ckpt, step, state, nothing).brought_nbytes for step in (2, 3)]
        stats = save(ckpt, 4, state, change_a_little)
    assert brought[1] == 0
    assert (brought[0] == 0) == (snapshot == "copy")  # then they are on the device anyway
    assert stats.delta_nbytes > 0


def change_a_little(state: dict[str, Any]) -> None:
    state["00.w"][::50] *= np.float32(1 + 1e-6)


def test_what_changes_between_a_look_and_a_read_fails_the_save(monkeypatch):
    """Under `hold`, without `update`: nobody may take it for what it was."""
    store, state = MemoryStore(), new_state()
    with checkpoints(store, "hold", on_error="warn") as ckpt:
        save(ckpt, 1, state, nothing)
        launch = kernels.filter_chunks

        def change_first(*arguments: Any) -> None:
            for name in ("00.frozen", "19.frozen"):
                state[name][5] += np.float32(1)
            cupy.cuda.get_current_stream().synchronize()
            launch(*arguments)

        monkeypatch.setattr(kernels, "filter_chunks", change_first)
        with pytest.raises(TornError, match="frozen"):
            save(ckpt, 2, state, nothing)
        with pytest.warns(RuntimeWarning, match="frozen"):
            ckpt.wait()
        assert ckpt.steps() == [1]
