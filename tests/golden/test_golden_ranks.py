"""The golden checkpoint of four ranks, by both readers; and lies about parts."""

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
from gpuckpt.groups import Group
from gpuckpt.stores.local import LocalStore
from tests.golden import reader
from tests.golden.describe import describe
from tests.golden.ranks import HOME, SIZE, STEPS, of_rank, own, whole, write
from tests.golden.regenerate import SUMS, sums
from tests.ranks import run_ranks

ROOT = HOME / "four.raw"
EXPECTED = json.loads((HOME / "four.json").read_text())


def same(state: Any) -> Any:
    return json.loads(json.dumps(describe(state)))


def as_rank_0(step: int) -> Any:
    """As one process loads it."""
    return same(whole(step) | {"own": own(0, step)})


def test_the_files_are_those_that_were_written():
    assert (HOME / SUMS).read_text() == sums(HOME)


@pytest.mark.parametrize("step", STEPS)
def test_both_readers_read_all_ranks_states_as_one(step):
    assert same(whole(step)) == EXPECTED[str(step)]
    assert same(reader.read(ROOT, step)) == EXPECTED[str(step)]
    assert same(gpuckpt.load(ROOT, step)) == as_rank_0(step)


@pytest.mark.parametrize("step", STEPS)
def test_four_ranks_restore_what_four_have_saved(step, tmp_path):
    shutil.copytree(ROOT, tmp_path / "root")

    def work(group: Group) -> None:
        state, wanted = of_rank(group.rank, 1), of_rank(group.rank, step)
        state["table"].array[...] = -1
        with gpuckpt.Checkpointer(tmp_path / "root", group=group, group_timeout=30) as ckpt:
            assert ckpt.restore(state, step) == step
        np.testing.assert_equal(state["table"].array, wanted["table"].array)
        np.testing.assert_equal(state["own"].value, wanted["own"].value)
        np.testing.assert_equal(state["w"], wanted["w"])

    run_ranks(SIZE, work)


def test_it_has_shards_replicas_cut_and_whole_what_is_each_ranks_own_and_older_segments():
    manifest = open_step(LocalStore(ROOT), 2)
    assert (manifest.ranks, len(manifest.parts)) == (4, 4)
    rows: dict[str, int] = {}
    for entry in manifest.tensors:
        rows[entry.spec.name] = rows.get(entry.spec.name, 0) + 1
    assert rows["w"] >= 4
    assert rows["grid"] == 4
    assert rows["table"] >= 3
    assert rows["own.noise"] == 4
    assert {layout.segment_step(name) for name in manifest.segments} == {1, 2}
    requires = {one for path in ROOT.iterdir() if path.suffix == ".json" for one in said(path)}
    assert {"parts", "shards", "ranks"} <= requires


@pytest.mark.parametrize("codec", ["raw", "zstd", "delta"])
def test_the_independent_reader_reads_what_ranks_write_today(codec, tmp_path):
    write(tmp_path / "root", codec)
    for step in STEPS:
        assert describe(reader.read(tmp_path / "root", step)) == describe(whole(step))


def body(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())["manifest"]
    return found


def said(path: Path) -> list[str]:
    return list(body(path)["requires"])


def put(path: Path, changed: dict[str, Any]) -> bytes:
    text = json.dumps(changed, separators=(",", ":")).encode()
    head = layout.MANIFEST_HEAD % (layout.VERSION, checksum128(text))
    path.write_bytes(head.encode() + text + layout.MANIFEST_TAIL)
    return path.read_bytes()


def edit(root: Path, lie: Callable[[dict[str, Any], list[dict[str, Any]]], object]) -> None:
    """Write step 2 with a lie in it, all checks made good again."""
    (path,) = root.glob("step-000000000002.manifest.json")
    world = body(path)
    names = [row[0] for row in world["parts"]]
    parts = [body(root / name) for name in names]
    lie(world, parts)
    for at, (name, part) in enumerate(zip(names, parts, strict=True)):
        data = put(root / name, part)
        if at < len(world["parts"]) and world["parts"][at][0] == name:
            world["parts"][at][1:3] = [len(data), checksum128(data)]
    put(path, world)


