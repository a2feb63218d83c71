"""What the leaves of a pytree are: arrays, random keys, plain values, and what isn't saved."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from gpuckpt.errors import UnsupportedError
from gpuckpt.tree import is_object


def is_static(leaf: Any) -> bool:
    """Whether a leaf belongs to the program, like a module's activation function."""
    return callable(leaf) and not is_object(leaf)


def is_key(leaf: Any) -> bool:
    """Whether it is an array of random keys, or stands for one."""
    return is_array(leaf) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_array(leaf: Any) -> bool:
    """Whether it is an array of JAX's, or stands for one."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return True
    if isinstance(leaf, np.ndarray | np.generic) or is_object(leaf):
        return False
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_weak(leaf: Any) -> bool:
    """Whether an array's type gives way to that of others, as a Python number's does."""
    return bool(getattr(leaf, "weak_type", False))


def outgoing(leaf: Any, name: str) -> Any:
    """What is saved for a leaf: it itself; for random keys, their bits.

    Raises:
        UnsupportedError: it has no values, or may change while it is saved.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise UnsupportedError(name, "it is a shape without values; save the array it stands for")
    if isinstance(leaf, getattr(jax, "Ref", ())):
        raise UnsupportedError(name, "a Ref may change while it is saved; save ref[...]")
    if not is_key(leaf):
        return leaf
    if leaf.is_deleted():
        raise UnsupportedError(name, "its memory was donated to a function, or deleted")
    return jax.random.key_data(leaf)


def weakened(array: Any) -> Any:
    """The same array with a type that gives way."""
    from jax.extend.core.primitives import convert_element_type_p

    return convert_element_type_p.bind(array, new_dtype=array.dtype, weak_type=True, sharding=None)
