"""The coordinator's side of a save: whether it may begin, and the commit of what all have written.

1. Sweep the place.              What a save that failed has left there.
   (`prepare`, holding the lock for that moment)
2. Every rank writes its part.   Durable, and named by nobody.
3. Hold the lock, and see that   Another save to the same place may have swept it away, or a
   all is there.                 rank may have another directory under the same path.
4. Commit the manifest.          From here on the new checkpoint is the one that is there.
5. Delete what was there before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from gpuckpt.commit import commit, delete, open_step, steps, sweep, writing
from gpuckpt.errors import InvalidError, RankError
from gpuckpt.manifest import Manifest, Part
from gpuckpt.seal import Seal
from gpuckpt.stores import Store

WRITER = "torch.distributed.checkpoint"
_SAVE = re.compile(r"\(save ([0-9a-f]{32})\)")


def signed(writer: str, save_id: str) -> str:
    """What a manifest says of who wrote it: DCP too, and the id of its save."""
    return f"{writer} by {WRITER} (save {save_id})"


def save_id_of(writer: str) -> str | None:
    """The id of a save of DCP's: undoes `signed`."""
    match = _SAVE.search(writer)
    return match[1] if match else None


def prepare(store: Store, *, overwrite: bool, seal: Seal | None) -> None:
    """See that a save may begin at a place, and sweep it.

    Raises:
        InvalidError: there is a checkpoint, and it isn't to be overwritten; or a
            run's, which never is.
        LockedError: somebody else is writing there.
    """
    with writing(store):
        for step in steps(store):
            found = open_step(store, step, seal, parts=False)
            if WRITER not in found.writer:
                raise InvalidError(
                    f"{store.root} has step {step} of a run that {found.writer} saved; "
                    "a checkpoint of DCP's needs a path of its own"
                )
            if not overwrite:
                raise InvalidError(
                    f"{store.root}: Checkpoint already exists and overwrite=False; give another "
                    "path, or pass overwrite=True"
                )


def conclude(
    store: Store,
    world: Manifest,
    seal: Seal | None,
    *,
    abandon: Callable[[], object] = lambda: None,
) -> None:
    """Commit what all ranks have written, in the place of what was there; on return it is durable.

    Raises:
        RankError: what a rank has written isn't here; nothing was committed.
        StorageError: the storage refused.
    """
    with store.lock():
        _check_there(store, world)
        commit(store, world, abandon=abandon, seal=seal)
        others = [step for step in steps(store) if step != world.step]
        delete(store, others, world)
        sweep(store, committed=world)


def _check_there(store: Store, world: Manifest) -> None:
    names = set(store.names())
    parts: Sequence[Part] = world.parts
    for rank, part in enumerate(parts):
        missing = [name for name in (part.name, *part.segments) if name not in names]
        if missing or store.size(part.name) != part.nbytes:
            raise RankError(
                [rank],
                f"{store.root} lacks {', '.join(missing) or part.name}, which it has written; all "
                "ranks need to have one directory there, and no other save may write to it",
            )
    if missing := [name for name in world.segments if name not in names]:
        raise RankError([0], f"{store.root} lacks {', '.join(missing)}: another save wrote there")
