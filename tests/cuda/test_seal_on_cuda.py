"""With a key, from a GPU and to one: what it has taken itself is sealed like any other."""

from __future__ import annotations

import cupy
import numpy as np
import pytest

import gpuckpt
from gpuckpt.commit import open_step
from gpuckpt.errors import AuthenticationError
from gpuckpt.seal import make_seal
from gpuckpt.stores.memory import MemoryStore
from tests.cuda.test_deltas_on_cuda import checkpoints, known, nudge, save, state_of

KEY = b"a key of thirty-two bytes or more"


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_differences_that_a_gpu_took_are_sealed_and_come_back_to_it(snapshot):
    store, state = MemoryStore(), state_of(cupy)
    with checkpoints(store, key=KEY, snapshot=snapshot) as ckpt:
        for step in (1, 2, 3):
            nudge(state, step, 0.01, cupy)
            stats = save(ckpt, step, state)
        assert snapshot == "hold" or stats.delta_nbytes
        expected = known(state)
        for array in state.values():
            array[...] = 0
        assert ckpt.restore(state) == 3
    assert known(state) == expected
    for entry in open_step(store, 3, make_seal(KEY)).tensors:
        assert all(len(link.digest) == 64 for chunk in entry.chunks for link in chunk.links)
    found = gpuckpt.load("", None, "cuda", store=store, key=KEY)
    assert known(found) == expected
    with pytest.raises(AuthenticationError):
        gpuckpt.load("", None, "cuda", store=store, key=bytes(32))


def test_bytes_that_are_not_the_sealed_ones_don_t_reach_a_gpu_s_user(monkeypatch):
    store = MemoryStore()
    gpuckpt.save("", {"w": cupy.arange(9000.0)}, 1, store=store, key=KEY, codec="raw")
    (segment,) = open_step(store).segments
    real = store.read_into

    def forged(name: str, offset: int, buffer: memoryview) -> None:
        real(name, offset, buffer)
        if name == segment:
            np.frombuffer(buffer, np.uint8)[0] ^= 1

    monkeypatch.setattr(store, "read_into", forged)
    monkeypatch.setattr("gpuckpt.reading.checksum", checksum_of(store))
    with pytest.raises(AuthenticationError, match="w in"):
        gpuckpt.load("", None, "cuda", store=store, key=KEY)


def checksum_of(store: MemoryStore):
    """What the manifest says, whatever the bytes are: somebody has found a collision."""
    known_check = open_step(store).tensors[0].chunks[0].checksum

    def every(parts):
        for _ in parts:
            pass
        return known_check

    return every
