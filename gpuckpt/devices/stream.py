"""gpuckpt's own stream on a device, and how it is ordered with the caller's."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import cupy

from gpuckpt.devices import Bytes
from gpuckpt.devices.driver import caller_streams, find_device, new_event, told

# Above the default, since streams of one priority may share a queue of the hardware.
_PRIORITY = -1


class OwnStream:
    """A non-blocking stream; nothing here makes the host wait but `synchronize` and refusals."""

    def __init__(self, name: str) -> None:
        """For the device called `cuda:<n>`."""
        self.name = name
        self.ordinal = int(name.partition(":")[2])
        # Held by a thread that gives several steps which share scratch memory.
        self.turn = threading.Lock()
        self._device = find_device(name)
        with self.used("begin"):
            self.stream = cupy.cuda.Stream(non_blocking=True, priority=_PRIORITY)

    @contextlib.contextmanager
    def used(
        self, verb: str, remedy: str = "pass snapshot='hold', or leave more memory free"
    ) -> Iterator[None]:
        """Make its device the current one, and translate CUDA's errors."""
        with told(self.name, verb, remedy), self._device:
            yield

    @contextlib.contextmanager
    def steps(self, verb: str) -> Iterator[None]:
        """As `used`, for several steps; if one is refused, those before it are waited for.

        So what they read and write isn't used any more when the error comes out.
        """
        with self.used(verb):
            try:
                yield
            except BaseException:
                with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):  # a lost device
                    self.stream.synchronize()
                raise

    def allocate(self, nbytes: int, what: str, remedy: str = "leave more memory free") -> Any:
        """Memory of the device, as a cupy array of bytes, out of cupy's pool.

        Out of the default stream's part of it: this stream's own would stay
        behind when it is gone.  It goes back once this stream's work is done.
        """
        with self.used(f"allocate {nbytes} bytes for {what}", remedy), cupy.cuda.Stream.null:
            lent = _Lent(self.stream, cupy.cuda.alloc(nbytes))
            memory = cupy.cuda.UnownedMemory(lent.address, nbytes, lent, self.ordinal)
            return cupy.ndarray(nbytes, "u1", cupy.cuda.MemoryPointer(memory, 0))

    def to_device(self, address: int, data: Bytes) -> None:
        """Begin to copy host memory to an address; at once only if it is page-locked."""
        self._copy(address, data.ctypes.data, data.size, cupy.cuda.runtime.memcpyHostToDevice)

    def to_host(self, room: Bytes, address: int) -> None:
        """Begin to copy from an address to host memory; at once only if it is page-locked."""
        self._copy(room.ctypes.data, address, room.size, cupy.cuda.runtime.memcpyDeviceToHost)

    def mark(self) -> Any:
        """An event after all that this stream has been given."""
        event = new_event()
        event.record(self.stream)
        return event

    def follow_callers(self) -> None:
        """Order this stream after the caller's current ones."""
        for stream in caller_streams(self.ordinal):
            event = new_event()
            cupy.cuda.runtime.eventRecord(event.ptr, stream)
            self.stream.wait_event(event)

    def lead_callers(self, event: Any) -> None:
        """Order the caller's current streams after an event of this one."""
        for stream in caller_streams(self.ordinal):
            cupy.cuda.runtime.streamWaitEvent(stream, event.ptr)

    def synchronize(self, event: Any) -> None:
        """Let the host wait for an event; other threads run on."""
        with self.used("finish a copy"):
            event.synchronize()

    def _copy(self, to: int, source: int, nbytes: int, kind: int) -> None:
        if nbytes:
            cupy.cuda.runtime.memcpyAsync(to, source, nbytes, kind, self.stream.ptr)


class _Lent:
    """Memory out of the pool, which has it back when a stream can't be using it any more."""

    def __init__(self, stream: Any, memory: Any) -> None:
        self.address: int = memory.ptr
        # Not `__del__`: among garbage the stream's might come first.
        weakref.finalize(self, _give_back, stream, memory).atexit = False


def _give_back(stream: Any, memory: object) -> None:  # noqa: ARG001 - its last reference
    with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
        stream.synchronize()
