"""The manifest: the list of everything in a checkpoint, to and from JSON.

Parsing trusts nothing: every number, name and extent is checked before a byte
of data is read or a byte of memory allocated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gpuckpt import layout
from gpuckpt.entries import (
    PARTS_FEATURE,
    as_count,
    as_text,
    check_features,
    pack_body,
    unpack_digests,
)
from gpuckpt.errors import CorruptError, FormatError, UnsupportedError
from gpuckpt.fingerprint import checksum128
from gpuckpt.seal import MANIFEST, Seal
from gpuckpt.structure import walk_json
from gpuckpt.tensors import (
    TensorEntry,
    as_number,
    check_segment,
    chunks_of,
    features_in,
    numbers_of,
    pack_tensors,
    segments_of,
    unpack_tensors,
)
from gpuckpt.values import Json, parse_json

# What JSON of another shape than ours makes the code that reads it raise.
NOT_AS_EXPECTED = (
    *(KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, OverflowError),
)
# Later than anyone's clock, and not too late for a calendar.
_TIME_LIMIT = 2**40
_BEGINNING = re.compile(rb'\{"gpuckpt":([0-9]{1,9}),')


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank contributes to a checkpoint, in a file of its own: its name, and its check.

    `segments` are those that it names, as far as that is known without it.
    """

    name: str
    nbytes: int
    check: str
    raw_nbytes: int
    encoded_nbytes: int
    segments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that is in one checkpoint, and where.

    `structure` is the state's tree (see `structure`), whose tensors are
    positions in `tensors`; `created` is in seconds since 1970, UTC.  Of a
    checkpoint of several `ranks` the tensors are listed in their `parts`, and
    are here only once these are joined (`parts`), but for those that are
    `absent`; a part is a manifest of the one `rank`.  If the ranks' structures are
    `alike` but for each one's own, whoever needs no other rows may read its own
    part alone; then it is `partial`.  Of a part that was just written,
    `all_nbytes` are the bytes of all parts, raw and encoded.
    """

    step: int
    structure: Json
    tensors: tuple[TensorEntry, ...]
    epoch: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    created: float = 0.0
    writer: str = ""
    ranks: int = 1
    rank: int | None = None
    parts: tuple[Part, ...] = ()
    listed: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    alike: bool = False
    partial: bool = False
    all_nbytes: tuple[int, int] | None = None

    @property
    def raw_nbytes(self) -> int:
        """Bytes of all tensors in memory."""
        if self.all_nbytes is not None:
            return self.all_nbytes[0]
        if self.parts:
            return sum(part.raw_nbytes for part in self.parts)
        return sum(entry.spec.nbytes for entry in self.tensors)

    @property
    def encoded_nbytes(self) -> int:
        """Bytes of all tensors' chunks on disk, without those of their bases."""
        if self.all_nbytes is not None:
            return self.all_nbytes[1]
        if self.parts:
            return sum(part.encoded_nbytes for part in self.parts)
        return sum(chunk.extent.length for entry in self.tensors for chunk in entry.chunks)

    @property
    def segments(self) -> list[str]:
        """The data files that it names, each once, in order of use."""
        return list(self.listed) if self.parts else segments_of(self.tensors)

    @property
    def files(self) -> list[str]:
        """All files that it needs: segments, and the ranks' parts."""
        return [*self.segments, *(part.name for part in self.parts)]


def pack_manifest(manifest: Manifest, seal: Seal | None = None) -> bytes:
    """The bytes of a manifest's file, sealed if there is a `seal`.

    Raises:
        UnsupportedError: they are more than any reader would take.
    """
    segments = manifest.segments
    tensors = () if manifest.parts else manifest.tensors
    body = {
        "requires": [PARTS_FEATURE] if manifest.parts else features_in(tensors),
        "step": manifest.step,
        "epoch": manifest.epoch,
        "metrics": {name: as_number(value) for name, value in manifest.metrics.items()},
        "created": manifest.created,
        "writer": manifest.writer,
        "raw_nbytes": manifest.raw_nbytes,
        "encoded_nbytes": manifest.encoded_nbytes,
        "segments": segments,
        "structure": {"dict": []} if manifest.parts else manifest.structure,
        "tensors": pack_tensors(tensors, segments),
        **_pack_ranks(manifest),
    }
    text = pack_body(body, chunks_of(tensors), segments, seal, MANIFEST)
    head = layout.MANIFEST_HEAD % (layout.VERSION, checksum128(text))
    packed = head.encode("ascii") + text + layout.MANIFEST_TAIL
    if len(packed) > layout.MANIFEST_NBYTES_MAX:
        raise UnsupportedError(
            "",
            f"its {len(manifest.tensors)} tensors need a manifest of {len(packed)} bytes, "
            f"{layout.MANIFEST_NBYTES_MAX} at most are read; put small tensors together",
        )
    return packed


def unpack_manifest(data: bytes, where: str, seal: Seal | None = None) -> Manifest:
    """Read the bytes of a manifest's file, named `where`: the inverse of `pack_manifest`.

    Raises:
        CorruptError: the bytes are not those that were written.
        AuthenticationError: they aren't sealed with the key of `seal`.
        FormatError: written by a newer gpuckpt.
    """
    body = _checked_body(data, where, seal)
    try:
        check_features(body["requires"], where)
        segments = [check_segment(name) for name in body["segments"]]
        digests = None if seal is None else unpack_digests(body["digests"], segments)
        ranks = _unpack_ranks(body, segments)  # before the rows of tensors are taken
        manifest = Manifest(
            step=layout.check_step(body["step"]),
            structure=body["structure"],
            tensors=unpack_tensors(body["tensors"], segments, digests),
            epoch=None if body["epoch"] is None else _integer(body["epoch"]),
            metrics={name: float(value) for name, value in body["metrics"].items()},
            created=_time(body["created"]),
            writer=str(body["writer"]),
            **ranks,
        )
        _check_structure(manifest)
    except NOT_AS_EXPECTED as error:
        raise CorruptError(where, f"not a manifest ({type(error).__name__}: {error})") from error
    return manifest


