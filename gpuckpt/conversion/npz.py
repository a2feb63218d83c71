"""`.npz`: a zip archive with a `.npy` file for each array, as `np.savez` writes it.

numpy can't name the element types of ml_dtypes; it writes their elements as
opaque bytes (`V2` for bfloat16), and so does this.  What they are stands with
the state's structure in the member `gpuckpt.json`, which `np.load` gives as
bytes.  Objects, which numpy would unpickle, are refused.
"""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import ml_dtypes
import numpy as np

from gpuckpt.conversion.checksums import Checksum, Noted, pack_checksums
from gpuckpt.conversion.keeping import pack_kept, unpack_kept
from gpuckpt.conversion.placing import Reading, Writing, file_of, new_file, path_of
from gpuckpt.conversion.port import (
    PART_NBYTES,
    Bytes,
    Format,
    Options,
    Outline,
    Source,
    parts_of,
)
from gpuckpt.dtypes import name_of, to_numpy
from gpuckpt.errors import CorruptError, UnsupportedError
from gpuckpt.manifest import NOT_AS_EXPECTED
from gpuckpt.spec import Spec
from gpuckpt.values import parse_json

SUFFIX, MEMBER_SUFFIX = ".npz", ".npy"
KEPT = "gpuckpt.json"
_KEPT_NBYTES_MAX = 256 << 20
_NAME_NBYTES_MAX = 65535 - len(MEMBER_SUFFIX)
# What reading a zip archive that isn't one, or was damaged, raises.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


@dataclass(frozen=True, slots=True)
class _Member:
    """An array of an archive: where its bytes begin in the file of its own."""

    info: zipfile.ZipInfo
    spec: Spec
    offset: int
    fortran: bool


class NpzSource:
    """The arrays of an archive that is open."""

    def __init__(self, archive: zipfile.ZipFile, where: str) -> None:
        """Read the archive's list, and each array's header."""
        self._archive, self._where = archive, where
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise CorruptError(where, "two of its members have one name")
        arrays = [one for one in archive.infolist() if one.filename.endswith(MEMBER_SUFFIX)]
        kept, dtypes = _read_kept(archive, where) if KEPT in names else (None, {})
        self._members = [_member(archive, one, dtypes, where) for one in arrays]
        others = [one for one in names if not one.endswith(MEMBER_SUFFIX) and one != KEPT]
        outline = unpack_kept(kept, [one.spec for one in self._members], {}, {})
        outline = replace(outline, noted=_noted(self._members, where))
        left_out = [f"the member {one}, which isn't an array" for one in others]
        self.outline = outline.with_left_out(left_out)

    def read(self, position: int) -> Iterator[memoryview]:
        """The bytes of an array, compared with the archive's CRC-32.

        One in Fortran order is brought into C order as a whole.
        """
        member = self._members[position]
        item = to_numpy(member.spec.dtype).itemsize
        where = f"{self._where}: {member.info.filename}"
        with _damage(where), self._archive.open(member.info) as file:
            _fill(file, np.empty(member.offset, np.uint8))
            if member.fortran:
                yield from parts_of(_turned(file, member.spec), item)
            else:
                yield from _parts(file, member.spec.nbytes, item)
            if file.read(1):  # its end: what comes before is compared there
                raise CorruptError(where, "longer than it says")


