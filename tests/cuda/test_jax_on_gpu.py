"""JAX's arrays on a real GPU: bit for bit, after what JAX still computes, and donated meanwhile."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.arrays import look, look_all
from gpuckpt.stores.memory import MemoryStore

pytestmark = pytest.mark.gpu

if os.environ.get("GPUCKPT_STANDIN"):
    pytest.skip("needs a real GPU", allow_module_level=True)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # CuPy wants some memory, too
jax = pytest.importorskip("jax", reason="jax isn't installed")
try:
    GPUS = jax.devices("gpu")
except RuntimeError as error:
    pytest.skip(f"jax sees no GPU: {error}", allow_module_level=True)

COUNT = 1 << 20
DTYPES = [
    *("uint8", "int8", "uint32", "int32", "bool", "complex64", "float16", "float32", "bfloat16"),
    *("float8_e4m3fn", "float8_e5m2"),
]
BUSY_STEPS = 200


def of_bits(dtype: str) -> Any:
    """Elements of random bits: NaNs with payloads, denormals and all."""
    kind = jax.numpy.dtype(dtype)
    bits = np.random.default_rng(3).integers(0, 256, COUNT * kind.itemsize, np.uint8)
    return (bits % 2).astype(bool) if dtype == "bool" else bits.view(kind)


def on_gpu(array: np.ndarray[Any, Any], device: Any = None) -> Any:
    return jax.device_put(array, device or GPUS[0])


def bits_of(array: Any) -> bytes:
    return np.asarray(array).tobytes()


@jax.jit
def busy(x: Any) -> Any:
    """Some tenths of a second of work that ends in an array of `x`'s shape."""

    def turn(_: int, m: Any) -> Any:
        return jax.numpy.tanh(m @ m)

    m = jax.lax.fori_loop(0, BUSY_STEPS, turn, jax.numpy.full((4096, 4096), 0.5, "float32"))
    return x + m[0, 0]


def a_step(x: Any) -> Any:
    return x * 2 + 1


a_step_that_donates = jax.jit(a_step, donate_argnums=0)


def saved(store: MemoryStore) -> bytes:
    return bits_of(gpuckpt.load("", device="cpu", like="numpy", store=store)["w"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_comes_back_to_the_gpu_bit_for_bit(dtype):
    full, store = of_bits(dtype), MemoryStore()
    leaf = on_gpu(full)
    gpuckpt.save("", {"w": leaf}, store=store)
    again = gpuckpt.load("", store=store)["w"]
    assert isinstance(again, jax.Array)
    assert again.devices() == leaf.devices()
    assert again.dtype == leaf.dtype
    assert bits_of(again) == full.tobytes()


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
def test_elements_of_half_a_byte_come_back(dtype):
    store = MemoryStore()
    leaf = on_gpu(np.arange(-8 if dtype == "int4" else 0, 8).astype(jax.numpy.dtype(dtype)))
    gpuckpt.save("", {"w": leaf}, store=store)
    again = gpuckpt.load("", store=store)["w"]
    assert again.dtype == leaf.dtype
    assert np.array_equal(np.asarray(again, np.int32), np.asarray(leaf, np.int32))


def test_an_array_is_read_where_it_is():
    leaf = on_gpu(of_bits("bfloat16"))
    tensor = look(leaf, "w")
    assert tensor is not None
    assert tensor.spec.device.startswith("cuda:")
    assert tensor.address == leaf.unsafe_buffer_pointer()


def test_a_state_is_restored_with_new_arrays_on_the_same_gpu():
    full, store = of_bits("float32"), MemoryStore()
    gpuckpt.save("", {"w": on_gpu(full), "b": on_gpu(full[:7])}, store=store)
    state = {"w": on_gpu(np.zeros_like(full)), "b": on_gpu(np.zeros(7, np.float32))}
    with gpuckpt.Checkpointer("", store=store) as ckpt:
        ckpt.restore(state)
    assert state["w"].devices() == {GPUS[0]}
    assert bits_of(state["w"]) == full.tobytes()
    assert bits_of(state["b"]) == full[:7].tobytes()


@pytest.mark.parametrize("snapshot", ["copy", "hold"])
def test_what_jax_still_computes_is_waited_for(snapshot):
    leaf = on_gpu(np.random.default_rng(5).standard_normal(COUNT, np.float32))
    busy(leaf).block_until_ready()  # compiled
    store = MemoryStore()
    with gpuckpt.Checkpointer("", store=store, snapshot=snapshot) as ckpt:
        for step in range(3):
            leaf = busy(leaf)
            ckpt.save(step, {"w": leaf})
            ckpt.wait()
            assert saved(store) == bits_of(leaf)


@pytest.mark.parametrize("snapshot", ["copy", "hold", "auto"])
def test_a_loop_that_donates_its_state_goes_on_beside_a_save(snapshot):
    store, leaf = MemoryStore(), on_gpu(np.arange(1 << 24, dtype=np.float32))
    twin = jax.jit(a_step)
    expected = leaf + 0
    a_step_that_donates(leaf + 0).block_until_ready()
    with gpuckpt.Checkpointer("", store=store, snapshot=snapshot) as ckpt:
        for step in range(4):
            then = bits_of(expected)
            pending = ckpt.save(step, {"w": leaf})
            assert pending.staged.wait(60)  # JAX donates nothing that somebody refers to
            for _ in range(3):
                with ckpt.update():
                    leaf = a_step_that_donates(leaf)
                expected = twin(expected)
            pending.result(60)
            assert saved(store) == then
            assert bits_of(leaf) == bits_of(expected)


def test_jax_donates_nothing_that_is_looked_at():
    leaf = on_gpu(np.arange(1 << 20, dtype=np.float32))
    a_step_that_donates(leaf + 0).block_until_ready()
    tensor = look(leaf, "w")
    assert tensor is not None
    with pytest.raises(ValueError, match="external reference"):
        a_step_that_donates(leaf)
    del tensor
    a_step_that_donates(leaf).block_until_ready()


def test_an_array_that_was_donated_is_named():
    leaf = on_gpu(np.arange(1 << 20, dtype=np.float32))
    a_step_that_donates(leaf).block_until_ready()
    assert leaf.is_deleted()
    with pytest.raises((gpuckpt.UnsupportedError, RuntimeError), match=r"w|deleted"):
        gpuckpt.save("", {"w": leaf}, store=MemoryStore())


def test_a_mesh_of_one_gpu_is_one_array():
    mesh = jax.sharding.Mesh(np.array(GPUS[:1]), "x")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    full, store = of_bits("bfloat16"), MemoryStore()
    gpuckpt.save("", {"w": jax.device_put(full, sharding)}, store=store)
    assert saved(store) == full.tobytes()


@pytest.mark.skipif(len(GPUS) < 2, reason="one GPU")
def test_a_sharded_array_is_restored_on_another_mesh():
    sharding, spec = jax.sharding.NamedSharding, jax.sharding.PartitionSpec("x")
    devices = np.array(GPUS)
    full, store = of_bits("float32"), MemoryStore()
    leaf = jax.device_put(full, sharding(jax.sharding.Mesh(devices, "x"), spec))
    assert len(look_all(leaf, "w")) == len(devices)
    gpuckpt.save("", {"w": leaf}, store=store)
    other = sharding(jax.sharding.Mesh(devices[::-1][:2], "x"), spec)
    state = {"w": jax.device_put(np.zeros_like(full), other)}
    with gpuckpt.Checkpointer("", store=store) as ckpt:
        ckpt.restore(state)
    assert state["w"].sharding == other
    assert bits_of(state["w"]) == full.tobytes()
