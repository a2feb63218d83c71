"""Bytes that ranks of another world read of a checkpoint, and what cutting shards for them costs.

    python -m bench.resharding

Prints tables of docs/RANKS.md: bytes read to bytes needed (both as they are
on the disk) of each kind of resharding, and the time of a save and a restore
of one layout, with shards cut and not.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from operator import itemgetter
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gpuckpt import cutting
from gpuckpt.cutting import rows_for
from gpuckpt.layout import manifest_name
from gpuckpt.resources import Resources
from gpuckpt.spec import Spec
from gpuckpt.stores.local import LocalStore
from tests.resharding import (
    CountingStore,
    Piece,
    divided,
    needed_nbytes,
    restore_pieces,
    save_pieces,
)

Ways = Mapping[int, int]
Cut = Callable[[Spec], list[Spec]]

MANY = (1, 2, 3, 5, 8, 16)
USUAL = (1, 2, 3, 4, 6, 8, 12, 16)
KINDS: dict[str, list[tuple[Ways, Ways]]] = {
    "rows to rows": [({0: n}, {0: m}) for n in MANY for m in (*MANY, 7, 11)],
    "columns to columns": [({1: n}, {1: m}) for n in MANY[1:] for m in (*MANY, 7, 11)],
    "rows to columns": [({0: n}, {1: m}) for n in (3, 8) for m in USUAL],
    "columns to rows": [({1: n}, {0: m}) for n in (3, 8) for m in USUAL],
    "mesh to mesh": [
        ({0: 4, 1: 2}, {0: 2, 1: 4}),
        ({0: 2, 1: 8}, {0: 16}),
        ({0: 4, 1: 4}, {0: 3, 1: 4}),
        ({0: 2, 1: 2}, {0: 2, 1: 8}),
    ],
}
SHAPES = ((256, 1024), (1024, 2048), (4096, 4096))
PLAIN = "chunks of 4 MiB"
# Of a transformer: what a block has, and its embedding.
MODEL = ((3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096), (16384, 1024), (4096,), (1024,))
MODEL_KINDS = {
    "rows to rows": (0, 0),
    "columns to columns": (1, 1),
    "rows to columns": (0, 1),
    "columns to rows": (1, 0),
}
SAVED = (3, 8)
WORLDS = ((2, 3), (3, 2), (8, 6), (4, 16), (16, 12))
CUTS: dict[str, Cut] = {
    PLAIN: lambda spec: [spec],
    "none": partial(rows_for, reshard="none"),
    "same": partial(rows_for, reshard="same"),
    "any": partial(rows_for, reshard="any"),
}


@contextlib.contextmanager
def chunks_of(label: str) -> Iterator[None]:
    """Inside, chunks as a save under this label has them."""
    known = cutting.CHUNKS
    cutting.CHUNKS = 1 if label == PLAIN else known
    try:
        yield
    finally:
        cutting.CHUNKS = known


def pieces(array: np.ndarray, ways: Ways, how: Cut, name: str = "w") -> Iterator[Piece]:
    """An array's shards in one world, as views of it, cut."""
    for box in dict.fromkeys(divided(array.shape, ways)):
        spec = Spec(name, "bfloat16", box.shape, offset=box.offset, whole=array.shape)
        for part in how(spec):
            inner = part.box
            yield Piece(name, array[inner.slices], inner, array.shape, tiled=part.tiled)


def read_and_needed(
    array: np.ndarray, saved: Ways, wanted: Ways, how: Cut
) -> tuple[float, float, int]:
    """Bytes read and bytes needed, by all ranks together; and how many rows there were."""
    store = CountingStore()
    manifest = save_pieces(store, list(pieces(array, saved, how)), chunk_nbytes=4 << 20)
    needed = 0.0
    store.read_nbytes = 0
    for box in divided(array.shape, wanted):
        if box.count:
            target = Piece("w", np.empty(box.shape, array.dtype), box, array.shape)
            restore_pieces(store, manifest, [target])
            needed += needed_nbytes(manifest, {"w": [box]})
    return store.read_nbytes, needed, len(manifest.tensors)


@cache
def random_array(shape: tuple[int, ...]) -> np.ndarray:
    """Weights as training leaves them."""
    numbers = np.random.default_rng(7).standard_normal(shape, np.float32) * 0.02
    return numbers.astype(ml_dtypes.bfloat16)


def bytes_read(cuts: Mapping[str, Cut]) -> None:
    """A row for each kind and size; each cell: mean and most of all worlds, and most rows."""
    print("| resharding | bfloat16 tensor | " + " | ".join(cuts) + " |")
    print("|---|---|" + "---|" * len(cuts))
    for kind, cases in KINDS.items():
        for shape in SHAPES:
            array = random_array(shape)
            cells = []
            for label, how in cuts.items():
                with chunks_of(label):
                    found = [read_and_needed(array, *case, how) for case in cases]
                each = [read / needed for read, needed, _ in found]
                rows = max(count for *_, count in found)
                cells.append(f"{statistics.mean(each):.2f} ({max(each):.2f}), {rows}")
            size = f"{shape[0]} × {shape[1]}"  # noqa: RUF001
            print(f"| {kind} | {size} | " + " | ".join(cells) + " |", flush=True)


