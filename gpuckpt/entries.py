"""Chunks' rows in manifests and indices, to and from JSON; nothing in them is trusted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from gpuckpt import layout
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import FormatError
from gpuckpt.rounding import MASTER, NARROW
from gpuckpt.seal import Seal
from gpuckpt.spec import ChunkEntry, Extent, Plane, Spec
from gpuckpt.tileindex import (
    BLOCKS,
    check_tiling,
    index_nbytes,
    pack_tiles,
    unpack_tiles,
)
from gpuckpt.values import Json

CODECS = ("raw", "zstd")
SPARSE = "sparse"
# What a reader must know beyond the first readers of this version.
DELTA_FEATURE, SPARSE_FEATURE, TURNED_FEATURE = "delta", "sparse", "turned"
DERIVED_FEATURE = "derived"
# Tensors in shards, and such that each rank has one of its own.
SHARDS_FEATURE, RANKS_FEATURE = "shards", "ranks"
# Tensors that are listed in other files.
PARTS_FEATURE = "parts"
# Chunks in tiles.
TILES_FEATURE = "tiles"
FEATURES = (
    *(DELTA_FEATURE, SPARSE_FEATURE, TURNED_FEATURE, DERIVED_FEATURE),
    *(SHARDS_FEATURE, RANKS_FEATURE, PARTS_FEATURE, TILES_FEATURE),
)
# What stands in a row in a base's place if the planes are of elements that are turned.
TURNED = "turned"
COUNT_MAX = 2**63 - 1
Digests = Mapping[Extent, str]
# A longer chain is no one's, and would make whoever reads it read for ever.
CHAIN_MAX = 64
# Of a row with sources: the ninth is the base that it doesn't have.
_LINK_ENTRIES, _DERIVED_ENTRIES = 9, 10


def pack_chunk(chunk: ChunkEntry, positions: Mapping[str, int]) -> list[Json]:
    """A chunk's row, its segments by their positions."""
    extent = chunk.extent
    row: list[Json] = [
        *(chunk.start, chunk.nbytes),
        *(positions[extent.segment], extent.offset, extent.length),
        *(chunk.fingerprint, chunk.checksum),
        [_pack_plane(plane) for plane in chunk.planes],
    ]
    if chunk.sources:
        return [*row, None, [pack_chunk(source, positions) for source in chunk.sources]]
    assert not (chunk.turned and chunk.base), "a delta isn't turned"
    if chunk.tiles:
        assert not chunk.base, "a delta isn't in tiles"
        return [*row, pack_tiles(chunk)]
    if chunk.turned:
        return [*row, TURNED]
    return row if chunk.base is None else [*row, pack_chunk(chunk.base, positions)]


def unpack_chunk(row: Json, segments: Sequence[str], digests: Digests | None = None) -> ChunkEntry:
    """Read a chunk's row: the inverse of `pack_chunk`, but for what `digests` are for."""
    if len(row) != _DERIVED_ENTRIES:
        return _unpack_link(row, segments, CHAIN_MAX, digests)
    *own, base, sources = row
    if base is not None or not sources:
        raise ValueError("a chunk of sources, and a base, or of none")
    found = tuple(_unpack_link(source, segments, CHAIN_MAX, digests) for source in sources)
    return replace(_unpack_link(own, segments, 0, digests), sources=found)


def pack_digests(chunks: Iterable[ChunkEntry], positions: Mapping[str, int]) -> list[Json]:
    """A row for each part of a file that chunks, their bases or their sources lie in."""
    links = (link for chunk in chunks for link in chunk.links if link.extent.length)
    found = {link.extent: link.digest for link in links}
    assert all(found.values()), "what is sealed has digests"
    return [[positions[e.segment], e.offset, e.length, text] for e, text in found.items()]


def pack_body(
    body: dict[str, Json],
    chunks: Iterable[ChunkEntry],
    segments: Sequence[str],
    seal: Seal | None,
    kind: bytes,
) -> bytes:
    """The text of a manifest or an index; if there is a `seal`, with digests, and sealed."""
    if seal is not None:
        positions = {name: position for position, name in enumerate(segments)}
        body = body | {"digests": pack_digests(chunks, positions)}
    text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")
    return text if seal is None else seal.sealed(text, kind)


