"""How far tensors of two checkpoints moved, reading only what can differ, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gpuckpt.boxes import Box
from gpuckpt.contents import Contents, contents_of
from gpuckpt.decoded import Group, look_at_all, read_box
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import NotFoundError
from gpuckpt.manifest import Manifest
from gpuckpt.moves import Moved, compare_bytes, compare_numbers
from gpuckpt.reading import Bytes, Job
from gpuckpt.resources import Resources
from gpuckpt.restore import largest_chunk
from gpuckpt.slabs import slabs
from gpuckpt.spec import ChunkEntry
from gpuckpt.stores import Store
from gpuckpt.tensors import TensorEntry

# Of tensors that are cut into other chunks on each side, so much of each is read at a time.
_SLAB_NBYTES = 16 << 20

# A tensor's positions on both sides.
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Side:
    """One of two checkpoints: its manifest, with its parts, and where its bytes are."""

    store: Store
    manifest: Manifest


class Comparison:
    """Compares tensors of two checkpoints."""

    def __init__(
        self,
        before: Side,
        after: Side,
        resources: Resources,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`progress` is told of raw bytes of one side as they are done."""
        self._sides = before, after
        self.contents = contents_of(before.manifest), contents_of(after.manifest)
        self._resources, self._progress = resources, progress

    def equal(self, pair: Pair) -> bool:
        """Whether the manifests alone say that two tensors have the same bytes."""
        before, after = (side.shards.prints(at) for side, at in self._on_both(pair))
        return before == after

    def moves(self, pairs: Mapping[str, Pair]) -> dict[str, Moved]:
        """How far each tensor moved, by its name: pairs of one shape, whose numbers compare.

        Raises:
            NotFoundError: not all of a tensor is here.
            CorruptError: bytes aren't what was written.
        """
        for name, pair in pairs.items():
            self._check_here(name, pair)
        lying = {name: self._side_by_side(pair) for name, pair in pairs.items()}
        dtypes = {name: self._row(0, pair).spec.dtype for name, pair in pairs.items()}
        found = {name: Moved() for name, some in lying.items() if some is not None}

        def look(name: str, raws: list[Bytes]) -> tuple[str, Moved, int]:
            one, other = raws
            return name, compare_bytes(one, other, dtypes[name]), one.size

        groups = (Group(name, pair) for name, some in lying.items() for pair in some or ())
        largest = largest_chunk([row for side in self._sides for row in side.manifest.tensors])
        for name, by, nbytes in look_at_all(groups, look, self._resources, largest_nbytes=largest):
            found[name] += by
            self._progress(nbytes)
        whole = {name: self._whole(pairs[name], by) for name, by in found.items()}
        slabbed = {name: self._by_slabs(pairs[name]) for name in pairs if name not in found}
        return whole | slabbed

    def _check_here(self, name: str, pair: Pair) -> None:
        for side, (contents, at) in zip(self._sides, self._on_both(pair), strict=True):
            if lack := contents.shards.lack(at, contents.shards.spec(at).box):
                raise NotFoundError(
                    f"{name} in step {side.manifest.step} of {side.store.root}: {lack}; merge the "
                    "ranks' directories (`gpuckpt merge`), or pick other names"
                )

    def _on_both(self, pair: Pair) -> Iterator[tuple[Contents, int]]:
        return zip(self.contents, pair, strict=True)

    def _row(self, side: int, pair: Pair) -> TensorEntry:
        return self.contents[side].shards.joined(pair[side])

    def _side_by_side(
        self, pair: Pair
    ) -> list[tuple[tuple[Job, ChunkEntry], tuple[Job, ChunkEntry]]] | None:
        """The chunks of a tensor that are to be read; None if they are cut otherwise there.

        Of equal ones none is, if the manifests have the norms.
        """
        before, after = (side.shards.rows(at) for side, at in self._on_both(pair))
        if list(map(_cut, before)) != list(map(_cut, after)) or _overlap(before):
            return None
        known = self._norms(pair) is not None
        found = []
        for rows in zip(before, after, strict=True):
            jobs = [Job(s.store, row, ()) for s, row in zip(self._sides, rows, strict=True)]
            for one, other in zip(*(row.chunks for row in rows), strict=True):
                if not known or one.fingerprint != other.fingerprint:
                    found.append(((jobs[0], one), (jobs[1], other)))
        return found

    def _norms(self, pair: Pair) -> tuple[float, float] | None:
        """Both sums of squares, if the manifests have them, and all numbers are finite."""
        both = [self._row(side, pair).statistics for side in (0, 1)]
        known = [
            one.squares
            for one in both
            if one is not None and not one.not_finite and math.isfinite(one.squares)
        ]
        return (known[0], known[1]) if len(known) == 2 else None

    def _whole(self, pair: Pair, by: Moved) -> Moved:
        """With all numbers counted, and the manifests' norms, if some chunks weren't read."""
        norms, spec = self._norms(pair), self._row(0, pair).spec
        if norms is None:
            return by
        numbers = 2 if to_numpy(spec.dtype).kind == "c" else 1
        count = numbers * math.prod(spec.shape)
        return replace(by, count=count, before=norms[0], after=norms[1])

    def _by_slabs(self, pair: Pair) -> Moved:
        specs = [self._row(side, pair).spec for side in (0, 1)]
        found = Moved()
        item = max(to_numpy(spec.dtype).itemsize for spec in specs)
        for box in slabs(specs[0].shape, _SLAB_NBYTES // item):
            one, other = (
                read_box(side.store, contents.shards, at, box, self._resources)
                for side, (contents, at) in zip(self._sides, self._on_both(pair), strict=True)
            )
            if specs[0].dtype == specs[1].dtype:
                raws = [array.reshape(-1).view(np.uint8) for array in (one, other)]
                found += compare_bytes(raws[0], raws[1], specs[0].dtype)
            else:
                found += compare_numbers(one, other)
            self._progress(one.nbytes)
        return found


def _cut(row: TensorEntry) -> tuple[Box, str, list[tuple[int, int]]]:
    """How a shard lies in its tensor, and how it is cut into chunks."""
    spec = row.spec
    return spec.box, spec.dtype, [(chunk.start, chunk.nbytes) for chunk in row.chunks]


def _overlap(rows: Sequence[TensorEntry]) -> bool:
    """Whether some elements of a tensor are in several of its shards."""
    held = sum(row.spec.box.count for row in rows)
    return held > math.prod(rows[0].spec.full_shape)
