"""The compiled loops of kernels/cpu, where an installation has them.

numpy's versions, beside their callers, are the reference and give the same
bytes.  `GPUCKPT_NATIVE=0` in the environment leaves everything to them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.uint32]
Checks = npt.NDArray[np.uint64]

VARIABLE = "GPUCKPT_NATIVE"
LIBRARY = Path(__file__).parent / "_native.so"
# What kernels/cpu/planes.c says of itself: another library may have other signatures.
VERSION = 5
# Elements' sizes that the loops know.
WIDTHS = (1, 2, 4, 8)
# What `squares` calls float16, bfloat16, and elements of one byte; and the sums that it gives.
HALF, WIDE, NARROW = 1, 2, 5
LANES = 1024
# What `look` calls float32, and elements whose squares aren't wanted; and the bytes of a leaf.
SINGLE, NONE = 3, 0
LEAF_NBYTES = 64 << 10
# A kind of elements with what is to be known of it: see kernels/cpu/native.h.
Squares = tuple[int, tuple[int, int, int, int]]
# On fewer bytes numpy is as fast: a call costs some microseconds, and lets go of the GIL.
FEWEST_NBYTES = 1 << 13

_P, _N, _U = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32
_PLACES = ctypes.POINTER(ctypes.c_void_p)
# Of each function: what it returns, what it takes.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "split": (None, _P, _N, _N, _P, _N),
    "split_turned": (None, _P, _N, _N, _P, _N),
    "join": (None, _PLACES, _N, _N, _P),
    "join_turned": (None, _PLACES, _N, _N, _P),
    "delta": (None, _P, _P, _N, _N, _P),
    "undelta": (None, _P, _P, _N, _N, _P),
    "delta_split": (None, _P, _P, _N, _N, _P),
    "join_undelta": (None, _PLACES, _P, _N, _N, _P),
    "count_nonzero": (_N, _P, _N),
    "pack_sparse": (_N, _P, _N, _P, _P, _N),
    "unpack_sparse": (ctypes.c_int, _P, _P, _N, _P, _N),
    "huffman": (_N, _P, _N, _P, _N),
    "huffman_tiles": (_N, _P, _P, _N, _P, _N, _P),
    "tile": (None, _P, _P, _N, _P, _P, _U),
    "check_tiles": (None, _P, _P, _N, _P),
    "count_runs": (_N, _P, _N),
    "round": (None, _P, _N, _U, _P),
    "squares": (None, _P, _N, _U, _U, _U, _U, _U, _P),
    "read": (ctypes.c_ssize_t, ctypes.c_int, ctypes.c_uint64, _P, _N, _P, _P),
    "look": (ctypes.c_double, _P, _N, _U, _U, _U, _U, _U, _P, _P, _P, _N, _U, _P),
}


class Native:
    """The loops of one library.  All arrays are uint8 and contiguous, at any address.

    Calls let go of the GIL.

    Raises:
        OSError: there is no library at the path, or none for this machine.
        AttributeError: it isn't ours.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        version = library.gpuckpt_version()
        if version != VERSION:
            raise OSError(f"{path} is of version {version}, not {VERSION}")
        self._functions = _functions(library)
        # The same, without letting go of the GIL: for what is over sooner than one gets it back.
        self._look_soon = _functions(ctypes.PyDLL(str(path)))["look"]

    def split(self, raw: Bytes, width: int, out: Bytes, *, turned: bool = False) -> None:
        """See `planes.split`; `out` has `raw`'s size."""
        count = _elements(width, raw, out)
        self._call(_turning("split", width, turned), _at(raw), count, width, _room(out), count)

    def join(self, planes: Sequence[Bytes], out: Bytes, *, turned: bool = False) -> None:
        """See `planes.join`."""
        width = len(planes)
        count = _elements(width, out)
        name = _turning("join", width, turned)
        self._call(name, _places(planes, count), count, width, _room(out))

    def join_in_parts(
        self, planes: Sequence[Bytes], out: Bytes, count: int, *, turned: bool = False
    ) -> Iterator[Bytes]:
        """See `planes.join_in_parts`."""
        width, every = len(planes), _elements(len(planes), out)
        places, room = list(_places(planes, every)), _room(out)
        array, name = ctypes.c_void_p * width, _turning("join", width, turned)
        for at in range(0, every, count):
            begin, some = at * width, min(count, every - at)
            self._call(name, array(*(place + at for place in places)), some, width, room + begin)
            yield out[begin : begin + some * width]

    def delta(self, cur: Bytes, base: Bytes, width: int, out: Bytes) -> None:
        """See `deltas.delta`."""
        count = _elements(width, cur, base, out)
        self._call("delta", _at(cur), _at(base), count, width, _room(out))

    def undelta(self, zigzag: Bytes, base: Bytes, width: int, out: Bytes) -> None:
        """See `deltas.undelta`."""
        count = _elements(width, zigzag, base, out)
        self._call("undelta", _at(zigzag), _at(base), count, width, _room(out))

    def delta_split(self, cur: Bytes, base: Bytes, width: int, out: Bytes) -> None:
        """See `deltas.delta_split`; `out` has `cur`'s size."""
        count = _elements(width, cur, base, out)
        self._call("delta_split", _at(cur), _at(base), count, width, _room(out))

    def join_undelta(self, planes: Sequence[Bytes], base: Bytes, width: int, out: Bytes) -> None:
        """See `deltas.join_undelta`."""
        count = _elements(width, base, out)
        assert len(planes) == width, (len(planes), width)
        places = _places(planes, count)
        self._call("join_undelta", places, _at(base), count, width, _room(out))

    def count_nonzero(self, plane: Bytes) -> int:
        """See `sparse.count_nonzero`."""
        return self._call("count_nonzero", _at(plane), plane.size)

    def pack_sparse(self, plane: Bytes, bitmap: Bytes, packed: Bytes) -> int:
        """See `sparse.pack_sparse`; more than there is room for is counted, but not written."""
        size, room = plane.size, packed.size
        assert bitmap.size == (size + 7) // 8, (bitmap.size, size)
        return self._call("pack_sparse", _at(plane), size, _room(bitmap), _room(packed), room)

    def unpack_sparse(self, bitmap: Bytes, packed: Bytes, out: Bytes) -> bool:
        """See `sparse.unpack_sparse`; `bitmap` has the length that it should have."""
        size, count = out.size, packed.size
        assert bitmap.size == (size + 7) // 8, (bitmap.size, size)
        places = _at(bitmap), _at(packed)
        return self._call("unpack_sparse", *places, count, _room(out), size) == 1

    def huffman(self, plane: Bytes, out: Bytes) -> int:
        """Write a plane as a zstd frame without matches; its length, 0 if it may not fit `out`.

        Whether it fits or not, all of `out` may be written to.
        """
        return self._call("huffman", _at(plane), plane.size, _room(out), out.size)

    def huffman_tiles(self, plane: Bytes, sizes: Counts, out: Bytes) -> tuple[int, Counts]:
        """Write a plane as a frame of which each tile can be decoded with the first block.

        `sizes`, which are at least 1, are the tiles'.  Its length, 0 if it may
        not fit `out`, all of which may be written to; and where the first block
        and each tile end in it.
        """
        assert plane.size == int(sizes.sum()), (plane.size, sizes)
        ends = np.zeros(sizes.size + 1, np.uint32)
        places = _at(plane), _numbers(sizes), sizes.size, _room(out), out.size, _numbers(ends)
        return self._call("huffman_tiles", *places), ends

    def tile(
        self, given: Bytes, out: Bytes, item: int, ends: Sequence[Counts], *, back: bool = False
    ) -> None:
        """See `tiling.to_tiles`, of three axes; or, `back`, `tiling.from_tiles`."""
        assert given.size == out.size == item * int(np.prod([each[-1] for each in ends], dtype=int))
        counts = np.array([each.size for each in ends], np.uint32)
        assert counts.size == 3, counts
        every = np.concatenate(ends)
        assert every.dtype == np.uint32, every.dtype
        places = _at(given), _room(out), item, _numbers(counts), _numbers(every)
        self._call("tile", *places, int(back))

    def check_tiles(self, plane: Bytes, sizes: Counts) -> Checks:
        """See `tiling.check_tiles`."""
        assert plane.size == int(sizes.sum()), (plane.size, sizes)
        assert int(sizes.min()) > 0
        assert int(sizes.max()) <= LEAF_NBYTES, sizes
        checks = np.empty(sizes.size, "<u8")
        self._call("check_tiles", _at(plane), _numbers(sizes), sizes.size, checks.ctypes.data)
        return checks

    def count_runs(self, plane: Bytes) -> int:
        """In how many of a plane's pieces of 256 bytes the first 8 are all the same."""
        return self._call("count_runs", _at(plane), plane.size)

    def squares(
        self, raw: Bytes, kind: int, known: tuple[int, int, int, int] = (0, 0, 0, 256)
    ) -> npt.NDArray[np.float64]:
        """Sums of squares in each lane of `squares`; of bytes, its `Narrow` but for the scale."""
        assert kind == NARROW or not raw.size % 2, (kind, raw.size)
        lanes = np.zeros(LANES)
        self._call("squares", _at(raw), raw.size, kind, *known, lanes.ctypes.data)
        return lanes

    def round(self, raw: Bytes, kind: int, out: Bytes) -> None:
        """See `rounding.round_to`."""
        assert raw.size == 2 * out.size, (raw.size, out.size)
        self._call("round", _at(raw), _elements(2, out), kind, _room(out))

    def look(
        self,
        raw: Bytes,
        squares: Squares,
        planes: Bytes | None,
        width: int,
        *,
        turned: bool = False,
    ) -> tuple[bytes, float, int]:
        """See `look.look`: leaves' digests and, to `planes`, what `split` does.

        And the sum of the squares, but for the scale, and the check value of
        `fingerprint.checksum`, or 0 of so few bytes that it is another.
        """
        kind, known = squares
        assert kind in {NONE, NARROW} or not raw.size % (4 if kind == SINGLE else 2), raw.size
        digests = ctypes.create_string_buffer(16 * -(-raw.size // LEAF_NBYTES))
        check = ctypes.c_uint64()
        lanes = np.zeros(8 * LANES, np.uint8) if kind in {HALF, WIDE, NARROW} else None
        if planes is not None:
            _elements(width, raw, planes)
        places = [None if one is None else _room(one) for one in (lanes, planes)]
        look = self._look_soon if raw.size < FEWEST_NBYTES else self._functions["look"]
        about = _at(raw), raw.size, kind, *known
        single: float = look(
            *about, places[0], digests, ctypes.byref(check), width, turned, places[1]
        )
        return digests.raw, single if lanes is None else float(lanes.view(float).sum()), check.value

    def read(self, descriptor: int, offset: int, room: Bytes) -> tuple[int, bytes, int]:
        """Fill `room` from an open file, and look at what came while it is in a cache.

        How many bytes there were; if that is all, leaves' digests and the check
        value as `look` gives them.  Raises the system's `OSError`.
        """
        digests = ctypes.create_string_buffer(16 * -(-room.size // LEAF_NBYTES))
        check, place = ctypes.c_uint64(), _room(room)
        read = self._functions["read"]
        found = read(descriptor, offset, place, room.size, digests, ctypes.byref(check))
        if found < 0:
            raise OSError(-found, os.strerror(-found))
        return found, digests.raw, check.value

    def _call(self, name: str, *arguments: object) -> int:
        return int(self._functions[name](*arguments) or 0)


@cache
def native() -> Native | None:
    """The loops, or None: they aren't there, aren't for this machine, or are turned off."""
    if os.environ.get(VARIABLE) == "0":
        return None
    try:
        return Native(LIBRARY)
    except (OSError, AttributeError):
        return None


def native_for(width: int, whole: npt.NDArray[Any], *others: Bytes) -> Native | None:
    """The loops for elements of `width` bytes in these arrays, of which `whole` is the largest.

    None if they aren't there, can't take them, or would be no faster.
    """
    loops = native()
    if loops is None or width not in WIDTHS or whole.nbytes < FEWEST_NBYTES:
        return None
    return loops if all(array.flags.c_contiguous for array in (whole, *others)) else None


def _functions(library: ctypes.CDLL) -> dict[str, Callable[..., Any]]:
    functions: dict[str, Callable[..., Any]] = {}
    for name, (result, *arguments) in _SIGNATURES.items():
        function = library[f"gpuckpt_{name}"]
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    return functions


def _turning(name: str, width: int, turned: bool) -> str:  # noqa: FBT001
    """The loop of this name for elements that are turned, or that aren't."""
    assert width > 1 or not turned, "a byte isn't turned"
    return f"{name}_turned" if turned else name


def _elements(width: int, *arrays: Bytes) -> int:
    """How many elements each of the arrays has, which are of one size."""
    size = arrays[0].size
    assert width in WIDTHS, width
    assert not size % width, (size, width)
    assert all(array.size == size for array in arrays), [array.size for array in arrays]
    return size // width


def _at(array: Bytes) -> int:
    """Where an array lies."""
    assert array.flags.c_contiguous, array.strides
    assert array.itemsize == 1, array.dtype
    place: int = array.__array_interface__["data"][0]
    return place


def _numbers(array: Counts) -> int:
    """Where numbers lie."""
    assert array.flags.c_contiguous, array.strides
    assert array.dtype == np.uint32, array.dtype
    place: int = array.__array_interface__["data"][0]
    return place


def _room(array: Bytes) -> int:
    """Where an array lies that is written to."""
    assert array.flags.writeable, "a read-only array"
    return _at(array)


def _places(planes: Sequence[Bytes], size: int) -> ctypes.Array[ctypes.c_void_p]:
    """Where planes of `size` bytes lie."""
    assert all(plane.size == size for plane in planes), [plane.size for plane in planes]
    return (ctypes.c_void_p * len(planes))(*map(_at, planes))
