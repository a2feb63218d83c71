"""Orbax's directories: a tree in `_METADATA`, and an array of zarr's for each leaf.

The arrays are in one OCDBT database, or, of old ones, in folders; TensorStore
reads them, part by part, and Orbax writes them.  Both are imported when they are
used.  A `CheckpointManager`'s directory has a folder for each step, and in it
one for each item, `default` if there is one alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpuckpt.conversion.checksums import FILE, read_checksums, write_checksums
from gpuckpt.conversion.flat import check_dotted, lost_but_leaves
from gpuckpt.conversion.orbax_chunks import read_slabs
from gpuckpt.conversion.orbax_tree import (
    REMEDY,
    STRINGS,
    TREE,
    Item,
    item_folders,
    items_of,
    read_json,
    step_folders,
)
from gpuckpt.conversion.placing import new_directory, path_of
from gpuckpt.conversion.plain import nested
from gpuckpt.conversion.port import (
    Format,
    Options,
    Outline,
    Source,
    parts_of,
)
from gpuckpt.conversion.shapes import is_shape
from gpuckpt.dtypes import name_of, to_numpy
from gpuckpt.errors import (
    CheckpointError,
    CorruptError,
    InvalidError,
    UnsupportedError,
)
from gpuckpt.spec import Spec
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.opening import is_local, is_url
from gpuckpt.structure import Path as Keys
from gpuckpt.structure import split_node
from gpuckpt.values import Json, decode_value, encode_value

_EMPTY: dict[str, Json] = {
    "None": {"value": None},
    "Dict": {"dict": []},
    "List": {"list": []},
    "Tuple": {"tuple": []},
}
# What TensorStore's zarr driver has a name for.
DTYPES = frozenset(
    (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128", "bfloat16", "int2", "int4"),
        *("float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"),
        *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn"),
    )
)


class OrbaxSource:
    """A checkpoint, or one step's items, open for reading."""

    def __init__(self, path: Path, step: int | None) -> None:
        """Reads the tree, and what each array says of itself.

        Raises:
            CorruptError: it isn't what Orbax writes.
            NotFoundError: there is no such step.
        """
        self._arrays: list[Any] = []
        self._specs: list[Spec] = []
        left_out: list[str] = []
        items, number = items_of(path, step)
        rows: list[tuple[Keys, Json]] = []
        with _as_corrupt(path):
            for item in items:
                rows += self._rows(item, left_out)
        tree = nested(rows)
        if tree is None and rows:
            raise CorruptError(str(path), "its tree makes no sense", REMEDY)
        noted = [
            read_checksums(LocalStore(one.path), FILE, "".join(f"{key}." for key in one.before))
            for one in items
        ]
        self.outline = Outline(
            tree or {"dict": []},
            tuple(self._specs),
            step=number,
            left_out=tuple(left_out),
            noted=tuple(itertools.chain.from_iterable(noted)),
        ).named()

    def read(self, position: int) -> Iterator[memoryview]:
        """The bytes of an array, slab by slab."""
        array, spec = self._arrays[position], self._specs[position]
        item = to_numpy(spec.dtype).itemsize
        with _as_corrupt(Path(spec.name)):
            slabs = read_slabs(array, item)
        while True:
            with _as_corrupt(Path(spec.name)):
                found = next(slabs, None)
            if found is None:
                return
            yield from parts_of(found, item)

    def _rows(self, item: Item, left_out: list[str]) -> Iterator[tuple[Keys, Json]]:
        strings = read_json(item.path, STRINGS) if (item.path / STRINGS).is_file() else {}
        for path, name, kind in item.leaves():
            if kind in _EMPTY:
                yield path, _EMPTY[kind]
            elif kind == "string":
                yield path, {"value": encode_value(str(strings[name]))}
            elif kind == "scalar":
                yield path, {"value": encode_value(_scalar(_open(item, name)))}
            elif kind in ("jax.Array", "np.ndarray"):
                self._add(".".join(map(str, path)), _open(item, name))
                yield path, {"tensor": len(self._specs) - 1}
            else:
                left_out.append(f"{'.'.join(map(str, path))}: a {kind}")

    def _add(self, name: str, array: Any) -> None:
        shape, dtype = tuple(array.shape), name_of(np.dtype(array.dtype.numpy_dtype))
        if dtype is None or not is_shape(shape):
            raise ValueError(f"{name} is of {array.dtype}, {shape}")
        self._arrays.append(array)
        self._specs.append(Spec(name, dtype, shape))


