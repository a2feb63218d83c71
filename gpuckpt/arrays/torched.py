"""Which torch tensors have no bytes of their own to be saved, and what to save in their place."""

from __future__ import annotations

from typing import Any

from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import FormatError, UnsupportedError


def is_torch(leaf: object) -> bool:
    """Whether it is a tensor; its subclasses live in modules of any name."""
    return any(
        base.__module__ == "torch" and base.__name__ == "Tensor" for base in type(leaf).__mro__
    )


def detached(leaf: Any, name: str) -> Any:
    """A tensor without its history.

    Raises:
        UnsupportedError: its elements don't lie in memory as they are.
    """
    if (reason := _reason(leaf)) is not None:
        raise UnsupportedError(name, reason)
    return leaf.detach()


def _reason(leaf: Any) -> str | None:
    kinds = {base.__name__ for base in type(leaf).__mro__}
    if "UninitializedTensorMixin" in kinds:
        return "a lazy module's, without a shape yet; run the module once before"
    if "FakeTensor" in kinds:
        return "a fake tensor, which has no data"
    if leaf.is_nested:
        return "a nested tensor; save its .values() and .offsets(), or its .unbind()"
    if leaf.is_quantized:
        return "a quantized tensor; save its .int_repr(), and scale and zero point beside it"
    if str(leaf.layout) != "torch.strided":
        parts = ", or its indices and values" if "sparse" in str(leaf.layout) else ""
        return f"of layout {leaf.layout}; save its .to_dense(){parts}"
    if leaf.is_meta:
        return "on the meta device, without data; give it some by .to_empty(device=…)"
    if leaf.is_conj():
        return "its elements are yet to be conjugated; save .resolve_conj()"
    if leaf.is_neg():  # torch would hand it out as it lies
        return "its elements are yet to be negated; save .resolve_neg()"
    return _of_dtype(str(leaf.dtype))


def _of_dtype(dtype: str) -> str | None:
    """Several of torch's are handed out as if they were others."""
    if dtype == "torch.complex32":
        return "complex32 isn't known outside of torch; save torch.view_as_real(…)"
    try:
        to_numpy(dtype.removeprefix("torch."))
    except FormatError:
        return f"{dtype} isn't known outside of torch; save .view(torch.uint8)"
    packed = dtype.removeprefix("torch.").removeprefix("u").startswith(("int2", "int4"))
    return f"{dtype} is handed out as another type; save .view(torch.uint8)" if packed else None
