"""What conversion needs of a format: the nouns, and the port that each format implements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpuckpt.conversion.checksums import Checksums, Noted
from gpuckpt.conversion.standing import Standing
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import CorruptError
from gpuckpt.matching import select
from gpuckpt.names import names_of
from gpuckpt.seal import Seal
from gpuckpt.spec import Spec
from gpuckpt.structure import walk_json
from gpuckpt.values import Json, encode_value

# No part of a tensor that is read is longer, but for an element that is.
PART_NBYTES = 4 << 20
# Of a shard of a format that has several files, as others have them.
SHARD_NBYTES = 5 * 10**9
# Text that libraries which check it ask for, and torch's writer of safetensors puts there.
PLAIN_FORMAT = {"format": "pt"}

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Outline:
    """Everything that a source holds, but for the tensors' bytes.

    `structure` is the state's tree as a manifest has it (`structure`): its
    tensors are positions in `specs`, where each array is once, under its first
    name, whole.  One array under two names is one position in two places.
    `metadata` is text that belongs to no tensor.  `left_out` says, in
    sentences, what of the source isn't in here.  `noted` are the checksums that
    stand with the source, as they do.
    """

    structure: Json
    specs: tuple[Spec, ...]
    step: int | None = None
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    noted: tuple[Noted, ...] = ()

    @cached_property
    def leaves(self) -> dict[str, Json]:
        """Every leaf's node by its name, in the structure's order: tensors and plain values."""
        every = list(walk_json(self.structure))
        return dict(zip(names_of([path for path, _ in every]), (n for _, n in every), strict=True))

    @cached_property
    def tensors(self) -> dict[str, int]:
        """The position of each tensor by name; of one array under two names, both."""
        return {name: node["tensor"] for name, node in self.leaves.items() if "tensor" in node}

    @cached_property
    def values(self) -> dict[str, Json]:
        """The plain values by name, as `values.encode_value` writes them."""
        return {name: node["value"] for name, node in self.leaves.items() if "value" in node}

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Further names of arrays that have several, each with the first."""
        first: dict[int, str] = {}
        found = {name: first.setdefault(at, name) for name, at in self.tensors.items()}
        return {name: own for name, own in found.items() if name != own}

    @property
    def is_flat(self) -> bool:
        """Whether it is a dict of arrays by name, each of its own, and nothing else."""
        return bool(self.structure == flat_structure([spec.name for spec in self.specs]))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, each once."""
        return sum(spec.nbytes for spec in self.specs)

    def named(self) -> Outline:
        """The same, each array under the first name that it has here; what is in no place is left.

        For who makes an outline of names that needn't be those of the structure.
        """
        first = {at: name for name, at in reversed(self.tensors.items())}
        every = enumerate(self.specs)
        return replace(self, specs=tuple(replace(one, name=first[at]) for at, one in every))

    def with_left_out(self, more: Sequence[str]) -> Outline:
        """The same, with further sentences of what isn't in here."""
        return replace(self, left_out=(*self.left_out, *more))

    def picked(self, names: Sequence[str]) -> tuple[Outline, list[int]]:
        """Only some leaves, by names or globs, as a flat dict; and where its tensors are in this.

        Raises:
            NotFoundError: a name picks nothing.
        """
        chosen = select(names, list(self.leaves))
        nodes = {name: node for name, node in self.leaves.items() if name in chosen}
        wanted = {
            node["tensor"]: name for name, node in reversed(nodes.items()) if "tensor" in node
        }
        order = sorted(wanted)
        numbers = {at: number for number, at in enumerate(order)}
        specs = tuple(replace(self.specs[at], name=wanted[at]) for at in order)
        rows = [[encode_value(name), _renumbered(node, numbers)] for name, node in nodes.items()]
        return replace(self, structure={"dict": rows}, specs=specs), order


def flat_structure(names: Sequence[str]) -> Json:
    """The structure of a dict of arrays by name, the first of which is at position 0."""
    return {"dict": [[encode_value(name), {"tensor": at}] for at, name in enumerate(names)]}


def _renumbered(node: Json, numbers: Mapping[int, int]) -> Json:
    return {"tensor": numbers[node["tensor"]]} if "tensor" in node else node


class Source(Protocol):
    """A checkpoint of any format that is open for reading, by one thread."""

    @property
    def outline(self) -> Outline:
        """What is in it."""
        ...

    def read(self, position: int) -> Iterator[memoryview]:
        """The bytes of the tensor at `position` of the outline's specs, in C order, part by part.

        Each part is uint8, contiguous, a whole number of elements and at most
        `PART_NBYTES` long (one element, if that is longer), and is valid until
        the next one is asked for.  Of a tensor without bytes there are none.
        Tensors are asked for in any order, mostly once.

        Raises:
            CorruptError: the bytes aren't what was written, as far as the format can tell.
        """
        ...


def read_whole(source: Source, position: int) -> npt.NDArray[Any]:
    """A tensor as a new array, in C order: for formats that can't be written part by part."""
    spec = source.outline.specs[position]
    array = np.empty(spec.shape, to_numpy(spec.dtype))
    room, at = array.reshape(-1).view(np.uint8), 0
    for part in source.read(position):
        room[at : at + part.nbytes] = np.frombuffer(part, np.uint8)
        at += part.nbytes
    if at != spec.nbytes:
        raise CorruptError(spec.label, f"{at} bytes came, {spec.nbytes} were expected")
    return array


def parts_of(raw: Bytes, item_nbytes: int) -> Iterator[memoryview]:
    """Bytes in parts of whole elements, as long as a source may give them."""
    step = max(PART_NBYTES // item_nbytes, 1) * item_nbytes
    for first in range(0, raw.size, step):
        yield raw[first : first + step].data


@dataclass(frozen=True)
class Options:
    """What a conversion was asked for, as far as a format may care.

    `step` is that of a root to read or to write.  `shard_nbytes` bounds the
    data of one file where a format has several, and None asks for one file where it
    may be one.  `force` lets a target be replaced, which is `standing`, if it has been
    looked at.  `seal` is what a source must be sealed with, `target_seal` what seals a
    target.  `checksums` gives those of the tensors that were read so far, by all of their
    names, for a target to have; None if it is to have none.  `workers` is into how many
    files' slices SINGA's parameters are cut, and `axes` along which axis, by name, they
    are or were.
    """

    step: int | None = None
    shard_nbytes: int | None = None
    codec: str = "auto"
    memory: int | str = "128 MiB"
    force: bool = False
    seal: Seal | None = None
    target_seal: Seal | None = None
    standing: Standing | None = None
    checksums: Checksums | None = None
    workers: int | None = None
    axes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A format: how it is recognised, read and written.

    `recognises` says whether what is at a path (or URL) is of it, and `suits`
    whether a path that isn't there yet reads as one of it.  `open` opens a
    source.  `lost` lists in sentences what of an outline a target can't hold beside the
    tensors; a tensor that can't be held raises `UnsupportedError` with its name.
    `write` makes a target out of a source, all or nothing, durable on return
    (see `placing`); it asks for each tensor once, and returns the step that it
    wrote, if it numbers them.  Either may be missing.  With `checks`, each byte that
    is read is compared with check values of the format's own.
    """

    name: str
    recognises: Callable[[str], bool]
    suits: Callable[[str], bool]
    open: Callable[[str, Options], AbstractContextManager[Source]] | None = None
    lost: Callable[[Outline], Sequence[str]] = lambda _: ()
    write: Callable[[str, Source, Options], object] | None = None
    checks: bool = False
