"""What only a real GPU can show: its machine code, its copy engines, its queues.

None of these tests runs on the stand-in.
"""

from __future__ import annotations

from typing import Any

import cupy as cp
import numpy as np
import pytest

import gpuckpt
from gpuckpt.devices import kernels
from gpuckpt.devices.driver import PageLocked
from gpuckpt.devices.stream import OwnStream
from gpuckpt.devices.strided import Run, lay_out_runs
from gpuckpt.dtypes import is_turned, width_of
from gpuckpt.fingerprint import leaf_digests
from gpuckpt.planes import split
from gpuckpt.statistics import byte_values, kind_of, statistics_of
from tests.cuda.gates import Gate

pytestmark = pytest.mark.gpu

MIB, GIB = 1 << 20, 1 << 30
LONG_NBYTES = 32 * MIB + 48  # many more leaves than a GPU runs at once, and a cut one
DTYPES = [
    *("uint8", "float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64", "int64")
]


def launched(dtype: str, misaligned: int) -> tuple[Any, Any, Any, kernels.Layout, Any]:
    """Random bytes as one long chunk and some short ones; all that `filter_chunks` is given."""
    width = width_of(dtype)
    sizes = [LONG_NBYTES, width, 65536, 65536 + width, 4096 * width + width]
    raw = np.random.default_rng(3).integers(0, 256, sum(sizes), np.uint8)
    memory = cp.empty(raw.size + 16, np.uint8)[misaligned : misaligned + raw.size]
    memory.set(raw)
    layout = kernels.lay_out(sizes, [width] * len(sizes))
    starts = np.cumsum([0, *sizes[:-1]]).astype(np.uint64)
    values = byte_values(dtype)
    worth = None if values is None else cp.asarray(values)
    layout.rows["tensor"] = starts + np.uint64(memory.data.ptr)
    layout.rows["kind"] = kind_of(dtype)
    layout.rows["turned"] = is_turned(dtype)
    layout.rows["values"] = 0 if worth is None else worth.data.ptr
    return raw, memory, (cp.asarray(layout.rows.view(np.uint8)), worth), layout, sizes


