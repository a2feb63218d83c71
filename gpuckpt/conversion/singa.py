"""Apache SINGA's checkpoints: `snapshots` has the files, `blobs` their bytes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuckpt.conversion.blobs import (
    DIMENSION_MAX,
    NAME_NBYTES_MAX,
    encode_blob_head,
    encode_head,
)
from gpuckpt.conversion.checksums import Noted, check_ours, read_checksums, write_checksums
from gpuckpt.conversion.flat import is_text, lost_but_arrays
from gpuckpt.conversion.placing import new_directory, new_file, path_of, put_checksums
from gpuckpt.conversion.port import (
    PART_NBYTES,
    Format,
    Options,
    Outline,
    Source,
    flat_structure,
)
from gpuckpt.conversion.snapshots import (
    Joined,
    checksums_name,
    file_name,
    files_of,
    float_nbytes,
    parse_file_name,
    read_snapshot,
)
from gpuckpt.conversion.window import gather
from gpuckpt.errors import InvalidError, NotFoundError, UnsupportedError
from gpuckpt.sizes import format_nbytes
from gpuckpt.spec import Spec
from gpuckpt.stores import Appender
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.opening import is_local, is_url
from gpuckpt.values import parse_json

# What SINGA reads at most: `SetTotalBytesLimit` in its `ReadProtoFromBinaryFile`.
FILE_NBYTES_MAX = 512 << 20
# What of that is left for names and shapes.
_HEADS_NBYTES = 8 << 20
_WORKERS_MAX = 1 << 10
# The text that has the versions of parameters, where they aren't the step.
VERSIONS = "singa.versions"


class SingaSource:
    """A snapshot that is open for reading: all workers' files of one step."""

    def __init__(self, params: Sequence[Joined], step: int, noted: tuple[Noted, ...] = ()) -> None:
        """Nothing is read of the parameters' floats yet."""
        self._params = params
        versions = {one.name: one.version for one in params if one.version not in (None, step)}
        self.outline = Outline(
            flat_structure([one.name for one in params]),
            tuple(Spec(one.name, "float32", one.shape) for one in params),
            step=step,
            metadata={VERSIONS: json.dumps(versions)} if versions else {},
            noted=noted,
        )

    def read(self, position: int) -> Iterator[memoryview]:
        """The floats of a parameter; the files have nothing to check them by."""
        nbytes = self.outline.specs[position].nbytes
        return gather(self._params[position].runs(), nbytes, PART_NBYTES)


@contextlib.contextmanager
def open_singa(at: str, options: Options) -> Iterator[SingaSource]:
    """A snapshot: the newest of a directory unless `options` name a step, or a file's.

    Parameters that were partitioned are joined along axis 0, or along what their
    `axes` say by name: the files don't tell (`transpose: true` makes it 1).

    Raises:
        NotFoundError: there is no such snapshot, or a worker's file of it is missing, or a
            parameter that `axes` name.
        CorruptError: a file isn't what it should be.
    """
    path = path_of(at)
    folder = _folder(path)
    files = files_of(folder)
    own = parse_file_name(path.name) if path.is_file() else None
    step = options.step if own is None else own[0]
    step = max(files, default=None) if step is None else step
    if step is None or step not in files:
        there = f"; there are {', '.join(map(str, sorted(files)))}" if files else ""
        raise NotFoundError(f"{folder}: there is no SINGA checkpoint of step {step}{there}")
    noted = read_checksums(LocalStore(folder), checksums_name(step))
    yield SingaSource(read_snapshot(folder, files[step], options.axes), step, noted)


def _folder(path: Path) -> Path:
    """Where the files are: a directory, what is `checkpoint` in it, or the one of a file."""
    if path.is_file():
        return path.parent
    below = path / "checkpoint"
    return below if not files_of(path) and files_of(below) else path


def lost_in_singa(outline: Outline) -> list[str]:
    """Whatever isn't float32 by name."""
    for name, at in outline.tensors.items():
        spec = outline.specs[at]
        if spec.dtype != "float32":
            raise UnsupportedError(
                name, f"SINGA's files hold float32 alone, and this is {spec.dtype}"
            )
        if max(spec.shape, default=0) > DIMENSION_MAX:
            raise UnsupportedError(name, f"SINGA's extents are int32, and it is {spec.shape}")
        if len(name.encode("utf-8", "surrogatepass")) > NAME_NBYTES_MAX or not is_text(name):
            raise UnsupportedError(
                name, f"a name is UTF-8 of at most {NAME_NBYTES_MAX} bytes; rename it"
            )
    return lost_but_arrays(outline, text={VERSIONS})


def write_singa(at: str, source: Source, options: Options) -> None:
    """Write a snapshot: a directory, or one file if `at` is called like a worker's.

    There are as many `workers` as `options` ask for, or as `shard_nbytes` (or
    SINGA's own limit of 512 MiB) needs.  A parameter is cut along axis 0, or along what
    their `axes` say by name, into as many slices if that is even; all others are worker
    0's, whole.

    Raises:
        UnsupportedError: no number of workers makes the files short enough.
        NotFoundError: there is no parameter, or no axis, that `axes` name.
    """
    path, outline = path_of(at), source.outline
    named = parse_file_name(path.name)
    step = options.step if options.step is not None else outline.step or 0
    workers, axes = options.workers, _axes(outline, options.axes)
    most = min(options.shard_nbytes or FILE_NBYTES_MAX, FILE_NBYTES_MAX - _HEADS_NBYTES)
    if named is not None:
        if named[1] != 0 or workers not in (None, 1):
            raise InvalidError(f"{at}: one file has what worker 0 has; give a directory for more")
        note = path.with_name(checksums_name(named[0]))
        check_ours(note)
        with new_file(path, force=options.force, before=options.standing, stale=note) as file:
            _write_files(source, named[0], [file], _Cut(outline, 1, axes).checked())
        put_checksums(note, options.checksums)
        return
    cut = _cut(outline, workers, most, axes)
    with (
        new_directory(path, force=options.force, before=options.standing) as folder,
        contextlib.ExitStack() as stack,
    ):
        store = LocalStore(folder)
        files: list[Appender] = []
        for worker in range(cut.workers):
            files.append(store.create(file_name(step, worker)))
            stack.callback(files[-1].close)
        _write_files(source, step, files, cut)
        for one in files:
            one.sync()
        write_checksums(folder / checksums_name(step), options.checksums)