def table(parts: list[dict[str, Any]], rank: int = 0) -> dict[str, Any]:
    return next(row for row in parts[rank]["tensors"] if row["name"] == "table")


def swap(world: dict[str, Any]) -> None:
    first, second, *rest = world["parts"]
    world["parts"] = [second, first, *rest]


LIES: dict[str, Callable[[dict[str, Any], list[dict[str, Any]]], object]] = {
    "another count of ranks": lambda world, parts: world.update(ranks=3),
    "a huge count of ranks": lambda world, parts: world.update(ranks=2**62),
    "no count of ranks": lambda world, parts: world.pop("ranks"),
    "fewer parts": lambda world, parts: world["parts"].pop(),
    "parts in another order": lambda world, parts: swap(world),
    "one part twice": lambda world, parts: world["parts"].__setitem__(1, world["parts"][0]),
    "tensors beside parts": lambda world, parts: world.update(tensors=parts[0]["tensors"]),
    "a part of another step": lambda world, parts: parts[1].update(step=1),
    "a part of another rank": lambda world, parts: parts[1].update(rank=2),
    "a part of other ranks": lambda world, parts: parts[1].update(ranks=5),
    "a part that has parts": lambda world, parts: parts[1].update(parts=world["parts"]),
    "a part of a rank that isn't": lambda world, parts: parts[1].update(rank=4),
    "a part whose name is a path": lambda world, parts: world["parts"][0].__setitem__(0, "../x"),
    "a part that is a segment": lambda world, parts: world["parts"][0].__setitem__(
        0, world["segments"][0]
    ),
    "a box beyond the end": lambda world, parts: table(parts).update(offset=[9, 0]),
    "a huge whole": lambda world, parts: table(parts).update(whole=[2**60, 2**60]),
    "another whole": lambda world, parts: table(parts).update(whole=[11, 3]),
    "another type": lambda world, parts: table(parts).update(dtype="int64"),
    "an offset without a whole": lambda world, parts: table(parts).pop("whole"),
    "another number of axes": lambda world, parts: table(parts).update(offset=[0]),
    "a negative offset": lambda world, parts: table(parts).update(offset=[-1, 0]),
    "one box twice in a part": lambda world, parts: parts[0]["tensors"].append(table(parts)),
    "another structure": lambda world, parts: parts[1].update(structure={"list": []}),
    "a number that isn't there": lambda world, parts: parts[1].update(structure={"tensor": 99}),
    "an unknown feature": lambda world, parts: parts[2]["requires"].append("magic"),
    "no rows of a shard": lambda world, parts: table(parts).update(shape=[0, 3], chunks=[]),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_lies_about_parts_are_refused(lie, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(ROOT, root)
    edit(root, lambda world, parts: None)
    assert same(gpuckpt.load(root, 2)) == as_rank_0(2)
    edit(root, lie)
    with pytest.raises(gpuckpt.CheckpointError):
        gpuckpt.load(root, 2)


def test_a_part_that_is_lost_or_changed_is_damage_and_the_step_before_is_taken(tmp_path):
    changes: list[Callable[[Path], object]] = [Path.unlink, lambda path: path.write_bytes(b"x")]
    for at, change in enumerate(changes):
        root = tmp_path / str(at)
        shutil.copytree(ROOT, root)
        (part,) = root.glob("step-000000000002.*.r1.part.json")
        change(part)
        state = of_rank(0, 2) | {"own": gpuckpt.PerRank({})}
        with pytest.raises(gpuckpt.CheckpointError):
            gpuckpt.load(root, 2)
        state = whole(2) | {"own": None}
        with gpuckpt.Checkpointer(root, memory="64 MiB") as ckpt:
            names = ["w", "table", "grid"]
            with pytest.warns(RuntimeWarning, match="step 1 was taken"):
                assert ckpt.restore(state, names=names, fallback=True) == 1
        np.testing.assert_equal(state["table"], whole(1)["table"])
