"""What can go wrong, grouped by what the caller does next.

CheckpointError
├── InvalidError      (a ValueError)    an argument makes no sense      → fix the call
├── UnsupportedError  (a TypeError)     a leaf can't be saved           → leave it out, convert it
├── NotFoundError     (a LookupError)   no such step, tensor or device  → ask for another
├── MismatchError     (a ValueError)    names, shapes, dtypes don't fit → fix the target
├── TornError         (a RuntimeError)  the state changed while saved   → order updates after it
├── CorruptError                        bytes aren't what was written   → fallback=True, repair
├── AuthenticationError                 not sealed with this key        → give its key, or don't use
├── FormatError                         written by a newer gpuckpt      → upgrade
├── StorageError      (an OSError)      the storage refused             → free space, retry
│   └── LockedError                     another writer has the root     → stop it, use another root
├── PreemptedError                      it gave way to a later save     → wait for that one
├── DeviceError       (a RuntimeError)  the device refused              → see its message
│   └── DeviceMemoryError (a MemoryError)  it doesn't fit there         → snapshot="hold"
├── BusyError         (a TimeoutError)  a save goes on for longer       → wait again
├── RankError         (a RuntimeError)  a rank is missing or disagrees  → see to that rank
└── ClosedError       (a RuntimeError)  the checkpointer was closed     → open another
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "AuthenticationError",
    "BusyError",
    "CheckpointError",
    "ClosedError",
    "CorruptError",
    "DeviceError",
    "DeviceMemoryError",
    "FormatError",
    "InvalidError",
    "LockedError",
    "MismatchError",
    "NotFoundError",
    "PreemptedError",
    "RankError",
    "StorageError",
    "TornError",
    "UnsupportedError",
]

_REMEDY = (
    "use an older step (fallback=True takes the newest that is intact), salvage the tensors that "
    "are intact (`gpuckpt repair`), or restore the file from a copy"
)


class CheckpointError(Exception):
    """Base of every error that gpuckpt raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """How it goes to another process: by its message, whatever its constructor takes."""
        known = {"errno": code} if (code := getattr(self, "errno", None)) is not None else {}
        return _again, (type(self), self.args, self.__dict__ | known)


class InvalidError(CheckpointError, ValueError):
    """An argument or option makes no sense."""


class UnsupportedError(CheckpointError, TypeError):
    """A leaf of the state can't be saved; nothing has been written."""

    def __init__(self, name: str, reason: str) -> None:
        """`name` is the leaf's full path in the state."""
        super().__init__(f"{name or 'the state'}: {reason}")
        self.name, self.reason = name, reason


class NotFoundError(CheckpointError, LookupError):
    """There is no such step, tensor or device."""


class MismatchError(CheckpointError, ValueError):
    """The checkpoint and the target don't fit.

    Nothing has been changed, unless the message says otherwise.

    `missing` are names of the target that the checkpoint lacks, `unexpected`
    names of the checkpoint that the target lacks, and `mismatched` sentences
    about names that both have and that differ.
    """

    def __init__(
        self,
        subject: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Sequence[str] = (),
        hint: str = "pass strict=False to leave these alone, or rename=… to match other names",
    ) -> None:
        """Write the three lists as a diff, and at its end what to do."""
        lines = [
            *_diff("-", "missing from the checkpoint", missing),
            *_diff("+", "unexpected in the checkpoint", unexpected),
            *_diff("!", "different", mismatched),
        ]
        super().__init__("\n".join([subject, *lines, hint]))
        self.missing, self.unexpected = tuple(missing), tuple(unexpected)
        self.mismatched = tuple(mismatched)


class TornError(CheckpointError, RuntimeError):
    """A tensor changed while it was read where it is; no checkpoint was made."""

    def __init__(self, name: str) -> None:
        """`name` is the tensor's full path in the state."""
        super().__init__(
            f"{name} changed while it was being saved; make every change of the state inside "
            "`with checkpointer.update():`, or pass snapshot='copy'"
        )
        self.name = name


class CorruptError(CheckpointError):
    """Bytes are not what was written: found by a checksum, or by their structure."""

    def __init__(self, where: str, reason: str, remedy: str = _REMEDY) -> None:
        """`where` names file, offset and tensor as far as they are known."""
        super().__init__(f"{where}: {reason}; {remedy}")
        self.where, self.reason = where, reason


class AuthenticationError(CheckpointError):
    """A key was given, and the bytes aren't known to be of somebody who has it.

    Not a `CorruptError`: who changes bytes on purpose would choose what is used instead.
    """

    def __init__(self, where: str, reason: str, advice: str) -> None:
        """`where` names file, offset and tensor as far as they are known."""
        super().__init__(f"{where}: {reason}; {advice}")
        self.where, self.reason = where, reason


class FormatError(CheckpointError):
    """The file was written by a newer gpuckpt, or isn't one of its files."""


class StorageError(CheckpointError, OSError):
    """The storage refused to read or write.

    If `maybe` is true, nobody knows whether it did so all the same.
    """

    maybe = False


class LockedError(StorageError):
    """Another writer has this root."""


class PreemptedError(CheckpointError):
    """A save was given up for that of a newer state, since the process is to end; no harm done."""

    def __init__(self, step: int) -> None:
        """`step` is the one that wasn't saved."""
        super().__init__(
            f"the save of step {step} was given up: the process is to end, and the state as it is "
            "now can be saved sooner; wait for that save"
        )
        self.step = step


class DeviceError(CheckpointError, RuntimeError):
    """The device refused."""


class DeviceMemoryError(DeviceError, MemoryError):
    """The device's memory is too small for this."""


class BusyError(CheckpointError, TimeoutError):
    """A save goes on for longer than was waited for; it isn't cut off."""


class RankError(CheckpointError, RuntimeError):
    """Ranks are missing, failed or disagree; what was to be done together wasn't."""

    def __init__(self, ranks: Sequence[int], reason: str) -> None:
        """`ranks` are those that it is about, which may be this one."""
        noun = "rank" if len(ranks) == 1 else "ranks"
        super().__init__(f"{noun} {', '.join(map(str, ranks))}: {reason}")
        self.ranks, self.reason = tuple(ranks), reason


class ClosedError(CheckpointError, RuntimeError):
    """The checkpointer was closed, or belongs to the process that this one was forked from."""


def _again(
    kind: type[CheckpointError], args: tuple[Any, ...], facts: dict[str, Any]
) -> CheckpointError:
    """An error as it was in another process."""
    error = kind.__new__(kind, *args)
    error.args = args
    for name, fact in facts.items():
        setattr(error, name, fact)
    return error


def _diff(mark: str, title: str, names: Iterable[str], most: int = 20) -> list[str]:
    names = list(names)
    if not names:
        return []
    shown = [f"  {mark} {name}" for name in names[:most]]
    more = [f"  {mark} … and {len(names) - most} more"] if len(names) > most else []
    return [f"{title} ({len(names)}):", *shown, *more]
