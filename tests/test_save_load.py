"""`save` and `load`: what went in comes out, bit for bit, or an error says why not."""

from __future__ import annotations

import collections
import enum
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt import layout
from gpuckpt.commit import open_step
from gpuckpt.fingerprint import checksum128
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryStore
from tests.strategies import ITEM_NBYTES_MAX, arrays, memory_order, same, states

quick = settings(max_examples=50, deadline=None)


@quick
@given(states(), st.sampled_from(("auto", "zstd", "raw")))
@example({"weights": np.random.default_rng(0).standard_normal((64, 64)).astype("f4")}, "auto")
def test_a_state_comes_back_bit_for_bit(state, codec):
    store = MemoryStore()
    saved = gpuckpt.save("unused", state, 3, codec=codec, store=store)
    assert saved.step == 3
    assert same(gpuckpt.load("unused", store=store), state)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(states())
def test_a_state_comes_back_from_a_directory(tmp_path: Path, state):
    root = tmp_path / "root"
    gpuckpt.save(root, state, 1)
    assert same(gpuckpt.load(root), state)


@quick
@given(states(), st.integers(ITEM_NBYTES_MAX, 200), st.sampled_from(("copy", "hold", "auto")))
def test_a_state_in_tiny_chunks_comes_back_bit_for_bit(state, chunk_nbytes, mode):
    store = MemoryStore()
    with gpuckpt.Checkpointer(
        "unused", store=store, chunk_nbytes=chunk_nbytes, snapshot=mode
    ) as it:
        it.save(1, state).result()
    for entry in open_step(store).tensors:
        assert all(chunk.nbytes <= chunk_nbytes for chunk in entry.chunks)
    assert same(gpuckpt.load("unused", store=store), state)


@quick
@given(arrays())
def test_a_dense_arrays_order_in_memory_comes_back(array):
    store = MemoryStore()
    gpuckpt.save("unused", {"a": array}, store=store)
    again = gpuckpt.load("unused", store=store)["a"]
    axes = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    dense = array.size and array.transpose(axes).flags.c_contiguous
    if dense and not array.flags.c_contiguous:
        assert memory_order(again) == memory_order(array)
        assert not again.flags.c_contiguous
    else:
        assert again.flags.c_contiguous
    assert again.flags.writeable


def test_fortran_and_channels_last_arrays_come_back_as_they_lay():
    store = MemoryStore()
    image = np.arange(120.0).reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)
    state = {"f": np.asfortranarray(np.arange(12).reshape(3, 4)), "image": image}
    gpuckpt.save("unused", state, store=store)
    again = gpuckpt.load("unused", store=store)
    assert again["f"].flags.f_contiguous
    assert again["image"].strides == image.strides
    assert same(again, state)


def test_one_array_under_several_names_is_saved_once_and_is_one_again():
    store = MemoryStore()
    tied = np.arange(1000.0)
    state = {
        "embed": tied,
        "head": [tied, (tied[:],)],
        "other": tied.copy(),
        "t": tied.reshape(10, -1),
    }
    saved = gpuckpt.save("unused", state, store=store)
    assert saved.raw_nbytes == 3 * tied.nbytes
    again = gpuckpt.load("unused", store=store)
    assert again["embed"] is again["head"][0] is again["head"][1][0]
    assert not np.shares_memory(again["embed"], again["other"])
    assert same(again, state)


@pytest.mark.parametrize("state", [np.arange(3), 5, None, "x", (1, np.zeros(2)), [], (), {}])
def test_a_state_may_be_a_single_leaf_or_empty(state):
    store = MemoryStore()
    gpuckpt.save("unused", state, store=store)
    assert same(gpuckpt.load("unused", store=store), state)


class Optimizer:
    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Pair(NamedTuple):
    left: Any
    right: Any