def model(kinds: list[str], cuts: Mapping[str, Cut]) -> None:
    """The same of all tensors of a model together: least and most of some worlds."""
    print("| resharding of a model | " + " | ".join(cuts) + " |")
    print("|---|" + "---|" * len(cuts))
    for name in kinds:
        one, other = MODEL_KINDS[name]
        cells = []
        for label, how in cuts.items():
            each = []
            for few, many in WORLDS:
                read = needed = 0.0
                for shape in MODEL:
                    saved, wanted = (
                        {axis % len(shape): n} for axis, n in ((one, few), (other, many))
                    )
                    with chunks_of(label):
                        found = read_and_needed(random_array(shape), saved, wanted, how)
                    read, needed = read + found[0], needed + found[1]
                each.append(read / needed)
            cells.append(f"{min(each):.2f} … {max(each):.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def every_world(kinds: list[str], cuts: Mapping[str, Cut]) -> None:
    """The same from some numbers of ranks to each from 1 to 16: mean and most, and of which."""
    print("| resharding of a model | " + " | ".join(cuts) + " |")
    print("|---|" + "---|" * len(cuts))
    for name in kinds:
        one, other = MODEL_KINDS[name]
        cells = []
        for label, how in cuts.items():
            found: dict[tuple[int, int], float] = {}
            for few in SAVED:
                with chunks_of(label):
                    found |= {(few, many): r for many, r in to_each(one, other, few, how).items()}
            (few, many), most = max(found.items(), key=itemgetter(1))
            cells.append(f"{statistics.mean(found.values()):.2f} ({most:.2f}: {few} to {many})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def to_each(one: int, other: int, few: int, how: Cut) -> dict[int, float]:
    """Bytes that 1 to 16 ranks read of the model to those that they need, by their number."""
    read: dict[int, float] = dict.fromkeys(range(1, 17), 0.0)
    needed, resources = dict(read), Resources("64 MiB")
    for shape in MODEL:
        array, store = random_array(shape), CountingStore()
        saved = list(pieces(array, {one % len(shape): few}, how))
        manifest = save_pieces(store, saved, chunk_nbytes=4 << 20)
        for many in read:
            store.read_nbytes = 0
            boxes = [b for b in divided(shape, {other % len(shape): many}) if b.count]
            for box in boxes:
                target = Piece("w", np.empty(box.shape, array.dtype), box, shape)
                restore_pieces(store, manifest, [target], resources=resources)
            read[many] += store.read_nbytes
            needed[many] += needed_nbytes(manifest, {"w": boxes})
    return {many: read[many] / needed[many] for many in read}


def timed(directory: Path, arrays: list[np.ndarray], ways: Ways, how: Cut) -> tuple[float, ...]:
    """Seconds of a save and a restore of the same layout, of their processors, and more.

    Then bytes of the manifest, and rows.
    """
    store = LocalStore(directory)
    every = [
        piece for at, array in enumerate(arrays) for piece in pieces(array, ways, how, f"w{at}")
    ]
    begun = seconds()
    manifest = save_pieces(store, every, memory="256 MiB", chunk_nbytes=4 << 20)
    saved = seconds() - begun
    targets = [
        Piece(f"w{at}", np.ones(box.shape, array.dtype), box, array.shape)
        for at, array in enumerate(arrays)
        for box in divided(array.shape, ways)
    ]
    begun = seconds()
    restore_pieces(store, manifest, targets, memory="256 MiB")
    restored = seconds() - begun
    nbytes = store.size(manifest_name(manifest.step))
    return (*saved, *restored, nbytes, len(manifest.tensors))


def seconds() -> npt.NDArray[np.float64]:
    """By the clock, and of the processors."""
    return np.array([time.perf_counter(), time.process_time()])


def costs(rounds: int, count: int, cuts: Mapping[str, Cut]) -> None:
    """Times of each cut, by turns, as ratios to the first one of them."""
    arrays = [random_array((4096, 4096)) for _ in range(count)]
    print("| 8 shards by | cut | save | its CPU | restore | its CPU | manifest | rows |")
    print("|---|---|---|---|---|---|---|---|")
    for name, ways in {"rows": {0: 8}, "columns": {1: 8}}.items():
        found: dict[str, list[tuple[float, ...]]] = {label: [] for label in cuts}
        for _ in range(rounds):
            for label, how in cuts.items():
                with tempfile.TemporaryDirectory() as directory, chunks_of(label):
                    found[label].append(timed(Path(directory), arrays, ways, how))
        for label, each in found.items():
            cells = []
            for at in range(4):
                pairs = zip(each, found[next(iter(cuts))], strict=True)
                ratios = [one[at] / base[at] for one, base in pairs]
                median = statistics.median(ratios)
                cells.append(f"{median:.2f} ({min(ratios):.2f} … {max(ratios):.2f})")
            nbytes, rows = each[0][4:]
            cells += [f"{nbytes / 2**10:.0f} KiB", f"{rows}"]
            print(f"| {name} | {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tensors", type=int, default=4)
    parser.add_argument("--kinds", nargs="*", default=list(MODEL_KINDS))
    parser.add_argument("--only", choices=("bytes", "model", "worlds", "costs"))
    parser.add_argument("--cuts", nargs="*", choices=tuple(CUTS), default=list(CUTS))
    given = parser.parse_args()
    wanted = {label: CUTS[label] for label in given.cuts}
    if given.only in (None, "bytes"):
        bytes_read(wanted)
    if given.only in (None, "model"):
        model(given.kinds, wanted)
    if given.only in {None, "worlds"}:
        every_world(given.kinds, wanted)
    if given.only in (None, "costs"):
        costs(given.rounds, given.tensors, wanted)
