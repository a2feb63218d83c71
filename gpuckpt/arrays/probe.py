"""Look at many arrays of one library at once: much less about each than `look` finds out.

What is seen here says only whether arrays are as they were when `look` saw
them, and where they lie now.  So it is little, and read in bulk.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import attrgetter, call, eq, is_
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpuckpt.arrays.view import Tensor, host_words
from gpuckpt.dtypes import name_of

Library = Literal["numpy", "cupy", "torch"]
LIBRARIES: tuple[Library, ...] = ("numpy", "cupy", "torch")
Getter = Callable[[Any], Any]
Addresses = npt.NDArray[np.uint64]


class Same:
    """Arrays of cupy's, known again as the very ones that lay at certain addresses.

    Such an array has one memory, on one device, and one dtype for its whole
    life: what it says of them can't be set.  Doesn't keep the arrays alive.
    """

    def __init__(self) -> None:
        self._arrays: list[weakref.ref[Any]] = []
        self._addresses: Addresses = np.empty(0, np.uint64)

    def note(self, arrays: Sequence[Any], addresses: Addresses) -> None:
        """From now on these are the arrays."""
        self._arrays, self._addresses = list(map(weakref.ref, arrays)), addresses

    def addresses(self, arrays: Sequence[Any]) -> Addresses | None:
        """Where they lie; None if one of them is another one."""
        same = len(arrays) == len(self._arrays) and all(map(is_, map(call, self._arrays), arrays))
        return self._addresses if same else None


@dataclass(frozen=True, slots=True)
class Facts:
    """What doesn't change about arrays of one library: properties, and how to read them.

    Those of `memory` are read from what the library has for an array's memory,
    and `strides` only of arrays whose strides don't follow from the others.
    """

    maker: Library
    dtypes: list[Any]
    layout: tuple[tuple[Getter, list[Any]], ...]
    memory: tuple[tuple[Getter, list[Any]], ...]
    strided: bytes
    strides: list[Any]
    same: Same


def probed(kind: type) -> Library | None:
    """The library whose arrays are exactly of this type; None if each has to be looked at.

    Subclasses may mean anything by their shape, and are looked at.
    """
    if kind is np.ndarray:
        return "numpy"
    if kind is getattr(sys.modules.get("cupy"), "ndarray", None):
        return "cupy"
    torch = sys.modules.get("torch")
    if kind is getattr(torch, "Tensor", None):
        return "torch"
    return "torch" if kind is getattr(getattr(torch, "nn", None), "Parameter", None) else None


def facts(library: Library, arrays: Sequence[Any]) -> Facts:
    """The properties of arrays, each of which `look` saw as a tensor; no array is kept."""
    memories = _memories(library, arrays)
    strided = _strided(library, arrays)
    return Facts(
        library,
        list(map(_DTYPE, arrays)),
        tuple((get, list(map(get, arrays))) for get in _of_layout(library)),
        tuple((get, list(map(get, memories))) for get in _of_memory(library)),
        strided,
        list(map(_stride_of(library), compress(arrays, strided))),
        Same(),
    )


def locate(arrays: Sequence[Any], before: Facts) -> tuple[Addresses, list[Any]] | None:
    """Where as many arrays lie now, and what keeps each one's memory alive.

    None if one of them has other properties than `before`.  An address is in
    the memory of the array's device; for an array without elements it means
    nothing.  A torch tensor can be given other memory at any time, so that
    its storage is kept instead.
    """
    if not all(all(map(eq, map(get, arrays), known)) for get, known in before.layout):
        return None  # tuples are compared as they are made, so that they needn't be kept
    if list(map(_stride_of(before.maker), compress(arrays, before.strided))) != before.strides:
        return None
    if (addresses := before.same.addresses(arrays)) is not None:
        return addresses, list(arrays)
    memories = _memories(before.maker, arrays)
    if any(list(map(get, memories)) != known for get, known in before.memory):
        return None
    dtypes = list(map(_DTYPE, arrays))
    if not (all(map(is_, dtypes, before.dtypes)) or _same_names(dtypes, before.dtypes)):
        return None
    if before.maker == "numpy":
        return _data_pointers(arrays), list(arrays)
    if before.maker == "cupy":
        addresses = np.fromiter(map(attrgetter("ptr"), memories), np.uint64, len(arrays))
        before.same.note(arrays, addresses)
        return addresses, list(arrays)
    tensor = sys.modules["torch"].Tensor
    if any(map(tensor.is_neg, arrays)) or any(map(tensor.is_conj, _complex(arrays, dtypes))):
        return None
    pointers = np.fromiter(map(tensor.data_ptr, arrays), np.uint64, len(arrays))
    return pointers, list(map(tensor.untyped_storage, arrays))


def addresses(tensors: Sequence[Tensor]) -> Addresses:
    """Each tensor's `address`, of thousands in a few operations."""
    if all(type(one.array) is np.ndarray and one.spec.nbytes for one in tensors):  # mostly
        return _data_pointers([one.array for one in tensors])
    return np.fromiter((one.address for one in tensors), np.uint64, len(tensors))


