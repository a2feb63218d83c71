"""`gpuckpt prune` and `gpuckpt ls --keep`: what they promise to free, and to keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import gpuckpt
from gpuckpt import Keep
from gpuckpt.cli import app
from gpuckpt.errors import (
    AuthenticationError,
    CorruptError,
    InvalidError,
    LockedError,
    NotFoundError,
)
from gpuckpt.groups import Group
from gpuckpt.pruning import parse_keep, plan_prune, prune_root
from gpuckpt.stores.local import LocalStore
from tests.ranks import run_ranks


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def facts(*arguments: object) -> dict[str, Any]:
    found = run(*arguments, "--json")
    assert found.exit_code == 0, found.exception
    return dict(json.loads(found.stdout))


def state_of(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    frozen, w = (rng.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
    return {"frozen": frozen, "w": w + np.float32(step)}


@pytest.fixture
def root(tmp_path):
    """Five steps, of which the later ones refer to the first one's data."""
    place = tmp_path / "run"
    with gpuckpt.Checkpointer(place, memory="64 MiB") as ckpt:
        for step in range(1, 6):
            ckpt.save(step, state_of(step), metrics={"loss": abs(step - 2.0)}).result(60)
    return place


def sizes(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in root.iterdir() if path.name != "lock"}


def test_a_dry_run_promises_what_is_then_freed_and_changes_nothing(root):
    before = sizes(root)
    told = facts("prune", root, "--keep", "last=2", "--dry-run")
    assert sizes(root) == before
    assert not (root / "lock").read_bytes() or told["dry_run"]

    done = facts("prune", root, "--keep", "last=2")

    after = sizes(root)
    assert {**told, "dry_run": False} == done
    assert (done["deleted"], done["kept"]) == ([1, 2, 3], [4, 5])
    assert done["nbytes"] == sum(before.values()) - sum(after.values())
    assert {name: before[name] for name in before.keys() - after.keys()} == done["files"]


def test_what_a_kept_step_refers_to_stays(root):
    facts("prune", root, "--keep", "last=1")
    assert [path.name[:17] for path in root.glob("*.segment")].count("step-000000000001") == 1
    found = gpuckpt.load(root)
    for name, one in state_of(5).items():
        assert np.array_equal(found[name], one)
    assert run("verify", root).exit_code == 0


def test_the_best_the_newest_and_multiples_stay(root):
    done = facts("prune", root, "--keep", "every=4,best=loss:min:1")
    assert done["kept"] == [2, 4, 5]


def test_ls_says_which_steps_would_stay(root):
    rows = facts("ls", root, "--keep", "last=2,best=loss:min:1")["checkpoints"]
    assert [row["step"] for row in rows if row["kept"]] == [2, 4, 5]
    shown = run("ls", root, "--keep", "last=2").stdout.splitlines()
    assert [line.split().count("no") for line in shown[1:]] == [1, 1, 1, 0, 0]
    assert "kept" not in run("ls", root).stdout


def test_ls_says_how_far_back_a_step_refers(root):
    first, *_, last = facts("ls", root)["checkpoints"]
    assert (first["oldest_step"], first["older_files"], first["links"]) == (None, 0, 0)
    assert (last["oldest_step"], last["older_files"]) == (1, 1)


def test_what_a_crash_left_goes_too(root):
    left = root / "step-000000000009.00000000.r0.0.segment"
    left.write_bytes(b"x" * 1000)
    told = facts("prune", root, "--keep", "last=9", "--dry-run")
    assert (told["deleted"], told["unnamed_files"]) == ([], {left.name: 1000})
    assert "unless a run writes" in run("prune", root, "--keep", "last=9", "--dry-run").stdout
    assert facts("prune", root, "--keep", "last=9")["unnamed_nbytes"] == 1000
    assert not left.exists()


def test_a_root_that_a_run_has_is_refused_and_may_be_looked_at(root):
    before = sizes(root)
    with gpuckpt.Checkpointer(root):
        found = run("prune", root, "--keep", "last=1")
        assert isinstance(found.exception, LockedError)
        assert sizes(root) == before
        assert facts("prune", root, "--keep", "last=1", "--dry-run")["deleted"] == [1, 2, 3, 4]


def test_a_root_that_is_not_there_is_not_made(tmp_path):
    found = run("prune", tmp_path / "none", "--keep", "last=1")
    assert isinstance(found.exception, NotFoundError)
    assert not (tmp_path / "none").exists()


