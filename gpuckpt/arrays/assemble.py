"""Make a leaf anew out of tensors that have been filled: the other way of `look_all`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpuckpt.arrays.hollow import Filled
from gpuckpt.arrays.make import finish
from gpuckpt.arrays.sharding import form_of, parts
from gpuckpt.arrays.view import Tensor
from gpuckpt.errors import UnsupportedError
from gpuckpt.sharded import Sharded


def assembled(leaf: Any, tensors: Sequence[Tensor], kind: str) -> Any:
    """A leaf like this one, of `tensors`: new ones, filled, one for each of `look_all(leaf)`.

    For leaves that can't be filled where they are, as jax's.  A sharded
    `jax.Array` gets the same sharding, each of its devices what it had there.
    `kind` is the library of an array that isn't sharded, or is in a `Sharded`.

    Raises:
        UnsupportedError: a tensor of torch's that is in several places of itself.
    """
    form = form_of(leaf)
    if form is None:
        return finish(tensors[0], kind)
    if form == "Hollow":
        return Filled({tensor.spec.box: tensor for tensor in tensors})
    if form == "Sharded":
        return Sharded(finish(tensors[0], kind), leaf.shape, leaf.offset)
    if form == "jax":
        return _sharded_jax(leaf, tensors)
    raise UnsupportedError(
        tensors[0].spec.name, f"a {form} with one element in several places; save a .clone() of it"
    )


def _sharded_jax(leaf: Any, tensors: Sequence[Tensor]) -> Any:
    """Each device gets a copy of its own; what nobody filled has no elements."""
    import jax

    filled = {tensor.spec.box: tensor for tensor in tensors}
    arrays = []
    for part in parts(leaf, "jax", tensors[0].spec.name):
        (device,) = part.array.devices()
        with jax.default_device(device):  # else all would go through the first one's memory
            new = finish(filled[part.box], "jax") if part.box in filled else part.array
        arrays.append(jax.device_put(new, device))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)
