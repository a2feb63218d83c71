"""States that change between saves in every way: a checkpoint is the state at its save."""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import gpuckpt
from gpuckpt.stores.memory import MemoryStore
from tests import like_torch
from tests.changing_states import Box, Interface
from tests.often import often
from tests.strategies import Array, same
from tests.test_checkpointer import FEWEST, SlowStore

DTYPES = ("f4", "f8", "i4", "u1", "?", ">f4", "c8", "bfloat16", "f2")
PLAIN = (0, 1, True, 1.0, -0.0, float("nan"), None, "a", b"a", 2**70, 1j, np.float32(1), "é")
CHUNK_NBYTES = 64 << 10
SEEDS = st.integers(0, 2**20)


class Changes:
    """A state, and every way to change it that was thought of; each by chance."""

    def __init__(self, folder: Path) -> None:
        self.rng = random.Random(0)
        self.folder, self.files = folder, 0
        self.state: dict[Any, Any] = {}
        for key in ("a", "b", "c"):
            self.state[key] = self.new()
        self.state["inner"] = {"x": self.new(), "y": [self.new(), 1]}

    def change(self, seed: int) -> None:
        """Change one thing."""
        self.rng = random.Random(seed)
        ways = (
            *(self.fill, self.fill, self.fill_a_little, self.fill_a_little),
            *(self.replace, self.resize, self.swap, self.alias, self.unalias, self.view),
            *(self.rename, self.remove, self.add, self.retype, self.reshape, self.protect),
            *(self.free, self.contain, self.value, self.copied_by_rounding, self.nothing),
        )
        self.rng.choice(ways)()

    # What a leaf may be.

    def new(self) -> Any:
        makers = (self.plain_array, self.big, self.strided, self.odd, self.tensor, self.memmap)
        return self.rng.choice((*makers, self.wrapped))()

    def plain_array(self) -> Array:
        return self.numbers(self.rng.choice(((), (0,), (7,), (40, 5), (3, 4, 5), (2000,))))

    def big(self) -> Array:
        return self.numbers((self.rng.choice((20_000, 40_000)),), "f4")

    def strided(self) -> Array:
        whole = self.numbers((60, 40))
        return self.rng.choice((whole.T, whole[::-1], whole[:, ::3], whole[5:, 1:9], whole[..., 0]))

    def odd(self) -> Any:
        array = self.numbers((30,), "f4")
        if self.rng.random() < 0.5:
            return np.broadcast_to(array, (4, 30))
        return self.rng.choice((Interface, like_torch.DLPackOnly))(array)

    def tensor(self) -> Any:
        kind = self.rng.choice((like_torch.Tensor, like_torch.Parameter))
        return kind(self.numbers((self.rng.choice((5, 300)), 4), "f4"))

    def memmap(self) -> Array:
        self.files += 1
        path = self.folder / str(self.files)
        path.write_bytes(self.rng.randbytes(4000))
        return np.memmap(path, "u1", self.rng.choice(("r+", "c", "r")))

    def wrapped(self) -> Box:
        return Box({"in": self.plain_array(), "n": self.rng.choice(PLAIN)})

    def numbers(self, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        kind = np.dtype(getattr(ml_dtypes, name) if (name := dtype or self.rng.choice(DTYPES))
                        == "bfloat16" else name)  # fmt: skip
        array = np.zeros(shape, kind)
        random_bits(array, self.rng)
        return array

    # What may happen to it.

    def places(self) -> list[tuple[Any, Any]]:
        """Where leaves are: containers and keys."""
        inner = self.state["inner"]
        found = [(self.state, key) for key in self.state if key != "inner"]
        found += [(inner, key) for key in inner if key != "y"]
        return found + [(inner["y"], at) for at in range(len(inner["y"]))] * self.is_list

    @property
    def is_list(self) -> bool:
        return isinstance(self.state["inner"]["y"], list)

    def place(self) -> tuple[Any, Any]:
        return self.rng.choice(self.places())

    def array(self) -> Array | None:
        container, key = self.place()
        leaf = container[key]
        if isinstance(leaf, Box):
            leaf = leaf.items["in"]
        if isinstance(leaf, Interface):
            leaf = leaf.array
        if isinstance(leaf, like_torch.Tensor | like_torch.DLPackOnly):
            leaf = leaf._array
        return leaf if isinstance(leaf, np.ndarray) else None

    def nothing(self) -> None:
        pass

    def fill(self) -> None:
        array = self.array()
        if array is not None and array.flags.writeable:
            random_bits(array, self.rng)

    def fill_a_little(self) -> None:
        array = self.array()
        if array is not None and array.flags.writeable and array.size:
            at = self.rng.randrange(array.shape[0]) if array.ndim else ...
            array[at] = array.flat[-1]

    def replace(self) -> None:
        container, key = self.place()
        container[key] = self.new()

    def resize(self) -> None:
        """In place, to other memory, behind the back of whoever has looked at it."""
        array = self.array()
        if array is None or array.base is not None or not array.flags.owndata:
            return
        if any(self.memory_of(*other) is array for other in self.places()):
            return  # a view of it would be left over memory that is gone
        count = self.rng.choice((0, 1, array.size * 2, array.size))
        with contextlib.suppress(ValueError):  # it isn't contiguous
            array.resize((count,), refcheck=False)

    def memory_of(self, container: Any, key: Any) -> object:
        leaf = container[key]
        if isinstance(leaf, Interface | like_torch.Tensor | like_torch.DLPackOnly):
            return getattr(leaf, "array", getattr(leaf, "_array", None))
        return leaf.base if isinstance(leaf, np.ndarray) else None

    def swap(self) -> None:
        """What `.data =` and `set_` do to a tensor."""
        container, key = self.place()
        if isinstance(container[key], like_torch.Tensor):
            container[key].data = self.tensor()

    def alias(self) -> None:
        (one, key), (other, other_key) = self.place(), self.place()
        other[other_key] = one[key]

    def unalias(self) -> None:
        container, key = self.place()
        if isinstance(container[key], np.ndarray):
            container[key] = container[key].copy(self.rng.choice("CFK"))

    def view(self) -> None:
        array, (container, key) = self.array(), self.place()
        if array is not None and type(array) is np.ndarray:
            container[key] = self.rng.choice((array[...], array.T, array.reshape(-1)[::2]))

    def rename(self) -> None:
        container, key = self.place()
        if isinstance(container, dict):
            value = container.pop(key)
            container[self.rng.choice((*"abcdef", 1, True, ("t", 1)))] = value

    def remove(self) -> None:
        if len(self.places()) > 3:
            container, key = self.place()
            del container[key]

    def add(self) -> None:
        if len(self.places()) < 9:
            self.state[self.rng.choice("defg")] = self.new()

    def retype(self) -> None:
        """The same array object, of other elements."""
        array = self.array()
        if array is not None and array.dtype.itemsize == 4 and array.flags.owndata:
            kind = np.dtype(self.rng.choice(("f4", "i4", ">f4")))
            with warnings.catch_warnings():  # numpy would have it done no more, but it is
                warnings.simplefilter("ignore", DeprecationWarning)
                array.dtype = kind  # type: ignore[misc]

    def reshape(self) -> None:
        array = self.array()
        if array is not None and array.size and array.flags.c_contiguous and array.flags.owndata:
            shape = self.rng.choice(((array.size,), (1, array.size), (array.size, 1)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                array.shape = shape

    def protect(self) -> None:
        array = self.array()
        if array is not None:
            array.flags.writeable = False

    def free(self) -> None:
        """Other arrays get the memory that one had."""
        container, key = self.place()
        leaf = container[key]
        if isinstance(leaf, np.ndarray):
            shape, dtype = leaf.shape, leaf.dtype
            container[key] = None
            del leaf
            gc.collect()
            made = [np.empty(shape, dtype) for _ in range(2)]
            for array in made:
                random_bits(array, self.rng)
            container[key] = made[1]

    def contain(self) -> None:
        inner = self.state["inner"]
        inner["y"] = self.rng.choice((list, tuple))(inner["y"])

    def value(self) -> None:
        container, key = self.place()
        container[key] = self.rng.choice(PLAIN)

    def copied_by_rounding(self) -> None:
        """A master and its copy, as mixed precision has them."""
        master = self.numbers((40_000,), "f4")
        with np.errstate(all="ignore"):
            self.state["a"], self.state["b"] = master, master.astype(ml_dtypes.bfloat16)


def random_bits(array: Array, rng: random.Random) -> None:
    """New contents: any bits, or few of them."""
    made = np.random.default_rng(rng.randrange(2**32))
    if array.dtype == bool:
        array[...] = made.integers(0, 2, array.shape, np.uint8).astype(bool)
    elif rng.random() < 0.5 and array.dtype.kind == "f":
        array[...] = made.standard_normal(array.shape).astype(array.dtype)
    else:
        raw = made.integers(0, 256, array.nbytes, np.uint8).tobytes()
        array[...] = np.frombuffer(raw, array.dtype).reshape(array.shape)


def taken(node: Any) -> Any:
    """What `load` should give back for a state, now; it shares nothing with it."""
    if isinstance(node, Box):
        return taken(node.items)
    if isinstance(node, dict):
        return {key: taken(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(taken(value) for value in node)
    if isinstance(node, like_torch.Tensor | like_torch.DLPackOnly):
        node = node._array
    if isinstance(node, Interface):
        node = np.asarray(node)  # it says what it said when it was made
    return np.array(node) if isinstance(node, np.ndarray) else node


def emptied(node: Any) -> Any:
    """A state of the same structure, with nothing in its arrays."""
    if isinstance(node, dict):
        return {key: emptied(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(emptied(value) for value in node)
    return np.zeros_like(node) if isinstance(node, np.ndarray) else node


class History(RuleBasedStateMachine):
    """Saves, restores and prunes, and between them changes."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = contextlib.ExitStack()
        folder = self.ends.enter_context(tempfile.TemporaryDirectory())
        patch = self.ends.enter_context(pytest.MonkeyPatch.context())
        patch.setitem(sys.modules, "torch", like_torch.module())
        self.changes = self.begin(Path(folder))
        self.store, self.step, self.expected = MemoryStore(), 0, dict[int, Any]()
        self.options: dict[str, Any] = {}

    def begin(self, folder: Path) -> Changes:
        return Changes(folder)

    def taken(self, state: Any) -> Any:
        return taken(state)

    @initialize(
        codec=st.sampled_from(["auto", "delta", "raw", "zstd"]),
        snapshot=st.sampled_from(["copy", "hold", "auto"]),
        full_every=st.sampled_from([1, 3, 8]),
        keep=st.sampled_from([None, gpuckpt.Keep(last=2)]),
        announces=st.booleans(),
    )
    def open(self, announces: bool, **options: Any) -> None:
        self.announces = announces
        self.options = {**options, "chunk_nbytes": CHUNK_NBYTES, "memory": "8 MiB"}
        self.ckpt = gpuckpt.Checkpointer("memory", store=self.store, **self.options)

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        with self.ckpt.update() if self.announces else contextlib.nullcontext():
            yield

    @rule(seed=SEEDS)
    def change(self, seed: int) -> None:
        with self.updating():
            self.changes.change(seed)

    @rule(seeds=st.lists(SEEDS, min_size=3, max_size=6))
    def change_much(self, seeds: list[int]) -> None:
        with self.updating():
            for seed in seeds:
                self.changes.change(seed)

    @rule(wait=st.booleans())
    def save(self, wait: bool) -> None:
        self.step += 1
        expected = self.taken(self.changes.state)
        try:
            self.ckpt.save(self.step, self.changes.state)
        except gpuckpt.UnsupportedError as error:
            if "through DLPack" not in str(error):  # numpy refuses it of some arrays
                raise
            return
        self.expected[self.step] = expected
        if wait:
            self.check()

    @rule()
    def check(self) -> None:
        """Every checkpoint that is there is what it has to be."""
        self.ckpt.wait()
        steps = self.ckpt.steps()
        assert steps == sorted(self.expected)[-len(steps) :] if steps else not self.expected
        if self.options["keep"] is None:
            assert len(steps) == len(self.expected)
        for step in steps[-3:]:
            found = gpuckpt.load("memory", step, "cpu", like="numpy", store=self.store)
            assert same(found, self.expected[step]), f"step {step}"

    @precondition(lambda self: self.expected)
    @rule(which=st.integers(0, 9))
    def restore_elsewhere(self, which: int) -> None:
        self.ckpt.wait()
        steps = self.ckpt.steps()
        step = steps[which % len(steps)]
        target = emptied(self.expected[step])
        assert self.ckpt.restore(target, step) == step
        assert same(target, self.expected[step])

    @precondition(lambda self: self.expected)
    @rule()
    def restore_here(self) -> None:
        """The state as it is now, which may fit or not."""
        before = self.taken(self.changes.state)
        try:
            step = self.ckpt.restore(self.changes.state)
        except gpuckpt.MismatchError as error:
            if not any(words in str(error) for words in ("mixture", "had been filled")):
                assert same(self.taken(self.changes.state), before)
        except gpuckpt.UnsupportedError as error:
            if "through DLPack" not in str(error):
                raise
            assert same(self.taken(self.changes.state), before)
        else:
            assert same(self.taken(self.changes.state), self.expected[step])

    @rule()
    def reopen(self) -> None:
        self.ckpt.close()
        self.ckpt = gpuckpt.Checkpointer("memory", store=self.store, **self.options)

    def teardown(self) -> None:
        with self.ends:
            if hasattr(self, "ckpt"):
                self.check()
                self.ckpt.close()


TestHistory = History.TestCase
TestHistory.settings = settings(
    max_examples=often(40),
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


# One by one, what a history might not hit upon.


@pytest.mark.parametrize("view", [lambda array: array, lambda array: array[::2]])
def test_a_memmap_is_kept_open_while_it_is_read_and_refused_once_it_was_closed(tmp_path, view):
    """To numpy it is memory like any other: to read it would end the process."""
    path, store = tmp_path / "file", SlowStore()
    path.write_bytes(bytes(range(250)) * 400)
    whole = np.memmap(path, "u1", "r+")
    expected = view(np.frombuffer(path.read_bytes(), np.uint8)).tobytes()
    with gpuckpt.Checkpointer(tmp_path, snapshot="hold", store=store, **FEWEST) as ckpt:
        for step in (1, 2):
            with ckpt.update():
                pass
            pending = ckpt.save(step, {"w": view(whole)})
            mapping: Any = whole._mmap  # type: ignore[attr-defined]
            if step == 1:
                with pytest.raises(BufferError):
                    mapping.close()
            store.gate.set()
            pending.result(30)
            assert gpuckpt.load(tmp_path, store=store)["w"].tobytes() == expected
        state = {"w": view(whole)}
        whole_copy = whole.copy()  # a memmap by its type alone
        ckpt.wait()
        gc.collect()
        mapping.close()
        ckpt.save(3, {"w": whole_copy}).result(30)
        with pytest.raises(gpuckpt.UnsupportedError, match="w: a memmap whose file was closed"):
            ckpt.save(4, state)


def test_the_last_reference_to_an_array_may_go_while_it_is_held(tmp_path):
    for _ in range(20):
        state = {"w": np.arange(200_000.0)}
        with gpuckpt.Checkpointer(tmp_path, snapshot="hold", chunk_nbytes=CHUNK_NBYTES) as ckpt:
            with ckpt.update():
                pass
            pending = ckpt.save(1, state)
            state.clear()
            others = [np.zeros(200_000) for _ in range(3)]
            pending.result(30)
            del others
        assert (gpuckpt.load(tmp_path)["w"] == np.arange(200_000.0)).all()
