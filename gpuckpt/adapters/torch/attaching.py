"""Hooks on `optimizer.step`, so that a loop needs no `with ckpt.update():`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch

from gpuckpt.checkpointer import Checkpointer
from gpuckpt.errors import InvalidError

After = Callable[[], object]


class Attached:
    """Hooks on optimizers, until `remove`; as a context manager, until its end."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        """Which optimizers, numbered as they were hooked, announced a step since it was cleared."""
        self._handles: list[Any] = []
        self._count = 0

    def __enter__(self) -> Self:
        """Itself."""
        return self

    @property
    def all_seen(self) -> bool:
        """Whether each of the optimizers has announced a step since `seen` was cleared."""
        return len(self.seen) == self._count

    def __exit__(self, *_: object) -> None:
        """Remove the hooks."""
        self.remove()

    def remove(self) -> None:
        """Take the hooks off; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()

    def hook(self, optimizer: Any, before: After, after: After | None) -> None:
        """Call `before` before each of its steps, and `after` when it is done."""
        number, self._count = self._count, self._count + 1

        def pre(*_: object) -> None:
            if _is_live():
                self.seen.add(number)
                before()

        def post(*_: object) -> None:
            if after is not None and _is_live():
                after()

        self._handles.append(optimizer.register_step_pre_hook(pre))
        if after is not None:
            self._handles.append(optimizer.register_step_post_hook(post))


def attach(
    checkpointer: Checkpointer,
    *optimizers: torch.optim.Optimizer,
    state: Any = None,
    done: int = 0,
) -> Attached:
    """Have each optimizer's `step` wait for a copy in flight, as inside `checkpointer.update()`.

    On a GPU its stream waits for a copy, and the host for reads by `hold`.  A step
    that GradScaler skips changes nothing and waits for nothing.  With `state`,
    each step of the last of the optimizers is also followed by
    `checkpointer.step(n, state)`, with n counted on from `done`: only for a state
    that nothing but optimizers changes, since a scheduler that makes its step
    afterwards would be one behind in a resumed run.

    Compiled steps, and those captured in a CUDA graph, run no hooks: a loop
    that has these calls `checkpointer.update()` itself, or uses `training`.

    Raises:
        InvalidError: none is given, or one has no such hooks.
    """
    if not optimizers:
        raise InvalidError("attach: give it the optimizers whose steps change the state")
    for one in optimizers:
        if not hasattr(one, "register_step_pre_hook"):
            raise InvalidError(
                f"attach: a {type(one).__qualname__} has no register_step_pre_hook; give the "
                "torch.optim.Optimizer that is in it"
            )
    counted = done

    def save() -> None:
        nonlocal counted
        counted += 1
        checkpointer.step(counted, state)

    attached = Attached()
    for at, one in enumerate(optimizers):
        last = at == len(optimizers) - 1
        after = save if state is not None and last else None
        attached.hook(one, lambda: order(checkpointer), after)
    return attached


def order(checkpointer: Checkpointer) -> None:
    """Order what comes next after the copy in flight, if there is one."""
    with checkpointer.update():
        pass


def _is_live() -> bool:
    """Whether a step is being made, and not traced or captured to be made later."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
