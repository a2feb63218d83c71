"""What a Trainer's run consists of, and how it takes that back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState

from gpuckpt.errors import UnsupportedError


def check(trainer: Trainer) -> None:
    """See that the Trainer has whole models, not shards.

    Raises:
        UnsupportedError: it hasn't.
    """
    for kind in ("fsdp", "deepspeed"):
        if getattr(trainer, f"is_{kind}_enabled", False):
            raise UnsupportedError(
                "the trainer", f"its model is sharded by {kind}; use gpuckpt.adapters.dcp with it"
            )


def model_of(trainer: Trainer) -> Any:
    """The model itself, not what distributes it."""
    return trainer.accelerator.unwrap_model(trainer.model)


def dump(trainer: Trainer) -> dict[str, Any]:
    """The run at this moment; tensors are the live ones."""
    found = {name: part.state_dict() for name, part in _parts(trainer).items()}
    text = json.dumps(dataclasses.asdict(_with_callbacks(trainer)))
    return {**found, "trainer_state": np.frombuffer(text.encode(), np.uint8)}


def take(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Undo `dump`, but for the trainer's state, which the Trainer reads itself."""
    for name, part in _parts(trainer).items():
        if name in saved:
            part.load_state_dict(saved[name])


def numbers_of(state: TrainerState) -> dict[str, float]:
    """The numbers that were logged last."""
    return {
        name: float(value)
        for entry in state.log_history[-4:]
        for name, value in entry.items()
        if isinstance(value, int | float)
    }


def _parts(trainer: Trainer) -> dict[str, Any]:
    parts = {
        "model": model_of(trainer),
        "optimizer": trainer.optimizer,
        "scheduler": trainer.lr_scheduler,
        "scaler": getattr(trainer.accelerator, "scaler", None),
    }
    return {name: part for name, part in parts.items() if part is not None}


def _with_callbacks(trainer: Trainer) -> TrainerState:
    """The trainer's state with what its callbacks have to say now, as in its own checkpoints."""
    found: dict[str, Any] = {}
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            found.setdefault(type(callback).__name__, []).append(callback.state())
    one = {name: states[0] if len(states) == 1 else states for name, states in found.items()}
    return dataclasses.replace(trainer.state, stateful_callbacks=one)