def are_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether each has bytes, one after the other, that surely are in none of the others."""
    for one in tensors:
        if not one.spec.nbytes or not one.array.flags.c_contiguous:
            return False
    starts = addresses(tensors)
    ends = starts + np.array([one.spec.nbytes for one in tensors], np.uint64)
    devices = [one.spec.device for one in tensors]
    for device in set(devices):
        own = np.array([one == device for one in devices])
        order = np.argsort(starts[own])
        if bool((starts[own][order][1:] < ends[own][order][:-1]).any()):
            return False
    return True


def _memories(library: Library, arrays: Sequence[Any]) -> Sequence[Any]:
    return list(map(attrgetter("data"), arrays)) if library == "cupy" else arrays


def _of_layout(library: Library) -> tuple[Getter, ...]:
    return (_SHAPE, _IS_DENSE) if library == "cupy" else (_SHAPE,)


def _strided(library: Library, arrays: Sequence[Any]) -> bytes:
    """Which arrays may be of other strides though all else is the same, as a mask.

    cupy says in a quarter of the time that an array lies in C order, from
    which its strides follow, but for those of axes with one element.
    """
    if library != "cupy":
        return b"\1" * len(arrays)
    return bytes(not _IS_DENSE(array) or 1 in array.shape or not array.size for array in arrays)


def _stride_of(library: Library) -> Getter:
    """Of torch's tensors not what torch calls a layout: others than strided have no pointer."""
    stride: Getter = sys.modules["torch"].Tensor.stride if library == "torch" else _STRIDES
    return stride


def _of_memory(library: Library) -> tuple[Getter, ...]:
    names = {"numpy": (), "cupy": ("device_id",), "torch": ("device",)}[library]
    return tuple(map(attrgetter, names))


def _complex(arrays: Sequence[Any], dtypes: Sequence[Any]) -> Iterator[Any]:
    kinds = {dtype for dtype in set(dtypes) if dtype.is_complex}
    return compress(arrays, map(kinds.__contains__, dtypes)) if kinds else iter(())


def _same_names(dtypes: Sequence[Any], known: Sequence[Any]) -> bool:
    """Equality of dtypes wouldn't do: a thousand microseconds aren't called a millisecond."""
    return all(
        isinstance(one, np.dtype) and name_of(one) == name_of(other)
        for one, other in zip(dtypes, known, strict=True)
        if one is not other
    )


def _data_pointers(arrays: Sequence[Any]) -> Addresses:
    if _DATA_OFFSET is not None:
        return _pointers(arrays, _DATA_OFFSET)
    found = (array.__array_interface__["data"][0] for array in arrays)
    return np.fromiter(found, np.uint64, len(arrays))


def _pointers(arrays: Sequence[Any], offset: int) -> Addresses:
    """The word at `offset` of each of these objects, which are read where they lie."""
    if not arrays:
        return np.empty(0, np.uint64)
    places = np.fromiter(map(id, arrays), np.uint64, len(arrays)) + np.uint64(offset)
    first = int(places.min())
    words = host_words(first, (int(places.max()) - first) // 8 + 1)
    return words.take((places - np.uint64(first)) // np.uint64(8))


def _find_data_offset() -> int | None:
    """Where in an array's object numpy keeps the pointer to its data; None if it isn't known.

    In CPython an object's id is its address, and numpy's interface for C has
    the pointer right behind the object's head.  To ask each array for it in
    Python takes ten times as long.
    """
    if sys.implementation.name != "cpython" or sys.maxsize < 2**32:
        return None
    offset = object.__basicsize__
    some = np.arange(60.0).reshape(3, 4, 5)
    arrays = [some, some[1:], some[::-1, 2], some.T, np.array(7), np.empty((0, 3)), some[2, 3, 4:]]
    wanted = [array.__array_interface__["data"][0] for array in arrays]
    return offset if _pointers(arrays, offset).tolist() == wanted else None


_DTYPE, _SHAPE, _STRIDES = attrgetter("dtype"), attrgetter("shape"), attrgetter("strides")
_IS_DENSE = attrgetter("_c_contiguous")
_DATA_OFFSET = _find_data_offset()
