"""What every `Device` promises, as tests: each device's own test module inherits them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from gpuckpt.devices import Device

SHAPE = (6, 10, 14)
# Views of an array of `SHAPE`: the same function makes them of numpy's and of cupy's arrays.
VIEWS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda a: a,
    "part": lambda a: a[2:5],
    "transposed": lambda a: a.transpose(2, 0, 1),
    "Fortran": lambda a: a.T,
    "stepped": lambda a: a[::2, 1::3],
    "reversed": lambda a: a[::-1, :, ::-1],
    "column": lambda a: a[:, 3, 5],
    "repeated": lambda a: np.broadcast_to(a[:, :1, :4], (6, 3, 4)),
    "one element": lambda a: a[3:4, 2:3, 1:2],
    "0-d": lambda a: a[3:4, 2:3, 1:2].reshape(()),
    "empty": lambda a: a[:0],
}


def numbers(seed: int = 0, dtype: Any = np.float32, shape: tuple[int, ...] = SHAPE) -> Any:
    """An array of random bits: NaNs with payloads, infinities, denormals and all."""
    dtype = np.dtype(dtype)
    bits = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(bits, dtype).reshape(shape).copy()


def bytes_of(array: Any) -> bytes:
    """All bytes of a numpy array, in C order: the reference for everything here."""
    data: bytes = array.tobytes(order="C")
    return data


@dataclass(frozen=True)
class Cut:
    """A strided view to be cut out of a fresh array, and a run of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[slice, ...]
    axes: tuple[int, ...]
    start: int
    nbytes: int

    def view(self, base: Any) -> Any:
        return base[(*self.slices, ...)].transpose(self.axes)


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """Any shape, steps of either sign, any order of axes, any run of whole elements."""
    dtype = draw(st.sampled_from(["u1", "f2", "i4", "f8", "c16", "?"]))
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    step = st.sampled_from([1, 1, 2, 3, -1, -2])
    slices = []
    for extent in shape:
        lowest = draw(st.integers(0, extent))
        piece = range(extent)[lowest:][:: draw(step)]
        stop = piece.stop if piece.stop >= 0 else None
        slices.append(slice(piece.start, stop, piece.step) if piece else slice(0, 0))
    axes = tuple(draw(st.permutations(range(len(shape)))))
    cut = Cut(dtype, shape, tuple(slices), axes, 0, 0)
    elements = cut.view(np.empty(shape, dtype)).size
    first = draw(st.integers(0, elements))
    last = draw(st.integers(first, elements))
    width = np.dtype(dtype).itemsize
    return Cut(dtype, shape, tuple(slices), axes, first * width, (last - first) * width)


