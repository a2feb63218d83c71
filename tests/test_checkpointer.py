"""What a training loop can rely on."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import pytest

import gpuckpt
from gpuckpt.arena import AREAS, FEWEST_SLOTS
from gpuckpt.plan import area_nbytes
from gpuckpt.stores.memory import MemoryAppender, MemoryStore

# Memory for the fewest slots, each for a chunk of 4 KiB: a save can't read far ahead of its writes.
FEWEST: dict = {"chunk_nbytes": 4096, "memory": FEWEST_SLOTS * AREAS * area_nbytes(4096)}


def new_state() -> dict:
    return {"w": np.zeros((300, 100), np.float32), "frozen": np.ones(50), "step": 0, "rng": "x"}


def advance(state: dict, step: int) -> None:
    state["w"] += np.float32(step)
    state["step"] = step


def train(root, total: int, **options) -> tuple[dict, list[int]]:
    """DESIGN's loop; the state at its end, and the steps that were saved in it."""
    state, saved = new_state(), []
    with gpuckpt.Checkpointer(root, **options) as ckpt:
        done = ckpt.resume(state)
        for step in range(done + 1, total + 1):
            with ckpt.update():
                advance(state, step)
            if ckpt.step(step, state, metrics={"loss": 1 / step}):
                saved.append(step)
    return state, saved


