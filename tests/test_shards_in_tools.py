"""Tools that read checkpoints know what shards are: show, verify, repair, and warm starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.commit import open_step
from gpuckpt.manifest import Manifest
from gpuckpt.repair import repair
from gpuckpt.resources import Resources
from gpuckpt.salvage import survey
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.verify import verify_step
from tests.resharding import Array, Piece, divided, save_pieces, split

COUNT = 4


def table(seed: int = 0, rows: int = 64) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, 32), np.float32)


def pieces_of(seed: int, count: int = COUNT) -> list[Piece]:
    array = table(seed)
    return [
        *split("w", array, divided(array.shape, {0: count})),
        Piece("plain", np.arange(9.0) + seed),
    ]


def damage(store: MemoryStore, manifest: Manifest, at: int) -> None:
    """Flip a bit of a row's first chunk."""
    extent = manifest.tensors[at].chunks[0].extent
    store.files[extent.segment][extent.offset + 5] ^= 1


def damaged(at: int = 2) -> MemoryStore:
    """Two steps, of which the second has lost one of its shards."""
    store = MemoryStore()
    save_pieces(store, pieces_of(0), codec="raw")
    manifest = save_pieces(store, pieces_of(1), 2, codec="raw")
    damage(store, manifest, at)
    return store


def test_verify_names_the_shard():
    (found,) = verify_step(damaged(), 2, Resources("64 MiB"))
    assert found.tensor == "w[32:48, 0:32]"


def test_a_tensor_of_which_a_shard_is_lost_is_left_out_whole():
    target = MemoryStore()
    done = repair(damaged(), 2, target)
    assert [one.entry.spec.label for one in done.lost] == ["w[32:48, 0:32]"]
    assert list(gpuckpt.load("", store=target)) == ["plain"]
    assert {entry.spec.name for entry in open_step(target).tensors} == {"plain"}


def test_a_lost_shard_is_filled_with_its_older_value():
    target = MemoryStore()
    done = repair(damaged(), 2, target, fill=True)
    assert done.filled == {"w[32:48, 0:32]": 1}
    expected = table(1)
    expected[32:48] = table(0)[32:48]
    assert gpuckpt.load("", store=target)["w"].tobytes() == expected.tobytes()


def test_a_shard_is_found_again_in_another_steps_files():
    store = MemoryStore()
    first = save_pieces(store, pieces_of(0), codec="raw")
    save_pieces(store, pieces_of(0), 2, codec="raw")
    damage(store, first, 1)
    found = survey(store, 1, Resources("64 MiB"))
    assert found.recovered == {"w[16:32, 0:32]": 2}
    target = MemoryStore()
    assert repair(store, 1, target).is_whole
    assert gpuckpt.load("", store=target)["w"].tobytes() == table(0).tobytes()


def test_without_a_manifest_shards_are_known_from_their_data_files():
    store, target = MemoryStore(), MemoryStore()
    save_pieces(store, pieces_of(3))
    store.remove("step-000000000001.manifest.json")
    repair(store, 1, target)
    loaded = gpuckpt.load("", store=target)
    assert loaded["w"].tobytes() == table(3).tobytes()
    assert loaded["plain"].tolist() == (np.arange(9.0) + 3).tolist()


def test_without_a_manifest_what_is_sharded_otherwise_now_is_one_tensor_still():
    """The structure is the older step's, which had other shards."""
    store, target = MemoryStore(), MemoryStore()
    save_pieces(store, pieces_of(0, 2))
    save_pieces(store, [*pieces_of(1, 3), *split("new", table(5), divided((64, 32), {1: 2}))], 2)
    store.remove("step-000000000002.manifest.json")
    repair(store, 2, target, fill=True)
    loaded = gpuckpt.load("", store=target)
    assert {name: array.tobytes() for name, array in loaded.items()} == {
        "w": table(1).tobytes(),
        "plain": (np.arange(9.0) + 1).tobytes(),
        "new": table(5).tobytes(),
    }


def test_each_ranks_own_things_are_repaired_under_their_ranks():
    store, target = MemoryStore(), MemoryStore()
    pieces = [Piece("own", np.full(3, rank, float), rank=rank) for rank in range(3)]
    manifest = save_pieces(store, [*pieces, Piece("plain", np.zeros(2))], codec="raw")
    damage(store, manifest, 1)
    repair(store, 1, target)
    written = open_step(target)
    assert [entry.spec.label for entry in written.tensors] == [
        *("own of rank 0", "own of rank 2"),
        "plain",
    ]
    ranks = dict(written.structure["dict"])["own"]["ranks"]
    assert ranks == [[0, {"tensor": 0}], [2, {"tensor": 1}]]