def unpack_digests(rows: Sequence[Json], segments: Sequence[str]) -> Digests:
    """Read the rows of digests: the inverse of `pack_digests`."""
    return {
        Extent(segments[as_count(segment)], as_count(offset), as_count(length)): as_text(text)
        for segment, offset, length, text in rows
    }


def _unpack_link(
    row: Json, segments: Sequence[str], links: int, digests: Digests | None
) -> ChunkEntry:
    """Read a row that has no sources."""
    start, nbytes, segment, offset, length, fingerprint, checksum, planes, *more = row
    tiles, turned = unpack_tiles(more[0]) if more and isinstance(more[0], dict) else ((), False)
    more = [] if tiles else more
    turned = turned or more == [TURNED]
    more = [] if more == [TURNED] else more
    if len(row) > _LINK_ENTRIES or (more and not links):
        raise ValueError(f"{len(row)} entries, or more than {CHAIN_MAX} bases")
    as_counts((start, nbytes, segment, offset, length))
    as_texts((fingerprint, checksum))
    extent = Extent(segments[segment], offset, length)
    based = more and not turned
    return ChunkEntry(
        start=start,
        nbytes=nbytes,
        extent=extent,
        fingerprint=fingerprint,
        checksum=checksum,
        planes=tuple([_unpack_plane(plane) for plane in planes]),
        base=_unpack_link(more[0], segments, links - 1, digests) if based else None,
        turned=turned,
        tiles=tiles,
        digest=digests[extent] if digests is not None and extent.length else "",
    )


def check_chunks(spec: Spec, chunks: Sequence[ChunkEntry], *, whole: bool) -> None:
    """Chunks follow each other without a hole or an overlap, and their planes fill them.

    Raises:
        ValueError: they don't.
        FormatError: a codec isn't known.
    """
    end = 0
    for chunk in chunks:
        if chunk.start < end or (whole and chunk.start > end) or not chunk.nbytes:
            raise ValueError(f"{spec.name}: a chunk at {chunk.start}, after one that ends at {end}")
        end = chunk.start + chunk.nbytes
        if chunk.sources:
            _check_derived(spec, chunk)
        elif chunk.base is None:
            _check_chunk(spec, chunk)
        else:
            _check_chain(spec, chunk)
    if end > spec.nbytes or (whole and end != spec.nbytes):
        raise ValueError(f"{spec.name}: {end} bytes of {spec.nbytes}")


def features_of(chunks: Iterable[ChunkEntry]) -> list[str]:
    """What a reader of these chunks must know."""
    found = set()
    for chunk in chunks:
        for link in chunk.links:
            if link.sources:
                found.add(DERIVED_FEATURE)
            if link.base is not None:
                found.add(DELTA_FEATURE)
            if link.turned:
                found.add(TURNED_FEATURE)
            if link.tiles:
                found.add(TILES_FEATURE)
            for plane in link.planes:
                if plane.parts:
                    found.add(SPARSE_FEATURE)
    return sorted(found)


def check_features(required: Json, where: str) -> None:
    """See that a reader knows what a file requires.

    Raises:
        TypeError: that isn't a list.
        FormatError: it doesn't.
    """
    if not isinstance(required, list):
        raise TypeError(f"{required!r} isn't a list of features")
    unknown = [one for one in required if one not in FEATURES]
    if unknown:
        raise FormatError(f"{where}: needs {unknown}, unknown to this gpuckpt; upgrade")


def as_count(value: Json) -> int:
    """A count, and nothing else that JSON can say."""
    if type(value) is not int or not 0 <= value <= COUNT_MAX:
        raise ValueError(f"{value!r} isn't a count")
    return value


def as_counts(values: Iterable[Json]) -> tuple[int, ...]:
    """Counts, each of them what `as_count` takes."""
    counts = tuple(values)
    for value in counts:
        if type(value) is not int or not 0 <= value <= COUNT_MAX:
            raise ValueError(f"{value!r} isn't a count")
    return counts


