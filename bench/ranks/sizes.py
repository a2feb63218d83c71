"""How many ranks, of how many tensors: all, or next to nothing for a test."""

from __future__ import annotations

from dataclasses import dataclass

# Layers of 9 tensors and 3 more: 291 and 12 of them.
LAYERS, ONE = 32, 1
MOST = 16384


@dataclass(frozen=True, slots=True)
class Scale:
    """Ranks and layers of each case.  More rows than some hundred thousand don't fit here."""

    shared: tuple[tuple[int, int], ...]
    directories: tuple[int, ...]
    meetings: tuple[int, ...]

    def up_to(self, most: int) -> Scale:
        """The same with so many ranks at most."""
        return Scale(
            tuple(pair for pair in self.shared if pair[0] <= most),
            tuple(ranks for ranks in self.directories if ranks <= most),
            tuple(ranks for ranks in self.meetings if ranks <= most),
        )


FULL = Scale(
    shared=(
        *((ranks, LAYERS) for ranks in (1, 16, 64, 256, 1024)),
        *((ranks, ONE) for ranks in (1024, 4096, 16384)),
    ),
    directories=(1, 16, 256, 1024, 4096, 16384),
    meetings=(4, 16, 64, 256, 1024),
)
QUICK = Scale(shared=((2, ONE), (16, ONE)), directories=(2, 16), meetings=(2, 4))
