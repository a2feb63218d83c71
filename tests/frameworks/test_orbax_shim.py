"""Orbax's manager with gpuckpt behind it: loops that were written for Orbax go on as they are.

Where Orbax is installed, the same calls are made of both, and have to come to the same.
"""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.stores.local import LocalStore

jax = pytest.importorskip("jax", reason="jax isn't installed")

import gpuckpt.adapters.orbax as shim  # noqa: E402 - only where there is a jax
from gpuckpt.adapters.orbax.keeping import keep_of  # noqa: E402
from gpuckpt.manifest import Manifest  # noqa: E402
from tests.frameworks.trees import assert_same  # noqa: E402

jnp = jax.numpy


def of_orbax() -> Any:
    return pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint isn't installed")


@pytest.fixture(params=["gpuckpt", "orbax"])
def ocp(request: pytest.FixtureRequest) -> Any:
    """The shim, and Orbax itself."""
    return shim if request.param == "gpuckpt" else of_orbax()


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "run"


def a_tree(n: float = 1.0) -> dict[str, Any]:
    return {
        "params": {"w": jnp.arange(12.0).reshape(3, 4) * n, "b": jnp.full(4, n, jnp.bfloat16)},
        "layers": [jnp.full(2, n, "float32"), jnp.full(3, n, "float32")],
        "count": jnp.int32(n),
    }


