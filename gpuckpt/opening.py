"""`open`: a checkpoint whose tensors are read when they are asked for, or parts of them."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from dataclasses import replace
from types import EllipsisType, TracebackType
from typing import Any, Self

from gpuckpt.arrays import KINDS, Tensor, finish, make
from gpuckpt.boxes import Box, whole_box
from gpuckpt.commit import open_step
from gpuckpt.devices import parse_name
from gpuckpt.errors import ClosedError, InvalidError, NotFoundError
from gpuckpt.names import names_of
from gpuckpt.pending import Checkpoint
from gpuckpt.portions import jobs_of
from gpuckpt.resources import Resources
from gpuckpt.restore import restore_tensors
from gpuckpt.seal import Key, make_seal
from gpuckpt.shards import Shards
from gpuckpt.sources import Opened, open_source
from gpuckpt.spec import Spec
from gpuckpt.stores import Store
from gpuckpt.structure import of_rank, walk_json
from gpuckpt.values import decode_value

Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


def open(  # noqa: A001 - as `safetensors.safe_open`, in its own namespace
    root: str | os.PathLike[str] | Checkpoint,
    step: int | None = None,
    device: str = "cpu",
    like: str = "numpy",
    *,
    rank: int = 0,
    memory: int | str = "256 MiB",
    store: Store | None = None,
    key: Key | None = None,
) -> Reader:
    """Open a committed step (the newest unless named) to read single tensors, or parts of them.

    Reads what the checkpoint lists, and no tensor yet.  `root` may be a
    path or a URL, and, as for `load`, that of one data file.  Arrays are put
    on `device`, as those of `like`: `numpy`, `cupy`, `torch` or `jax`.  Of what each rank
    has of its own, `rank`'s is seen; sharded tensors are whole.  With a
    `key`, nothing is read that isn't sealed with it.  A writer that
    deletes the step doesn't wait for who reads it.

    Raises:
        NotFoundError: no such root, step or device.
        CorruptError: its manifest isn't what was written.
        AuthenticationError: it isn't sealed with `key`.
    """
    seal, key = make_seal(key), None  # so that no traceback's locals have it
    where = parse_name(device)
    if like not in KINDS or (like == "numpy" and where != "cpu"):
        raise InvalidError(f"like is one of {', '.join(KINDS)}, numpy on the cpu; got {like!r}")
    if store is not None:
        opened = Opened(store.root, store, open_step(store, step, seal))
    elif step is None or isinstance(root, Checkpoint):
        opened = open_source(root, seal)
    else:
        opened = open_source((root, step), seal)
    return Reader(opened, Resources(memory), where, like, rank)


class Reader:
    """A step that is open: tensors by name, each read and checked when it is asked for.

    For one thread at a time.  Takes no file handles; `close` gives its memory back.
    """

    def __init__(
        self, opened: Opened, resources: Resources, device: str, like: str, rank: int
    ) -> None:
        self._opened, self._device, self._like = opened, device, like
        self._resources: Resources | None = resources
        self._shards = Shards(opened.manifest)
        structure = of_rank(opened.manifest.structure, rank) or {"dict": []}
        every = list(walk_json(structure))
        nodes = dict(zip(names_of([path for path, _ in every]), (n for _, n in every), strict=True))
        self._positions = {name: node["tensor"] for name, node in nodes.items() if "tensor" in node}
        self._values = {name: node["value"] for name, node in nodes.items() if "value" in node}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back the memory for chunks; nothing can be read any more.  Safe to call twice."""
        self._resources = None

    def __contains__(self, name: object) -> bool:
        return name in self._positions

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def step(self) -> int:
        """Its number."""
        return self._opened.manifest.step

    def keys(self) -> list[str]:
        """The names of all tensors, in the order of the state."""
        return list(self._positions)

    def values(self) -> dict[str, Any]:
        """The plain values of the state by name, which the manifest holds."""
        return {name: decode_value(value) for name, value in self._values.items()}

    def metadata(self) -> dict[str, str]:
        """What is known of the step as text: `step`, `epoch`, `created`, `writer`, `metrics.…`."""
        manifest = self._opened.manifest
        known: dict[str, Any] = {
            "step": manifest.step,
            "epoch": manifest.epoch,
            "created": manifest.created,
            "writer": manifest.writer,
            "ranks": manifest.ranks,
        } | {f"metrics.{name}": value for name, value in manifest.metrics.items()}
        return {name: str(value) for name, value in known.items() if value is not None}

    def get_tensor(self, name: str) -> Any:
        """A whole tensor as a new array, as `load` gives it.

        Raises:
            NotFoundError: there is none of this name, or not all of it.
            CorruptError: some bytes aren't what was written.
        """
        spec = self._spec(name)
        return finish(self._read(name, spec), self._like)

    def get_slice(self, name: str) -> Slice:
        """A tensor of which parts can be read, by `[…]`; reads nothing yet."""
        return Slice(self, name, self._spec(name))

    def _spec(self, name: str) -> Spec:
        if name not in self._positions:
            raise NotFoundError(f"{self._opened.label}: there is no tensor called {name!r}")
        return self._shards.spec(self._positions[name])

    def _part(self, name: str, box: Box, within: tuple[int | slice, ...]) -> Any:
        """What `within` picks of a box of a tensor."""
        tensor = self._read(name, self._shards.spec(self._positions[name], box))
        array = tensor.array[(*within, ...)]  # an array, also if it has no axes
        if array.size < tensor.array.size or not array.flags.c_contiguous:
            array = array.copy(order="C")  # what isn't wanted goes
        spec = replace(tensor.spec, shape=array.shape, axes=None, offset=None, whole=None)
        return finish(Tensor(spec, array, array, writable=True), self._like)

    def _read(self, name: str, spec: Spec) -> Tensor:
        if self._resources is None:
            raise ClosedError(f"{self._opened.label} was closed; open it again")
        at = self._positions[name]
        if lack := self._shards.lack(at, spec.box):
            raise NotFoundError(f"{spec.label}: {lack}")
        tensor = make(spec, self._resources.devices[self._device])
        opened = self._opened
        jobs = list(jobs_of(self._shards, opened.store, {at: [tensor]}, opened.elsewhere))
        if jobs:
            restore_tensors(jobs, self._resources)
        return tensor


