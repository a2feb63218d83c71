"""Directories of torch.distributed.checkpoint: `.metadata`, and files of ranks' shards.

They are read without torch, and without unpickling (`dcp_metadata`,
`archives`); they are written by torch's own `FileSystemWriter`.  The checkpoints
that `gpuckpt.adapters.dcp` writes are gpuckpt's own, and not of this format.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpuckpt.boxes import Box
from gpuckpt.conversion.archives import DTYPES, Archive, Laid
from gpuckpt.conversion.checksums import FILE, read_checksums, write_checksums
from gpuckpt.conversion.dcp_metadata import Chunked, Contents, Slice, read_metadata
from gpuckpt.conversion.flat import check_dotted, lost_but_leaves
from gpuckpt.conversion.placing import new_directory, path_of
from gpuckpt.conversion.plain import nested, plain_node
from gpuckpt.conversion.port import PART_NBYTES, Format, Options, Outline, Source, parts_of
from gpuckpt.conversion.slabs import slabs
from gpuckpt.conversion.window import Window
from gpuckpt.dtypes import to_numpy
from gpuckpt.errors import CorruptError, InvalidError, UnsupportedError
from gpuckpt.spec import Spec
from gpuckpt.stores import Bytes, read_all
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.opening import is_local, is_url
from gpuckpt.structure import split_node, walk_json
from gpuckpt.values import Json, NotPlainError

METADATA = ".metadata"
_METADATA_NBYTES_MAX = 256 << 20
_OBJECT_NBYTES_MAX = 16 << 20
_SLAB_NBYTES = 4 * PART_NBYTES


class DcpSource:
    """A directory that is open for reading."""

    def __init__(self, path: Path) -> None:
        """Reads the metadata, and every object.

        Raises:
            CorruptError: they aren't what DCP writes.
        """
        self._store = LocalStore(path)
        self._windows: dict[str, Window] = {}
        nbytes = self._store.size(METADATA)
        where = f"{path}/{METADATA}"
        if nbytes > _METADATA_NBYTES_MAX:
            raise CorruptError(where, f"it has {nbytes} bytes", "see whether it is DCP's")
        contents = read_metadata(read_all(self._store, METADATA), where)
        self._tensors = list(contents.tensors.values())
        left_out: list[str] = []
        self.outline = Outline(
            self._structure(contents, left_out),
            tuple(Spec(name, one.dtype, one.shape) for name, one in contents.tensors.items()),
            left_out=tuple(left_out),
            noted=read_checksums(self._store, FILE),
        ).named()

    def read(self, position: int) -> Iterator[memoryview]:
        """The bytes of a tensor, put together of its chunks, whose CRC-32s are compared."""
        tensor = self._tensors[position]
        item = to_numpy(tensor.dtype).itemsize
        chunks = [(box, _Chunk(self._archive(place), box, tensor)) for box, place in tensor.chunks]
        for slab in slabs(tensor.shape, item, _SLAB_NBYTES):
            if len(chunks) == 1:
                yield from chunks[0][1].parts(slab.count)
                continue
            room = np.empty((*slab.shape, item), np.uint8)
            for box, chunk in chunks:
                common = box & slab
                if common is not None:
                    into = room[common.inside(slab).slices]
                    into[:] = chunk.next(common.count).reshape(into.shape)
            yield from parts_of(room.reshape(-1), item)

    def _structure(self, contents: Contents, left_out: list[str]) -> Json:
        """The state as it was nested, or by name, if that isn't known of all."""
        positions = {name: at for at, name in enumerate(contents.tensors)}
        nodes: dict[str, Json] = {}
        for name in contents.order:
            if name in positions:
                nodes[name] = {"tensor": positions[name]}
                continue
            try:
                nodes[name] = plain_node(self._archive(contents.objects[name])[1].value)
            except NotPlainError as error:
                left_out.append(f"{name}: {error}, and no plain value")
        rows = [(contents.paths.get(name, ()), node) for name, node in nodes.items()]
        return nested(rows) or {"dict": [[name, node] for name, node in nodes.items()]}

    def _archive(self, place: Slice) -> tuple[Window, Archive]:
        window = self._windows.get(place.file)
        if window is None:
            window = self._windows[place.file] = Window(self._store, place.file)
        return window, Archive(window, place.offset, place.nbytes)


