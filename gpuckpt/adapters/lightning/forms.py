"""Forms of what Lightning keeps in a checkpoint, beside what torch has."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch.trainer.states import RunningStage

from gpuckpt.adapters.plain import Form, forms_of
from gpuckpt.adapters.torches import TORCH_FORMS


def lightning_forms(types: Iterable[type]) -> dict[type, Form]:
    """How a checkpoint's things are written; `types` are classes of the caller's own."""
    return forms_of([AttributeDict, RunningStage, *types], TORCH_FORMS)
