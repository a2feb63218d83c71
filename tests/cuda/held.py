"""What holds a save or a restore up for a moment, so that whoever should wait for it must."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import cupy as cp
import numpy as np

import gpuckpt
from gpuckpt.arena import AREAS, FEWEST_SLOTS, arena_nbytes
from gpuckpt.arrays import dlpack
from gpuckpt.devices import kernels
from gpuckpt.plan import area_nbytes
from gpuckpt.resources import Resources
from gpuckpt.stores.memory import MemoryAppender, MemoryStore
from tests.cuda.gates import Gate

CHUNK = 1 << 16
COUNT = 1 << 18  # elements of four bytes: sixteen chunks, more than there are slots
FEW = 1 << 16  # four chunks, fewer than there are slots
LEAST = FEWEST_SLOTS * AREAS * area_nbytes(CHUNK)
# As much as all useful slots take: nothing of what is held has host memory of its own.
SLOTS = arena_nbytes(1 << 30, CHUNK, Resources("1 GiB").workers)


class FullStore(MemoryStore):
    """Refuses new files while it is full."""

    full = False

    def create(self, name: str) -> MemoryAppender:
        if self.full:
            raise gpuckpt.StorageError("full")
        return super().create(name)


class StuckStore(MemoryStore):
    """New files wait until it is freed; `reached` says that one does."""

    def __init__(self) -> None:
        super().__init__()
        self.freed, self.reached = threading.Event(), threading.Event()

    def create(self, name: str) -> MemoryAppender:
        self.reached.set()
        assert self.freed.wait(30)
        return super().create(name)


class LateStore(MemoryStore):
    """Reads at one offset wait until some others have been made."""

    late: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self._others = threading.Semaphore(0)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if offset == self.late:
            for _ in range(3):
                assert self._others.acquire(timeout=30)
        super().read_into(name, offset, buffer)
        self._others.release()


class Float8:
    """An array of another library, float8_e4m3fn, that speaks DLPack alone."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self._array.device.id

    def __dlpack__(self, stream: int | None = None) -> Any:
        capsule = self._array.__dlpack__(stream=stream)
        dlpack._tensor_of(capsule).dtype.code = 10
        return capsule


def checkpoints(store: MemoryStore, snapshot: str, **options: Any) -> gpuckpt.Checkpointer:
    return gpuckpt.Checkpointer("", store=store, snapshot=snapshot, chunk_nbytes=CHUNK, **options)


def new_stream() -> Any:
    return cp.cuda.Stream(non_blocking=True)


def filled(value: int, count: int = COUNT) -> Any:
    """A state's array, after whose first kernels no later one has to be compiled."""
    array = filled_on(cp.cuda.get_current_stream(), value, count)
    cp.cuda.Device().synchronize()
    return array


def filled_on(stream: Any, value: int, count: int = COUNT) -> Any:
    with stream:
        array = cp.zeros(count, np.uint32)
        array += np.uint32(value)
        stream.synchronize()
    return array


def is_saved(store: MemoryStore, value: int, step: int = 1) -> bool:
    return bool((gpuckpt.load("", step, "cpu", store=store)["w"] == value).all())


def own_stream(ckpt: gpuckpt.Checkpointer, name: str = "cuda:0") -> Any:
    """The stream on which a checkpointer works."""
    device: Any = ckpt._resources.devices[name]
    return device._stream.stream


@contextlib.contextmanager
def held_up(ckpt: gpuckpt.Checkpointer, seconds: float = 0.1, device: int = 0) -> Iterator[Gate]:
    """What gpuckpt's own stream is given in the block waits for a moment."""
    with cp.cuda.Device(device):
        gate = Gate(own_stream(ckpt, f"cuda:{device}"), seconds)
    yield gate
    gate.open()
    gate.join()
    with cp.cuda.Device(device):
        cp.cuda.Device().synchronize()


def frozen_of(ckpt: gpuckpt.Checkpointer, name: str = "cuda:0") -> Any:
    """The frozen tensors of the save in flight."""
    assert ckpt._saves.save is not None
    return ckpt._saves.save.snapshot.frozen[name]


def failure_of(ckpt: gpuckpt.Checkpointer) -> BaseException | None:
    """How the save in flight failed, if it did."""
    try:
        ckpt.wait()
    except (gpuckpt.CheckpointError, RuntimeError) as error:
        return error
    return None


def has_all_slots(ckpt: gpuckpt.Checkpointer) -> bool:
    """Whether every slot has been given back; there must be no save in flight."""
    arena = ckpt._resources._arena
    assert arena is not None
    return len(arena._free) == arena.count


@contextlib.contextmanager
def torch_on(stream: Any, *, initialized: bool = True) -> Iterator[None]:
    """A `torch` whose current stream on device 0 is this one."""

    def current_stream(ordinal: int) -> Any:
        assert initialized, "asking it would initialise it"
        return SimpleNamespace(cuda_stream=stream.ptr if ordinal == 0 else 0)

    cuda_of_torch = SimpleNamespace(
        is_initialized=lambda: initialized, current_stream=current_stream
    )
    # Not by `patch.dict`: it empties the table for a moment, and a save's thread that imports then
    # makes modules a second time.
    real = sys.modules.get("torch")
    sys.modules["torch"] = cast("ModuleType", SimpleNamespace(cuda=cuda_of_torch))
    try:
        yield
    finally:
        if real is None:
            del sys.modules["torch"]
        else:
            sys.modules["torch"] = real


@contextlib.contextmanager
def no_threads(named: str) -> Iterator[threading.Event]:
    """No more threads of this name can be had, which shows once the event is set."""
    start, shows = threading.Thread.start, threading.Event()

    def refuse(self: threading.Thread) -> None:
        if self.name.startswith(named):
            assert shows.wait(30)
            raise RuntimeError("can't start new thread")
        start(self)

    with patch.object(threading.Thread, "start", refuse):
        yield shows


@contextlib.contextmanager
def held_up_from(ckpt: gpuckpt.Checkpointer, launch: int) -> Iterator[None]:
    """gpuckpt's own stream waits for a moment before it does a launch for a snapshot."""
    filter_chunks, launches, gates = kernels.filter_chunks, count(), []

    def after_a_gate(*arguments: Any) -> None:
        if next(launches) == launch:
            gates.append(Gate(own_stream(ckpt)))
        filter_chunks(*arguments)

    with patch.object(kernels, "filter_chunks", after_a_gate):
        yield
    for gate in gates:
        gate.join()
    cp.cuda.Device().synchronize()


def goes_on(waiting: Callable[[], object], seconds: float = 5) -> bool:
    """Whether a wait ends; it is left alone, in a thread that the interpreter's exit ends."""
    thread = threading.Thread(target=waiting, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def chunk_places(store: MemoryStore, step: int = 1) -> Sequence[tuple[str, int]]:
    """Where the chunks of a step's first tensor lie: segment and offset."""
    from gpuckpt.commit import open_step

    chunks = open_step(store, step).tensors[0].chunks
    return [(chunk.extent.segment, chunk.extent.offset) for chunk in chunks]
