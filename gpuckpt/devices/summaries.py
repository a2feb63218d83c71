"""What kernels said of chunks, put together from what they said of their leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.devices import Bytes, kernels
from gpuckpt.fingerprint import root
from gpuckpt.statistics import Statistics

Summaries = npt.NDArray[Any]  # of kernels.SUMMARY


def fingerprints(digests: bytes, firsts: Sequence[int], nbytes: Sequence[int]) -> list[str]:
    """Of chunks, from the digests of all their leaves, the first of each at `firsts`."""
    ends = [*firsts, len(digests) // kernels.DIGEST_NBYTES][1:]
    return [
        root(digests[first * kernels.DIGEST_NBYTES : end * kernels.DIGEST_NBYTES], length)
        for first, end, length in zip(firsts, ends, nbytes, strict=True)
    ]


def statistics(
    summaries: Summaries, firsts: npt.NDArray[np.intp], floats: Sequence[bool]
) -> list[Statistics | None]:
    """Of chunks, from the summaries of all their leaves."""
    if not len(firsts):
        return []
    sums = (
        np.add.reduceat(summaries[name].astype(kind), firsts).tolist()
        for name, kind in (("nans", np.int64), ("infs", np.int64), ("squares", np.float64))
    )
    every = zip(floats, *sums, strict=True)
    return [Statistics(*counts) if is_float else None for is_float, *counts in every]


def planes_of(data: Bytes, start: int, stride: int, width: int, nbytes: int) -> tuple[Bytes, ...]:
    """A chunk's planes, which begin at `start` of `data`."""
    count = nbytes // width
    return tuple(data[start + k * stride :][:count] for k in range(width))
