"""In rotation: every round runs each peer once, beginning with another one than the last.

The machine drifts, so only what ran in one round is compared.  A row during
which others used much of the machine is run again; the quietest run counts,
and says so if it wasn't quiet either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.peers.limits import LIMITS


@dataclass(frozen=True, slots=True)
class Task:
    """What one process measures; `loop` is empty if nothing runs beside."""

    workload: str
    peer: str
    loop: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Its figures, or why there are none."""

    figures: dict[str, Any] = field(default_factory=dict)
    failure: str = ""

    @property
    def others_share(self) -> float:
        """Of the machine's CPU time, what others used meanwhile."""
        return float(self.figures.get("others_share", 0.0))


Runner = Callable[[Task], Outcome]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rounds over all tasks; a run is quiet if others used at most `quiet_share` of the machine."""

    tasks: Sequence[Task]
    rounds: int
    quiet_share: float = 0.15
    repeats: int = 2

    def rows(self, run: Runner) -> Iterator[Row]:
        """One row a task and round, as they end.  What has failed isn't tried again."""
        failed: set[Task] = set()
        for at in range(self.rounds):
            for task in rotated(self.tasks, at):
                if task not in failed:
                    row = self._row(run, task) | {"round": at}
                    yield row
                    if row["failure"]:
                        failed.add(task)

    def _row(self, run: Runner, task: Task) -> Row:
        runs = [run(task)]
        while self._again(runs):
            runs.append(run(task))
        best = min((one for one in runs if not one.failure), key=_share, default=runs[-1])
        return {
            **asdict(task),
            "runs": len(runs),
            "quiet": best.others_share <= self.quiet_share,
            "failure": best.failure,
            "figures": best.figures,
        }

    def _again(self, runs: Sequence[Outcome]) -> bool:
        last = runs[-1]
        loud = last.others_share > self.quiet_share
        return loud and not last.failure and len(runs) <= self.repeats


def rotated(tasks: Sequence[Task], at: int) -> list[Task]:
    """The limits first, then the peers, each round beginning with the next third of them."""
    limits = [task for task in tasks if task.peer == LIMITS]
    peers = [task for task in tasks if task.peer != LIMITS]
    cut = at * max(1, len(peers) // 3) % len(peers) if peers else 0
    return limits + peers[cut:] + peers[:cut]


def _share(outcome: Outcome) -> float:
    return outcome.others_share
