"""What the ranks of a run do together: share out what they hold, and commit what each has written.

A save of several ranks:

1. Each rank writes its segments,   As when it is alone: nobody waits for anybody.
   durable, and its part.           The part lists them.  No manifest names it yet.
2. All gather: the parts, or why    A rank that failed, or is at another step, is named to all,
   there is none.                   and nothing is committed; each deletes what it wrote.
3. The lead of each root commits    One manifest names every part: it is there or it isn't
   the manifest; all hear of it.    (`concluding`).

A rank that doesn't hear how a gather has ended deletes nothing: others may go on
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
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gpuckpt import layout
from gpuckpt.concluding import Place, conclude
from gpuckpt.cutting import Reshard
from gpuckpt.entering import Site
from gpuckpt.errors import CheckpointError, RankError
from gpuckpt.gathering import UnheardError, gather
from gpuckpt.groups import Group
from gpuckpt.holdings import FIRST_ASKED, exchanged, holdings, pack_holdings, unpack_holdings
from gpuckpt.inventory import Inventory
from gpuckpt.manifest import Manifest, Part
from gpuckpt.parts import describe, shared_structure, world_manifest, write_part
from gpuckpt.retention import NOTHING, Held, Keep
from gpuckpt.seal import MANIFEST, Seal
from gpuckpt.sharing import Shares, check_fit, written_holdings
from gpuckpt.spans import Lap
from gpuckpt.stores import Store
from gpuckpt.structure import ConflictError, join
from gpuckpt.values import Json


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
    ) -> None:
        """`held` says what must not be deleted, though `keep` doesn't keep it.

        `reshard` is how shards are cut for other ranks.
        """
        self._reshard = reshard
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
        """What was committed last, without the rows of any rank."""

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
                gather(self.group, owed, error, self._timeout)

    def commit(
        self, manifest: Manifest, token: str, abandon: Callable[[], object], lap: Lap
    ) -> Manifest:
        """Commit what all have written; `manifest` is of this rank's rows, which are durable.

        On return it is durable.  The manifest of all, with the rows of this
        rank.  If it fails, `abandon` deletes the segments, unless a manifest
        may name them.  `lap` gets the seconds of the waits for others as `ranks`.

        Raises:
            RankError: another rank failed, stalled or disagrees; it is named.
            StorageError: the storage refused.
        """
        own = replace(manifest, ranks=self.group.size, rank=self.group.rank)
        name = layout.part_name(own.step, token, self.group.rank)

        def undo() -> None:
            with contextlib.suppress(CheckpointError):
                self._store.remove(name)
            abandon()

        try:
            part = write_part(self._store, name, own, self._seal)
            lap.mark("manifest")
            world = self._world(own, part)
        except UnheardError:
            # The others may have heard, and commit.  In its root none can without the lead.
            if self.site.is_lead:
                undo()
            raise
        except BaseException:
            undo()
            raise
        lap.mark("ranks")
        place = Place(
            *(self.group, self.site, self._store, self._keep, self._held_back),
            seal=self._seal,
            timeout=self._timeout,
        )
        if not conclude(place, world, undo, lap):
            self._stale = True  # others may have failed
        self.world = world
        return replace(own, parts=world.parts, listed=world.listed)

    def _world(self, own: Manifest, part: Part) -> Manifest:
        """The manifest of all, if all have written their parts and they fit each other."""
        shared = shared_structure(own)
        text = json.dumps(shared)
        answer = {
            "part": [part.name, part.nbytes, part.check, part.raw_nbytes, part.encoded_nbytes],
            "segments": part.segments,
            "held": self._held,
            "damaged": self.damaged,
            "structure": _hash(text.encode()),
            "samples": self._samples(own),
            "key": None if self._seal is None else _hash(self._seal.sealed(b"{}", MANIFEST)),
            "header": [own.epoch, own.metrics, own.created, own.writer],
        }
        self._owed = None
        told = gather(self.group, _parts_of(own.step), answer, self._timeout)
        self.anew = self.anew or any(one["damaged"] for one in told)
        self.damaged = False
        odd = [rank for rank, one in enumerate(told) if one["key"] != told[0]["key"]]
        if odd:
            raise RankError([0, *odd], "they seal with different keys; give all the same key=")
        alike = len({one["structure"] for one in told}) == 1
        if not alike:
            self._compare(own.step, shared)
        _check_samples([one["samples"] for one in told])
        assert self._shares is not None
        if [one["held"] for one in told] != list(self._shares.digests):
            self._stale = True
            self._see_that_all_fits(own)
        epoch, metrics, created, writer = told[0]["header"]
        header = replace(own, epoch=epoch, metrics=metrics, created=created, writer=writer)
        return world_manifest([_part(one) for one in told], replace(header, alike=alike))

    def _samples(self, own: Manifest) -> dict[str, list[str]]:
        """The fingerprints of what every replica has written."""
        labels = self._shares.samples if self._shares is not None else frozenset()
        return {
            entry.spec.label: [chunk.fingerprint for chunk in entry.chunks]
            for entry in own.tensors
            if entry.spec.label in labels
        }

    def _compare(self, step: int, shared: Json) -> None:
        """See that the ranks' structures fit together, though they aren't equal."""
        told = gather(self.group, f"structures of step {step}", shared, self._timeout)
        whole = told[0]
        for rank, one in enumerate(told[1:], 1):
            try:
                whole = join(whole, one)
            except ConflictError as error:
                raise RankError(
                    [0, rank],
                    f"{describe(error)}; give it the same value on every rank, or wrap what is "
                    "each rank's own in gpuckpt.PerRank",
                ) from None

    def _see_that_all_fits(self, own: Manifest) -> None:
        """See that no bytes are missing, though ranks don't hold what they have shared out."""
        rows = pack_holdings(written_holdings(own.tensors))
        told = gather(self.group, f"rows of step {own.step}", rows, self._timeout)
        check_fit([unpack_holdings(one) for one in told])


def _check_samples(told: Sequence[dict[str, list[str]]]) -> None:
    """See that replicas are replicas.

    Raises:
        RankError: two ranks have different bytes in what should be one tensor.
    """
    first: dict[str, int] = {}
    for rank, samples in enumerate(told):
        for label, found in samples.items():
            known = first.setdefault(label, rank)
            if told[known][label] != found:
                raise RankError(
                    [known, rank],
                    f"{label} isn't the same on both, so they are no replicas: bring them "
                    "together before they are saved (an all-reduce that was left out?), or wrap "
                    "what is each rank's own in gpuckpt.PerRank",
                )


def _part(answer: Any) -> Part:
    name, nbytes, check, raw_nbytes, encoded_nbytes = answer["part"]
    return Part(name, nbytes, check, raw_nbytes, encoded_nbytes, tuple(answer["segments"]))


def _hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:32]


def _holdings_of(step: int) -> str:
    return f"{FIRST_ASKED} at step {step}"


def _parts_of(step: int) -> str:
    return f"the parts of step {step}"