def abstract(ocp: Any, tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
class TestAsOrbax:
    """What both do."""

    def test_a_tree_comes_back(self, ocp, directory):
        tree = a_tree(3)
        with ocp.CheckpointManager(directory) as manager:
            assert manager.latest_step() is None
            assert manager.save(7, args=ocp.args.StandardSave(tree)) is True
            assert manager.latest_step() == 7
            manager.wait_until_finished()
            found = manager.restore(7, args=ocp.args.StandardRestore(abstract(ocp, tree)))
            assert_same(found, tree)
            assert_same(manager.restore(None, args=ocp.args.StandardRestore(a_tree(0))), tree)

    def test_a_tree_comes_back_without_one_to_go_by(self, ocp, directory):
        with ocp.CheckpointManager(directory) as manager:
            manager.save(1, args=ocp.args.StandardSave(a_tree(3)))
            assert_same(manager.restore(1), a_tree(3))
            assert_same(manager.restore(1, args=ocp.args.StandardRestore()), a_tree(3))

    def test_several_items_come_back_each_by_itself(self, ocp, directory):
        meta = {"epoch": 3, "names": ["a", "b"], "lr": 0.1, "none": None}
        with ocp.CheckpointManager(directory, item_names=("state", "meta")) as manager:
            manager.save(
                2,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(a_tree(2)), meta=ocp.args.JsonSave(meta)
                ),
            )
            both = manager.restore(
                2,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(a_tree(0)), meta=ocp.args.JsonRestore()
                ),
            )
            assert_same(both.state, a_tree(2))
            assert both["meta"] == meta
            one = manager.restore(2, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
            assert one.meta == meta
            assert "state" not in one

    def test_steps_are_due_by_the_interval(self, ocp, directory):
        options = ocp.CheckpointManagerOptions(save_interval_steps=3, save_on_steps=[4])
        with ocp.CheckpointManager(directory, options=options) as manager:
            done = [manager.save(n, args=ocp.args.StandardSave(a_tree(n))) for n in range(2, 10)]
            assert done == [True, True, True, False, True, False, False, True]
            manager.wait_until_finished()
            assert manager.all_steps() == [2, 3, 4, 6, 9]
            assert not manager.should_save(9), "it is there"
            assert not manager.should_save(6), "it is older than the latest"
            assert manager.should_save(12)
            assert manager.save(10, args=ocp.args.StandardSave(a_tree()), force=True)

    def test_a_function_may_say_what_is_due(self, ocp, directory):
        asked = []

        def due(step: int, latest: int | None) -> bool:
            asked.append((step, latest))
            return step in (2, 5)

        options = ocp.CheckpointManagerOptions(should_save_fn=due)
        with ocp.CheckpointManager(directory, options=options) as manager:
            for step in range(1, 7):
                manager.save(step, args=ocp.args.StandardSave(a_tree(step)))
            manager.wait_until_finished()
            assert manager.all_steps() == [2, 5]
        assert asked == [(1, None), (2, None), (3, 2), (4, 2), (5, 2), (6, 5)]

    def test_the_newest_are_kept_and_some_periods(self, ocp, directory):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, keep_period=4)
        with ocp.CheckpointManager(directory, options=options) as manager:
            for step in range(1, 8):
                manager.save(step, args=ocp.args.StandardSave(a_tree(step)))
            manager.wait_until_finished()
            assert manager.all_steps() == [4, 6, 7]

    @pytest.mark.parametrize("mode", ["max", "min"])
    def test_the_best_are_kept(self, ocp, directory, mode):
        sign = 1 if mode == "max" else -1
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, best_fn=lambda metrics: metrics["score"], best_mode=mode
        )
        with ocp.CheckpointManager(directory, options=options) as manager:
            for step, score in enumerate([5.0, 1.0, 4.0, 2.0, 6.0]):
                manager.save(
                    step, args=ocp.args.StandardSave(a_tree(step)), metrics={"score": sign * score}
                )
            manager.wait_until_finished()
            assert manager.all_steps() == [0, 4]
            assert manager.best_step() == 4
            assert manager.latest_step() == 4
            assert manager.metrics(0) == {"score": sign * 5.0}

    def test_a_step_without_metrics_is_none_of_the_best(self, ocp, directory):
        options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["score"])
        with ocp.CheckpointManager(directory, options=options) as manager:
            tree = ocp.args.StandardSave(a_tree())
            assert manager.save(1, args=tree, metrics={"score": 3.0})
            assert manager.save(2, args=tree)
            manager.wait_until_finished()
            assert manager.best_step() == 1
            assert manager.latest_step() == 2

    def test_a_deleted_step_is_gone(self, ocp, directory):
        with ocp.CheckpointManager(directory) as manager:
            for step in (1, 2, 3):
                manager.save(step, args=ocp.args.StandardSave(a_tree(step)))
            manager.wait_until_finished()
            manager.delete(3)
            assert manager.all_steps() == [1, 2]
            assert manager.latest_step() == 2
            assert manager.save(3, args=ocp.args.StandardSave(a_tree(9)))
            target = ocp.args.StandardRestore(a_tree(0))
            assert_same(manager.restore(3, args=target), a_tree(9))
            assert_same(manager.restore(1, args=target), a_tree(1))

    def test_metadata_stands_beside_a_step(self, ocp, directory):
        with ocp.CheckpointManager(directory) as manager:
            custom = {"lr": 0.5, "tags": ["a"]}
            manager.save(1, args=ocp.args.StandardSave(a_tree()), custom_metadata=custom)
            manager.wait_until_finished()
            assert manager.metadata(1).custom_metadata == custom
            shapes = manager.item_metadata(1)
            assert shapes["params"]["w"].shape == (3, 4)
            assert shapes["params"]["b"].dtype == jnp.bfloat16

    def test_one_that_reads_does_not_write(self, ocp, directory):
        with ocp.CheckpointManager(directory) as manager:
            manager.save(1, args=ocp.args.StandardSave(a_tree(3)))
        options = ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(directory, options=options) as manager:
            assert manager.save(2, args=ocp.args.StandardSave(a_tree())) is False
            assert manager.latest_step() == 1
            assert_same(manager.restore(1, args=ocp.args.StandardRestore(a_tree(0))), a_tree(3))

    def test_a_step_that_is_not_there_is_an_error(self, ocp, directory):
        with ocp.CheckpointManager(directory) as manager:
            with pytest.raises((FileNotFoundError, gpuckpt.NotFoundError)):
                manager.restore(None, args=ocp.args.StandardRestore(a_tree()))
            manager.save(1, args=ocp.args.StandardSave(a_tree()))
            with pytest.raises((FileNotFoundError, gpuckpt.NotFoundError)):
                manager.restore(5, args=ocp.args.StandardRestore(a_tree()))

    def test_a_donated_tree_was_saved_as_it_was(self, ocp, directory):
        step_fn = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
        tree = a_tree(5)
        with ocp.CheckpointManager(directory) as manager:
            manager.save(1, args=ocp.args.StandardSave(tree))
            step_fn(tree)
            found = manager.restore(1, args=ocp.args.StandardRestore(a_tree(0)))
        assert_same(found, a_tree(5))


