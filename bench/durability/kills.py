"""`python -m bench.durability kills [--count N] [--seed N] [--out FILE]`: kill training runs.

Real processes train, with small states, and save every step; each is killed by
SIGKILL: at a random moment, by its parent, or at a random one of the calls and
returns of Python and of C that are made in some place (`deaths.py` has them).
The next one goes on from what is left, some times in a row; then two
race for the root, and the loser gets it when the winner was killed.  First of all
each way of saving dies before every system call of a run in turn.  After each
kill a reader checks every byte and every value of every checkpoint; after every
other one a checkpointer opens the root, resumes, and saves.  Exits with 1 if
anything was lost, damaged or left over.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import gpuckpt
from bench.durability.child import (
    COUNTED,
    FOR_EVER,
    SETTINGS,
    Life,
    Said,
    Setting,
    checkpointer,
    left_over,
)
from bench.durability.deaths import PLACES, SYSTEM, Death
from bench.durability.processes import Child, nursery
from bench.durability.tally import Tally
from bench.machine import machine
from bench.timing import write_report
from gpuckpt.commit import steps
from gpuckpt.resources import Resources
from gpuckpt.stores.local import LocalStore
from gpuckpt.verify import verify_step
from tests.versions import CHUNK, set_to, state_at, version_of

BEFORE = 3  # steps that were saved when a run dies at each of its system calls in turn
STEPS = 6  # of a run that kills itself, if it lives that long
CHAIN = 6  # kills of one root
CLOCK, RACE = "clock", "race"
CLOCK_SECONDS = 0.2


class Campaign:
    """Kills, one after the other."""

    def __init__(self, directory: Path, seed: int, settings: Sequence[Setting] = SETTINGS) -> None:
        self._directory, self._seed, self._settings = directory, seed, settings
        self._nursery = nursery()
        self._resources = Resources("4 MiB", chunk_nbytes=CHUNK)
        self._moments: dict[tuple[Setting, int], dict[str, int]] = {}
        self.tally = Tally()

    def run(self, count: int) -> None:
        """Kill at random moments, at least so many in all."""
        number = 0
        while sum(self.tally.kills.values()) < count:
            rng = random.Random(f"{self._seed} {number}")
            setting = self._settings[number % len(self._settings)]
            self._root(f"root {number}", lambda root: self._chain(root, setting, rng))  # noqa: B023 - run at once
            number += 1

    def in_turn(self) -> None:
        """Kill before each system call of a run that resumes and saves once."""
        for at, setting in enumerate(self._settings):
            self._root(f"turn {at}", lambda root: self._in_turn(root, setting))  # noqa: B023 - run at once

    def _root(self, name: str, use: Callable[[Path], object]) -> None:
        """One root; it goes if all went well."""
        root = self._directory / name
        try:
            use(root)
        except (AssertionError, gpuckpt.CheckpointError) as error:
            self.tally.failures.append(f"{name}, seed {self._seed}: {error!r}")
        else:
            shutil.rmtree(root)

    def _in_turn(self, begun: Path, setting: Setting) -> None:
        """Each from a copy of one root, in which two runs were; the second one was killed."""
        rng, outlived = random.Random(self._seed), self.tally.outlived[SYSTEM]
        announced = self._live(Life(begun, setting, BEFORE), 0, rng)
        announced = self._live(Life(begun, setting, 1, Death("commit", 1)), announced, rng)
        root = begun.with_name(f"{begun.name} copied")
        for at in itertools.count(1):
            shutil.copytree(begun, root)
            self._live(Life(root, setting, 1, Death(SYSTEM, at)), announced, rng)
            shutil.rmtree(root)
            if self.tally.outlived[SYSTEM] > outlived:
                break

    def _chain(self, root: Path, setting: Setting, rng: random.Random) -> None:
        """A run that is killed and started again some times."""
        announced = 0
        for _ in range(CHAIN):
            if rng.random() < 0.5:
                life = Life(root, setting, FOR_EVER)
            else:
                life = Life(root, setting, STEPS, self._death(setting, rng))
            announced = self._live(life, announced, rng)
        if not setting.alone:
            announced = self._race(root, setting, announced, rng)
        self.check(root, setting, announced, opened=not setting.alone)

    def _death(self, setting: Setting, rng: random.Random) -> Death:
        moments = self.moments(setting, STEPS)
        place = rng.choice([place for place in PLACES if moments[place]])
        return Death(place, rng.randint(1, moments[place]))

    def moments(self, setting: Setting, steps: int) -> dict[str, int]:
        """How many there are in each place, in a run of so many steps that isn't killed."""
        if (setting, steps) not in self._moments:
            root = self._directory / "counted"
            child = Child(self._nursery, Life(root, setting, steps, COUNTED))
            child.go()
            words, _ = child.last_words()
            shutil.rmtree(root)
            self._moments[setting, steps] = words[-1][1]
        return self._moments[setting, steps]

    def _live(self, life: Life, announced: int, rng: random.Random) -> int:
        """A run from its start to its death, and what it left; the last step that is announced."""
        child = Child(self._nursery, life)
        child.go()
        if life.steps == FOR_EVER:
            time.sleep(rng.uniform(0, CLOCK_SECONDS))
            child.kill()
        words, killed = child.last_words()
        if killed or life.death is not None:
            place = CLOCK if life.death is None else life.death.place
            (self.tally.kills if killed else self.tally.outlived)[place] += 1
        announced = _announced(words, announced)
        opened = not life.setting.alone and killed and rng.random() < 0.5
        return self.check(life.root, life.setting, announced, opened=opened)

    def _race(self, root: Path, setting: Setting, announced: int, rng: random.Random) -> int:
        """Two want the root at once; one gets it, and when it was killed, the other does."""
        both = [Child(self._nursery, Life(root, setting, FOR_EVER)) for _ in range(2)]
        for child in both:
            child.go()
        first = [child.hear() for child in both]
        assert sorted(word for word, _ in first) == ["locked", "opened"], first
        at = next(at for at, (word, _) in enumerate(first) if word == "opened")
        winner, loser = both[at], both[1 - at]
        time.sleep(rng.uniform(0, CLOCK_SECONDS))
        winner.kill()
        words, _ = winner.last_words()
        announced = _announced([first[at], *words], announced)
        loser.go()
        opened = loser.hear()
        assert opened[0] == "opened", f"a killed holder still has the root: {opened}"
        time.sleep(rng.uniform(0, CLOCK_SECONDS))
        loser.kill()
        words, _ = loser.last_words()
        self.tally.kills[RACE] += 2
        self.tally.checks["races"] += 1
        return self.check(root, setting, _announced([opened, *words], announced), opened=False)

    def check(self, root: Path, setting: Setting, announced: int, *, opened: bool) -> int:
        """What is there is whole and not older than that; the newest step."""
        store = LocalStore(root)
        found = steps(store)
        newest = found[-1] if found else 0
        assert newest >= announced, f"step {announced} was announced, {newest} is the newest"
        self.tally.ahead[newest - announced] += 1
        for step in found:
            damage = verify_step(store, step, self._resources)
            assert not damage, (step, damage)
            version = version_of(gpuckpt.load(root, step))
            assert version == step, f"step {step} has the state of step {version}"
        self.tally.checks["checkpoints"] += len(found)
        self.tally.checks["read"] += 1
        return self._open(root, setting, newest) if opened else newest

    def _open(self, root: Path, setting: Setting, newest: int) -> int:
        """Resume and save; nothing is left over before, nor after."""
        state, store = state_at(0), LocalStore(root)
        with checkpointer(root, setting) as ckpt:
            assert left_over(store) == []
            assert ckpt.resume(state) == version_of(state) == newest
            set_to(state, newest + 1)
            ckpt.save(newest + 1, state)
        assert left_over(store) == []
        assert steps(store)[-1] == newest + 1
        assert setting.last is None or len(steps(store)) <= setting.last
        self.tally.checks["opened"] += 1
        return newest + 1


def _announced(words: Sequence[Said], before: int) -> int:
    """The last step that is known to be durable, after a child said these words."""
    for word, what in words:
        assert word != "failed", what
        if word == "opened":
            assert what == [], f"left over when a run was started again: {what}"
        if word == "resumed":
            assert what >= before, f"step {before} was announced, and {what} resumed"
        if word in {"resumed", "durable"}:
            before = what
    return before


def main(words: Sequence[str]) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser("python -m bench.durability kills", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="kills, at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--directory", type=Path, help="a directory on the disk to use")
    options = parser.parse_args(words)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        where = machine(Path(name))
        campaign = Campaign(Path(name), options.seed)
        campaign.in_turn()
        campaign.run(options.count)
    where["seconds"] = round(time.monotonic() - begun)
    report = {"machine": where, "seed": options.seed, **campaign.tally.report()}
    for fact, value in report.items():
        print(f"{fact}: {value}")
    if options.out:
        write_report(options.out, report)
    return 1 if campaign.tally.failures else 0
