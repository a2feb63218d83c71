"""Every name and every fixed byte on disk; docs/FORMAT.md has the same tables."""

from __future__ import annotations

import operator
import re
import struct
from typing import NamedTuple

from gpuckpt.errors import CorruptError, FormatError, InvalidError

VERSION = 1
CHUNK_NBYTES = 4 << 20
CHUNK_NBYTES_MAX = 1 << 30
LEAF_NBYTES = 64 << 10
SEGMENT_NBYTES = 4 << 30
STEP_LIMIT = 10**12
# Longer ones are refused before they are read: about a million tensors.
MANIFEST_NBYTES_MAX = INDEX_NBYTES_MAX = 256 << 20

LOCK = "lock"
LOG, LOG_OF_RANK = "saves.jsonl", "saves.r%d.jsonl"
TEMPORARY = ".tmp"
BEGINNING = "step-"  # of the name of any file of a checkpoint
RANKS = "ranks-"  # of the name of any record by which ranks meet
RECORD_NBYTES_MAX = 256 << 20

MAGIC = b"gpuckpt\0"
HEADER = struct.Struct("<8sI52x")  # magic, version
TRAILER = struct.Struct("<QQQ16sI12x8s")  # index: offset, length, raw length, check; version; magic
assert HEADER.size == 64
assert TRAILER.size == 64

MANIFEST_HEAD = '{"gpuckpt":%d,"checksum":"%s","manifest":'
MANIFEST_TAIL = b"}\n"
MANIFEST_HEAD_NBYTES = len(MANIFEST_HEAD % (VERSION, "0" * 32))

_MANIFEST_NAME = re.compile(r"step-([0-9]{12})\.manifest\.json")
_SEGMENT_NAME = re.compile(r"step-([0-9]{12})\.([0-9a-f]{8})\.r([0-9]{1,6})\.([0-9]{1,6})\.segment")
_PART_NAME = re.compile(r"step-([0-9]{12})\.([0-9a-f]{8})\.r([0-9]{1,6})\.part\.json")
_LOG_NAME = re.compile(r"saves\.r([0-9]{1,6})\.jsonl")
_MARKER_NAME = re.compile(r"rank-([0-9a-f]{8})-([0-9]{1,6})\.here")
_CALL_NAME = re.compile(r"up-([0-9a-f]{8})-([0-9]{12})\.([0-9a-f]{8})")
_UP_NAME = re.compile(r"up-[0-9a-f]{8}(-[0-9]{12}\.[0-9a-f]{8}(\.r[0-9]{1,6}\.(here|not))?)?")


class SegmentTrailer(NamedTuple):
    """Where a segment's own index lies, and how to check it."""

    offset: int
    length: int
    raw_length: int
    checksum: bytes


def check_step(step: int) -> int:
    """`step` as a plain integer, if it can stand in a file name."""
    return check_count(step, "a step")


def check_count(number: int, what: str) -> int:
    """`number` as a plain integer from 0 on; numpy's integers are taken too."""
    try:
        count = operator.index(number)
    except TypeError:
        count = -1
    if isinstance(number, bool) or not 0 <= count < STEP_LIMIT:
        raise InvalidError(f"{what} is an integer from 0 to {STEP_LIMIT - 1}, got {number!r}")
    return count


def manifest_name(step: int) -> str:
    """The file whose appearance commits `step`."""
    return f"step-{step:012d}.manifest.json"


def manifest_step(name: str) -> int | None:
    """The step that the manifest called `name` commits; None for any other file."""
    match = _MANIFEST_NAME.fullmatch(name)
    return int(match[1]) if match else None


def segment_name(step: int, token: str, rank: int, part: int) -> str:
    """A data file of `step`; `token` sets two attempts at one step apart."""
    return f"step-{step:012d}.{token}.r{rank}.{part}.segment"


def segment_step(name: str) -> int | None:
    """The step that the segment called `name` was written for; None for any other file."""
    match = _SEGMENT_NAME.fullmatch(name)
    return int(match[1]) if match else None


def part_name(step: int, token: str, rank: int) -> str:
    """The file that lists what a rank contributes to `step`."""
    return f"step-{step:012d}.{token}.r{rank}.part.json"


def part_rank(name: str) -> int | None:
    """The rank that contributes the part called `name`; None for any other file."""
    match = _PART_NAME.fullmatch(name)
    return int(match[3]) if match else None


def part_step(name: str) -> int | None:
    """The step that the part called `name` belongs to; None for any other file."""
    match = _PART_NAME.fullmatch(name)
    return int(match[1]) if match else None


def log_rank(name: str) -> int | None:
    """The rank whose log of saves a file is; None for any other file."""
    match = _LOG_NAME.fullmatch(name)
    return 0 if name == LOG else int(match[1]) if match else None


def marker_name(token: str, rank: int) -> str:
    """The file by which a rank shows the others, for a moment, which root it has."""
    return f"rank-{token}-{rank}.here"


def is_marker(name: str) -> bool:
    """Whether a file is such a one, or one by which machines bring a step up together."""
    return _MARKER_NAME.fullmatch(name) is not None or _UP_NAME.fullmatch(name) is not None


def marker_rank(name: str, token: str) -> int | None:
    """The rank that has left a file there, in the round of this token."""
    match = _MARKER_NAME.fullmatch(name)
    return int(match[2]) if match and match[1] == token else None


def up_name(run: str) -> str:
    """The file by which rank 0 shows the other machines of a run that it has a tier."""
    return f"up-{run}"


def call_name(run: str, step: int, check: str) -> str:
    """The file by which it calls a step up, whose files' names have this check."""
    return f"{up_name(run)}-{step:012d}.{check}"


def called(name: str, run: str) -> tuple[int, str] | None:
    """The step that such a file of a run calls up, and its check; None for any other file."""
    match = _CALL_NAME.fullmatch(name)
    return (int(match[2]), match[3]) if match and match[1] == run else None


def answer_name(call: str, rank: int, *, here: bool) -> str:
    """The file by which the lead of a root says that its files of that are there, or won't be."""
    return f"{call}.r{rank}.{'here' if here else 'not'}"


def data_step(name: str) -> int | None:
    """The step that a segment or a part was written for; None for any other file."""
    found = segment_step(name)
    return part_step(name) if found is None else found


def pack_header() -> bytes:
    """The first bytes of every segment."""
    return HEADER.pack(MAGIC, VERSION)


def check_header(data: bytes, where: str) -> None:
    """Raise unless `data` are the first bytes of a segment that can be read here."""
    if len(data) != HEADER.size or not data.startswith(MAGIC):
        raise FormatError(f"{where}: not a gpuckpt segment")
    _check_version(HEADER.unpack(data)[1], where)


def pack_trailer(trailer: SegmentTrailer) -> bytes:
    """The last bytes of every segment."""
    return TRAILER.pack(*trailer, VERSION, MAGIC)


def unpack_trailer(data: bytes, where: str) -> SegmentTrailer:
    """Read the last bytes of a segment: the inverse of `pack_trailer`."""
    if len(data) != TRAILER.size or not data.endswith(MAGIC):
        raise CorruptError(where, "the file ends before its trailer")
    offset, length, raw_length, checksum, version, _ = TRAILER.unpack(data)
    _check_version(version, where)
    return SegmentTrailer(offset, length, raw_length, checksum)


def _check_version(version: int, where: str) -> None:
    if version != VERSION:
        raise FormatError(f"{where}: format {version}, this gpuckpt reads {VERSION}; upgrade it")
