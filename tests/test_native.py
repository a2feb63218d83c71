"""The compiled loops give what numpy gives, to the byte, and stay within their buffers."""

from __future__ import annotations

import functools
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpuckpt import deltas, planes, rounding, sparse, squares, statistics
from gpuckpt.dtypes import to_numpy
from gpuckpt.fingerprint import leaf_digests
from gpuckpt.native import (
    FEWEST_NBYTES,
    HALF,
    NARROW,
    NONE,
    VERSION,
    WIDE,
    WIDTHS,
    Native,
    native,
    native_for,
)
from tests.strategies import SMALL

HERE = Path(__file__).parents[1]
BUILD = HERE / "kernels" / "cpu" / "build.py"
COUNTS = (0, 1, 2, 7, 8, 9, 31, 63, 64, 65, 511, 512, 513, 1023, 4095, 4097, 16384, 70_001)
NARROW_ONES = [name for name in SMALL if name.startswith("float") and "m0" not in name]
NOTHING = (NONE, (0, 0, 0, 256))
BITS = {"float4_e2m1fn": 15, "float6_e2m3fn": 63, "float6_e3m2fn": 63}
# Bytes around an array that must stay as they are; a checker that knows its end needs none.
GUARD = 0 if os.environ.get("CFLAGS") else 64


def compiled(library: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BUILD), str(library)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@functools.cache
def loops(flags: str = "") -> Native:
    """The loops, freshly compiled, with these flags and those in CFLAGS."""
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        pytest.skip("no C compiler")
    with tempfile.TemporaryDirectory() as room:
        flags = f"{os.environ.get('CFLAGS', '')} {flags}"
        done = compiled(Path(room) / "loops.so", CFLAGS=flags)
        assert done.returncode == 0, done.stderr
        assert not done.stderr, "a warning"
        return Native(Path(room) / "loops.so")


def both() -> tuple[Native, Native]:
    """With this machine's own instructions, and without."""
    return loops(), loops("-DGPUCKPT_PLAIN")


class Room:
    """An array of bytes at some alignment, that says whether anything around it was written."""

    def __init__(self, size: int, offset: int = 0, fill: Any = 7) -> None:
        self._whole = np.full(size + offset + 2 * GUARD, 0xA5, np.uint8)
        self._at = slice(GUARD + offset, GUARD + offset + size)
        self.array = self._whole[self._at]
        self.array[...] = fill

    def sound(self) -> bool:
        outside = self._whole.copy()
        outside[self._at] = 0xA5
        return bool((outside == 0xA5).all())


