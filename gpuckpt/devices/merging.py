"""Runs of bytes that are copied together: pure arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

# A gap that takes no longer to copy than another copy takes to begin: some 10 us on a bus of
# 6 to 60 GB/s.
_GAP_NBYTES = 64 << 10
# Copies of one slot.  tests/cuda/test_launches.py bounds all that a slot costs.
_MOST = 4


@dataclass(frozen=True, slots=True)
class Span:
    """Where bytes lie among others: some from `start` on."""

    start: int
    nbytes: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.nbytes

    def after(self, nbytes: int) -> Span:
        """The same bytes, with so many before all of them."""
        return Span(self.start + nbytes, self.nbytes)


def moved(start: int, parts: Iterable[Span]) -> int:
    """Where a byte of one of these spans lies once they follow each other.

    Raises:
        ValueError: it is in none of them.
    """
    before = 0
    for part in parts:
        if part.start <= start < part.end:
            return before + start - part.start
        before += part.nbytes
    raise ValueError(f"byte {start} isn't among those that were copied")


def merged(spans: Iterable[Span]) -> list[Span]:
    """A few spans, in order, that have all bytes of these, which ascend.

    At most four.  Bytes between two that lie near each other come along; of
    farther ones those that lie nearest, until there are no more than that.
    """
    found = [span for span in spans if span.nbytes]
    gaps = sorted(b.start - a.end for a, b in itertools.pairwise(found))
    near = max(_GAP_NBYTES, gaps[-_MOST] if len(gaps) >= _MOST else 0)
    together: list[Span] = []
    for span in found:
        if together and span.start - together[-1].end <= near:
            together[-1] = Span(together[-1].start, span.end - together[-1].start)
        else:
            together.append(span)
    return together