def unpack_files(data: bytes, where: str) -> list[str]:
    """The segments and parts that a manifest's file names, without what lies in them.

    Raises:
        CorruptError, FormatError: as `unpack_manifest`.
    """
    body = _checked_body(data, where)
    try:
        check_features(body["requires"], where)
        parts = [_unpack_part(row).name for row in body.get("parts", ())]
        return [*(check_segment(name) for name in body["segments"]), *parts]
    except NOT_AS_EXPECTED as error:
        raise CorruptError(where, f"not a manifest ({type(error).__name__}: {error})") from error


def _pack_ranks(manifest: Manifest) -> dict[str, Json]:
    """The fields of a checkpoint of several ranks, and of a part."""
    if manifest.ranks == 1:
        return {}
    parts = [
        [part.name, part.nbytes, part.check, part.raw_nbytes, part.encoded_nbytes]
        for part in manifest.parts
    ]
    if not parts:
        return {"ranks": manifest.ranks, "rank": manifest.rank}
    alike: dict[str, Json] = {"alike": True} if manifest.alike else {}
    return {"ranks": manifest.ranks, **alike, "parts": parts}


def _unpack_ranks(body: dict[str, Any], segments: Sequence[str]) -> dict[str, Any]:
    if "ranks" not in body:
        if "parts" in body or "rank" in body:
            raise ValueError("parts of no ranks")
        return {}
    parts = tuple(_unpack_part(row) for row in body.get("parts", ()))
    ranks = as_count(body["ranks"])
    found: dict[str, Any] = {"ranks": ranks, "parts": parts}
    if not parts:
        rank = as_count(body["rank"])
        if rank >= ranks:
            raise ValueError(f"rank {rank} of {ranks}")
        return found | {"rank": rank}
    step = layout.check_step(body["step"])
    for rank, part in enumerate(parts):
        if (layout.part_step(part.name), layout.part_rank(part.name)) != (step, rank):
            raise ValueError(f"{part.name!r} isn't the name of the part of rank {rank}")
    if len(parts) != ranks or body["tensors"]:
        raise ValueError(f"{len(parts)} parts of {ranks} ranks, or tensors beside them")
    return found | {"listed": tuple(segments), "alike": body.get("alike") is True}


def _unpack_part(row: Json) -> Part:
    name, nbytes, check, raw_nbytes, encoded_nbytes = row
    if layout.part_step(as_text(name)) is None:
        raise ValueError(f"{name!r} isn't a part's name")
    counts = as_count(raw_nbytes), as_count(encoded_nbytes)
    return Part(name, as_count(nbytes), as_text(check), *counts)


def notable(tensors: Sequence[TensorEntry]) -> str | None:
    """What a user should hear about: NaNs and infinities; None if there are none.

    A phrase to follow "step 300 holds ": "values that aren't finite: model.w
    (12 NaN, 3 inf of 4096)", with three tensors at most and the number of the
    others.
    """
    found = [
        f"{entry.spec.label} ({entry.statistics.not_finite} of {numbers_of(entry.spec)})"
        for entry in tensors
        if entry.statistics is not None and entry.statistics.not_finite
    ]
    if not found:
        return None
    more = len(found) - 3
    rest = f" and {more} more tensor{'s' if more > 1 else ''}" if more > 0 else ""
    return f"values that aren't finite: {', '.join(found[:3])}{rest}"


def _checked_body(data: bytes, where: str, seal: Seal | None = None) -> dict[str, Any]:
    beginning = _BEGINNING.match(data)
    if beginning is None:
        raise CorruptError(where, "not a manifest")
    version = int(beginning[1])
    if version != layout.VERSION:
        raise FormatError(
            f"{where}: format {version}, this gpuckpt reads {layout.VERSION}; upgrade it, or, if "
            "no newer one has written here, the file is damaged: use an older step"
        )
    if not data.endswith(layout.MANIFEST_TAIL):
        raise CorruptError(where, "the manifest ends before its end")
    head, text = data[: layout.MANIFEST_HEAD_NBYTES], data[layout.MANIFEST_HEAD_NBYTES :]
    text = text.removesuffix(layout.MANIFEST_TAIL)
    if head != (layout.MANIFEST_HEAD % (version, checksum128(text))).encode("ascii"):
        raise CorruptError(where, "the manifest's checksum doesn't fit its text")
    if seal is not None:
        seal.check(text, MANIFEST, where)
    try:
        body = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError(where, f"not a manifest ({error})") from error
    if not isinstance(body, dict):
        raise CorruptError(where, "not a manifest")
    return body


def _check_structure(manifest: Manifest) -> None:
    count = len(manifest.tensors)
    for _, node in walk_json(manifest.structure):
        number = node.get("tensor")
        if number is not None and not 0 <= number < count:
            raise ValueError(f"the structure names tensor {number} of {count}")


def _time(value: Json) -> float:
    """Seconds since 1970, as a clock may have them."""
    if type(value) not in (int, float) or not 0 <= value < _TIME_LIMIT:
        raise ValueError(f"{value!r} isn't a time")
    return float(value)


def _integer(value: Json) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} isn't an integer")
    return value
