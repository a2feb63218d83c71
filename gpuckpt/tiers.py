"""Tiers: the roots of one run, from the nearest, which saves go to, up to the safest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from gpuckpt.errors import InvalidError
from gpuckpt.retention import Keep, check_keep
from gpuckpt.schedule import Every
from gpuckpt.sizes import parse_seconds
from gpuckpt.stores import Store
from gpuckpt.stores.opening import open_store

Root = str | os.PathLike[str]


@dataclass(frozen=True)
class Tier:
    """A root of a run, to which steps go up once they are durable in the nearest.

    `keep` says which steps survive there.  With `every`, not all go up: `every=1000`
    (or `Every(steps=1000)`) is for the first step that is saved at or past 1000, 2000, …,
    `Every(seconds="1 h")` for the first an hour after the last.  `linger` is how
    long closing waits for what is on its way.  `store` is in place of the one at `root`.
    """

    root: Root
    keep: Keep | None = None
    every: int | Every | None = None
    linger: float | str | timedelta = "1 min"
    store: Store | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.root, str | os.PathLike):
            raise InvalidError(f"a tier is a root or a Tier, got {self.root!r}")
        check_keep(self.keep)
        every = self.every
        if isinstance(every, bool) or not isinstance(every, int | Every | None):
            raise InvalidError(f"Tier: every is a number of steps or an Every, got {every!r}")
        if isinstance(every, Every) and every.overhead is not None:
            raise InvalidError("Tier: every has no overhead: the loop doesn't wait for uploads")
        if isinstance(every, int):
            object.__setattr__(self, "every", Every(steps=every))
        parse_seconds(self.linger)

    def open(self) -> Store:
        """Its store."""
        return self.store if self.store is not None else open_store(self.root)


def arranged(
    root: Root | None,
    tiers: Sequence[Root | Tier],
    *,
    keep: Keep | None = None,
    store: Store | None = None,
) -> tuple[Tier, ...]:
    """The tiers from the nearest up; a `root` is the nearest, with this `keep` and `store`.

    Raises:
        InvalidError: there is none, one is there twice, or the nearest has an `every`.
    """
    if isinstance(tiers, str | os.PathLike | Tier) or not isinstance(tiers, Sequence):
        raise InvalidError(f"tiers are a list of roots, the nearest first; got {tiers!r}")
    found = [one if isinstance(one, Tier) else Tier(one) for one in tiers]
    if root is not None:
        found.insert(0, Tier(root, store=store))
    if not found:
        raise InvalidError("a root is wanted, or tiers, the nearest first")
    nearest = found[0]
    if nearest.every is not None:
        raise InvalidError("the nearest tier gets every step; give Checkpointer every= instead")
    check_keep(keep)
    if keep is not None and nearest.keep is not None:
        raise InvalidError("keep is given twice: for the nearest tier, and beside it")
    found[0] = replace(nearest, keep=nearest.keep or keep)
    places = [one.open().root if one.store is None else id(one.store) for one in found]
    if len(set(places)) < len(places):
        raise InvalidError(f"one tier is there twice: {', '.join(str(one.root) for one in found)}")
    return tuple(found)