def test_containers_that_have_no_place_in_a_file_come_back_as_plain_ones():
    store = MemoryStore()
    state = {
        "object": Optimizer(m=np.ones(2), lr=0.1),
        "pair": Pair(1, np.zeros(1)),
        "ordered": collections.OrderedDict(b=1, a=2),
        "read only": MappingProxyType({"x": 1}),
    }
    gpuckpt.save("unused", state, store=store)
    again = gpuckpt.load("unused", store=store)
    wanted = {
        "object": {"m": np.ones(2), "lr": 0.1},
        "pair": (1, np.zeros(1)),
        "ordered": {"b": 1, "a": 2},
        "read only": {"x": 1},
    }
    assert same(again, wanted)


# What can't be saved


class Colour(enum.IntEnum):
    RED = 1


def containing_itself() -> Any:
    loop: list[Any] = []
    loop.append({"loop": loop})
    return loop


def object_containing_itself() -> Any:
    one = Optimizer()
    one.state["self"] = one
    return one


class Endless:
    def state_dict(self) -> Any:
        return {"next": Endless()}

    def load_state_dict(self, state: Any) -> None: ...


def nested(levels: int) -> Any:
    state: Any = 0
    for _ in range(levels):
        state = [state]
    return state


UNSUPPORTED: dict[str, Any] = {
    "object array": np.array([None, 1], object),
    "set": {1, 2},
    "structured": np.zeros(2, "f4,i4"),
    "masked": np.ma.masked_array([1, 2], [True, False]),
    "enum": Colour.RED,
    "function": len,
    "loop": containing_itself(),
    "object loop": object_containing_itself(),
    "endless object": Endless(),
    "deep": nested(150),
    "key": {frozenset(): 1},
    "enum key": {Colour.RED: 1},
    "text array": np.array(["x"], np.dtypes.StringDType()),
    "huge elements": np.zeros(1, "V70000"),
    "structured scalar": np.zeros(1, "f4,i4")[0],
    "read-only dlpack": type(
        "D", (), {"__dlpack__": lambda *_, **__: 1 / 0, "__dlpack_device__": lambda _: (99, 0)}
    )(),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_leaf_that_cannot_be_saved_is_named_before_anything_is_written(tmp_path: Path, kind):
    root = tmp_path / "root"
    state = {"fine": np.zeros(3), "model": {"layers": [1, UNSUPPORTED[kind]]}}
    with pytest.raises(gpuckpt.UnsupportedError) as caught:
        gpuckpt.save(root, state)
    assert caught.value.name.startswith("model.layers.1")
    assert str(caught.value).startswith(caught.value.name)
    assert not root.exists()
    with gpuckpt.Checkpointer(root) as ckpt:
        with pytest.raises(gpuckpt.UnsupportedError, match=r"^model\.layers\.1"):
            ckpt.save(1, state)
        assert ckpt.steps() == []
        assert [path.name for path in root.iterdir()] == [layout.LOCK]


@pytest.mark.parametrize("state", [UNSUPPORTED["loop"], UNSUPPORTED["object loop"]])
def test_a_container_that_contains_itself_is_called_that(state):
    with pytest.raises(gpuckpt.UnsupportedError, match="contains itself"):
        gpuckpt.save("unused", state, store=MemoryStore())


def test_nesting_within_the_limit_is_saved():
    store = MemoryStore()
    gpuckpt.save("unused", nested(99), store=store)
    assert gpuckpt.load("unused", store=store) == nested(99)


@pytest.mark.parametrize(
    "options",
    [{"codec": "lz4"}, {"step": -1}, {"step": 1.5}, {"metrics": {"a": "x"}}, {"memory": 1}],
)
def test_options_are_checked_before_anything_is_written(tmp_path: Path, options):
    with pytest.raises(gpuckpt.InvalidError):
        gpuckpt.save(tmp_path / "root", {"a": 1}, **options)
    assert not (tmp_path / "root").exists()


# Arrays of other libraries, by the protocols they speak


class ByInterface:
    def __init__(self, array: Any) -> None:
        self.array = array

    @property
    def __array_interface__(self) -> Any:
        return self.array.__array_interface__


class ByDlpack:
    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("wrap", [ByInterface, ByDlpack])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0).reshape(3, 4),
        np.arange(12, dtype="i2").reshape(3, 4).T,
        np.arange(20)[::-2],
        np.zeros((0, 3), "c8"),
        np.array(1.5),
        np.array([True, False]),
    ],
)
def test_arrays_that_only_speak_a_protocol_are_saved_and_restored_in_place(wrap, array):
    store = MemoryStore()
    gpuckpt.save("unused", {"a": wrap(array)}, store=store)
    assert same(gpuckpt.load("unused", store=store), {"a": array})
    target = wrap(np.zeros(array.shape[::-1], array.dtype).T)
    state = {"a": target}
    with gpuckpt.Checkpointer("unused", store=store) as ckpt:
        ckpt.restore(state)
    assert state["a"] is target
    assert same(target.array, array)


