"""Files of `torch.save`: states of containers, tensors and plain values, and no code.

They are read and written by torch, which this module imports when it is used.
Read, a file is mapped into memory, and pages are read when they are wanted;
torch unpickles what it trusts alone (`weights_only`).  Written, the tensors' bytes
first go to a file beside the target, which then takes their places in memory.
"""

from __future__ import annotations

import contextlib
import io
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuckpt.arrays import Tensor, finish
from gpuckpt.conversion.checksums import beside, check_ours, read_checksums
from gpuckpt.conversion.placing import Writing, new_file, path_of, put_checksums, scratch_file
from gpuckpt.conversion.port import PLAIN_FORMAT, Format, Options, Outline, Source
from gpuckpt.conversion.states import StateSource, filled
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import CheckpointError, CorruptError, InvalidError, UnsupportedError
from gpuckpt.plan import ALIGNMENT, aligned
from gpuckpt.spec import Spec
from gpuckpt.stores import Appender, Buffer
from gpuckpt.stores.local import LocalStore
from gpuckpt.structure import from_json
from gpuckpt.values import decode_value

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
# Elements that torch has, and that its readers take.
DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "bfloat16", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
# Plain values that it is never asked about.
_TRUSTED = (type(None), bool, float, str)
# The beginning of a zip archive, of a pickle (files before torch 1.6).
_MAGIC = (b"PK\x03\x04", b"\x80\x02")


@contextlib.contextmanager
def open_torch(at: str, _: Options) -> Iterator[Source]:
    """A file on this machine.

    Raises:
        CorruptError: torch can't read it, or it has what torch doesn't trust.
        UnsupportedError: a leaf is neither a tensor nor a plain value.
    """
    path = path_of(at)
    source = StateSource(_load(path))
    note = beside(path)
    noted = read_checksums(LocalStore(note.parent), note.name)
    source.outline = replace(source.outline, noted=noted)
    yield source


def _load(path: Path) -> Any:
    torch = _torch()
    zipped = _beginning(path) == _MAGIC[0]
    try:
        return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        raise CorruptError(
            str(path),
            f"torch doesn't read it ({type(error).__name__}: {str(error).splitlines()[0]})",
            "only containers, tensors and plain values are converted: if you trust the file, "
            "load it by torch, and save its state_dict alone",
        ) from error


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise InvalidError(
            "files of torch.save are read and written by torch, which isn't installed here: "
            "pip install torch"
        ) from error
    return torch


def lost_in_torch(outline: Outline) -> Sequence[str]:
    """What `torch.save` has no place for.

    Raises:
        UnsupportedError: torch has no such elements, or would unpickle a value with code.
    """
    torch = _torch()
    for spec in outline.specs:
        if spec.dtype not in DTYPES or not hasattr(torch, spec.dtype):
            raise UnsupportedError(spec.name, f"torch has no elements of type {spec.dtype}")
    lost = []
    for name, node in outline.values.items():
        value = decode_value(node)
        if isinstance(value, np.generic):
            lost.append(f"{name}: that it is a numpy.{value.dtype}; it becomes a Python number")
            value = _plain(value, name)
        if type(value) not in _TRUSTED and not _is_read(torch, value):
            raise UnsupportedError(name, f"torch reads no {type(value).__name__} without code")
    tree = filled(from_json(outline.structure), [None] * len(outline.specs))
    if not _is_read(torch, _without_scalars(tree)):
        raise UnsupportedError("", "torch reads some key of its dicts, or number, only with code")
    text = [key for key, value in outline.metadata.items() if PLAIN_FORMAT.get(key) != value]
    if text:
        lost.append(f"metadata: {', '.join(text)}")
    if outline.epoch is not None or outline.metrics:
        lost.append("epoch and metrics")
    return lost


def _is_read(torch: Any, tree: Any) -> bool:
    """Whether torch reads what it writes of plain values, trusting nothing more than it does."""
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except Exception:
        return False
    return True


def write_torch(at: str, source: Source, options: Options) -> None:
    """Write a file by `torch.save`; meanwhile the tensors take as much room once more."""
    torch, path, specs = _torch(), path_of(at), source.outline.specs
    note = beside(path)
    check_ours(note)
    with (
        new_file(path, force=options.force, before=options.standing, stale=note) as file,
        scratch_file(path) as (scratch, raw),
    ):
        for position, spec in enumerate(specs):
            for part in source.read(position):
                raw.append([part])
            raw.append([bytes(aligned(spec.nbytes) - spec.nbytes)])
        raw.append([bytes(ALIGNMENT)])  # a file can't be mapped that has nothing in it
        raw.sync()
        with scratch.open("rb") as opened:
            pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        tensors = [finish(one, "torch") for one in _mapped(specs, pages)]
        state = filled(_without_scalars(from_json(source.outline.structure)), tensors)
        writing = _Kept(file)
        torch.save(state, writing)
        writing.check()
    put_checksums(note, options.checksums)


class _Kept(Writing):
    """A file object that never raises: torch's writer isn't made for it.

    The first error is kept, and nothing more is written.
    """

    def __init__(self, file: Appender) -> None:
        super().__init__(file)
        self._failure: BaseException | None = None

    def write(self, data: Buffer) -> int:  # type: ignore[override]
        """Append all of `data`, or nothing once that has failed."""
        if self._failure is None:
            try:
                return super().write(data)
            except BaseException as error:
                self._failure = error
        return memoryview(data).nbytes

    def check(self) -> None:
        """Raise what went wrong."""
        if self._failure is not None:
            raise self._failure


def _mapped(specs: Sequence[Spec], pages: mmap.mmap) -> Iterator[Tensor]:
    """Tensors over mapped memory, each with a storage of its own once torch has it."""
    at = 0
    for spec in specs:
        dtype = to_numpy(spec.dtype)
        array: npt.NDArray[Any] = np.empty(spec.shape, dtype)
        if spec.nbytes:
            raw = np.frombuffer(pages, np.uint8, spec.nbytes, at)
            array = raw.view(dtype).reshape(spec.shape)
        at += aligned(spec.nbytes)
        yield Tensor(spec, array, array, writable=True)


def _without_scalars(tree: Any) -> Any:
    """A tree with Python's numbers in the place of numpy's."""
    if isinstance(tree, np.generic):
        return _plain(tree, "")
    if isinstance(tree, dict):
        return {_without_scalars(key): _without_scalars(child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([_without_scalars(child) for child in tree])
    return tree


def _plain(value: np.generic, name: str) -> bool | int | float | complex:
    """A numpy scalar as the Python number that is equal to it."""
    number = value.item()
    if isinstance(number, bool | int | float | complex) and number == value:
        return number
    raise UnsupportedError(name, f"torch keeps no {value.dtype}; leave it out by names=")


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError:
        return b""


def _is_torch(at: str) -> bool:
    if not at.endswith(SUFFIXES):
        return False
    path = path_of(at)
    return path.is_file() and _beginning(path).startswith(_MAGIC)


TORCH = Format(
    "torch",
    recognises=_is_torch,
    suits=lambda at: at.endswith(SUFFIXES),
    open=open_torch,
    lost=lost_in_torch,
    write=write_torch,
)
