"""Saves that tests wait for."""

from __future__ import annotations

from typing import Any

import gpuckpt


def save(ckpt: gpuckpt.Checkpointer, step: int, state: Any) -> gpuckpt.Stats:
    """Save, wait until it is durable, and tell what it was."""
    pending = ckpt.save(step, state)
    pending.result(60)
    return pending.stats
