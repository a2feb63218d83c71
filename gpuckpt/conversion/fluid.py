"""Paddle Fluid's checkpoints: `serials` has the folders, `variables` the files' bytes.

As a state, variables stand under their names, and beside them `trainer_K` (a
dict of what it saved), `__lookup_table__` (a dict of tables, each `rows`,
`height` and `value`) and `__lod__` (of variables with levels of detail, a list of these).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from gpuckpt.conversion.checksums import FILE, read_checksums, write_checksums
from gpuckpt.conversion.flat import is_text, lost_but_arrays
from gpuckpt.conversion.placing import new_directory, path_of
from gpuckpt.conversion.port import PART_NBYTES, Format, Options, Outline, Source
from gpuckpt.conversion.serials import (
    LOOKUP,
    MODEL,
    SUCCESS,
    Serial,
    find_serial,
    serial_of,
    serials_of,
)
from gpuckpt.conversion.sorting import LOD, Rows, sort_leaves
from gpuckpt.conversion.variables import (
    TYPES,
    SelectedRows,
    Stored,
    encode_elements,
    encode_height,
    encode_level,
    encode_levels,
    encode_rows,
    read_variable,
)
from gpuckpt.conversion.window import Window, gather
from gpuckpt.errors import UnsupportedError
from gpuckpt.spec import Spec
from gpuckpt.stores import Appender, write_all
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.opening import is_local, is_url
from gpuckpt.values import Json

# A header is short, and there is a file for each variable.
_AHEAD_NBYTES = 4 << 10
_NAME_NBYTES_MAX = 255


class FluidSource:
    """A checkpoint that is open for reading."""

    def __init__(self, serial: Serial) -> None:
        """Reads every file's header.

        Raises:
            CorruptError: a file isn't what it should be.
        """
        self._stored: list[Stored] = []
        self._specs: list[Spec] = []
        rows: list[Json] = []
        levels: list[Json] = []
        for name, path in serial.variables().items():
            rows.append([name, self._variable(name, path, levels)])
        rows += [[LOD, {"dict": levels}]] if levels else []
        tables = [[name, self._table(name, path)] for name, path in serial.tables().items()]
        rows += [[LOOKUP, {"dict": tables}]] if tables else []
        trainers = serial.trainers()
        rows += [
            [name, {"dict": [[key, {"value": value}] for key, value in values.items()]}]
            for name, values in trainers.items()
        ]
        epoch = trainers.get("trainer_0", {}).get("epoch_id")
        mark = f"whatever {serial.path} still lacked: it has no _SUCCESS mark"
        self.outline = Outline(
            {"dict": rows},
            tuple(self._specs),
            step=serial.number,
            epoch=epoch if isinstance(epoch, int) else None,
            left_out=() if serial.is_marked else (mark,),
            noted=read_checksums(LocalStore(serial.path), FILE),
        ).named()

    def read(self, position: int) -> Iterator[memoryview]:
        """The elements of a tensor; the files have nothing to check them by."""
        nbytes = self.outline.specs[position].nbytes
        return gather([self._stored[position].run], nbytes, PART_NBYTES)

    def _variable(self, name: str, path: Path, levels: list[Json]) -> Json:
        found = read_variable(_window(path))
        if isinstance(found, SelectedRows):
            return self._rows(name, found)
        if found.lod:
            nodes = [self._tensor(f"{LOD}.{name}.{at}", one) for at, one in enumerate(found.lod)]
            levels.append([name, {"list": nodes}])
        return self._tensor(name, found.tensor)

    def _table(self, name: str, path: Path) -> Json:
        found = read_variable(_window(path), rows_first=True)
        if isinstance(found, SelectedRows):
            return self._rows(f"{LOOKUP}.{name}", found)
        return self._tensor(f"{LOOKUP}.{name}", found.tensor)

    def _rows(self, name: str, found: SelectedRows) -> Json:
        rows = self._tensor(f"{name}.rows", found.rows)
        height = {"value": found.height}
        value = self._tensor(f"{name}.value", found.value)
        return {"dict": [["rows", rows], ["height", height], ["value", value]]}

    def _tensor(self, name: str, stored: Stored) -> Json:
        self._stored.append(stored)
        self._specs.append(Spec(name, stored.dtype, stored.shape))
        return {"tensor": len(self._specs) - 1}


def _window(path: Path) -> Window:
    return Window(LocalStore(path.parent), path.name, _AHEAD_NBYTES)


@contextlib.contextmanager
def open_fluid(at: str, options: Options) -> Iterator[FluidSource]:
    """A `checkpoint_N`, or of the folder of several the newest finished one, or that of a step.

    Raises:
        NotFoundError: there is none.
        CorruptError: a file isn't what it should be.
    """
    yield FluidSource(find_serial(path_of(at), options.step))


def lost_in_fluid(outline: Outline) -> list[str]:
    """Whatever isn't an array, or among what a trainer has saved.

    Raises:
        UnsupportedError: Fluid has no such type, or no file can have the variable's name.
    """
    for name, at in outline.tensors.items():
        if (dtype := outline.specs[at].dtype) not in TYPES:
            raise UnsupportedError(name, f"Fluid has no type for {dtype}")
    files = sort_leaves(outline)
    for names in (files.variables, files.tables):
        for name in names:
            _check_name(name, names)
    for trainer, values in files.trainers.items():
        for key in values:
            _check_name(key, {})
            if "/" in key:
                raise UnsupportedError(f"{trainer}.{key}", "no file can be called so")
    return lost_but_arrays(outline, kept=files.kept, epoch=True)


def _check_name(name: str, names: Container[str]) -> None:
    parts = name.split("/")
    longest = max(len(part.encode("utf-8", "surrogatepass")) for part in parts)
    if {"", ".", "..", SUCCESS} & set(parts) or longest > _NAME_NBYTES_MAX or not is_text(name):
        raise UnsupportedError(name, "no file can be called so, as a variable's is; rename it")
    for end in range(1, len(parts)):
        if (folder := "/".join(parts[:end])) in names:
            raise UnsupportedError(name, f"{folder} would be a file and a folder; rename it")
    if any(part.startswith(".") for part in parts):
        raise UnsupportedError(name, "files whose names begin with a dot aren't read; rename it")


def write_fluid(at: str, source: Source, options: Options) -> None:
    """Write a folder with one `checkpoint_N`, or that one itself if `at` is called so.

    N is the step.  Where the state has no `trainer_K` of its own, trainer 0
    gets the epoch (or 0) as its `epoch_id` and the step as its `step_id`.
    """
    path, outline = path_of(at), source.outline
    step = options.step if options.step is not None else outline.step or 0
    files = sort_leaves(outline)
    trainers = files.trainers or {"trainer_0": {"epoch_id": outline.epoch or 0, "step_id": step}}
    with new_directory(path, force=options.force, before=options.standing) as new:
        folder = new if serial_of(path.name) is not None else new / f"checkpoint_{step}"
        for trainer, values in trainers.items():
            for key, value in values.items():
                _write_text(folder / trainer / key, str(value))
            _write_mark(folder / trainer)
        for name, table in files.tables.items():
            _write(folder / LOOKUP / name, source, table, ())
        for name, variable in files.variables.items():
            _write(folder / MODEL / name, source, variable, files.levels.get(name, ()))
        _write_mark(folder / MODEL)
        write_checksums(folder / FILE, options.checksums)


def _write(path: Path, source: Source, content: int | Rows, levels: Sequence[int]) -> None:
    """A variable's file."""
    specs = source.outline.specs
    file = LocalStore(path.parent).create(path.name)
    try:
        if isinstance(content, Rows):
            file.append([encode_rows(specs[content.rows].shape[0])])
            _append(file, source, content.rows)
            file.append([encode_height(content.height)])
            content = content.value
        else:
            file.append([encode_levels(len(levels))])
            for level in levels:
                file.append([encode_level(specs[level].nbytes)])
                _append(file, source, level)
        file.append([encode_elements(specs[content].dtype, specs[content].shape)])
        _append(file, source, content)
        file.sync()
    finally:
        file.close()


def _append(file: Appender, source: Source, position: int) -> None:
    for part in source.read(position):
        file.append([part])


def _write_mark(folder: Path) -> None:
    _write_text(folder / SUCCESS, time.ctime())


def _write_text(path: Path, text: str) -> None:
    write_all(LocalStore(path.parent), path.name, text.encode())


def _is_fluid(at: str) -> bool:
    if is_url(at) and not is_local(at):
        return False
    path = path_of(at)
    own = Serial(path, serial_of(path.name) or 0)
    if serial_of(path.name) is not None and own.looks_like_one:
        return True
    return any(serial.looks_like_one for serial in serials_of(path).values())


FLUID = Format(
    "fluid",
    recognises=_is_fluid,
    suits=lambda at: serial_of(Path(at).name) is not None,
    open=open_fluid,
    lost=lost_in_fluid,
    write=write_fluid,
)
