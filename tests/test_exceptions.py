"""Exceptions anywhere: the last checkpoint stays, nothing hangs, and the next save works."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt import apart, copying, watch
from gpuckpt.apart import Apart
from gpuckpt.arena import AREAS, FEWEST_SLOTS
from gpuckpt.ordered import ordered_map
from gpuckpt.plan import area_nbytes
from gpuckpt.stats import Stats
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.watch import Watch
from tests import stress
from tests.faults import SCENARIOS, THREADS, Run, calls_of, leftovers, strike
from tests.often import some
from tests.test_checkpointer import FullStore, SlowStore

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

STRIDE = 331


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_an_exception_at_any_call_in_any_thread_costs_that_save_at_most(tmp_path, scenario, thread):
    count = calls_of(scenario, thread, tmp_path / "whole")
    first = len(scenario) * len(thread) % STRIDE + 1
    moments = {min(2, count), *range(first, count + 1, STRIDE), count} - {0}
    for at in some(sorted(moments)):
        strike(scenario, thread, at, tmp_path / str(at))


class Refusing:
    """Memory that is refused once, at the n-th time that it is asked for in a save."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.asked, self._at, self._lock = 0, at, threading.Lock()
        for module, name in ((np, "empty"), (mmap, "mmap"), (np, "zeros")):
            monkeypatch.setattr(module, name, self._asking(getattr(module, name)))

    def _asking(self, allocate: Any) -> Any:
        def asked(*args: Any, **options: Any) -> Any:
            with self._lock:
                self.asked += 1
                refused = self.asked == self._at
            if refused:
                raise MemoryError(f"no memory the {self._at}. time")
            return allocate(*args, **options)

        return asked


@pytest.mark.parametrize("codec", ["auto", "delta", "zstd"])
def test_memory_that_is_refused_at_any_time_fails_one_save_with_that_error(
    tmp_path, monkeypatch, codec
):
    for at in range(1, 60):
        run = Run(tmp_path / str(at), codec=codec, snapshot="copy" if at % 2 else "auto")
        with monkeypatch.context() as patch:
            refusing = Refusing(patch, at)
            for _ in range(2):
                with contextlib.suppress(MemoryError):
                    run.save()
        run.save()
        run.check()
        run.close()
        if refusing.asked < at:
            break
    assert at > 5


