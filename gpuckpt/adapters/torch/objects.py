"""Objects of a training loop, as leaves of the state that come back as what they were."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import torch


class Optimizer:
    """An optimizer as a leaf of the state; what it refers to stays where it is.

    Its own `load_state_dict` would put copies in the place of learning rates
    that are tensors, and a captured CUDA graph would go on with the old ones.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """`optimizer` stays the caller's."""
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own, which shares its tensors' memory."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give it what was saved."""
        before = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for old, group in zip(before, self.optimizer.param_groups, strict=True):
            for key, value in old.items():
                new = group.get(key)
                if isinstance(value, torch.Tensor) and value is not new and _alike(value, new):
                    with torch.no_grad():
                        value.copy_(new)
                    group[key] = value

    @property
    def is_to_be_made(self) -> bool:
        """Whether it has no state yet, and parameters are DTensors, of which that must be made."""
        return not self.optimizer.state and any(map(_is_sharded, self._parameters()))

    def make_state(self) -> None:
        """Make the state that its first step makes, sharded as parameters are, to be restored.

        By a step with gradients of zero at a learning rate of zero: parameters
        stay as they are.  Without this, a rank would get whole tensors in the
        place of its shards.  Every rank calls it.
        """
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = torch.zeros_like(group["lr"]) if torch.is_tensor(group["lr"]) else 0.0
        needing = [one for one in self._parameters() if one.requires_grad]
        before = [one.grad for one in needing]
        for one in needing:
            one.grad = torch.zeros_like(one)
        self.optimizer.step()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        for one, grad in zip(needing, before, strict=True):
            one.grad = grad

    def _parameters(self) -> list[torch.Tensor]:
        return [one for group in self.optimizer.param_groups for one in group["params"]]


class Scheduler:
    """A learning rate scheduler, or another object, whose containers keep their types.

    A checkpoint has dicts, lists and tuples only; what was a `Counter`, an
    `OrderedDict`, a `defaultdict` or a named tuple in the object's state
    becomes one again.  Its tensors, few and small, are copied: which of them are
    one changes as it goes on.
    """

    def __init__(self, scheduler: Any) -> None:
        """`scheduler` stays the caller's."""
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        """The object's own, with copies of its tensors."""
        state: dict[str, Any] = _copied(self.scheduler.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give it what was saved."""
        self.scheduler.load_state_dict(_as_here(self.scheduler.state_dict(), state))


class Generator:
    """A `torch.Generator` as a leaf of the state."""

    def __init__(self, generator: torch.Generator) -> None:
        """`generator` stays the caller's."""
        self.generator = generator

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy of its state, in host memory."""
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Let it go on where the other one was saved."""
        self.generator.set_state(state["state"].cpu())


def _is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def _alike(one: torch.Tensor, other: object) -> bool:
    return isinstance(other, torch.Tensor) and one.shape == other.shape


def _copied(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return type(state)(map(_copied, state)) if type(state) in (list, tuple) else state


def _as_here(here: Any, saved: Any) -> Any:
    """`saved`, in containers of the types that `here` has at the same places."""
    if isinstance(saved, dict) and isinstance(here, Mapping):
        made = {key: _as_here(here.get(key), value) for key, value in saved.items()}
        if isinstance(here, defaultdict):
            return defaultdict(here.default_factory, made)
        return type(here)(made) if isinstance(here, Counter | OrderedDict) else made
    if isinstance(saved, list | tuple) and isinstance(here, list | tuple):
        rest = [None] * max(len(saved) - len(here), 0)
        items = [_as_here(a, b) for a, b in zip([*here, *rest], saved, strict=False)]
        if isinstance(saved, tuple) and hasattr(here, "_fields") and len(here) == len(items):
            return type(here)(*items)
        return type(saved)(items)
    return saved
