"""States for conversions, and sources and targets made of them without a checkpoint between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gpuckpt.conversion.port import Format, Options, Source, read_whole
from gpuckpt.conversion.states import StateSource, filled
from gpuckpt.structure import from_json


def training_state() -> dict[str, Any]:
    """Nested, with tied weights, arrays of small floats, empty ones, one of no axes, and values."""
    random = np.random.default_rng(7)
    w = random.standard_normal((300, 70)).astype(np.float32)
    return {
        "model": {
            "w": w,
            "tied": w,
            "half": w.astype(ml_dtypes.bfloat16),
            "small": w[:9].astype(ml_dtypes.float8_e4m3fn),
            "none": np.empty((0, 3), np.float16),
            "mask": np.array([True, False, True]),
        },
        "optimizer": {"step": np.array(12), 3: [w[:5].astype(np.float64), ("a", None, 0.1, 7)]},
        "fortran": np.asfortranarray(random.integers(0, 99, (4, 5, 6))),
    }


def state_of(source: Source) -> Any:
    """What a source holds, as a state of numpy's arrays."""
    arrays = [read_whole(source, at) for at in range(len(source.outline.specs))]
    return filled(from_json(source.outline.structure), arrays)


def written(state: Any, to: Format, path: Path, **options: Any) -> Path:
    """A file or directory of a format, made of a state."""
    source = StateSource(state)
    to.lost(source.outline)
    assert to.write is not None
    to.write(str(path), source, Options(**options))
    return path


def read(path: Path, of: Format) -> Any:
    """The state that is in a file or directory of a format."""
    assert of.open is not None
    with of.open(str(path), Options()) as source:
        return state_of(source)
