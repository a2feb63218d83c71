"""A small state in versions, each of which is known from its number alone.

It has what a save treats in ways of its own: what changes a little, in a few
places, wholly or not at all, and a copy that is rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np

CHUNK = 64 << 10  # as small as differences are taken of
_RNG = np.random.default_rng(1)
_DENSE = _RNG.standard_normal(CHUNK // 4, np.float32)
_SPARSE = _RNG.integers(0, 1 << 20, CHUNK // 4, np.int32)
FROZEN = _RNG.standard_normal(500)

State = dict[str, Any]


def state_at(version: int) -> State:
    """A tensor that changes a little, one in a few places, one not at all, one wholly, and a copy.

    The first and the second have chunks of which differences are taken.
    """
    dense, sparse = _DENSE * np.float32(1 + version / 1024), _SPARSE.copy()
    sparse[version * 77 % 16_000 :][:5] = version
    return {
        "dense": dense,
        "sparse": sparse,
        "frozen": FROZEN.copy(),
        "w": np.random.default_rng(version).standard_normal(300),
        "half": dense.astype(np.float16),
        "version": version,
    }


def set_to(state: State, version: int) -> None:
    """Make the state another version, in place."""
    for name, value in state_at(version).items():
        if name == "version":
            state[name] = value
        else:
            state[name][...] = value


def version_of(state: State) -> int:
    """Its version, if it is that one in every bit."""
    version = state["version"]
    assert isinstance(version, int)
    for name, value in state_at(version).items():
        assert name == "version" or value.tobytes() == state[name].tobytes(), (name, version)
    return version
