"""A checkpoint's rows by tensor: what is stored of each, and what isn't."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpuckpt.boxes import Box, gap, whole_box
from gpuckpt.manifest import Manifest
from gpuckpt.spec import Spec
from gpuckpt.statistics import Statistics
from gpuckpt.tensors import TensorEntry, by_tensor


class Shards:
    """The tensors of a manifest, each by the position of any of its rows."""

    def __init__(self, manifest: Manifest) -> None:
        """`manifest` isn't changed, and its rows are referred to."""
        count = len({(spec.name, spec.rank) for spec in [row.spec for row in manifest.tensors]})
        self._groups = by_tensor(manifest.tensors) if count < len(manifest.tensors) else None
        self._tensors, self._absent = manifest.tensors, manifest.absent
        self._firsts = {
            entry.spec.tensor: at
            for at, entry in reversed(list(enumerate(manifest.tensors if self._groups else ())))
        }

    def first(self, position: int) -> int:
        """The position of the first row of the same tensor."""
        if self._groups is None:
            return position
        return self._firsts[self._tensors[position].spec.tensor]

    def rows(self, position: int) -> Sequence[TensorEntry]:
        """All rows of the tensor of which one is at `position`, in the manifest's order."""
        entry = self._tensors[position]
        return (entry,) if self._groups is None else self._groups[entry.spec.tensor]

    def spec(self, position: int, box: Box | None = None) -> Spec:
        """Of the whole tensor or a box of it; library, device and axes are its first row's."""
        first = self.rows(position)[0].spec
        if first.whole is None and box is None:
            return first
        if box is None or box == whole_box(first.full_shape):
            return replace(first, shape=first.full_shape, offset=None, whole=None)
        whole = first.full_shape
        return replace(first, shape=box.shape, axes=None, offset=box.offset, whole=whole)

    def joined(self, position: int) -> TensorEntry:
        """A row of the whole tensor, to be shown: its shards' chunks one after the other.

        It has statistics only if all shards have, and none overlap.
        """
        rows = self.rows(position)
        if len(rows) == 1:
            return rows[0]
        spec = self.spec(position)
        found = [row.statistics for row in rows if row.statistics is not None]
        apart = sum(row.spec.nbytes for row in rows) == spec.nbytes
        return TensorEntry(
            spec,
            tuple(chunk for row in rows for chunk in row.chunks),
            max(row.version for row in rows),
            sum(found, Statistics()) if apart and len(found) == len(rows) else None,
        )

    def prints(self, position: int) -> list[tuple[Box, list[str]]]:
        """What it consists of: the same for two tensors only if they have the same bytes."""
        rows = self.rows(position)
        return [(row.spec.box, [chunk.fingerprint for chunk in row.chunks]) for row in rows]

    def lack(self, position: int, box: Box) -> str | None:
        """What of a box of a tensor isn't here, in words; None if all is."""
        rows = self.rows(position)
        if len(rows) == 1 and is_whole(rows[0]):  # mostly
            own = rows[0].spec.box
            if own is box or own == box:
                return None
        missing = gap([row.spec.box for row in rows if is_whole(row)], box)
        if missing is None:
            return None
        (spec, held), *others = ((row.spec, _held(row)) for row in rows)
        if not others and held < spec.nbytes:
            return f"this data file holds only {held} of its {spec.nbytes} bytes"
        some = [row for row in rows if row.spec.nbytes]
        told = f"{missing} of it is in none of the {len(some)} shards that are here"
        if self._absent:
            told += f", and these files aren't: {', '.join(self._absent)}"
        return told


def is_whole(entry: TensorEntry) -> bool:
    """Whether a row has all bytes of its shard: of a single data file, it may not."""
    return _held(entry) == entry.spec.nbytes


def _held(entry: TensorEntry) -> int:
    chunks = entry.chunks
    return chunks[0].nbytes if len(chunks) == 1 else sum(chunk.nbytes for chunk in chunks)
