"""A callback of Transformers' Trainer that saves by `Every` and `Keep`, and resumes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gpuckpt.adapters.bridge import Bridge
from gpuckpt.adapters.plain import forms_of
from gpuckpt.adapters.torches import TORCH_FORMS
from gpuckpt.adapters.transformers.taking import Taking
from gpuckpt.adapters.transformers.training import check, dump, model_of, numbers_of, take
from gpuckpt.checkpointer import Checkpointer
from gpuckpt.errors import InvalidError
from gpuckpt.retention import Keep
from gpuckpt.rng import RNG
from gpuckpt.schedule import Every
from gpuckpt.tiers import Root


class Checkpoint(TrainerCallback):
    """Saves a `Trainer`'s run into one root, and has it go on from the newest checkpoint.

    A checkpoint is made before a step begins, after the evaluation and the logs
    that the step before led to, when `every` says that one is due after so
    many steps (`state.global_step`); and at the end.  It has the model, the
    optimizer, the schedule, the scaler, the trainer's state and the generators
    of Python, numpy and torch.  The position in the data follows from these:
    the Trainer passes over the batches that it has trained on.  A run that was
    killed makes the same numbers, bit for bit, as one that wasn't, if they are
    the same on the hardware each time.

    Give the Trainer `save_strategy="no"`, unless it is to write its own besides.
    `types` are enums, dataclasses and named tuples that are in your optimizer's
    or schedule's state; `options` are a `Checkpointer`'s.  With `preempt`, the
    training stops once it should.
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
        self.root, self._options = root, {"every": every, "keep": keep, **options}
        self._forms = forms_of(types, TORCH_FORMS)
        self._saver: Checkpointer | None = None
        self._taking: Taking | None = None
        self._rng = RNG()
        self._step = 0

    @property
    def checkpointer(self) -> Checkpointer | None:
        """What saves, from `resume` to the end of the training."""
        return self._saver

    def resume(self, trainer: Trainer) -> str | None:
        """What `trainer.train(resume_from_checkpoint=…)` is to be given; None at the beginning.

        It takes the root, and is to be called before each `train`.  The
        directory that it names has nothing but the trainer's state, and goes
        when the training has begun; all else is read then, straight from the root.

        Raises:
            LockedError: another run has the root.
            UnsupportedError: the trainer shards its model by FSDP or DeepSpeed.
        """
        check(trainer)
        self.close()
        self._saver = Checkpointer(self.root, **self._options)
        self._trainer = trainer
        self._bridge = Bridge(
            *(lambda: dump(trainer), lambda: self._own),
            live=lambda: {"model": model_of(trainer).state_dict()},
            forms=self._forms,
        )
        self._own: dict[str, Any] = {}
        self._at_epoch: dict[str, Any] | None = None
        latest = self._saver.latest()
        self._step = 0 if latest is None else latest.step
        if latest is None:
            return None
        kept: dict[str, Any] = {"trainer_state": None}
        self._saver.restore(kept, self._step, names=["trainer_state"])
        self._taking = Taking(trainer, kept["trainer_state"], self._restore, self._set_generators)
        return self._taking.directory

    def close(self) -> None:
        """Wait until the last save is durable, and give the root back; safe to call twice.

        The end of a training does it; call it if `train` was ended by an error
        and the process goes on.
        """
        self._taken()
        saver, self._saver = self._saver, None
        if saver is not None:
            saver.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """See that the run is one that was resumed, if there is anything to resume."""
        del args, control
        if self._saver is None:
            raise InvalidError(
                "call trainer.train(resume_from_checkpoint=checkpoint.resume(trainer)): the "
                "checkpoint wasn't told of this training"
            )
        if state.global_step != self._step:
            raise InvalidError(
                f"{self.root} has step {self._step}, and the training begins at step "
                f"{state.global_step}; pass resume_from_checkpoint=checkpoint.resume(trainer)"
            )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note what the epoch's order of data may be drawn from."""
        del args, state, control
        self._at_epoch = self._rng.state_dict()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save what the steps before have led to, if that is due."""
        del args
        assert self._saver is not None
        self._taken()
        at_epoch, self._at_epoch = self._at_epoch, None
        if state.global_step == self._step:
            return
        self._step = state.global_step
        # The Trainer sets them before an epoch's first batches are read, or else after.
        self._own = at_epoch or self._rng.state_dict()
        self._saver.step(self._step, self._bridge, int(state.epoch or 0), numbers_of(state))
        if next(self._trainer.model.buffers(), None) is not None:
            self._order()  # a forward pass may change them
        if self._saver.should_stop:
            control.should_training_stop = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let the update wait, on its stream, for a copy in flight."""
        del args, state, control
        self._order()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Save the end, if the Trainer will put its best model in the place of the last.

        Its last log is of the whole training, whatever ended it, and the best
        model comes right after.
        """
        del control
        if args.load_best_model_at_end and "train_runtime" in (logs or {}):
            self._save_end(state)
            self._order()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save the end of the run, due or not; wait until it is durable."""
        del control
        if not args.load_best_model_at_end:
            self._save_end(state)
        self.close()

    def _taken(self) -> None:
        """Let the Trainer be as it was: it has taken all, or is to take nothing more."""
        taking, self._taking = self._taking, None
        if taking is not None:
            taking.end()

    def _order(self) -> None:
        if self._saver is not None:
            with self._saver.update():
                pass

    def _save_end(self, state: TrainerState) -> None:
        assert self._saver is not None
        if state.global_step != self._step and not self._saver.should_stop:
            self._step, self._own = state.global_step, self._rng.state_dict()
            epoch = int(state.epoch or 0)
            self._saver.save(self._step, self._bridge, numbers_of(state), epoch)

    def _restore(self) -> None:
        """Restore into what the Trainer has made by now: its model, optimizer and schedule."""
        assert self._saver is not None
        self._bridge.restored_by(partial(self._saver.restore, step=self._step))
        take(self._trainer, self._bridge.loaded)
        self._own = self._bridge.loaded_own
        self._bridge.forget()

    def _set_generators(self) -> None:
        self._rng.load_state_dict(self._own)
        self._own = {}
