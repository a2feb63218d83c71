"""A callback of Lightning's that saves by `Every` and `Keep`, and resumes by itself."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as BaseCheckpoint
from lightning.pytorch.utilities.migration.utils import _pl_migrate_checkpoint

from gpuckpt.adapters.bridge import Bridge
from gpuckpt.adapters.lightning.forms import lightning_forms
from gpuckpt.adapters.lightning.position import Position
from gpuckpt.checkpointer import Checkpointer
from gpuckpt.errors import CheckpointError
from gpuckpt.retention import Keep
from gpuckpt.schedule import Every
from gpuckpt.tiers import Root

log = logging.getLogger("gpuckpt")

# Of the epoch so far; schedulers and other callbacks may ask for them.
METRICS = "gpuckpt.metrics"


class Checkpoint(BaseCheckpoint):
    """Saves a `fit` into one root, and goes on from its newest checkpoint when started again.

    A checkpoint is made between two batches, after the validation, schedulers
    and loggers that the first of them led to, when `every` says that one is
    due after so many optimizer steps (`trainer.global_step`); and at the end.
    It has all that Lightning's own has, the generators of Python, numpy and
    torch, and the position in the data: a run that was killed makes the same
    numbers, bit for bit, as one that wasn't, if they are the same on the
    hardware each time.  While gradients are being accumulated, none is made.

    Loaders that are shuffled, sized or not, with workers or without, are
    brought back to the batch where they were by reading those before it;
    those with `state_dict` and `load_state_dict`, by these.

    `types` are classes as in `CheckpointIO`, `options` a `Checkpointer`'s.
    With `preempt`, the trainer stops once it should.
    """

    def __init__(
        self,
        root: Root,
        *,
        every: Every,
        keep: Keep | None = None,
        types: Iterable[type] = (),
        **options: Any,
    ) -> None:
        super().__init__()
        self.root, self._options = root, {"every": every, "keep": keep, **options}
        self._forms = lightning_forms(types)
        self._saver: Checkpointer | None = None
        self._hooks: list[Any] = []
        self._step = 0

    @property
    def checkpointer(self) -> Checkpointer | None:
        """What saves, while a `fit` runs."""
        return self._saver

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the root, and restore its newest checkpoint if it has any.

        That goes before a `ckpt_path` that `fit` was given, which is where a run begins.

        Raises:
            LockedError: another run has the root.
            MismatchError: the checkpoint is of another model.
        """
        del pl_module
        self._saver = Checkpointer(self.root, **self._options)
        self._ended = False
        self._position = Position(trainer)
        self._bridge = Bridge(
            *(lambda: self._dump(trainer), self._own),
            live=lambda: {"state_dict": trainer.strategy.lightning_module_state_dict()},
            forms=self._forms,
        )
        self._step = self._bridge.restored_by(self._saver.resume)
        if self._step:
            self._take(trainer)
        for optimizer in trainer.optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._order))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save what the batches before have led to, if that is due."""
        del batch, batch_idx
        if trainer.global_step != self._step:
            self._save(trainer)
            if next(pl_module.buffers(), None) is not None:
                self._order()  # a forward pass may change them

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the run, due or not."""
        del pl_module
        assert self._saver is not None
        if not self._saver.should_stop and trainer.global_step != self._step:
            self._ended, self._step = True, trainer.global_step
            numbers: Any = _Numbers(trainer)
            self._saver.save(self._step, self._bridge, numbers, self._position.epoch)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait until the last save is durable, and give the root back."""
        del trainer, pl_module, stage
        self._end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The same; a failed save doesn't hide what has ended the run."""
        del trainer, pl_module, exception
        try:
            self._end()
        except CheckpointError:
            log.exception("a save failed while the training loop was failing")

    def _order(self, *_: object) -> None:
        """Let what changes the state next wait, on its stream, for a copy in flight."""
        if self._saver is not None:
            with self._saver.update():
                pass

    def _save(self, trainer: Trainer) -> None:
        assert self._saver is not None
        self._step = trainer.global_step
        numbers: Any = _Numbers(trainer)
        self._saver.step(self._step, self._bridge, trainer.current_epoch, numbers)
        if self._saver.should_stop:
            trainer.should_stop = True

    def _dump(self, trainer: Trainer) -> dict[str, Any]:
        found: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)  # noqa: SLF001
        found[METRICS] = dict(trainer.callback_metrics)
        correct = self._position.correct_end if self._ended else self._position.correct
        correct(found["loops"]["fit_loop"])
        if self._ended:
            found["epoch"] = self._position.epoch
        return found

    def _own(self) -> dict[str, Any]:
        return self._position.end_state() if self._ended else self._position.state()

    def _take(self, trainer: Trainer) -> None:
        """Hand what was restored to Lightning, which takes the rest of it in its own order."""
        connector = trainer._checkpoint_connector  # noqa: SLF001
        metrics = self._bridge.loaded.pop(METRICS, {})
        trainer._logger_connector._callback_metrics.update(metrics)  # noqa: SLF001
        connector._loaded_checkpoint = _pl_migrate_checkpoint(self._bridge.loaded, None)  # noqa: SLF001
        connector.restore_datamodule()
        connector.restore_model()
        connector.restore_callbacks()
        self._position.resume(self._bridge.loaded_own)
        self._bridge.forget()
        log.info("step %d of %s is where this run goes on", self._step, self.root)

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        saver, self._saver = self._saver, None
        if saver is not None:
            self._position.end()
            saver.close()


class _Numbers(Mapping[str, float]):
    """The metrics that were logged, which are brought to the host only if a save asks for them."""

    def __init__(self, trainer: Trainer) -> None:
        self._found: dict[str, Any] = trainer.callback_metrics

    def __getitem__(self, name: str) -> float:
        return float(self._found[name])

    def __iter__(self) -> Iterator[str]:
        return (name for name, value in self._found.items() if value.numel() == 1)

    def __len__(self) -> int:
        return len(list(iter(self)))
