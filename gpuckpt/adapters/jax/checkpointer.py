"""The checkpointer of a functional training loop: trees go in, and new trees come out."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal, Self

import gpuckpt.checkpointer as engine
from gpuckpt.adapters.jax import functions
from gpuckpt.pending import Checkpoint, Pending
from gpuckpt.preemption import Preemption
from gpuckpt.tiers import Root


class Checkpointer:
    """`gpuckpt.Checkpointer` for pytrees, with the same options.

    ```python
    with gpuckpt.jax.Checkpointer("runs/a", every=gpuckpt.Every(steps=100)) as ckpt:
        done, state = ckpt.resume(state)
        for step in range(done + 1, steps + 1):
            state = train_step(state, batch)
            ckpt.step(step, state)
    ```

    Arrays of JAX's never change, so that no `update()` is needed, and on the
    host none is copied.  `engine` is the checkpointer behind it, for all that
    isn't about trees.
    """

    def __init__(self, root: Root | None = None, **options: Any) -> None:
        """Take the root for writing; `options` are those of `gpuckpt.Checkpointer`.

        Raises:
            LockedError: another writer has the root.
            InvalidError: an option makes no sense.
        """
        self.engine = engine.Checkpointer(root, **options)

    def __enter__(self) -> Self:
        """Itself."""
        self.engine.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close; a failed save doesn't hide the error that ends the block."""
        self.engine.__exit__(kind, error, trace)

    def step(
        self,
        step: int,
        tree: Any,
        epoch: int | None = None,
        metrics: dict[str, float] | None = None,
    ) -> Pending | None:
        """Tell that `tree` has seen `step` training steps; saves it if that is due."""
        return functions.step(self.engine, step, tree, epoch, metrics)

    def save(
        self,
        step: int,
        tree: Any,
        metrics: dict[str, float] | None = None,
        epoch: int | None = None,
    ) -> Pending:
        """Save `tree` in the background, due or not; its arrays may be donated at once.

        Raises:
            UnsupportedError: a leaf can't be saved; nothing has been written.
            CheckpointError: the save before failed, with `on_error="raise"`.
        """
        return functions.save(self.engine, step, tree, metrics, epoch)

    def resume(self, tree: Any, *, fallback: bool = False) -> tuple[int, Any]:
        """The newest committed step, and `tree` as it was then; 0 and `tree` if there is none."""
        return functions.resume(self.engine, tree, fallback=fallback)

    def restore(
        self, tree: Any, step: int | None = None, *, strict: bool = True, fallback: bool = False
    ) -> Any:
        """A new tree like `tree`, of a committed step, the newest unless named.

        Raises:
            NotFoundError: no such step.
            MismatchError: the two don't fit.
            CorruptError: bytes aren't what was written.
        """
        return functions.restore(self.engine, tree, step, strict=strict, fallback=fallback)

    @property
    def should_stop(self) -> bool:
        """Whether the process was told to end, and all was saved that there was time for."""
        return self.engine.should_stop

    @property
    def preemption(self) -> Preemption | None:
        """Once it `should_stop`: who told so, and which step is durable."""
        return self.engine.preemption

    @property
    def exit_code(self) -> int:
        """`gpuckpt.PREEMPTED` once it `should_stop`, else 0."""
        return self.engine.exit_code

    def steps(self) -> list[int]:
        """All committed steps, ascending."""
        return self.engine.steps()

    def latest(self) -> Checkpoint | None:
        """The newest committed checkpoint."""
        return self.engine.latest()

    def wait(
        self,
        *,
        tier: Literal["nearest", "all"] = "nearest",
        timeout: float | str | timedelta | None = None,
    ) -> None:
        """Wait until no save is in flight; raises if it failed."""
        self.engine.wait(tier=tier, timeout=timeout)

    def close(self, timeout: float | str | timedelta | None = None) -> None:
        """Wait for a save in flight, then give the root back; safe to call twice."""
        self.engine.close(timeout)
