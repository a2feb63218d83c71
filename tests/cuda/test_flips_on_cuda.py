"""Bits that flip in page-locked slots: a GPU's own digests, taken at both ends, tell."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
import pytest

import gpuckpt
from gpuckpt.devices import Arrived
from gpuckpt.devices.cuda_upload import CudaUpload
from gpuckpt.encoder import Encoder
from gpuckpt.stores.memory import MemoryStore
from tests.saving import save

CHUNK = 256 << 10
each_codec = pytest.mark.parametrize("codec", ["raw", "zstd", "delta"])


def new_state() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    state = {
        name: cupy.asarray(rng.standard_normal(CHUNK // 4 + 100, np.float32)) for name in "abc"
    }
    state["t"] = cupy.asarray(rng.standard_normal((90, 140))).T
    return state


def checkpoints(store: MemoryStore, codec: str, snapshot: str) -> gpuckpt.Checkpointer:
    return gpuckpt.Checkpointer(
        "", store=store, codec=codec, snapshot=snapshot, memory="24 MiB", chunk_nbytes=CHUNK
    )


@each_codec
@pytest.mark.parametrize("snapshot", ["copy", "hold"])
@pytest.mark.parametrize("name", ["b", "t"])
def test_a_bit_that_flips_between_the_device_and_encoding_is_found_when_it_is_read(
    codec, snapshot, name, monkeypatch
):
    """Also of a difference that the device took."""
    original = Encoder._known
    hit: list[str] = []

    def known(encoder: Any, chunk: Any, arrived: Arrived, spec: Any, part: Any) -> Any:
        seen = original(encoder, chunk, arrived, spec, part)
        parts = [*arrived.planes]
        for folded in arrived.delta:
            parts.append(folded[1] if isinstance(folded, tuple) else folded)
        parts = [one for one in parts if one.size]
        if spec.name == name and parts and armed:
            parts[-1][len(parts[-1]) // 3] ^= 4
            hit.append(name)
        return seen

    monkeypatch.setattr(Encoder, "_known", known)
    store, state, armed = MemoryStore(), new_state(), False
    with checkpoints(store, codec, snapshot) as ckpt:
        save(ckpt, 1, state)
        for array in state.values():
            with ckpt.update():
                cupy.multiply(array, array.dtype.type(1.0001), out=array)
        armed = True
        save(ckpt, 2, state)
        assert hit
        with pytest.raises(gpuckpt.CorruptError, match=rf"^{name} in .*the fingerprint"):
            ckpt.restore(new_state())
        wanted = {one: array.get() for one, array in state.items()}
        armed = False
        save(ckpt, 3, state)
        found = gpuckpt.load("", store=store)
    assert all(np.array_equal(found[one].get(), wanted[one]) for one in wanted)


@each_codec
@pytest.mark.parametrize("at", [0, 3])
def test_a_bit_that_flips_between_decoding_and_the_device_is_found_there(codec, at, monkeypatch):
    store, state = MemoryStore(), new_state()
    with checkpoints(store, codec, "copy") as ckpt:
        save(ckpt, 1, state)
        original, left = CudaUpload.start, [at]

        def start(upload: CudaUpload, known: Any = ()) -> Any:
            left[0] -= 1
            if left[0] == -1:
                upload.rooms[0][0][11] ^= 1
            return original(upload, known)

        monkeypatch.setattr(CudaUpload, "start", start)
        into = new_state()
        with pytest.raises(gpuckpt.CorruptError, match=r"^(a|b|c|t) in .*the fingerprint"):
            ckpt.restore(into)
        assert ckpt.restore(into) == 1
    assert all(np.array_equal(into[one].get(), state[one].get()) for one in state)


def test_bits_that_flip_in_the_copy_that_a_gpu_keeps_for_deltas_are_found():
    store, state = MemoryStore(), new_state()
    with checkpoints(store, "delta", "copy") as ckpt:
        save(ckpt, 1, state)
        device: Any = ckpt._resources.devices["cuda:0"]
        tables = device._copying[1]
        first, memory = tables.rows_nbytes + tables.packed_nbytes, device._shadow._memory
        for at in range(first, first + tables.layout.staged_nbytes, 20_000):
            byte = memory[at : at + 1]
            byte.set(byte.get() ^ np.uint8(8))
        for array in state.values():
            with ckpt.update():
                cupy.multiply(array, array.dtype.type(1.0001), out=array)
        assert save(ckpt, 2, state).delta_nbytes
        with pytest.raises(gpuckpt.CorruptError, match=r"^(a|b|c|t) in .*the fingerprint"):
            ckpt.restore(new_state())
        assert ckpt.restore(new_state(), 1) == 1


def test_with_fallback_every_array_on_the_device_is_the_older_step_s():
    store, state = MemoryStore(), new_state()
    with checkpoints(store, "raw", "copy") as ckpt:
        save(ckpt, 1, state)
        wanted = {one: array.get() for one, array in state.items()}
        with ckpt.update():
            for array in state.values():
                cupy.add(array, array.dtype.type(1), out=array)
        save(ckpt, 2, state)
        (segment,) = [name for name in store.names() if name.startswith("step-000000000002.")][1:]
        data = store.files[segment]
        data[len(data) * 2 // 3] ^= 1
        into = new_state()
        with pytest.warns(RuntimeWarning, match="step 2 is damaged, and step 1"):
            assert ckpt.resume(into, fallback=True) == 1
    assert all(np.array_equal(into[one].get(), wanted[one]) for one in wanted)
