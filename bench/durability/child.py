"""A training run that is there to be killed."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import gpuckpt
from bench.durability.deaths import Death, count_all, die_at
from gpuckpt.commit import open_step, steps
from gpuckpt.layout import segment_step
from gpuckpt.pending import Checkpoint, Pending
from gpuckpt.stores.blocks import Blocks
from gpuckpt.stores.local import LocalStore
from tests.versions import CHUNK, set_to, state_at, version_of

FOR_EVER = 1_000_000
Said = tuple[str, Any]


class Setting(NamedTuple):
    """How a run saves: by a checkpointer, or `alone` by `gpuckpt.save`."""

    codec: str
    snapshot: str = "copy"
    last: int | None = 1
    full_every: int = 8
    direct: bool = False
    """Whether nearly all is written past the page cache."""
    alone: bool = False


class Life(NamedTuple):
    """Which root a run saves to and how, in how many steps, and when it dies by its own hand."""

    root: Path
    setting: Setting
    steps: int
    death: Death | None = None


# Of a run that counts its moments.
COUNTED = Death("", 0)
SETTINGS = (
    Setting("delta"),
    Setting("delta", "hold", last=2, full_every=3),
    Setting("auto", "hold"),
    Setting("raw", last=None),
    Setting("delta", last=3, direct=True),
    Setting("zstd", full_every=1),
    Setting("auto", alone=True),
)


def store_of(root: Path, setting: Setting) -> LocalStore:
    """The root, written in the setting's way."""
    blocks = Blocks(8192, 2, 4096) if setting.direct else None
    return LocalStore(root, blocks=blocks)


def checkpointer(root: Path, setting: Setting) -> gpuckpt.Checkpointer:
    """A checkpointer of the root."""
    return gpuckpt.Checkpointer(
        root,
        store=store_of(root, setting),
        every=gpuckpt.Every(steps=1),
        keep=keep_of(setting),
        codec=setting.codec,
        snapshot=setting.snapshot,
        full_every=setting.full_every,
        memory="4 MiB",
        chunk_nbytes=CHUNK,
    )


def keep_of(setting: Setting) -> gpuckpt.Keep | None:
    """What is kept."""
    return gpuckpt.Keep(last=setting.last) if setting.last else None


def left_over(store: LocalStore) -> list[str]:
    """Files of a save that no checkpoint names."""
    named = {name for step in steps(store) for name in open_step(store, step).segments}
    return [
        name
        for name in store.names()
        if name.endswith(".tmp") or (segment_step(name) is not None and name not in named)
    ]


def live(life: Life, said: Connection, go: Connection) -> None:
    """Each time that the parent says `go`, try to take the root, and train.

    Says each step that is durable as soon as it is, before anybody else is told.
    """
    go.recv()
    watches = count_all() if life.death == COUNTED else {}
    if life.death is not None and not watches:
        die_at(life.death)
    try:
        while not _trained(life, said):
            go.recv()
    except BaseException as error:
        said.send(("failed", repr(error)))
        raise
    said.send(("counted", {place: watch.count for place, watch in watches.items()}))


def _trained(life: Life, said: Connection) -> bool:
    """Whether it got the root; then it has trained."""
    try:
        _train(life, said)
    except gpuckpt.LockedError as error:
        said.send(("locked", str(error)))
        return False
    return True


def _train(life: Life, said: Connection) -> None:
    finish = Pending.finish

    def finish_and_say(
        pending: Pending, result: Checkpoint | None, failure: BaseException | None
    ) -> None:
        if failure is None:
            said.send(("durable", pending.step))
        finish(pending, result, failure)

    with mock.patch.object(Pending, "finish", finish_and_say):
        (_save_alone if life.setting.alone else _save)(life, said)


def _save(life: Life, said: Connection) -> None:
    state, root, setting = state_at(0), life.root, life.setting
    with checkpointer(root, setting) as ckpt:
        said.send(("opened", left_over(store_of(root, setting))))
        done = ckpt.resume(state)
        assert version_of(state) == done
        said.send(("resumed", done))
        for step in range(done + 1, done + 1 + life.steps):
            with ckpt.update():
                set_to(state, step)
            ckpt.step(step, state)


def _save_alone(life: Life, said: Connection) -> None:
    root, setting = life.root, life.setting
    store = store_of(root, setting)
    done = version_of(gpuckpt.load(root)) if steps(store) else 0
    said.send(("resumed", done))
    for step in range(done + 1, done + 1 + life.steps):
        gpuckpt.save(root, state_at(step), step, keep=keep_of(setting), codec=setting.codec)
