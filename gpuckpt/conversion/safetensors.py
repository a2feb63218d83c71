"""safetensors: one file, or several with an index, as Hugging Face has them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gpuckpt.conversion.checksums import KEY as CHECKSUMS
from gpuckpt.conversion.checksums import Checksum, Noted, blank, pack_checksums
from gpuckpt.conversion.keeping import KEY, pack_kept, unpack_kept
from gpuckpt.conversion.placing import file_of, new_directory, new_file, path_of
from gpuckpt.conversion.port import (
    PART_NBYTES,
    PLAIN_FORMAT,
    SHARD_NBYTES,
    Format,
    Options,
    Outline,
    Source,
)
from gpuckpt.conversion.safetensors_header import (
    HEADER_NBYTES_MAX,
    LENGTH_NBYTES,
    Header,
    check_spec,
    file_order,
    header_nbytes,
    pack_header,
    unpack_header,
)
from gpuckpt.entries import as_text
from gpuckpt.errors import CorruptError, InvalidError
from gpuckpt.manifest import NOT_AS_EXPECTED
from gpuckpt.stores import Store, read_all
from gpuckpt.stores.opening import beside, is_local, is_url, split
from gpuckpt.values import Json, parse_json

SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
INDEX = f"model{INDEX_SUFFIX}"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor's bytes begin."""

    store: Store
    name: str
    offset: int


class SafetensorsSource:
    """Tensors of one file or several."""

    def __init__(self, outline: Outline, places: Sequence[_Place]) -> None:
        """`places` are those of the outline's specs."""
        self.outline, self._places = outline, places

    def read(self, position: int) -> Iterator[memoryview]:
        """The bytes of a tensor, which the format has no check values for."""
        place, nbytes = self._places[position], self.outline.specs[position].nbytes
        room = np.empty(min(nbytes, PART_NBYTES), np.uint8)
        for at in range(0, nbytes, PART_NBYTES):
            part = room[: min(PART_NBYTES, nbytes - at)].data
            place.store.read_into(place.name, place.offset + at, part)
            yield part


@contextlib.contextmanager
def open_safetensors(at: str, _: Options) -> Iterator[Source]:
    """A file, an index, or the directory that one of either is in."""
    at = _inside(at)
    if not at.endswith(INDEX_SUFFIX):
        store, name = file_of(at)
        header = read_header(store, name)
        places = [_Place(store, name, one) for one in header.offsets]
        yield _source(header, places, {}, _noted(header, f"{store.root}/{name}"))
        return
    store, name = file_of(at)
    where = f"{store.root}/{name}"
    if store.size(name) > HEADER_NBYTES_MAX:
        raise CorruptError(where, "too long to be an index")
    files, metadata = _unpack_index(read_all(store, name), where)
    yield _sharded(at, files, metadata, where)


def read_header(store: Store, name: str) -> Header:
    """The header of a file of a store.

    Raises:
        CorruptError: it isn't a safetensors file.
    """
    where, nbytes = f"{store.root}/{name}", store.size(name)
    if nbytes < LENGTH_NBYTES:
        raise CorruptError(where, f"{nbytes} bytes are no safetensors file")
    length = header_nbytes(read_all(store, name, LENGTH_NBYTES), nbytes, where)
    text = bytearray(length)
    store.read_into(name, LENGTH_NBYTES, memoryview(text))
    return unpack_header(bytes(text), nbytes, where)


def _source(
    header: Header,
    places: Sequence[_Place],
    further: Mapping[str, str],
    noted: Sequence[Noted],
) -> Source:
    metadata = {**header.metadata, **further}
    metadata.pop(CHECKSUMS, None)
    names = {spec.name for spec in header.specs}
    kept = metadata.pop(KEY, None)
    aliases = {
        key: value
        for key, value in metadata.items()
        if value in names and key not in names and key not in PLAIN_FORMAT
    }
    rest = {key: value for key, value in metadata.items() if key not in aliases}
    if noted:  # which is written with them
        rest = {key: value for key, value in rest.items() if PLAIN_FORMAT.get(key) != value}
    outline = unpack_kept(kept, header.specs, rest, aliases)
    return SafetensorsSource(replace(outline, noted=tuple(noted)), places)


def _unpack_index(data: bytes, where: str) -> tuple[dict[str, set[str]], dict[str, str]]:
    """The tensors of each file, and text."""
    try:
        body = parse_json(data)
        files: dict[str, set[str]] = {}
        for tensor, file in body["weight_map"].items():
            if Path(as_text(file)).name != file or not file.endswith(SUFFIX):
                raise ValueError(f"{file!r} isn't the name of a file beside it")
            files.setdefault(file, set()).add(tensor)
        given = body.get("metadata") or {}
        return files, {key: text for key, text in given.items() if isinstance(text, str)}
    except NOT_AS_EXPECTED as error:
        raise CorruptError(where, f"not an index of safetensors files ({error})") from error


def _sharded(
    at: str, files: Mapping[str, set[str]], metadata: Mapping[str, str], where: str
) -> Source:
    root = split(at)[0] if is_url(at) else str(Path(at).expanduser().parent)
    every: list[Header] = []
    places: list[_Place] = []
    noted: list[Noted] = []
    for file, names in files.items():
        store, name = file_of(beside(root, file))
        header = read_header(store, name)
        if {spec.name for spec in header.specs} != names:
            raise CorruptError(where, f"{file} doesn't have the tensors that the index says")
        places += [_Place(store, name, offset) for offset in header.offsets]
        noted += _noted(header, f"{store.root}/{name}")
        every.append(header)
    specs = tuple(spec for header in every for spec in header.specs)
    text = {key: value for header in every for key, value in header.metadata.items()}
    whole = Header(specs, (), text)
    return _source(whole, places, metadata, noted)