def test_args_and_options_of_orbaxs_own_are_taken(directory):
    ocp = of_orbax()
    options = ocp.CheckpointManagerOptions(max_to_keep=1, save_interval_steps=2)
    with shim.CheckpointManager(directory, options=options) as manager:
        for step in (2, 3, 4):
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(a_tree(step)), meta=ocp.args.JsonSave({"n": step})
                ),
            )
        found = manager.restore(
            4, args=ocp.args.Composite(state=ocp.args.StandardRestore(a_tree(0)), meta=None)
        )
        assert manager.all_steps() == [4]
    assert_same(found.state, a_tree(4))
    assert found.meta == {"n": 4}


def test_restore_args_say_where_arrays_belong(directory):
    ocp = of_orbax()
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    tree = {"w": jnp.arange(6.0)}
    how = {"w": ocp.ArrayRestoreArgs(sharding=sharding)}
    with shim.CheckpointManager(directory) as manager:
        manager.save(1, args=shim.args.StandardSave(tree))
        assert_same(manager.restore(1, args=shim.args.PyTreeRestore(tree)), tree)
        found = manager.restore(1, args=ocp.args.PyTreeRestore(tree, restore_args=how))
        assert found["w"].committed
        assert_same(found, tree)
        how = {"w": ocp.ArrayRestoreArgs(dtype=jnp.bfloat16)}
        with pytest.raises(gpuckpt.UnsupportedError, match="cast"):
            manager.restore(1, args=ocp.args.PyTreeRestore(tree, restore_args=how))


def test_random_keys_and_single_arrays_are_items(directory):
    args = shim.args
    key = jax.random.key(3, impl="rbg")
    with shim.CheckpointManager(directory) as manager:
        manager.save(
            1, args=args.Composite(key=args.JaxRandomKeySave(key), x=args.ArraySave(jnp.ones(2)))
        )
        found = manager.restore(
            1, args=args.Composite(key=args.JaxRandomKeyRestore(), x=args.ArrayRestore())
        )
        assert_same(found.key, key)
        assert_same(found.x, jnp.ones(2))
        assert_same(manager.restore(1).key, {"value": key})


@pytest.mark.parametrize(
    "options",
    [
        {"step_prefix": "step"},
        {"preservation_policy": object()},
        {"save_decision_policy": object()},
        {"todelete_subdir": "trash"},
        {"best_mode": "most"},
        {"max_to_keep": -1},
        {"save_interval_steps": 0},
    ],
)
def test_options_that_cannot_be_had_say_what_to_use(options):
    with pytest.raises(gpuckpt.InvalidError, match=next(iter(options))):
        shim.CheckpointManagerOptions(**options)


def test_what_else_orbax_has_says_what_to_use(directory):
    with pytest.raises(AttributeError, match=r"gpuckpt\.jax\.save"):
        _ = shim.PyTreeCheckpointer
    with pytest.raises(gpuckpt.InvalidError, match="StandardSave"):
        shim.CheckpointManager(directory, checkpointers=object())  # type: ignore[arg-type]
    with shim.CheckpointManager(directory) as manager:
        with pytest.raises(gpuckpt.InvalidError, match="StandardSave"):
            manager.save(1, {"w": jnp.ones(1)})  # type: ignore[arg-type]
        with pytest.raises(gpuckpt.UnsupportedError, match="StandardSave"):
            manager.save(1, args={"w": jnp.ones(1)})
        with pytest.raises(gpuckpt.UnsupportedError, match="JSON"):
            manager.save(1, args=shim.args.JsonSave({"x": jnp.ones(1)}))
        manager.save(1, args=shim.args.StandardSave({"w": jnp.ones(1)}))
        with pytest.raises(gpuckpt.UnsupportedError, match="partial_restore"):
            manager.restore(1, args=shim.args.StandardRestore({"w": ...}))
        with pytest.raises(gpuckpt.NotFoundError, match="there are: default"):
            manager.restore(1, args=shim.args.Composite(state=None))
        with pytest.raises(gpuckpt.MismatchError, match="more"):
            manager.restore(1, args=shim.args.StandardRestore({"more": jnp.ones(1)}))
        found = manager.restore(1, args=shim.args.PyTreeRestore({}, partial_restore=True))
        assert found == {}
        with pytest.raises(gpuckpt.InvalidError, match="there already"):
            manager.save(1, args=shim.args.StandardSave({"w": jnp.ones(1)}), force=True)


