"""The generators that a training run draws from, as one stateful leaf."""

from __future__ import annotations

import random
import sys
from typing import Any, ClassVar

import numpy as np
import xxhash


class RNG:
    """Python's, numpy's, cupy's and torch's global generators; the last two if they were imported.

    Put one into the state; it carries the generators' states into each
    checkpoint and back.  cupy's generator can't tell its state, so that, if it
    has been drawn from, each save gives it a new seed, which follows from
    Python's and numpy's states; a restore gives it the same seed, and a resumed
    run draws what the uninterrupted one drew.  Each rank of a group has its own.
    """

    per_rank: ClassVar[bool] = True

    def state_dict(self) -> dict[str, Any]:
        """The generators' states, as plain values and arrays."""
        version, internal, gauss = random.getstate()
        words = np.array(internal, np.uint64)
        numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
        state: dict[str, Any] = {
            "python": {"version": version, "internal": words, "gauss": gauss},
            "numpy": numpy_state,
        }
        cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
        if cupy is not None and _drawn_from(cupy):
            seed = xxhash.xxh3_64_intdigest(words.tobytes() + repr(numpy_state).encode())
            state["cupy"] = {"seed": seed % 2**32, "devices": _drawn_from(cupy)}
            _seed_cupy(cupy, state["cupy"])
        if torch is not None:
            state["torch"] = {"cpu": torch.get_rng_state().numpy().copy()}
            if torch.cuda.is_initialized():
                every = torch.cuda.get_rng_state_all()
                state["torch"]["cuda"] = [one.numpy().copy() for one in every]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the generators to the states that were saved."""
        python = state["python"]
        internal = tuple(int(word) for word in python["internal"])
        random.setstate((python["version"], internal, python["gauss"]))
        np.random.set_state(state["numpy"])  # noqa: NPY002
        if "cupy" in state:
            import cupy

            _seed_cupy(cupy, state["cupy"])
        if "torch" in state:
            import torch

            torch.set_rng_state(torch.from_numpy(state["torch"]["cpu"].copy()))
            for device, one in enumerate(state["torch"].get("cuda", ())):
                torch.cuda.set_rng_state(torch.from_numpy(one.copy()), device)


def _drawn_from(cupy: Any) -> list[int]:
    """The devices whose generator has been drawn from or seeded."""
    return sorted(getattr(cupy.random._generator, "_random_states", {}))  # noqa: SLF001


def _seed_cupy(cupy: Any, state: dict[str, Any]) -> None:
    for device in state["devices"]:
        with cupy.cuda.Device(device):
            cupy.random.seed((state["seed"] + device) % 2**32)
