"""Bits flipped on the disk, and what each way to read a checkpoint says of them."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpuckpt
from bench.durability.flip_states import MEMORY, Root, exact, kind_of, leaf_of, names_in, some_bit
from bench.durability.outcomes import FOUND, RIGHT, Outcome
from gpuckpt import layout
from gpuckpt.errors import CheckpointError
from gpuckpt.repair import repair
from gpuckpt.resources import Resources
from gpuckpt.spec import Extent
from gpuckpt.stores.local import LocalStore
from gpuckpt.verify import Damage, verify_step

VERIFY_EVERY = 8  # of the flips in chunks: it reads all


@dataclass(frozen=True, slots=True)
class Place:
    """Some bytes of a file, and the tensors of one step that are made of them, if any are."""

    kind: str
    file: str
    begin: int
    end: int
    step: int
    tensors: frozenset[str] = frozenset()


def places(root: Root) -> dict[str, list[Place]]:
    """What a root's files consist of, by kind."""
    found: dict[str, list[Place]] = {}
    for place in (*_chunks(root), *_frames(root)):
        found.setdefault(place.kind, []).append(place)
    return found


def _chunks(root: Root) -> Iterator[Place]:
    for step, manifest in root.manifests.items():
        users: dict[Extent, set[str]] = {}
        kinds: dict[Extent, list[str]] = {}
        for entry in manifest.tensors:
            for chunk in entry.chunks:
                for link in chunk.links:
                    if link.extent.length:
                        users.setdefault(link.extent, set()).add(entry.spec.name)
                        kinds.setdefault(link.extent, []).append(kind_of(chunk, link))
        for extent, names in users.items():
            end = extent.offset + extent.length
            older = layout.segment_step(extent.segment) != step
            for kind in set(kinds[extent]):
                told = (
                    "an unchanged chunk of an older step" if (older and kind == "a chunk") else kind
                )
                yield Place(told, extent.segment, extent.offset, end, step, frozenset(names))


def _frames(root: Root) -> Iterator[Place]:
    """Headers, indices, trailers, manifests."""
    for step, manifest in root.manifests.items():
        name = layout.manifest_name(step)
        nbytes = (root.path / name).stat().st_size
        head = layout.MANIFEST_HEAD_NBYTES
        yield Place("a manifest's head", name, 0, head, step)
        yield Place("a manifest's body", name, head, nbytes, step)
        for file in manifest.segments:
            if layout.segment_step(file) == step:
                yield from _segment(root.path / file, step)


def _segment(path: Path, step: int) -> Iterator[Place]:
    data = path.read_bytes()
    end = len(data) - layout.TRAILER.size
    index = layout.unpack_trailer(data[end:], path.name).offset
    header, padding = layout.HEADER.size, 12
    yield Place("a header", path.name, 0, padding, step)
    yield Place("a header's padding", path.name, padding, header, step)
    yield Place("an index", path.name, index, end, step)
    yield Place("a trailer", path.name, end, end + 44, step)
    yield Place("a trailer's padding", path.name, end + 44, end + 56, step)
    yield Place("a trailer", path.name, end + 56, len(data), step)


def flip_file(root: Root, place: Place, rng: random.Random, at: int) -> Outcome:
    """Flip a bit, read in every way, and put it back."""
    byte, bit = some_bit(rng, place.begin, place.end)
    told = f"{root.codec}: bit {bit} of byte {byte} of {place.file}, step {place.step}"
    _flip(root.path / place.file, byte, bit)
    try:
        if place.tensors:
            fault = _of_chunk(root, place, rng, verified=at % VERIFY_EVERY == 0)
            verdict = FOUND
        elif place.kind.startswith("a manifest"):
            fault, verdict = _of_manifest(root, place), FOUND
        else:
            fault, verdict = _of_frame(root, place), RIGHT
    finally:
        _flip(root.path / place.file, byte, bit)
    return Outcome(place.kind, verdict, "" if fault is None else f"{told}: {fault}")


