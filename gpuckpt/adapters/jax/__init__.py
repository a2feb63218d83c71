"""JAX: pytrees of arrays, saved in the background, and restored as new trees.

Public as `gpuckpt.jax`; docs/guides/jax.md says how to use it.
"""

from gpuckpt.adapters.jax.checkpointer import Checkpointer
from gpuckpt.adapters.jax.functions import load, restore, resume, save, step

__all__ = ["Checkpointer", "load", "restore", "resume", "save", "step"]