# What load is asked for


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    rng = np.random.default_rng(5)
    model = {"layers": [{"w": rng.standard_normal((40, 30)).astype("f4"), "b": np.zeros(9)}] * 2}
    state = {"model": model, "optimizer": {"w": np.arange(5), "lr": 0.5}, "step": 7}
    gpuckpt.save(path, state, 7, metrics={"loss": 0.25}, epoch=2)
    return path


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ("step", {"step"}),
        ("optimizer", {"optimizer.w", "optimizer.lr"}),
        (["model.layers.0", "step"], {"model.layers.0.w", "model.layers.0.b", "step"}),
        ("*.w", {"model.layers.0.w", "model.layers.1.w", "optimizer.w"}),
        ("model.layers.?.b", {"model.layers.0.b", "model.layers.1.b"}),
        (iter(["*lr"]), {"optimizer.lr"}),
        ([], set()),
    ],
)
def test_names_and_globs_pick_leaves(root: Path, names, wanted):
    picked = gpuckpt.load(root, names=names)
    assert set(picked) == wanted
    whole = gpuckpt.load(root)
    for name, leaf in picked.items():
        node = whole
        for key in name.split("."):
            node = node[int(key) if key.isdecimal() else key]
        assert same(leaf, node)


def test_a_name_that_fits_nothing_is_not_found_and_a_near_one_is_suggested(root: Path):
    with pytest.raises(gpuckpt.NotFoundError, match=r"'optimizer\.wd'.*did you mean optimizer\.w"):
        gpuckpt.load(root, names=["step", "optimizer.wd"])


def test_only_the_bytes_of_the_picked_leaves_are_read(root: Path):
    first = open_step(LocalStore(root)).tensors[0].chunks[0].extent
    damage(root / first.segment, first.offset)
    with pytest.raises(gpuckpt.CorruptError):
        gpuckpt.load(root)
    assert gpuckpt.load(root, names="optimizer.lr") == {"optimizer.lr": 0.5}


def test_a_missing_root_step_or_library_is_not_found(tmp_path: Path, root: Path):
    with pytest.raises(gpuckpt.NotFoundError, match="no committed checkpoint"):
        gpuckpt.load(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(gpuckpt.NotFoundError, match="step 8 isn't there; committed steps: 7"):
        gpuckpt.load(root, 8)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"like": "tensorflow"}, gpuckpt.InvalidError),
        ({"device": "gpu"}, gpuckpt.InvalidError),
        ({"device": "cuda:x"}, gpuckpt.InvalidError),
        ({"device": "cuda", "like": "numpy"}, gpuckpt.InvalidError),
        ({"device": "cpu", "like": "cupy"}, gpuckpt.InvalidError),
        ({"memory": "lots"}, gpuckpt.InvalidError),
    ],
)
def test_a_device_or_library_that_makes_no_sense_is_refused(root: Path, options, error):
    with pytest.raises(error):
        gpuckpt.load(root, **options)


