"""What the tests of frameworks share: a small thing to learn, and digests."""

from __future__ import annotations

import hashlib
from typing import Any


def digest(state: Any) -> str:
    """Of a state_dict's names and bytes."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        hashed.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()


class StopError(Exception):
    """Ends a run in the middle."""
