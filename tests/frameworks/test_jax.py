"""Pytrees of JAX's: saved beside a loop that donates them, restored as new ones, bit for bit."""

from __future__ import annotations

import gc
import socket
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.stores.memory import MemoryStore
from tests.ranks.outcomes import run

jax = pytest.importorskip("jax", reason="jax isn't installed")

import gpuckpt.jax  # noqa: E402 - only where there is one
from gpuckpt.adapters.jax.packing import packed  # noqa: E402
from gpuckpt.adapters.jax.paths import at, leaves_of, nested  # noqa: E402
from gpuckpt.devices.cpu_freeze import CpuCopy, CpuHold  # noqa: E402
from tests.frameworks.trees import assert_same, bits_of  # noqa: E402

jnp = jax.numpy
DTYPES = [
    *("bool", "int8", "uint8", "int16", "int32", "uint32", "float16", "float32", "complex64"),
    *("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    *("float8_e4m3b11fnuz", "int4", "uint4", "int2", "uint2", "float4_e2m1fn"),
]


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    w: Any
    b: Any


def of_bits(dtype: str, shape: tuple[int, ...] = (5, 24)) -> Any:
    """Elements of random bits: NaNs with payloads, denormals and all."""
    kind = jnp.dtype(dtype)
    raw = np.random.default_rng(3).integers(0, 256, (*shape, kind.itemsize), np.uint8)
    bits = {"bool": 1, "int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}
    if dtype in bits:
        return jax.device_put((raw[..., 0] % 2 ** bits[dtype]).astype("uint8").astype(kind))
    return jax.device_put(np.ascontiguousarray(raw).view(kind)[..., 0])


def saved(tree: Any) -> MemoryStore:
    store = MemoryStore()
    with gpuckpt.jax.Checkpointer("", store=store) as ckpt:
        ckpt.save(1, tree)
    return store


def round_trip(tree: Any, target: Any = None) -> Any:
    return gpuckpt.jax.load("", tree if target is None else target, store=saved(tree))


def abstract(tree: Any) -> Any:
    def one(leaf: Any) -> Any:
        sharding = leaf.sharding if leaf.committed else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_any_type_come_back_bit_for_bit(dtype):
    tree = {"w": of_bits(dtype), "scalar": of_bits(dtype, ()), "empty": of_bits(dtype, (0, 3))}
    assert_same(round_trip(tree), tree)
    assert_same(round_trip(tree, abstract(tree)), tree)


def test_every_container_comes_back_as_it_was():
    tree = {
        "dict": {"a": jnp.ones(3), "b": {7: jnp.zeros(2), 8: {("a", 1): jnp.ones(())}}},
        "ordered": OrderedDict(z=jnp.ones(1), a=jnp.zeros(1)),
        "list": [jnp.arange(3), [jnp.arange(2)], [], None],
        "tuple": (jnp.arange(4), None, (), Pair(jnp.ones(2), {"x": jnp.ones(1)})),
        "dataclass": Layer(jnp.ones((2, 2)), None),
        "plain": (1, 2.5, True, 3 + 4j, "text", b"bytes", np.float32(1.5)),
        "host": np.arange(6).reshape(2, 3),
    }
    found = round_trip(tree)
    assert_same(found, tree)
    assert found["host"] is not tree["host"]
    assert isinstance(found["tuple"][3], Pair)


def test_a_tree_may_be_one_leaf_or_none():
    for tree in (jnp.arange(3), 7, None, (), {"a": None}):
        assert_same(round_trip(tree), tree)


PLAIN = st.none() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5)
KEYS = st.text(max_size=4) | st.integers(0, 9).map(str)
TREES = st.recursive(
    PLAIN | st.integers(0, 5).map(lambda n: np.arange(n, dtype=np.int16)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.tuples(inner, inner).map(lambda two: Pair(*two))
    ),
    max_leaves=12,
)


@given(TREES)
@settings(deadline=None, max_examples=60)
def test_unpacking_undoes_packing(tree):
    leaves, treedef = leaves_of(tree)
    nest = nested(leaves)
    assert_same(treedef.unflatten([at(nest, path) for path in leaves]), tree)


@given(TREES)
@settings(deadline=None, max_examples=25)
def test_any_tree_comes_back(tree):
    assert_same(round_trip(tree), tree)


def test_names_are_those_of_jaxs_paths():
    tree = {"params": [Layer(jnp.ones(2), jnp.ones(1))], "opt": Pair(jnp.ones(3), ())}
    assert set(gpuckpt.load("", names="*", store=saved(tree))) == {
        *("params.0.w", "params.0.b", "opt.left"),
    }


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys_go_on_where_they_were(impl):
    tree = {"one": jax.random.key(3, impl=impl), "some": jax.random.split(jax.random.key(4), 6)}
    for target in (tree, abstract(tree)):
        found = round_trip(tree, target)
        assert_same(found, tree)
        assert jnp.array_equal(jax.random.bits(found["one"], 5), jax.random.bits(tree["one"], 5))


def test_random_keys_of_another_kind_are_refused():
    store = saved({"key": jax.random.key(3, impl="rbg")})
    other = {"key": jax.random.key(3, impl="unsafe_rbg")}
    with pytest.raises(gpuckpt.MismatchError, match="key"):
        gpuckpt.jax.load("", other, store=store)


def test_weak_types_are_those_of_the_tree_that_was_saved():
    """Else a step that was compiled for one kind would compute something else after a restart."""
    tree = {"weak": jnp.asarray(2.5), "wide": jnp.full((3,), 1.5), "strong": jnp.float32(2.5)}
    assert [tree[key].weak_type for key in ("weak", "wide", "strong")] == [True, True, False]
    other = {"weak": jnp.float32(0), "wide": jnp.zeros(3), "strong": jnp.asarray(0.0)}
    assert_same(round_trip(tree, other), tree)


def test_a_number_that_a_step_made_an_array_becomes_a_number_again():
    found = round_trip({"n": jnp.asarray(7), "x": jnp.asarray(0.1)}, {"n": 0, "x": 1.0})
    assert found == {"n": 7, "x": float(np.float32(0.1))}
    assert type(found["n"]) is int


def test_functions_among_the_leaves_stay_the_trees_own():
    tree = {"w": jnp.ones(2), "activation": jax.nn.relu}
    found = round_trip(tree, {"w": jnp.zeros(2), "activation": jax.nn.gelu})
    assert found["activation"] is jax.nn.gelu
    assert jnp.array_equal(found["w"], tree["w"])


def test_the_tree_that_is_restored_into_stays_as_it_is():
    target = {"w": jnp.zeros(3), "host": np.zeros(3)}
    found = round_trip({"w": jnp.ones(3), "host": np.ones(3)}, target)
    assert not target["host"].any()
    assert not target["w"].any()
    assert found["host"].all()
    assert found["host"].flags.writeable


def test_an_array_that_was_donated_is_named_and_can_still_be_restored_into():
    tree: dict[str, Any] = {"layers": [jnp.arange(1024.0)], "key": jax.random.key(1)}
    store = saved(tree)
    expected = bits_of(tree["layers"][0])
    gone = dict(tree)
    jax.jit(lambda x: x + 1, donate_argnums=0)(tree["layers"][0]).block_until_ready()
    assert gone["layers"][0].is_deleted()
    with gpuckpt.jax.Checkpointer("", store=store) as ckpt:
        with pytest.raises(gpuckpt.UnsupportedError, match=r"layers\.0.*donated"):
            ckpt.save(2, gone)
        assert bits_of(ckpt.restore(gone)["layers"][0]) == expected
        assert ckpt.steps() == [1]


def test_a_shape_and_a_ref_are_no_values_to_save():
    for leaf in (jax.ShapeDtypeStruct((2,), "float32"), jax.new_ref(jnp.ones(2))):
        with pytest.raises(gpuckpt.UnsupportedError, match="w"):
            saved({"w": leaf})


def test_what_does_not_fit_is_said_by_name():
    store = saved({"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones(3)})
    target = {"a": jnp.ones(3), "b": jnp.ones(4), "d": jnp.ones(2)}
    with pytest.raises(gpuckpt.MismatchError) as caught:
        gpuckpt.jax.load("", target, store=store)
    assert (caught.value.missing, caught.value.unexpected) == (("d",), ("c",))
    assert "b: float32[4] here" in caught.value.mismatched[0]
    with pytest.raises(gpuckpt.MismatchError, match="an array in the checkpoint"):
        gpuckpt.jax.load("", {"a": 1, "b": jnp.ones(3), "c": jnp.ones(3)}, store=store)


def test_without_strict_what_is_missing_keeps_its_value():
    store = saved({"a": jnp.ones(3), "c": jnp.ones(3)})
    target = {"a": jnp.zeros(3), "new": jnp.full(2, 9.0), "count": 5}
    found = gpuckpt.jax.load("", target, store=store, strict=False)
    assert found["new"] is target["new"]
    assert found["count"] == 5
    assert found["a"].all()
    target["new"] = jax.ShapeDtypeStruct((2,), "float32")
    with pytest.raises(gpuckpt.MismatchError, match="new"):
        gpuckpt.jax.load("", target, store=store, strict=False)


def test_a_plain_checkpoint_is_restored_and_a_trees_is_loaded_plainly():
    store = MemoryStore()
    plain: dict[str, Any] = {"layers": [np.arange(3.0, dtype=np.float32)], "lr": 0.5}
    gpuckpt.save("", plain, store=store)
    found = gpuckpt.jax.load("", {"layers": [jnp.zeros(3)], "lr": 0.0}, store=store)
    assert bits_of(found["layers"][0]) == plain["layers"][0].tobytes()
    tree = gpuckpt.load("", store=saved({"layers": [jnp.arange(3.0)], "lr": 0.5}))
    assert isinstance(tree["layers"][0], jax.Array)
    assert tree["lr"] == 0.5


def test_a_key_of_gpuckpts_own_is_refused():
    with pytest.raises(gpuckpt.UnsupportedError, match="__jax__"):
        saved({"__jax__": 1, "weak": jnp.asarray(1.0)})


class Loader:
    """As data loaders are: it keeps its own state."""

    def __init__(self, at: int) -> None:
        self.at = at

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def test_objects_with_a_state_are_restored_in_place():
    target = {"w": jnp.zeros(2), "loader": Loader(0)}
    found = round_trip({"w": jnp.ones(2), "loader": Loader(7)}, target)
    assert found["loader"] is target["loader"]
    assert found["loader"].at == 7


@jax.jit
def busy(x: Any) -> Any:
    """Some hundredths of a second of work."""
    m = jax.lax.fori_loop(0, 20, lambda _, m: jnp.tanh(m @ m), jnp.full((300, 300), 0.5))
    return x + m[0, 0]


@pytest.mark.parametrize("snapshot", ["copy", "hold", "auto"])
def test_what_is_still_computed_is_waited_for(snapshot):
    store, leaf = MemoryStore(), jnp.arange(1 << 16, dtype="float32")
    busy(leaf).block_until_ready()
    with gpuckpt.jax.Checkpointer("", store=store, snapshot=snapshot) as ckpt:
        for step in range(3):
            leaf = busy(leaf)
            ckpt.save(step, {"w": leaf}).result(60)
            assert bits_of(ckpt.restore({"w": leaf})["w"]) == bits_of(leaf)


@pytest.mark.parametrize("snapshot", ["copy", "hold", "auto"])
def test_a_loop_that_donates_its_state_goes_on_beside_a_save(snapshot):
    """What is being saved is neither overwritten nor given back, though nothing waits."""
    store = MemoryStore()
    step_fn = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    twin = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s))
    state = {"w": jnp.arange(1 << 20, dtype="float32"), "b": jnp.ones(7)}
    expected = {"w": state["w"] + 0, "b": state["b"] + 0}
    with gpuckpt.jax.Checkpointer("", store=store, snapshot=snapshot) as ckpt:
        for step in range(4):
            then = {key: bits_of(leaf) for key, leaf in expected.items()}
            pending = ckpt.save(step, state)
            for _ in range(3):
                state, expected = step_fn(state), twin(expected)
            gc.collect()
            pending.result(60)
            found = ckpt.restore(expected, step)
            assert {key: bits_of(leaf) for key, leaf in found.items()} == then
            assert {key: bits_of(leaf) for key, leaf in state.items()} == {
                key: bits_of(leaf) for key, leaf in expected.items()
            }


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="GPUs copy on the GPU")
def test_arrays_on_the_host_are_not_copied_and_nobody_waits(monkeypatch):
    held: list[Any] = []
    for kind in (CpuCopy, CpuHold):
        original = kind.__init__

        def init(self: Any, *arguments: Any, original: Any = original) -> None:
            held.append(self)
            original(self, *arguments)

        monkeypatch.setattr(kind, "__init__", init)
    for snapshot in ("auto", "copy", "hold"):
        with gpuckpt.jax.Checkpointer("", store=MemoryStore(), snapshot=snapshot) as ckpt:
            pending = ckpt.save(1, {"w": jnp.arange(1 << 20, dtype="float32")})
            pending.result(60)
            assert pending.stats.copy_nbytes == 0
    assert [type(one) for one in held] == [CpuCopy] * 3


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="GPUs copy on the GPU")
def test_numpys_arrays_beside_them_are_copied():
    state = {"jax": jnp.arange(1 << 16, dtype="float32"), "numpy": np.zeros(1 << 16)}
    store = MemoryStore()
    with gpuckpt.jax.Checkpointer("", store=store, snapshot="copy") as ckpt:
        pending = ckpt.save(1, state)
        state["numpy"] += 1
        pending.result(60)
        assert 1 << 19 <= pending.stats.copy_nbytes < 3 << 18
        found = ckpt.restore(state)
    assert not found["numpy"].any()
    assert bits_of(found["jax"]) == bits_of(state["jax"])