def _parts(file: IO[bytes], nbytes: int, item_nbytes: int) -> Iterator[memoryview]:
    step = max(PART_NBYTES // item_nbytes, 1) * item_nbytes
    room = np.empty(min(nbytes, step), np.uint8)
    for at in range(0, nbytes, step):
        part = room[: min(step, nbytes - at)]
        _fill(file, part)
        yield part.data


def _turned(file: IO[bytes], spec: Spec) -> Bytes:
    raw = np.empty(spec.nbytes, np.uint8)
    _fill(file, raw)
    array = raw.view(to_numpy(spec.dtype)).reshape(spec.shape, order="F")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _fill(file: IO[bytes], room: Bytes) -> None:
    at = 0
    while at < room.size:
        data = file.read(min(room.size - at, 1 << 20))
        if not data:
            raise EOFError(f"ends after {at} of {room.size} bytes")
        room[at : at + len(data)] = np.frombuffer(data, np.uint8)
        at += len(data)


@contextlib.contextmanager
def open_npz(at: str, _: Options) -> Iterator[Source]:
    """An archive, from any store."""
    store, name = file_of(at)
    where = f"{store.root}/{name}"
    with contextlib.ExitStack() as opened:
        with _damage(where):
            file = io.BufferedReader(Reading(store, name), 1 << 20)
            archive = opened.enter_context(zipfile.ZipFile(file))
            source = NpzSource(archive, where)
        yield source


@contextlib.contextmanager
def _damage(where: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise CorruptError(where, f"not what numpy writes ({error})") from error


def _read_kept(archive: zipfile.ZipFile, where: str) -> tuple[str, dict[str, str]]:
    """The text that the structure is kept in, and the types that numpy has no name for."""
    info = archive.getinfo(KEPT)
    if info.file_size > _KEPT_NBYTES_MAX:
        raise CorruptError(where, f"{info.file_size} bytes of {KEPT}")
    with archive.open(info) as file:
        text = file.read(_KEPT_NBYTES_MAX)
    try:
        body = parse_json(text)
        dtypes = {str(name): str(dtype) for name, dtype in body["dtypes"].items()}
        return json.dumps(body["state"]), dtypes
    except NOT_AS_EXPECTED as error:
        raise CorruptError(where, f"{KEPT} can't be read ({error})") from error


def _member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, dtypes: dict[str, str], where: str
) -> _Member:
    name = info.filename.removesuffix(MEMBER_SUFFIX)
    with archive.open(info) as file:
        try:
            shape, fortran, dtype = _read_header(file)
        except (ValueError, TypeError) as error:
            raise CorruptError(where, f"{info.filename} isn't an array's ({error})") from error
        offset = file.tell()
    kind = name_of(dtype)
    if kind is None:
        raise UnsupportedError(
            name, f"elements of type {dtype} can't be converted: objects, and arrays of records"
        )
    if name in dtypes:
        if to_numpy(dtypes[name]).itemsize != dtype.itemsize:
            raise CorruptError(where, f"{name} can't be of {dtypes[name]}")
        kind = dtypes[name]
    axes = tuple(reversed(range(len(shape)))) if fortran and len(shape) > 1 else None
    spec = Spec(name, kind, shape, axes=axes)
    if spec.nbytes != info.file_size - offset:
        raise CorruptError(where, f"{info.filename} isn't as long as it says")
    return _Member(info, spec, offset, axes is not None)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {version} of the format, for records only")


def lost_in_npz(outline: Outline) -> Sequence[str]:
    """Nothing: what numpy doesn't see is kept for gpuckpt.

    Raises:
        UnsupportedError: an archive can't have a member of a tensor's name.
    """
    for spec in outline.specs:
        try:
            fits = len(spec.name.encode()) <= _NAME_NBYTES_MAX and "\0" not in spec.name
        except UnicodeEncodeError:
            fits = False
        if not fits:
            raise UnsupportedError(spec.name, "an archive can't have a member of this name")
    return ()


def write_npz(at: str, source: Source, options: Options) -> None:
    """An archive as `np.savez` writes it: nothing is compressed."""
    outline = source.outline
    foreign = {one.name: one.dtype for one in outline.specs if _is_foreign(one.dtype)}
    kept = pack_kept(outline, always=bool(foreign or outline.metadata))
    with (
        new_file(path_of(at), force=options.force, before=options.standing) as file,
        zipfile.ZipFile(Writing(file), "w") as archive,
    ):
        for position, spec in enumerate(outline.specs):
            dtype = to_numpy(spec.dtype)
            name = f"{spec.name}{MEMBER_SUFFIX}"
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                _write_header(member, spec.shape, dtype)
                for part in source.read(position):
                    member.write(part)
        if options.checksums is not None:
            _note(archive, options.checksums())
        if kept is not None:
            body = {"dtypes": foreign, "state": json.loads(kept)}
            archive.writestr(zipfile.ZipInfo(KEPT), json.dumps(body))


def _note(archive: zipfile.ZipFile, checksums: Mapping[str, Checksum]) -> None:
    """Put each array's checksum into its member's comment, which the archive ends with."""
    for info in archive.infolist():
        name = info.filename.removesuffix(MEMBER_SUFFIX)
        if name in checksums:
            info.comment = pack_checksums({"": checksums[name]}).encode()


def _noted(members: Sequence[_Member], where: str) -> tuple[Noted, ...]:
    """The checksums in the members' comments, each without the name."""
    return tuple(
        Noted(
            one.info.comment.decode("utf-8", "replace"),
            f"{where}: the comment of {one.info.filename}",
            one.spec.name,
        )
        for one in members
        if one.info.comment.startswith(b'{"gpuckpt"')
    )


def _is_foreign(dtype: str) -> bool:
    """Whether numpy has no name for it."""
    return hasattr(ml_dtypes, dtype) and not hasattr(np, dtype)


def _write_header(member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    # As numpy has it; what it takes for a float of its own (float8_e5m2), it wouldn't read.
    descr = dtype.str if dtype.str[1] != "f" or dtype.itemsize > 1 else f"|V{dtype.itemsize}"
    facts = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, facts)


def _is_npz(at: str) -> bool:
    return at.endswith(SUFFIX)


NPZ = Format(
    "npz",
    recognises=_is_npz,
    suits=_is_npz,
    open=open_npz,
    checks=True,
    lost=lost_in_npz,
    write=write_npz,
)
