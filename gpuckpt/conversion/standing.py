"""What is at a place at one moment, so that nothing else is replaced or deleted there later."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gpuckpt.errors import InvalidError
from gpuckpt.stores.refusals import told

# Of a file its device, number, length in bytes and time of change (ns); of a folder the first two.
_Facts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Standing:
    """A file, or a folder with all in it: `entries` by path below it, itself under `.`.

    There are none if nothing was there.
    """

    entries: Mapping[str, _Facts]

    def check(self, path: Path, meant: Path) -> None:
        """See that what is at `path` is this, and nothing more or less.

        Raises:
            InvalidError: it isn't; `meant` is what a person would call it.
        """
        now = standing(path).entries
        if now == self.entries:
            return
        differ = (one for one in sorted({*now, *self.entries}) if one != "." or len(now) < 2)
        changed = [one for one in differ if now.get(one) != self.entries.get(one)]
        raise InvalidError(
            f"{meant} has changed since it was seen that it may be replaced: "
            f"{', '.join(changed[:5]) or 'another one has its name'}; nothing is replaced, see who "
            "writes there"
        )

    def delete(self, path: Path) -> bool:
        """Delete this, which is at `path` now, and nothing that came to it; whether all is gone."""
        for name in sorted(self.entries, key=lambda one: one.count("/") - (one == "."))[::-1]:
            below = path if name == "." else path / name
            with contextlib.suppress(OSError):
                if _facts(below.lstat()) != self.entries[name]:
                    continue
                below.rmdir() if len(self.entries[name]) == 2 else below.unlink()
        return not os.path.lexists(path)


def standing(path: Path) -> Standing:
    """What is at a path now; links aren't followed.

    Raises:
        StorageError: it can't be read.
    """
    with told(path, "read"):
        try:
            facts = _facts(path.lstat())
        except FileNotFoundError:
            return Standing({})
        below = _below(path, "") if len(facts) == 2 else ()
        return Standing({".": facts, **dict(below)})


def _below(folder: Path, before: str) -> Iterator[tuple[str, _Facts]]:
    with os.scandir(folder) as entries:
        every = [(one.name, one.stat(follow_symlinks=False)) for one in entries]
    for name, found in every:
        facts = _facts(found)
        yield before + name, facts
        if len(facts) == 2:
            yield from _below(folder / name, f"{before}{name}/")


def _facts(found: os.stat_result) -> _Facts:
    if stat.S_ISDIR(found.st_mode):
        return found.st_dev, found.st_ino
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
