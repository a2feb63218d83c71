"""What is done for each tensor, whatever its size: 3,000 of them, nested by model and optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuckpt
from bench.small import small_state
from gpuckpt import layout
from gpuckpt.census import Census
from gpuckpt.commit import open_step
from gpuckpt.manifest import Manifest, pack_manifest, unpack_manifest
from gpuckpt.ordered import ordered_map
from gpuckpt.snapshot import Planner
from gpuckpt.stores.local import LocalStore

ITEMS = 1000


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    """A thousand layers, and Adam's two moments of each."""
    return small_state(np.array)


@pytest.fixture(scope="module")
def manifest(state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """That of a checkpoint of them."""
    root: Path = tmp_path_factory.mktemp("root")
    gpuckpt.save(root, state)
    return open_step(LocalStore(root))


def test_take_a_new_inventory(benchmark: Any, state: dict[str, Any]) -> None:
    benchmark(lambda: Census().take(state))


def test_recognise_a_state(benchmark: Any, state: dict[str, Any]) -> None:
    census = Census()
    census.take(state)
    census.take(state)
    benchmark(census.take, state)


def test_plan_anew(benchmark: Any, state: dict[str, Any]) -> None:
    roster = Census().take(state).roster
    benchmark(lambda: Planner(layout.CHUNK_NBYTES, split=True).plans(roster))


def test_pack_a_manifest(benchmark: Any, manifest: Manifest) -> None:
    benchmark(pack_manifest, manifest)


def test_unpack_a_manifest(benchmark: Any, manifest: Manifest) -> None:
    data = pack_manifest(manifest)
    found = benchmark(unpack_manifest, data, "a manifest")
    assert found == manifest


def test_save(benchmark: Any, state: dict[str, Any], tmp_path: Path) -> None:
    with gpuckpt.Checkpointer(tmp_path, keep=gpuckpt.Keep(last=1), full_every=1) as ckpt:
        steps = iter(range(1, 1 << 30))
        benchmark(lambda: ckpt.save(next(steps), state).result())


def test_restore(benchmark: Any, state: dict[str, Any], tmp_path: Path) -> None:
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state).result()
        benchmark(ckpt.restore, state)


def test_hand_a_thousand_items_to_two_threads(benchmark: Any) -> None:
    def mapped() -> Iterator[int]:
        return iter(ordered_map(int, iter(range(ITEMS)), workers=2, drop=lambda _: None))

    assert benchmark(lambda: sum(mapped())) == sum(range(ITEMS))
