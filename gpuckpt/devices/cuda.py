"""Tensors in a GPU's memory, as cupy arrays: the only module that gives CUDA work to do.

Everything runs on one non-blocking stream of gpuckpt's own.  Three events
order it with the caller's stream; of these only the second can make the host
wait, and only in `hold` (see `CudaHold`):

1. before a snapshot is read, gpuckpt's stream waits for the caller's;
2. before the caller updates what is being read, its stream waits for gpuckpt's;
3. after a restore, the caller's stream waits for the uploads.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gpuckpt.apart import Flag
from gpuckpt.arrays import gather, scatter
from gpuckpt.devices import Bytes, Frozen, Transfer
from gpuckpt.errors import DeviceError, DeviceMemoryError, NotFoundError

try:
    import cupy
except ImportError as error:
    raise NotFoundError(
        "this needs cupy, which isn't installed: "
        "pip install 'gpuckpt[cuda13]' (or [cuda12]), or pass device='cpu'"
    ) from error

# Copies on the device begin where cupy's own allocations would.
_ALIGNMENT = 512
# Of the free memory, this much is left to the training run.
_HEADROOM = 0.1
_PORTABLE = 1  # cudaHostAllocPortable: page-locked for every device


class CudaDevice:
    """One GPU as a `Device`."""

    def __init__(self, ordinal: int) -> None:
        self.name = f"cuda:{ordinal}"
        self._device = _device(self.name)
        self._shadow: Any = None
        with self._used("begin"):
            self._stream = cupy.cuda.Stream(non_blocking=True)

    def host_memory(self, nbytes: int) -> Bytes:
        """Page-locked memory of exactly `nbytes`, for all devices."""
        if not nbytes:
            return np.empty(0, np.uint8)
        with self._used("allocate page-locked host memory"):
            return np.asarray(_Pinned(nbytes))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """A new array from cupy's memory pool, for the caller's current stream."""
        nbytes = math.prod(shape) * dtype.itemsize
        remedy = "leave more memory free, or pass device='cpu'"
        with _told(self.name, f"allocate an array of {nbytes} bytes", remedy), self._device:
            return cupy.empty(shape, dtype)

    def room(self) -> int:
        """Free memory, the caller's memory pool's included, less a tenth."""
        with self._used("ask for its memory"):
            free, _ = cupy.cuda.runtime.memGetInfo()
            free += cupy.get_default_memory_pool().free_bytes()
        kept = 0 if self._shadow is None else self._shadow.nbytes
        return int(free * (1 - _HEADROOM)) + kept

    def reserve(self, nbytes: int) -> None:
        """Allocate memory for copies, on gpuckpt's own stream."""
        if self._shadow is None or self._shadow.nbytes < nbytes:
            self._shadow = None
            with self._used(f"allocate {nbytes} bytes for a copy of the state"), self._stream:
                self._shadow = cupy.empty(nbytes, np.uint8)

    def freeze(self, arrays: Sequence[Any], *, copy: bool) -> Frozen:
        """Freeze `arrays` after the caller's current stream; returns before any copy is made."""
        if copy:
            self.reserve(sum(_aligned(array.nbytes) for array in arrays))
        with self._used("take a snapshot"):
            self._stream.wait_event(self._record(cupy.cuda.get_current_stream()))
            if not copy:
                return CudaHold(self, arrays)
            copies = self._copies(arrays)
            return CudaCopy(self, arrays, copies, self._record(self._stream))

    def download(self, array: Any, start: int, slot: Bytes) -> Transfer:
        """Begin to copy to `slot`, which is truly asynchronous only if it is page-locked."""
        with self._used("copy to the host"), self._stream:
            source, keep = array.data.ptr + start, array
            if not array.flags.c_contiguous:
                keep = cupy.empty(slot.size, np.uint8)
                gather(array, start, keep)
                source = keep.data.ptr
            cupy.cuda.runtime.memcpyAsync(
                slot.ctypes.data,
                source,
                slot.size,
                cupy.cuda.runtime.memcpyDeviceToHost,
                self._stream.ptr,
            )
            return CudaTransfer(self, self._record(self._stream), slot, (array, keep))

    def begin_uploads(self) -> None:
        """Order uploads after the caller's current stream."""
        with self._used("begin to restore"):
            self._stream.wait_event(self._record(cupy.cuda.get_current_stream()))

    def upload(self, data: Bytes, array: Any, start: int) -> Transfer:
        """Begin to copy from `data`."""
        with self._used("copy from the host"), self._stream:
            contiguous = array.flags.c_contiguous
            target = array if contiguous else cupy.empty(data.size, np.uint8)
            cupy.cuda.runtime.memcpyAsync(
                target.data.ptr + (start if contiguous else 0),
                data.ctypes.data,
                data.size,
                cupy.cuda.runtime.memcpyHostToDevice,
                self._stream.ptr,
            )
            if not contiguous:
                scatter(target, array, start)
            return CudaTransfer(self, self._record(self._stream), data, (array, target))

    def finish_uploads(self) -> None:
        """Order the caller's current stream after the uploads."""
        with self._used("finish restoring"):
            self.wait_for(self._record(self._stream))

    def record(self) -> Any:
        """An event after all that gpuckpt's stream has been given."""
        with self._used("record an event"):
            return self._record(self._stream)

    def wait_for(self, event: Any) -> None:
        """Order the caller's current stream after `event`."""
        with self._used("order an update"):
            cupy.cuda.get_current_stream().wait_event(event)

    def synchronize(self, event: Any) -> None:
        """Let the host wait for `event`; other threads run on."""
        with self._used("finish a copy"):
            event.synchronize()

    def _copies(self, arrays: Sequence[Any]) -> list[Any]:
        copies, offset = [], 0
        with self._stream:
            for array in arrays:
                copied = self._shadow[offset : offset + array.nbytes]
                offset += _aligned(array.nbytes)
                if array.nbytes and array.flags.c_contiguous:
                    copied.data.copy_from_device_async(array.data, array.nbytes)
                elif array.nbytes:
                    copied.view(array.dtype).reshape(array.shape)[...] = array
                copies.append(copied)
        return copies

    @staticmethod
    def _record(stream: Any) -> Any:
        event = cupy.cuda.Event(block=True, disable_timing=True)
        event.record(stream)
        return event

    @contextlib.contextmanager
    def _used(self, verb: str) -> Iterator[None]:
        """Make this the current device, and translate CUDA's errors."""
        remedy = "pass snapshot='hold', or leave more memory free"
        with _told(self.name, verb, remedy), self._device:
            yield


