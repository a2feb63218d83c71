"""Copy a committed step to another store; every byte is looked at on its way.

1. Each segment that isn't there.  Its bytes are compared with the check values of the manifest
                                   and of its own index, so that damage isn't spread; then synced.
2. The manifest, as by a save.     It must never point at what a crash can take away.

Before the second, nothing that is there has changed for anybody.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from gpuckpt import layout
from gpuckpt.commit import commit, named_files, steps
from gpuckpt.errors import (
    AuthenticationError,
    CheckpointError,
    CorruptError,
    FormatError,
    NotFoundError,
    StorageError,
)
from gpuckpt.fingerprint import Checksum, checksum
from gpuckpt.manifest import Manifest
from gpuckpt.parts import read_part, read_parts
from gpuckpt.seal import Seal
from gpuckpt.segments import Reader, open_segment, read_index, read_trailer
from gpuckpt.spec import ChunkEntry, Extent
from gpuckpt.stores import Bytes, Store, write_all
from gpuckpt.tensors import chunks_of
from gpuckpt.tierstats import TierStats

BUFFER_NBYTES = 4 << 20
"""Host memory that one copy takes, whatever the size of what is copied."""

# Of a file that is read: these say that it is damaged; others, like EMFILE, say nothing of it.
_UNREADABLE = frozenset((errno.EIO, errno.EBADMSG, errno.ENODATA, errno.EUCLEAN, errno.ESTALE))


class DamagedError(CheckpointError):
    """What was to be copied isn't what was saved: nothing of it was made visible elsewhere."""


@dataclass(slots=True)
class _Run:
    """Bytes of a segment up to `end`, and what they must be; None if nobody knows or cares."""

    end: int
    checksum: str | None = None
    digest: str = ""
    bits: int = 64


def copy_step(
    source: Store,
    target: Store,
    manifest: Manifest,
    known: set[str],
    stats: TierStats,
    *,
    check: Callable[[], object] = lambda: None,
    seal: Seal | None = None,
) -> None:
    """Bring a step that is committed in `source` to `target`, durable and visible on return.

    Blocks; call it holding the target's lock.  `known` are the segments that
    are whole there; those that it brings are added, also if it fails later.
    `check` is called before each part, and may raise.

    Raises:
        DamagedError: a file of the source isn't what was saved; it wasn't copied.
        StorageError: either storage refused.
    """
    copy_files(source, target, manifest, known, stats, check=check, seal=seal)
    check()
    commit(target, manifest, abandon=lambda: None, seal=seal)
    stats.files += 1


def copy_files(
    source: Store,
    target: Store,
    manifest: Manifest,
    known: set[str],
    stats: TierStats,
    *,
    check: Callable[[], object] = lambda: None,
    seal: Seal | None = None,
    present: Collection[str] | None = None,
    undoes: bool = True,
) -> None:
    """Bring the files of a step, or those that are `present`; as `copy_step`, but no manifest.

    What was begun is removed after an error, unless that is left to the next
    try.  Contents are durable on return, and not yet the names.  Of a manifest of
    several ranks the parts are read, if they haven't been.
    """
    stats.buffer_nbytes = BUFFER_NBYTES
    if manifest.parts and not manifest.tensors:
        with _reading(f"{source.root}, step {manifest.step}"):
            manifest = read_parts(source, manifest, seal)
    room = np.empty(BUFFER_NBYTES, np.uint8)
    copier = _Copier(source, target, stats, check, room, undoes)
    links: dict[str, list[ChunkEntry]] = {name: [] for name in manifest.segments}
    for chunk in chunks_of(manifest.tensors):
        for link in chunk.links:
            links[link.extent.segment].append(link)
    for name, chunks in links.items():
        if name in known or (present is not None and name not in present):
            continue
        check()
        with _reading(f"{source.root}/{name}"):
            runs = _runs(source, name, chunks, seal)
        copier.copy(name, runs)
        known.add(name)
    for part in manifest.parts:
        check()
        if part.name not in known and (present is None or part.name in present):
            with _reading(f"{source.root}/{part.name}"):
                data = read_part(source, part)
            write_all(target, part.name, data)
            stats.nbytes += part.nbytes
            stats.files += 1
            known.add(part.name)


def whole_segments(store: Store) -> set[str]:
    """The segments that are there and that a manifest which can be read names."""
    found: set[str] = set()
    for step in steps(store):
        with contextlib.suppress(CorruptError, FormatError, NotFoundError):
            found |= set(named_files(store, step))
    return found & set(store.names())


def whole_among(store: Store, wanted: set[str]) -> set[str]:
    """Which of these files are there and whole; as few manifests are read as tell."""
    wanted = wanted & set(store.names())
    found: set[str] = set()
    for step in reversed(steps(store)):
        if found == wanted:
            break
        with contextlib.suppress(CorruptError, FormatError, NotFoundError):
            found |= wanted & set(named_files(store, step))
    return found


def missing_nbytes(source: Store, manifest: Manifest, known: set[str]) -> int:
    """Bytes of the segments that a copy would bring."""
    names = set(source.names()) - known
    return sum(source.size(name) for name in manifest.files if name in names)