def test_like_numpy_and_device_cpu_give_the_arrays_as_they_were(root: Path):
    whole = gpuckpt.load(root)
    every: list[dict[str, Any]] = [
        {"like": "numpy"},
        {"device": "cpu"},
        {"like": "numpy", "device": "cpu"},
    ]
    for options in every:
        assert same(gpuckpt.load(root, **options), whole)


def test_a_step_is_replaced_in_place_and_leaves_no_litter(root: Path):
    before = {path.name for path in root.iterdir()}
    saved = gpuckpt.save(root, {"new": np.ones(3)}, 7)
    assert same(gpuckpt.load(root), {"new": np.ones(3)})
    names = {path.name for path in root.iterdir()}
    assert len(names) == 3
    assert {layout.LOCK, Path(saved.path).name} == names & before


def test_the_newest_step_is_loaded_unless_another_is_named(tmp_path: Path):
    for step in (5, 20, 10):
        gpuckpt.save(tmp_path, {"step": step}, step)
    assert gpuckpt.load(tmp_path) == {"step": 20}
    assert gpuckpt.load(tmp_path, 10) == {"step": 10}


# Damage


def damage(path: Path, at: int, flip: int = 0x10) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= flip
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_in_the_data_is_corrupt_and_names_its_tensor():
    rng = random.Random(3)
    state = {
        "a": np.random.default_rng(1).standard_normal(3000).astype("f4"),
        "b": {"c": np.arange(500), "bf": np.arange(900).astype(ml_dtypes.bfloat16)},
    }
    whole = MemoryStore()
    gpuckpt.save("unused", state, store=whole)
    for entry in open_step(whole).tensors:
        for chunk in entry.chunks:
            extent = chunk.extent
            for _ in range(25):
                store = MemoryStore({name: bytes(data) for name, data in whole.files.items()})
                at = extent.offset + rng.randrange(extent.length)
                store.files[extent.segment][at] ^= 1 << rng.randrange(8)
                with pytest.raises(gpuckpt.CorruptError) as caught:
                    gpuckpt.load("unused", store=store)
                for word in (f"{entry.spec.name} in ", extent.segment, f"offset {extent.offset}"):
                    assert word in str(caught.value)


def test_wrong_bytes_with_a_right_checksum_fail_their_fingerprint():
    store = MemoryStore()
    gpuckpt.save("unused", {"a": np.arange(64), "b": np.arange(64)[::-1]}, store=store, codec="raw")
    manifest = open_step(store)
    a, b = (entry.chunks[0] for entry in manifest.tensors)
    name = layout.manifest_name(0)
    body = bytes(store.files[name])[layout.MANIFEST_HEAD_NBYTES : -len(layout.MANIFEST_TAIL)]
    swapped = body.replace(a.fingerprint.encode(), b.fingerprint.encode())
    sealed = (layout.MANIFEST_HEAD % (layout.VERSION, checksum128(swapped))).encode()
    store.files[name] = bytearray(sealed + swapped + layout.MANIFEST_TAIL)
    with pytest.raises(gpuckpt.CorruptError, match=r"^a in .*fingerprint"):
        gpuckpt.load("unused", store=store)


def test_a_truncated_segment_is_corrupt_and_a_missing_one_not_found(root: Path):
    segment = next(root.glob("*.segment"))
    whole = segment.read_bytes()
    for length in (0, 64, 200, 2000):
        segment.write_bytes(whole[:length])
        with pytest.raises(gpuckpt.CorruptError, match=r"segment"):
            gpuckpt.load(root)
    segment.unlink()
    with pytest.raises(gpuckpt.NotFoundError, match=segment.name):
        gpuckpt.load(root)