class CudaTransfer:
    """A copy on gpuckpt's stream, and what must live until it has been made."""

    def __init__(self, device: CudaDevice, event: Any, data: Bytes, keep: object) -> None:
        self._device, self._event, self._data, self._keep = device, event, data, keep

    def wait(self) -> Bytes:
        """Wait for the copy; then its source may go."""
        self._device.synchronize(self._event)
        self._keep = None
        return self._data


class CudaCopy:
    """Copies on the device, made as soon as the caller's stream has come this far."""

    def __init__(
        self, device: CudaDevice, sources: Sequence[Any], copies: Sequence[Any], made: Any
    ) -> None:
        self.arrays = copies
        self._device, self._sources, self._made = device, sources, made

    def order_update(self) -> None:
        """Let the caller's stream wait for the copies; the host doesn't."""
        self._device.wait_for(self._made)

    def settle(self) -> None:
        """Wait for the copies; only then may the sources' memory be used again."""
        self._device.synchronize(self._made)
        self._sources = ()

    def end_downloads(self) -> None:
        """Nothing: downloads read the copies."""

    def release(self) -> None:
        """Let go of the copies, whose memory the device keeps."""
        self._sources = self.arrays = ()


class CudaHold:
    """Live arrays, read chunk by chunk as host memory allows."""

    def __init__(self, device: CudaDevice, arrays: Sequence[Any]) -> None:
        self.arrays = arrays
        self._device, self._last, self._ended = device, device.record(), Flag()

    def order_update(self) -> None:
        """Let the caller's stream wait for the last read.

        The host waits until that read has been given to the device, since an
        event can't be waited for before it is recorded.
        """
        self._ended.wait_out()
        self._device.wait_for(self._last)

    def settle(self) -> None:
        """Nothing: there is no copy."""

    def end_downloads(self) -> None:
        """Let updates be ordered."""
        try:
            self._last = self._device.record()
        finally:
            self._ended.set()

    def release(self) -> None:
        """Let go of the arrays."""
        self._ended.set()
        self.arrays = ()


def _device(name: str) -> Any:
    ordinal = int(name.partition(":")[2])
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise NotFoundError(f"{name}: no CUDA device answers ({error})") from error
    if ordinal >= count:
        raise NotFoundError(f"{name}: this machine has {count} CUDA device(s)")
    return cupy.cuda.Device(ordinal)


@contextlib.contextmanager
def _told(name: str, verb: str, remedy: str) -> Iterator[None]:
    """Translate CUDA's errors, here and nowhere else."""
    try:
        yield
    except (cupy.cuda.memory.OutOfMemoryError, MemoryError) as error:
        raise DeviceMemoryError(
            f"{name}: not enough memory to {verb} ({error}); {remedy}"
        ) from error
    except (
        cupy.cuda.runtime.CUDARuntimeError,
        cupy.cuda.driver.CUDADriverError,
        cupy.cuda.compiler.CompileException,
    ) as error:
        raise DeviceError(f"{name}: can't {verb}: {error}") from error


class _Pinned:
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
        if address:
            # At interpreter exit the driver may be gone, and its memory with it.
            with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
                cupy.cuda.runtime.freeHost(address)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
