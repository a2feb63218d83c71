"""A callback of Keras's that saves by `Every` and `Keep`, and resumes by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras

from gpuckpt.adapters.bridge import Bridge
from gpuckpt.adapters.keras.variables import KINDS, assign, values_of
from gpuckpt.adapters.plain import forms_of
from gpuckpt.checkpointer import Checkpointer
from gpuckpt.errors import UnsupportedError
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
    its validation.  A resumed `fit` begins with the epoch that was reached,
    reads the batches again that were trained on without training on them, and
    goes on: the same numbers, bit for bit, as of a run that wasn't ended, if
    they are the same on the hardware each time.

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
        self._at_epoch: dict[str, Any] = {}
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

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Let the update wait, on its stream, for a copy in flight."""
        del batch, logs
        self._order()

    def on_test_begin(self, logs: Any = None) -> None:
        """The same: a validation begins with metrics that are set to zero."""
        del logs
        self._order()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Save, if that is due and the epoch has another batch."""
        self._calls += 1
        self._seen = min(batch + 1, self.params.get("steps") or batch + 1)
        if self._calls > self._passing and self._seen != self.params.get("steps"):
            self._save(self._before + self._seen, self._epoch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Save, if that is due."""
        self._before, self._seen = self._before + self._seen, 0
        self._epoch, self._calls, self._passing, self._at_epoch = epoch + 1, 0, 0, {}
        self._save(self._before, self._epoch, logs)
        self._order()  # the next epoch sets the metrics to zero before it begins

    def on_train_end(self, logs: Any = None) -> None:
        """Save the end, due or not; wait until it is durable."""
        saver = self._saver
        self.model._initial_epoch = None  # noqa: SLF001
        if saver is not None and not saver.should_stop:
            latest, step = saver.latest(), self._before + self._seen
            if latest is None or latest.step != step:
                saver.save(step, self._bridge, _numbers(logs), self._epoch)
        self.close()

    def _order(self) -> None:
        if self._saver is not None:
            with self._saver.update():
                pass

    def _save(self, step: int, epoch: int, logs: Any) -> None:
        assert self._saver is not None
        pending = self._saver.step(step, self._bridge, epoch, _numbers(logs))
        if pending is not None and keras.backend.backend() == "jax":
            pending.staged.wait()  # the next step is given the arrays' memory, in an order of JAX's
        if self._saver.should_stop:
            self.model.stop_training = True

    def _dump(self) -> dict[str, Any]:
        position = {"epoch": self._epoch, "calls": self._calls}
        return {**values_of(self.model), **position, "batches": [self._before, self._seen]}

    def _live(self) -> dict[str, Any]:
        found = values_of(self.model)
        return {kind: found[kind] for kind in ("model", "optimizer")}

    def _own(self) -> dict[str, Any]:
        return {"now": self._rng.state_dict(), "epoch": self._at_epoch}

    def _take(self) -> None:
        """Set the model to what was restored, and the `fit` to where it was."""
        saved, own = self._bridge.loaded, self._bridge.loaded_own
        assign(self.model, saved, KINDS)
        self.model._initial_epoch = self._epoch = saved["epoch"]  # noqa: SLF001
        self._before, self._seen = saved["batches"]
        self._at_epoch = own["epoch"] or own["now"]
        self._metrics = {"metrics": saved["metrics"]} if saved["calls"] else {}
        self._passing = saved["calls"]
        if self._passing:
            train = self.model.train_function
            self.model.train_function = _Passing(self, train, self._passing, own["now"])
        self._bridge.forget()

    def resumed(self, train: Callable[..., Any], generators: dict[str, Any]) -> None:
        """The batches were passed over that were trained on before: train from here on."""
        self._model.train_function = train  # `model` would bring back what a step was given already
        self._rng.load_state_dict(generators)


class _Passing:
    """Stands for a model's train function until so many calls of it have done nothing."""

    def __init__(
        self,
        callback: Checkpoint,
        train: Callable[..., Any],
        calls: int,
        generators: dict[str, Any],
    ) -> None:
        self._callback, self._train = callback, train
        self._left, self._generators = calls, generators
        self._together = callback.model.steps_per_execution

    def __call__(self, *arguments: Any) -> Any:
        """Do nothing, or train.

        torch's argument is data that was read; JAX's are the state, and what data is read from.
        """
        if self._left:
            self._left -= 1
            return {} if len(arguments) == 1 else self._passed(*arguments)
        self._callback.resumed(self._train, self._generators)
        return self._train(*arguments)

    def _passed(self, state: Any, batches: Iterator[Any]) -> Any:
        next(batches)
        for _ in range(self._together - 1):
            next(batches, None)
        return {}, state


def _numbers(logs: Any) -> dict[str, float]:
    return {name: float(value) for name, value in (logs or {}).items()}