def test_a_thread_that_cannot_copy_fails_the_snapshot(tmp_path, monkeypatch):
    """Else the checkpoint would hold what was in that memory before."""
    monkeypatch.setattr(copying, "_LEAST_NBYTES", 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    copy, main = copying._copy, threading.get_ident()

    def failing(moves: Any) -> None:
        if threading.get_ident() != main:
            raise MemoryError("no memory to copy")
        time.sleep(0.02)  # the others come first
        copy(moves)

    with gpuckpt.Checkpointer(tmp_path, snapshot="copy") as ckpt:
        with monkeypatch.context() as patch:
            patch.setattr(copying, "_copy", failing)
            with pytest.raises(MemoryError, match="no memory to copy"):
                ckpt.save(1, {"w": np.ones(10_000)})
        ckpt.save(2, {"w": np.ones(10_000)}).result(30)
        assert ckpt.steps() == [2]


class Refuses(Exception):  # noqa: N818 - a user's own
    """What a user's code raises."""


def refuse(*_: Any, **__: Any) -> Any:
    raise Refuses


class Stateful:
    """An object whose methods fail when they are told to."""

    def __init__(self) -> None:
        self.array, self.refuses = np.arange(10.0), ""

    def state_dict(self) -> dict[str, Any]:
        if self.refuses == "state_dict":
            raise Refuses
        return {"a": self.array}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.refuses == "load_state_dict":
            raise Refuses
        self.array[:] = state["a"]


class Items(Mapping[str, Any]):
    """A mapping of which one method fails."""

    refuses = ""

    def __getitem__(self, key: str) -> Any:
        return refuse() if self.refuses == "getitem" else np.arange(3)

    def __iter__(self) -> Iterator[str]:
        return refuse() if self.refuses == "iter" else iter(["a", "b"])

    def __len__(self) -> int:
        return refuse() if self.refuses == "len" else 2


class Speaks:
    """An array of another library, one method of which fails."""

    def __init__(self) -> None:
        self.array, self.refuses = np.arange(5), False

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return refuse() if self.refuses else self.array.__array_interface__


class SpeaksDLPack:
    """The same, by DLPack."""

    def __init__(self) -> None:
        self.array, self.refuses = np.arange(5), False

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return refuse() if self.refuses else self.array.__dlpack__()


CALLBACKS: dict[str, tuple[Any, Any]] = {
    "state_dict": (Stateful, "state_dict"),
    "getitem": (Items, "getitem"),
    "iter": (Items, "iter"),
    "len": (Items, "len"),
    "array_interface": (Speaks, True),
    "dlpack": (SpeaksDLPack, True),
}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("callback", CALLBACKS)
def test_what_the_states_own_code_raises_is_raised_by_save_and_costs_nothing(
    tmp_path, callback, known
):
    """Whether its inventory was taken before or not."""
    kind, refuses = CALLBACKS[callback]
    leaf = kind()
    state = {"x": leaf, "w": np.ones(1000)}
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        if known:
            ckpt.save(1, state).result(30)
        leaf.refuses = refuses
        with pytest.raises((Refuses, gpuckpt.UnsupportedError)):
            ckpt.save(2, state)
        leaf.refuses = type(refuses)()
        ckpt.save(3, state).result(30)
        assert ckpt.steps() == ([1, 3] if known else [3])
    assert (gpuckpt.load(tmp_path)["w"] == 1).all()


@pytest.mark.parametrize("error", [Refuses, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_load_state_dict_raises_is_raised_by_restore_which_works_the_next_time(
    tmp_path, monkeypatch, error
):
    leaf = Stateful()
    state: dict[str, Any] = {"x": leaf, "w": np.ones(1000)}
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state).result(30)

        def raising(_: Any, __: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Stateful, "load_state_dict", raising)
            expected = gpuckpt.MismatchError if error is Refuses else error
            with pytest.raises(expected, match="Refuses" if error is Refuses else None):
                ckpt.restore(state)
        state["w"][:] = 0
        assert ckpt.restore(state) == 1
        assert (state["w"] == 1).all()
        ckpt.save(2, state).result(30)


def test_a_rename_that_raises_changes_nothing(tmp_path):
    state = {"w": np.ones(1000)}
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state).result(30)
        state["w"][:] = 2
        with pytest.raises(Refuses):
            ckpt.restore(state, rename=refuse)
        assert (state["w"] == 2).all()
        ckpt.save(2, state).result(30)
        assert ckpt.steps() == [1, 2]


def test_metrics_that_raise_are_no_save(tmp_path):
    class Loss(float):
        __float__ = refuse

    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        with pytest.raises((Refuses, gpuckpt.InvalidError)):
            ckpt.save(1, {"w": np.ones(3)}, metrics={"loss": Loss(1)})
        ckpt.save(2, {"w": np.ones(3)}).result(30)
        assert ckpt.steps() == [2]


@pytest.mark.parametrize("log_file", ["fifo", "directory gone", "full"])
def test_a_log_that_fails_fails_no_save(tmp_path, caplog, log_file):
    path = tmp_path / "logs" / "saves"
    path.parent.mkdir()
    if log_file == "fifo":
        os.mkfifo(path)
    with gpuckpt.Checkpointer(
        tmp_path / "root", log="/dev/full" if log_file == "full" else path
    ) as ckpt:
        if log_file == "directory gone":
            path.parent.rmdir()
        ckpt.save(1, {"w": np.ones(3)}).result(30)
        assert ckpt.steps() == [1]
    assert "step 1 isn't in the log" in caplog.text


class Snag(MemoryStore):
    """A store whose operation of one name hangs until `gate` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def sync_names(self) -> None:
        assert self.gate.wait(30)


def test_close_with_a_timeout_says_which_step_goes_on_and_for_what_it_waits(tmp_path):
    store = Snag()
    store.gate.set()
    ckpt = gpuckpt.Checkpointer(tmp_path, store=store)
    store.gate.clear()
    pending = ckpt.save(7, {"w": np.ones(10)})
    with pytest.raises(gpuckpt.BusyError, match=r"step 7 .* after 0.05 s .*goes on"):
        ckpt.close(timeout=0.05)
    with pytest.raises(TimeoutError):
        ckpt.close("0.05 s")
    with pytest.raises(gpuckpt.LockedError):
        gpuckpt.Checkpointer(tmp_path, store=store)
    store.gate.set()
    pending.result(30)
    ckpt.save(8, {"w": np.ones(10)})
    ckpt.close(timeout="30 s")
    with gpuckpt.Checkpointer(tmp_path, store=store) as other:
        assert other.steps() == [7, 8]


def test_a_timeout_is_enough_for_a_save_that_ends_and_its_failure_is_raised(tmp_path):
    store = FullStore()
    store.full = True
    ckpt = gpuckpt.Checkpointer(tmp_path, store=store)
    ckpt.save(1, {"w": np.ones(10)})
    with pytest.raises(gpuckpt.StorageError, match="no space left"):
        ckpt.close(timeout=30)
    with pytest.raises(gpuckpt.ClosedError):
        ckpt.wait()


@pytest.mark.parametrize("timeout", ["soon", -1, True])
def test_a_timeout_that_makes_no_sense_is_refused_and_nothing_is_closed(tmp_path, timeout):
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        with pytest.raises(gpuckpt.InvalidError, match="a duration is"):
            ckpt.close(timeout)
        ckpt.save(1, {"w": np.ones(10)}).result(30)


class StuckDisk:
    """`os.fsync` of a disk that hangs until `gate` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate, self.inside = threading.Event(), threading.Event()
        monkeypatch.setattr(os, "fsync", self._hang)

    def _hang(self, _: int) -> None:
        self.inside.set()
        assert self.gate.wait(30)


def test_a_save_that_makes_no_progress_is_told_of_each_minute(tmp_path, monkeypatch, caplog):
    now, stats, store = [0.0], Stats(400), LocalStore(tmp_path)
    watching, disk = Watch(stats, clock=lambda: now[0]), StuckDisk(monkeypatch)

    def save() -> None:
        watching.begin()
        store.sync_names()

    thread = threading.Thread(target=save)
    thread.start()
    assert disk.inside.wait(30)
    told = []
    for now[0] in (0, 59, 61, 70, 119, 121):
        watching.look()
        told.append(len(caplog.records))
    stats.written_nbytes += 1  # it goes on
    for now[0] in (122, 181, 183):
        watching.look()
        told.append(len(caplog.records))
    disk.gate.set()
    thread.join()
    assert told == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert "step 400: waiting for the storage (sync_names) for 61 s" in caplog.text


def test_a_disk_that_hangs_is_named_in_the_log_and_by_close(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(watch, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(apart, "_WATCH_SECONDS", 0.01)
    ckpt = gpuckpt.Checkpointer(tmp_path)
    disk = StuckDisk(monkeypatch)
    ckpt.save(3, {"w": np.ones(10)})
    assert disk.inside.wait(30)
    with pytest.raises(gpuckpt.BusyError, match=r"it waits for the storage \(sync\)"):
        ckpt.close(0.05)
    disk.gate.set()
    ckpt.close()
    assert "step 3: waiting for the storage (sync)" in caplog.text


def test_work_whose_thread_dies_at_its_first_line_has_failed():
    def never(_: Any, event: str, __: Any) -> None:
        raise MemoryError("no frame")

    failures: list[BaseException] = []
    work = Apart(lambda: 1, failures.append)
    threading.settrace(never)
    try:
        work.start()
        assert work.ended.wait(30)
    finally:
        threading.settrace(None)
    with pytest.raises(gpuckpt.CheckpointError, match="died without a word"):
        work.result()
    assert len(failures) == 1


@pytest.mark.parametrize("name", ["gpuckpt-work", "gpuckpt-draw"])
def test_chunks_whose_threads_die_are_waited_for_no_longer(monkeypatch, name):
    run = threading.Thread.run

    def die(thread: threading.Thread) -> None:
        if not thread.name.startswith(name):
            run(thread)

    monkeypatch.setattr(threading.Thread, "run", die)
    dropped: list[int] = []
    with pytest.raises(RuntimeError, match="died without a word"):
        list(ordered_map(lambda one: one, range(5), workers=2, drop=dropped.append))
    assert leftovers() == []
    assert dropped == list(range(5)) if name == "gpuckpt-work" else not dropped


def test_work_that_waits_for_other_work_goes_on_when_all_ends_early():
    ended = threading.Event()

    def work(item: int) -> int:
        if item == 1:
            assert ended.wait(30)
        return item

    line = ordered_map(work, range(9), workers=2, ending=ended.set)
    assert next(line) == 0
    line.close()
    assert leftovers() == []


def test_slots_that_a_failure_has_cost_are_made_up_for(tmp_path, caplog):
    memory = FEWEST_SLOTS * AREAS * area_nbytes(4096)
    with gpuckpt.Checkpointer(tmp_path, chunk_nbytes=4096, memory=memory) as ckpt:
        state = {"w": np.arange(10_000)}
        ckpt.save(1, state).result(30)
        arena = ckpt._saves._resources._arena
        assert arena is not None
        for _ in range(FEWEST_SLOTS):
            arena.take()
        ckpt.save(2, state).result(30)
        state["w"][:] = 0
        ckpt.restore(state, 2)
        assert (state["w"] == np.arange(10_000)).all()
    assert "slots of host memory were lost" in caplog.text


def test_a_save_in_flight_outlives_an_error_of_the_loop(tmp_path):
    store = SlowStore()
    opener = threading.Timer(0.05, store.gate.set)

    def loop() -> None:
        with gpuckpt.Checkpointer(tmp_path, store=store) as ckpt:
            ckpt.save(1, {"w": np.ones(1000)})
            opener.start()
            raise Refuses

    with pytest.raises(Refuses):
        loop()
    assert (gpuckpt.load(tmp_path, store=store)["w"] == 1).all()


@pytest.mark.parametrize("seed", [7, 700])
def test_random_histories_under_random_trouble(seed):
    counts = stress.play(2.5, seed)
    assert counts["lives"] > 0
    assert counts["compared"] > 0