def test_a_loop_resumes_where_it_was(tmp_path):
    def train(state: Any) -> Any:
        key, sub = jax.random.split(state["key"])
        return {"w": state["w"] + jax.random.normal(sub, (4,)), "key": key}

    def loop(last: int) -> tuple[int, Any]:
        state = {"w": jnp.zeros(4), "key": jax.random.key(0)}
        every = gpuckpt.Every(steps=2)
        with gpuckpt.jax.Checkpointer(tmp_path / "run", every=every) as ckpt:
            done, state = ckpt.resume(state)
            for step in range(done + 1, last + 1):
                state = train(state)
                ckpt.step(step, state)
        return done, state

    whole = {"w": jnp.zeros(4), "key": jax.random.key(0)}
    for _ in range(9):
        whole = train(whole)
    assert loop(5)[0] == 0
    done, state = loop(9)
    assert done == 4
    assert_same(state, whole)


def test_step_zero_is_a_step_and_no_checkpoint_is_none(tmp_path):
    with gpuckpt.jax.Checkpointer(tmp_path, every=gpuckpt.Every(steps=10)) as ckpt:
        tree = {"w": jnp.ones(2)}
        assert ckpt.resume(tree)[1] is tree
        ckpt.save(0, tree)
        found = ckpt.resume({"w": jnp.zeros(2)})
        assert found[0] == 0
        assert found[1]["w"].all()
        assert ckpt.step(3, {"w": object()}) is None, "not even looked at"


