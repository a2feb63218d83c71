"""Machines with roots of their own bring one step up to a tier that they share.

No machine has all files of a step, and one alone has the tier's lock: that of rank 0.

1. It calls the step up, by an     Else machines that are fast and slow would bring up
   empty file in the tier.         different steps, and none would ever be whole there.
2. Every machine, this one too,    What is there before isn't copied again; nothing names it yet.
   copies its files; durable, with
   their names.
3. Each says so, by an empty file. Only now is nothing of it left to be written or synced.
4. Rank 0 sees that all is there,  The manifest must never name a file that isn't there.
   and commits.
5. It takes its call back, and     Nobody writes: the others do so only while there is a call
   prunes.                         that they haven't answered.

Whoever is cut off before the fourth has made nothing visible.  What it left is swept
when the tier is taken anew, or with the next step, calls and answers too.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from gpuckpt import layout
from gpuckpt.commit import commit
from gpuckpt.errors import CheckpointError
from gpuckpt.manifest import Manifest
from gpuckpt.seal import Seal
from gpuckpt.shipping import copy_files
from gpuckpt.stores import Store, write_all
from gpuckpt.tierstats import TierStats

log = logging.getLogger("gpuckpt")

# How soon the tier is looked at again: first, and twice as late each time, up to the second.
LOOKS_SECONDS = (0.02, 1.0)
# After so long, who is waited for is told of.
LATE_SECONDS = 60.0


class LackingError(CheckpointError):
    """Files of a step are on none of the machines: it can't go up."""


@dataclass(frozen=True, slots=True)
class Call:
    """A step that is to go up: `run` is the word of those who are called, `check` of its files."""

    run: str
    step: int
    check: str

    @classmethod
    def of(cls, run: str, manifest: Manifest) -> Call:
        """That of a manifest: no other has the same files."""
        text = "\n".join(sorted(manifest.files))
        return cls(run, manifest.step, hashlib.sha256(text.encode()).hexdigest()[:8])

    @classmethod
    def found(cls, names: Collection[str], run: str, rank: int) -> Call | None:
        """The one among a tier's files that a rank hasn't answered."""
        for name in names:
            if (said := layout.called(name, run)) is not None:
                call = cls(run, *said)
                if not any(call.answer(rank, here=here) in names for here in (True, False)):
                    return call
        return None

    @property
    def name(self) -> str:
        """Its file."""
        return layout.call_name(self.run, self.step, self.check)

    def answer(self, rank: int, *, here: bool) -> str:
        """The file by which a rank says that its machine's files are there, or won't be."""
        return layout.answer_name(self.name, rank, here=here)


class Convoy:
    """The others, from the side of rank 0; for one tier, whose lock is held."""

    def __init__(self, run: str, others: Sequence[int]) -> None:
        """`others` are the leads of the other machines' roots."""
        self._run, self._others = run, tuple(others)

    @contextlib.contextmanager
    def led(self, tier: Store) -> Iterator[None]:
        """Until the end of the block the others wait for calls; then nothing is left of any."""
        write_all(tier, layout.up_name(self._run), b"")
        try:
            yield
        finally:
            _clear(tier, layout.up_name(self._run))

    def copy_step(
        self,
        source: Store,
        target: Store,
        manifest: Manifest,
        known: set[str],
        stats: TierStats,
        *,
        check: Callable[[], object],
        seal: Seal | None = None,
    ) -> None:
        """As `shipping.copy_step`, together with the others; waits for them.

        Raises:
            LackingError: not all of its files can be had.
        """
        call = Call.of(self._run, manifest)
        _remove(target, f"{layout.up_name(self._run)}-")  # what a call before may have left
        try:
            write_all(target, call.name, b"")
            copy_files(
                *(source, target, manifest, known, stats),
                check=check,
                seal=seal,
                present=set(source.names()),
            )
            self._wait(target, call, check)
            _see(target, manifest)
            check()
            commit(target, manifest, abandon=lambda: None, seal=seal)
            stats.files += 1
        finally:
            _clear(target, call.name)

    def _wait(self, target: Store, call: Call, check: Callable[[], object]) -> None:
        """Wait until every machine has brought its files."""
        pause, most = LOOKS_SECONDS
        begun, told = time.monotonic(), False
        while True:
            check()
            names = set(target.names())
            if any(call.answer(rank, here=False) in names for rank in self._others):
                refused = [r for r in self._others if call.answer(r, here=False) in names]
                raise LackingError(
                    f"the machine of rank {refused[0]} doesn't have its files of step {call.step}, "
                    "or they are damaged"
                )
            late = [r for r in self._others if call.answer(r, here=True) not in names]
            if not late:
                return
            if time.monotonic() - begun > LATE_SECONDS and not told:
                told = True
                log.warning(
                    "step %d isn't in %s yet: the machines of ranks %s are still to bring their "
                    "files; see whether they are alive, and have this same place as their tier",
                    *(call.step, target.root, late),
                )
            time.sleep(pause)
            pause = min(pause * 2, most)


def _see(target: Store, manifest: Manifest) -> None:
    """See that all is there that a manifest names."""
    lost = sorted(set(manifest.files) - set(target.names()))
    if lost:
        raise LackingError(f"{lost[0]} is on no machine that is here")


def _clear(tier: Store, beginning: str) -> None:
    """Delete a call, or all of a run, with what was answered; what stays says nothing new."""
    with contextlib.suppress(CheckpointError):
        _remove(tier, beginning)


def _remove(tier: Store, beginning: str) -> None:
    for name in tier.names():  # sorted: the call goes before its answers
        if name.startswith(beginning) and layout.is_marker(name):
            tier.remove(name)
