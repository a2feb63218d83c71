"""The kernels' own sources, run on the CPU by the emulator, against numpy and xxhash."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpuckpt.devices import kernels
from gpuckpt.fingerprint import fingerprint
from gpuckpt.layout import LEAF_NBYTES
from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.emulator import cuemu
from tests.kernels.memory import Launch, Piece, aligned

NAMES = ("filter", "unfilter")
TILE = 2048
# Where something changes: units, the digest's padding, its blocks, tiles, a block's round, leaves.
EDGES = (16, 256, 1024, TILE, 8 * TILE, LEAF_NBYTES, 2 * LEAF_NBYTES, 3 * LEAF_NBYTES)

each_kernel = pytest.mark.parametrize("name", NAMES)


def library(name: str, *, check: bool = False, change: Callable[[str], str] = str) -> cuemu.Lib:
    """The kernel, built for the CPU; `change` plants a bug."""
    try:
        build.compiler()
    except build.MissingError as error:
        pytest.skip(f"the emulator builds kernels: {error}")
    text = change(kernels.source(name))
    return cuemu.Lib(
        cuemu.host_library_of(text, f"{name}.cu", check=check, options=kernels.OPTIONS)
    )


@pytest.fixture(scope="module")
def fast() -> dict[str, cuemu.Lib]:
    return {name: library(name) for name in NAMES}


@pytest.fixture(scope="module")
def checked() -> dict[str, cuemu.Lib]:
    return {name: library(name, check=True) for name in NAMES}


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    width = draw(st.sampled_from(kernels.WIDTHS))
    near = st.tuples(st.sampled_from(EDGES), st.integers(-20, 20)).map(sum)
    elements = draw(st.one_of(st.integers(0, 40), near.map(lambda n: max(n, 0) // width)))
    return Piece(elements * width, width, draw(st.integers(0, 15)))


@settings(max_examples=250, deadline=None)
@given(
    chunks=st.lists(pieces(), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    order=st.integers(0, 5),
    grid=st.one_of(st.none(), st.integers(1, 5)),
)
@example(chunks=[Piece(0, 8)], seed=0, order=0, grid=1)
@example(
    chunks=[Piece(0, 1), Piece(2, 2), Piece(0, 4), Piece(8, 8), Piece(0, 1)],
    seed=0,
    order=1,
    grid=None,
)
def test_any_table_of_chunks_is_split_joined_and_digested(fast, chunks, seed, order, grid):
    launch = Launch(chunks, seed)
    for kernel in fast.values():
        kernel.set(order=order, block_order=order % 2)
    launch.filter(fast["filter"], grid or max(launch.layout.leaves, 1))
    launch.digests[:] = 0
    launch.unfilter(fast["unfilter"], grid or max(launch.layout.leaves, 1))


@pytest.mark.parametrize("misaligned", range(16))
@pytest.mark.parametrize("width", kernels.WIDTHS)
def test_every_alignment_of_every_width(fast, width, misaligned):
    edges = [n // width * width for n in (LEAF_NBYTES + 3 * TILE + 24, 2 * TILE + 8, TILE)]
    launch = Launch([Piece(n, width, misaligned) for n in edges], misaligned)
    launch.filter(fast["filter"])
    launch.unfilter(fast["unfilter"])


@pytest.mark.parametrize("count", [2, 255, 256, 257, 700])
@each_kernel
def test_each_leaf_finds_its_chunk_in_a_long_table(fast, name, count):
    """A round of the search leaves 1/256 of the rows: one, two rounds, and chunks without bytes."""
    sizes = (24, 0, 8, 64) if count > 2 else (LEAF_NBYTES + 8, 16)
    launch = Launch([Piece(sizes[at % len(sizes)], 8, at % 16) for at in range(count)])
    getattr(launch, name)(fast[name])


def test_the_digests_root_is_the_fingerprint(fast):
    launch = Launch([Piece(n, 1) for n in (1, LEAF_NBYTES - 1, LEAF_NBYTES, 5 * LEAF_NBYTES + 77)])
    launch.run(fast["filter"], "filter")
    for at, raw in enumerate(launch.raw):
        leaves = launch.digests[launch.layout.digests(at)].tobytes()
        length = raw.size.to_bytes(8, "little")
        assert xxhash.xxh3_128_hexdigest(leaves + length) == fingerprint(raw.data)


def test_unfilter_tells_a_changed_plane_by_its_leaf(fast):
    launch = Launch([Piece(3 * LEAF_NBYTES, 4)])
    launch.filter(fast["filter"])
    before = launch.digests.copy()
    launch.staged[launch.layout.planes(0)[2].start + LEAF_NBYTES // 4 + 5] ^= 1  # the second leaf
    launch.run(fast["unfilter"], "unfilter")
    changed = (launch.digests != before).reshape(3, kernels.DIGEST_NBYTES).any(axis=1)
    assert changed.tolist() == [False, True, False]


# With the exact checker: whatever the schedule


SMALL = [
    *(Piece(n // w * w, w, off) for w in (1, 2, 4, 8) for n, off in ((8, 3), (TILE + 24, 0))),
    *(Piece(5 * TILE, w, 2 * w + 1) for w in (1, 2, 4, 8)),
    Piece(LEAF_NBYTES, 2, 6),
    Piece(LEAF_NBYTES + 8, 8, 0),
]
ONE_ROW = [Piece(LEAF_NBYTES + 8, 8, 0)]  # no search for the row, which has barriers of its own


@pytest.mark.parametrize("chunks", [SMALL, ONE_ROW], ids=["many", "one"])
@pytest.mark.parametrize("grid", [1, None])
@each_kernel
def test_a_kernel_has_no_race_and_touches_nothing_else(checked, name, grid, chunks):
    launch = Launch(chunks)
    getattr(launch, name)(checked[name], grid)


def without(text: str, at: int = 0) -> Callable[[str], str]:
    """Leave out the (at+1)-th occurrence of `text`."""
    return replacing(text, "", at)


def replacing(old: str, new: str, at: int = 0) -> Callable[[str], str]:
    def change(source: str) -> str:
        parts = source.split(old)
        assert len(parts) > at + 1, f"there is no {old!r} to change"
        return old.join(parts[: at + 1]) + new + old.join(parts[at + 1 :])

    return change


BARRIER, WARP = "__syncthreads();", "__syncwarp(ALL);"
BUGS = {
    "no barrier before the chain": ("filter", without(BARRIER, 0)),
    "no barrier before the next leaf": ("filter", without(BARRIER, 1)),
    "no warp barrier within the chain": ("filter", without(WARP, 0)),
    "no warp barrier after the bytewise load": ("filter", without(WARP, 1)),
    "no warp barrier before planes are put there": ("filter", without(WARP, 2)),
    "no warp barrier before planes are read": ("filter", without(WARP, 3)),
    "no warp barrier before the next tile": ("filter", without(WARP, 4)),
    "a tile counts as full": ("filter", replacing("at + TILE <= leaf.length", "at < leaf.length")),
    "reads behind the chunk": (
        "filter",
        replacing("at + TILE + UNIT <= leaf.length", "at + TILE <= leaf.length"),
    ),
    "reads before the chunk": ("filter", replacing("leaf.begin + at >= m", "m")),
    "the tail's last byte": ("filter", replacing("i < count; i += 32", "i + 1 < count; i += 32")),
    "one byte beyond a plane": ("filter", replacing("i < count; i += 32", "i <= count; i += 32")),
    "planes too close": (
        "filter",
        replacing("at / ACROSS * stride", "at / ACROSS * (stride - 16)"),
    ),
    "half a mask": ("filter", replacing("(ALL, one, 4)", "(0xffffu, one, 4)")),
    "the grid's stride": ("filter", replacing("at += gridDim.x", "at += gridDim.x + 1")),
    "a leaf's last stripe": ("filter", replacing("if (mine > last) continue;", "")),
    "no warp barrier before units are read": ("unfilter", without(WARP, 3)),
    "no warp barrier before units are put back": ("unfilter", without(WARP, 1)),
    "no warp barrier before units are written": ("unfilter", without(WARP, 2)),
    "no warp barrier before the next tile's planes": ("unfilter", without(WARP, 4)),
    "a unit beyond the tile": ("unfilter", replacing("|| lane < 31", "|| lane < 32")),
    "a missing byte at a tile's end": ("unfilter", replacing("lane < UNIT)", "lane + 1 < UNIT)")),
    "reads the padding": ("unfilter", replacing("i < count ? from", "i <= count ? from")),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug):
    name, change = BUGS[bug]
    launch = Launch(ONE_ROW if bug == "no barrier before the next leaf" else SMALL)
    mutant = library(name, check=True, change=change)
    with pytest.raises((cuemu.KernelError, AssertionError)):
        getattr(launch, name)(mutant, 1)


# The table


def test_planes_and_digests_follow_each_other_without_overlap():
    layout = kernels.lay_out([0, 0, 0, 0], [6, 0, LEAF_NBYTES + 8, 33], [2, 4, 8, 1])
    count = LEAF_NBYTES // 8 + 1
    stride = LEAF_NBYTES // 8 + 16
    planes = [layout.planes(at) for at in range(4)]

    assert planes[:2] == [[slice(0, 3), slice(16, 19)], [slice(32, 32)] * 4]
    assert planes[2] == [slice(32 + k * stride, 32 + k * stride + count) for k in range(8)]
    assert planes[3] == [slice(32 + 8 * stride, 32 + 8 * stride + 33)]
    assert layout.staged_nbytes == 32 + 8 * stride + 48
    assert layout.leaves == 4
    assert [layout.digests(at) for at in range(4)] == [
        slice(0, 16),
        slice(16, 16),
        slice(16, 48),
        slice(48, 64),
    ]


def test_a_layout_of_nothing_and_one_that_cuts_an_element():
    assert kernels.lay_out([], [], []).leaves == 0
    with pytest.raises(AssertionError, match="cut"):
        kernels.lay_out([0], [7], [2])
    with pytest.raises(AssertionError):
        kernels.lay_out([0], [6], [3])


def test_the_tests_memory_lies_where_it_should():
    assert [aligned(5, off).ctypes.data % 16 for off in range(16)] == list(range(16))
    assert np.dtype(kernels.CHUNK).itemsize == 48
