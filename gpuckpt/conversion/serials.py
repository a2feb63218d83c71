"""Paddle Fluid's checkpoint directories: what is in which folder.

From `python/paddle/fluid/trainer.py` (and `io.py` before it), Fluid 0.13 to 1.2:

    checkpoint_dir/checkpoint_N/__model__/VAR, …, _SUCCESS     by trainer 0
                               /trainer_K/epoch_id, step_id, _SUCCESS
                               /__lookup_table__/TABLE_S       by parameter server S

The guide of that time writes `__lockup_table__`.  The first version had the
variables and `_SUCCESS` in `checkpoint_N` itself.  A variable's file has its
name; with a `/` in it, it lies in folders.  `_SUCCESS` is written last.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpuckpt.conversion.checksums import FILE
from gpuckpt.conversion.flat import is_text
from gpuckpt.errors import CorruptError, NotFoundError
from gpuckpt.stores import read_all
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.refusals import told

MODEL, LOOKUP, SUCCESS = "__model__", "__lookup_table__", "_SUCCESS"
_LOOKUPS = (LOOKUP, "__lockup_table__")
_SERIAL = re.compile(r"checkpoint_([0-9]{1,18})", re.ASCII)
_TRAINER = re.compile(r"trainer_[0-9]{1,9}", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]{1,15}", re.ASCII)
_ARGUMENT_NBYTES_MAX = 4 << 10
_DEPTH_MAX = 16


def serial_of(name: str) -> int | None:
    """N of `checkpoint_N`; None if it is called otherwise."""
    found = _SERIAL.fullmatch(name)
    return None if found is None else int(found[1])


def is_trainer(name: object) -> bool:
    """Whether it is `trainer_K`."""
    return isinstance(name, str) and _TRAINER.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Serial:
    """A folder `checkpoint_N`."""

    path: Path
    number: int

    @property
    def model(self) -> Path:
        """Where the variables are."""
        below = self.path / MODEL
        return below if below.is_dir() else self.path

    @property
    def is_marked(self) -> bool:
        """Whether it was written to its end."""
        return (self.model / SUCCESS).is_file()

    @property
    def looks_like_one(self) -> bool:
        """Whether there is anything in it that Fluid puts there."""
        below = self.path / MODEL
        return below.is_dir() or self.is_marked or any(map(is_trainer, _names(self.path)))

    def variables(self) -> dict[str, Path]:
        """The files of variables, by name."""
        found = dict(_files(self.model, "", 0))
        if self.model == self.path:  # the first layout
            others = tuple(f"{one}/" for one in _LOOKUPS)
            found = {
                name: path
                for name, path in found.items()
                if not name.startswith(others) and not is_trainer(name.split("/")[0])
            }
        return {name: path for name, path in found.items() if name not in (SUCCESS, FILE)}

    def tables(self) -> dict[str, Path]:
        """The files of lookup tables, one a server, by name; in whichever spelling."""
        found: dict[str, Path] = {}
        for folder in _LOOKUPS:
            for name, path in _files(self.path / folder, "", 0):
                if found.setdefault(name, path) != path and name != SUCCESS:
                    raise CorruptError(
                        str(self.path),
                        f"both {found[name]} and {path} are the table {name}",
                        "move the one that isn't meant elsewhere",
                    )
        return {name: path for name, path in found.items() if name != SUCCESS}

    def trainers(self) -> dict[str, dict[str, int | str]]:
        """What each trainer has saved of its own: `epoch_id`, `step_id` and others, by folder."""
        return {
            folder.name: {
                name: _argument(path)
                for name, path in _files(folder, "", _DEPTH_MAX)
                if name != SUCCESS
            }
            for folder in _children(self.path)
            if is_trainer(folder.name) and folder.is_dir()
        }


def serials_of(folder: Path) -> dict[int, Serial]:
    """Every `checkpoint_N` of a folder, by N; none if it is no folder."""
    found: dict[int, Serial] = {}
    for path in _children(folder) if folder.is_dir() else []:
        number = serial_of(path.name)
        if number is not None and path.is_dir():
            found[number] = Serial(path, number)
    return found


def find_serial(path: Path, number: int | None) -> Serial:
    """The folder `path` itself if it is one, else that of a number in it, or the newest finished.

    Raises:
        NotFoundError: there is none.
    """
    own = serial_of(path.name)
    found = serials_of(path)
    if own is not None and not found:
        return Serial(path, own)
    if number is not None and number in found:
        return found[number]
    marked = [one for at, one in sorted(found.items()) if one.is_marked and number is None]
    if not marked:
        there = f"; there are {', '.join(map(str, sorted(found)))}" if found else ""
        wanted = "with a _SUCCESS mark" if number is None else str(number)
        raise NotFoundError(
            f"{path}: there is no checkpoint_N {wanted}{there}; to read one that may not be whole, "
            "give its own folder"
        )
    return marked[-1]


def _names(folder: Path) -> list[str]:
    return [path.name for path in _children(folder)] if folder.is_dir() else []


def _children(folder: Path) -> list[Path]:
    with told(folder, "list"):
        return sorted(folder.iterdir())


def _files(folder: Path, before: str, depth: int) -> Iterator[tuple[str, Path]]:
    """The files below a folder, each with its path there; hidden ones (`.crc`) left out."""
    if depth > _DEPTH_MAX:
        raise CorruptError(str(folder), "folders are nested too deep", "see what put them there")
    for path in _children(folder) if folder.is_dir() and not folder.is_symlink() else []:
        if path.name.startswith("."):
            continue
        if not is_text(path.name):
            raise CorruptError(str(folder), f"{path.name!r} isn't UTF-8", "rename that file")
        if path.is_dir() and not path.is_symlink():
            yield from _files(path, f"{before}{path.name}/", depth + 1)
        else:
            yield before + path.name, path


def _argument(path: Path) -> int | str:
    """What a trainer's file says: text, as Python's `str` gave it; a number if it is one."""
    store = LocalStore(path.parent)
    if store.size(path.name) > _ARGUMENT_NBYTES_MAX:
        raise CorruptError(str(path), "too long for a trainer's argument", "see what it is")
    try:
        text = read_all(store, path.name).decode().strip()
    except UnicodeDecodeError:
        raise CorruptError(str(path), "no text", "see what it is") from None
    return int(text) if _NUMBER.fullmatch(text) else text
