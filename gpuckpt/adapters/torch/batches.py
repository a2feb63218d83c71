"""A DataLoader that goes on in the middle of an epoch, with the batches that were left."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from gpuckpt.perrank import PerRank


class Batches:
    """The batches of a `DataLoader`, epoch by epoch, as a leaf of the state.

    ```python
    batches = gpuckpt.torch.Batches(loader)
    for epoch in range(batches.epoch, 10):
        for x, y in batches:
            ...
    ```

    A resumed run's first epoch has the batches that the one before hadn't
    given out, in the same order: the generators that the loader draws from are
    set back to where they were when the epoch began, batches that were given
    out are passed over, and the generators are set forward again.  With
    `num_workers=0` and a dataset that can be indexed that loads nothing; else
    these batches are loaded once more.

    Not the same bits: datasets that draw random numbers in workers which
    outlive an epoch (`persistent_workers`), or that keep a state of their own.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        """`loader` stays the caller's; one iteration at a time."""
        self.loader = loader
        self.epoch = 0
        """Epochs that were given out to their end."""
        self.position = 0
        """Batches that this epoch has given out."""
        self._begun: PerRank = PerRank(None)  # what the loader draws from, when the epoch began

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """The batches that are left of the epoch."""
        given, began = self.position, self._begun.value
        if given and began is not None:
            now = _draws(self.loader)
            _set_draws(self.loader, began)
            batches = iter(self.loader)
            _pass_over(batches, self.loader, given)
            _set_draws(self.loader, now | {"loader": _draws(self.loader)["loader"]})
        else:
            self._begun.value, self.position = _draws(self.loader), 0
            batches = iter(self.loader)
        for batch in batches:
            self.position += 1
            yield batch
        self.epoch, self.position, self._begun.value = self.epoch + 1, 0, None

    def state_dict(self) -> dict[str, Any]:
        """Where it is: `epoch`, `position`, and generators' states when the epoch began."""
        return {"epoch": self.epoch, "position": self.position, "began": self._begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one was saved; an iteration that has begun isn't changed."""
        self.epoch, self.position = state["epoch"], state["position"]
        began = state["began"]
        self._begun.value = began.value if isinstance(began, PerRank) else began


def _draws(loader: DataLoader[Any]) -> dict[str, Any]:
    """The states of the generators that a loader, its sampler and its dataset may draw from."""
    version, words, gauss = random.getstate()
    own = {id(one): one for one in _generators(loader)}.values()
    return {
        "python": (version, np.array(words, np.uint64), gauss),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "loader": [one.get_state() for one in own],
    }


def _set_draws(loader: DataLoader[Any], state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(int(word) for word in words), gauss))
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    own = {id(one): one for one in _generators(loader)}.values()
    for one, saved in zip(own, state["loader"], strict=True):
        one.set_state(saved)


def _generators(loader: DataLoader[Any]) -> Iterator[torch.Generator]:
    """A loader's own generators: in itself, in its samplers, and in those within these."""
    owners = [loader, loader.sampler, loader.batch_sampler]
    while owners:
        owner = owners.pop(0)
        found = getattr(owner, "generator", None)
        if isinstance(found, torch.Generator):
            yield found
        if owner is not loader and hasattr(owner, "sampler"):
            owners.append(owner.sampler)


def _pass_over(batches: Any, loader: DataLoader[Any], count: int) -> None:
    """Let an iteration that has just begun leave out `count` batches."""
    skip = getattr(batches, "_next_index", None)
    if skip is None or loader.num_workers or isinstance(loader.dataset, IterableDataset):
        skip = batches.__next__
    for _ in range(count):
        skip()
