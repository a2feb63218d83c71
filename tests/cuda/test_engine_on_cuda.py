"""The whole engine on CUDA devices: what is saved there comes back bit for bit, at its step."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import cupy as cp
import ml_dtypes
import numpy as np
import pytest
from cupy.cuda import runtime
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.arena import AREAS, FEWEST_SLOTS
from gpuckpt.arrays import dlpack
from gpuckpt.commit import open_step
from gpuckpt.plan import area_nbytes
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryStore
from tests.cuda.gates import Gate
from tests.views import VIEWS, bytes_of, cuts, numbers

DTYPES = list("?bBhHiIqQefdFD")
DLPACK_CODES = {"bfloat16": (4, 2), "float8_e4m3fn": (10, 1), "float8_e5m2": (12, 1)}
CHUNK = 1 << 16
MIB = 1 << 20


class OnlyDLPack:
    """An array of another library, of a type that cupy lacks, that speaks DLPack alone."""

    def __init__(self, array: Any, dtype: str) -> None:
        self.array, self.dtype = array, dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.array.device.id

    def __dlpack__(self, stream: int | None = None) -> Any:
        capsule = self.array.__dlpack__(stream=stream)
        code, width = DLPACK_CODES[self.dtype]
        assert self.array.itemsize == width
        dlpack._tensor_of(capsule).dtype.code = code
        return capsule


class OnlyInterface:
    """An array of another library that speaks CUDA's array interface alone."""

    def __init__(self, array: Any, *, read_only: bool = False, typestr: str | None = None) -> None:
        self.array = array
        interface = dict(array.__cuda_array_interface__)
        interface["data"] = (interface["data"][0], read_only)
        interface["typestr"] = typestr or interface["typestr"]
        del interface["descr"]
        self.__cuda_array_interface__ = interface


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture(autouse=True)
def quiet():
    """No work of one test is left for the next."""
    yield
    for ordinal in range(runtime.getDeviceCount()):
        with cp.cuda.Device(ordinal):
            cp.cuda.Device().synchronize()


def put(array: Any, ordinal: int = 0) -> Any:
    with cp.cuda.Device(ordinal):
        bits = cp.asarray(np.frombuffer(array.tobytes(), np.uint8))
        return bits.view(array.dtype).reshape(array.shape)


def to_host(leaf: Any) -> Any:
    return leaf.get() if isinstance(leaf, cp.ndarray) else leaf


