"""`python -m bench.durability ranks [--count N] [--seed N] [--out FILE]`: kill one of four ranks.

Real processes save together, every step, to one root; one of them, each in its
turn, kills itself by SIGKILL at a random one of the calls and returns that are
made in some place (`deaths.py` has them).  The others have to say who is
missing, or to have saved.  Then a reader checks every byte of every checkpoint,
and the next four go on from what is left: all from the same step, with nothing
left over.  Exits with 1 if anything was lost, damaged or left over.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gpuckpt
from bench.durability.deaths import Death
from bench.durability.processes import Child, nursery
from bench.durability.rank import RANK_PLACES, ROWS, RankLife, live
from bench.durability.tally import Tally
from bench.machine import machine
from bench.timing import write_report
from gpuckpt.commit import steps
from gpuckpt.resources import Resources
from gpuckpt.stores.local import LocalStore
from gpuckpt.verify import verify_step
from tests.versions import CHUNK, version_of

SIZE = 4
STEPS = 2  # of a run, in which a rank dies
CHAIN = 10  # kills of one root
CODECS = ("raw", "auto", "delta")

Told = Sequence[tuple[list[tuple[str, Any]], bool]]


class Campaign:
    """Kills, one after the other."""

    def __init__(self, directory: Path, seed: int, size: int = SIZE) -> None:
        self._directory, self._seed, self._size = directory, seed, size
        self._nursery = nursery()
        self._resources = Resources("4 MiB", chunk_nbytes=CHUNK)
        self._moments: dict[str, list[dict[str, int]]] = {}
        self.tally = Tally()

    def run(self, count: int, note: Callable[[], object] = lambda: None) -> None:
        """Kill at least so many; give up after ten failures.  `note` is called now and then."""
        number = 0
        while self.tally.kills.total() < count and len(self.tally.failures) < 10:
            rng = random.Random(f"{self._seed} {number}")
            root = self._directory / f"root {number}"
            try:
                self._chain(root, CODECS[number % len(CODECS)], rng, number)
            except (AssertionError, gpuckpt.CheckpointError) as error:
                self.tally.failures.append(f"{root.name}, seed {self._seed}: {error!r}")
            else:
                shutil.rmtree(root)
            number += 1
            note()

    def moments(self, codec: str) -> list[dict[str, int]]:
        """How many there are in each place, by rank, in a run that goes on and isn't killed."""
        if codec not in self._moments:
            root = self._directory / f"counted {codec}"
            self._live(root, codec, STEPS)
            told = self._live(root, codec, STEPS, counts=True)
            while any(words[-2][0] != "durable" for words, _ in told):  # the machine was too busy
                told = self._live(root, codec, STEPS, counts=True)
            shutil.rmtree(root)
            self._moments[codec] = [words[-1][1] for words, _ in told]
        return self._moments[codec]

    def _chain(self, root: Path, codec: str, rng: random.Random, number: int) -> None:
        """Runs of which each loses a rank, and the next goes on; the last is let live."""
        announced = 0
        for at in range(CHAIN):
            dying = (number * CHAIN + at) % self._size
            moments = self.moments(codec)[dying]
            place = rng.choice([place for place in RANK_PLACES if moments[place]])
            death = Death(place, rng.randint(1, moments[place]))
            told = self._live(root, codec, STEPS, dying, death)
            announced = self._check(root, told, announced, dying, death)
        told = self._live(root, codec, 1)
        self._check(root, told, announced)
        ends = {words[-2] for words, _ in told}
        assert len(ends) == 1, f"nobody was killed, and they ended with {ends}"
        self.tally.checks["went on to the end"] += 1

    def _live(
        self,
        root: Path,
        codec: str,
        count: int,
        dying: int | None = None,
        death: Death | None = None,
        *,
        counts: bool = False,
    ) -> Told:
        """Processes from their start to their ends: what each said, and whether it was killed."""
        children = []
        for rank in range(self._size):
            own = death if rank == dying else None
            board = root.with_name(f"{root.name} board")
            life = RankLife(root, board, rank, self._size, codec, count, own, counts)
            children.append(Child(self._nursery, life, live))
        for child in children:
            child.go()
        return [child.last_words() for child in children]

    def _check(
        self,
        root: Path,
        told: Told,
        announced: int,
        dying: int | None = None,
        death: Death | None = None,
    ) -> int:
        """What the ranks said, and what is there; the last step that is known to be durable."""
        killed = [rank for rank, (_, was) in enumerate(told) if was]
        assert killed in ([], [dying]), (killed, death)
        if death is not None:
            (self.tally.kills if killed else self.tally.outlived)[death.place] += 1
        resumed = {what for words, _ in told for word, what in words if word == "resumed"}
        assert len(resumed) <= 1, f"ranks resumed from {resumed}"
        assert min(resumed, default=announced) >= announced, (resumed, announced)
        announced = max({announced, *resumed})
        for rank, (words, _) in enumerate(told):
            for word, what in words:
                assert word != "failed", (rank, what)
                assert word != "left" or what == [], f"left over: {what}"
                if word == "missed":
                    self._blame(rank, what, killed)
                if word == "durable":
                    announced = max(announced, what)
        self._read(root, announced)
        return announced

    def _blame(self, rank: int, what: list[Any], killed: list[int]) -> None:
        """Whoever is missed is dead; on a busy machine one may have been only too late."""
        ranks, text = what
        named = bool(killed) and set(killed) <= set(ranks)
        self.tally.checks["named" if named else "others named"] += 1
        if not named:
            self.tally.others.append(f"rank {rank}, {killed} killed: {text}")

    def _read(self, root: Path, announced: int) -> None:
        store = LocalStore(root)
        found = steps(store) if root.exists() else []
        newest = max(found, default=0)
        assert newest >= announced, f"step {announced} was announced, {newest} is the newest"
        self.tally.ahead[newest - announced] += 1
        for step in found:
            damage = verify_step(store, step, self._resources)
            assert not damage, (step, damage)
            state = gpuckpt.load(root, step)
            assert version_of(state) == step, step
            rows = np.arange(ROWS, dtype=np.float32)[:, None] + np.full((1, 64), step, np.float32)
            assert state["table"].tobytes() == rows.tobytes(), step
        self.tally.checks["checkpoints"] += len(found)


def main(words: Sequence[str]) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser("python -m bench.durability ranks", description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="kills, at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--directory", type=Path, help="a directory on the disk to use")
    options = parser.parse_args(words)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        where = machine(Path(name))
        campaign = Campaign(Path(name), options.seed)

        def report() -> dict[str, Any]:
            where["seconds"] = round(time.monotonic() - begun)
            found = {"machine": where, "seed": options.seed, **campaign.tally.report()}
            if options.out:
                write_report(options.out, found)
            return found

        campaign.run(options.count, report)
    for fact, value in report().items():
        print(f"{fact}: {value}")
    return 1 if campaign.tally.failures else 0