class DeviceContract:
    """Tests of any device; `device` is a fixture, `put` and `get` move whole arrays."""

    def put(self, array: Any) -> Any:
        """An array of this device's library with the same elements, in C order."""

    def get(self, array: Any) -> Any:
        """Its elements as a numpy array, once everything before on the caller's stream is done."""

    def clear(self, array: Any) -> None:
        """Set all elements to zero, on the caller's stream."""
        array[...] = 0

    def memory(self, device: Device, nbytes: int) -> Any:
        slot = device.host_memory(nbytes)
        slot[...] = 0x77
        return slot

    def download(self, device: Device, frozen: Any, start: int, nbytes: int) -> bytes:
        slot = self.memory(device, nbytes)
        data: bytes = device.download(frozen, start, slot).wait().tobytes()
        return data

    def upload(self, device: Device, data: bytes, array: Any, start: int) -> None:
        source = self.memory(device, len(data))
        source[...] = np.frombuffer(data, np.uint8)
        device.begin_uploads()
        device.upload(source, array, start).wait()
        device.finish_uploads()

    @pytest.mark.parametrize("copy", [True, False], ids=["copy", "hold"])
    @pytest.mark.parametrize("view", VIEWS)
    def test_a_download_gives_the_bytes_in_c_order(self, device, view, copy):
        given = numbers()
        frozen = device.freeze([VIEWS[view](self.put(given))], copy=copy)
        expected = bytes_of(VIEWS[view](given))
        assert self.download(device, frozen.arrays[0], 0, len(expected)) == expected
        frozen.end_downloads()
        frozen.release()

    @pytest.mark.parametrize("copy", [True, False], ids=["copy", "hold"])
    @pytest.mark.parametrize("view", [name for name in VIEWS if name not in {"0-d", "empty"}])
    def test_a_download_gives_any_run_of_elements(self, device, view, copy):
        given = numbers()
        frozen = device.freeze([VIEWS[view](self.put(given))], copy=copy)
        expected = bytes_of(VIEWS[view](given))
        count = len(expected) // 4
        for first, last in [(0, count // 2), (count // 3, count), (count // 5, count // 5 + 1)]:
            start, stop = 4 * first, 4 * last
            part = self.download(device, frozen.arrays[0], start, stop - start)
            assert part == expected[start:stop]
        frozen.end_downloads()
        frozen.release()

    @pytest.mark.parametrize("view", [name for name in VIEWS if name != "repeated"])
    def test_an_upload_undoes_a_download(self, device, view):
        target, expected = self.put(numbers(1)), numbers(1)
        data = bytes_of(VIEWS[view](numbers(2)))
        self.upload(device, data, VIEWS[view](target), 0)
        VIEWS[view](expected)[...] = VIEWS[view](numbers(2))
        assert bytes_of(self.get(target)) == bytes_of(expected)

    @pytest.mark.parametrize("view", ["contiguous", "Fortran", "stepped", "reversed", "column"])
    def test_an_upload_of_a_part_leaves_the_rest_alone(self, device, view):
        target, expected = self.put(numbers(1)), numbers(1)
        inside = VIEWS[view](expected)
        flat = inside.ravel()
        first, last = flat.size // 3, flat.size // 2
        flat[first:last] = VIEWS[view](numbers(2)).ravel()[first:last]
        inside[...] = flat.reshape(inside.shape)
        self.upload(device, flat[first:last].tobytes(), VIEWS[view](target), 4 * first)
        assert bytes_of(self.get(target)) == bytes_of(expected)

    def test_many_arrays_keep_their_places(self, device):
        given = [numbers(seed, np.uint16, (seed * 7 % 40,)) for seed in range(30)]
        frozen = device.freeze([self.put(array) for array in given], copy=True)
        assert len(frozen.arrays) == len(given)
        for array, source in zip(given, frozen.arrays, strict=True):
            assert self.download(device, source, 0, array.nbytes) == bytes_of(array)
        frozen.release()

    def test_freezing_nothing(self, device):
        for copy in (True, False):
            frozen = device.freeze([], copy=copy)
            assert list(frozen.arrays) == []
            frozen.settle()
            frozen.end_downloads()
            frozen.release()
            frozen.order_update()

    @pytest.mark.parametrize("view", ["contiguous", "Fortran", "stepped"])
    def test_a_copy_stays_as_it_was_frozen(self, device, view):
        array = self.put(numbers())
        frozen = device.freeze([VIEWS[view](array)], copy=True)
        frozen.order_update()
        self.clear(array)
        frozen.settle()
        expected = bytes_of(VIEWS[view](numbers()))
        assert self.download(device, frozen.arrays[0], 0, len(expected)) == expected
        assert not self.get(array).any()
        frozen.release()

    @pytest.mark.parametrize("view", ["contiguous", "Fortran", "stepped"])
    def test_an_update_comes_after_all_reads_of_what_is_held(self, device, view):
        array, expected = self.put(numbers()), bytes_of(VIEWS[view](numbers()))
        self.get(array)
        frozen = device.freeze([VIEWS[view](array)], copy=False)

        def update() -> None:
            frozen.order_update()
            self.clear(array)

        updater = threading.Thread(target=update)
        updater.start()
        half = len(expected) // 8 * 4
        slots = [self.memory(device, half), self.memory(device, len(expected) - half)]
        source = frozen.arrays[0]
        transfers = [device.download(source, 0, slots[0]), device.download(source, half, slots[1])]
        frozen.end_downloads()
        assert b"".join(transfer.wait().tobytes() for transfer in transfers) == expected
        frozen.release()
        updater.join(30)
        assert not updater.is_alive()
        assert not self.get(array).any()

    def test_releasing_lets_a_waiting_update_go_on(self, device):
        frozen = device.freeze([self.put(numbers())], copy=False)
        updater = threading.Thread(target=frozen.order_update)
        updater.start()
        updater.join(0.05)
        assert updater.is_alive()
        frozen.release()
        frozen.release()
        updater.join(30)
        assert not updater.is_alive()

    def test_the_next_copy_takes_the_same_memory(self, device):
        for seed in range(4):
            frozen = device.freeze([self.put(numbers(seed, shape=(5 + seed, 300)))], copy=True)
            expected = bytes_of(numbers(seed, shape=(5 + seed, 300)))
            assert self.download(device, frozen.arrays[0], 0, len(expected)) == expected
            frozen.release()

    @pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 100_001])
    def test_host_memory_has_the_size_that_was_asked_for(self, device, nbytes):
        memory = device.host_memory(nbytes)
        assert (memory.nbytes, memory.dtype, memory.ndim) == (nbytes, np.uint8, 1)
        memory[...] = 0x5A
        assert (memory == 0x5A).all()

    def test_host_memory_lives_as_long_as_a_part_of_it(self, device):
        memory = device.host_memory(1 << 16)
        memory[...] = 3
        part = memory[100:200].reshape(10, 10)
        del memory
        others = [device.host_memory(1 << 16) for _ in range(4)]
        for other in others:
            other[...] = 9
        assert (part == 3).all()

    def test_reserved_memory_counts_as_room(self, device):
        device.reserve(1 << 20)
        before = device.room()
        assert before >= 1 << 20
        device.reserve(1 << 10)
        assert device.room() >= 1 << 20
