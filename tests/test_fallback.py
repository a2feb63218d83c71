"""A damaged step, and the intact one before it that is taken in its place."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt import layout
from gpuckpt.commit import open_step
from gpuckpt.resources import Resources
from gpuckpt.stores.local import LocalStore
from gpuckpt.tensors import TensorEntry
from gpuckpt.verify import verify_step
from tests.saving import save

Damage = Callable[[Path], object]


def state_at(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    moments = {name: rng.standard_normal(500).astype("f4") for name in ("m", "v")}
    return {"w": rng.standard_normal((40, 30)), "opt": moments, "step": step}


def empty() -> dict[str, Any]:
    return {"w": np.zeros((40, 30)), "opt": {k: np.zeros(500, "f4") for k in "mv"}, "step": -1}


def holds(state: Any, step: int) -> bool:
    wanted = state_at(step)
    return (
        np.array_equal(state["w"], wanted["w"])
        and all(np.array_equal(state["opt"][k], wanted["opt"][k]) for k in "mv")
        and state["step"] == step
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1, 2 and 3, in files of their own each."""
    for step in (1, 2, 3):
        gpuckpt.save(tmp_path, state_at(step), step, codec="raw")
    return tmp_path


def entry_of(root: Path, step: int, name: str) -> TensorEntry:
    entries = open_step(LocalStore(root), step).tensors
    return next(entry for entry in entries if entry.spec.name == name)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def rot(root: Path, step: int, name: str = "opt.v") -> Path:
    """Flip a bit of one tensor of one step; its file."""
    extent = entry_of(root, step, name).chunks[0].extent
    flip(root / extent.segment, extent.offset + extent.length // 2)
    return root / extent.segment


def manifest_of(root: Path, step: int) -> Path:
    return root / layout.manifest_name(step)


DAMAGES: dict[str, Damage] = {
    "a flipped bit in a tensor": lambda root: rot(root, 3),
    "a flipped bit in the manifest": lambda root: flip(manifest_of(root, 3), 200),
    "a manifest that was cut short": lambda root: (
        manifest_of(root, 3).write_bytes(b'{"gpu') and None
    ),
    "a segment that is gone": lambda root: next(root.glob("step-000000000003.*.segment")).unlink(),
    "a segment that was cut short": lambda root: (
        next(root.glob("step-000000000003.*.segment")).write_bytes(b"gpuckpt\0") and None
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_step_is_an_error_whose_text_names_the_remedy(root, damage):
    damage(root)
    with gpuckpt.Checkpointer(root) as ckpt:
        for read in (lambda: ckpt.resume(empty()), lambda: gpuckpt.load(root)):
            with pytest.raises((gpuckpt.CorruptError, gpuckpt.NotFoundError)) as caught:
                read()
            told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
            assert "fallback=True" in told
            assert "gpuckpt repair" in told


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_with_fallback_the_newest_intact_step_is_taken_and_said(root, damage, caplog):
    damage(root)
    state = empty()
    with gpuckpt.Checkpointer(root) as ckpt, caplog.at_level(logging.WARNING, "gpuckpt"):
        with pytest.warns(RuntimeWarning, match="step 3 is damaged, and step 2") as told:
            assert ckpt.resume(state, fallback=True) == 2
        assert holds(state, 2)
        assert Path(told[0].filename) == Path(__file__)
        assert "step-000000000003" in str(told[0].message)
        assert "step 3 is damaged, and step 2" in caplog.text

        state = empty()
        with pytest.warns(RuntimeWarning, match="step 3 is damaged, and step 2"):
            assert ckpt.restore(state, fallback=True) == 2
        assert holds(state, 2)
    with pytest.warns(RuntimeWarning, match="step 3 is damaged, and step 2") as told:
        assert holds(gpuckpt.load(root, fallback=True), 2)
    assert Path(told[0].filename) == Path(__file__)


def test_an_intact_step_is_taken_without_a_word(root):
    with warnings.catch_warnings(), gpuckpt.Checkpointer(root) as ckpt:
        warnings.simplefilter("error")
        state = empty()
        assert ckpt.resume(state, fallback=True) == 3
        assert holds(state, 3)
        assert holds(gpuckpt.load(root, 2, fallback=True), 2)


def test_several_damaged_steps_are_passed_over(root):
    rot(root, 3, "w")
    flip(manifest_of(root, 2), 100)
    state = empty()
    with gpuckpt.Checkpointer(root) as ckpt, pytest.warns(RuntimeWarning, match="and step 1 was"):
        assert ckpt.resume(state, fallback=True) == 1
    assert holds(state, 1)


def test_the_step_that_was_named_falls_back_to_older_ones_only(root):
    rot(root, 2)
    state = empty()
    with gpuckpt.Checkpointer(root) as ckpt, pytest.warns(RuntimeWarning, match="and step 1 was"):
        assert ckpt.restore(state, 2, fallback=True) == 1
    assert holds(state, 1)


def test_when_nothing_is_intact_the_error_names_every_step_and_its_damage(root):
    files = [rot(root, step).name for step in (1, 2, 3)]
    with gpuckpt.Checkpointer(root) as ckpt, pytest.raises(gpuckpt.CorruptError) as caught:
        ckpt.resume(empty(), fallback=True)
    for word in ("step 3", "step 2: opt.v", "step 1: opt.v", *files, "gpuckpt repair"):
        assert word in str(caught.value)
    with pytest.raises(gpuckpt.CorruptError, match="there is none before it"):
        gpuckpt.load(root, 1, fallback=True)


def test_what_is_no_damage_is_no_reason_to_fall_back(root):
    with gpuckpt.Checkpointer(root) as ckpt:
        with pytest.raises(gpuckpt.MismatchError):
            ckpt.resume(empty() | {"w": np.zeros(3)}, fallback=True)
        with pytest.raises(gpuckpt.NotFoundError, match="nothing is called"):
            ckpt.restore(empty(), names=["q"], fallback=True)
        with pytest.raises(gpuckpt.NotFoundError, match="step 7"):
            ckpt.restore(empty(), 7, fallback=True)
    manifest = manifest_of(root, 3)
    manifest.write_bytes(manifest.read_bytes().replace(b'{"gpuckpt":1,', b'{"gpuckpt":2,'))
    with pytest.raises(gpuckpt.FormatError):
        gpuckpt.load(root, fallback=True)


def test_a_step_that_would_leave_parts_of_a_damaged_one_is_not_taken(tmp_path):
    """What fails in the middle may have written to any array: an older step must fill them all."""
    gpuckpt.save(tmp_path, {"w": np.ones(500), "new": np.ones(500)}, 1)
    gpuckpt.save(tmp_path, {"w": np.ones(500)}, 2)
    gpuckpt.save(tmp_path, {"w": np.full(500, 3.0), "new": np.full(500, 3.0)}, 3, codec="raw")
    rot(tmp_path, 3, "w")
    state = {"w": np.zeros(500), "new": np.zeros(500), "own": np.zeros(2)}
    with (
        gpuckpt.Checkpointer(tmp_path) as ckpt,
        pytest.warns(RuntimeWarning, match="and step 1 was"),
    ):
        assert ckpt.restore(state, strict=False, fallback=True) == 1
    assert (state["w"] == 1).all()
    assert (state["new"] == 1).all()
    assert (state["own"] == 0).all()


class Copying:
    """An object that answers with a copy of its state each time."""

    def __init__(self) -> None:
        self.array = np.zeros(100)

    def state_dict(self) -> dict[str, Any]:
        return {"array": self.array.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.array = state["array"]


def test_objects_that_answer_with_copies_and_arrays_that_are_views_are_filled_by_the_older(
    tmp_path,
):
    for step in (1, 2):
        one = Copying()
        one.array += step
        table = np.full((6, 8), float(step))
        state = {"object": one, "left": table[:, :4], "right": table[:, 4:], "rng": gpuckpt.RNG()}
        gpuckpt.save(tmp_path, state, step, codec="raw")
    rot(tmp_path, 2, "right")
    one, table = Copying(), np.zeros((6, 8))
    state = {"object": one, "left": table[:, :4], "right": table[:, 4:], "rng": gpuckpt.RNG()}
    with gpuckpt.Checkpointer(tmp_path) as ckpt, pytest.warns(RuntimeWarning, match="step 1 was"):
        assert ckpt.resume(state, fallback=True) == 1
    assert (one.array == 1).all()
    assert (table == 1).all()


@pytest.mark.parametrize("codec", ["raw", "delta"])
def test_saves_after_a_fallback_refer_to_the_intact_step_and_not_to_the_damaged_one(
    tmp_path, codec
):
    rng = np.random.default_rng(0)
    state = {"frozen": rng.standard_normal(40_000), "w": rng.standard_normal(40_000)}
    with gpuckpt.Checkpointer(tmp_path, codec=codec) as ckpt:
        for step in (1, 2):
            state["w"].view("u8")[::9] += 1
            save(ckpt, step, state)
    damaged = rot(tmp_path, 2, "w")
    with gpuckpt.Checkpointer(tmp_path, codec=codec) as ckpt:
        with pytest.warns(RuntimeWarning, match="and step 1 was"):
            assert ckpt.resume(state, fallback=True) == 1
        state["w"].view("u8")[::9] += 3
        stats = save(ckpt, 3, state)
        assert stats.unchanged_nbytes == state["frozen"].nbytes
    assert damaged.name not in open_step(LocalStore(tmp_path), 3).segments
    assert not verify_step(LocalStore(tmp_path), 3, Resources("64 MiB"))
    loaded = gpuckpt.load(tmp_path)
    assert all(np.array_equal(loaded[name], state[name]) for name in state)


def test_after_damage_was_found_the_next_save_refers_to_nothing_of_before(tmp_path):
    """In one process: the checkpoint that was saved last turns out to be rotten."""
    state = {"frozen": np.random.default_rng(0).standard_normal(40_000), "w": np.zeros(10)}
    with gpuckpt.Checkpointer(tmp_path, codec="raw") as ckpt:
        save(ckpt, 1, state)
        rot(tmp_path, 1, "frozen")
        with pytest.raises(gpuckpt.CorruptError, match="frozen in"):
            ckpt.restore({"frozen": np.zeros(40_000), "w": np.zeros(10)})
        stats = save(ckpt, 2, state)
    assert stats.unchanged_nbytes == 0
    assert not verify_step(LocalStore(tmp_path), 2, Resources("64 MiB"))
    assert np.array_equal(gpuckpt.load(tmp_path)["frozen"], state["frozen"])


def test_a_damaged_step_that_is_reached_again_is_replaced_by_an_intact_one(root):
    flip(manifest_of(root, 3), 300)
    state = empty()
    with gpuckpt.Checkpointer(root, keep=gpuckpt.Keep(last=2)) as ckpt:
        with pytest.warns(RuntimeWarning, match="and step 2 was"):
            assert ckpt.resume(state, fallback=True) == 2
        save(ckpt, 3, state_at(3))
    assert holds(gpuckpt.load(root), 3)
    assert {path.name[:17] for path in root.glob("*.segment")} == {
        "step-000000000002",
        "step-000000000003",
    }


def test_while_a_damaged_step_stays_saves_below_it_go_on_and_the_next_resume_takes_them(root):
    rot(root, 3)
    rot(root, 2)
    with gpuckpt.Checkpointer(root, keep=gpuckpt.Keep(last=1)) as ckpt:
        state = empty()
        with pytest.warns(RuntimeWarning, match="and step 1 was"):
            assert ckpt.resume(state, fallback=True) == 1
        save(ckpt, 2, state_at(7))
    state = empty()
    with gpuckpt.Checkpointer(root) as ckpt, pytest.warns(RuntimeWarning, match="and step 2 was"):
        assert ckpt.resume(state, fallback=True) == 2
    assert holds(state, 7)


@pytest.mark.parametrize(
    ("error", "falls"), [(5, True), (13, True), (24, False), (12, False)], ids=str
)
def test_an_unreadable_file_is_damage_and_a_system_without_room_is_not(
    root, error, falls, monkeypatch
):
    (segment,) = root.glob("step-000000000003.*.segment")
    real = LocalStore.open

    def refusing(store: LocalStore, name: str) -> Any:
        if name == segment.name:
            told = gpuckpt.StorageError(f"can't read {name}")
            told.errno = error
            raise told
        return real(store, name)

    monkeypatch.setattr(LocalStore, "open", refusing)
    if falls:
        with pytest.warns(RuntimeWarning, match="and step 2 was"):
            assert holds(gpuckpt.load(root, fallback=True), 2)
    else:
        with pytest.raises(gpuckpt.StorageError):
            gpuckpt.load(root, fallback=True)