def show(root: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "gpuckpt", "show", str(root), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {leaf["name"]: leaf for leaf in json.loads(done.stdout)["leaves"]}


def test_show_shows_the_whole_tensor(tmp_path):
    array = table()
    manifest = save_pieces(LocalStore(tmp_path), pieces_of(0))
    leaf = show(tmp_path)["w"]
    assert (leaf["shape"], leaf["raw_nbytes"]) == ([64, 32], array.nbytes)
    assert leaf["norm"] == pytest.approx(float(np.linalg.norm(array)))
    shards = [entry for entry in manifest.tensors if entry.spec.name == "w"]
    assert leaf["encoded_nbytes"] == sum(c.extent.length for e in shards for c in e.chunks)


def partitions(root: Path, count: int, step: int = 1, seed: int = 0) -> list[Path]:
    """Data files of as many workers, each with its rows, and nothing else."""
    found = []
    array = table(seed)
    for at, box in enumerate(divided(array.shape, {0: count})):
        place = root / f"worker{at}-{step}"
        piece = Piece("w", array[box.slices].copy(), box, array.shape)
        save_pieces(LocalStore(place), [piece, Piece(f"own{at}", np.full(2, at))], step)
        (segment,) = place.glob("*.segment")
        found.append(segment)
    return found


def test_two_workers_partitions_initialise_three(tmp_path):
    sources = partitions(tmp_path, 2)
    array = table()
    for box in divided(array.shape, {0: 3}):
        mine = gpuckpt.Sharded(np.zeros(box.shape, np.float32), array.shape, box.offset)
        report = gpuckpt.warm_start({"w": mine}, sources)
        assert mine.array.tobytes() == array[box.slices].tobytes()
        assert all(str(source) in report.matched["w"] for source in sources)
        assert set(report.unused) == {"own0", "own1"}


def test_roots_and_data_files_are_taken_together_in_any_order(tmp_path):
    sources = partitions(tmp_path, 3)
    mixed = [sources[2], sources[0].parent, sources[1]]
    state: dict[str, Array] = {
        "w": np.zeros((64, 32), np.float32),
        "own2": np.zeros(2, np.int64),
    }
    gpuckpt.warm_start(state, mixed, strict=True)
    assert state["w"].tobytes() == table().tobytes()
    assert state["own2"].tolist() == [2, 2]


def test_of_partitions_that_two_sources_have_the_later_ones_win(tmp_path):
    old, new = partitions(tmp_path, 2, 1, seed=0), partitions(tmp_path, 2, 2, seed=1)
    state = {"w": np.zeros((64, 32), np.float32)}
    gpuckpt.warm_start(state, [*old, new[1]])
    assert state["w"][:32].tobytes() == table(0)[:32].tobytes()
    assert state["w"][32:].tobytes() == table(1)[32:].tobytes()
    gpuckpt.warm_start(state, [*old, *new])
    assert state["w"].tobytes() == table(1).tobytes()


def test_a_source_that_has_all_needs_no_other(tmp_path):
    old = partitions(tmp_path, 2)
    gpuckpt.save(tmp_path / "whole", {"w": table(7)})
    state = {"w": np.zeros((64, 32), np.float32)}
    gpuckpt.warm_start(state, [*old, tmp_path / "whole"])
    assert state["w"].tobytes() == table(7).tobytes()
    report = gpuckpt.warm_start(state, [tmp_path / "whole", old[1]])
    assert state["w"].tobytes() == table(7).tobytes(), "half a tensor isn't put over a whole one"
    assert report.matched == {"w": f"{tmp_path / 'whole'} step 0"}


def test_a_partition_that_is_missing_is_named(tmp_path):
    sources = partitions(tmp_path, 3)
    report = gpuckpt.warm_start({"w": np.zeros((64, 32), np.float32)}, sources[:2])
    assert "[44:64, 0:32] of it is in none of the 2 shards" in report.unmatched["w"]


def test_damage_in_a_partition_is_blamed_on_its_own_file(tmp_path):
    sources = partitions(tmp_path, 2)
    data = bytearray(sources[0].read_bytes())
    data[80] ^= 1
    sources[0].write_bytes(data)
    with pytest.raises(gpuckpt.CorruptError) as error:
        gpuckpt.warm_start({"w": np.zeros((64, 32), np.float32)}, sources)
    assert str(sources[0]) in error.value.where
    assert error.value.where.startswith("w[0:32, 0:32] in ")


def test_shards_of_other_types_or_shapes_are_not_mixed(tmp_path):
    sources = partitions(tmp_path, 2)
    other = np.zeros((64, 16), np.float32)
    box = divided(other.shape, {0: 2})[1]
    place = tmp_path / "other"
    save_pieces(LocalStore(place), [Piece("w", other[box.slices].copy(), box, other.shape)])
    report = gpuckpt.warm_start({"w": np.zeros((64, 16), np.float32)}, [*sources, place])
    assert "[0:32, 0:16] of it is in none of the 1 shards" in report.unmatched["w"]


def test_partitions_may_have_been_moved(tmp_path):
    sources = partitions(tmp_path, 2)
    here = tmp_path / "gathered"
    here.mkdir()
    moved = [Path(shutil.move(os.fspath(one), here)) for one in sources]
    state = {"w": np.zeros((64, 32), np.float32)}
    gpuckpt.warm_start(state, moved)
    assert state["w"].tobytes() == table().tobytes()


def test_a_shard_of_which_no_file_says_anything_is_lost():
    store, target = MemoryStore(), MemoryStore()
    save_pieces(store, pieces_of(0))
    pieces = pieces_of(1)
    save_pieces(store, [*pieces[:1], *pieces[2:]], 2)
    done = repair(store, 2, target)
    assert [one.entry.spec.label for one in done.lost] == ["w[16:32, 0:32]"]
    assert not done.is_whole
    assert list(gpuckpt.load("", store=target)) == ["plain"]
    filled = MemoryStore()
    assert repair(store, 2, filled, fill=True).filled == {"w[16:32, 0:32]": 1}
    expected = table(1)
    expected[16:32] = table(0)[16:32]
    assert gpuckpt.load("", store=filled)["w"].tobytes() == expected.tobytes()
