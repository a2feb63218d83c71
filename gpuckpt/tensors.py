"""A checkpoint's tensors, and their rows in manifests and indices; nothing in them is trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any

from gpuckpt import layout
from gpuckpt.dtypes import to_numpy
from gpuckpt.entries import (
    COUNT_MAX,
    RANKS_FEATURE,
    SHARDS_FEATURE,
    Digests,
    as_count,
    as_counts,
    as_texts,
    check_chunks,
    features_of,
    pack_chunk,
    unpack_chunk,
)
from gpuckpt.record import record
from gpuckpt.spec import ChunkEntry, Spec
from gpuckpt.statistics import Statistics
from gpuckpt.values import Json

# What numpy can hold.
AXES_MAX = 64
_TEXTS = itemgetter("name", "dtype", "kind", "device")
_OF_SHARDS = frozenset(("offset", "whole", "rank"))


@record(frozen=True, slots=True)
class TensorEntry:
    """A tensor of a checkpoint: its spec, its chunks in order, and its version.

    The version is the step at which its bytes last changed.  Statistics are
    those of all its elements, None of other types than floats and where
    nobody counted.
    """

    spec: Spec
    chunks: tuple[ChunkEntry, ...]
    version: int
    statistics: Statistics | None = None


def pack_tensors(tensors: Sequence[TensorEntry], segments: Sequence[str]) -> list[dict[str, Json]]:
    """The rows of `tensors`, their chunks' segments as positions in `segments`."""
    positions = {name: position for position, name in enumerate(segments)}
    return [
        {
            "name": entry.spec.name,
            "dtype": entry.spec.dtype,
            "shape": list(entry.spec.shape),
            "axes": None if entry.spec.axes is None else list(entry.spec.axes),
            "kind": entry.spec.kind,
            "device": entry.spec.device,
            **_pack_shard(entry.spec),
            "version": entry.version,
            "chunks": [pack_chunk(chunk, positions) for chunk in entry.chunks],
            **_pack_statistics(entry.statistics),
        }
        for entry in tensors
    ]


def unpack_tensors(
    rows: list[Json],
    segments: Sequence[str],
    digests: Digests | None = None,
    *,
    whole: bool = True,
) -> tuple[TensorEntry, ...]:
    """Read tensors' rows, and take them out of `rows`: the inverse of `pack_tensors`.

    `whole` asks for every byte of each tensor to be there, once.
    """
    rows.reverse()
    tensors = []
    while rows:  # each goes at once: of what stays, Python's collector looks at all again and again
        tensors.append(_unpack_tensor(rows.pop(), segments, digests, whole=whole))
    check_names([entry.spec for entry in tensors])
    return tuple(tensors)


def segments_of(tensors: Iterable[TensorEntry]) -> list[str]:
    """The data files that tensors' chunks and their bases lie in, each once, in order of use."""
    links = [link for entry in tensors for chunk in entry.chunks for link in chunk.links]
    return list(dict.fromkeys([link.extent.segment for link in links]))


def by_tensor(tensors: Iterable[TensorEntry]) -> dict[tuple[str, int | None], list[TensorEntry]]:
    """The rows of each tensor: its shards, or itself."""
    found: dict[tuple[str, int | None], list[TensorEntry]] = {}
    for entry in tensors:
        found.setdefault(entry.spec.tensor, []).append(entry)
    return found


def features_in(tensors: Iterable[TensorEntry]) -> list[Json]:
    """What a reader of these rows must know."""
    tensors = tuple(tensors)
    shards = any(entry.spec.offset is not None for entry in tensors)
    ranks = any(entry.spec.rank is not None for entry in tensors)
    found = [SHARDS_FEATURE] * shards + [RANKS_FEATURE] * ranks
    return [*sorted([*features_of(chunks_of(tensors)), *found])]


def chunks_of(tensors: Iterable[TensorEntry]) -> Iterator[ChunkEntry]:
    """The chunks of all tensors, in order."""
    return (chunk for entry in tensors for chunk in entry.chunks)


