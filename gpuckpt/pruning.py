"""Delete what isn't kept of a root that no run has, or say first what that would be."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from gpuckpt import layout
from gpuckpt.commit import named_files, steps, writing
from gpuckpt.errors import CheckpointError, InvalidError, NotFoundError
from gpuckpt.retention import Keep, outdated, prune
from gpuckpt.seal import Seal
from gpuckpt.stores import Store

_EXAMPLE = "last=2,every=1000,best=loss:min:3,newer_than=2h"


@dataclass(frozen=True, slots=True)
class Pruning:
    """What goes of a root, and what stays.

    `doomed` steps go, and `kept` stay.  `files` are those that go with them, with
    their bytes, each once; `unnamed` those of no checkpoint: what a crash has left,
    or what a run writes just now, from which `prune_root` stays away.  `spared` says
    which manifest that stays can't be read: as long as it is there, no data is
    deleted, since it may name any.
    """

    doomed: tuple[int, ...]
    kept: tuple[int, ...]
    files: Mapping[str, int]
    unnamed: Mapping[str, int]
    spared: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the files that go with the steps."""
        return sum(self.files.values())

    @property
    def unnamed_nbytes(self) -> int:
        """Bytes of those of no checkpoint."""
        return sum(self.unnamed.values())


def parse_keep(text: str) -> Keep:
    """`last=2,every=1000,best=loss:min:3,newer_than=2h` as what a checkpointer's `keep` is.

    Raises:
        InvalidError: it isn't of that form.
    """
    read: dict[str, Callable[[str], object]] = {
        "last": int,
        "every": int,
        "best": _best,
        "newer_than": str,
    }
    found: dict[str, object] = {}
    for one in filter(None, (part.strip() for part in text.split(","))):
        name, mark, value = one.partition("=")
        name = name.strip().replace("-", "_")
        try:
            if not mark or name in found:
                raise ValueError(one)  # noqa: TRY301
            found[name] = read[name](value.strip())
        except (KeyError, ValueError):
            raise InvalidError(f"keep is like {_EXAMPLE}, and each once; got {one!r}") from None
    if not found:
        raise InvalidError(f"keep is like {_EXAMPLE}; got {text!r}")
    return Keep(**found)  # type: ignore[arg-type]


def plan_prune(store: Store, keep: Keep, seal: Seal | None = None) -> Pruning:
    """What `prune_root` would delete now; changes nothing, and takes no lock.

    Raises:
        NotFoundError: there is no committed checkpoint.
        CheckpointError: `keep` asks for metrics or times, and a manifest can't be read.
    """
    if not steps(store):
        raise NotFoundError(f"{store.root}: there is no committed checkpoint")
    return _plan(store, keep, seal, _sizes(store))


def prune_root(store: Store, keep: Keep, seal: Seal | None = None) -> Pruning:
    """Delete the steps that `keep` doesn't keep, and then all files that no manifest names.

    Never the newest step, nor what one that stays names.  In the order that a
    crash can't harm: manifests first, then, once these are gone for good, data.
    Holds the root's lock meanwhile, and says what was deleted.

    Raises:
        LockedError: a run has the root; nothing was deleted.
        NotFoundError, CheckpointError: as `plan_prune`; or the storage refused.
    """
    if not steps(store):  # a root that isn't there isn't made, either
        raise NotFoundError(f"{store.root}: there is no committed checkpoint")
    before = _sizes(store)
    with writing(store):  # what stays is durable before anything goes
        found = _plan(store, keep, seal, before)
        prune(store, keep, seal=seal)
        left = frozenset(store.names())
    files, unnamed = (
        {name: nbytes for name, nbytes in some.items() if name not in left}
        for some in (found.files, found.unnamed)
    )
    return replace(found, files=files, unnamed=unnamed)


def _plan(store: Store, keep: Keep, seal: Seal | None, sizes: Mapping[str, int]) -> Pruning:
    """What goes of files of these sizes."""
    doomed = outdated(store, keep, None, seal)
    kept = [step for step in steps(store) if step not in doomed]
    stay, spared = set[str](), ""
    for step in kept:
        try:
            stay.update(named_files(store, step))
        except CheckpointError as error:
            spared = str(error)
    named = {layout.manifest_name(step) for step in doomed}
    for step in doomed:
        with contextlib.suppress(CheckpointError):
            named.update(named_files(store, step))
    going = {name: nbytes for name, nbytes in sizes.items() if _goes(name, stay, doomed, spared)}
    own = {name: nbytes for name, nbytes in going.items() if name in named}
    own |= {name: n for name, n in going.items() if layout.data_step(name) in doomed}
    unnamed = {name: nbytes for name, nbytes in going.items() if name not in own}
    return Pruning(tuple(doomed), tuple(kept), own, unnamed, spared)


def _goes(name: str, stay: Collection[str], doomed: Collection[int], spared: str) -> bool:
    """Whether a file goes, if these are the data files that stay."""
    if name.endswith(layout.TEMPORARY):
        return True
    step = layout.manifest_step(name)
    if step is not None:
        return step in doomed
    return not spared and layout.data_step(name) is not None and name not in stay


def _sizes(store: Store) -> dict[str, int]:
    """The bytes of all files that hold, or held, checkpoints."""
    found = {}
    for name in store.names():
        if name.startswith(layout.BEGINNING):
            with contextlib.suppress(NotFoundError):  # a run may delete it just now
                found[name] = store.size(name)
    return found


def _best(text: str) -> tuple[str, str, int]:
    match = re.fullmatch(r"(.+):(min|max):(\d+)", text)
    if match is None:
        raise ValueError(text)
    return match[1], match[2], int(match[3])
