"""Where a run of Lightning's is in its data, and how another comes back there.

Lightning counts batches, but doesn't say what a loader and the generators were
at; a loader that is shuffled begins a resumed epoch with other batches.  So
the generators' states are noted where an epoch's iterator is made and before
each batch is fetched.  A resumed run makes the iterator from the first, passes
over the batches that were trained on, and goes on from the second.

The loops' methods that are wrapped are Lightning's own, not of its public
interface; tests hold them to what they do in the version that is pinned.
"""

from __future__ import annotations

import warnings
from collections import deque
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.trainer.connectors.data_connector import _set_sampler_epoch

from gpuckpt.errors import UnsupportedError
from gpuckpt.rng import RNG

_WRAPPED = ("reset", "on_run_start", "_on_before_fetch")


class Position:
    """Watches a trainer's epoch loop, and sets a resumed one to where it was."""

    def __init__(self, trainer: Trainer) -> None:
        """Begin to watch; the generators' state now is that from which loaders are made."""
        self._fit = trainer.fit_loop
        self._loop = trainer.fit_loop.epoch_loop
        self._rng = RNG()
        self._made: dict[str, Any] = self._rng.state_dict()
        self._epoch: dict[str, Any] | None = None  # None: the iterator was made with the loaders
        self._fetch: dict[str, Any] | None = self._made
        self._loaders: deque[list[Any]] = deque(maxlen=2)
        self._resuming = False
        self._before = {name: getattr(self._loop, name) for name in _WRAPPED}
        for name in _WRAPPED:
            setattr(self._loop, name, getattr(self, name.removeprefix("_")))

    def end(self) -> None:
        """Watch no longer; safe to call twice."""
        for name in _WRAPPED:
            vars(self._loop).pop(name, None)

    def state(self) -> dict[str, Any]:
        """The generators' states, as they were before the batch was fetched that is next."""
        return {"made": self._made, "epoch": self._epoch, "fetch": self._fetch}

    @property
    def epoch(self) -> int:
        """How many epochs are over once a run has ended, without one that was cut short."""
        return int(self._fit.trainer.current_epoch) - self._is_cut_short

    def end_state(self) -> dict[str, Any]:
        """The same after the last batch: an epoch that follows begins with an iterator."""
        if self._is_cut_short:
            return {**self.state(), "fetch": self._rng.state_dict()}
        return {"made": self._made, "epoch": self._rng.state_dict(), "fetch": None}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from where a `state` was taken; call it before the loaders are made."""
        self._made, self._epoch, self._fetch = state["made"], state["epoch"], state["fetch"]
        self._rng.load_state_dict(self._made)
        self._resuming = True

    def correct(self, loops: dict[str, Any]) -> None:
        """Make it the loops' state without the batch that has been fetched, and not trained on."""
        progress = loops["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            progress[part]["ready"] -= 1
        progress["is_last_batch"] = False
        if self._loaders:
            behind = 2 if self._fit._data_fetcher.length is None else 1  # noqa: SLF001
            loops["state_dict"]["combined_loader"] = self._loaders[-behind]

    def correct_end(self, loops: dict[str, Any]) -> None:
        """Make it the loops' state of a run whose next batch, if it is given one, is the next.

        That is a whole epoch's first, unless the run has ended in the middle of one.
        """
        progress = loops["epoch_loop.batch_progress"]
        if self._is_cut_short:
            for part in ("total", "current"):
                for count in ("processed", "completed"):
                    loops["epoch_progress"][part][count] -= 1
            if self._loaders and self._fit._data_fetcher.length is None:  # noqa: SLF001
                loops["state_dict"]["combined_loader"] = self._loaders[-1]
            return
        progress["current"] = dict.fromkeys(progress["current"], 0)
        progress["is_last_batch"] = False

    @property
    def _is_cut_short(self) -> bool:
        """Whether a run that has ended did so before its epoch's last batch."""
        return not self._loop._num_ready_batches_reached()  # noqa: SLF001

    def reset(self) -> None:
        """As the loop's own; a resumed epoch is then one like all others, validation included."""
        with warnings.catch_warnings():
            if self._resuming:
                warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
            self._before["reset"]()
        if self._resuming:
            self._loop.val_loop.reset_restart_stage()
            for loop in (self._fit, self._loop, self._loop.val_loop):
                loop._restarting = False  # noqa: SLF001

    def on_run_start(self, fetcher: Any) -> None:
        """As the loop's own, which makes an epoch's iterator."""
        if self._resuming:
            self._before["on_run_start"](fetcher)
            self._pass_over(fetcher)
            self._resuming = False
            return
        made_now = self._fit.trainer.current_epoch > 0 and not self._fit.is_resuming
        self._epoch = self._rng.state_dict() if made_now else None
        self._before["on_run_start"](fetcher)

    def on_before_fetch(self) -> None:
        """As the loop's own."""
        self._fetch = self._rng.state_dict()
        if loaders := self._fit._combined_loader._state_dicts():  # noqa: SLF001
            self._loaders.append(loaders)
        self._before["_on_before_fetch"]()

    def _pass_over(self, fetcher: Any) -> None:
        """Bring the fetcher to the batch that is next."""
        if isinstance(fetcher, _DataLoaderIterDataFetcher):
            raise UnsupportedError(
                "training_step(dataloader_iter)",
                "which batches it has taken isn't known; let it take a batch itself",
            )
        combined, fetch = self._fit._combined_loader, self._fetch  # noqa: SLF001
        done = self._loop.batch_progress.current.ready
        stateful = combined._state_dicts()  # noqa: SLF001
        if stateful and len(stateful) < len(combined.flattened):
            raise UnsupportedError(
                "train_dataloader", "some loaders have state_dict and some haven't; give all one"
            )
        if stateful:  # Lightning has set them to where they were
            pass
        elif self._epoch is not None:
            self._rng.load_state_dict(self._epoch)
            for loader in combined.flattened:
                _set_sampler_epoch(loader, self._fit.epoch_progress.current.processed)
            iter(fetcher)
        else:
            fetcher.fetched -= done  # they are counted as they are passed over
        for _ in range(0 if stateful else done):
            next(fetcher)
        if fetch is not None:
            self._rng.load_state_dict(fetch)
