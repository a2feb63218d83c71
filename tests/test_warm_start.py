"""Initialising a model, also a different one, from what others have saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import gpuckpt
from gpuckpt import layout
from gpuckpt.census import take_inventory
from gpuckpt.options import make_header
from gpuckpt.resources import Resources
from gpuckpt.save import save_snapshot
from gpuckpt.snapshot import Planner, capture
from gpuckpt.stats import Stats
from gpuckpt.stores.local import LocalStore
from tests.strategies import arrays, same


def model(value: float) -> dict[str, Any]:
    return {"body": {"w": np.full((20, 30), value), "b": np.full(7, value)}, "lr": value}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    gpuckpt.save(path, model(1.0), 10)
    gpuckpt.save(path, model(2.0), 20)
    return path


def manifest(root: Path, step: int) -> Path:
    return root / layout.manifest_name(step)


def segments(root: Path, step: int) -> list[Path]:
    return sorted(root.glob(f"step-{step:012d}.*.segment"))


@pytest.mark.parametrize(
    ("source", "value"),
    [
        (lambda root: root, 2.0),
        (str, 2.0),
        (lambda root: (root, 10), 1.0),
        (lambda root: [(str(root), 10)], 1.0),
        (lambda root: manifest(root, 10), 1.0),
        (lambda root: str(manifest(root, 20)), 2.0),
        (lambda root: gpuckpt.save(root, model(3.0), 15), 3.0),
        (lambda root: ((root, 20), (root, 10)), 1.0),
    ],
)
def test_a_model_is_filled_from_any_kind_of_source(root: Path, source, value):
    state = model(0.0)
    w = state["body"]["w"]
    report = gpuckpt.warm_start(state, source(root))
    assert same(state, model(value))
    assert state["body"]["w"] is w
    assert set(report.matched) == {"body.w", "body.b", "lr"}
    assert (report.unmatched, report.unused) == ({}, ())


def test_a_segment_alone_needs_no_manifest_but_has_tensors_only(root: Path, tmp_path: Path):
    alone = tmp_path / "alone"
    alone.mkdir()
    (segment,) = segments(root, 10)
    shutil.copy(segment, alone)
    state = model(0.0)
    report = gpuckpt.warm_start(state, alone / segment.name)
    assert same(state, {**model(1.0), "lr": 0.0})
    assert report.unmatched == {"lr": "no source has it"}
    assert set(report.matched.values()) == {str(alone / segment.name)}


def in_segments(root: Path, state: Any, step: int, *, segment_nbytes: int) -> list[Path]:
    resources = Resources("1 MiB", chunk_nbytes=1024)
    inventory = take_inventory(state)
    plans = Planner(1024, split=False).plans(inventory.roster)
    snapshot = capture(inventory, plans, resources.devices, mode="hold", host_room_nbytes=0)
    save_snapshot(
        snapshot,
        make_header(step, None, None),
        LocalStore(root),
        resources,
        codec="raw",
        previous=None,
        stats=Stats(step),
        segment_nbytes=segment_nbytes,
    )
    return segments(root, step)


def test_parts_of_a_tensor_in_several_segments_are_taken_together(tmp_path: Path):
    w = np.random.default_rng(1).standard_normal((40, 50))
    parts = in_segments(tmp_path, {"w": w, "b": np.ones(3)}, 4, segment_nbytes=3000)
    assert len(parts) > 4
    manifest(tmp_path, 4).unlink()
    state: dict[str, Any] = {"w": np.zeros((40, 50)), "b": np.zeros(3)}
    report = gpuckpt.warm_start(state, parts, strict=True)
    assert same(state, {"w": w, "b": np.ones(3)})
    assert set(report.matched) == {"w", "b"}
    shuffled = {"w": np.zeros((40, 50)), "b": np.zeros(3)}
    gpuckpt.warm_start(shuffled, [*parts[2:], *parts[:2], parts[0]], strict=True)
    assert same(shuffled, state)


def test_a_part_alone_does_not_fill_a_tensor_and_says_so(tmp_path: Path):
    parts = in_segments(tmp_path, {"w": np.ones((40, 50))}, 4, segment_nbytes=3000)
    state = {"w": np.zeros((40, 50))}
    report = gpuckpt.warm_start(state, parts[:2])
    assert (state["w"] == 0).all()
    assert "only" in report.unmatched["w"]
    assert f"of its {40 * 50 * 8} bytes" in report.unmatched["w"]


def test_parts_of_two_saves_are_not_mixed(tmp_path: Path):
    ones = in_segments(tmp_path, {"w": np.ones((40, 50))}, 1, segment_nbytes=9000)
    twos = in_segments(tmp_path, {"w": np.full((40, 50), 2.0)}, 2, segment_nbytes=9000)
    state = {"w": np.zeros((40, 50))}
    report = gpuckpt.warm_start(state, [ones[0], *twos[1:]])
    assert (state["w"] == 0).all()
    assert set(report.unmatched) == {"w"}


def test_later_sources_win_leaf_by_leaf_and_what_they_lack_stays_from_earlier_ones(tmp_path: Path):
    frozen = np.zeros(2)
    frozen.flags.writeable = False
    state: dict[str, Any] = {"a": np.zeros(2), "b": np.zeros(2), "lr": 0.0, "n": 0, "f": frozen}
    state["new"] = None
    one = {"a": np.ones(2), "b": np.ones(2), "lr": 1.0, "n": 1, "f": np.ones(2), "new": np.ones(4)}
    gpuckpt.save(tmp_path / "one", one)
    gpuckpt.save(tmp_path / "two", {"b": np.full(2, 2.0), "n": 2, "other": 0})
    report = gpuckpt.warm_start(state, [tmp_path / "one", tmp_path / "two"])
    assert same(state, one | {"b": np.full(2, 2.0), "n": 2})
    from_two = {name for name, source in report.matched.items() if "two" in source}
    assert from_two == {"b", "n"}
    assert set(report.matched) == set(state)
    assert report.unused == ("other",)


class Module:
    """Answers with copies, and takes any part of its state."""

    def __init__(self, value: float) -> None:
        self.w, self.b, self.n = np.full(3, value), np.full(2, value), value

    def state_dict(self) -> dict[str, Any]:
        return {"w": self.w.copy(), "b": self.b.copy(), "n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.w, self.b, self.n = state["w"].copy(), state["b"].copy(), state["n"]


def test_an_object_is_filled_leaf_by_leaf_from_several_sources(tmp_path: Path):
    gpuckpt.save(tmp_path / "one", {"m": {"w": np.ones(3), "n": 1.0}})
    gpuckpt.save(tmp_path / "two", {"m": {"b": np.full(2, 2.0)}})
    state = {"m": Module(0.0)}
    gpuckpt.warm_start(state, [tmp_path / "one", tmp_path / "two"], strict=True)
    assert same(state["m"].state_dict(), {"w": np.ones(3), "b": np.full(2, 2.0), "n": 1.0})


def test_renames_apply_to_every_source(tmp_path: Path):
    gpuckpt.save(tmp_path / "one", {"encoder": {"w": np.ones(2)}})
    gpuckpt.save(tmp_path / "two", {"encoder": {"b": np.ones(3)}})
    sources = [tmp_path / "one", tmp_path / "two"]
    for rename in ({"encoder": "body"}, lambda name: name.replace("encoder", "body")):
        state = {"body": {"w": np.zeros(2), "b": np.zeros(3)}}
        gpuckpt.warm_start(state, sources, rename=rename, strict=True)
        assert same(state, {"body": {"w": np.ones(2), "b": np.ones(3)}})


def test_the_report_says_what_matched_what_did_not_and_why(root: Path):
    state = {"body": {"w": np.zeros((20, 30)), "b": np.zeros(9)}, "lr": 0.0, "head": np.zeros(2)}
    report = gpuckpt.warm_start(state, root, rename={"lr": "rate"})
    label = f"{root} step 20"
    assert report.matched == {"body.w": label}
    assert report.unmatched == {
        "body.b": f"{label}: float64[9] here, float64[7] in the checkpoint",
        "lr": "no source has it",
        "head": "no source has it",
    }
    assert report.unused == ("rate",)
    text = str(report).splitlines()
    assert text[0] == "1 matched, 3 kept their initial value"
    assert f"  = body.w  from {label}" in text
    assert "  - head  no source has it" in text
    assert "  + rate  not in the state" in text


def test_a_leaf_that_a_later_source_fits_is_matched_though_an_earlier_one_did_not(
    root: Path, tmp_path: Path
):
    gpuckpt.save(tmp_path / "small", {"body": {"b": np.zeros(3)}})
    report = gpuckpt.warm_start(model(0.0), [tmp_path / "small", root])
    assert report.unmatched == {}


def test_strict_refuses_leaves_without_a_match_and_changes_nothing(root: Path):
    state = {**model(0.0), "head": np.zeros(2)}
    with pytest.raises(gpuckpt.MismatchError, match="head: no source has it"):
        gpuckpt.warm_start(state, root, strict=True)
    assert same(state, {**model(0.0), "head": np.zeros(2)})
    gpuckpt.warm_start(model(0.0), root, strict=True)


def test_a_source_that_is_none_is_refused(root: Path, tmp_path: Path):
    other = tmp_path / "notes.txt"
    other.write_text("x" * 500)
    cases: list[tuple[Any, type[Exception]]] = [
        (tmp_path / "nowhere", gpuckpt.NotFoundError),
        (tmp_path, gpuckpt.NotFoundError),
        ((root, 11), gpuckpt.NotFoundError),
        (other, gpuckpt.FormatError),
    ]
    for source, error in cases:
        with pytest.raises(error):
            gpuckpt.warm_start(model(0.0), source)


def test_damage_in_a_source_is_found(root: Path):
    (segment,) = segments(root, 20)
    data = bytearray(segment.read_bytes())
    data[70] ^= 1
    segment.write_bytes(data)
    for source in (root, segment):
        with pytest.raises(gpuckpt.CorruptError, match=r"body\.w in "):
            gpuckpt.warm_start(model(0.0), source)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(arrays(), arrays())
def test_what_a_segment_alone_gives_is_what_was_saved(tmp_path: Path, one, other):
    root = tmp_path / "any"
    gpuckpt.save(root, {"x": {"one": one}, "other": other}, 1)
    state = {"x": {"one": np.zeros_like(one)}, "other": np.zeros_like(other)}
    found = segments(root, 1)
    if one.nbytes and other.nbytes:
        gpuckpt.warm_start(state, found, strict=True)
        assert same(state, {"x": {"one": one}, "other": other})
    elif not found:
        assert one.nbytes + other.nbytes == 0


def test_one_data_file_loads_without_its_manifest_whatever_it_is_called_now(tmp_path):
    weights = np.random.default_rng(3).standard_normal((40, 30)).astype(np.float32)
    gpuckpt.save(tmp_path / "run", {"layer": {"w": weights}, "step": 7}, 7)
    (segment,) = (tmp_path / "run").glob("*.segment")
    alone = tmp_path / "pretrained.gpuckpt"
    segment.rename(alone)

    assert gpuckpt.load(alone)["layer.w"].tobytes() == weights.tobytes()
    target = {"layer": {"w": np.zeros_like(weights)}}
    assert gpuckpt.warm_start(target, alone, strict=True).matched == {"layer.w": str(alone)}
    assert target["layer"]["w"].tobytes() == weights.tobytes()
    (tmp_path / "notes.txt").write_text("x" * 200)
    with pytest.raises(gpuckpt.FormatError, match="not a gpuckpt segment"):
        gpuckpt.load(tmp_path / "notes.txt")
