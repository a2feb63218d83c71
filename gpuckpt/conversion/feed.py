"""A source as the writer of a target sees it: what was picked of it, and every byte noted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gpuckpt.apart import Flag
from gpuckpt.conversion.checksums import REMEDY, Checksum, Noted, unpack_checksums
from gpuckpt.conversion.port import Outline, Source
from gpuckpt.errors import CheckpointError, CorruptError
from gpuckpt.fingerprint import leaf_digests, root
from gpuckpt.layout import LEAF_NBYTES


class StoppedError(CheckpointError):
    """An interrupt asked for the end; nobody but the conversion sees this."""


class Digest:
    """The fingerprint of bytes that come part by part, of any lengths."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._digests: list[bytes] = []
        self.nbytes = 0

    def update(self, part: memoryview) -> None:
        """Take the next bytes."""
        self.nbytes += part.nbytes
        if self._rest:
            wanted = LEAF_NBYTES - len(self._rest)
            self._rest += part[:wanted]
            part = part[wanted:]
            if len(self._rest) < LEAF_NBYTES:
                return
            self._digests.append(leaf_digests(memoryview(self._rest)))
            self._rest = bytearray()
        whole = part.nbytes - part.nbytes % LEAF_NBYTES
        self._digests.append(leaf_digests(part[:whole]))
        self._rest += part[whole:]

    def fingerprint(self) -> str:
        """Of all that came."""
        last = leaf_digests(memoryview(self._rest))
        return root(b"".join([*self._digests, last]), self.nbytes)


class Feed:
    """A source that knows what was read of it; a `Source` itself."""

    def __init__(
        self,
        source: Source,
        names: Sequence[str] | None = None,
        progress: Callable[[int], object] = lambda _: None,
        *,
        ignore_checksums: bool = True,
    ) -> None:
        """With `names`, of some leaves only; `progress` is told of bytes as they are read.

        Unless told to ignore them, checksums that stand with the source are compared.

        Raises:
            CorruptError: these can't be read, or are of other tensors.
        """
        self._source, self._progress = source, progress
        noted = () if ignore_checksums else source.outline.noted
        self._wanted = _wanted(source.outline, noted, whole=names is None)
        self.outline: Outline = source.outline
        self._positions = list(range(len(self.outline.specs)))
        if names is not None:
            self.outline, self._positions = self.outline.picked(names)
        self.digests: dict[int, str] = {}
        self.compared: set[int] = set()
        self.stopped = Flag()

    def read(self, position: int) -> Iterator[memoryview]:
        """The bytes of a tensor, counted, and noted once all have come.

        Raises:
            CorruptError: they are more or fewer than the tensor's type and shape say.
        """
        digest, spec = Digest(), self.outline.specs[position]
        for part in self._source.read(self._positions[position]):
            if self.stopped.is_set():
                raise StoppedError("stopped by an interrupt")
            digest.update(part)
            if position not in self.digests:
                self._progress(part.nbytes)
            yield part
        if digest.nbytes != spec.nbytes:
            raise CorruptError(spec.label, f"{digest.nbytes} bytes, and not {spec.nbytes}")
        self._note(position, digest.fingerprint())

    def checksums(self) -> dict[str, Checksum]:
        """What was read so far, by each of its names."""
        specs = self.outline.specs
        for at, spec in enumerate(specs):
            if not spec.nbytes and at not in self.digests:
                self._note(at, Digest().fingerprint())
        return {
            name: Checksum(specs[at].dtype, specs[at].shape, self.digests[at])
            for name, at in self.outline.tensors.items()
            if at in self.digests
        }

    def _note(self, position: int, found: str) -> None:
        """Keep a tensor's fingerprint, if it is the one that stands with it.

        Raises:
            CorruptError: it is another.
        """
        wanted, spec = self._wanted.get(self._positions[position]), self.outline.specs[position]
        if wanted is not None:
            checksum, where = wanted
            if checksum.fingerprint != found:
                raise CorruptError(
                    spec.label,
                    f"its bytes have the fingerprint {found}, and {checksum.fingerprint} stands "
                    f"in {where}",
                    REMEDY,
                )
            self.compared.add(position)
        self.digests[position] = found

    def check_all_read(self) -> None:
        """See that whoever wrote the target has asked for each tensor."""
        self.checksums()
        for at, spec in enumerate(self.outline.specs):
            assert at in self.digests, f"{spec.name} isn't in the target"


def _wanted(
    outline: Outline, noted: Sequence[Noted], *, whole: bool
) -> dict[int, tuple[Checksum, str]]:
    """The checksum of each tensor that has one, by position, and where it stands.

    Raises:
        CorruptError: they are of tensors that aren't there, or are otherwise; with `whole`.
    """
    found: dict[int, tuple[Checksum, str]] = {}
    for one in noted:
        for name, checksum in unpack_checksums(one).items():
            at = outline.tensors.get(name)
            if at is not None:
                spec = outline.specs[at]
                found[at] = checksum, one.where
                if (spec.dtype, spec.shape) == (checksum.dtype, checksum.shape):
                    continue
                there = f"it is {spec.dtype} {spec.shape}"
            elif not whole:
                continue
            else:
                there = "there is no such tensor"
            raise CorruptError(name, f"{there}, and {one.where} has {checksum}", REMEDY)
    return found
