"""Write a tree by Orbax itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from gpuckpt.conversion.orbax import is_kept
from gpuckpt.conversion.port import Source, read_whole
from gpuckpt.errors import CheckpointError, StorageError
from gpuckpt.names import plain_name
from gpuckpt.structure import Mark, from_json

_NOTHING = object()


def save(folder: Path, source: Source) -> None:
    """Save what a source has in the place of an empty folder.

    Raises:
        StorageError: Orbax couldn't.
    """
    count = len(source.outline.specs)
    arrays = [read_whole(source, position) for position in range(count)]
    tree = _kept(from_json(source.outline.structure), arrays)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ocp.PyTreeCheckpointer().save(folder, tree, force=True)
    except CheckpointError:
        raise
    except Exception as error:
        raise StorageError(
            f"Orbax couldn't write {folder} ({type(error).__name__}: {str(error)[:400]})"
        ) from error


def _kept(tree: Any, arrays: list[Any]) -> Any:
    """A tree as Orbax takes it: without values that it doesn't, with keys of text."""
    if isinstance(tree, Mark):
        return arrays[tree.tensor]
    if isinstance(tree, dict):
        rows = {plain_name((key,)): _kept(child, arrays) for key, child in tree.items()}
        return {key: child for key, child in rows.items() if child is not _NOTHING}
    if isinstance(tree, list | tuple):
        children = [_kept(child, arrays) for child in tree]
        return [None if child is _NOTHING else child for child in children] or type(tree)()
    if isinstance(tree, np.generic) or not is_kept(tree):
        return _NOTHING
    return tree
