"""What an array's bytes don't tell of it: beside a tree, in the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from gpuckpt.errors import FormatError

# The key beside a tree's own.
NOTES = "__jax__"


class Notes:
    """Which arrays are weakly typed, and of what kind random keys are, by names.

    In a state it is an object, so that a checkpoint that has none fits as well.
    """

    def __init__(self, weak: Iterable[str] = (), keys: Mapping[str, str] | None = None) -> None:
        """Those of a tree that is saved; for one that is restored, none."""
        self.weak = frozenset(weak)
        self.keys = dict(keys or {})
        self.known = bool(self.weak or self.keys)

    def state_dict(self) -> dict[str, Any]:
        """What there is to save, as JSON: one value each, however many names there are."""
        found: dict[str, Any] = {"weak": sorted(self.weak), "keys": self.keys}
        return {key: json.dumps(value) for key, value in found.items() if value}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take what was saved."""
        try:
            weak, keys = (json.loads(saved.get(one, "null")) for one in ("weak", "keys"))
            self.weak, self.keys, self.known = frozenset(weak or ()), dict(keys or {}), True
        except (AttributeError, TypeError, ValueError) as error:
            raise FormatError(f"{NOTES} isn't what gpuckpt.jax writes ({error})") from error