class _Chunk:
    """A stored box of a tensor, whose bytes are asked for in C order, a little at a time."""

    def __init__(self, opened: tuple[Window, Archive], box: Box, tensor: Chunked) -> None:
        self._window, archive = opened
        self._laid = laid = archive.tensor(archive.value)
        if (laid.dtype, laid.shape) != (tensor.dtype, box.shape):
            raise self._window.corrupt(
                f"a tensor of {laid.dtype}, {laid.shape} where the metadata has {tensor.dtype}, "
                f"{box.shape}"
            )
        self._item = to_numpy(laid.dtype).itemsize
        self._done, self._crc = 0, 0
        self._whole: Bytes | None = None if laid.is_in_order else self._gathered(laid)

    def parts(self, count: int) -> Iterator[memoryview]:
        """The next `count` elements."""
        step = PART_NBYTES // self._item
        while count:
            yield self.next(min(count, step)).data
            count -= min(count, step)

    def next(self, count: int) -> Bytes:
        """The next `count` elements, as bytes; with the last ones, all are checked."""
        first, nbytes = self._done * self._item, count * self._item
        self._done += count
        if self._whole is not None:
            return self._whole[first : first + nbytes]
        room = np.empty(nbytes, np.uint8)
        laid = self._laid
        self._window.fill(laid.storage.offset + laid.start * self._item + first, room.data)
        self._crc = zlib.crc32(room.data, self._crc)
        if self._done == math.prod(laid.shape) and self._done * self._item == laid.storage.nbytes:
            self._check(self._crc)
        return room

    def _gathered(self, laid: Laid) -> Bytes:
        """All of a tensor that lies in another order (channels last, say), in C order."""
        storage = np.empty(laid.storage.nbytes // self._item, to_numpy(laid.dtype))
        raw = storage.view(np.uint8)
        self._window.fill(laid.storage.offset, raw.data)
        if raw.size == laid.storage.nbytes:
            self._check(zlib.crc32(raw.data))
        strides = [by * self._item for by in laid.strides]
        view = np.lib.stride_tricks.as_strided(storage[laid.start :], laid.shape, strides)
        return np.ascontiguousarray(view).reshape(-1).view(np.uint8)

    def _check(self, crc: int) -> None:
        if crc != self._laid.storage.crc:
            raise self._window.corrupt(
                f"the bytes of the tensor at byte {self._laid.storage.offset} have the CRC-32 "
                f"{crc:08x}, and {self._laid.storage.crc:08x} was written"
            )


@contextlib.contextmanager
def open_dcp(at: str, _: Options) -> Iterator[DcpSource]:
    """A directory on this machine.

    Raises:
        CorruptError: it isn't what DCP writes.
        UnsupportedError: a tensor is of a type that isn't read.
    """
    yield DcpSource(path_of(at))


def lost_in_dcp(outline: Outline) -> list[str]:
    """What DCP's own writer has no place for.

    Raises:
        UnsupportedError: torch has no such elements, or DCP would mix up two names.
    """
    for spec in outline.specs:
        if spec.dtype not in DTYPES:
            raise UnsupportedError(spec.name, f"torch has no elements of type {spec.dtype}")
    if split_node(outline.structure, 0)[0] not in ("dict", "object"):
        raise UnsupportedError("the state", "DCP saves a dict; put it into one")
    check_dotted(outline, "DCP")
    lost = list(dict.fromkeys(_changed(outline.structure)))
    return [*lost, *lost_but_leaves(outline)]


def _changed(node: Json) -> Iterator[str]:
    """What of a structure DCP takes for something else."""
    kind, payload = split_node(node, 0)
    if kind in ("tensor", "value"):
        return
    if kind == "dict" and not payload:
        yield "dicts with nothing in them"
    if kind == "dict" and not all(isinstance(key, str) for key, _ in payload):
        yield "that keys are numbers, say: they become text"
    if kind == "tuple" and any("tensor" in leaf for _, leaf in walk_json(node)):
        yield "that tuples with tensors in them are tuples: they become lists"
    if kind in ("list", "tuple"):
        children = payload
    else:
        children = [payload] if kind == "object" else [child for _, child in payload]
    for child in children:
        yield from _changed(child)


def write_dcp(at: str, source: Source, options: Options) -> None:
    """Write a directory as one process without a group does, tensor by tensor."""
    try:
        from gpuckpt.conversion.dcp_writing import save
    except ImportError as error:
        raise InvalidError(
            "directories of torch.distributed.checkpoint are written by torch, which isn't "
            "installed here: pip install torch"
        ) from error
    with new_directory(path_of(at), force=options.force, before=options.standing) as folder:
        save(folder, source)
        write_checksums(folder / FILE, options.checksums)


def _is_dcp(at: str) -> bool:
    return not (is_url(at) and not is_local(at)) and (path_of(at) / METADATA).is_file()


DCP = Format(
    "dcp",
    recognises=_is_dcp,
    suits=lambda _: False,
    open=open_dcp,
    lost=lost_in_dcp,
    write=write_dcp,
)
