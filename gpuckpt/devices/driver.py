"""CUDA as CuPy gives it, and the few calls that it doesn't: errors, page-locked memory, streams."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Self

import cupy
import numpy as np
import numpy.typing as npt

from gpuckpt.errors import DeviceError, DeviceMemoryError, NotFoundError

Bytes = npt.NDArray[np.uint8]

_PORTABLE = 1  # cudaHostAllocPortable: page-locked for every device
_OUT_OF_MEMORY = 2
_NOT_SUPPORTED = 801
# After these nothing can be done on the device any more in this process:
# uncorrectable memory error, lost or stuck device, faults of a kernel (cudaError_t).
_LOST = {46, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999}
_WAIT_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ


def find_device(name: str) -> Any:
    """The CuPy device called `cuda:<n>`.

    Raises:
        NotFoundError: there is none.
    """
    ordinal = int(name.partition(":")[2])
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise NotFoundError(f"{name}: no CUDA device answers ({error})") from error
    if ordinal >= count:
        raise NotFoundError(f"{name}: this machine has {count} CUDA device(s)")
    return cupy.cuda.Device(ordinal)


@contextlib.contextmanager
def told(name: str, verb: str, remedy: str) -> Iterator[None]:
    """Translate CUDA's errors, here and nowhere else."""
    try:
        yield
    except (cupy.cuda.memory.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(name, verb, remedy, error) from error
    except cupy.cuda.compiler.CompileException as error:
        raise DeviceError(
            f"{name}: can't {verb}: a kernel of gpuckpt doesn't compile here; install the CUDA "
            f"version that this cupy was built for, or pass device='cpu': {error}"
        ) from error
    except (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError) as error:
        if error.status == _OUT_OF_MEMORY:
            raise _out_of_memory(name, verb, remedy, error) from error
        lost = "; the device is lost to this process: start another, which resumes from the "
        hint = lost + "newest committed step" if error.status in _LOST else ""
        raise DeviceError(f"{name}: can't {verb}: {error}{hint}") from error


def _out_of_memory(name: str, verb: str, remedy: str, error: BaseException) -> DeviceMemoryError:
    return DeviceMemoryError(f"{name}: not enough memory to {verb} ({error}); {remedy}")


def new_event() -> Any:
    """An event whose waiting thread sleeps."""
    return cupy.cuda.Event(block=True, disable_timing=True)


def caller_streams(ordinal: int) -> list[int]:
    """The streams to which this thread gives work now: cupy's current one, and torch's.

    As handles; 0 is the legacy default stream, 2 the thread's own.
    """
    streams = [cupy.cuda.get_current_stream().ptr]
    torch = sys.modules.get("torch")
    # Asking an uninitialised torch would initialise it.
    if torch is not None and torch.cuda.is_initialized():
        streams.append(torch.cuda.current_stream(ordinal).cuda_stream)
    return list(dict.fromkeys(streams))


class PageLocked:
    """Page-locked host memory, freed with the last array over it."""

    def __init__(self, nbytes: int) -> None:
        self._address = cupy.cuda.runtime.hostAlloc(nbytes, _PORTABLE)
        self.__array_interface__ = {
            "data": (self._address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(self) -> None:
        address, self._address = getattr(self, "_address", 0), 0
        if not address:
            return
        # Freeing waits for the device, and so for a stream that a `Semaphore` has stopped.  The
        # garbage collector may strike in a thread of ours for which that stream waits in turn.
        if threading.current_thread() is threading.main_thread():
            _free_host(address)
        else:
            with contextlib.suppress(RuntimeError):  # the process ends, and its memory with it
                _thread.start_new_thread(_free_host, (address,))


def _free_host(address: int) -> None:
    # At interpreter exit the driver may be gone, and its memory with it.
    with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
        cupy.cuda.runtime.freeHost(address)


class Semaphore:
    """Stops the caller's streams until gpuckpt's, or the host, lets them go on.

    Unlike an event it can be waited for before whoever will set it was given
    its work.  CUDA doesn't see such an order, and may have put both streams
    into one queue of the hardware, where the one then waits for ever for the
    other: whoever uses this must watch, and `open_now` if nothing goes on
    (CUDA Driver API, "Stream Memory Operations").
    """

    def __init__(self) -> None:
        memory = PageLocked(4)
        self._cell = np.asarray(memory).view(np.uint32)
        self._cell[0] = 0
        self._users: dict[int, Any] = {}  # by stream, an event after its last use of the cell
        # Not `__del__`: among garbage that of the events might come first.
        weakref.finalize(self, _outlast, self._users, memory).atexit = False
        self._opening: tuple[int, Any] = 0, None  # the last by a stream: its turn, and an event
        self.turn = 0
        self.broken = False

    def begin(self) -> Self:
        """Another turn: what is stopped from now on waits for the next opening."""
        self.turn += 1
        return self

    def is_open(self, turn: int) -> bool:
        """Whether what was stopped in a turn may go on."""
        return bool(self._cell[0] >= turn)

    def stop_callers(self, ordinal: int) -> None:
        """Let the caller's current streams wait for the opening; the host doesn't."""
        for stream in caller_streams(ordinal):
            _call("cuStreamWaitValue32", stream, self.address, self.turn, _WAIT_GEQ)
            self._used_by(stream)

    def open_after(self, stream: Any) -> None:
        """Open once a stream has come this far."""
        _call("cuStreamWriteValue32", stream.ptr, self.address, self.turn, 0)
        self._opening = self.turn, self._used_by(stream.ptr)

    def open_now(self, *, broken: bool = False) -> None:
        """Open at once; `broken` if it turned out that it can't be relied on here."""
        turn, written = self._opening
        if turn < self.turn and written is not None:
            # Else an opening of an earlier turn could still come, and close this one.
            with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
                if not written.done:
                    written.synchronize()
        self._cell[0] = self.turn
        self.broken = self.broken or broken

    def _used_by(self, stream: int) -> Any:
        event = new_event()
        cupy.cuda.runtime.eventRecord(event.ptr, stream)
        self._users[stream] = event
        return event

    @property
    def address(self) -> int:
        """Of the cell, the same for the host and the device."""
        address: int = self._cell.ctypes.data
        return address


def _outlast(users: Mapping[int, Any], memory: PageLocked) -> None:  # noqa: ARG001
    """Keep a cell until the streams that still read it, or write into it, have come past that."""
    for event in users.values():
        with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
            event.synchronize()


def usable_semaphore(stream: Any) -> Semaphore | None:
    """One that works on a stream; None if the driver or the device lacks the calls for it."""
    if _function("cuStreamWaitValue32") is None:
        return None
    semaphore = Semaphore()
    try:
        _call("cuStreamWaitValue32", stream.ptr, semaphore.address, 0, _WAIT_GEQ)
        semaphore.open_after(stream)
    except cupy.cuda.driver.CUDADriverError as error:
        if error.status == _NOT_SUPPORTED:
            return None
        raise
    finally:
        stream.synchronize()  # what was tried uses the cell, which may go at once
    return semaphore


def _call(name: str, stream: int, address: int, value: int, flags: int) -> None:
    # A thread has no context before its first call of the runtime that needs one; this is one.
    cupy.cuda.runtime.setDevice(cupy.cuda.runtime.getDevice())
    function = _function(name)
    status = function(
        *(ctypes.c_void_p(stream), ctypes.c_uint64(address)),
        *(ctypes.c_uint32(value), ctypes.c_uint(flags)),
    )
    cupy.cuda.driver.check_status(status)


@cache
def _function(name: str) -> Any:
    """A function of the driver that the process has loaded, in its second version."""
    for library in (None, "libcuda.so.1"):
        with contextlib.suppress(OSError, AttributeError):
            return getattr(ctypes.CDLL(library), f"{name}_v2")
    return None