def as_text(value: Json) -> str:
    """A string, and nothing else that JSON can say."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} isn't a string")
    return value


def as_texts(values: Sequence[Json]) -> None:
    """See that each is what `as_text` takes."""
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{value!r} isn't a string")


def _pack_plane(plane: Plane) -> list[Json]:
    if not plane.parts:  # mostly
        return [plane.codec, plane.length]
    return [plane.codec, plane.length, *map(_pack_plane, plane.parts)]


def _unpack_plane(row: Json) -> Plane:
    codec, length, *parts = row
    if not parts:  # mostly
        return Plane(as_text(codec), as_count(length))
    inside = tuple(Plane(as_text(one), as_count(size)) for one, size in parts)
    return Plane(as_text(codec), as_count(length), inside)


def _check_chain(spec: Spec, chunk: ChunkEntry) -> None:
    for link in chunk.chain:
        if (link.start, link.nbytes) != (chunk.start, chunk.nbytes):
            raise ValueError(f"{spec.name}: a base of {link.nbytes} bytes at {link.start}")
        _check_chunk(spec, link)


def _check_derived(spec: Spec, chunk: ChunkEntry) -> None:
    """Its sources are the float32 elements of which its own are the roundings, and no others."""
    if spec.dtype not in NARROW or chunk.planes or chunk.extent.length:
        raise ValueError(f"{spec.name}: {spec.dtype} that is stored, and has sources")
    master = Spec(f"a source of {spec.name}", MASTER, spec.shape)
    _check_size(spec, chunk)
    end = 2 * chunk.start
    for source in chunk.sources:
        if source.start != end or not source.nbytes:
            raise ValueError(f"{spec.name}: a source at {source.start}, and not at {end}")
        _check_chain(master, source)
        end += source.nbytes
    if end != 2 * (chunk.start + chunk.nbytes):
        raise ValueError(f"{spec.name}: sources to {end} for {chunk.nbytes} bytes")


def _check_chunk(spec: Spec, chunk: ChunkEntry) -> None:
    _check_size(spec, chunk)
    planes = chunk.planes
    if (len(planes) != 1 or chunk.base is not None) and len(planes) != spec.width:
        raise ValueError(f"{spec.name}: {len(planes)} planes of {spec.width}")
    if chunk.turned and len(planes) == 1:
        raise ValueError(f"{spec.name}: one plane of elements that are turned")
    index = 0
    if chunk.tiles:
        check_tiling(spec, chunk)
        index = index_nbytes(chunk.planes, chunk.tiles)
    codecs = (*CODECS, BLOCKS) if chunk.tiles else CODECS
    nbytes, length = chunk.nbytes // len(planes), 0
    for plane in planes:
        _check_plane(spec.name, plane, nbytes, codecs)
        length += plane.length
    if length + index != chunk.extent.length:
        raise ValueError(f"{spec.name}: planes don't fill their extent")


def _check_size(spec: Spec, chunk: ChunkEntry) -> None:
    itemsize = to_numpy(spec.dtype).itemsize
    if chunk.nbytes > layout.CHUNK_NBYTES_MAX:
        raise ValueError(f"{spec.name}: a chunk of {chunk.nbytes} bytes")
    if chunk.start % itemsize or chunk.nbytes % itemsize:
        raise ValueError(f"{spec.name}: a chunk cuts an element")


def _check_plane(name: str, plane: Plane, nbytes: int, codecs: Sequence[str]) -> None:
    shorter = plane.length < nbytes and plane.codec != "raw"
    if plane.codec in codecs and not plane.parts and (shorter or plane.length == nbytes):
        return  # mostly
    inside = [part.codec for part in plane.parts]
    for codec in inside if plane.codec == SPARSE else [plane.codec, *inside]:
        if codec not in codecs:
            raise FormatError(f"{name}: codec {codec!r} isn't known to this gpuckpt; upgrade it")
    if len(plane.parts) != (2 if plane.codec == SPARSE else 0):
        raise ValueError(f"{name}: a {plane.codec} plane of {len(plane.parts)} parts")
    if plane.parts and sum(part.length for part in plane.parts) != plane.length:
        raise ValueError(f"{name}: a sparse plane's parts don't fill it")
    if plane.length > nbytes or (plane.codec == "raw" and plane.length != nbytes):
        raise ValueError(f"{name}: a {plane.codec} plane of {plane.length} bytes for {nbytes}")
