"""PerRank: what each rank has of its own under one name, as a leaf of the state."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar

from gpuckpt.tree import is_object


class PerRank:
    """A part of the state that each rank has of its own: where it is in its data, its caches.

    All else in a state is the ranks' together: plain values have to be the
    same, and arrays of one name and shape are taken for copies of each other.
    `value` may be whatever may be in a state: a plain value, an array,
    containers, an object with `state_dict` and `load_state_dict`.  A restore
    fills arrays, mappings and lists of `value` in place, and replaces other
    values.  With one process, it is saved as `value` alone would be saved.

    Any class of objects with `state_dict` may say `per_rank = True` itself, as
    `RNG` does.

    ```python
    state["position"] = gpuckpt.PerRank({"epoch": 3, "sample": 17})
    ```
    """

    per_rank: ClassVar[bool] = True

    def __init__(self, value: Any) -> None:
        """`value` stays the caller's; it isn't copied."""
        self.value = value

    def state_dict(self) -> Any:
        """The value, or its own `state_dict`, if it has one."""
        return self.value.state_dict() if is_object(self.value) else self.value

    def load_state_dict(self, state: Any) -> None:
        """Take a value that was saved, in place as far as that can be."""
        if is_object(self.value):
            self.value.load_state_dict(state)
        else:
            self.value = _put(self.value, state)

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


def _put(here: Any, saved: Any) -> Any:
    """`saved`, in the containers that are `here`, where they are of its kind."""
    if here is saved:
        return saved
    if isinstance(here, MutableMapping) and isinstance(saved, Mapping):
        new = {key: _put(here.get(key), value) for key, value in saved.items()}
        here.clear()
        here.update(new)
        return here
    if isinstance(here, list) and isinstance(saved, list):
        rest = [None] * max(len(saved) - len(here), 0)
        here[:] = [_put(old, value) for old, value in zip([*here, *rest], saved, strict=False)]
        return here
    return saved