def test_a_damaged_manifest_is_corrupt_and_a_newer_one_says_upgrade(root: Path):
    manifest = next(root.glob("*.manifest.json"))
    whole = manifest.read_bytes()
    damage(manifest, len(whole) // 2)
    with pytest.raises(gpuckpt.CorruptError, match=manifest.name):
        gpuckpt.load(root)
    manifest.write_bytes(whole.replace(b'"gpuckpt":1,', b'"gpuckpt":12,', 1))
    with pytest.raises(gpuckpt.FormatError, match="format 12"):
        gpuckpt.load(root)


def test_an_older_step_can_be_loaded_and_a_new_one_saved_beside_a_damaged_one(tmp_path: Path):
    for step in (1, 2):
        gpuckpt.save(tmp_path, {"step": step}, step)
    (tmp_path / layout.manifest_name(2)).write_bytes(b"damaged")
    with pytest.raises(gpuckpt.CorruptError):
        gpuckpt.load(tmp_path)
    assert gpuckpt.load(tmp_path, 1) == {"step": 1}
    gpuckpt.save(tmp_path, {"step": 3}, 3)
    assert gpuckpt.load(tmp_path) == {"step": 3}


# One writer


def test_a_second_writer_is_told_who_has_the_root(tmp_path: Path):
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        for begin in (
            lambda: gpuckpt.Checkpointer(tmp_path),
            lambda: gpuckpt.save(tmp_path, {"a": 1}),
        ):
            with pytest.raises(gpuckpt.LockedError, match=f"pid {os.getpid()} on "):
                begin()
        ckpt.save(1, {"a": 1}).result()
        assert gpuckpt.load(tmp_path) == {"a": 1}
    gpuckpt.save(tmp_path, {"a": 2}, 2)


OWNER = """
    import os, sys
    import gpuckpt
    ckpt = gpuckpt.Checkpointer(sys.argv[1])
    ckpt.save(1, {"a": 1}).result()
    owner = os.getpid()
    if not os.fork():
        print(owner, os.getpid(), flush=True)  # by the child: it has let go of the lock by now
    sys.stdin.read()  # until the test lets go
    os._exit(0)
"""


def test_an_owner_that_was_killed_holds_nothing_though_a_child_of_it_lives_on(tmp_path: Path):
    command = [sys.executable, "-c", textwrap.dedent(OWNER), str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as owner:
        assert owner.stdout is not None
        pid, child = map(int, owner.stdout.readline().split())
        try:
            with pytest.raises(gpuckpt.LockedError, match=f"pid {pid} on "):
                gpuckpt.Checkpointer(tmp_path)
            assert gpuckpt.load(tmp_path) == {"a": 1}
            owner.kill()
            owner.wait()
            os.kill(child, 0)  # it is there
            with gpuckpt.Checkpointer(tmp_path) as ckpt:
                assert ckpt.steps() == [1]
        finally:
            os.kill(child, signal.SIGKILL)
            owner.kill()


def test_a_forked_child_can_neither_use_nor_close_its_parents_checkpointer(tmp_path: Path):
    program = """
        import os, sys
        import gpuckpt
        ckpt = gpuckpt.Checkpointer(sys.argv[1])
        child = os.fork()
        if not child:
            try:
                ckpt.save(1, {"a": 1})
            except gpuckpt.ClosedError:
                ckpt.close()
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        try:
            gpuckpt.Checkpointer(sys.argv[1])
        except gpuckpt.LockedError:
            ckpt.save(2, {"a": 2}).result()
            ckpt.close()
            print(gpuckpt.load(sys.argv[1]))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "{'a': 2}\n", done.stderr


def test_a_checkpoint_says_what_it_is(tmp_path: Path):
    before = time.time()
    state = {"w": np.zeros(10_000), "b": np.zeros(0)}
    saved = gpuckpt.save(tmp_path, state, 12, epoch=3, metrics={"loss": np.float32(0.5)})  # type: ignore[dict-item]
    assert (saved.step, saved.epoch, saved.metrics) == (12, 3, {"loss": 0.5})
    assert before <= saved.created <= time.time()
    assert saved.raw_nbytes == 80_000
    assert 0 < saved.encoded_nbytes < 80_000
    assert Path(saved.path).is_file()
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        assert ckpt.latest() == saved
