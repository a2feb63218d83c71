"""CUDA as CuPy gives it: errors, page-locked memory, streams."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt

from gpuckpt.errors import DeviceError, DeviceMemoryError, NotFoundError

Bytes = npt.NDArray[np.uint8]

_PORTABLE = 1  # cudaHostAllocPortable: page-locked for every device
_OUT_OF_MEMORY = 2
# After these nothing can be done on the device any more in this process:
# uncorrectable memory error, lost or stuck device, faults of a kernel (cudaError_t).
_LOST = {46, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999}


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
        # At interpreter exit the driver may be gone, and its memory with it.
        with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
            if address:
                cupy.cuda.runtime.freeHost(address)
