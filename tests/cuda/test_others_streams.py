"""Arrays of libraries whose streams nobody knows: their own protocol orders what they still do."""

from __future__ import annotations

from typing import Any

import cupy as cp
import numpy as np

import gpuckpt
from gpuckpt.arrays import dlpack
from gpuckpt.stores.memory import MemoryStore
from tests.cuda.gates import Gate

COUNT = 1 << 16


class Lazy:
    """An array that a stream of its library's own still has to make, as JAX's arrays are."""

    def __init__(self, stream: Any) -> None:
        self.array, self.stream = cp.zeros(COUNT, np.uint32), stream
        cp.cuda.Device().synchronize()
        with stream:
            self.gate = Gate(stream)
            self.array += np.uint32(7)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.array.device.id

    def __dlpack__(self, stream: int | None = None) -> Any:
        capsule = self.array.__dlpack__(stream=-1)
        if stream != -1:
            made = self.stream.record()
            cp.cuda.runtime.streamWaitEvent(0 if stream == 1 else stream, made.ptr)
        return capsule


def saved_and_made(caller: Any, snapshot: str) -> bool:
    store, made_on = MemoryStore(), cp.cuda.Stream(non_blocking=True)
    cp.add(cp.zeros(COUNT, np.uint32), np.uint32(7))  # compiled before the gate closes
    with gpuckpt.Checkpointer("", store=store, snapshot=snapshot) as ckpt, caller:
        leaf = Lazy(made_on)
        ckpt.save(1, {"w": leaf}).result(60)
        leaf.gate.join()
    cp.cuda.Device().synchronize()
    return bool((gpuckpt.load("", device="cpu", like="numpy", store=store)["w"] == 7).all())


def test_a_snapshot_comes_after_what_the_library_still_does_on_its_own_stream():
    for snapshot in ("copy", "hold"):
        assert saved_and_made(cp.cuda.Stream.null, snapshot)
        assert saved_and_made(cp.cuda.Stream(non_blocking=True), snapshot)


def test_without_that_order_it_would_not(monkeypatch, standin_settings):
    if standin_settings is None or standin_settings["mode"] == "eager":
        return  # a GPU may be quick enough; in eager mode all is done at once
    look = dlpack.look
    monkeypatch.setattr(dlpack, "look", lambda leaf, **_: look(leaf, ordered=False))
    made = []
    for _ in range(3):
        try:
            made.append(saved_and_made(cp.cuda.Stream(non_blocking=True), "copy"))
        except gpuckpt.TornError:
            made.append(False)
    assert not all(made)