def _of_chunk(root: Root, place: Place, rng: random.Random, *, verified: bool) -> str | None:
    """It is found in the step that is made of it, and blamed on a tensor; all others are right."""
    fault = _blame(lambda: gpuckpt.load(root.path, place.step), place)
    if fault is not None:
        return fault
    wanted = root.wanted[place.step]
    others = sorted(set(names_in(wanted)) - place.tensors)
    name = rng.choice(others)
    found = gpuckpt.load(root.path, place.step, names=[name])
    if not exact(found[name], leaf_of(wanted, name)):
        return f"{name}, which isn't damaged, comes back wrong"
    if rng.random() < 0.25 and layout.segment_step(place.file) == place.step:
        fault = _blame(lambda: gpuckpt.load(root.path / place.file), place, alone=True)
    if rng.random() < 0.25 and fault is None:
        fault = _falls_back(root, place.step)
    if rng.random() < 0.05 and fault is None:
        fault = _salvaged(root, place)
    if verified and fault is None:
        damage = _verify(root, place.step)
        if {one.tensor for one in damage} != place.tensors:
            return f"verify blames {sorted(one.tensor for one in damage)}"
    return fault


def _falls_back(root: Root, step: int) -> str | None:
    """With `fallback`, an older step comes back, whole, or nothing."""
    try:
        found = gpuckpt.load(root.path, step, fallback=True)
    except gpuckpt.CorruptError:
        return None
    older = (root.wanted[one] for one in root.wanted if one < step)
    return None if any(exact(found, one) for one in older) else "fallback takes what no step was"


def _salvaged(root: Root, place: Place) -> str | None:
    """`repair` brings every tensor but those that are damaged, bit for bit."""
    with tempfile.TemporaryDirectory() as name:
        done = repair(root.store, place.step, LocalStore(name), memory=MEMORY)
        found, wanted = gpuckpt.load(name), root.wanted[place.step]
        lost = {one.entry.spec.name for one in done.lost}
        if not lost <= place.tensors or not place.tensors <= lost | done.found.recovered.keys():
            return f"repair says that {sorted(lost)} are lost"
        for one in set(names_in(wanted)) - lost:
            if not exact(leaf_of(found, one), leaf_of(wanted, one)):
                return f"repair brings {one} wrong"
    return None


def _blame(read: Any, place: Place, *, alone: bool = False) -> str | None:
    """See that reading raises an error that names a tensor, the file and the offset."""
    try:
        read()
    except gpuckpt.CorruptError as error:
        named = any(error.where.startswith((f"{one} in ", f"{one} (")) for one in place.tensors)
        where = f"{place.file} at offset {place.begin}"
        return None if named and where in error.where else f"blamed on {error.where}"
    except gpuckpt.NotFoundError:
        if alone:
            return None  # a data file has only a part of some tensors
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was found"


def _of_manifest(root: Root, place: Place) -> str | None:
    try:
        gpuckpt.load(root.path, place.step)
    except (gpuckpt.CorruptError, gpuckpt.FormatError) as error:
        if place.file not in str(error):
            return f"unclear: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    else:
        return "nothing was found"
    return None if _verify(root, place.step) else "verify finds nothing"


def _of_frame(root: Root, place: Place) -> str | None:
    """Restoring doesn't need it; `verify` and reading the file alone do, but for padding."""
    if not exact(gpuckpt.load(root.path, place.step), root.wanted[place.step]):
        return "the step comes back wrong"
    reported = [one for one in _verify(root, place.step) if one.file == place.file]
    padding = place.kind.endswith("padding")
    if bool(reported) == padding:
        return "verify reports it" if padding else "verify finds nothing"
    try:
        gpuckpt.load(root.path / place.file)
    except gpuckpt.NotFoundError:
        return None
    except CheckpointError as error:
        clear = place.file in str(error) and not padding
        return None if clear else f"the file alone: {error}"
    return None if padding else "the file alone is read all the same"


def _verify(root: Root, step: int) -> list[Damage]:
    return verify_step(root.store, step, Resources(MEMORY))


def _flip(path: Path, byte: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        (value,) = file.read(1)
        file.seek(byte)
        file.write(bytes([value ^ bit]))
