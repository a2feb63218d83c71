"""Forms of what only torch has, for the adapters of frameworks above it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from gpuckpt.adapters.plain import Form


def _plain_dict(thing: OrderedDict[str, Any]) -> tuple[Any, Any]:
    """A module's state_dict has the versions of its parts as an attribute."""
    versions = dict(getattr(thing, "_metadata", {}))
    if set(vars(thing)) - {"_metadata"}:
        raise ValueError(f"an OrderedDict with attributes ({', '.join(vars(thing))})")
    for name, facts in versions.items():
        if type(facts) is not dict or set(facts) - {"version", "assign_to_params_buffers"}:
            raise ValueError(f"a state_dict whose metadata of {name!r} is {facts!r}")
    known = tuple((name, facts.get("version")) for name, facts in versions.items())
    return dict(thing), known if hasattr(thing, "_metadata") else None


def _state_dict(tree: dict[str, Any], versions: Any) -> OrderedDict[str, Any]:
    made = OrderedDict(tree)
    if versions is not None:
        facts = {name: {} if one is None else {"version": one} for name, one in versions}
        made._metadata = OrderedDict(facts)  # type: ignore[attr-defined]  # noqa: SLF001
    return made


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"torch.{name} is no dtype")
    return found


TORCH_FORMS = (
    Form("torch.Size", torch.Size, lambda s: (tuple(s), None), lambda tree, _: torch.Size(tree)),
    Form(
        *("torch.dtype", torch.dtype),
        *(lambda dtype: (str(dtype).removeprefix("torch."), None), lambda tree, _: _dtype(tree)),
    ),
    Form(
        "torch.device", torch.device, lambda d: (str(d), None), lambda tree, _: torch.device(tree)
    ),
    Form("ordered", OrderedDict, _plain_dict, _state_dict),
)
