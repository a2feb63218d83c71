"""What the ranks of a run do together: share out what they hold, and commit what each has written.

A save of several ranks:

1. Each rank writes its segments,   As when it is alone: nobody waits for anybody.
   durable, and its part.           The part lists them.  No manifest names it yet.
2. All gather: the parts, or why    A rank that failed, or is at another step, is named to all,
   there is none.                   and nothing is committed; each deletes what it wrote.
3. The lead of each root commits    One manifest names every part: it is there or it isn't.
   the manifest, and deletes what   While the others wait: none of them is writing what no
   needn't be kept.                 manifest names.
4. All gather: whether it did.      Only now may `commit` return: returning promises durability.

What several ranks hold alike is written by one of them (`sharing`).  They tell
each other what they hold at the first save, and again at the next one whenever
a rank's holdings had changed at a commit; meanwhile it writes what is new to
the others whole, and a checkpoint may hold it several times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gpuckpt import layout
from gpuckpt.commit import commit, open_step
from gpuckpt.errors import CheckpointError, RankError
from gpuckpt.gathering import gather
from gpuckpt.groups import Group
from gpuckpt.holdings import exchanged, holdings
from gpuckpt.inventory import Inventory
from gpuckpt.manifest import Manifest, Part
from gpuckpt.parts import describe, shared_structure, world_manifest, write_part
from gpuckpt.retention import Keep, prune_quietly
from gpuckpt.seal import Seal
from gpuckpt.sharing import Shares
from gpuckpt.stores import Store
from gpuckpt.structure import ConflictError, join
from gpuckpt.values import Json

log = logging.getLogger("gpuckpt")


class Joint:
    """Saves of all ranks, from the side of one of them.

    `lead` says whether this rank commits, and deletes, for all whose root is
    the same place.
    """

    def __init__(
        self,
        group: Group,
        store: Store,
        *,
        keep: Keep | None,
        seal: Seal | None,
        timeout: float,
    ) -> None:
        self.group, self.lead = group, group.rank == 0
        self._store, self._keep, self._seal, self._timeout = store, keep, seal, timeout
        self._shares: Shares | None = None
        self._stale = True  # the ranks are to tell each other what they hold
        self._held = ""
        self._awaited: str | None = None  # where the others wait for this rank

    def share(self, inventory: Inventory, step: int) -> Inventory:
        """What this rank writes of what it holds; waits for the others if they are to tell.

        Raises:
            RankError: they don't hold shards of the same tensors, or not all of one.
        """
        self._awaited = _parts_of(step)
        if self._stale or self._shares is None:
            held = holdings(inventory.roster)
            self._awaited = None
            told = exchanged(self.group.rank, held, partial(self._tell, step))
            self._shares = Shares(self.group.rank, *told)
            self._stale = False
            self._awaited = _parts_of(step)
        self._held = self._shares.digest(inventory.roster)
        return self._shares.apply(inventory)

    def _tell(self, step: int, what: str, own: str) -> list[str]:
        return gather(self.group, f"{what} at step {step}", own, self._timeout)

    @contextlib.contextmanager
    def telling(self, step: int) -> Iterator[None]:
        """If the block fails, tell the others, who wait for this rank's part of a step.

        Blocks until they come.
        """
        if self._awaited is None:
            self._awaited = _holdings_of(step) if self._stale else _parts_of(step)
        try:
            yield
        except Exception as error:
            awaited, self._awaited = self._awaited, None
            if awaited is not None:
                with contextlib.suppress(RankError, type(error)):
                    gather(self.group, awaited, error, self._timeout)
            raise

    def commit(self, manifest: Manifest, token: str, abandon: Callable[[], object]) -> Manifest:
        """Commit what all have written; `manifest` is of this rank's rows, which are durable.

        On return it is durable.  The manifest of all, with the rows of this
        rank.  If it fails, `abandon` deletes the segments, unless a manifest
        may name them.

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
        except BaseException:
            undo()
            raise
        try:
            world = self._world(own, part)
        except BaseException:
            undo()
            raise
        self._conclude(world, undo)
        return replace(own, parts=world.parts, listed=world.listed)

    def _world(self, own: Manifest, part: Part) -> Manifest:
        """The manifest of all, if all have written their parts and they fit each other."""
        shared = shared_structure(own)
        text = json.dumps(shared)
        answer = {
            "part": [part.name, part.nbytes, part.check, part.raw_nbytes, part.encoded_nbytes],
            "segments": part.segments,
            "held": self._held,
            "structure": hashlib.sha256(text.encode()).hexdigest()[:32],
            "header": [own.epoch, own.metrics, own.created, own.writer],
        }
        self._awaited = None
        told = gather(self.group, _parts_of(own.step), answer, self._timeout)
        alike = len({one["structure"] for one in told}) == 1
        if not alike:
            self._compare(own.step, shared)
        assert self._shares is not None
        self._stale = [one["held"] for one in told] != list(self._shares.digests)
        parts = [_part(one) for one in told]
        epoch, metrics, created, writer = told[0]["header"]
        header = replace(own, epoch=epoch, metrics=metrics, created=created, writer=writer)
        return world_manifest(parts, replace(header, alike=alike))

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

    def _conclude(self, world: Manifest, undo: Callable[[], None]) -> None:
        """Commit, if this rank is to, and hear whether all who are to have done it."""
        gone: list[bool] = []
        outcome: Json | BaseException = {}
        if self.lead:
            try:
                commit(self._store, world, abandon=lambda: gone.append(True), seal=self._seal)
                prune_quietly(self._store, self._keep, world, self._seal)
            except CheckpointError as error:
                outcome = error
        try:
            told = gather(
                self.group, f"commit of step {world.step}", _said(outcome, gone), self._timeout
            )
        except RankError as error:
            if isinstance(outcome, BaseException) or not self._is_there(world):
                raise
            log.warning("step %d is committed, but not all ranks have heard: %s", world.step, error)
            return
        wrong = {rank: one for rank, one in enumerate(told) if "error" in one}
        if all(one["gone"] for one in wrong.values()) and wrong:
            undo()
        if isinstance(outcome, BaseException):
            raise outcome
        if wrong:
            raise RankError(list(wrong), "; ".join(one["error"] for one in wrong.values()))

    def _is_there(self, world: Manifest) -> bool:
        """Whether this very manifest is committed here."""
        try:
            found = open_step(self._store, world.step, self._seal, parts=False)
        except CheckpointError:
            return False
        return [part.name for part in found.parts] == [part.name for part in world.parts]


def _part(answer: Any) -> Part:
    name, nbytes, check, raw_nbytes, encoded_nbytes = answer["part"]
    return Part(name, nbytes, check, raw_nbytes, encoded_nbytes, tuple(answer["segments"]))


def _said(outcome: Json | BaseException, gone: Sequence[bool]) -> Json:
    if isinstance(outcome, BaseException):
        return {"error": f"{type(outcome).__name__}: {outcome}", "gone": bool(gone)}
    return {}


def _holdings_of(step: int) -> str:
    return f"whether ranks hold the same at step {step}"


def _parts_of(step: int) -> str:
    return f"the parts of step {step}"