class SlowStore(MemoryStore):
    """A store whose writes wait for `gate`; `reached` says that one does."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.reached = threading.Event(), threading.Event()

    def create(self, name: str) -> MemoryAppender:
        appender, gate, reached = super().create(name), self.gate, self.reached

        class Slow(MemoryAppender):
            def append(self, parts: Sequence[memoryview | bytes]) -> None:
                reached.set()
                assert gate.wait(30)
                super().append(parts)

        appender.__class__ = Slow
        return appender


class FullStore(MemoryStore):
    """A store that has no more room once `full` is set."""

    full = False

    def create(self, name: str) -> MemoryAppender:
        appender, store = super().create(name), self

        class Full(MemoryAppender):
            def append(self, parts: Sequence[memoryview | bytes]) -> None:
                super().append(parts)
                if store.full:
                    raise gpuckpt.StorageError(f"can't write {name}: no space left on device")

        appender.__class__ = Full
        return appender


def test_a_run_of_700_steps_after_100_every_300_saves_at_400_and_700(tmp_path):
    _, saved = train(tmp_path, 700, every=gpuckpt.Every(steps=300, after=100))

    assert saved == [400, 700]
    names = sorted(path.name for path in tmp_path.glob("*.manifest.json"))
    assert names == ["step-000000000400.manifest.json", "step-000000000700.manifest.json"]


def test_max_num_checkpoints_epoch_interval_and_step_interval_have_their_words(tmp_path):
    state = new_state()
    every, keep = gpuckpt.Every(epochs=2, steps=10), gpuckpt.Keep(last=2)
    with gpuckpt.Checkpointer(tmp_path, every=every, keep=keep) as ckpt:
        saved = []
        for step in range(1, 41):
            epoch = step // 8
            if ckpt.step(step, state, epoch=epoch):
                saved.append((step, epoch))
        ckpt.wait()

        assert saved == [(10, 1), (16, 2), (20, 2), (30, 3), (32, 4), (40, 5)]
        assert ckpt.steps() == [32, 40]
        latest = ckpt.latest()
    assert latest is not None
    assert (latest.step, latest.epoch) == (40, 5)


def test_a_run_that_resumes_ends_as_one_that_was_never_interrupted(tmp_path):
    whole, _ = train(tmp_path / "whole", 30, every=gpuckpt.Every(steps=4))

    train(tmp_path / "parts", 13, every=gpuckpt.Every(steps=4))
    parts, saved = train(tmp_path / "parts", 30, every=gpuckpt.Every(steps=4))

    assert saved == [16, 20, 24, 28]
    assert parts["w"].tobytes() == whole["w"].tobytes()
    assert parts["step"] == 30


@pytest.mark.parametrize("snapshot", ["copy", "hold", "auto"])
def test_every_checkpoint_is_the_state_at_its_step(tmp_path, snapshot):
    options: dict = {"snapshot": snapshot, "chunk_nbytes": 4096, "memory": "1 MiB"}
    train(tmp_path, 12, every=gpuckpt.Every(steps=1), **options)

    expected = new_state()
    for step in range(1, 13):
        advance(expected, step)
        loaded = gpuckpt.load(tmp_path, step)
        assert loaded["w"].tobytes() == expected["w"].tobytes()
        assert loaded["step"] == step


def test_a_copy_lets_the_loop_change_the_state_without_update(tmp_path):
    store, state = SlowStore(), new_state()
    with gpuckpt.Checkpointer(tmp_path, snapshot="copy", store=store) as ckpt:
        pending = ckpt.save(1, state)
        state["w"] += 1
        assert not pending.committed.is_set()
        store.gate.set()
        pending.result(30)
        assert not gpuckpt.load(tmp_path, store=store)["w"].any()


def test_hold_makes_a_loop_without_update_wait_in_save(tmp_path):
    state = new_state()
    with gpuckpt.Checkpointer(tmp_path, snapshot="hold") as ckpt:
        pending = ckpt.save(1, state)
        assert pending.staged.is_set()
        state["w"] += 1
        pending.result(30)
        assert not gpuckpt.load(tmp_path)["w"].any()


def test_hold_makes_a_loop_with_update_wait_there(tmp_path):
    store, state, order = SlowStore(), new_state(), []
    with gpuckpt.Checkpointer(tmp_path, snapshot="hold", store=store, **FEWEST) as ckpt:
        with ckpt.update():
            pass
        pending = ckpt.save(1, state)
        assert not pending.staged.is_set()

        def open_gate() -> None:
            order.append("opened")
            store.gate.set()

        opener = threading.Timer(0.1, open_gate)
        opener.start()
        with ckpt.update():
            order.append("updated")
            state["w"] += 1
        opener.join()
        pending.result(30)
        assert order == ["opened", "updated"]
        assert not gpuckpt.load(tmp_path, store=store)["w"].any()


def test_a_change_of_what_hold_has_read_that_no_update_announced_fails_the_save(tmp_path):
    store, state = SlowStore(), new_state()
    ckpt = gpuckpt.Checkpointer(tmp_path, snapshot="hold", store=store, **FEWEST)
    with ckpt.update():
        pass
    pending = ckpt.save(1, state)
    assert store.reached.wait(30)
    state["w"][0, 0] = 9
    store.gate.set()
    with pytest.raises(gpuckpt.TornError, match=r"^w changed while"):
        pending.result(30)
    assert ckpt.steps() == []
    assert store.names() == []
    with pytest.raises(gpuckpt.TornError):
        ckpt.wait()
    ckpt.save(2, state).result(30)
    ckpt.close()
    assert gpuckpt.load(tmp_path, store=store)["w"][0, 0] == 9


def test_copy_that_does_not_fit_the_budget_says_so_and_auto_holds(tmp_path):
    state = {"w": np.zeros(10**6)}
    options: dict = {"memory": "1 MiB", "chunk_nbytes": 64 << 10}
    with gpuckpt.Checkpointer(tmp_path, snapshot="copy", **options) as ckpt:
        with pytest.raises(gpuckpt.InvalidError, match="snapshot='copy' needs 8000000 bytes"):
            ckpt.save(1, state)
        assert ckpt.steps() == []
    with gpuckpt.Checkpointer(tmp_path, **options) as ckpt:
        assert ckpt.save(1, state).stats.mode == "hold"


@pytest.mark.parametrize(("when_busy", "expected"), [("wait", [1, 2]), ("skip", [1])])
def test_busy_means_wait_or_skip(tmp_path, when_busy, expected):
    for _ in range(3):
        store, state = SlowStore(), new_state()
        every = gpuckpt.Every(steps=1)
        with gpuckpt.Checkpointer(tmp_path, every=every, store=store, when_busy=when_busy) as ckpt:
            ckpt.step(1, state)
            opener = threading.Timer(0.05, store.gate.set)
            opener.start()
            ckpt.step(2, state)
            opener.join()
            ckpt.wait()
            assert ckpt.steps() == expected


def test_a_failed_save_is_raised_by_the_next_call_and_costs_nothing_committed(tmp_path):
    store, state = FullStore(), new_state()
    with gpuckpt.Checkpointer(tmp_path, every=gpuckpt.Every(steps=1), store=store) as ckpt:
        ckpt.step(1, state)
        ckpt.wait()
        store.full = True
        pending = ckpt.step(2, state)
        assert pending is not None
        with pytest.raises(gpuckpt.StorageError, match="no space left"):
            ckpt.wait()
        with pytest.raises(gpuckpt.StorageError, match="no space left"):
            pending.result()
        assert [name for name in store.names() if "000002" in name] == []
        store.full = False
        ckpt.step(3, state)
        ckpt.wait()
        assert ckpt.steps() == [1, 3]


def test_on_error_warn_lets_the_run_go_on(tmp_path):
    store, state = FullStore(), new_state()
    store.full = True
    with gpuckpt.Checkpointer(tmp_path, store=store, on_error="warn") as ckpt:
        ckpt.save(1, state)
        with pytest.warns(RuntimeWarning, match="step 1 was not saved: .*no space left"):
            ckpt.wait()
        store.full = False
        ckpt.save(2, state).result()
        assert ckpt.steps() == [2]


def test_a_leaf_that_cannot_be_saved_is_named_before_anything_is_written(tmp_path):
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        with pytest.raises(gpuckpt.UnsupportedError, match=r"a\.1\.b: .*set"):
            ckpt.save(1, {"a": [1, {"b": {1, 2}}]})
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_each_tensor_carries_the_step_at_which_its_bytes_last_changed(tmp_path):
    train(tmp_path, 6, every=gpuckpt.Every(steps=3))
    train(tmp_path, 9, every=gpuckpt.Every(steps=3))  # resumed: versions go on

    manifest = gpuckpt.commit.open_step(gpuckpt.stores.local.LocalStore(tmp_path), 9)

    versions = {entry.spec.name: entry.version for entry in manifest.tensors}
    assert versions == {"w": 9, "frozen": 3}


def test_what_a_crash_left_is_swept_away_and_nothing_else(tmp_path):
    gpuckpt.save(tmp_path, new_state(), 5)
    (tmp_path / "step-000000000006.0123abcd.r0.0.segment").write_bytes(b"torn")
    (tmp_path / "step-000000000006.manifest.json.tmp").write_bytes(b"{")
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name for path in tmp_path.iterdir()}

    with gpuckpt.Checkpointer(tmp_path):
        pass

    gone = before - {path.name for path in tmp_path.iterdir()}
    assert gone == {
        "step-000000000006.0123abcd.r0.0.segment",
        "step-000000000006.manifest.json.tmp",
    }
    assert gpuckpt.load(tmp_path)["step"] == 0


def test_a_segment_stays_while_a_manifest_that_may_name_it_cannot_be_read(tmp_path):
    gpuckpt.save(tmp_path, new_state(), 5)
    manifest = tmp_path / "step-000000000005.manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])

    with gpuckpt.Checkpointer(tmp_path):
        pass

    assert list(tmp_path.glob("*.segment"))


def test_a_second_checkpointer_of_a_root_is_refused_by_name_of_the_first(tmp_path):
    with (
        gpuckpt.Checkpointer(tmp_path),
        pytest.raises(gpuckpt.LockedError, match=f"pid {os.getpid()}"),
    ):
        gpuckpt.Checkpointer(tmp_path)
    gpuckpt.Checkpointer(tmp_path).close()


def test_a_closed_checkpointer_says_so_and_closing_twice_is_fine(tmp_path):
    ckpt = gpuckpt.Checkpointer(tmp_path)
    ckpt.close()
    ckpt.close()
    with pytest.raises(gpuckpt.ClosedError, match="closed"):
        ckpt.save(1, new_state())


def test_a_forked_child_cannot_use_its_parents_checkpointer_and_leaves_it_unharmed(tmp_path):
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        child = os.fork()
        if child == 0:  # pragma: no branch
            code = 1
            try:
                ckpt.close()
                ckpt.save(1, new_state())
            except gpuckpt.ClosedError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(gpuckpt.LockedError):
            gpuckpt.Checkpointer(tmp_path)
        ckpt.save(1, new_state()).result()


def test_leaving_the_block_waits_for_the_save(tmp_path):
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        pending = ckpt.save(1, new_state())
    assert pending.committed.is_set()
    assert gpuckpt.load(tmp_path)["step"] == 0


def test_the_loops_own_error_is_not_hidden_by_a_failed_save(tmp_path):
    store = FullStore()
    store.full = True

    def failing_loop() -> None:
        with gpuckpt.Checkpointer(tmp_path, store=store) as ckpt:
            ckpt.save(1, new_state())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_loop()


def test_pending_tells_what_the_save_cost(tmp_path):
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        pending = ckpt.save(4, new_state(), metrics={"loss": 0.5}, epoch=2)
        checkpoint = pending.result()
    stats = pending.stats
    assert (checkpoint.step, checkpoint.epoch, checkpoint.metrics) == (4, 2, {"loss": 0.5})
    assert stats.raw_nbytes == checkpoint.raw_nbytes == 300 * 100 * 4 + 50 * 8
    assert stats.encoded_nbytes == checkpoint.encoded_nbytes > 0
    assert stats.stall_seconds > 0
    assert stats.staged_seconds > 0
    assert stats.background_seconds > 0
    assert stats.as_dict()["ratio"] == stats.ratio == checkpoint.ratio


def test_waiting_for_a_result_ends_in_time(tmp_path):
    store = SlowStore()
    with gpuckpt.Checkpointer(tmp_path, store=store) as ckpt:
        pending = ckpt.save(1, new_state())
        with pytest.raises(TimeoutError, match="step 1"):
            pending.result(0.01)
        store.gate.set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "gzip"}, "codec is one of auto, delta, raw, zstd"),
        ({"snapshot": "now"}, "snapshot is one of auto, copy, hold"),
        ({"when_busy": "panic"}, "when_busy is one of wait, skip"),
        ({"on_error": "ignore"}, "on_error is one of raise, warn"),
        ({"memory": "a lot"}, "a size is bytes"),
        ({"memory": "1 MiB"}, "the least is"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_before_the_root_is_touched(
    tmp_path, options, message
):
    with pytest.raises(gpuckpt.InvalidError, match=message):
        gpuckpt.Checkpointer(tmp_path / "root", **options)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("step", [-1, 10**12, 1.5, "3", True])
def test_a_step_is_a_whole_number(tmp_path, step):
    with pytest.raises(gpuckpt.InvalidError, match="a step is an integer"):
        gpuckpt.save(tmp_path, {}, step)


def test_a_closed_checkpointer_and_its_memory_go_at_once_and_not_with_the_garbage(tmp_path):
    gc.disable()  # what refers to itself would stay, and with it a GPU's memory
    try:
        ckpt = gpuckpt.Checkpointer(tmp_path)
        ckpt.save(1, {"w": np.ones(5)}).result()
        ckpt.close()
        left = weakref.ref(ckpt)
        del ckpt
        assert left() is None
    finally:
        gc.enable()
