"""A copy that a GPU keeps is read once more, if the disk was full and room could be made."""

from __future__ import annotations

import errno
from typing import Any

import cupy
import pytest

import gpuckpt
from gpuckpt.commit import open_step
from gpuckpt.resources import Resources
from gpuckpt.verify import verify_step
from tests.cuda.test_deltas_on_cuda import checkpoints, known, loaded, nudge, save, state_of
from tests.failing_disks import SmallStore, refusal

LEFT_BEHIND = "step-000000000009.0badcafe.r0.0.segment"


class Forgetful(SmallStore):
    """A small store that, once it has been full, can't read what it had before."""

    lost: tuple[str, ...] = ()

    def remove(self, name: str) -> None:
        if name == LEFT_BEHIND:
            self.lost = self.forgets
        super().remove(name)

    def size(self, name: str) -> int:
        if name in self.lost:
            raise refusal(errno.EIO, f"read {name}")
        return super().size(name)

    forgets: tuple[str, ...] = ()


@pytest.mark.parametrize("forgets", [False, True])
def test_a_copy_on_a_gpu_is_written_anew_once_room_was_made(forgets):
    store, state = Forgetful(10**9, says=False), state_of(cupy)
    with checkpoints(store, codec="delta") as ckpt:
        for step in (1, 2):
            nudge(state, step, 0.01, cupy)
            save(ckpt, step, state)
        nudge(state, 3, 0.01, cupy)
        store.files[LEFT_BEHIND] = bytearray(10**6)
        store.nbytes -= store.left - 20_000
        store.forgets = tuple(open_step(store, 2).segments) if forgets else ()
        stats: Any = save(ckpt, 3, state)
        assert stats.freed_nbytes == 10**6
        assert stats.chunks == sum(len(entry.chunks) for entry in open_step(store, 3).tensors)
        assert (stats.delta_nbytes > 0, stats.unchanged_nbytes > 0) == (not forgets, not forgets)
        assert loaded(store) == known(state)
        store.lost, store.nbytes = (), 10**9
        assert verify_step(store, 3, Resources("8 MiB", chunk_nbytes=64 << 10)) == []
        nudge(state, 4, 0.01, cupy)
        assert save(ckpt, 4, state).delta_nbytes > 0
        assert loaded(store) == known(state)
    assert gpuckpt.load("", 1, "cpu", store=store)["small"].size == 1000
