"""A module's state under the names that it has without compiling and wrapping."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from gpuckpt.errors import InvalidError

# What torch.compile, DistributedDataParallel and DataParallel put between a module and its own.
_INSIDE = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}


class Model:
    """A module as a leaf of the state: compiled, wrapped or neither, its names are the same.

    So a run may save a compiled model and resume it uncompiled, or the other
    way round, and with or without DistributedDataParallel.  A restore fills
    parameters and buffers in place; CUDA graphs and optimizers that refer to
    them go on with them.
    """

    def __init__(self, module: nn.Module) -> None:
        """`module` stays the caller's; nothing of it is changed or copied.

        Raises:
            InvalidError: it isn't a module.
        """
        if not isinstance(module, nn.Module):
            raise InvalidError(f"a Model is made of a torch.nn.Module; got a {_kind(module)}")
        self.module = module

    def state_dict(self) -> dict[str, Any]:
        """The module's own, which shares its memory, under plain names."""
        state, added = self.module.state_dict(), added_names(self.module)
        if not added:
            return dict(state)
        return {plain_name(name, added): value for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the module what was saved; names that it lacks it refuses itself."""
        own, added = self.module.state_dict(), added_names(self.module)
        names = {plain_name(name, added): name for name in own}
        given = OrderedDict((names.get(name, name), value) for name, value in state.items())
        # Versions of modules, without which some take what they saved themselves for very old.
        given._metadata = getattr(own, "_metadata", {})  # type: ignore[attr-defined] # noqa: SLF001
        self.module.load_state_dict(given)


def added_names(module: nn.Module) -> frozenset[str]:
    """Full names of children that are there only since a module was compiled or wrapped."""
    found = set()
    for name, child in module.named_modules(remove_duplicate=False):
        for kind in type(child).__mro__:
            inside = _INSIDE.get(kind.__name__)
            if inside is not None and kind.__module__.startswith("torch."):
                found.add(f"{name}.{inside}" if name else inside)
    return frozenset(found)


def plain_name(name: str, added: frozenset[str]) -> str:
    """`name` without the parts that are `added`."""
    if not added:
        return name
    parts = name.split(".")
    return ".".join(part for at, part in enumerate(parts) if ".".join(parts[: at + 1]) not in added)


def has_buffers(module: nn.Module) -> bool:
    """Whether a forward may change something of what is saved: buffers, as batch norms have."""
    return any(
        buffers.keys() - child._non_persistent_buffers_set  # noqa: SLF001 - no other way to know
        for child in module.modules()
        if (buffers := child._buffers)  # noqa: SLF001
    )


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
