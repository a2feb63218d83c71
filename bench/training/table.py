"""An embedding table that sparse updates reach: `bench.peers.embedding`, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.peers.embedding import WIDTH, Table, grams, library_text
from bench.training.runs import Run, Scale, State, seeded


def runs() -> list[Run]:
    """The one."""
    facts: dict[str, Any] = {}
    what = "an embedding table and its moments in float32; a step touches its batch's rows alone"
    return [Run("embedding", what, lambda scale: _train(scale, facts), facts)]


def _train(scale: Scale, facts: dict[str, Any]) -> Iterator[State]:
    """One pass over the text, so that every row was seen, then the steps that count."""
    wanted = max(2, scale.table_nbytes // (3 * 4 * WIDTH))
    rows, nexts, count = grams(library_text(), wanted)
    table, generator = Table.initial(count), seeded(20)
    order = generator.permutation(len(nexts))
    losses = []
    first = 8 * scale.table_batch  # the pass may go in larger steps
    for begin in range(0, len(order), first):
        at = order[begin : begin + first]
        losses.append(table.step(rows[at], nexts[at]))
    facts |= {"rows": count, "width": WIDTH, "batch": scale.table_batch, "loss_first": losses[0]}
    state = table.arrays()
    for _ in range(scale.steps + 1):
        at = generator.choice(len(nexts), scale.table_batch, replace=False)
        losses.append(table.step(rows[at], nexts[at]))
        facts["loss_last_10"] = sum(losses[-10:]) / len(losses[-10:])
        yield state