@pytest.mark.parametrize("misaligned", [0, 1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_give_the_bytes_that_numpy_gives(dtype, misaligned):
    raw, memory, (table, _worth), layout, sizes = launched(dtype, misaligned)
    staged = cp.zeros(layout.staged_nbytes, np.uint8)
    digests = cp.zeros(layout.leaves * kernels.DIGEST_NBYTES, np.uint8)
    stream = cp.cuda.get_current_stream()
    arguments = (table.data.ptr, len(sizes), layout.leaves)
    kernels.filter_chunks(*arguments, staged.data.ptr, stream)
    kernels.digest_chunks(*arguments, digests.data.ptr, stream)
    found, again = staged.get(), digests.get()
    memory.fill(0)
    digests.fill(0)
    kernels.unfilter_chunks(*arguments, staged.data.ptr, digests.data.ptr, stream)
    assert memory.get().tobytes() == raw.tobytes()
    assert digests.get().tobytes() == again.tobytes()

    start, digested = 0, 0
    for row, nbytes in enumerate(sizes):
        chunk = raw[start : start + nbytes]
        planes = split(chunk, width_of(dtype), np.empty(nbytes, np.uint8), turned=is_turned(dtype))
        for place, plane in zip(layout.planes(row), planes, strict=True):
            assert np.array_equal(found[place], plane)
        summaries = found[layout.summaries(row)].view(kernels.SUMMARY)
        known = leaf_digests(memoryview(chunk))
        assert summaries["digest"].tobytes() == known
        assert again[digested:][: len(known)].tobytes() == known
        check_counts(summaries, chunk, dtype)
        start, digested = start + nbytes, digested + len(known)


def check_counts(summaries: Any, chunk: Any, dtype: str) -> None:
    counted = statistics_of(chunk, dtype)
    if counted is not None:
        assert int(summaries["nans"].sum()) == counted.nans
        assert int(summaries["infs"].sum()) == counted.infs
        with np.errstate(over="ignore"):  # of random float64
            squares = summaries["squares"].sum()
        assert np.isclose(squares, counted.squares, rtol=1e-5, atol=0)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
def test_strided_tensors_are_gathered_and_scattered_as_numpy_would(itemsize):
    dtype = np.dtype(f"u{itemsize}") if itemsize < 16 else np.dtype("c16")
    raw = np.random.default_rng(4).integers(0, 256, 6 * MIB * itemsize // 4, np.uint8)
    host = raw.view(dtype).reshape(3, -1, 256)
    whole = cp.asarray(raw).view(dtype).reshape(host.shape)
    for view, like in (
        (whole.transpose(2, 0, 1), host.transpose(2, 0, 1)),
        (whole[:, ::-3, 1::2], host[:, ::-3, 1::2]),
    ):
        expected = np.ascontiguousarray(like).tobytes()
        packed = cp.zeros(view.nbytes, np.uint8)
        layout = (view.data.ptr, view.shape, view.strides, itemsize)
        runs = lay_out_runs([Run(*layout, packed.data.ptr, 0, view.nbytes)])
        table = cp.asarray(runs.rows.view(np.uint8))
        arguments = (table.data.ptr, len(runs.rows), runs.pieces, cp.cuda.get_current_stream())
        kernels.gather_runs(*arguments)
        assert packed.get().tobytes() == expected
        view.fill(0)
        kernels.scatter_runs(*arguments)
        assert cp.ascontiguousarray(view).tobytes() == expected


@pytest.mark.slow
@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_more_than_a_gibibyte_comes_back(tmp_path, snapshot, room_for, record_property):
    room_for(5 * GIB)
    numbers = cp.arange((GIB + 36 * MIB) // 4, dtype=np.uint32)
    numbers *= np.uint32(2654435761)
    state = {"w": numbers.view(np.float32), "bf": {"step": numbers[: 4 * MIB].copy()}}
    before = {"w": numbers.copy(), "step": state["bf"]["step"].copy()}
    with gpuckpt.Checkpointer(tmp_path, snapshot=snapshot, memory="1 GiB") as ckpt:
        with ckpt.update():
            pass
        seconds = on_stream(lambda: ckpt.save(1, state))
        with ckpt.update():  # no byte of this belongs to the checkpoint
            numbers.fill(7)
            state["bf"]["step"].fill(7)
        ckpt.wait()
        ckpt.restore(state)
    assert bool((numbers == before["w"]).all())
    assert bool((state["bf"]["step"] == before["step"]).all())
    record_property("save_seconds_on_stream", seconds)
    record_property("device_copy_seconds", on_stream(lambda: cp.copyto(before["w"], numbers)))


def on_stream(work: Any) -> float:
    begin, end = cp.cuda.Event(), cp.cuda.Event()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(cp.cuda.get_elapsed_time(begin, end)) / 1000


@pytest.mark.parametrize("way", ["to host", "to device"])
def test_copies_of_page_locked_memory_do_not_make_the_host_wait(way):
    own = OwnStream("cuda:0")
    host = np.asarray(PageLocked(64 * MIB))
    host[:] = 1
    device = cp.full(host.size, 2, np.uint8)
    cp.cuda.Device().synchronize()
    gate = Gate(own.stream, seconds=20)
    if way == "to host":
        own.to_host(host, device.data.ptr)
    else:
        own.to_device(device.data.ptr, host)
    copied = own.mark()
    given_before_it_opened, done_before_it_opened = not gate.is_open, copied.done
    gate.open()
    own.synchronize(copied)
    gate.join()
    assert given_before_it_opened
    assert not done_before_it_opened
    assert int(host[-1]) == int(device[-1]) == (2 if way == "to host" else 1)


def test_a_copy_out_does_not_wait_for_a_stream_that_waits():
    own = OwnStream("cuda:0")
    host, device = np.asarray(PageLocked(MIB)), cp.full(MIB, 3, np.uint8)
    cp.cuda.Device().synchronize()
    caller = cp.cuda.Stream(non_blocking=True)
    gate = Gate(caller, seconds=20)
    own.to_host(host, device.data.ptr)
    own.synchronize(own.mark())
    beside = not gate.is_open
    gate.open()
    caller.synchronize()
    gate.join()
    assert beside
    assert (host == 3).all()


@pytest.mark.parametrize("others", [0, 32])
def test_held_states_of_a_loop_are_saved_while_other_streams_live(tmp_path, others):
    alive = [cp.cuda.Stream(non_blocking=True) for _ in range(others)]
    cells = cp.zeros((max(others, 1), 1024), np.float32)
    state = {f"w{at}": cp.zeros(MIB, np.float32) for at in range(64)}
    with gpuckpt.Checkpointer(tmp_path, snapshot="hold", memory="64 MiB") as ckpt:
        for step in range(1, 5):
            with ckpt.update():
                for tensor in state.values():
                    cp.add(tensor, 1, out=tensor)
            for at, stream in enumerate(alive):
                with stream:
                    cells[at] += 1
            ckpt.save(step, state)
    for step in range(1, 5):
        found = gpuckpt.load(tmp_path, step, device="cpu", like="numpy")
        assert all((tensor == step).all() for tensor in found.values())