@dataclass(frozen=True, slots=True)
class _Copier:
    """Copies segments one after the other, through the same memory."""

    source: Store
    target: Store
    stats: TierStats
    check: Callable[[], object]
    room: Bytes
    undoes: bool

    def copy(self, name: str, runs: list[_Run]) -> None:
        """Copy one, durable on return, but for its name; after an error nothing is left of it.

        Or, unless it `undoes`, what the next try removes.
        """
        where = f"{self.source.root}/{name}"
        self.target.remove(name)  # what a try before may have left
        file = self.target.create(name)
        try:
            with contextlib.ExitStack() as opened:
                with _reading(where):
                    reader = opened.enter_context(open_segment(self.source, name))
                parts = self._parts(reader, name, runs, where)
                while (part := _next(parts, where)) is not None:
                    self.check()
                    file.append([part])
                    self.stats.nbytes += part.nbytes
            file.sync()
            file.close()
        except BaseException:
            for undo in (file.close, partial(self.target.remove, name))[: 1 + self.undoes]:
                with contextlib.suppress(CheckpointError):
                    undo()
            raise
        self.stats.files += 1

    def _parts(
        self, reader: Reader, name: str, runs: list[_Run], where: str
    ) -> Iterator[memoryview]:
        """The segment's bytes, as much as there is room for at a time, each looked at."""
        looker = _Looker(runs, where)
        nbytes = runs[-1].end
        for at in range(0, nbytes, self.room.nbytes):
            part = self.room[: min(self.room.nbytes, nbytes - at)]
            for piece in reader.read(Extent(name, at, part.nbytes), part):
                looker.look(piece)
            yield part.data
        looker.end()


def _next(parts: Iterator[memoryview], where: str) -> memoryview | None:
    with _reading(where):
        return next(parts, None)


class _Looker:
    """Compares bytes that arrive in any portions with what each run must be."""

    def __init__(self, runs: Iterable[_Run], where: str) -> None:
        self._runs, self._where = iter(runs), where
        self._at = 0
        self._next()

    def look(self, piece: memoryview) -> None:
        """Take the next bytes."""
        while piece.nbytes:
            assert self._run is not None
            own = piece[: self._run.end - self._at]
            piece = piece[own.nbytes :]
            self._at += own.nbytes
            self._sum.update(own)
            if self._at == self._run.end:
                self._compare(self._run)
                self._next()

    def end(self) -> None:
        """All bytes have come."""
        assert self._run is None, (self._at, self._run)

    def _next(self) -> None:
        self._run = next(self._runs, None)
        self._begin = self._at
        if self._run is not None:
            self._sum = Checksum(self._run.bits, digest=bool(self._run.digest))

    def _compare(self, run: _Run) -> None:
        if run.checksum is not None and self._sum.checksum() != run.checksum:
            raise CorruptError(
                f"{self._where} at offset {self._begin}",
                "the checksum of the bytes on disk isn't the manifest's",
            )
        if run.digest and self._sum.digest() != run.digest:
            raise AuthenticationError(
                f"{self._where} at offset {self._begin}",
                "the bytes on disk aren't those that were sealed, though their checksum fits",
                "somebody without the key has changed them: don't use them",
            )


def _runs(source: Store, name: str, chunks: Iterable[ChunkEntry], seal: Seal | None) -> list[_Run]:
    """What a segment's bytes must be, from its first to its last."""
    where = f"{source.root}/{name}"
    _, tensors = read_index(source, name, seal)  # looks at header, index and trailer
    trailer = read_trailer(source, name)
    every: dict[int, ChunkEntry] = {}
    for chunk in (*chunks, *(one for entry in chunks_of(tensors) for one in entry.links)):
        extent = chunk.extent
        if extent.segment != name or not extent.length:
            continue
        before = every.setdefault(extent.offset, chunk)
        if (before.extent, before.checksum) != (extent, chunk.checksum):
            raise CorruptError(
                f"{where} at offset {extent.offset}", "manifest and index don't say the same of it"
            )
    found = [_Run(layout.HEADER.size, checksum([layout.pack_header()]))]
    for offset, chunk in sorted(every.items()):
        if offset < found[-1].end or offset + chunk.extent.length > trailer.offset:
            raise CorruptError(f"{where} at offset {offset}", "chunks overlap")
        if offset > found[-1].end:
            found.append(_Run(offset))
        found.append(_Run(offset + chunk.extent.length, chunk.checksum, chunk.digest))
    if found[-1].end < trailer.offset:
        found.append(_Run(trailer.offset))
    end = trailer.offset + trailer.length
    found.append(_Run(end, trailer.checksum.hex(), bits=128))
    last = checksum([layout.pack_trailer(trailer)])
    return [*found, _Run(end + layout.TRAILER.size, last)]


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    """Damage of the source as such."""
    try:
        yield
    except (CorruptError, AuthenticationError, FormatError, NotFoundError) as error:
        raise DamagedError(str(error)) from error
    except StorageError as error:
        if error.errno not in _UNREADABLE:
            raise
        raise DamagedError(f"{where} can't be read: {error}") from error
