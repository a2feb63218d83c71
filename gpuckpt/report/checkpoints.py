"""The committed steps of a root: what each holds, what it refers to, and its norms by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gpuckpt.commit import open_step, steps
from gpuckpt.errors import CheckpointError
from gpuckpt.layout import segment_step
from gpuckpt.manifest import Manifest
from gpuckpt.report.layers import Layers
from gpuckpt.seal import Seal
from gpuckpt.shards import Shards
from gpuckpt.statistics import Statistics
from gpuckpt.stores import Store
from gpuckpt.tensors import TensorEntry

# Manifests that are read at most, evenly spread, the first and the last among them.
READ_MAX = 300
# Tensors that aren't finite, named at most.
NAMED_MAX = 20


@dataclass(slots=True)
class Step:
    """A committed step: bytes in memory and on disk, and what it needs of older steps' files.

    `older` are bytes on disk by the older step whose files hold them, bases of
    deltas among them; `chain` is the most chunks that are read for one.
    `not_finite` names the first tensors with NaNs or infinities, of `nans` and `infs`.
    """

    step: int
    epoch: int | None
    created: float
    metrics: dict[str, float]
    raw_nbytes: int
    encoded_nbytes: int
    tensors: int
    ranks: int
    older: dict[int, int]
    chain: int
    nans: int = 0
    infs: int = 0
    not_finite: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Bytes in memory for each byte on disk."""
        return self.raw_nbytes / self.encoded_nbytes if self.encoded_nbytes else 1.0

    def as_dict(self) -> dict[str, Any]:
        """All facts, for `--json`."""
        return {**asdict(self), "ratio": self.ratio}


@dataclass(slots=True)
class Checkpoints:
    """The steps of a root, `read` of which are in `rows`; `damaged` ones with what is wrong.

    `norms` has for each layer the norm at each step of `rows` that has one;
    `counts` how many tensors each layer has at the newest step,
    and `not_finite` what of them isn't finite.  `parts` are
    the bytes in memory and on disk of each rank at the newest step.
    """

    steps: list[int] = field(default_factory=list)
    rows: list[Step] = field(default_factory=list)
    damaged: dict[int, str] = field(default_factory=dict)
    norms: dict[str, dict[int, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    not_finite: dict[str, str] = field(default_factory=dict)
    parts: list[tuple[int, int]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for `--json`."""
        return {
            "steps": self.steps,
            "checkpoints": [row.as_dict() for row in self.rows],
            "damaged": [{"step": at, "error": told} for at, told in self.damaged.items()],
            "norms": [
                {
                    "layer": layer,
                    "tensors": self.counts.get(layer, 0),
                    "not_finite": self.not_finite.get(layer, ""),
                    "norms": points,
                }
                for layer, points in self.norms.items()
            ],
            "rank_nbytes": [list(part) for part in self.parts],
        }


def read_checkpoints(store: Store, seal: Seal | None, most: int = READ_MAX) -> Checkpoints:
    """What the manifests say, of at most so many steps; no tensor is read."""
    found = Checkpoints(steps(store))
    layers: Layers | None = None
    for step in reversed(spread(found.steps, most)):
        try:
            manifest = open_step(store, step, seal)
        except CheckpointError as error:
            found.damaged[step] = str(error)
            continue
        whole = _tensors(manifest)
        layers = layers or Layers(_names(whole))
        if not found.rows:
            found.counts = dict(Counter(map(layers.of, _names(whole))))
            if manifest.ranks > 1:
                bare = open_step(store, step, seal, parts=False)
                found.parts = [(one.raw_nbytes, one.encoded_nbytes) for one in bare.parts]
        found.rows.append(_step(manifest, whole))
        sums = _sums(whole, layers)
        for layer, one in sums.items():
            found.norms.setdefault(layer, {})[step] = one.norm
        if len(found.rows) == 1:
            found.not_finite = {layer: one.not_finite for layer, one in sums.items()}
    found.rows.reverse()
    found.norms = {
        layer: dict(sorted(points.items())) for layer, points in sorted(found.norms.items())
    }
    return found


def spread(numbers: Sequence[int], most: int) -> list[int]:
    """At most so many of some numbers, evenly spread, the first and the last among them."""
    if len(numbers) <= most:
        return list(numbers)
    last = len(numbers) - 1
    return [numbers[round(at * last / (most - 1))] for at in range(most)]


def _tensors(manifest: Manifest) -> list[TensorEntry]:
    """A row for each tensor, its shards joined."""
    shards = Shards(manifest)
    positions = range(len(manifest.tensors))
    return [shards.joined(at) for at in positions if shards.first(at) == at]


def _names(tensors: Iterable[TensorEntry]) -> list[str]:
    return [entry.spec.name for entry in tensors if entry.statistics is not None]


def _step(manifest: Manifest, tensors: Sequence[TensorEntry]) -> Step:
    chunks = [chunk for entry in manifest.tensors for chunk in entry.chunks]
    older: Counter[int] = Counter()
    for extent in {link.extent for chunk in chunks for link in chunk.links}:
        made = segment_step(extent.segment)
        if made is not None and made != manifest.step:
            older[made] += extent.length
    bad = [one for one in tensors if one.statistics is not None and one.statistics.not_finite]
    total = sum((one.statistics for one in bad if one.statistics), Statistics())
    return Step(
        *(manifest.step, manifest.epoch, manifest.created, dict(manifest.metrics)),
        *(manifest.raw_nbytes, manifest.encoded_nbytes, len(tensors), manifest.ranks),
        older=dict(sorted(older.items())),
        chain=max((len(chunk.chain) for chunk in chunks), default=0),
        nans=total.nans,
        infs=total.infs,
        not_finite={
            one.spec.name: one.statistics.not_finite for one in bad[:NAMED_MAX] if one.statistics
        },
    )


def _sums(tensors: Iterable[TensorEntry], layers: Layers) -> dict[str, Statistics]:
    sums: dict[str, Statistics] = {}
    for entry in tensors:
        if entry.statistics is not None:
            layer = layers.of(entry.spec.name)
            sums[layer] = sums.get(layer, Statistics()) + entry.statistics
    return sums
