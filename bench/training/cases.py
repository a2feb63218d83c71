"""What is saved of which run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.training import finetuning, table, transformer
from bench.training.runs import Run, State


@dataclass(frozen=True, slots=True)
class Case:
    """A part of a run's state: the tensors whose names begin so, or all."""

    name: str
    what: str
    parts: tuple[str, ...] = ()

    def of(self, state: State) -> State:
        """The same arrays, without the others."""
        if not self.parts:
            return state
        return {name: array for name, array in state.items() if name.startswith(self.parts)}


CASES: dict[str, tuple[Case, ...]] = {
    "adam-f32": (Case("adam-f32", "parameters and both moments, float32"),),
    "adam-masters": (
        Case("adam-masters", "bfloat16 parameters; masters and both moments, float32"),
        Case("adam-masters, weights", "the bfloat16 parameters alone", ("model.",)),
    ),
    "adam-bf16": (Case("adam-bf16", "parameters and both moments, bfloat16"),),
    "tune": (
        Case("tune, weights", "the bfloat16 weights alone", ("model.",)),
        Case("tune, layers", "the same without embeddings", ("model.encoder.",)),
        Case(
            "tune-f32", "masters and both moments, float32", ("trained.", "exp_avg.", "exp_avg_sq.")
        ),
    ),
    "tune-bf16": (Case("tune-bf16", "weights trained in bfloat16, no masters"),),
    "lora": (Case("lora", "a frozen base, adapters and their moments"),),
    "embedding": (Case("embedding", "a table and its moments, float32"),),
}


def all_runs() -> Sequence[Run]:
    """Those that can be made here."""
    return [*transformer.runs(), *finetuning.runs(), *table.runs()]
