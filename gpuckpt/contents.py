"""What is in a checkpoint by the names of its leaves: tensors' rows, and plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gpuckpt.layout import segment_step
from gpuckpt.manifest import Manifest
from gpuckpt.matching import select
from gpuckpt.names import names_of
from gpuckpt.shards import Shards
from gpuckpt.structure import walk_json
from gpuckpt.tensors import TensorEntry
from gpuckpt.values import decode_value


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint's leaves by name, in the state's order.

    `leaves` has a row of the whole tensor (see `Shards.joined`) or a plain value,
    `positions` that of each tensor's first row: two names with one position are tied.
    """

    leaves: Mapping[str, Any]
    positions: Mapping[str, int]
    shards: Shards

    def only(self, names: Iterable[str] | None) -> Contents:
        """Those leaves that names or globs pick; all, if there are none.

        Raises:
            NotFoundError: one of them picks nothing.
        """
        if not names:
            return self
        chosen = select(names, list(self.leaves))
        leaves = {name: leaf for name, leaf in self.leaves.items() if name in chosen}
        positions = {name: at for name, at in self.positions.items() if name in chosen}
        return Contents(leaves, positions, self.shards)


def contents_of(manifest: Manifest) -> Contents:
    """The leaves of a manifest, which has all its parts.

    Raises:
        FormatError: its structure isn't one.
    """
    every = list(walk_json(manifest.structure))
    names, shards = names_of([path for path, _ in every]), Shards(manifest)
    leaves: dict[str, Any] = {}
    positions: dict[str, int] = {}
    for name, (_, node) in zip(names, every, strict=True):
        if "tensor" in node:
            positions[name] = shards.first(node["tensor"])
            leaves[name] = shards.joined(node["tensor"])
        else:
            leaves[name] = decode_value(node["value"])
    return Contents(leaves, positions, shards)


@dataclass(frozen=True, slots=True)
class Shared:
    """What of a checkpoint's tensors older files hold, in bytes, and how far back that goes.

    `older_nbytes` of their chunks on disk are in segments of older steps.
    `delta_nbytes` of their raw bytes are saved as deltas, for which
    `base_nbytes` on disk are read beside the chunks; `derived_nbytes` aren't
    saved, but are other tensors' elements, rounded.  `older_files` are the segments
    of other steps that must stay for it, the oldest of which is of `oldest_step`;
    `links` is the length of its longest chain of deltas.
    """

    older_nbytes: int
    delta_nbytes: int
    base_nbytes: int
    derived_nbytes: int
    older_files: int
    oldest_step: int | None
    links: int

    @classmethod
    def of(cls, tensors: Iterable[TensorEntry], step: int) -> Shared:
        """Of tensors in the checkpoint of `step`."""
        chunks = [chunk for entry in tensors for chunk in entry.chunks]
        older = (chunk for chunk in chunks if segment_step(chunk.extent.segment) != step)
        bases = (link for chunk in chunks for link in chunk.chain[1:])
        files = {link.extent.segment for chunk in chunks for link in chunk.links}
        others = {name: at for name in files if (at := segment_step(name)) not in (step, None)}
        return cls(
            older_nbytes=sum(chunk.extent.length for chunk in older),
            delta_nbytes=sum(chunk.nbytes for chunk in chunks if chunk.base is not None),
            base_nbytes=sum(link.extent.length for link in bases),
            derived_nbytes=sum(chunk.nbytes for chunk in chunks if chunk.sources),
            older_files=len(others),
            oldest_step=min((at for at in others.values() if at is not None), default=None),
            links=max((len(chunk.chain) - 1 for chunk in chunks), default=0),
        )

    def as_dict(self) -> dict[str, Any]:
        """All facts, for `--json`."""
        return asdict(self)
