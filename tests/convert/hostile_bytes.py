"""Damaged and lying files: each is read, or refused by an error of gpuckpt's, in little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gpuckpt.conversion import formats
from gpuckpt.conversion.port import Options, read_whole
from gpuckpt.errors import CheckpointError

# Far more than small files need, and far less than a number in one of them can say.
_PEAK_NBYTES = 24 << 20


def read_all(at: Path) -> dict[str, np.ndarray]:
    """Every tensor of a source of any format, by name."""
    found = formats.source_format(str(at))
    assert found.open is not None
    with found.open(str(at), Options()) as source:
        names = source.outline.tensors
        return {name: read_whole(source, position) for name, position in names.items()}


def read_or_refuse(read: Callable[[], object]) -> bool:
    """Whether it was read; an error that isn't gpuckpt's, or much memory, fails the test."""
    tracemalloc.start()
    try:
        read()
    except CheckpointError:
        return False
    else:
        return True
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < _PEAK_NBYTES, peak


def damaged(data: bytes, kind: int, at: float, value: int) -> bytes:
    """Cut short (0), with another byte (1), with bytes inserted (2) or repeated (3)."""
    place = int(at * len(data))
    if kind == 0:
        return data[:place]
    if kind == 1 and data:
        place = min(place, len(data) - 1)
        return data[:place] + bytes([value]) + data[place + 1 :]
    if kind == 2:
        return data[:place] + bytes([value]) * 9 + data[place:]
    return data + data[place:]
