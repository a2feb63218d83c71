"""As much of `orbax.checkpoint.utils` as loops use."""

from __future__ import annotations

from typing import Any

import jax

from gpuckpt.adapters.jax.leaves import is_array


def to_shape_dtype_struct(leaf: Any) -> Any:
    """What stands for an array, with its sharding; anything else as it is."""
    if not is_array(leaf):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