def _noted(header: Header, where: str) -> list[Noted]:
    text = header.metadata.get(CHECKSUMS)
    return [] if text is None else [Noted(text, where)]


def lost_in_safetensors(outline: Outline) -> Sequence[str]:
    """Nothing: what other readers don't see is kept as text for gpuckpt.

    Raises:
        UnsupportedError: a file can't hold a tensor.
    """
    for spec in outline.specs:
        check_spec(spec)
    return ()


def write_safetensors(at: str, source: Source, options: Options) -> None:
    """A file, if the name is a file's; else a directory, with as many files as it takes.

    Raises:
        InvalidError: shards were asked for, and a file named.
    """
    path, outline = path_of(at), source.outline
    metadata = text_of(outline)
    if path.name.endswith(SUFFIX):
        if options.shard_nbytes is not None:
            raise InvalidError(f"{at}: shards lie in a directory; give one as the target")
        _write_file(path, source, range(len(outline.specs)), metadata, options)
        return
    shares = _shares(outline, options.shard_nbytes or SHARD_NBYTES)
    new = Options(checksums=options.checksums)
    with new_directory(path, force=options.force, before=options.standing) as folder:
        if len(shares) == 1:
            _write_file(folder / f"model{SUFFIX}", source, shares[0], metadata, new)
            return
        _write_shards(folder, source, shares, metadata, new)


def text_of(outline: Outline) -> dict[str, str]:
    """The metadata of a file: the outline's own, aliases, and what only gpuckpt reads back."""
    kept, metadata = pack_kept(outline), dict(outline.metadata)
    if kept is None:
        return metadata
    aliases = {key: own for key, own in outline.aliases.items() if key not in metadata}
    return PLAIN_FORMAT | metadata | aliases | {KEY: kept}


def _write_shards(
    folder: Path,
    source: Source,
    shares: Sequence[Sequence[int]],
    metadata: Mapping[str, str],
    options: Options,
) -> None:
    specs = source.outline.specs
    names = [f"model-{at + 1:05}-of-{len(shares):05}{SUFFIX}" for at in range(len(shares))]
    own = {key: value for key, value in metadata.items() if key != KEY}
    for name, share in zip(names, shares, strict=True):
        _write_file(folder / name, source, share, own, options)
    total = sum(spec.nbytes for spec in specs)
    kept = {KEY: metadata[KEY]} if KEY in metadata else {}
    weights = {
        specs[at].name: name for name, share in zip(names, shares, strict=True) for at in share
    }
    index: Json = {"metadata": {"total_size": total, **kept}, "weight_map": weights}
    with new_file(folder / INDEX, force=False) as file:
        file.append([json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"])


def _write_file(
    path: Path,
    source: Source,
    positions: Sequence[int],
    metadata: Mapping[str, str],
    options: Options,
) -> None:
    specs = [source.outline.specs[at] for at in positions]
    order = file_order(specs)
    ordered = [specs[at] for at in order]

    checksums = options.checksums

    def header(found: Mapping[str, Checksum]) -> bytes:
        if checksums is None:
            return pack_header(ordered, metadata)
        own = {spec.name: found[spec.name] for spec in ordered}
        return pack_header(ordered, {**PLAIN_FORMAT, **metadata, CHECKSUMS: pack_checksums(own)})

    # What the tensors' fingerprints are is known at the end; their room is at the beginning.
    beginning = None if checksums is None else lambda: header(checksums())
    with new_file(path, force=options.force, before=options.standing, beginning=beginning) as file:
        file.append([header(blank(ordered))])
        for at in order:
            for part in source.read(positions[at]):
                file.append([part])


def _shares(outline: Outline, most_nbytes: int) -> list[list[int]]:
    """Which tensors share a file: those that follow each other, as long as they fit."""
    shares: list[list[int]] = [[]]
    room = most_nbytes
    for at, spec in enumerate(outline.specs):
        if shares[-1] and spec.nbytes > room:
            shares.append([])
            room = most_nbytes
        shares[-1].append(at)
        room -= spec.nbytes
    return shares


def _inside(at: str) -> str:
    """The file or the index that a directory stands for."""
    if is_url(at) and not is_local(at):
        return at
    path = path_of(at)
    if not path.is_dir():
        return str(Path(at).expanduser()) if not is_url(at) else str(path)
    found = _found(path)
    if len(found) != 1:
        raise InvalidError(f"{at}: {len(found)} safetensors files or indices; give one of them")
    return str(found[0])


def _found(path: Path) -> list[Path]:
    """The index of a directory, or its only files."""
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    if (path / INDEX) in indices:
        return [path / INDEX]
    return indices or sorted(path.glob(f"*{SUFFIX}"))


def _is_safetensors(at: str) -> bool:
    if at.endswith((SUFFIX, INDEX_SUFFIX)):
        return True
    if is_url(at) and not is_local(at):
        return False
    path = path_of(at)
    return path.is_dir() and bool(_found(path))


SAFETENSORS = Format(
    "safetensors",
    recognises=_is_safetensors,
    suits=lambda at: at.endswith(SUFFIX),
    open=open_safetensors,
    lost=lost_in_safetensors,
    write=write_safetensors,
)
