"""Fingerprints of tensors that stand with a file or a directory of another format.

As JSON: in a safetensors file's metadata, in a directory as `gpuckpt.checksums.json`,
beside a file `x.pt` as `x.pt.checksums.json`.

    {"gpuckpt": "checksums", "version": 1, "fingerprint": "xxh3-128-tree",
     "tensors": {NAME: {"dtype": …, "shape": […], "fingerprint": HEX}}}

A name is the one under which the tensor is read back; its fingerprint, that of
all of its bytes in C order (docs/FORMAT.md, "The fingerprint of n raw bytes").
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuckpt.errors import CheckpointError, CorruptError, InvalidError, NotFoundError
from gpuckpt.spec import Spec
from gpuckpt.stores import Store, read_all, write_all
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.refusals import told
from gpuckpt.values import parse_json

KEY = "gpuckpt.checksums"  # of a safetensors file's metadata
FILE = "gpuckpt.checksums.json"  # in a directory
SUFFIX = ".checksums.json"  # of a file beside another
_KIND = "xxh3-128-tree"
_HEX = 32
_NBYTES_MAX = 256 << 20
REMEDY = (
    "take it anew from where it was written; or, if it was changed on purpose, "
    "pass ignore_checksums=True (--ignore-checksums)"
)


@dataclass(frozen=True, slots=True)
class Checksum:
    """What a tensor was when it was written."""

    dtype: str
    shape: tuple[int, ...]
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape} with the fingerprint {self.fingerprint}"


@dataclass(frozen=True, slots=True)
class Noted:
    """Checksums as they stand with a source, where that is, and what their names lack in front."""

    text: str
    where: str
    before: str = ""


Checksums = Callable[[], Mapping[str, Checksum]]


def blank(specs: Sequence[Spec]) -> dict[str, Checksum]:
    """Checksums whose text is as long as that of any others of these tensors."""
    return {spec.name: Checksum(spec.dtype, spec.shape, "0" * _HEX) for spec in specs}


def pack_checksums(found: Mapping[str, Checksum]) -> str:
    """The text; as long whatever the fingerprints are."""
    tensors = {
        name: {"dtype": one.dtype, "shape": list(one.shape), "fingerprint": one.fingerprint}
        for name, one in found.items()
    }
    body = {"gpuckpt": "checksums", "version": 1, "fingerprint": _KIND, "tensors": tensors}
    return json.dumps(body, separators=(",", ":"))


def unpack_checksums(noted: Noted) -> dict[str, Checksum]:
    """Read a text: undoes `pack_checksums`.

    Raises:
        CorruptError: it is none.
    """
    try:
        body = parse_json(noted.text.encode())
        _check_kind(body["gpuckpt"], body["version"], body["fingerprint"])
        return {noted.before + name: _checksum(row) for name, row in body["tensors"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(
            noted.where, f"no checksums that can be read ({error})", REMEDY
        ) from error


def _check_kind(*facts: object) -> None:
    if facts != ("checksums", 1, _KIND):
        raise ValueError(f"they are of another kind: {facts}")


def _checksum(row: Any) -> Checksum:
    dtype, shape, value = row["dtype"], row["shape"], row["fingerprint"]
    if not isinstance(dtype, str) or not isinstance(value, str) or len(value) != _HEX:
        raise TypeError("a row that is no checksum")
    if not isinstance(shape, list) or not all(type(extent) is int for extent in shape):
        raise TypeError("a shape that is none")
    return Checksum(dtype, tuple(shape), value)


def beside(path: Path) -> Path:
    """Where the checksums of a file are that has no place for them."""
    return path.with_name(path.name + SUFFIX)


def write_checksums(path: Path, checksums: Checksums | None) -> None:
    """A file of them in a directory that is being made; none if there are to be none."""
    if checksums is not None:
        write_all(LocalStore(path.parent), path.name, pack_checksums(checksums()).encode())


def read_checksums(store: Store, name: str, before: str = "") -> tuple[Noted, ...]:
    """Those in a file, which may not be there; `before` goes in front of their names.

    Raises:
        CorruptError: it is too long, or no text.
    """
    where = f"{store.root}/{name}"
    try:
        nbytes = store.size(name)
    except NotFoundError:
        return ()
    if nbytes > _NBYTES_MAX:
        raise CorruptError(where, f"it has {nbytes} bytes", REMEDY)
    try:
        return (Noted(read_all(store, name).decode(), where, before),)
    except UnicodeDecodeError:
        raise CorruptError(where, "no checksums: it isn't UTF-8", REMEDY) from None


def check_ours(path: Path) -> None:
    """See that what is where checksums are to be written is an earlier file of them, or nothing.

    Raises:
        InvalidError: it is another file.
    """
    with told(path, "read"):
        there = path.exists() or path.is_symlink()
    if not there:
        return
    with contextlib.suppress(CheckpointError):
        for noted in read_checksums(LocalStore(path.parent), path.name):
            unpack_checksums(noted)
            return
    raise InvalidError(
        f"{path}: the checksums of what is written go there, and it is another file; "
        "move it, or choose another target"
    )
