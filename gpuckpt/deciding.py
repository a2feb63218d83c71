"""The end of a save whose ranks have one root: rank 0 hears of all parts, commits, and tells all.

That is one round of the group, whatever the number of ranks.  Only if ranks hold
other things than they told each other are there more, before it commits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from gpuckpt.answers import check_answers, unsure_of, world_of
from gpuckpt.concluding import Place, commit_here, prune_here
from gpuckpt.errors import RankError
from gpuckpt.gathering import Decision, UnheardError, decided
from gpuckpt.manifest import Manifest
from gpuckpt.spans import Lap
from gpuckpt.values import Json


class OneRoot:
    """The end of one save, from the side of one rank; `own` is the manifest of its part.

    `held` are the digests of what the ranks told that they hold; `lap` gets
    waits as `ranks`, and rank 0's commit as `manifest`.
    """

    def __init__(self, place: Place, own: Manifest, held: Sequence[str], lap: Lap) -> None:
        self._place, self._own, self._held, self._lap = place, own, held, lap
        self._answers: list[Any] = []
        self.may_be_there = False
        """On rank 0: whether a manifest may name what was written."""
        self.failure: BaseException | None = None
        """On rank 0: why it didn't commit."""
        self.world: Manifest | None = None
        """On rank 0: the manifest of all, which is committed."""
        self.seen: Collection[str] | None = None
        """On rank 0: the files that were there while nobody wrote any."""

    def decide(self, what: str, answer: Json, tell: Callable[[list[str]], object]) -> Decision:
        """What rank 0 decides by what all answer: `nbytes` of the checkpoint, or what is `wrong`.

        That is with the `ranks` it is about, and whether all that they wrote may be
        deleted (`gone`).  With `tell` this rank and the others tell each other
        what is unsure (`answers.unsure_of`), and see that it fits.

        Raises:
            UnheardError: some ranks said nothing; on rank 0, nothing was committed.
            RankError: some ranks said what went wrong; nothing was committed.
        """
        decision = self._ask(what, answer, self._choose)
        anew, unsure = decision.value["anew"], decision.value.get("unsure", [])
        if unsure:
            try:
                tell(unsure)
            except UnheardError as error:  # rank 0 decides nothing without this rank
                raise RankError(error.ranks, error.reason) from error
            what = f"commit of step {self._own.step}"
            decision = self._ask(what, None, lambda _: self._commit())
        decision.value["anew"] = anew
        return decision

    def _ask(self, what: str, answer: Json, choose: Callable[[list[Any]], Json]) -> Decision:
        place = self._place
        try:
            return decided(place.group, what, answer, choose, place.timeout)
        finally:
            self._lap.mark("ranks")

    def _choose(self, answers: list[Any]) -> Json:
        """Commit, if all answered what makes a checkpoint; on rank 0."""
        self._answers = answers
        anew = any(one["damaged"] for one in answers)
        try:
            check_answers(answers)
        except RankError as error:
            return self._wrong(error, gone=True) | {"anew": anew}
        if unsure := unsure_of(answers, self._held):
            return {"unsure": unsure, "anew": anew}
        return self._commit() | {"anew": anew}

    def _commit(self) -> dict[str, Json]:
        self._lap.mark("ranks")

        def abandon() -> None:
            self.may_be_there = False

        try:
            world = world_of(self._own, self._answers)
            self.may_be_there = True
            seen = commit_here(self._place, world, abandon)
        except BaseException as error:  # an interrupt, too: the others must hear what is there
            return self._wrong(error, gone=not self.may_be_there)
        self.world = world
        if self._place.prompt:
            prune_here(self._place, world)
        else:
            self.seen = seen
        self._lap.mark("manifest")
        return {"nbytes": [world.raw_nbytes, world.encoded_nbytes]}

    def _wrong(self, error: BaseException, *, gone: bool) -> dict[str, Json]:
        self.failure = error
        ranks, reason = [0], f"{type(error).__name__}: {error}"
        if isinstance(error, RankError):
            ranks, reason = list(error.ranks), error.reason
        return {"wrong": reason, "ranks": ranks, "gone": gone}
