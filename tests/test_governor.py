"""What a save may take: so much that its cost stays under a bound, and no core that isn't free."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt import Every
from gpuckpt.cores import Cores, idle_seconds
from gpuckpt.effort import Effort, Efforts, efforts_of, fitting
from gpuckpt.governor import Governor
from gpuckpt.meter import Meter
from gpuckpt.schedule import Schedule
from gpuckpt.stats import Stats
from gpuckpt.stores.memory import MemoryStore


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


# Cores


@dataclass
class Machine:
    """Two cores, with counters of who used them."""

    clock: Clock = field(default_factory=Clock)
    own: float = 5.0
    nobody: float | None = 70.0

    def cores(self) -> Cores:
        cores = Cores(self.clock, lambda: self.own, lambda: self.nobody)
        cores._count = 2
        return cores

    def save(self, cores: Cores, seconds: float, loop: float, others: float = 0.0) -> None:
        """A save that uses half a core, beside a loop and others that use so many."""
        mine = 0.0
        with cores.watched(lambda: mine):
            mine += 0.5 * seconds
            self.clock.now += seconds
            self.own += (loop + 0.5) * seconds
            if self.nobody is not None:
                self.nobody += max(1.5 - loop - others, 0) * seconds


@pytest.mark.parametrize(
    ("loop", "others", "left"), [(0, 0, 2), (1, 0, 1), (1.5, 0, 0.5), (1, 0.5, 0.5), (0.5, 0, 1.5)]
)
def test_the_cores_left_over_are_those_that_only_the_save_uses(loop, others, left):
    machine = Machine()
    cores = machine.cores()
    machine.save(cores, 3, loop, others)
    assert cores.left() == pytest.approx(left)


def test_short_saves_say_something_together_and_what_was_known_stays():
    machine = Machine()
    cores = machine.cores()
    machine.save(cores, 0.12, 0)
    assert cores.left() is None
    machine.save(cores, 0.12, 1)
    assert cores.left() == pytest.approx(1.5)
    machine.save(cores, 0.01, 0)
    assert cores.left() == pytest.approx(1.5)
    machine.save(cores, 1, 1)
    assert cores.left() == pytest.approx(1, abs=0.02)


def test_where_the_system_does_not_count_idle_time_the_loops_own_counts():
    machine = Machine(nobody=None)
    cores = machine.cores()
    machine.save(cores, 1, 1)
    assert cores.left() == pytest.approx(1)


def test_a_save_that_fails_was_beside_the_loop_too():
    machine = Machine()
    cores = machine.cores()

    @cores.watched(lambda: 0.0)
    def save() -> None:
        machine.clock.now += 1
        machine.own += 2
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        save()
    assert cores.left() == 0


def test_idle_time_is_read_for_the_cores_of_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1})
    monkeypatch.setattr("gpuckpt.cores._TICK", 100)
    stat = tmp_path / "stat"
    stat.write_text("cpu 1 1 1 9 9 1\ncpu0 1 1 1 100 100 1\ncpu1 1 1 1 300 50 1\nintr 7\n")
    assert idle_seconds(stat) == 3.5
    stat.write_text("cpu 1 1 1 9 9 1\ncpu0 1 1 1 100 100 1\n")
    assert idle_seconds(stat) is None
    assert idle_seconds(tmp_path / "none") is None
    seconds = idle_seconds()
    assert seconds is None or seconds >= 0


# By the cores


@pytest.mark.parametrize(
    ("codec", "left", "pressed", "workers", "chosen"),
    [
        ("auto", None, False, 4, "auto"),
        ("auto", 3.8, False, 4, "auto"),
        ("auto", 2.2, False, 2, "auto"),
        ("auto", 9.0, False, 4, "auto"),
        ("auto", 1.3, False, 1, "auto"),
        ("auto", 1.2, False, 1, "raw"),
        ("auto", 0.0, False, 1, "raw"),
        ("auto", 0.0, True, 1, "auto"),
        ("zstd", 0.0, False, 4, "zstd"),
        ("delta", 0.0, False, 4, "delta"),
        ("raw", 0.0, False, 4, "raw"),
    ],
)
def test_a_save_takes_the_cores_that_are_left_over(codec, left, pressed, workers, chosen):
    assert fitting(codec, 4, left, pressed=pressed) == Effort(workers, chosen)


@pytest.mark.parametrize(("left", "chosen"), [(1.0, "auto"), (0.8, "auto"), (0.7, "raw")])
def test_a_single_core_that_is_mostly_idle_is_left_over(left, chosen):
    assert fitting("auto", 1, left, pressed=False) == Effort(1, chosen)


@given(st.sampled_from(["auto", "raw", "zstd", "delta"]), st.integers(1, 8))
def test_what_there_is_to_choose_from_keeps_a_codec_that_was_asked_for(codec, workers):
    efforts = efforts_of(codec, workers)
    assert efforts[0] == Effort(workers, codec)
    assert len(set(efforts)) == len(efforts) == 1 + (workers > 1) + (codec == "auto")
    assert {one.codec for one in efforts} == ({"auto", "raw"} if codec == "auto" else {codec})


class NoneLeft(Cores):
    """The loop uses every core."""

    def left(self) -> float | None:
        return 0.0


@pytest.mark.parametrize(("codec", "compressed"), [("auto", False), ("zstd", True)])
def test_auto_leaves_chunks_as_they_are_beside_a_loop_that_uses_every_core(
    monkeypatch, codec, compressed
):
    monkeypatch.setattr("gpuckpt.governor.Cores", NoneLeft)
    rng = np.random.default_rng(1)
    state = {"w": rng.standard_normal(1 << 16, np.float32)}
    store = MemoryStore()
    with gpuckpt.Checkpointer("", store=store, codec=codec, snapshot="copy") as ckpt:
        stats = ckpt.save(1, state).stats
        ckpt.wait()
    assert (stats.encoded_nbytes < stats.raw_nbytes) == compressed
    assert (stats.workers == 1) or compressed
    assert (gpuckpt.load("", store=store)["w"] == state["w"]).all()


def test_what_was_left_beside_a_save_is_known_after_it():
    rng = np.random.default_rng(1)
    state = {"w": rng.standard_normal(1 << 16, np.float32)}
    with gpuckpt.Checkpointer("", store=MemoryStore()) as ckpt:
        cores = ckpt._governor._cores
        for step in range(1, 500):
            ckpt.save(step, state).result()
            if cores.left() is not None:
                break
        left = cores.left()
        assert left is not None
        assert 0 <= left <= cores._count + 0.5


def test_a_save_that_takes_most_of_the_time_between_saves_is_compressed_all_the_same():
    clock, cores = Clock(), NoneLeft()
    governor = Governor(None, "auto", 2, clock, cores)
    chosen = []
    for seconds in (6.0, 4.0, 6.0):  # of 10 from save to save
        governor.begin()
        chosen.append(governor.effort.codec)
        governor.saved()
        clock.now += seconds
        governor.ended(Stats(1, background_seconds=seconds), failed=False)
        clock.now += 10 - seconds
    governor.begin()
    chosen.append(governor.effort.codec)
    # Nothing is known of the time between saves before there were two.
    assert chosen == ["raw", "raw", "raw", "auto"]


class AllLeft(Cores):
    """The loop uses no core."""

    def left(self) -> float | None:
        return 2.0


def chosen_after(*ended: Stats, saves: int = 20) -> list[str]:
    """The codecs of saves, of which the first that compressed ended so."""
    clock, each = Clock(), iter(ended)
    governor = Governor(None, "auto", 2, clock, AllLeft())
    chosen = []
    for step in range(saves):
        governor.begin()
        chosen.append(governor.effort.codec)
        governor.saved()
        clock.now += 1
        stats = next(each, ended[-1]) if governor.effort.codec == "auto" else Stats(step)
        governor.ended(stats, failed=False)
        clock.now += 99
    return chosen


def wrote(share: float, *, unchanged_nbytes: int = 0, derived_nbytes: int = 0) -> Stats:
    nbytes = 1 << 28
    fresh = nbytes - unchanged_nbytes - derived_nbytes
    return Stats(
        1,
        raw_nbytes=nbytes,
        unchanged_nbytes=unchanged_nbytes,
        derived_nbytes=derived_nbytes,
        written_nbytes=round(share * fresh),
    )


def test_auto_that_found_little_to_compress_leaves_the_next_saves_as_they_are():
    assert chosen_after(wrote(0.96)) == ["auto", *["raw"] * 15, "auto", *["raw"] * 3]


def test_auto_goes_on_once_it_finds_enough_again():
    assert chosen_after(wrote(0.96), wrote(0.8)) == ["auto", *["raw"] * 15, *["auto"] * 4]
    assert set(chosen_after(wrote(0.8))) == {"auto"}


def test_what_had_not_to_be_written_at_all_is_nothing_that_was_compressed():
    assert chosen_after(wrote(0.99, unchanged_nbytes=1 << 27), saves=2) == ["auto", "raw"]
    assert chosen_after(wrote(0.8, derived_nbytes=1 << 27), saves=2) == ["auto", "auto"]


def test_small_saves_say_nothing_of_what_compressing_is_worth():
    small = Stats(1, raw_nbytes=1 << 20, written_nbytes=1 << 20)
    assert set(chosen_after(small)) == {"auto"}


def test_a_save_that_failed_says_nothing_of_what_compressing_is_worth():
    governor = Governor(None, "auto", 2, Clock(), AllLeft())
    for failed, codec in ((True, "auto"), (False, "auto"), (False, "raw")):
        governor.begin()
        assert governor.effort.codec == codec
        governor.ended(wrote(0.99), failed=failed)


# By what saves cost


EFFORTS = efforts_of("auto", 2)
COSTS = st.floats(0.001, 5)


@given(st.tuples(COSTS, COSTS, COSTS), st.floats(0.001, 0.2))
def test_the_efforts_of_the_shortest_intervals_are_nearly_always_taken(costs, overhead):
    model = dict(zip(EFFORTS, costs, strict=True))
    efforts, taken = Efforts(EFFORTS, overhead), Counter[Effort]()
    for at in range(400):
        chosen = efforts.choose(EFFORTS[0])
        efforts.ended(chosen, model[chosen], 0.0)
        taken[chosen] += at >= 50
    good = [one for one in EFFORTS if model[one] <= 1.1 * min(costs)]
    assert sum(taken[one] for one in good) >= 0.8 * taken.total()
    spent = sum(model[one] * count for one, count in taken.items())
    assert spent <= 1.3 * min(costs) * taken.total()


def test_of_efforts_that_allow_as_frequent_saves_the_one_of_fewest_bytes_is_taken():
    efforts = Efforts(EFFORTS, 0.01)
    for cost, effort in zip([0.020, 0.021, 0.019], EFFORTS, strict=True):
        efforts.ended(effort, cost, 0.5)
    assert efforts.choose(EFFORTS[2]) == EFFORTS[0]


def test_where_saves_take_longer_than_their_cost_asks_for_the_shortest_is_taken():
    efforts = Efforts(EFFORTS, 0.01)
    took = [(0.003, 5.0), (0.002, 9.0), (0.001, 6.0)]
    for (cost, seconds), effort in zip(took, EFFORTS, strict=True):
        efforts.ended(effort, cost, seconds)
    assert efforts.choose(EFFORTS[2]) == EFFORTS[0]


def test_one_save_that_was_disturbed_does_not_change_the_choice_and_a_lasting_change_does():
    efforts = Efforts(EFFORTS, 0.01)
    for _ in range(3):
        for cost, effort in zip([0.01, 0.03, 0.03], EFFORTS, strict=True):
            efforts.ended(effort, cost, 0.0)
    efforts.ended(EFFORTS[0], 1.0, 0.0)
    assert efforts.choose(EFFORTS[0]) == EFFORTS[0]
    efforts.ended(EFFORTS[0], 1.0, 0.0)
    assert efforts.choose(EFFORTS[0]) == EFFORTS[1]


@dataclass
class Run:
    """A loop of steps on a clock, and saves that stall it and slow its steps down."""

    governor: Governor
    clock: Clock
    stalls: dict[Effort, float]
    slower: dict[Effort, float]  # seconds, each step beside the save
    lasts: int  # steps
    spent: float = 0.0
    begun: list[float] = field(default_factory=list)
    spent_before: list[float] = field(default_factory=list)
    efforts: list[Effort] = field(default_factory=list)

    def steps(self, count: int) -> None:
        left, stats = 0, None
        for step in range(1, count + 1):
            extra = self.slower[self.efforts[-1]] if left else 0.0
            self.clock.now += 0.1 + extra
            self.spent += extra
            self.governor.step(busy=stats is not None)
            left = max(left - 1, 0)
            if stats is not None and not left:
                self.governor.ended(stats, failed=False)
                stats = None
            if stats is None and self.governor.is_due(step, None):
                stats, left = self.save(step), self.lasts

    def save(self, step: int) -> Stats:
        self.begun.append(self.clock.now)
        self.spent_before.append(self.spent)
        self.governor.begin()
        self.efforts.append(self.governor.effort)
        stall = self.stalls[self.efforts[-1]]
        self.clock.now += stall
        self.spent += stall
        self.governor.saved()
        return Stats(step, stall_seconds=stall, background_seconds=0.1 * self.lasts)


@settings(deadline=None, max_examples=60)
@given(
    st.floats(0.01, 0.3),
    st.tuples(*[st.floats(0.0, 0.5)] * 3),
    st.tuples(*[st.floats(0.0, 0.2)] * 3),
    st.integers(1, 5),
)
def test_whatever_saves_cost_the_total_stays_under_the_bound(overhead, stalls, slower, lasts):
    clock = Clock()
    governor = Governor(Every(overhead=overhead), "auto", 2, clock, NoneLeft())
    stalling, slowing = (dict(zip(EFFORTS, costs, strict=True)) for costs in (stalls, slower))
    run = Run(governor, clock, stalling, slowing, lasts)
    begun = clock.now
    run.steps(1500)
    assert run.efforts[0] == Effort(1, "raw")  # no core is left, and nothing is known
    for at, spent in list(zip(run.begun, run.spent_before, strict=True))[1:]:
        assert spent <= overhead * (at - begun) + 1e-6
    dearest = max(map(sum, zip(stalls, (lasts * one for one in slower), strict=True)))
    assert len(run.begun) >= 2 or dearest > overhead * (clock.now - begun) / 2


def test_the_first_saves_try_each_effort_and_then_the_cheapest_is_taken():
    clock = Clock()
    governor = Governor(Every(overhead=0.05), "auto", 2, clock, NoneLeft())
    stalls = dict(zip(EFFORTS, (0.3, 0.2, 0.1), strict=True))
    run = Run(governor, clock, stalls, dict.fromkeys(EFFORTS, 0.01), 2)
    run.steps(4000)
    assert set(run.efforts[:3]) == set(EFFORTS)
    assert Counter(run.efforts).most_common(1)[0][0] == Effort(1, "raw")
    assert set(run.efforts[3:]) == set(EFFORTS)  # now and then anew
    pauses = np.diff(run.begun)
    assert np.median(pauses) == pytest.approx(0.12 / 0.05, rel=0.1)


def test_a_save_that_fails_teaches_nothing_but_counts():
    clock = Clock()
    governor = Governor(Every(overhead=0.1), "auto", 2, clock, NoneLeft())
    for _ in range(2):
        governor.begin()
        assert governor.effort == Effort(1, "raw")
        governor.saved()
        governor.ended(Stats(1, stall_seconds=1.0), failed=True)
    governor.step(busy=False)
    assert not governor.is_due(1, None)
    clock.now += 19
    assert not governor.is_due(2, None)
    clock.now += 2
    assert governor.is_due(3, None)


# Schedule and meter


def test_a_save_that_was_not_due_is_made_up_for_too():
    clock = Clock()
    schedule = Schedule(Every(overhead=0.1), clock)
    for _ in range(2):
        schedule.saved()
        schedule.cost(1.0)
        clock.now += 4
    assert not schedule.is_due(1, None)
    clock.now += 11.9
    assert not schedule.is_due(2, None)
    clock.now += 0.2
    assert schedule.is_due(3, None)


def test_steps_that_are_longer_by_chance_are_no_cost():
    clock = Clock()
    meter = Meter(clock)
    meter.restart()
    for at in range(20):
        clock.now += 1.0 + 0.1 * math.cos(at * math.pi)
        meter.step(busy=at >= 10)
    assert meter.slowdown_seconds() == pytest.approx(0)
    meter.restart()
    clock.now += 5
    meter.step(busy=True)
    assert meter.slowdown_seconds() == pytest.approx(4, abs=0.2)


def test_the_first_saves_slow_down_is_known_once_a_step_without_a_save_was_seen():
    clock = Clock()
    governor = Governor(Every(overhead=0.1), "auto", 2, clock, NoneLeft())
    governor.step(busy=False)
    assert governor.is_due(1, None)
    governor.begin()
    governor.saved()
    clock.now += 3
    governor.step(busy=True)
    stats = Stats(1)
    governor.ended(stats, failed=False)
    assert not governor.is_due(2, None)
    clock.now += 1
    governor.step(busy=False)
    assert stats.slowdown_seconds == pytest.approx(2)
    clock.now += 15.5
    assert not governor.is_due(3, None)
    clock.now += 1
    assert governor.is_due(4, None)


def test_a_real_loop_under_a_bound_saves_with_every_effort_and_each_is_a_whole_checkpoint(tmp_path):
    state = {"w": np.zeros(1 << 18, np.float32)}
    rng = np.random.default_rng(2)
    seen = set()
    every = Every(overhead=0.9, steps=1)
    with gpuckpt.Checkpointer(tmp_path, every=every, keep=gpuckpt.Keep(last=2)) as ckpt:
        for step in range(1, 9):
            with ckpt.update():
                state["w"][:] = rng.standard_normal(1 << 18, np.float32)
            pending = ckpt.step(step, state)
            assert pending is not None
            pending.result()
            seen.add(pending.stats.workers)
            loaded = gpuckpt.load(tmp_path)
            assert (loaded["w"] == state["w"]).all()
        workers = ckpt._resources.workers
    assert seen == {1, workers}