def _open(item: Item, name: str) -> Any:
    """An array of TensorStore's, of which nothing is read but what it says of itself."""
    import tensorstore

    folder = f"{item.path}/"
    store: dict[str, Any] = {"driver": "file", "path": f"{folder}{name}/"}
    if item.tree.get("use_ocdbt", True):
        base = {"driver": "file", "path": folder}
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    elif "/" in name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is no folder beside it")
    spec: dict[str, Any] = {
        "driver": "zarr3" if item.tree.get("use_zarr3") else "zarr",
        "kvstore": store,
    }
    if item.tree.get("store_array_data_equal_to_fill_value"):
        spec["fill_missing_data_reads"] = False  # then what isn't there is lost, and not zero
    return tensorstore.open(spec, read=True, open=True).result()


def _scalar(array: Any) -> bool | int | float:
    if math.prod(array.shape) != 1:
        raise ValueError(f"a scalar of the shape {array.shape}")
    found = np.asarray(array.read().result()).reshape(-1)[0].item()
    if not isinstance(found, bool | int | float):
        raise TypeError(f"a scalar of {array.dtype}")
    return found


@contextlib.contextmanager
def _as_corrupt(where: Path) -> Iterator[None]:
    """TensorStore's errors, and those of reading what isn't as it should be, as ours."""
    try:
        yield
    except CheckpointError:
        raise
    except ImportError as error:
        raise _missing() from error
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:400]}"
        raise CorruptError(str(where), f"not what Orbax writes ({reason})", REMEDY) from error


def _missing() -> InvalidError:
    return InvalidError(
        "Orbax's directories are read by tensorstore and written by orbax-checkpoint, which "
        "aren't installed here: pip install 'gpuckpt[orbax]'"
    )


@contextlib.contextmanager
def open_orbax(at: str, options: Options) -> Iterator[OrbaxSource]:
    """A directory on this machine: one tree, or a manager's newest step unless `options` name it.

    Raises:
        NotFoundError: there is no such step.
        CorruptError: it isn't what Orbax writes.
        InvalidError: tensorstore isn't installed.
    """
    yield OrbaxSource(path_of(at), options.step)


def lost_in_orbax(outline: Outline) -> list[str]:
    """What Orbax has no place for.

    Raises:
        UnsupportedError: it can't write such an array, or would mix up two names.
    """
    for spec in outline.specs:
        if spec.dtype not in DTYPES:
            raise UnsupportedError(spec.name, f"Orbax has no arrays of {spec.dtype}")
        if not spec.nbytes:
            raise UnsupportedError(spec.name, "Orbax has no arrays without elements; leave it out")
    if "tensor" in outline.structure or "value" in outline.structure:
        raise UnsupportedError("the state", "Orbax saves containers; put it into a dict")
    check_dotted(outline, "Orbax")
    values = {name: decode_value(value) for name, value in outline.values.items()}
    lost = [
        f"{name}: Orbax has no place for {_described(value)}"
        for name, value in values.items()
        if not is_kept(value)
    ]
    return [*lost, *dict.fromkeys(_changed(outline.structure)), *lost_but_leaves(outline)]


def _described(value: Any) -> str:
    return "an int of so many digits" if type(value) is int else f"a {type(value).__name__}"


def is_kept(value: Any) -> bool:
    """Whether Orbax writes a value so that it comes back as what it was."""
    if type(value) is int:
        return -(1 << 63) <= value < 1 << 63
    return value is None or type(value) in (bool, float, str)


def _changed(node: Json) -> Iterator[str]:
    kind, payload = split_node(node, 0)
    if kind in ("tensor", "value"):
        return
    if kind == "tuple" and payload:
        yield "that tuples are tuples: they become lists"
    if kind == "dict" and not all(isinstance(key, str) for key, _ in payload):
        yield "that keys are numbers, say: they become text"
    children = payload if kind in ("list", "tuple") else []
    if kind not in ("list", "tuple"):
        children = [payload] if kind == "object" else [child for _, child in payload]
    for child in children:
        yield from _changed(child)


def write_orbax(at: str, source: Source, options: Options) -> None:
    """Write a directory by Orbax's PyTreeCheckpointer, slab by slab."""
    try:
        from gpuckpt.conversion.orbax_writing import save
    except ImportError as error:
        raise _missing() from error
    with new_directory(path_of(at), force=options.force, before=options.standing) as folder:
        save(folder, source)
        write_checksums(folder / FILE, options.checksums)


def _is_orbax(at: str) -> bool:
    if is_url(at) and not is_local(at):
        return False
    path = path_of(at)
    return bool(item_folders(path) and (path / TREE).is_file()) or bool(step_folders(path))


ORBAX = Format(
    "orbax",
    recognises=_is_orbax,
    suits=lambda _: False,
    open=open_orbax,
    lost=lost_in_orbax,
    write=write_orbax,
)
