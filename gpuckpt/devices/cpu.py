"""Tensors in host memory, as numpy arrays: complete by itself, and the reference for `cuda`."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.apart import Flag
from gpuckpt.arrays import gather, scatter
from gpuckpt.devices import Bytes, Done, Frozen, Transfer
from gpuckpt.errors import DeviceMemoryError

# Copies begin on cache lines.
_ALIGNMENT = 64


class CpuDevice:
    """The host as a `Device`: its stream is the caller's thread."""

    name = "cpu"

    def __init__(self) -> None:
        self._shadow: Bytes = np.empty(0, np.uint8)

    def host_memory(self, nbytes: int) -> Bytes:
        """Memory in huge pages where the system has them, none of them touched yet.

        A copy into pages that are touched for the first time takes three to
        eight times as long as the next one; so it is taken once and kept.
        """
        if not nbytes:
            return np.empty(0, np.uint8)
        try:
            pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, MemoryError) as error:
            raise DeviceMemoryError(
                f"the host has no {nbytes} bytes left ({error}); pass a smaller memory="
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(pages, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A new array."""
        return np.empty(shape, dtype)

    def room(self) -> int:
        """No bound of its own: the budget for host memory is the caller's to keep."""
        return 1 << 62

    def reserve(self, nbytes: int) -> None:
        """Have memory for copies of `nbytes` in all, its pages touched."""
        if self._shadow.size < nbytes:
            self._shadow = np.empty(0, np.uint8)
            self._shadow = self.host_memory(nbytes)
            self._shadow[:: mmap.PAGESIZE] = 0

    def freeze(self, arrays: Sequence[npt.NDArray[Any]], *, copy: bool) -> Frozen:
        """Copy `arrays` now, or hold them where they are."""
        return CpuCopy(self._copies(arrays)) if copy else CpuHold(arrays)

    def download(self, array: Any, start: int, slot: Bytes) -> Transfer:
        """Read a copy in place; copy live memory to `slot` when waited for."""
        if isinstance(array, _Copied):
            return Done(array.data[start : start + slot.size])
        return _Gather(array, start, slot)

    def begin_uploads(self) -> None:
        """Nothing: the caller's thread has done what it was given."""

    def upload(self, data: Bytes, array: npt.NDArray[Any], start: int) -> Transfer:
        """Copy at once."""
        scatter(data, array, start)
        return Done(data)

    def finish_uploads(self) -> None:
        """Nothing: uploads have been made when they return."""

    def _copies(self, arrays: Sequence[npt.NDArray[Any]]) -> list[_Copied]:
        offsets = _offsets([array.nbytes for array in arrays])
        self.reserve(offsets[-1])
        copies = []
        for array, offset in zip(arrays, offsets, strict=False):
            copied = self._shadow[offset : offset + array.nbytes]
            if array.nbytes:
                np.copyto(copied.view(array.dtype).reshape(array.shape), array)
            copies.append(_Copied(copied))
        return copies


class _Copied:
    """Bytes of a tensor, in C order, that nobody else writes to."""

    def __init__(self, data: Bytes) -> None:
        self.data = data


class _Gather:
    """A copy out of live memory that the thread which waits for it makes."""

    def __init__(self, array: npt.NDArray[Any], start: int, slot: Bytes) -> None:
        self._array, self._start, self._slot = array, start, slot

    def wait(self) -> Bytes:
        gather(self._array, self._start, self._slot)
        return self._slot


class CpuCopy:
    """Copies: the caller may change its arrays at once."""

    def __init__(self, copies: Sequence[_Copied]) -> None:
        self.arrays = copies

    def order_update(self) -> None:
        """Nothing: no live memory is read."""

    def settle(self) -> None:
        """Nothing: the copies were made at once."""

    def end_downloads(self) -> None:
        """Nothing: copies are read in place."""

    def release(self) -> None:
        """Give the copies' memory back to the device, which keeps it."""
        self.arrays = ()


class CpuHold:
    """Live arrays: the caller's next update waits until all have been read."""

    def __init__(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        self.arrays = arrays
        self._released = Flag()

    def order_update(self) -> None:
        """Wait: on the host, the caller's thread is the stream.

        An interrupt is raised only after that: who handles it may change the state.
        """
        self._released.wait_out()

    def settle(self) -> None:
        """Nothing: there is no copy."""

    def end_downloads(self) -> None:
        """Nothing: on the host, downloads end when they have been waited for."""

    def release(self) -> None:
        """Let updates go on."""
        self.arrays = ()
        self._released.set()


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Where arrays of these bytes begin, one after the other, and where the last ends."""
    offsets = [0]
    for nbytes in sizes:
        offsets.append(offsets[-1] + -(-nbytes // _ALIGNMENT) * _ALIGNMENT)
    return offsets
