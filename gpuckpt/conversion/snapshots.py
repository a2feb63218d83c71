"""SINGA's checkpoint directories: which files are one snapshot, and how their parameters join.

`WORKSPACE/checkpoint/stepSTEP-workerWORKER.bin` is what one worker owned; SINGA
0.2 and 0.3 leave `.bin` out.  A layer that is partitioned along its output
(`partition_dim: 1`) has a slice in each worker's file, under one name, all
slices as long; anything else is in one worker's file (`NeuralNet::CreateNetFromGraph`,
`src/neuralnet/neuralnet.cc`).  Unnamed parameters of 0.1 are called by their
layer's partition, `ip@00$`, `ip@01$`, one or more `$` at the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuckpt.conversion.blobs import FLOAT_NBYTES, Param, read_params
from gpuckpt.conversion.checksums import SUFFIX
from gpuckpt.conversion.window import Run, Window
from gpuckpt.errors import CorruptError, MismatchError, NotFoundError
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.refusals import told

_FILE = re.compile(r"(?:.*-)?step([0-9]{1,10})-worker([0-9]{1,6})(?:\.bin)?", re.ASCII)
_PARTITION = re.compile(r"@([0-9]{1,6})(\$+)$", re.ASCII)
_COPY = "bring all files of the step together"


def file_name(step: int, worker: int) -> str:
    """What a worker's file of a step is called."""
    return f"step{step}-worker{worker}.bin"


def checksums_name(step: int) -> str:
    """What the file of a step's checksums is called, which lies beside the workers' files."""
    return f"step{step}{SUFFIX}"


def parse_file_name(name: str) -> tuple[int, int] | None:
    """The step and the worker of a file; None if it is called otherwise."""
    found = _FILE.fullmatch(name)
    return None if found is None else (int(found[1]), int(found[2]))


@dataclass(frozen=True, slots=True)
class Joined:
    """A parameter as it was before it was partitioned: `pieces`, along `axis`."""

    name: str
    shape: tuple[int, ...]
    axis: int
    pieces: tuple[Param, ...]

    @property
    def version(self) -> int | None:
        """The newest of its pieces', which in a step are the same unless SINGA ran on meanwhile."""
        return max((one.version for one in self.pieces if one.version is not None), default=None)

    def runs(self) -> Iterator[Run]:
        """Where its floats are, in C order."""
        inner = [math.prod(piece.shape[self.axis :]) for piece in self.pieces]
        for at in range(math.prod(self.shape[: self.axis]) if sum(inner) else 0):
            for piece, count in zip(self.pieces, inner, strict=True):
                yield from piece.cut(at * count, count)


def files_of(folder: Path) -> dict[int, dict[int, str]]:
    """The names of all files by step, and by worker; none if it is no directory.

    Raises:
        CorruptError: two files are one worker's at one step.
    """
    found: dict[int, dict[int, str]] = {}
    if not folder.is_dir():
        return found
    with told(folder, "list"):
        names = sorted(path.name for path in folder.iterdir())
    for name in names:
        if (both := parse_file_name(name)) is None:
            continue
        step, worker = both
        other = found.setdefault(step, {}).setdefault(worker, name)
        if other != name:
            raise CorruptError(
                str(folder),
                f"{other} and {name} are both of step {step} and worker {worker}",
                "move the one that isn't meant elsewhere",
            )
    return found


def read_snapshot(
    folder: Path, files: Mapping[int, str], axes: Mapping[str, int] | None = None
) -> list[Joined]:
    """The parameters of one step, whole: `files` are its files' names by worker.

    They are joined along axis 0, or along what `axes` says by name.

    Raises:
        NotFoundError: a worker's file isn't there, or a parameter that `axes` names.
        CorruptError: a file isn't what it should be.
        MismatchError: slices don't fit each other.
    """
    for worker in range(max(files) + 1):
        if worker not in files:
            raise NotFoundError(f"{folder}: the file of worker {worker} isn't there; {_COPY}")
    store = LocalStore(folder)
    pieces: dict[str, dict[int, Param]] = {}
    for worker in sorted(files):
        for param in read_params(Window(store, files[worker])):
            # Of one name twice in one file SINGA takes the later one.
            pieces.setdefault(param.name, {})[worker] = param
    pieces = _without_partitions(pieces)
    if unknown := sorted(set(axes or {}) - set(pieces)):
        raise NotFoundError(f"{folder}: no parameter is called {', '.join(unknown)} (of axes)")
    return [
        _joined(folder, name, found, len(files), (axes or {}).get(name, 0))
        for name, found in pieces.items()
    ]


def _without_partitions(
    pieces: dict[str, dict[int, Param]],
) -> dict[str, dict[int, Param]]:
    """`ip@00$` of worker 0 and `ip@01$` of worker 1 as `ip$` of both; a single one as it is."""
    groups: dict[str, dict[int, str]] = {}
    for name, found in pieces.items():
        match = _PARTITION.search(name)
        if match is not None and list(found) == [int(match[1])]:
            groups.setdefault(name[: match.start()] + match[2], {})[int(match[1])] = name
    taken: dict[str, str] = {}
    for base, names in groups.items():
        if len(names) > 1 and base not in pieces:
            taken |= dict.fromkeys(names.values(), base)
    joined: dict[str, dict[int, Param]] = {}
    for name, found in pieces.items():
        joined.setdefault(taken.get(name, name), {}).update(found)
    return joined


def _joined(folder: Path, name: str, found: Mapping[int, Param], workers: int, axis: int) -> Joined:
    pieces = [found[worker] for worker in sorted(found)]
    first = pieces[0].shape
    if len(pieces) == 1:
        return Joined(name, first, 0, tuple(pieces))
    if len(pieces) != workers:
        raise CorruptError(
            f"{name} in {folder}",
            f"workers {', '.join(map(str, sorted(found)))} of {workers} have a slice of it",
            _COPY,
        )
    _check_fit(folder, name, pieces, axis)
    extent = sum(piece.shape[axis] for piece in pieces)
    return Joined(name, (*first[:axis], extent, *first[axis + 1 :]), axis, tuple(pieces))


def _check_fit(folder: Path, name: str, pieces: Sequence[Param], axis: int) -> None:
    shapes = [piece.shape for piece in pieces]
    rest = {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
    if len(rest) > 1 or min(map(len, shapes)) <= axis or axis < 0:
        raise MismatchError(
            f"{folder}: the slices of {name} can't be joined along axis {axis}",
            mismatched=[f"worker {worker}: {shape}" for worker, shape in enumerate(shapes)],
            hint="see that all files are of one run, and name the axis that was partitioned",
        )


def float_nbytes(shape: Sequence[int]) -> int:
    """Bytes of the floats of a parameter."""
    return math.prod(shape) * FLOAT_NBYTES
