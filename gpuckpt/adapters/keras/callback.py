"""A callback of Keras's that saves by `Every` and `Keep`, and resumes by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras

from gpuckpt.adapters.bridge import Bridge
from gpuckpt.adapters.keras.stepping import Stepping
from gpuckpt.adapters.keras.variables import KINDS, assign, values_of
from gpuckpt.adapters.plain import forms_of
from gpuckpt.checkpointer import Checkpointer
from gpuckpt.errors import UnsupportedError
from gpuckpt.pending import Pending
from gpuckpt.retention import Keep
from gpuckpt.rng import RNG
from gpuckpt.schedule import Every
from gpuckpt.tiers import Root


class Checkpoint(keras.callbacks.Callback):
    """Saves a `fit` into one root, and goes on from its newest checkpoint when started again.

    It has the model's variables (the states of its seeds among them), the
    optimizer's, the metrics', the generators of Python, numpy and torch, and
    the epoch and the batch.  Steps are batches, counted from the beginning of
    the first epoch.  A save that falls on an epoch's last batch is made after
    its validation; where data have no length, and none is known of an epoch
    before, a save waits until the next batch has been read.  A resumed `fit`
    begins with the epoch that was reached, reads the batches again that were
    trained on without training on them, and goes on: the same numbers, bit for
    bit, as of a run that wasn't ended, if they are the same on the hardware
    each time.

    Put it last among the callbacks, and compile the model as it was.  What other
    callbacks remember (how long EarlyStopping has waited) is theirs and isn't
    saved.  `options` are a `Checkpointer`'s; with `preempt`, training stops once
    it should.
    """

    def __init__(
        self, root: Root, *, every: Every, keep: Keep | None = None, **options: Any
    ) -> None:
        """Take note; `fit` begins with taking the root.

        Raises:
            UnsupportedError: Keras's backend is neither torch nor jax.
        """
        super().__init__()
        if keras.backend.backend() not in ("torch", "jax"):
            raise UnsupportedError(
                "the model", f"Keras runs on {keras.backend.backend()}; use torch or jax"
            )
        self.root, self._options = root, {"every": every, "keep": keep, **options}
        self._saver: Checkpointer | None = None
        self._stepping: Stepping | None = None
        self._rng = RNG()

    @property
    def checkpointer(self) -> Checkpointer | None:
        """What saves, while a `fit` runs; after an error that ended it, `close` it."""
        return self._saver

    def close(self) -> None:
        """Wait until the last save is durable, and give the root back; safe to call twice.

        The end of a `fit` does it; call it if that was ended by an error and
        the process goes on.
        """
        self._stand_aside()
        saver, self._saver = self._saver, None
        if saver is not None:
            saver.close()

    def on_train_begin(self, logs: Any = None) -> None:
        """Take the root, and restore its newest checkpoint if it has any.

        Raises:
            LockedError: another run has the root.
            MismatchError: the checkpoint is of another model.
        """
        del logs
        self.close()
        self._saver = Checkpointer(self.root, **self._options)
        self._epoch = self._calls = self._before = self._seen = 0
        self._length: int | None = self.params.get("steps")
        self._saved: int | None = None
        self._is_cut = False
        self._held: Callable[[], None] | None = None
        self._at_epoch: dict[str, Any] = {}
        self._now: dict[str, Any] = {}
        self._resumed: dict[str, Any] = {}
        self._passing, self._metrics = 0, dict[str, Any]()
        self._bridge = Bridge(self._dump, self._own, self._live, forms_of(()))
        if self._bridge.restored_by(self._saver.resume):
            self._take()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Note what the epoch's order of data may be drawn from; a resumed one has it back."""
        del logs
        if self._metrics:  # a fit forgets them at this moment
            assign(self.model, self._metrics, ["metrics"])
        self._metrics = {}
        if self._at_epoch:
            self._rng.load_state_dict(self._at_epoch)
        else:
            self._at_epoch = self._rng.state_dict()
        self._epoch, self._calls = epoch, 0
        if self._passing or self._length is None:
            before = self._save_held if self._length is None else None
            train, together = self._model.train_function, self._model.steps_per_execution
            begin = self._set_generators
            self._stepping = Stepping(train, together, begin, before, self._passing)
            self._model.train_function = self._stepping

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Let the update wait, on its stream, for a copy in flight."""
        del batch, logs
        self._order()

    def on_test_begin(self, logs: Any = None) -> None:
        """The same: a validation begins with metrics that are set to zero."""
        del logs
        if self._calls >= self._passing:
            self._set_generators()
        self._order()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Save, if that is due and the epoch has another batch, or is to end here."""
        self._calls += 1
        self._seen = min(batch + 1, self._length or batch + 1)
        step = self._before + self._seen
        if self._calls <= self._passing or self._seen == self._length:
            return
        if self._model.stop_training:
            self._is_cut = True
            self._save_end(step, logs)
        elif self._length is not None:
            self._save(step, self._epoch, logs)
        else:
            self._now = self._rng.state_dict()
            self._held = partial(self._save, step, self._epoch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Save, if that is due, unless the epoch was cut off: that was saved, as it was then."""
        self._stand_aside()
        if self._is_cut:
            return
        self._set_generators()
        self._held, self._now = None, {}
        self._length = self._length or self._seen
        self._before, self._seen = self._before + self._seen, 0
        self._epoch, self._calls, self._passing, self._at_epoch = epoch + 1, 0, 0, {}
        self._save(self._before, self._epoch, logs)
        self._order()  # the next epoch sets the metrics to zero before it begins

    def on_train_end(self, logs: Any = None) -> None:
        """Save the end, due or not; wait until it is durable."""
        self.model._initial_epoch = None  # noqa: SLF001
        self._save_end(self._before + self._seen, logs)
        self.close()

    def _order(self) -> None:
        if self._saver is not None:
            with self._saver.update():
                pass

    def _save(self, step: int, epoch: int, logs: Any) -> None:
        assert self._saver is not None
        self._note(step, self._saver.step(step, self._bridge, epoch, _numbers(logs)))
        if self._saver.should_stop:
            self.model.stop_training = True

    def _save_held(self) -> None:
        """Save what the batch before has led to: another one is there."""
        held, self._held = self._held, None
        if held is not None:
            held()
            if keras.backend.backend() == "jax":
                self._model._jax_state_synced = False  # noqa: SLF001 - the step takes its memory
            self._order()
        self._now = {}

    def _save_end(self, step: int, logs: Any) -> None:
        saver = self._saver
        if saver is not None and not saver.should_stop and step != self._saved:
            self._note(step, saver.save(step, self._bridge, _numbers(logs), self._epoch))

    def _note(self, step: int, pending: Pending | None) -> None:
        if pending is None:
            return
        self._saved = step
        if keras.backend.backend() == "jax":
            pending.staged.wait()  # the next step is given the arrays' memory, in an order of JAX's

    def _stand_aside(self) -> None:
        """Let the model have its own train function again."""
        stepping, self._stepping = self._stepping, None
        # `model` would bring back what a step was given already.
        if stepping is not None and self._model.train_function is stepping:
            self._model.train_function = stepping.train

    def _set_generators(self) -> None:
        """Once the batches are passed over that were trained on before."""
        if self._resumed:
            self._rng.load_state_dict(self._resumed)
            self._resumed = {}

    def _dump(self) -> dict[str, Any]:
        position = {"epoch": self._epoch, "calls": self._calls}
        return {**values_of(self.model), **position, "batches": [self._before, self._seen]}

    def _live(self) -> dict[str, Any]:
        found = values_of(self.model)
        return {kind: found[kind] for kind in ("model", "optimizer")}

    def _own(self) -> dict[str, Any]:
        return {"now": self._now or self._rng.state_dict(), "epoch": self._at_epoch}

    def _take(self) -> None:
        """Set the model to what was restored, and the `fit` to where it was."""
        saved, own = self._bridge.loaded, self._bridge.loaded_own
        assign(self.model, saved, KINDS)
        self.model._initial_epoch = self._epoch = saved["epoch"]  # noqa: SLF001
        self._before, self._seen = saved["batches"]
        self._at_epoch = own["epoch"] or own["now"]
        self._metrics = {"metrics": saved["metrics"]} if saved["calls"] else {}
        self._passing = saved["calls"]
        self._resumed = own["now"] if self._passing else {}
        self._saved = self._before + self._seen
        self._bridge.forget()


def _numbers(logs: Any) -> dict[str, float]:
    return {name: float(value) for name, value in (logs or {}).items()}