def _axes(outline: Outline, axes: Mapping[str, int]) -> dict[int, int]:
    """The axis along which each parameter is cut, by position, where it isn't 0."""
    found: dict[int, int] = {}
    for name, axis in axes.items():
        at = outline.tensors.get(name)
        if at is None or not 0 <= axis < len(outline.specs[at].shape):
            what = "parameter" if at is None else f"axis {axis} of a parameter"
            raise NotFoundError(f"there is no {what} that is called {name} (of axes)")
        found[at] = axis
    return found


@dataclass(frozen=True)
class _Cut:
    """How parameters are cut for so many workers."""

    outline: Outline
    workers: int
    axes: Mapping[int, int]

    @property
    def longest_nbytes(self) -> int:
        """The floats in the first worker's file; none has more."""
        return sum(float_nbytes(self.slice_of(at)) for at in self.outline.tensors.values())

    def checked(self) -> _Cut:
        """Itself.

        Raises:
            UnsupportedError: SINGA wouldn't read the first file.
        """
        heads = sum(2 * len(name.encode()) + 512 for name in self.outline.tensors)
        if self.longest_nbytes + heads > FILE_NBYTES_MAX:
            raise UnsupportedError(
                "the state",
                f"a file of it would have {format_nbytes(self.longest_nbytes + heads)}, and SINGA "
                f"reads {format_nbytes(FILE_NBYTES_MAX)} at most; write a directory, more workers, "
                "or fewer parameters (names=)",
            )
        return self

    def axis(self, at: int) -> int:
        """The axis along which a parameter is cut."""
        return self.axes.get(at, 0)

    def owners(self, at: int) -> int:
        """How many workers have something of a parameter, from the first on."""
        shape, axis = self.outline.specs[at].shape, self.axis(at)
        even = bool(shape) and shape[axis] > 0 and shape[axis] % self.workers == 0
        return self.workers if even else 1

    def slice_of(self, at: int) -> tuple[int, ...]:
        """What one of them has."""
        shape, axis, owners = self.outline.specs[at].shape, self.axis(at), self.owners(at)
        return shape if owners == 1 else (*shape[:axis], shape[axis] // owners, *shape[axis + 1 :])


def _cut(outline: Outline, workers: int | None, most_nbytes: int, axes: Mapping[int, int]) -> _Cut:
    """For so many workers, or the fewest that keep the files short, as far as that goes."""
    if workers is not None:
        if not 0 < workers <= _WORKERS_MAX:
            raise InvalidError(f"workers is a number from 1 to {_WORKERS_MAX}; got {workers}")
        return _Cut(outline, workers, axes).checked()
    whole = _Cut(outline, 1, axes)
    best, shortest = whole, whole.longest_nbytes
    for count in range(2, _WORKERS_MAX + 1):
        if shortest <= most_nbytes:
            break
        cut = _Cut(outline, count, axes)
        if (longest := cut.longest_nbytes) < shortest:
            best, shortest = cut, longest
    return best.checked()


def _write_files(source: Source, step: int, files: Sequence[Appender], cut: _Cut) -> None:
    outline = source.outline
    versions = _versions(outline)
    for worker, file in enumerate(files):
        own = [name for name, at in outline.tensors.items() if worker < cut.owners(at)]
        file.append([encode_head(own, [versions.get(name, step) for name in own])])
    for at in outline.tensors.values():
        _write_blob(source.read(at), files[: cut.owners(at)], cut.slice_of(at), cut.axis(at))


def _write_blob(
    parts: Iterator[memoryview], files: Sequence[Appender], shape: tuple[int, ...], axis: int
) -> None:
    """A parameter's slices, each to its worker's file: in C order, in turn a run of each."""
    for file in files:
        file.append([encode_blob_head(shape)])
    nbytes = float_nbytes(shape[axis:])
    room, worker = nbytes, 0
    for whole in parts:
        part = whole
        while part.nbytes:
            if not room:
                worker, room = (worker + 1) % len(files), nbytes
            files[worker].append([part[:room]])
            taken = min(part.nbytes, room)
            part, room = part[taken:], room - taken


def _versions(outline: Outline) -> dict[str, int]:
    """Those that aren't the step, if they are known."""
    text = outline.metadata.get(VERSIONS)
    if text is None:
        return {}
    try:
        found = parse_json(text.encode())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(
        isinstance(one, int) and abs(one) <= DIMENSION_MAX for one in found.values()
    ):
        raise InvalidError(f"{VERSIONS} is JSON, a version for each name; got {text[:80]!r}")
    return found


def _is_singa(at: str) -> bool:
    if is_url(at) and not is_local(at):
        return False
    path = path_of(at)
    if path.is_file():
        return parse_file_name(path.name) is not None
    return bool(files_of(path) or files_of(path / "checkpoint"))


SINGA = Format(
    "singa",
    recognises=_is_singa,
    suits=lambda at: parse_file_name(Path(at).name) is not None,
    open=open_singa,
    lost=lost_in_singa,
    write=write_singa,
)