def test_a_url_is_a_url_and_no_directory_of_that_name(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = directory.as_uri()
    with pytest.raises(gpuckpt.NotFoundError):
        shim.CheckpointManager(url, options=shim.CheckpointManagerOptions(create=False))
    with shim.CheckpointManager(url) as manager:
        manager.save(1, args=shim.args.StandardSave(a_tree(3)))
        assert_same(manager.restore(1), a_tree(3))
    assert [one.name for one in tmp_path.iterdir()] == [directory.name]
    options = shim.CheckpointManagerOptions(create=False)
    with shim.CheckpointManager(url, options=options) as manager:
        assert manager.all_steps() == [1]


def test_a_directory_that_is_not_to_be_created_has_to_be_there(directory):
    options = shim.CheckpointManagerOptions(create=False)
    with pytest.raises(gpuckpt.NotFoundError):
        shim.CheckpointManager(directory, options=options)


def test_other_programs_read_the_items_by_name(directory):
    with shim.CheckpointManager(directory, engine={"codec": "zstd"}) as manager:
        manager.save(1, args=shim.args.StandardSave(a_tree(2)))
    found = gpuckpt.load(directory, names="default.params.w", like="numpy", device="cpu")
    assert np.array_equal(found["default.params.w"], np.asarray(a_tree(2)["params"]["w"]))


def test_steps_of_others_are_refused(directory):
    gpuckpt.save(directory, [1, 2], step=3)
    with (
        shim.CheckpointManager(directory) as manager,
        pytest.raises(gpuckpt.FormatError, match=r"gpuckpt\.jax\.load"),
    ):
        manager.restore(3)


def test_a_failed_save_is_raised_and_its_step_is_not_there(directory, monkeypatch):
    def full(*_: Any) -> None:
        raise gpuckpt.StorageError("no space left")

    with shim.CheckpointManager(directory) as manager:
        manager.save(1, args=shim.args.StandardSave(a_tree()))
        manager.wait_until_finished()
        with monkeypatch.context() as broken:
            broken.setattr(LocalStore, "rename", full)
            manager.save(2, args=shim.args.StandardSave(a_tree(2)))
            with pytest.raises(gpuckpt.StorageError, match="no space"):
                manager.wait_until_finished()
        assert manager.latest_step() == 1
        assert manager.all_steps() == [1]
        assert not manager.is_saving_in_progress()
        manager.check_for_errors()


def test_without_async_a_save_is_durable_when_it_returns(directory):
    options = shim.CheckpointManagerOptions(enable_async_checkpointing=False)
    with shim.CheckpointManager(directory, options=options) as manager:
        manager.save(1, args=shim.args.StandardSave(a_tree()))
        assert not manager.is_saving_in_progress()
        assert LocalStore(directory).names()


def test_a_signal_makes_the_next_step_due(directory):
    options = shim.CheckpointManagerOptions(save_interval_steps=100)
    with shim.CheckpointManager(directory, options=options, preempt=signal.SIGUSR1) as manager:
        assert manager.save(1, args=shim.args.StandardSave(a_tree()))
        assert not manager.reached_preemption(2)
        assert not manager.should_save(2)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert manager.reached_preemption(3)
        assert manager.save(3, args=shim.args.StandardSave(a_tree()))
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_steps_some_time_apart_are_kept():
    options = shim.CheckpointManagerOptions(max_to_keep=1, keep_time_interval=timedelta(minutes=1))
    keep = keep_of(options)
    assert keep is not None
    times = [0, 30, 60, 90, 130, 140]
    made = [Manifest(step, {"dict": []}, (), created=at) for step, at in enumerate(times)]
    assert keep.survivors(made) == {0, 2, 4, 5}


def test_steps_without_metrics_stay_unless_they_are_not_wanted():
    def survivors(*, without: bool) -> set[int]:
        options = shim.CheckpointManagerOptions(
            max_to_keep=1,
            best_fn=lambda metrics: metrics["x"],
            keep_checkpoints_without_metrics=without,
        )
        keep = keep_of(options)
        assert keep is not None
        scores = [None, 3.0, 1.0, None, 2.0]
        made = [
            Manifest(step, {"dict": []}, (), metrics={} if x is None else {"best_fn": x})
            for step, x in enumerate(scores)
        ]
        return keep.survivors(made)

    assert survivors(without=True) == {0, 1, 3, 4}
    assert survivors(without=False) == {1, 4}