class Slice:
    """A tensor of a `Reader`, of which `slice[index]` reads the chunks that have some of it."""

    def __init__(self, reader: Reader, name: str, spec: Spec) -> None:
        self._reader, self._name, self._spec = reader, name, spec

    def get_shape(self) -> list[int]:
        """The whole tensor's."""
        return list(self._spec.shape)

    def get_dtype(self) -> str:
        """The name of its element type, as in a manifest: `float32`, `bfloat16`, …."""
        return self._spec.dtype

    def __getitem__(self, index: Index) -> Any:
        """A new array of what numpy would give of the whole one for integers, slices and `...`.

        A chunk (4 MiB at most, mostly) is read and checked as a whole.

        Raises:
            InvalidError: the index is of another kind, or outside of the tensor.
        """
        box, within = _picked(index, self._spec)
        return self._reader._part(self._name, box, within)  # noqa: SLF001 - one class in two

    def __repr__(self) -> str:
        return f"<{self._name}: {self._spec.dtype} {list(self._spec.shape)}>"


def _picked(index: Index, spec: Spec) -> tuple[Box, tuple[int | slice, ...]]:
    """The smallest box that has all that an index picks, and how to pick it from there."""
    shape = spec.shape
    asked = list(index) if isinstance(index, tuple) else [index]
    gaps = [at for at, one in enumerate(asked) if one is Ellipsis]
    axes = len(asked) - len(gaps)
    if len(gaps) > 1 or axes > len(shape):
        raise InvalidError(f"{spec.name}: {len(asked)} indices for {len(shape)} axes")
    at = gaps[0] if gaps else len(asked)
    rest = [slice(None)] * (len(shape) - axes)
    every = [*asked[:at], *rest, *asked[at + len(gaps) :]]
    spans = [_span(one, extent, spec) for one, extent in zip(every, shape, strict=True)]
    if all(isinstance(one, slice) and one == slice(None) for one in every):
        box = whole_box(shape)
    else:
        box = Box(tuple(first for first, _, _ in spans), tuple(count for _, count, _ in spans))
    return box, tuple(within for _, _, within in spans)


def _span(one: object, extent: int, spec: Spec) -> tuple[int, int, int | slice]:
    """Where on an axis what is picked begins, how long that is, and how to pick it in there."""
    if isinstance(one, slice):
        found = range(extent)[one]
        if not found:
            return 0, 0, slice(None)
        low, high = min(found[0], found[-1]), max(found[0], found[-1])
        back = slice(None, None, found.step) if len(found) > 1 else slice(None)
        return low, high - low + 1, back
    try:
        at = operator.index(one)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidError(
            f"{spec.name}: it is read by integers, slices and '...', not by {type(one).__name__}"
        ) from None
    if isinstance(one, bool) or not -extent <= at < extent:
        raise InvalidError(f"{spec.name}: {one!r} isn't an index of an axis of {extent}")
    return at % extent, 1, 0
