"""The nouns: what a tensor is, what a chunk is, and where its bytes lie."""

from __future__ import annotations

import math
from dataclasses import field
from typing import TYPE_CHECKING, Any

from gpuckpt.boxes import Box, Shape, whole_box
from gpuckpt.dtypes import is_turned, to_numpy, width_of
from gpuckpt.record import record

if TYPE_CHECKING:
    from functools import cached_property
else:

    class cached_property:  # noqa: N801 - takes its place
        """As `functools` has it from Python 3.12 on: without a lock, which would take longest."""

        def __init__(self, make: Any) -> None:
            self._make = make
            self.__doc__ = make.__doc__

        def __get__(self, one: Any, _kind: type | None = None) -> Any:
            if one is None:
                return self
            found = one.__dict__[self._make.__name__] = self._make(one)
            return found


# Along each axis of a chunk that is a box, where its tiles end, counted from its first element.
Ends = tuple[tuple[int, ...], ...]


@record(frozen=True)
class Spec:
    """A tensor without its data.

    `name` is its full path in the state, `dtype` a name of `dtypes`, and
    `axes` how it lay in memory: its axes from the slowest to the fastest.
    Bytes in a checkpoint are always in C order; `axes` lets `load` give
    Fortran-ordered and channels-last arrays back as they were.  Of a shard,
    `shape` is its own, `whole` the tensor's, and `offset` where it begins in
    it.  `rank` is whose it is, if each rank has one of its own under this name.
    `tiled` says whether its chunks are to be saved in tiles; of what is read,
    each chunk says that itself.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None
    kind: str = "numpy"
    device: str = "cpu"
    offset: Shape | None = None
    whole: Shape | None = None
    rank: int | None = None
    tiled: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.shape and min(self.shape) < 0:
            raise ValueError(f"{self.name}: a shape can't be negative, got {self.shape}")
        if self.axes is not None and sorted(self.axes) != list(range(len(self.shape))):
            raise ValueError(f"{self.name}: {self.axes} isn't an order of {len(self.shape)} axes")
        if (self.offset is None) != (self.whole is None):
            raise ValueError(f"{self.name}: a shard has an offset, and the whole tensor's shape")
        if self.whole is not None and not self.box.fits(self.whole):
            raise ValueError(f"{self.name}: {self.box} isn't in a tensor of {self.whole}")
        if self.offset is None and self.rank is None:  # mostly: a cached property takes a lock
            self.__dict__["label"] = self.name

    @property
    def box(self) -> Box:
        """What it has of the whole tensor."""
        return whole_box(self.shape) if self.offset is None else Box(self.offset, self.shape)

    @property
    def full_shape(self) -> Shape:
        """The shape of the whole tensor."""
        return self.shape if self.whole is None else self.whole

    @property
    def tensor(self) -> tuple[str, int | None]:
        """The same for two rows exactly if they are shards of one tensor."""
        return self.name, self.rank

    @cached_property
    def label(self) -> str:
        """What tells it from all others of a checkpoint: `w`, `w[0:4, 8:16]`, `w of rank 3`."""
        where = "" if self.offset is None else str(self.box)
        return f"{self.name}{where}" + ("" if self.rank is None else f" of rank {self.rank}")

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * to_numpy(self.dtype).itemsize

    @cached_property
    def width(self) -> int:
        """Planes that a chunk of it splits into."""
        return width_of(self.dtype)

    @cached_property
    def turned(self) -> bool:
        """Whether these planes are of elements that are turned."""
        return is_turned(self.dtype)


@record(frozen=True, slots=True)
class Extent:
    """Where bytes lie: `length` bytes at `offset` of the file `segment`."""

    segment: str
    offset: int
    length: int

    def __post_init__(self) -> None:
        if self.offset < 0 or self.length < 0:
            raise ValueError(f"an extent can't be negative, got {self.offset}+{self.length}")

    def __str__(self) -> str:
        return f"{self.segment} at offset {self.offset}"


@record(frozen=True, slots=True)
class Chunk:
    """A run of one tensor's bytes: the unit of coding and checking.

    `tensor` is the tensor's position in its plan, `start` the run's first
    byte within the tensor (in C order), `nbytes` its length.
    """

    tensor: int
    start: int
    nbytes: int


@record(frozen=True, slots=True)
class Plane:
    """One plane of an encoded chunk: how it is coded, and its bytes on disk.

    A `sparse` plane has two `parts`: a bitmap of its bytes that aren't zero,
    and these bytes.
    """

    codec: str
    length: int
    parts: tuple[Plane, ...] = ()


@record(frozen=True, slots=True)
class ChunkEntry:
    """An encoded chunk as a manifest lists it.

    `fingerprint` (128 bits, hex) is of the raw bytes, `checksum` (64 bits,
    hex) of the encoded ones.  One plane holds the bytes as they are; as many
    planes as the dtype's width hold byte k of every element each, which may
    be `turned` (see `planes`).  With a `base`, an earlier chunk of as many
    bytes, they hold what `deltas.delta` gives for the raw bytes and the base's.
    With `sources`, chunks of float32 one after the other, its bytes are these
    rounded to its own type, and it has no planes: its extent is empty, where
    the first of them begins.  `digest` (SHA-256, hex) is of the encoded bytes, as
    a seal vouches for it; empty where no key was given, or there are no bytes.
    With `tiles`, planes are of its elements tile by tile (`tiling`), and an
    index of the tiles follows them (`tilecoding`).
    """

    start: int
    nbytes: int
    extent: Extent
    fingerprint: str
    checksum: str
    planes: tuple[Plane, ...]
    base: ChunkEntry | None = None
    turned: bool = False
    sources: tuple[ChunkEntry, ...] = ()
    digest: str = ""
    tiles: Ends = ()

    @property
    def chain(self) -> tuple[ChunkEntry, ...]:
        """The chunk, its base, the base's base, …: all that must be read for it."""
        return (self,) if self.base is None else (self, *self.base.chain)

    @property
    def links(self) -> tuple[ChunkEntry, ...]:
        """Its chain, and those of its sources: whatever names a part of a file for it."""
        if not self.sources:
            return (self,) if self.base is None else self.chain
        return (self, *(link for source in self.sources for link in source.chain))

    @property
    def is_plain(self) -> bool:
        """Whether its planes are decoded one by one, with nothing else at hand."""
        if self.base is not None or self.sources:
            return False
        return not any(plane.parts for plane in self.planes)
