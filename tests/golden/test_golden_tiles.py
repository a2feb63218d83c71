"""The golden checkpoint of chunks in tiles, by both readers; and lies about tiles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt import layout
from gpuckpt.commit import open_step
from gpuckpt.fingerprint import checksum128
from gpuckpt.native import native
from gpuckpt.stores.local import LocalStore
from gpuckpt.tileindex import BLOCKS
from tests import hostile
from tests.golden import reader
from tests.golden.describe import describe
from tests.golden.regenerate import SUMS, sums
from tests.golden.tiles import HOME, SIZE, of_rank, whole, write

ROOT = HOME / "two.zstd"
EXPECTED = json.loads((HOME / "two.json").read_text())["1"]
Change = Callable[[list[Any]], object]


def same(state: Any) -> Any:
    return json.loads(json.dumps(describe(state)))


def codecs(root: Path) -> set[tuple[str, ...]]:
    tensors = open_step(LocalStore(root)).tensors
    assert all(chunk.tiles for entry in tensors for chunk in entry.chunks)
    return {tuple(p.codec for p in chunk.planes) for entry in tensors for chunk in entry.chunks}


def test_the_files_are_those_that_were_written():
    assert (HOME / SUMS).read_text() == sums(HOME)


def test_both_readers_read_the_tiles_of_all_ranks():
    assert same(whole()) == EXPECTED
    assert same(reader.read(ROOT)) == EXPECTED
    assert same(gpuckpt.load(ROOT)) == EXPECTED
    assert codecs(ROOT) == {("raw", BLOCKS), ("raw", "raw", "raw", "zstd"), ("raw",)}


@pytest.mark.parametrize("rank", range(SIZE))
def test_ranks_of_another_kind_read_some_of_the_tiles(rank: int, tmp_path: Path):
    shutil.copytree(ROOT, tmp_path / "root")
    state, wanted = {}, {}
    for name, one in of_rank(rank).items():
        box = np.s_[one.shape[0] * rank // 3 : one.shape[0] * (rank + 1) // 3, ..., 5:64]
        wanted[name] = whole()[name][box]
        offset = (box[0].start, *(0 for _ in one.shape[2:]), 5)
        state[name] = gpuckpt.Sharded(np.zeros_like(wanted[name]), one.shape, offset)
    with gpuckpt.Checkpointer(tmp_path / "root") as ckpt:
        assert ckpt.restore(state) == 1
    for name, array in wanted.items():
        assert state[name].array.tobytes() == array.tobytes(), name


@pytest.mark.parametrize("codec", ["zstd", "raw", "auto"])
def test_the_independent_reader_reads_tiles_as_they_are_written_today(codec: str, tmp_path: Path):
    write(tmp_path / "root", codec)
    assert same(reader.read(tmp_path / "root")) == EXPECTED
    planes = {codec for each in codecs(tmp_path / "root") for codec in each}
    assert planes == {"raw"} or BLOCKS in planes or native() is None


LIES: dict[str, Change] = {
    "no tiles": lambda row: row[8].update(tiles=[]),
    "an axis without tiles": lambda row: row[8]["tiles"].__setitem__(0, []),
    "an axis too few": lambda row: row[8]["tiles"].pop(),
    "tiles that don't ascend": lambda row: row[8]["tiles"][0].insert(0, row[8]["tiles"][0][-1]),
    "a tile without elements": lambda row: row[8]["tiles"][0].insert(0, 0),
    "tiles to beyond the chunk": lambda row: row[8]["tiles"][0].append(10**9),
    "tiles to before its end": lambda row: row[8]["tiles"][0].__setitem__(-1, 1),
    "a tile's end that is no integer": lambda row: row[8]["tiles"][0].__setitem__(0, 1.0),
    "a tile's end that is true": lambda row: row[8]["tiles"][0].insert(0, True),
    "more tiles than the index has": lambda row: row[8]["tiles"][0].insert(0, 1),
    "no word of turning": lambda row: row[8].pop("turned"),
    "turned, or not": lambda row: row[8].update(turned=1),
    "tiles that are a number": lambda row: row[8].update(tiles=7),
    "an object and a base": lambda row: row.insert(8, row[:8]),
    "no object": lambda row: row.pop(8),
    "blocks without tiles": lambda row: (row.pop(8), row.__setitem__(4, sum(p[1] for p in row[7]))),
    "one of two planes": lambda row: row[7].pop(),
    "a chunk that ends after its tensor": lambda row: row.__setitem__(1, 2 * row[1]),
    "a fingerprint of no hex": lambda row: row.__setitem__(5, "z" * 32),
    "a fingerprint below zero": lambda row: row.__setitem__(5, "-1" + "0" * 30),
    "no fingerprint": lambda row: row.__setitem__(5, ""),
    "another length": lambda row: row.__setitem__(4, row[4] - 8),
}


def lying(root: Path, change: Change) -> None:
    """Change a row of the part of rank 0, of two planes, and have all checks fit."""
    (part,) = [path for path in root.iterdir() if ".r0.part.json" in path.name]
    (manifest,) = root.glob("*.manifest.json")
    body = hostile.body_of(part.read_bytes())
    (row,) = [row for row in body["tensors"] if row["name"] == "columns"]
    change(row["chunks"][0])
    text = hostile.sealed_manifest(json.dumps(body).encode())
    part.write_bytes(text)
    world = hostile.body_of(manifest.read_bytes())
    world["parts"][0][1:3] = [len(text), checksum128(text)]
    manifest.write_bytes(hostile.sealed_manifest(json.dumps(world).encode()))
    assert layout.manifest_step(manifest.name) == 1


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_tiles_are_refused_by_both_readers(lie: str, tmp_path: Path):
    shutil.copytree(ROOT, tmp_path / "root")
    lying(tmp_path / "root", LIES[lie])
    with pytest.raises(gpuckpt.CheckpointError):
        gpuckpt.load(tmp_path / "root")
    with pytest.raises((ValueError, KeyError, TypeError, IndexError, AttributeError)):
        reader.read(tmp_path / "root")


def test_the_truth_about_tiles_is_read(tmp_path: Path):
    """What the lies change is what is looked at."""
    shutil.copytree(ROOT, tmp_path / "root")
    lying(tmp_path / "root", lambda row: None)
    assert same(gpuckpt.load(tmp_path / "root")) == EXPECTED
    assert same(reader.read(tmp_path / "root")) == EXPECTED
