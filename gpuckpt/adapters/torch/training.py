"""A training loop's state, its checkpointer and its hooks, in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn
from torch.utils.data import DataLoader

from gpuckpt.adapters.torch.attaching import Attached, attach, order
from gpuckpt.adapters.torch.batches import Batches
from gpuckpt.adapters.torch.modules import Model, has_buffers
from gpuckpt.adapters.torch.objects import Generator, Optimizer, Scheduler
from gpuckpt.checkpointer import Checkpointer
from gpuckpt.errors import InvalidError
from gpuckpt.pending import Pending
from gpuckpt.rng import RNG
from gpuckpt.tiers import Root
from gpuckpt.tree import is_object

# Parts of which nothing that a save holds changes before an optimizer's step: of the last
# three a save has values of its own.
_HOOKED = frozenset({"model", "optimizer", "scheduler", "scaler", "rng"})


class Training:
    """A run that is saved as it goes; a context manager.  Made by `training`."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        state: dict[str, Any],
        optimizers: Sequence[torch.optim.Optimizer],
        models: Sequence[nn.Module],
        done: int,
    ) -> None:
        self.checkpointer = checkpointer
        """For all that isn't here: `save`, `restore`, `wait`, `latest`, …."""
        self.state = state
        """What is saved: a dict of `model`, `optimizer` and so on; add to it before the loop."""
        self.done = done
        """Steps that the model has seen, of all runs together."""
        self._models = models
        self._hooks: Attached = attach(checkpointer, *optimizers)

    def __enter__(self) -> Self:
        """Itself."""
        self.checkpointer.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close; a failed save doesn't hide the error that ends the block."""
        self._hooks.remove()
        self.checkpointer.__exit__(kind, error, trace)

    def step(
        self, *, epoch: int | None = None, metrics: dict[str, float] | None = None
    ) -> Pending | None:
        """Tell that one more step is over, scheduler and all; saves if that is due.

        Call it where an iteration of the loop ends: after `optimizer.step`,
        `scaler.update` and `scheduler.step`, and with gradients accumulated
        only after the last of them.  Returns as `Checkpointer.step` does.
        """
        pending = self.checkpointer.step(self.done + 1, self.state, epoch, metrics)
        self.done += 1
        seen = self._hooks.all_seen
        self._hooks.seen.clear()
        # What changes the state before, or without, a hook that says so: a forward with
        # batch norms, a step that was compiled or captured, whoever keeps the others.
        if pending is not None and (self._is_changed_elsewhere or not seen):
            order(self.checkpointer)
        return pending

    @property
    def _is_changed_elsewhere(self) -> bool:
        """Whether anything of the state may change before an optimizer announces its step."""
        # Batches gives values, and arrays that it never writes to again.
        others = {
            name
            for name, part in self.state.items()
            if name not in _HOOKED and not (name == "data" and isinstance(part, Batches))
        }
        return bool(others) or any(map(has_buffers, self._models))

    @property
    def should_stop(self) -> bool:
        """Whether the process was told to end and has saved: see `Checkpointer(preempt=)`."""
        return self.checkpointer.should_stop

    @property
    def exit_code(self) -> int:
        """What the process should exit with then."""
        return self.checkpointer.exit_code

    def close(self) -> None:
        """Wait for a save in flight, take the hooks off and give the root back; twice is safe."""
        self._hooks.remove()
        self.checkpointer.close()


def training(
    root: Root | None = None,
    *,
    model: nn.Module | Mapping[str, nn.Module] | Sequence[nn.Module],
    optimizer: torch.optim.Optimizer
    | Mapping[str, torch.optim.Optimizer]
    | Sequence[torch.optim.Optimizer],
    scheduler: Any = None,
    scaler: Any = None,
    data: Any = None,
    others: Mapping[str, Any] | None = None,
    rng: bool = True,
    resume: bool = True,
    fallback: bool = False,
    **options: Any,
) -> Training:
    """Open `root` for a training run, resume it if it has a checkpoint, and hook its optimizers.

    `model`, `optimizer` and `scheduler` are one each, or a dict or a list of
    them.  `data` is something with `state_dict`: `Batches(loader)`, or a
    loader of torchdata's.  `others` are further entries of the state, `rng` says
    whether the generators of Python, numpy and torch are one.  All is filled in
    place, without a second copy of it; what an optimizer hasn't got yet is
    made.  `options` are those of `Checkpointer`.  Each optimizer's `step` waits
    for a copy in flight (on a GPU its stream does), as inside `update()`.

    Raises:
        InvalidError: something here has no state to be saved, or a loader forgets where it is.
        MismatchError: the checkpoint is of another model, or of other parts.
        CheckpointError: as `Checkpointer` and its `resume`.
    """
    optimizers, models = _listed(optimizer), _listed(model)
    state = _state(
        model=_each(model, Model),
        optimizer=_each(optimizer, Optimizer),
        scheduler=_each(scheduler, Scheduler),
        scaler=scaler,
        data=data,
        rng=RNG() if rng else None,
    )
    for name, value in (others or {}).items():
        if name in state:
            raise InvalidError(f"others: {name!r} is taken; call it something else")
        state[name] = Generator(value) if isinstance(value, torch.Generator) else value
    checkpointer = Checkpointer(root, **options)
    try:
        done = _resume(checkpointer, state, optimizers, fallback=fallback) if resume else 0
        return Training(checkpointer, state, optimizers, models, done)
    except BaseException:
        checkpointer.close()
        raise


def _resume(
    checkpointer: Checkpointer,
    state: dict[str, Any],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    fallback: bool,
) -> int:
    made = [one for one in map(Optimizer, optimizers) if one.is_to_be_made]
    for one in made:
        one.make_state()
    done = checkpointer.resume(state, fallback=fallback)
    for one in made if done == 0 else ():
        one.optimizer.state.clear()
    return done


def _state(**parts: Any) -> dict[str, Any]:
    """The parts that there are, each seen to have a state."""
    state = {name: part for name, part in parts.items() if part is not None}
    for name, part in state.items():
        if isinstance(part, torch.Generator):
            state[name] = Generator(part)
        elif isinstance(part, DataLoader) and not is_object(part):
            raise InvalidError(
                f"{name}: a DataLoader forgets where it is; iterate over "
                "gpuckpt.torch.Batches(loader) and pass that"
            )
        elif not isinstance(part, dict | list) and not is_object(part):
            raise InvalidError(
                f"{name}: a {type(part).__qualname__} has no state_dict and load_state_dict"
            )
    return state


def _each(parts: Any, make: Callable[[Any], Any]) -> Any:
    """`make` of one thing, or of each of several."""
    if isinstance(parts, Mapping) and not is_object(parts):
        return {name: make(part) for name, part in parts.items()}
    if isinstance(parts, list | tuple):
        return [make(part) for part in parts]
    return None if parts is None else make(parts)


def _listed(parts: Any) -> list[Any]:
    if isinstance(parts, Mapping) and not is_object(parts):
        return list(parts.values())
    return list(parts) if isinstance(parts, list | tuple) else [parts]
