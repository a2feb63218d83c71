"""Imported by the process that children are forked from: a save and a restore.

What Python imports only when it is needed, it has then imported, and a child
dies in the engine, not while modules are loaded.
"""

from __future__ import annotations

import gpuckpt
from gpuckpt.stores.memory import MemoryStore
from tests.versions import CHUNK, state_at


def warm_up() -> None:
    """Save and restore, twice."""
    state = state_at(1)
    for codec in ("delta", "auto"):
        store = MemoryStore()
        with gpuckpt.Checkpointer(
            "", store=store, codec=codec, memory="4 MiB", chunk_nbytes=CHUNK
        ) as ckpt:
            for step in (1, 2):
                ckpt.save(step, state_at(step)).result()
            ckpt.resume(state)
        gpuckpt.load("", store=store, memory="64 MiB")


warm_up()