def test_a_damaged_manifest_that_stays_keeps_all_data(root):
    path = root / "step-000000000005.manifest.json"
    path.write_bytes(path.read_bytes().replace(b"frozen", b"frozem"))
    before = set(sizes(root))
    told = facts("prune", root, "--keep", "last=2", "--dry-run")
    assert "step-000000000005" in told["unread"]
    assert "can't be read" in run("prune", root, "--keep", "last=2", "--dry-run").stdout
    done = facts("prune", root, "--keep", "last=2")
    gone = before - set(sizes(root))
    assert gone == {f"step-{step:012d}.manifest.json" for step in (1, 2, 3)}
    assert set(done["files"]) == gone == set(told["files"])


def test_a_damaged_manifest_that_goes_takes_its_data_along(root):
    path = root / "step-000000000002.manifest.json"
    path.write_bytes(path.read_bytes().replace(b"frozen", b"frozem"))
    told = facts("prune", root, "--keep", "last=2", "--dry-run")
    before = set(sizes(root))
    done = facts("prune", root, "--keep", "last=2")
    assert set(told["files"]) == set(done["files"]) == before - set(sizes(root))


def test_metrics_of_a_damaged_or_unsealed_manifest_decide_nothing(root, tmp_path):
    path = root / "step-000000000002.manifest.json"
    path.write_bytes(path.read_bytes().replace(b"frozen", b"frozem"))
    before = sizes(root)
    found = run("prune", root, "--keep", "best=loss:min:1")
    assert isinstance(found.exception, CorruptError)
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    found = run("prune", root, "--keep", "best=loss:min:1", "--key-file", key)
    assert isinstance(found.exception, CorruptError | AuthenticationError)
    assert sizes(root) == before


def test_a_sealed_root_is_pruned_with_its_key(tmp_path):
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    for step in (1, 2, 3):
        gpuckpt.save(tmp_path / "run", state_of(step), step, metrics={"loss": step}, key=key)
    arguments = ("prune", tmp_path / "run", "--keep", "best=loss:min:1", "--key-file", key)
    assert facts(*arguments)["kept"] == [1, 3]
    assert run("verify", tmp_path / "run", "--key-file", key).exit_code == 0


def test_a_root_of_several_ranks_loses_every_ranks_files(tmp_path):
    def work(group: Group) -> None:
        part = np.full((10, 4), group.rank, np.float32)
        state = {"w": gpuckpt.Sharded(part, (20, 4), (10 * group.rank, 0)), "same": np.ones(9)}
        with gpuckpt.Checkpointer(tmp_path, group=group, memory="64 MiB") as ckpt:
            for step in (1, 2, 3):
                with ckpt.update():
                    part += 1
                ckpt.save(step, state).result(60)

    run_ranks(2, work)
    told = facts("prune", tmp_path, "--keep", "last=1", "--dry-run")
    before = set(sizes(tmp_path))
    done = facts("prune", tmp_path, "--keep", "last=1")
    assert set(done["files"]) == set(told["files"]) == before - set(sizes(tmp_path))
    assert sum(name.endswith(".part.json") for name in done["files"]) == 4
    assert run("verify", tmp_path).exit_code == 0
    assert facts("ls", tmp_path)["checkpoints"][0]["ranks"] == 2


def test_a_root_may_be_a_url(root):
    assert facts("prune", root.as_uri(), "--keep", "last=2")["deleted"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("last=2", Keep(last=2)),
        (" last = 2 , every=1000 ", Keep(last=2, every=1000)),
        ("best=loss:min:3", Keep(best=("loss", "min", 3))),
        ("best=val:loss:max:1", Keep(best=("val:loss", "max", 1))),
        ("newer_than=2 h", Keep(newer_than="2 h")),
        ("newer-than=30", Keep(newer_than="30")),
    ],
)
def test_a_rule_is_read(text, keep):
    assert parse_keep(text) == keep


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        "last",
        "last=x",
        "last=0",
        "best=loss",
        "best=loss:least:3",
        "most=2",
        "last=1,last=2",
    ],
)
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(InvalidError):
        parse_keep(text)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6),
    st.integers(1, 4),
)
def test_a_plan_is_what_happens_whatever_refers_to_what(tmp_path_factory, saves, last):
    root = tmp_path_factory.mktemp("run")
    state = {f"t{at}": np.zeros(2000, np.float32) for at in range(3)}
    with gpuckpt.Checkpointer(root, full_every=3, memory="64 MiB") as ckpt:
        for step, (which, both) in enumerate(saves):
            with ckpt.update():
                state[f"t{which}"] += 1
                state["t0"] += both
            ckpt.save(step, state).result(60)
    store, before = LocalStore(root), sizes(root)
    plan = plan_prune(store, Keep(last=last))
    done = prune_root(store, Keep(last=last))
    assert plan == done
    after = sizes(root)
    assert {n: before[n] for n in before.keys() - after.keys()} == {**done.files, **done.unnamed}
    found = gpuckpt.load(root)
    assert all(np.array_equal(found[name], one) for name, one in state.items())
