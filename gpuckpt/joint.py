"""What the ranks of a run do together: share out what they hold, and commit what each has written.

A save of several ranks:

1. Each rank writes its segments,   As when it is alone: nobody waits for anybody.
   durable, and its part.           The part lists them.  No manifest names it yet.
2. Rank 0 hears of all parts, or    A rank that failed, or is at another step, is named to all,
   why there is none, and commits   and nothing is committed; each deletes what it wrote.
   a manifest that names them all.  It is there or it isn't.
3. All hear what rank 0 did.        One round for 2 and 3.
4. Rank 0 deletes what needn't be   The others wait for nothing more.
   kept.

Where machines have roots of their own, each has a lead that commits there, and
all hear of all parts, and of all leads' commits (`concluding`).

A rank that doesn't hear how a round has ended deletes nothing: others may go on
to commit what it wrote.  What no manifest names in the end, the lead sweeps away.

What several ranks hold alike is written by one of them (`sharing`).  They tell
each other what they hold at the first save, and again at the next one whenever
a rank's holdings had changed at a commit, or a save has failed; meanwhile a rank
writes what is new to the others whole, and a checkpoint may hold it several
times.  Before such a commit all see that what was written fits together, and
that nothing is missing: one rank may have left to another what that one has no more.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial

from gpuckpt import layout
from gpuckpt.answers import (
    ROWS,
    STRUCTURES,
    answer_of,
    check_answers,
    check_structures,
    unsure_of,
    world_of,
)
from gpuckpt.concluding import Place, conclude, maybe_there, prune_here
from gpuckpt.cutting import Reshard
from gpuckpt.deciding import OneRoot
from gpuckpt.entering import Site
from gpuckpt.errors import CheckpointError, RankError
from gpuckpt.gathering import UnheardError, decided, gather
from gpuckpt.groups import Group
from gpuckpt.holdings import FIRST_ASKED, exchanged, holdings, pack_holdings, unpack_holdings
from gpuckpt.inventory import Inventory
from gpuckpt.manifest import Manifest
from gpuckpt.parts import shared_structure, write_part
from gpuckpt.retention import NOTHING, Held, Keep
from gpuckpt.seal import Seal
from gpuckpt.sharing import Shares, check_fit, written_holdings
from gpuckpt.spans import Lap
from gpuckpt.stores import Store
from gpuckpt.values import Json

log = logging.getLogger("gpuckpt")


class Joint:
    """Saves of all ranks, from the side of one of them.

    `site` says who commits, and deletes, for all whose root is the same place.
    """

    def __init__(
        self,
        group: Group,
        store: Store,
        *,
        keep: Keep | None,
        seal: Seal | None,
        held: Callable[[], Held] = lambda: NOTHING,
        timeout: float,
        reshard: Reshard = "any",
        prompt: bool = False,
    ) -> None:
        """`held` says what must not be deleted, though `keep` doesn't keep it.

        `reshard` is how shards are cut for other ranks.  With `prompt`, what
        needn't be kept is deleted before any rank hears of a commit.
        """
        self._reshard, self._prompt = reshard, prompt
        self._held_back = held
        self.group, self.site = group, Site((0,) * group.size, group.rank)
        self._store, self._keep, self._seal, self._timeout = store, keep, seal, timeout
        self._shares: Shares | None = None
        self._stale = True  # the ranks are to tell each other what they hold
        self._held = ""
        self._owed: str | None = None  # where the others wait for this rank
        self.damaged = self.anew = False
        """Whether a tier found files damaged, and whether any rank's did: all write anew then."""
        self.world: Manifest | None = None
        """What was committed last, without the rows of any rank; with one root on rank 0 alone."""
        self._seen: Collection[str] | None = None  # what was there then, if it is to be tidied

    def share(self, inventory: Inventory, step: int) -> Inventory:
        """What this rank writes of what it holds; waits for the others if they are to tell.

        Raises:
            RankError: they don't hold shards of the same tensors, or not all of one.
        """
        if self._stale or self._shares is None:
            held = holdings(inventory.roster)
            self._owed = None
            told = exchanged(self.group.rank, held, partial(self._tell, step))
            self._owed = _parts_of(step)
            self._shares = Shares.of(self.group.rank, *told, self.site.leads, self._reshard)
            self._stale = False
        self._owed = _parts_of(step)
        self._held = self._shares.digest(inventory.roster)
        return self._shares.apply(inventory)

    def _tell(self, step: int, what: str, own: str) -> list[str]:
        return gather(self.group, f"{what} at step {step}", own, self._timeout)

    @contextlib.contextmanager
    def telling(self, step: int) -> Iterator[None]:
        """If the block fails, tell the others, who wait for this rank's part of a step.

        Blocks until they come.
        """
        if self._owed is None:
            self._owed = _holdings_of(step) if self._stale else _parts_of(step)
        try:
            yield
        except BaseException as error:
            # All have failed, or will: they tell each other anew what they hold.
            self._stale = True
            self.tell(error)
            raise

    def tell(self, error: BaseException) -> None:
        """Tell the others of an error, if they wait for this rank; blocks until they come."""
        owed, self._owed = self._owed, None
        if owed is not None:
            self._stale = True
            with contextlib.suppress(RankError, type(error)):
                if self.site.is_one and owed.startswith(_PARTS):
                    decided(self.group, owed, error, lambda _: None, self._timeout)
                else:
                    gather(self.group, owed, error, self._timeout)

    def commit(
        self, manifest: Manifest, token: str, abandon: Callable[[], object], lap: Lap
    ) -> Manifest:
        """Commit what all have written; `manifest` is of this rank's rows, which are durable.

        On return it is durable.  The manifest of this rank's rows, with how many
        bytes all have; if machines have roots of their own, with all parts.  If
        it fails, `abandon` deletes the segments, unless a manifest may name them.
        `lap` gets the seconds of the waits for others as `ranks`.

        Raises:
            RankError: another rank failed, stalled or disagrees; it is named.
            StorageError: the storage refused.
        """
        own = replace(manifest, ranks=self.group.size, rank=self.group.rank)
        name = layout.part_name(own.step, token, self.group.rank)
        self.world = self._seen = None

        def undo() -> None:
            with contextlib.suppress(CheckpointError):
                self._store.remove(name)
            abandon()

        try:
            part = write_part(self._store, name, own, self._seal)
            lap.mark("manifest")
            answer = answer_of(
                *(own, part),
                held=self._held,
                damaged=self.damaged,
                sampled=self._shares.samples if self._shares is not None else (),
                seal=self._seal,
            )
        except BaseException:
            undo()
            raise
        self._owed = None
        end = self._through_rank_0 if self.site.is_one else self._by_leads
        return end(own, answer, undo, lap)

    def tidy(self) -> None:
        """Delete what the last commit leaves nobody in need of, if this rank is to."""
        seen, self._seen = self._seen, None
        if seen is not None and self.world is not None:
            prune_here(self._place, self.world, among=seen)

    @contextlib.contextmanager
    def _asking(self, undo: Callable[[], object]) -> Iterator[None]:
        """If the block fails, undo what was written, unless others may have heard, and commit."""
        try:
            yield
        except BaseException as error:
            heard = isinstance(error, RankError) and not isinstance(error, UnheardError)
            if heard or self.site.is_lead:  # in its root none can without it
                undo()
            raise

    def _through_rank_0(
        self, own: Manifest, answer: Json, undo: Callable[[], object], lap: Lap
    ) -> Manifest:
        """Have rank 0 commit; in a root that all share."""
        assert self._shares is not None
        end = OneRoot(self._place, own, self._shares.digests, lap)
        try:
            with self._asking(lambda: None if end.may_be_there else undo()):
                more = partial(self._tell_more, own)
                verdict, is_heard = end.decide(_parts_of(own.step), answer, more)
        except UnheardError as error:
            if self.site.is_lead:
                raise
            raise maybe_there(error, own.step) from error
        self.anew, self.damaged = self.anew or verdict["anew"], False
        if "wrong" in verdict:
            if verdict["gone"]:
                undo()
            raise end.failure or RankError(verdict["ranks"], verdict["wrong"])
        if not is_heard:
            self._stale = True  # others may have failed
            log.warning("step %d is committed, but not all ranks have heard", own.step)
        self.world, self._seen = end.world, end.seen
        return replace(own, all_nbytes=tuple(verdict["nbytes"]))

    def _by_leads(
        self, own: Manifest, answer: Json, undo: Callable[[], object], lap: Lap
    ) -> Manifest:
        """Have the lead of each root commit, where machines have roots of their own."""
        with self._asking(undo):
            world = self._world(own, answer)
        lap.mark("ranks")
        conclude(self._place, world, undo, lap)
        self.world = world
        return replace(own, parts=world.parts, listed=world.listed)

    def _world(self, own: Manifest, answer: Json) -> Manifest:
        """The manifest of all, if all have written their parts and they fit each other."""
        assert self._shares is not None
        told = gather(self.group, _parts_of(own.step), answer, self._timeout)
        self.anew = self.anew or any(one["damaged"] for one in told)
        self.damaged = False
        check_answers(told)
        self._tell_more(own, unsure_of(told, self._shares.digests))
        return world_of(own, told)

    def _tell_more(self, own: Manifest, unsure: Sequence[str]) -> None:
        """Tell the others what is unsure, and see that it fits what they tell."""
        if STRUCTURES in unsure:
            what = f"structures of step {own.step}"
            check_structures(gather(self.group, what, shared_structure(own), self._timeout))
        if ROWS in unsure:
            self._stale = True
            rows = pack_holdings(written_holdings(own.tensors))
            told = gather(self.group, f"rows of step {own.step}", rows, self._timeout)
            check_fit([unpack_holdings(one) for one in told])

    @property
    def _place(self) -> Place:
        return Place(
            *(self.group, self.site, self._store, self._keep, self._held_back),
            seal=self._seal,
            timeout=self._timeout,
            prompt=self._prompt,
        )


_PARTS = "the parts of step "


def _holdings_of(step: int) -> str:
    return f"{FIRST_ASKED} at step {step}"


def _parts_of(step: int) -> str:
    return f"{_PARTS}{step}"