def test_packing_leaves_out_functions_and_keeps_names_apart():
    state = packed({"f": jax.nn.relu, "a": {"b": jnp.ones(1)}, "a.b": jnp.zeros(1)})
    assert set(state) == {"a", "a.b"}


MESHES = [
    "another_mesh",
    "abstract_targets",
    "keys_on_a_mesh",
    "one_device_stays_one",
    "functions",
    "one_that_is_gone_is_named",
]


@pytest.fixture(scope="module")
def outcome() -> dict[str, str]:
    """What a process with eight devices on the host says."""
    flags = "--xla_force_host_platform_device_count=8"
    return run("tests.frameworks.jax_meshes", 1, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")[0]


def test_every_check_of_meshes_was_made(outcome):
    assert list(outcome) == MESHES


@pytest.mark.parametrize("check", MESHES)
def test_sharded_arrays_are_restored_on_any_mesh(outcome, check):
    assert not outcome[check], outcome[check]


RANKS = ["other_meshes", "a_manager"]


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, str]]:
    """What two processes with two devices each say, which hold arrays together."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return run(
        *("tests.frameworks.jax_ranks", 2),
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
        JAX_PLATFORMS="cpu",
        JAX_RANKS_ADDRESS=address,
    )


@pytest.mark.parametrize("check", RANKS)
def test_processes_restore_together_what_each_needs(outcomes, check):
    for rank, outcome in enumerate(outcomes):
        assert list(outcome) == RANKS
        assert not outcome[check], f"{rank}: {outcome[check]}"
