"""States of real processes, saved by some number of them and restored by another, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpuckpt.commit import open_step
from gpuckpt.stores.local import LocalStore
from tests.launch import launch

MESHES = [
    ("torch", ("fsdp", 4), ("fsdp", 3)),
    ("torch", ("fsdp", 4), ("tp", 2)),
    ("torch", ("tp", 4), ("2d", 4)),
    ("torch", ("2d", 8), ("hsdp", 4)),
    ("torch", ("hsdp", 4), ("plain", 2)),
    ("torch", ("plain", 2), ("fsdp", 8)),
    ("jax", ("jax", 4), ("jax", 2)),
    ("mpi", ("numpy", 4), ("numpy", 3)),
    ("store", ("numpy", 2), ("numpy", 3)),
]


def ranks(kind: str, work: str, mesh: tuple[str, int], place: Path, root: Path) -> list[Any]:
    task = {"mesh": mesh[0], "root": str(root)}
    found = launch(kind, f"tests.ranks.engine:{work}", mesh[1], place, task, timeout=90)
    for one in found:
        assert one.error is None, one.output
    return [one.value for one in found]


def all_of(values: list[Any]) -> dict[str, str]:
    """What all ranks tell together; where several tell of one thing, they agree."""
    whole: dict[str, str] = {}
    for value in values:
        for name, digest in value["digests"].items():
            assert whole.setdefault(name, digest) == digest, name
    return whole


@pytest.mark.parametrize(("kind", "saved", "resumed"), MESHES, ids=str)
def test_what_one_mesh_saves_another_resumes_from(kind, saved, resumed, tmp_path, needs):
    needs(kind)
    before = ranks(kind, "saves", saved, tmp_path / "save", tmp_path / "root")
    after = ranks(kind, "resumes", resumed, tmp_path / "resume", tmp_path / "root")
    assert {value["step"] for value in after} == {2}
    assert all_of(after) == all_of(before)
    for rank, value in enumerate(after):
        seed = 0 if rank < saved[1] else 1  # a rank that wasn't there keeps what it has
        assert value["position"] == {"sample": 100 * rank + seed}
    manifest = open_step(LocalStore(tmp_path / "root"))
    assert manifest.ranks == saved[1]


def test_a_machine_that_is_lost_loses_nothing_since_the_last_save(tmp_path, needs):
    work, size = "tests.ranks.engine:goes_on_with_its_own_disk", 3
    for life, begin in enumerate((0, 3, 6)):
        place = tmp_path / f"life{life}"
        found = launch("store", work, size, place, {"disks": str(tmp_path / "disks")})
        for rank, one in enumerate(found):
            assert one.error is None, one.output
            assert (one.value["step"], one.value["wrong"]) == (begin, 0)
            assert one.value["kept"]
            assert one.value["own"] == {"rank": rank}
            assert (one.value["held"] == 0) == (begin == 0 or (life, rank) == (2, 1))
        if life == 1:
            (tmp_path / "disks" / "1").rename(tmp_path / "lost")
