"""Dataclasses of which a state of many tensors has very many."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

__all__ = ["record"]

if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:

    def record(*, frozen: bool, **options: Any) -> Any:
        """A dataclass that the type checker alone keeps from being changed.

        Python, to refuse that, would set each field of a new one by a call, which takes
        five times as long as to make it (docs/adr/0058).
        """
        assert frozen, "else it is a dataclass"
        return dataclasses.dataclass(unsafe_hash=True, **options)