def assert_same(found: Any, expected: Any) -> None:
    found, expected = to_host(found), to_host(expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert bytes_of(found) == bytes_of(expected)


def checkpointer(store: MemoryStore, **options: Any) -> gpuckpt.Checkpointer:
    return gpuckpt.Checkpointer("", store=store, chunk_nbytes=CHUNK, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_to_the_device_it_came_from(store, dtype):
    given = numbers(1, dtype, (300, 7))
    gpuckpt.save("", {"w": put(given)}, store=store)
    loaded = gpuckpt.load("", store=store)["w"]
    assert isinstance(loaded, cp.ndarray)
    assert_same(loaded, given)
    assert_same(gpuckpt.load("", device="cpu", store=store)["w"], given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_of_host_arrays_loads_onto_a_device(store, dtype):
    given = numbers(1, dtype, (300, 7))
    gpuckpt.save("", {"w": given}, store=store)
    loaded = gpuckpt.load("", device="cuda", store=store)["w"]
    assert isinstance(loaded, cp.ndarray)
    assert_same(loaded, given)


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_turned_planes_come_back_to_a_device_and_to_the_host(store, dtype, snapshot):
    rng = np.random.default_rng(1)
    weights = (rng.standard_normal(20_000, np.float32) * 0.02).view(dtype)
    noise = rng.integers(0, 256, CHUNK, np.uint8).view(dtype)
    state = {"weights": put(weights), "noise": put(noise)}
    with checkpointer(store, codec="zstd", snapshot=snapshot) as ckpt:
        ckpt.save(1, state).result()
    rows = {entry.spec.name: entry.chunks for entry in open_step(store, 1).tensors}
    assert all(chunk.turned and len(chunk.planes) == 4 for chunk in rows["weights"])
    assert not any(chunk.turned or len(chunk.planes) > 1 for chunk in rows["noise"])
    for device in ("cuda", "cpu"):
        loaded = gpuckpt.load("", store=store, device=device)
        assert_same(loaded["weights"], weights)
        assert_same(loaded["noise"], noise)


def test_planes_that_were_written_before_elements_were_turned_are_restored_on_a_device():
    root = Path(__file__).parents[1] / "golden" / "v1" / "floats.zstd"
    rows = {entry.spec.name: entry.chunks for entry in open_step(LocalStore(root)).tensors}
    assert [(len(one.planes), one.turned) for one in rows["float32"]] == [(4, False)]
    loaded, expected = gpuckpt.load(root, device="cuda"), gpuckpt.load(root)
    assert isinstance(loaded["float32"], cp.ndarray)
    for name, array in expected.items():
        assert_same(loaded[name], array)


@pytest.mark.parametrize("dtype", ["V16", "U5", "S3"])
def test_elements_that_no_gpu_array_holds_are_an_error_that_names_the_tensor(store, dtype):
    gpuckpt.save("", {"deep": {"w": np.zeros(4, dtype)}}, store=store)
    with pytest.raises(gpuckpt.UnsupportedError, match=r"deep\.w"):
        gpuckpt.load("", device="cuda", store=store)


@pytest.mark.parametrize("view", VIEWS)
def test_arrays_of_any_strides_come_back_and_are_restored_in_place(store, view):
    given = numbers()
    array = put(given)
    gpuckpt.save("", {"w": VIEWS[view](array)}, store=store)
    loaded = gpuckpt.load("", store=store)["w"]
    assert_same(loaded, VIEWS[view](given))
    if view == "repeated":
        return
    target, expected = put(numbers(5)), numbers(5)
    VIEWS[view](expected)[...] = VIEWS[view](given)
    with checkpointer(store) as ckpt:
        ckpt.restore({"w": VIEWS[view](target)})
    assert_same(target, expected)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(cuts(), min_size=1, max_size=12),
    st.sampled_from([16, 50, 300, 640, 2000]),
    st.sampled_from(["auto", "zstd", "raw"]),
    st.sampled_from(["copy", "hold"]),
)
def test_many_small_arrays_of_any_strides_come_back_with_the_least_memory(
    some, chunk_nbytes, codec, snapshot
):
    store, bases = MemoryStore(), [numbers(at, cut.dtype, cut.shape) for at, cut in enumerate(some)]
    state = [cut.view(put(base)) for cut, base in zip(some, bases, strict=True)]
    targets = [put(np.zeros_like(base)) for base in bases]
    views = [cut.view(target) for cut, target in zip(some, targets, strict=True)]
    least = FEWEST_SLOTS * AREAS * area_nbytes(max(chunk_nbytes, 16))
    options: dict[str, Any] = {"store": store, "chunk_nbytes": chunk_nbytes, "codec": codec}
    with gpuckpt.Checkpointer("", snapshot=snapshot, memory=least + MIB, **options) as ckpt:
        ckpt.save(1, state).result(60)
    with gpuckpt.Checkpointer("", memory=least, **options) as ckpt:
        ckpt.restore(views)
    for cut, base, target in zip(some, bases, targets, strict=True):
        expected = np.zeros_like(base)
        cut.view(expected)[...] = cut.view(base)
        assert_same(target, expected)


def test_fortran_order_comes_back_as_it_was(store):
    given = numbers()
    gpuckpt.save("", {"w": put(given).T}, store=store)
    assert gpuckpt.load("", store=store)["w"].flags.f_contiguous


@pytest.mark.parametrize("dtype", DLPACK_CODES)
def test_small_floats_that_speak_only_dlpack(store, dtype):
    width = DLPACK_CODES[dtype][1]
    bits = numbers(3, f"u{width}", (500, 3))
    gpuckpt.save("", {"w": OnlyDLPack(put(bits), dtype)}, store=store)
    on_host = gpuckpt.load("", device="cpu", like="numpy", store=store)["w"]
    assert on_host.dtype == np.dtype(getattr(ml_dtypes, dtype))
    assert_same(on_host.view(bits.dtype), bits)
    again = gpuckpt.load("", store=store)["w"]
    assert again.device.id == 0
    assert_same(again.view(bits.dtype), bits)
    target = put(np.zeros_like(bits))
    with checkpointer(store) as ckpt:
        ckpt.restore({"w": OnlyDLPack(target, dtype)})
    assert_same(target, bits)


def test_bfloat16_of_cupy_itself_comes_back_as_bfloat16(store):
    try:
        given = cp.asarray(np.arange(50).astype(ml_dtypes.bfloat16).reshape(5, 10))
    except ValueError:
        pytest.skip("this CuPy has no bfloat16")
    gpuckpt.save("", {"w": given, "t": given.T[::2]}, store=store)
    loaded = gpuckpt.load("", store=store)
    assert_same(loaded["w"], given)
    assert_same(loaded["t"], given.get().T[::2])
    target, other = cp.zeros_like(given), cp.zeros_like(given)
    with checkpointer(store) as ckpt:
        ckpt.restore({"w": target, "t": other.T[::2]})
    assert_same(target, given)
    assert_same(other.get()[:, ::2], given.get()[:, ::2])
    assert not other.get()[:, 1::2].any()


@pytest.mark.parametrize("typestr", ["<f4", "|V4"])
@pytest.mark.parametrize("view", ["contiguous", "Fortran", "stepped"])
def test_arrays_that_speak_only_the_cuda_array_interface(store, typestr, view):
    given = numbers()
    leaf = OnlyInterface(VIEWS[view](put(given)), typestr=typestr)
    gpuckpt.save("", {"w": leaf}, store=store)
    loaded = gpuckpt.load("", device="cpu", store=store)["w"]
    assert bytes_of(loaded) == bytes_of(VIEWS[view](given))
    target = put(numbers(1))
    with checkpointer(store) as ckpt:
        ckpt.restore({"w": OnlyInterface(VIEWS[view](target), typestr=typestr)})
    assert bytes_of(VIEWS[view](target.get())) == bytes_of(VIEWS[view](given))


def test_an_array_interface_that_is_read_only_is_not_written_to(store):
    gpuckpt.save("", {"w": OnlyInterface(put(numbers(0)))}, store=store)
    target = put(numbers(1))
    state: dict[str, Any] = {"w": OnlyInterface(target, read_only=True)}
    with checkpointer(store) as ckpt:
        ckpt.restore(state)
    assert_same(target, numbers(1))
    assert_same(state["w"], numbers(0))


def test_a_state_over_all_devices_and_the_host(store):
    last = runtime.getDeviceCount() - 1
    given = {name: numbers(at) for at, name in enumerate("abc")}
    state = {
        "a": put(given["a"]),
        "b": [put(given["b"], last), 7, "text"],
        "c": (given["c"].copy(), None),
        "none": cp.empty((0, 3), np.float16),
        "one": cp.asarray(2.5),
    }
    for snapshot in ("copy", "hold"):
        with checkpointer(store, snapshot=snapshot) as ckpt:
            ckpt.save(1, state).result(60)
            loaded = gpuckpt.load("", store=store)
            assert_same(loaded["a"], given["a"])
            assert_same(loaded["b"][0], given["b"])
            assert loaded["b"][0].device.id == last
            assert_same(loaded["c"][0], given["c"])
            assert isinstance(loaded["c"][0], np.ndarray)
            assert loaded["none"].shape == (0, 3)
            assert float(loaded["one"]) == 2.5
            state["a"][...] = 0
            state["b"][0][...] = 0
            state["c"][0][...] = 0
            ckpt.restore({key: state[key] for key in state})
        assert_same(state["a"], given["a"])
        assert_same(state["b"][0], given["b"])
        assert_same(state["c"][0], given["c"])


def test_another_device_is_used_while_the_first_is_current(store):
    if runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    given = numbers()
    gpuckpt.save("", {"w": put(given)}, store=store)
    loaded = gpuckpt.load("", device="cuda:1", store=store)["w"]
    assert loaded.device.id == 1
    with cp.cuda.Device(1):
        assert_same(loaded, given)
    gpuckpt.save("", {"w": OnlyInterface(loaded)}, step=1, store=store)
    assert open_step(store).tensors[0].spec.device == "cuda:1"
    with cp.cuda.Device(1):
        loaded[...] = 0
        cp.cuda.Device().synchronize()
    with checkpointer(store) as ckpt:
        ckpt.restore({"w": OnlyInterface(loaded)})
    with cp.cuda.Device(1):
        assert_same(loaded, given)
    assert_same(gpuckpt.load("", device="cpu", store=store)["w"], given)


def test_one_array_under_two_names_stays_one(store):
    array = put(numbers())
    gpuckpt.save("", {"a": array, "b": array, "c": array[:2]}, store=store)
    loaded = gpuckpt.load("", store=store)
    assert loaded["a"] is loaded["b"]
    assert len(open_step(store).tensors) == 2
    assert_same(loaded["c"], numbers()[:2])


@pytest.mark.parametrize("codec", ["auto", "zstd", "raw"])
@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_a_device_writes_the_bytes_that_the_host_would_write(codec, snapshot, monkeypatch):
    monkeypatch.setattr("gpuckpt.cores.Cores.left", lambda _: None)  # whatever else runs here
    monkeypatch.setattr(
        "gpuckpt.balance.Balance.encoding_costs_time", False
    )  # however long it took
    weights = np.random.default_rng(1).normal(size=(200, 500)).astype(np.float32)
    given = {"w": weights, "t": weights.T, "h": weights[::3, ::-2].astype(np.float16)}
    stores = {"cpu": MemoryStore(), "cuda": MemoryStore()}
    states = {"cpu": given, "cuda": {name: cp.asarray(array) for name, array in given.items()}}
    states["cuda"]["t"] = states["cuda"]["w"].T
    states["cpu"]["t"] = states["cpu"]["w"].T
    rows = {}
    for kind, own in stores.items():
        with checkpointer(own, codec=codec, snapshot=snapshot) as ckpt:
            ckpt.save(1, states[kind]).result(60)
        entries = open_step(own).tensors
        rows[kind] = [
            (
                replace(entry.spec, kind="", device=""),
                [
                    (
                        replace(chunk, extent=replace(chunk.extent, segment="")),
                        own.files[chunk.extent.segment][chunk.extent.offset :][
                            : chunk.extent.length
                        ],
                    )
                    for chunk in entry.chunks
                ],
            )
            for entry in entries
        ]
    assert rows["cpu"] == rows["cuda"]
    assert sum(len(chunks) for _, chunks in rows["cpu"]) > 8


@pytest.mark.parametrize("announced", [True, False], ids=["update", "no update"])
@pytest.mark.parametrize("own_stream", [True, False], ids=["own stream", "default stream"])
@pytest.mark.parametrize("snapshot", ["copy", "hold", "auto"])
def test_every_checkpoint_of_a_loop_is_the_state_at_its_step(
    store, snapshot, own_stream, announced
):
    rng = np.random.default_rng(4)
    expected = {
        "w": rng.integers(0, 2**32, 200_000, dtype=np.uint32),
        "m": rng.integers(0, 2**32, (40, 50), dtype=np.uint32),
    }
    state = {"w": cp.asarray(expected["w"]), "m": cp.asarray(expected["m"]).T}
    expected["m"] = expected["m"].T
    cp.cuda.Device().synchronize()
    stream = cp.cuda.Stream(non_blocking=True) if own_stream else cp.cuda.Stream.null
    seen: dict[int, dict[str, Any]] = {}
    with stream, checkpointer(store, snapshot=snapshot, every=gpuckpt.Every(steps=2)) as ckpt:
        assert ckpt.resume(state) == 0
        for step in range(1, 9):
            if announced:
                with ckpt.update():
                    change(state, step)
            else:
                change(state, step)
            change(expected, step)
            if ckpt.step(step, state) is not None:
                seen[step] = {name: array.copy() for name, array in expected.items()}
        ckpt.wait()
        stream.synchronize()
    assert gpuckpt.Checkpointer("", store=store).steps() == sorted(seen) == [2, 4, 6, 8]
    for step, values in seen.items():
        loaded = gpuckpt.load("", step, device="cpu", store=store)
        for name, value in values.items():
            assert_same(loaded[name], value)


def change(state: dict[str, Any], step: int) -> None:
    """An optimizer's update: in place, several kernels, no two steps alike."""
    for name in state:
        state[name] *= np.uint32(2 * step + 1)
        state[name] += np.uint32(step)
        state[name] ^= np.uint32(0x9E3779B9)


def test_a_restored_state_is_ready_for_the_callers_own_stream(store):
    given = numbers(0, np.uint32, (100_000,))
    target = put(np.zeros_like(given))
    gpuckpt.save("", {"w": given}, store=store)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream, checkpointer(store) as ckpt:
        gate = Gate(stream)
        target -= np.uint32(1)
        assert ckpt.resume({"w": target}) == 0
        target += np.uint32(1)
        assert_same(target, given + np.uint32(1))
        gate.join()


def test_hold_keeps_save_waiting_only_without_update(store):
    array = put(np.zeros(200_000, np.uint32))
    with checkpointer(store, snapshot="hold") as ckpt:
        pending = ckpt.save(1, {"w": array})
        array += np.uint32(1)
        pending.result(60)
        assert pending.stats.mode == "hold"
    assert not gpuckpt.load("", device="cpu", store=store)["w"].any()


def test_an_array_dropped_right_after_save_is_saved_all_the_same(store):
    given = numbers(0, np.uint32, (200_000,))
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(2)]
    with streams[0]:
        array = put(given)
        streams[0].synchronize()
    with checkpointer(store, snapshot="copy") as ckpt:
        with streams[1]:
            pending = ckpt.save(1, {"w": array})
        del array
        with streams[0]:
            others = [cp.full(given.shape, value, np.uint32) for value in range(4)]
        pending.result(60)
        streams[0].synchronize()
    assert len(others) == 4
    assert_same(gpuckpt.load("", device="cpu", store=store)["w"], given)


@pytest.fixture
def crowded():
    """A state of 32 MiB, and less than that of free memory beside it."""
    gc.collect()  # tracebacks of earlier tests hold arrays
    cp.get_default_memory_pool().free_all_blocks()
    array = cp.full(32 * MIB, 7, np.uint8)
    free, _ = runtime.memGetInfo()
    filler = cp.cuda.memory.Memory(free - 24 * MIB)
    yield {"w": array}
    del filler


def test_auto_holds_where_a_copy_would_not_fit(store, crowded):
    with gpuckpt.Checkpointer("", store=store, snapshot="auto") as ckpt:
        pending = ckpt.save(1, crowded)
        pending.result(60)
        assert pending.stats.mode == "hold"
    assert (gpuckpt.load("", device="cpu", store=store)["w"] == 7).all()


def test_hold_without_room_for_its_chunks_says_what_to_do_and_leaves_nothing(store, crowded):
    options: dict[str, Any] = {"chunk_nbytes": 16 * MIB, "memory": "128 MiB"}
    with gpuckpt.Checkpointer("", store=store, snapshot="hold", **options) as ckpt:
        with pytest.raises(gpuckpt.DeviceMemoryError, match=r"cuda:0.*smaller chunk_nbytes="):
            ckpt.save(1, crowded)
        assert store.names() == []
    with checkpointer(store, snapshot="hold") as ckpt:
        ckpt.save(2, crowded).result(60)
    assert (gpuckpt.load("", device="cpu", store=store)["w"] == 7).all()


def test_a_copy_without_room_fails_and_leaves_nothing(tmp_path, crowded):
    with gpuckpt.Checkpointer(tmp_path, snapshot="copy") as ckpt:
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(gpuckpt.DeviceMemoryError, match="cuda:0"):
            ckpt.save(1, crowded)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert ckpt.steps() == []
        small = {"w": crowded["w"][:MIB]}
        ckpt.save(2, small).result(60)
    assert (gpuckpt.load(tmp_path, device="cpu")["w"] == 7).all()


def test_loading_what_does_not_fit_names_the_device(store, crowded):
    gpuckpt.save("", crowded, store=store)
    with pytest.raises(gpuckpt.DeviceMemoryError, match="cuda:0"):
        gpuckpt.load("", store=store)


def test_auto_copies_where_there_is_room(store):
    with checkpointer(store, snapshot="auto") as ckpt:
        pending = ckpt.save(1, {"w": put(numbers())})
        pending.result(60)
        assert pending.stats.mode == "copy"


def test_a_device_that_is_not_there_is_not_found(store):
    gpuckpt.save("", {"w": put(numbers())}, store=store)
    with pytest.raises(gpuckpt.NotFoundError, match="cuda:99"):
        gpuckpt.load("", device="cuda:99", store=store)
    with pytest.raises(gpuckpt.InvalidError, match="device"):
        gpuckpt.load("", device="gpu", store=store)


def test_the_host_takes_no_fingerprints_of_what_a_device_has_filtered(tmp_path):
    state = {"on device": cp.ones(100_000, cp.float32)}
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        pending = ckpt.save(1, state)
        pending.result()
        both = ckpt.save(2, state | {"on host": np.ones(1000, np.float32)})
        both.result()
    assert pending.stats.filter_nbytes == 0
    assert pending.stats.encode_nbytes == 400_000
    assert both.stats.filter_nbytes == 4000