@st.composite
def rooms(draw, count=3):
    """Arrays of random bytes, of one size, each at its own alignment; and the width of elements."""
    width, elements = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(COUNTS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = width * elements
    made = [
        Room(size, draw(st.integers(0, 9)), rng.integers(0, 256, size, np.uint8))
        for _ in range(count)
    ]
    return width, made


@settings(deadline=None)
@given(rooms(), st.booleans())
def test_planes_are_split_and_joined_as_by_numpy(given_rooms, turned):
    width, (raw, out, back) = given_rooms
    turned &= width > 1
    loops().split(raw.array, width, out.array, turned=turned)
    wanted = planes.split_by_numpy(raw.array, width, np.empty_like(raw.array), turned=turned)
    parts = [plane.copy() for plane in out.array.reshape(width, -1)]
    assert all(map(np.array_equal, parts, wanted))
    loops().join(parts, back.array, turned=turned)
    assert np.array_equal(back.array, raw.array)
    assert all(room.sound() for room in (raw, out, back))


@settings(deadline=None)
@given(rooms())
def test_deltas_are_taken_and_undone_as_by_numpy(given_rooms):
    width, (cur, base, out) = given_rooms
    wanted = np.empty_like(cur.array)
    deltas.delta_by_numpy(cur.array, base.array, width, wanted)
    loops().delta(cur.array, base.array, width, out.array)
    assert np.array_equal(out.array, wanted)
    loops().undelta(out.array, base.array, width, out.array)
    assert np.array_equal(out.array, cur.array)
    deltas.undelta_by_numpy(wanted, base.array, width, out.array)
    assert np.array_equal(out.array, cur.array)
    loops().undelta(wanted, base.array, width, base.array)
    assert np.array_equal(base.array, cur.array)
    assert all(room.sound() for room in (cur, base, out))


@settings(deadline=None)
@given(st.sampled_from(COUNTS), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_numbers_are_rounded_as_by_numpy(count, offset, seed):
    rng = np.random.default_rng(seed)
    # Of all kinds: most random bits are large; what becomes subnormal lies in a narrow range.
    words = rng.integers(0, 2**32, count, np.uint32)
    words[::2] = words[::2] % 0x06000000 + 0x32C00000 + (words[::2] & 1 << 31)
    raw, out = Room(4 * count, offset, words.view(np.uint8)), Room(2 * count, offset)
    for dtype, kind in rounding.NARROW.items():
        wanted = np.empty_like(out.array)
        rounding.round_by_numpy(dtype, raw.array, wanted)
        loops().round(raw.array, kind, out.array)
        assert np.array_equal(out.array, wanted)
    assert raw.sound()
    assert out.sound()


@settings(deadline=None)
@given(rooms())
def test_deltas_in_planes_are_those_of_numpy(given_rooms):
    width, (cur, base, out) = given_rooms
    wanted = np.empty_like(cur.array)
    deltas.delta_split_by_numpy(cur.array, base.array, width, wanted)
    loops().delta_split(cur.array, base.array, width, out.array)
    assert np.array_equal(out.array, wanted)
    parts = [plane.copy() for plane in wanted.reshape(width, -1)]
    deltas.join_undelta_by_numpy(parts, base.array, width, out.array)
    assert np.array_equal(out.array, cur.array)
    loops().join_undelta(parts, base.array, width, base.array)
    assert np.array_equal(base.array, cur.array)
    assert all(room.sound() for room in (cur, base, out))


@st.composite
def sparse_planes(draw):
    size = draw(st.sampled_from(COUNTS) | st.integers(0, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    plane = rng.integers(1, 256, size).astype(np.uint8)
    plane[rng.random(size) >= draw(st.sampled_from((0.0, 0.001, 0.05, 0.5, 1.0)))] = 0
    return Room(size, draw(st.integers(0, 9)), plane)


@settings(deadline=None)
@given(sparse_planes(), st.integers(0, 9), st.sampled_from((0, 0, 1, 100, -1, -3, -64)))
@example(Room(70_001), 0, 0)
@example(Room(128), 3, -1)
def test_sparse_planes_are_packed_as_by_numpy(room, offset, spare):
    plane, wanted = room.array, room.array[room.array != 0]
    size = max(wanted.size + spare, 0)
    bitmap, packed = Room(sparse.bitmap_nbytes(plane.size), offset), Room(size, offset)
    others = np.empty_like(bitmap.array), np.empty_like(packed.array)
    assert loops().count_nonzero(plane) == wanted.size
    assert sparse.pack_sparse_by_numpy(plane, *others) == wanted.size
    for one in both():
        assert one.pack_sparse(plane, bitmap.array, packed.array) == wanted.size
        assert np.array_equal(bitmap.array, others[0])
        if spare >= 0:
            assert np.array_equal(packed.array[: wanted.size], wanted)
    assert all(one.sound() for one in (room, bitmap, packed))


@pytest.mark.parametrize("size", [64, 128, 192, 512])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.9])
def test_planes_that_are_partly_zero_are_packed_and_unpacked_within_their_buffers(size, share):
    rng = np.random.default_rng(size)
    plane = np.where(rng.random(size) < share, rng.integers(1, 256, size), 0).astype(np.uint8)
    wanted = plane[plane != 0]
    for one in both():
        bitmap, packed, out = Room(size // 8), Room(wanted.size), Room(size)
        assert one.pack_sparse(plane, bitmap.array, packed.array) == wanted.size
        assert np.array_equal(packed.array, wanted)
        assert one.unpack_sparse(bitmap.array, packed.array, out.array)
        assert np.array_equal(out.array, plane)
        assert all(room.sound() for room in (bitmap, packed, out))


@settings(deadline=None)
@given(sparse_planes(), st.integers(0, 9), st.data())
def test_what_does_not_fit_is_refused_as_by_numpy_and_nothing_outside_is_touched(
    room, offset, data
):
    plane, wanted = room.array, room.array[room.array != 0]
    bitmap = Room(sparse.bitmap_nbytes(plane.size), offset).array
    bitmap[...] = np.packbits(plane != 0, bitorder="little")
    for _ in range(data.draw(st.integers(0, 3))):
        if bitmap.size:
            at = data.draw(st.integers(0, 8 * bitmap.size - 1))
            bitmap[at // 8] ^= 1 << at % 8
    size = max(wanted.size + data.draw(st.sampled_from((0, 0, 0, -1, 1, -64, 70))), 0)
    packed = Room(size, offset, np.resize(wanted, size) if wanted.size else 9)
    out, other = Room(plane.size, offset), np.empty_like(plane)
    fits = sparse.unpack_sparse_by_numpy(bitmap, packed.array, other)
    assert loops().unpack_sparse(bitmap, packed.array, out.array) == fits
    if fits:
        assert np.array_equal(out.array, other)
    assert out.sound()
    assert packed.sound()


@st.composite
def small_floats(draw):
    """Elements of a type of one or two bytes: any bits, or numbers of one size, some not finite."""
    dtype = draw(st.sampled_from(("float16", "bfloat16", *NARROW_ONES)))
    kind = to_numpy(dtype)
    count = draw(st.sampled_from((*COUNTS, 1024, 1025, 2048, 2049, 32768, 32769, 40_001)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        raw = rng.integers(0, 256, count * kind.itemsize, np.uint8)
    else:
        scale = draw(st.sampled_from((1.0, 1e-3, 1e-7, 1e4)))
        raw = (rng.standard_normal(count) * scale).astype(kind).view(np.uint8)
    if draw(st.booleans()):  # finite only
        elements = raw.view(kind)
        elements[~np.isfinite(elements.astype(np.float32))] = 1
    return dtype, Room(raw.size, draw(st.integers(0, 9)), raw)


def squares_of(one: Native, raw: Any, dtype: str) -> float:
    if dtype == "float16":
        return float(one.squares(raw, HALF).sum())
    if dtype == "bfloat16":
        return float(one.squares(raw, WIDE).sum())
    narrow = statistics._narrow(dtype)
    assert narrow is not None
    known = narrow.mask, narrow.shift, narrow.top, narrow.odd
    return float(one.squares(raw, NARROW, known).sum()) * narrow.scale


def squares_by_numpy(raw: Any, dtype: str) -> float:
    raw = np.append(raw, np.zeros(raw.size % 2, np.uint8))
    if dtype == "bfloat16":
        return squares.squares_by_rounding(raw.view(to_numpy(dtype)))
    return squares.squares_by_table(raw.view(np.uint16), statistics._square_table(dtype))


@settings(deadline=None)
@given(small_floats())
def test_squares_are_added_as_by_numpy_to_the_last_bit(chunk):
    dtype, room = chunk
    with np.errstate(all="ignore"):
        wanted = squares_by_numpy(room.array, dtype)
        found = [squares_of(one, room.array, dtype) for one in both()]
    if math.isfinite(wanted):
        assert found == [wanted, wanted]
    assert [math.isfinite(one) for one in found] == [math.isfinite(wanted)] * 2
    assert room.sound()


LOOKED_AT = (0, 1, 63, 64, 65, 240, 248, 255, 256, 257, 1024, 1025, 8192)


@st.composite
def looked_at(draw):
    """A chunk of a type, around whole leaves, and room for its planes, or none."""
    dtype = draw(st.sampled_from(("float32", "int64", "float16", "bfloat16", *NARROW_ONES)))
    kind = to_numpy(dtype)
    count = (
        draw(st.sampled_from((*LOOKED_AT, 65_535, 65_536, 65_537, 131_072, 200_001)))
        // kind.itemsize
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    raw = rng.integers(0, 256, count * kind.itemsize, np.uint8)
    if dtype == "float32":
        scale = draw(st.sampled_from((1.0, 1e-30, 1e30)))
        raw = (rng.standard_normal(count, np.float32) * np.float32(scale)).view(np.uint8)
        if count and draw(st.booleans()):
            at = draw(st.integers(0, count - 1))
            raw.view("f4")[at] = draw(st.sampled_from((np.nan, np.inf)))
    room = Room(raw.size, draw(st.integers(0, 9))) if draw(st.booleans()) else None
    return dtype, kind.itemsize, Room(raw.size, draw(st.integers(0, 9)), raw), room


@settings(deadline=None)
@given(looked_at())
def test_a_look_sees_what_xxhash_and_numpy_see(chunk):
    dtype, width, room, out = chunk
    raw, known = room.array, statistics._in_loops(dtype)[0]
    for one in both():
        to = None if out is None else out.array
        digests, found, check = one.look(raw, known, to, width)
        assert check == (xxhash.xxh3_64_intdigest(raw.data) if raw.size > 240 else 0)
        assert digests == leaf_digests(raw.data)
        if out is not None:
            wanted = planes.split_by_numpy(raw, width, np.empty_like(raw))
            assert all(map(np.array_equal, out.array.reshape(width, -1), wanted))
        if dtype == "float32":
            numbers = raw.view("f4").astype(np.float64)
            exact = math.fsum(numbers * numbers) if np.isfinite(numbers).all() else math.nan
            assert math.isfinite(found) == math.isfinite(exact)
            assert not math.isfinite(exact) or found == pytest.approx(exact, rel=1e-12)
        elif dtype != "int64":
            with np.errstate(all="ignore"):
                squared = squares_of(one, raw, dtype) / statistics._in_loops(dtype)[1]
            assert found == squared or not math.isfinite(squared)
    assert all(one.sound() for one in (room, out) if one is not None)


READ = (1, 240, 241, 4096, 65_535, 65_537, (1 << 18) - 1, 1 << 18, (1 << 18) + 300, 700_001)


@pytest.mark.parametrize("size", READ)
@pytest.mark.parametrize("start", [0, 13])
def test_what_is_read_is_seen_as_xxhash_sees_it(tmp_path, size, start):
    data = np.random.default_rng(size).bytes(start + size + 5)
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as file:
        for one in both():
            room = Room(size, start)
            found, digests, check = one.read(file.fileno(), start, room.array)
            assert found == size
            assert room.array.tobytes() == data[start : start + size]
            assert digests == leaf_digests(room.array.data)
            assert check == (xxhash.xxh3_64_intdigest(room.array.data) if size > 240 else 0)
            assert room.sound()


@pytest.mark.parametrize("missing", [1, 70_000, 300_000])
def test_what_a_file_does_not_have_is_not_seen(tmp_path, missing):
    (tmp_path / "file").write_bytes(bytes(300_000))
    with (tmp_path / "file").open("rb") as file:
        for one in both():
            room = Room(300_000)
            found, _, _ = one.read(file.fileno(), missing, room.array)
            assert found == 300_000 - missing
            assert room.sound()


def test_what_the_system_refuses_to_read_is_its_error(tmp_path):
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        for one in both():
            with pytest.raises(IsADirectoryError):
                one.read(directory, 0, np.empty(10_000, np.uint8))
    finally:
        os.close(directory)


@pytest.mark.parametrize("dtype", ["float16", *NARROW_ONES])
def test_every_code_alone_has_the_square_that_numpy_has_for_it(dtype):
    kind = to_numpy(dtype)
    bits = BITS.get(dtype, 255) if kind.itemsize == 1 else 65535
    for code in {*range(256), *range(0, 65536, 251), 0x7BFF, 0x7C00, 0x7C01, 0x3FF, 0x400} & {
        *range(bits + 1)
    }:
        raw = np.array([code], f"<u{kind.itemsize}").view(np.uint8)
        with np.errstate(all="ignore"):
            value = float(raw.view(kind)[0])
        found = squares_of(loops(), raw, dtype)
        assert found == value * value if math.isfinite(value) else not math.isfinite(found)


def test_arrays_that_the_loops_cannot_take_are_done_by_numpy():
    rng = np.random.default_rng(3)
    strided = rng.integers(0, 256, (FEWEST_NBYTES, 2), np.uint8)[:, 0]
    together = strided.copy()
    assert native_for(4, together) is native()
    assert native_for(4, together[:-4]) is None
    assert native_for(3, together) is None
    assert native_for(4, strided) is None
    assert native_for(4, together, strided) is None
    assert [plane.tolist() for plane in planes.split(strided, 4, together.copy())] == [
        strided[k::4].tolist() for k in range(4)
    ]
    base, out, back = np.zeros(30, np.uint8), np.empty(30, np.uint8), np.empty(30, np.uint8)
    raw = rng.integers(0, 256, 30, np.uint8)
    planes.join(planes.split(raw, 3, out), back)
    assert np.array_equal(back, raw)
    apart = [np.stack([plane, plane], 1)[:, 0] for plane in deltas.delta_split(raw, base, 2, out)]
    deltas.join_undelta(apart, base, 2, back)
    assert np.array_equal(back, raw)
    assert sparse.count_nonzero(np.ones((9, 2), np.uint8)[:, 0]) == 9


def test_a_call_that_would_leave_its_buffers_is_not_made():
    small, large = np.zeros(8, np.uint8), np.zeros(64, np.uint8)
    fixed = large.copy()
    fixed.flags.writeable = False
    for call in (
        lambda: loops().split(large, 4, small),
        lambda: loops().split(large, 3, large.copy()),
        lambda: loops().split(large[:7], 4, small[:7]),
        lambda: loops().split(large, 4, fixed),
        lambda: loops().split(large.view("u4"), 1, small),
        lambda: loops().join([small, large[:4]], large[:16]),
        lambda: loops().delta(large, small, 1, large),
        lambda: loops().join_undelta([small, small], large, 4, large),
        lambda: loops().pack_sparse(large, small[:7], large.copy()),
        lambda: loops().unpack_sparse(small[:7], small, large),
        lambda: loops().split(np.zeros((8, 2), np.uint8)[:, 0], 1, small),
        lambda: loops().round(large, WIDE, small),
        lambda: loops().round(small, WIDE, fixed[:4]),
        lambda: loops().look(large, NOTHING, small, 1),
        lambda: loops().look(large[:63], NOTHING, large[:63], 2),
        lambda: loops().look(large, NOTHING, fixed, 1),
        lambda: loops().look(large[:63], (HALF, (0, 0, 0, 256)), None, 2),
    ):
        with pytest.raises(AssertionError):
            call()


def printed_without(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", text],
        env=os.environ | {"PYTHONPATH": str(HERE), "GPUCKPT_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )


def test_the_environment_turns_the_loops_off():
    assert printed_without("from gpuckpt.native import native; print(native())").stdout == "None\n"


def test_a_library_of_another_version_is_not_used(tmp_path):
    done = compiled(tmp_path / "other.so", CFLAGS=f"-DGPUCKPT_VERSION={VERSION + 1}")
    assert done.returncode == 0, done.stderr
    with pytest.raises(OSError, match=f"version {VERSION + 1}, not {VERSION}"):
        Native(tmp_path / "other.so")


def test_without_a_compiler_nothing_is_left_behind_and_it_is_said(tmp_path):
    for broken, why in (("/nowhere/cc", "/nowhere/cc"), ("false", "false failed")):
        done = compiled(tmp_path / "loops.so", CC=broken)
        assert done.returncode == 1
        assert why in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_loops_do_nothing_undefined_and_leave_no_buffer():
    """The tests above and of tiles, under the compiler's address and undefined-behaviour checks."""
    if os.environ.get("CFLAGS"):
        pytest.skip("runs with other flags already")
    loops()
    found = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    )
    checker = found.stdout.strip()
    if not Path(checker).is_absolute():
        pytest.skip("no libasan")
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    environment = {"CC": "gcc", "CFLAGS": flags, "LD_PRELOAD": checker}
    environment |= {"ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(HERE)}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*words, str(HERE / "tests" / "test_tiles.py"), "-k", "numpy or buffers or same_tiles"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
