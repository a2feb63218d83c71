"""What the numbers of a checkpoint's tensors are like, by reading them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.apart import Apart
from gpuckpt.contents import Contents
from gpuckpt.decoded import Group, look_at_all, read_box
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import NotFoundError
from gpuckpt.moves import are_numbers
from gpuckpt.reading import Bytes, Job
from gpuckpt.resources import Resources
from gpuckpt.restore import largest_chunk
from gpuckpt.slabs import slabs
from gpuckpt.spec import Spec
from gpuckpt.statistics import Statistics
from gpuckpt.stores import Store

_BLOCK = 1 << 16
_SLAB_NBYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Summary:
    """Of `count` numbers: what isn't finite, how many are zero, and the finite ones' range.

    A complex number counts as two.  `total` is the sum of the finite ones.
    """

    count: int = 0
    statistics: Statistics = Statistics()  # noqa: RUF009 (frozen)
    zeros: int = 0
    lowest: float = math.inf
    highest: float = -math.inf
    total: float = 0.0

    def __add__(self, other: Summary) -> Summary:
        return Summary(
            self.count + other.count,
            self.statistics + other.statistics,
            self.zeros + other.zeros,
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
            self.total + other.total,
        )

    @property
    def mean(self) -> float | None:
        """Of the finite numbers; None if there are none."""
        finite = self.count - self.statistics.nans - self.statistics.infs
        return self.total / finite if finite else None

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        some = self.mean is not None
        return {
            "norm": self.statistics.norm,
            "nans": self.statistics.nans,
            "infs": self.statistics.infs,
            "zeros": self.zeros,
            "min": self.lowest if some else None,
            "max": self.highest if some else None,
            "mean": self.mean,
        }


def summarize(raw: Bytes, dtype: str) -> Summary:
    """Look at each number of a few bytes: uint8, contiguous, whole elements of a number type."""
    numbers: npt.NDArray[Any] = raw.view(to_numpy(dtype))
    if numbers.dtype.kind == "c":
        byteorder, half = numbers.dtype.byteorder, numbers.dtype.itemsize // 2
        numbers = numbers.view(np.dtype(f"{byteorder}f{half}"))
    found = Summary()
    with np.errstate(all="ignore"):  # a signalling NaN is no error here
        for at in range(0, numbers.size, _BLOCK):
            found += _of_block(numbers[at : at + _BLOCK].astype(np.float64))
    return found


def count(
    store: Store,
    contents: Contents,
    names: Iterable[str],
    *,
    memory: int | str = "256 MiB",
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Summary]:
    """Read tensors, and say of each what its numbers are like; not of those of no numbers.

    Takes at most `memory` of host memory.  `progress` is told of raw bytes.

    Raises:
        NotFoundError: not all of a tensor is here.
        CorruptError: bytes aren't what was written.
    """
    chosen = [name for name in names if name in contents.positions]
    work = _Count(store, contents, Resources(memory), progress)
    return Apart(lambda: work.run(chosen)).run()


class _Count:
    """The work of one `count`."""

    def __init__(
        self,
        store: Store,
        contents: Contents,
        resources: Resources,
        progress: Callable[[int], None],
    ) -> None:
        self._store, self._contents = store, contents
        self._resources, self._progress = resources, progress

    def run(self, names: Iterable[str]) -> dict[str, Summary]:
        positions, shards = self._contents.positions, self._contents.shards
        specs = {positions[name]: self._contents.leaves[name].spec for name in names}
        specs = {at: spec for at, spec in specs.items() if are_numbers(spec.dtype)}
        for at, spec in specs.items():
            if lack := shards.lack(at, spec.box):
                raise NotFoundError(f"{spec.name}: {lack}; pick other names")
        held = {at: sum(row.spec.nbytes for row in shards.rows(at)) for at in specs}
        alone = {at: spec for at, spec in specs.items() if held[at] == spec.nbytes}
        found = self._by_chunks(alone)
        for at in specs.keys() - alone.keys():
            found[at] = self._by_slabs(at, specs[at])
        return {name: found[at] for name, at in positions.items() if at in found}

    def _by_chunks(self, specs: Mapping[int, Spec]) -> dict[int, Summary]:
        """Of tensors each element of which is in one shard."""
        rows = [(at, row) for at in specs for row in self._contents.shards.rows(at)]
        groups = (
            Group(at, ((Job(self._store, row, ()), chunk),))
            for at, row in rows
            for chunk in row.chunks
        )

        def look(at: int, raws: list[Bytes]) -> tuple[int, Summary, int]:
            (raw,) = raws
            return at, summarize(raw, specs[at].dtype), raw.size

        found = dict.fromkeys(specs, Summary())
        largest = largest_chunk([row for _, row in rows])
        looks = look_at_all(groups, look, self._resources, largest_nbytes=largest)
        for at, summary, nbytes in looks:
            found[at] += summary
            self._progress(nbytes)
        return found

    def _by_slabs(self, at: int, spec: Spec) -> Summary:
        found = Summary()
        for box in slabs(spec.shape, _SLAB_NBYTES // to_numpy(spec.dtype).itemsize):
            array = read_box(self._store, self._contents.shards, at, box, self._resources)
            found += summarize(array.reshape(-1).view(np.uint8), spec.dtype)
            self._progress(array.nbytes)
        return found


def _of_block(numbers: npt.NDArray[np.float64]) -> Summary:
    finite = numbers[np.isfinite(numbers)]
    others = numbers.size - finite.size
    nans = int(np.count_nonzero(np.isnan(numbers))) if others else 0
    return Summary(
        numbers.size,
        Statistics(nans, others - nans, float(np.einsum("i,i->", finite, finite))),
        numbers.size - int(np.count_nonzero(numbers)),
        float(finite.min(initial=math.inf)),
        float(finite.max(initial=-math.inf)),
        float(finite.sum()),
    )
