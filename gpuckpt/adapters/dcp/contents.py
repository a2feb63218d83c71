"""A checkpoint as DCP sees it: what is under which fully qualified name.

The names are those that DCP's planners give to a state of the same structure:
paths joined by dots, through dicts, and through lists that hold tensors or
dicts.  So DCP reads what a `Checkpointer` has saved, too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from gpuckpt.boxes import Box
from gpuckpt.errors import CorruptError, NotFoundError, UnsupportedError
from gpuckpt.manifest import Manifest
from gpuckpt.shards import Shards
from gpuckpt.structure import DEPTH_LIMIT, Path, from_json, of_rank, split_node
from gpuckpt.tensors import TensorEntry
from gpuckpt.values import Json, decode_value

log = logging.getLogger("gpuckpt")


@dataclass(frozen=True, slots=True)
class Leaf:
    """One thing that DCP reads: a tensor, at `position` in the manifest, or an object.

    An object is `value`, or, if it is `opaque`, in the bytes of the tensor.
    """

    path: Path
    position: int | None = None
    value: Any = None
    opaque: bool = False


class Contents:
    """The leaves of a checkpoint, by name."""

    def __init__(self, manifest: Manifest, where: str, rank: int = 0) -> None:
        """`rank` is whose own things are taken of what each rank has of its own.

        Raises:
            NotFoundError: some of the checkpoint is elsewhere.
            UnsupportedError: two things have one name.
        """
        if manifest.absent:
            raise NotFoundError(
                f"{where} lacks {', '.join(manifest.absent[:5])}, which other machines have; "
                "bring all files of the checkpoint together"
            )
        self.where = where
        self._shards = Shards(manifest)
        self._tensors = manifest.tensors
        self.leaves: dict[str, Leaf] = {}
        for leaf in self._walk(of_rank(manifest.structure, rank) or {"dict": []}, (), 0):
            name = ".".join(map(str, leaf.path))
            if name in self.leaves:
                raise UnsupportedError(name, f"two things in {where} have this name for DCP")
            self.leaves[name] = leaf

    def metadata(self) -> Metadata:
        """What DCP's planners want to know.  Tensors of types that torch lacks are left out."""
        described: dict[str, Any] = {}
        for name, leaf in self.leaves.items():
            if leaf.position is None or leaf.opaque:
                described[name] = BytesStorageMetadata()
                continue
            found = self._describe(leaf.position)
            if found is None:
                log.warning("%s in %s is of a type that torch lacks", name, self.where)
            else:
                described[name] = found
        paths = {name: self.leaves[name].path for name in described}
        return Metadata(state_dict_metadata=described, planner_data=paths)

    def leaf(self, name: str) -> Leaf:
        """What has a name.

        Raises:
            NotFoundError: nothing has.
        """
        try:
            return self.leaves[name]
        except KeyError:
            raise NotFoundError(f"{self.where}: there is no {name}") from None

    def row(self, leaf: Leaf, offset: Sequence[int] | None, box: Box) -> TensorEntry:
        """The stored shard at an `offset` (any) that has all of a box of the whole tensor.

        Raises:
            CorruptError: none has.
        """
        assert leaf.position is not None
        rows = self._shards.rows(leaf.position)
        wanted = None if offset is None else tuple(offset)
        for row in rows:
            own = row.spec.box
            if wanted in (None, own.offset) and (own & box) == box:
                return row
        name = rows[0].spec.name
        raise CorruptError(f"{name} in {self.where}", f"no shard at {wanted} has {box}")

    def bytes_row(self, leaf: Leaf) -> TensorEntry:
        """The row of an object's bytes."""
        assert leaf.position is not None
        return self._tensors[leaf.position]

    def _describe(self, position: int) -> TensorStorageMetadata | None:
        rows = self._shards.rows(position)
        dtype = getattr(torch, rows[0].spec.dtype, None)
        if not isinstance(dtype, torch.dtype):
            return None
        chunks = [
            ChunkStorageMetadata(torch.Size(row.spec.box.offset), torch.Size(row.spec.shape))
            for row in rows
        ]
        size = torch.Size(rows[0].spec.full_shape)
        return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)

    def _walk(self, node: Json, path: Path, depth: int) -> Iterator[Leaf]:
        kind, payload = split_node(node, depth)
        if kind == "tensor":
            yield Leaf(path, payload)
        elif kind == "value":
            yield Leaf(path, value=decode_value(payload))
        elif kind == "object" and self._is_opaque(payload):
            yield Leaf(path, payload["tensor"], opaque=True)
        elif kind == "object":
            yield from self._walk(payload, path, depth + 1)
        elif kind == "dict":
            for key, child in payload:
                yield from self._walk(child, (*path, str(decode_value(key))), depth + 1)
        elif _is_terminal(node, depth):
            yield Leaf(path, value=from_json(node))
        else:
            for at, child in enumerate(payload):
                yield from self._walk(child, (*path, at), depth + 1)

    def _is_opaque(self, payload: Json) -> bool:
        """Whether an object is there as bytes: no state_dict of others' gives an array."""
        kind, position = split_node(payload, DEPTH_LIMIT)
        return kind == "tensor" and self._tensors[position].spec.dtype == "uint8"


def _is_terminal(node: Json, depth: int) -> bool:
    """Whether DCP has a list as one object: with no tensor and no dict in it."""
    kind, payload = split_node(node, depth)
    if kind in ("list", "tuple"):
        return all(_is_terminal(child, depth + 1) for child in payload)
    return kind == "value"
