"""Checkpoints of several ranks: each rank's part, and all of them joined.

A rank's part is a manifest of its own: its rows, and the state's structure as
it has it.  The manifest that commits them names each part with its check; the
parts joined are what everybody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpuckpt import layout
from gpuckpt.errors import CorruptError, NotFoundError
from gpuckpt.fingerprint import checksum128
from gpuckpt.manifest import NOT_AS_EXPECTED, Manifest, Part, pack_manifest, unpack_manifest
from gpuckpt.names import plain_name
from gpuckpt.seal import Seal
from gpuckpt.stores import Store, read_all, write_all
from gpuckpt.structure import ConflictError, join, numbered
from gpuckpt.tensors import TensorEntry, check_names
from gpuckpt.values import Json


def write_part(store: Store, name: str, manifest: Manifest, seal: Seal | None = None) -> Part:
    """Write a rank's part, whose segments are durable; on return it is, too, name and all."""
    check_names([entry.spec for entry in manifest.tensors])  # else nobody could read it
    data = pack_manifest(manifest, seal)
    write_all(store, name, data)
    store.sync_names()
    sizes = manifest.raw_nbytes, manifest.encoded_nbytes
    return Part(name, len(data), checksum128(data), *sizes, tuple(manifest.segments))


def world_manifest(parts: Sequence[Part], header: Manifest) -> Manifest:
    """The manifest that commits a step of all ranks; all but the parts is as in `header`."""
    listed = dict.fromkeys(name for part in parts for name in part.segments)
    empty: Json = {"dict": []}
    return replace(
        header,
        structure=empty,
        tensors=(),
        ranks=len(parts),
        rank=None,
        parts=tuple(parts),
        listed=tuple(listed),
    )


def read_parts(store: Store, manifest: Manifest, seal: Seal | None = None) -> Manifest:
    """A manifest with what its parts list; itself if it has none.

    A part that isn't there is `absent`, as those of other machines are where
    each has a root of its own.

    Raises:
        CorruptError: a part isn't what was written.
        AuthenticationError: it isn't sealed with the key of `seal`.
    """
    if not manifest.parts:
        return manifest
    found: list[Manifest] = []
    absent: list[str] = []
    for rank, part in enumerate(manifest.parts):
        try:
            found.append(_open_part(store, part, manifest, rank, seal))
        except NotFoundError:
            absent.append(part.name)
    where = f"{store.root}/{layout.manifest_name(manifest.step)}"
    try:
        joined = join_parts(found)
    except (ConflictError, *NOT_AS_EXPECTED) as error:
        raise CorruptError(where, f"its parts don't fit each other ({error})") from error
    whole = replace(manifest, structure=joined.structure, tensors=joined.tensors)
    return replace(whole, absent=tuple(absent), partial=False)


def read_own(
    store: Store, manifest: Manifest, of: tuple[int, int], seal: Seal | None = None
) -> Manifest:
    """A manifest with what a rank's own part lists, `partial`; of all parts where that can't do.

    `of` is a rank and how many there are.  Its part has what it held, unless
    there were others than now, or it shared the writing with others; all of the
    structure only if the ranks' structures were alike.  Raises what `read_parts` does.
    """
    rank, size = of
    if not manifest.alike or size != len(manifest.parts):
        return read_parts(store, manifest, seal)
    try:
        own = join_parts([_open_part(store, manifest.parts[rank], manifest, rank, seal)])
    except NotFoundError:
        return read_parts(store, manifest, seal)
    return replace(manifest, structure=own.structure, tensors=own.tensors, partial=True)


def join_parts(parts: Sequence[Manifest]) -> Manifest:
    """The tensors of all parts, each row once, and one structure.

    Raises:
        ConflictError: the ranks have different things in one place.
        ValueError: rows of one name are no shards of one tensor.
    """
    rows: dict[str, TensorEntry] = {}
    for entry in (entry for part in parts for entry in part.tensors):
        rows.setdefault(entry.spec.label, entry)
    check_names([entry.spec for entry in rows.values()])
    first: dict[tuple[str, int | None], int] = {}
    for at, entry in enumerate(rows.values()):
        first.setdefault(entry.spec.tensor, at)
    structure: Json = None
    for part in parts:
        numbers = {at: first[entry.spec.tensor] for at, entry in enumerate(part.tensors)}
        own = numbered(part.structure, numbers, part.rank or 0)
        structure = own if structure is None else join(structure, own)
    tensors = tuple(rows.values())
    return Manifest(0, {"dict": []} if structure is None else structure, tensors)


def shared_structure(part: Manifest) -> Json:
    """A rank's structure with names for numbers, and without what is its own: to be compared."""
    names = [f"{entry.spec.name} {entry.spec.dtype}" for entry in part.tensors]
    return _shared(part.structure, names)


def _shared(node: Json, names: Sequence[str]) -> Json:
    ((kind, payload),) = node.items()
    if kind == "tensor":
        return {"value": {"tensor": names[payload]}}
    if kind == "rank":
        return {"ranks": []}
    if kind == "dict":
        return {kind: [[key, _shared(child, names)] for key, child in payload]}
    if kind == "object":
        return {kind: _shared(payload, names)}
    return node if kind == "value" else {kind: [_shared(child, names) for child in payload]}


def describe(conflict: ConflictError) -> str:
    """A conflict of two ranks' states, in words."""
    return f"{plain_name(conflict.path) or 'the state'}: {conflict.reason}"


def read_part(store: Store, part: Part) -> bytes:
    """A part's file, as it was committed.

    Raises:
        CorruptError: it isn't that.
    """
    where = f"{store.root}/{part.name}"
    nbytes = store.size(part.name)
    if nbytes != part.nbytes or nbytes > layout.MANIFEST_NBYTES_MAX:
        raise CorruptError(where, f"{nbytes} bytes, and not the {part.nbytes} of a part")
    data = read_all(store, part.name)
    if checksum128(data) != part.check:
        raise CorruptError(where, "it isn't the part that was committed")
    return data


def _open_part(store: Store, part: Part, world: Manifest, rank: int, seal: Seal | None) -> Manifest:
    where, data = f"{store.root}/{part.name}", read_part(store, part)
    found = unpack_manifest(data, where, seal)
    if (found.step, found.ranks, found.rank) != (world.step, world.ranks, rank):
        raise CorruptError(
            where, f"a part of step {found.step}, of rank {found.rank} of {found.ranks}"
        )
    return found