def check_segment(name: Json) -> str:
    """A segment's name, which holds no path.

    Raises:
        ValueError: it isn't one.
    """
    if not isinstance(name, str) or layout.segment_step(name) is None:
        raise ValueError(f"{name!r} isn't a segment's name")
    return name


def as_number(value: float) -> Json:
    """A number; NaN and infinities, which JSON lacks, as the words that `float` reads."""
    value = float(value)
    return value if value - value == 0 else repr(value)


def _pack_statistics(statistics: Statistics | None) -> dict[str, Json]:
    if statistics is None:
        return {}
    counts = int(statistics.nans), int(statistics.infs)
    return {"statistics": [*counts, as_number(statistics.squares)]}


def _unpack_statistics(row: Json, spec: Spec) -> Statistics | None:
    if "statistics" not in row:
        return None
    nans, infs, squares = row["statistics"]
    bad = as_count(nans) + as_count(infs)
    if bad and bad > numbers_of(spec):
        raise ValueError(f"{spec.name}: {nans} NaNs and {infs} infinities of {numbers_of(spec)}")
    if squares == "inf":
        return Statistics(nans, infs, math.inf)
    if type(squares) not in (int, float) or not 0 <= squares < math.inf:
        raise ValueError(f"{spec.name}: {squares!r} isn't a sum of squares")
    return Statistics(nans, infs, float(squares))


def numbers_of(spec: Spec) -> int:
    """How many numbers a tensor's elements are: two each, if they are complex."""
    return math.prod(spec.shape) * (2 if to_numpy(spec.dtype).kind == "c" else 1)


def _pack_shard(spec: Spec) -> dict[str, Json]:
    """The fields that only shards and tensors of one rank have."""
    found: dict[str, Json] = {}
    if spec.offset is None and spec.rank is None:  # mostly
        return found
    if spec.offset is not None and spec.whole is not None:
        found = {"offset": list(spec.offset), "whole": list(spec.whole)}
    return found if spec.rank is None else found | {"rank": spec.rank}


def _unpack_shard(row: Json) -> dict[str, Any]:
    if _OF_SHARDS.isdisjoint(row):  # mostly
        return {}
    found: dict[str, Any] = {
        field: as_counts(row[field]) for field in ("offset", "whole") if field in row
    }
    return found | {"rank": as_count(row["rank"])} if "rank" in row else found


def check_names(specs: Sequence[Spec]) -> None:
    """Of tensors of one name all are shards, no two the same, of one type and shape."""
    if len({spec.label for spec in specs}) < len(specs):
        raise ValueError("two tensors have one name")
    if len({spec.name for spec in specs}) == len(specs):  # mostly
        return
    first: dict[tuple[str, int | None], Spec] = {}
    for spec in specs:
        one = first.setdefault(spec.tensor, spec)
        if (one.dtype, one.full_shape) != (spec.dtype, spec.full_shape):
            raise ValueError(f"{spec.label} and {one.label} are no shards of one tensor")


def _unpack_tensor(
    row: Json, segments: Sequence[str], digests: Digests | None, *, whole: bool
) -> TensorEntry:
    axes = row["axes"]
    shape = as_counts(row["shape"])
    if len(shape) > AXES_MAX:
        raise ValueError(f"{row['name']!r} has {len(shape)} axes, {AXES_MAX} at most are read")
    name, dtype, kind, device = _TEXTS(row)
    as_texts((name, dtype, kind, device))
    axes = None if axes is None else as_counts(axes)
    spec = Spec(name, dtype, shape, axes, kind, device, **_unpack_shard(row))
    if spec.nbytes > COUNT_MAX or math.prod(filter(None, spec.full_shape)) > COUNT_MAX:
        raise ValueError(f"{spec.name}: a shape of {shape} is too large to be one")
    chunks = tuple([unpack_chunk(chunk, segments, digests) for chunk in row["chunks"]])
    check_chunks(spec, chunks, whole=whole)
    return TensorEntry(spec, chunks, as_count(row["version"]), _unpack_statistics(row, spec))
