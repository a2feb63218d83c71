"""A Keras model's variables by name, and how they are given other values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpuckpt.errors import MismatchError
from gpuckpt.names import names_of

KINDS = ("model", "optimizer", "metrics")


def groups_of(model: Any) -> dict[str, Sequence[Any]]:
    """A model's own variables (seeds included), its optimizer's, and those of its metrics."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)
    optimized = [] if optimizer is None else optimizer.variables
    return {"model": model.variables, "optimizer": optimized, "metrics": model.metrics_variables}


def values_of(model: Any) -> dict[str, dict[str, Any]]:
    """The values of all variables, which are the live ones, by their paths."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()  # else a fit has them elsewhere
    return {
        kind: dict(zip(_names(found), (one.value for one in found), strict=True))
        for kind, found in groups_of(model).items()
    }


def assign(model: Any, saved: Mapping[str, Mapping[str, Any]], kinds: Sequence[str]) -> None:
    """Give variables the values that were saved, in their order.

    Not by their paths: Keras numbers layers on for as long as a process lives,
    and one that makes a model a second time has other paths for it.

    Raises:
        MismatchError: the model is another; it names the first that differs.
    """
    groups = groups_of(model)
    for kind in kinds:
        here, there = groups[kind], saved[kind]
        unlike = [
            f"{name}: {list(one.shape)} here, {list(value.shape)} in the checkpoint"
            for (name, value), one in zip(there.items(), here, strict=False)
            if tuple(one.shape) != tuple(value.shape)
        ]
        if unlike or len(here) != len(there):
            raise MismatchError(
                f"the {kind} has {len(here)} variables, and the checkpoint {len(there)} of it",
                mismatched=unlike,
                hint="build and compile the model that was saved",
            )
        for one, value in zip(here, there.values(), strict=True):
            if one.value is not value:
                one.assign(value)


def _names(variables: Sequence[Any]) -> list[str]:
    """Paths, with a number where one is there again."""
    paths = [one.path for one in variables]
    return names_of([(path,) for path in paths])
