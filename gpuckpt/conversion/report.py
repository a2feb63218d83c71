"""What came of a conversion."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Moved:
    """A tensor that was converted.

    `digest` is the fingerprint (docs/FORMAT.md) of all of its bytes in C
    order, as they went from the source into the target; `aliases` are its further names.
    `checked` says what they were compared with on the way: "checksum", the one that
    a conversion had put with the source; "format", the source's own check values (a
    root's fingerprints, an archive's CRC-32s); or None, if nothing was there.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    digest: str
    aliases: tuple[str, ...] = ()
    checked: str | None = None


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did: from where to where, what is in the target, and what isn't.

    `source` and `target` are paths or URLs, `source_format` and `target_format`
    what they are; `tensors` has the name, size and digest of each tensor,
    `values` is how many plain values there are.
    `step` is the one that was written or, if the target numbers none, read.
    `lost` says in sentences what the target's format can't hold, and what of the
    source its reader leaves out.  `verified` says whether the target was read
    back and compared.
    """

    source: str
    source_format: str
    target: str
    target_format: str
    step: int | None
    tensors: tuple[Moved, ...]
    values: int
    lost: tuple[str, ...]
    verified: bool

    @property
    def checked(self) -> int:
        """How many of the tensors were compared with a check value of the source's."""
        return sum(one.checked is not None for one in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(one.nbytes for one in self.tensors)

    def __str__(self) -> str:
        count = len(self.tensors)
        head = f"{count} tensor{'' if count == 1 else 's'}, {self.nbytes} bytes"
        lines = [f"{self.source} ({self.source_format}) to {self.target} ({self.target_format})"]
        head += f", {told_checked(self)}"
        lines.append(head + (", read back and compared" if self.verified else ""))
        return "\n".join([*lines, *(f"  lost: {one}" for one in self.lost)])


def told_checked(done: Conversion) -> str:
    """Whether the source's bytes were compared with check values, in words."""
    if done.checked == len(done.tensors):
        return "all compared with their checksums"
    lacks = "the source has none" + (" of the others" if done.checked else "")
    return f"{done.checked or 'none'} compared with a checksum: {lacks}"
