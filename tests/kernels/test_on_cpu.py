"""The kernels of chunks, their own sources run on the CPU by the emulator: numpy, xxhash agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpuckpt.devices import kernels
from gpuckpt.fingerprint import fingerprint, root
from gpuckpt.layout import LEAF_NBYTES
from tests.cuda_on_cpu.emulator import cuemu
from tests.kernels.building import library
from tests.kernels.memory import Launch, Piece, aligned
from tests.often import often

NAMES = ("filter", "unfilter", "digest")
TILE = 2048
# Where something changes: units, the digest's padding, its blocks, tiles, a block's round, leaves.
EDGES = (16, 256, 1024, TILE, 8 * TILE, LEAF_NBYTES, 2 * LEAF_NBYTES, 3 * LEAF_NBYTES)

each_kernel = pytest.mark.parametrize("name", NAMES)


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
    misaligned = draw(st.integers(0, 15))
    base = draw(st.one_of(st.none(), st.just(misaligned), st.integers(0, 15)))
    expected = draw(st.sampled_from(["", "same", "other"]))
    turned = width > 1 and draw(st.booleans())
    return Piece(elements * width, width, misaligned, base, expected=expected, turned=turned)


@settings(max_examples=often(200), deadline=None)
@given(
    chunks=st.lists(pieces(), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    order=st.integers(0, 5),
    grid=st.one_of(st.none(), st.integers(1, 5)),
)
@example(chunks=[Piece(0, 8)], seed=0, order=0, grid=1)
@example(
    chunks=[Piece(0, 1), Piece(2, 2, base=0), Piece(0, 4), Piece(8, 8), Piece(0, 1)],
    seed=0,
    order=1,
    grid=None,
)
def test_any_table_of_chunks_is_split_joined_and_digested(fast, chunks, seed, order, grid):
    launch = Launch(chunks, seed)
    for kernel in fast.values():
        kernel.set(order=order, block_order=order % 2)
    launch.filter(fast["filter"], grid)
    launch.digest(fast["digest"], grid)
    launch.unfilter(fast["unfilter"], grid)
    launch.unfilter_in_place(fast["unfilter"], grid)


@pytest.mark.parametrize("misaligned", range(16))
@pytest.mark.parametrize("width", kernels.WIDTHS)
def test_every_alignment_of_every_width(fast, width, misaligned):
    sizes = [n // width * width for n in (LEAF_NBYTES + 3 * TILE + 24, 2 * TILE + 8, TILE)]
    chunks = [Piece(n, width, misaligned, base=(misaligned * 5 + 3) % 16) for n in sizes]
    plain = Piece(sizes[0], width, misaligned)
    turned = Piece(sizes[0], width, misaligned, turned=width > 1)
    launch = Launch([*chunks, plain, turned], misaligned)
    launch.filter(fast["filter"])
    launch.digest(fast["digest"])
    launch.unfilter(fast["unfilter"])
    launch.unfilter_in_place(fast["unfilter"])


@pytest.mark.parametrize("width", kernels.WIDTHS)
def test_every_difference_of_the_least_and_the_greatest_elements_comes_back(fast, width):
    """Of all pairs of edges; the difference wraps around in both directions."""
    half = 2 ** (8 * width - 1)
    edges = np.array([0, 1, 2, half - 1, half, half + 1, 2 * half - 1], np.dtype(f"<u{width}"))
    raw, base = (axis.ravel().view(np.uint8) for axis in np.meshgrid(edges, edges))
    launch = Launch([Piece(raw.size, width, base=0)], contents=[raw])
    launch.bases[0][:] = launch.before[0][:] = base
    launch.filter(fast["filter"])
    launch.unfilter(fast["unfilter"])


@pytest.mark.parametrize("width", kernels.WIDTHS)
def test_of_a_tensor_that_is_its_base_every_byte_is_zero(fast, width):
    launch = Launch([Piece(LEAF_NBYTES + 80, width, base=0)])
    launch.bases[0][:] = launch.before[0][:] = launch.raw[0]
    launch.filter(fast["filter"])
    planes = [launch.staged[place] for place in launch.layout.planes(0)]
    assert not np.concatenate(planes).any()
    zeros = launch.summaries(0)["zeros"].sum(axis=0)
    assert zeros.tolist() == [launch.raw[0].size // width] * width + [0] * (8 - width)


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
        digests = launch.summaries(at)["digest"].tobytes()
        assert root(digests, raw.size) == fingerprint(raw.data)


def test_a_leaf_that_was_changed_isnt_called_unchanged(fast):
    launch = Launch([Piece(3 * LEAF_NBYTES, 4, expected="same")])
    launch.filter(fast["filter"])
    launch.chunks[0][LEAF_NBYTES + 5] ^= 1
    launch.run(fast["filter"], "filter")
    assert launch.summaries(0)["unchanged"].tolist() == [1, 0, 1]


def test_unfilter_tells_a_changed_plane_by_its_leaf(fast):
    launch = Launch([Piece(3 * LEAF_NBYTES, 4)])
    launch.filter(fast["filter"])
    launch.unfilter(fast["unfilter"])
    before = launch.digests.copy()
    launch.staged[launch.layout.planes(0)[2].start + LEAF_NBYTES // 4 + 5] ^= 1  # the second leaf
    launch.run(fast["unfilter"], "unfilter")
    changed = (launch.digests != before).reshape(3, kernels.DIGEST_NBYTES).any(axis=1)
    assert changed.tolist() == [False, True, False]


def test_one_set_of_planes_goes_to_several_tensors(fast):
    launch = Launch([Piece(LEAF_NBYTES + 24, 8), Piece(LEAF_NBYTES + 24, 8, 3)])
    launch.chunks[1][:] = launch.raw[1][:] = launch.raw[0]
    launch.filter(fast["filter"])
    launch.layout.rows["planes"][1] = launch.layout.rows["planes"][0]
    for chunk in launch.chunks:
        chunk[:] = 0
    launch.run(fast["unfilter"], "unfilter")
    assert all(np.array_equal(chunk, launch.raw[0]) for chunk in launch.chunks)


# With the exact checker: whatever the schedule


SMALL = [
    *(Piece(n // w * w, w, off) for w in (1, 2, 4, 8) for n, off in ((8, 3), (TILE + 24, 0))),
    *(Piece(5 * TILE, w, 2 * w + 1) for w in (1, 2, 4, 8)),
    *(Piece(3 * TILE + 16, w, 3, base, expected="same") for w in (1, 4, 8) for base in (0, 3)),
    Piece(LEAF_NBYTES + 16, 4, expected="other"),
    Piece(LEAF_NBYTES, 2, 6, base=6),
    *(Piece(3 * TILE + 24, w, 3, turned=True) for w in (2, 4, 8)),
    Piece(LEAF_NBYTES + 8, 8, 0, base=0),
]
ONE_ROW = [Piece(LEAF_NBYTES + 8, 8, 0)]  # no search for the row, which has barriers of its own


@pytest.mark.parametrize("chunks", [SMALL, ONE_ROW], ids=["many", "one"])
@pytest.mark.parametrize("grid", [1, None])
@each_kernel
def test_a_kernel_has_no_race_and_touches_nothing_else(checked, name, grid, chunks):
    launch = Launch(chunks)
    getattr(launch, name)(checked[name], grid)
    if name == "unfilter":
        launch.unfilter_in_place(checked[name], grid)


def test_the_tests_memory_lies_where_it_should():
    assert [aligned(5, off).ctypes.data % 16 for off in range(16)] == list(range(16))
