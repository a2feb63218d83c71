"""What ranks say to each other in a save, and what it takes to hear all of it."""

from __future__ import annotations

import time

from bench.ranks.alone import Row, taken
from bench.ranks.layouts import inventory, model, roster
from bench.ranks.simulated import Scripted, rounds_of
from gpuckpt.groups import Group
from gpuckpt.inventory import Inventory
from gpuckpt.joint import Joint
from gpuckpt.stores.memory import MemoryStore

# Rounds in which ranks say what they hold: as many as there are, or fewer.
_ROUNDS = 3


def sharing(kind: str, ranks: int, layers: int) -> Row:
    """The first save's rounds: what each rank gives and gets, and what a rank makes of it."""
    shapes = model(layers)

    def share(group: Group) -> Inventory:
        joint = Joint(group, MemoryStore(), keep=None, seal=None, timeout=1)
        return joint.share(inventory(roster(kind, group.rank, ranks, shapes)), 1)

    told = rounds_of(ranks, share, _ROUNDS)

    def work() -> Row:
        group = Scripted(0, ranks, lambda at, _: told[at])
        begun = time.process_time()
        share(group)
        seconds = time.process_time() - begun
        return {
            "rounds": len(group.given),
            "given_nbytes": sum(group.given),
            "got_nbytes": sum(group.got),
            "cpu_s": seconds,
        }

    row = {"case": "share", "kind": kind, "ranks": ranks, "tensors": len(shapes)}
    return row | taken(work)
