"""Save and restore pytrees with a `gpuckpt.Checkpointer`, or without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

import gpuckpt.checkpointer as engine
from gpuckpt.adapters.jax.packing import Packed, Wanted
from gpuckpt.fallback import Restoration
from gpuckpt.nearest import take_nearest
from gpuckpt.pending import Pending
from gpuckpt.remarks import remark
from gpuckpt.resources import Resources
from gpuckpt.seal import Key, make_seal
from gpuckpt.stores import Store
from gpuckpt.tiers import Root, Tier, arranged


def save(
    ckpt: engine.Checkpointer,
    step: int,
    tree: Any,
    metrics: dict[str, float] | None = None,
    epoch: int | None = None,
) -> Pending:
    """Save a pytree in the background, due or not: `Checkpointer.save` of its leaves.

    Arrays may be donated as soon as this returns.  On the host they aren't copied.

    Raises:
        UnsupportedError: a leaf can't be saved (it was donated, say); nothing
            has been written.
        CheckpointError: the save before failed, with `on_error="raise"`.
    """
    pending = ckpt.save(step, Packed(tree), metrics, epoch)
    _let_donate(tree, pending)
    return pending


def step(
    ckpt: engine.Checkpointer,
    step: int,
    tree: Any,
    epoch: int | None = None,
    metrics: dict[str, float] | None = None,
) -> Pending | None:
    """Tell that `tree` has seen `step` training steps; saves it if that is due."""
    pending = ckpt.step(step, Packed(tree), epoch, metrics)
    _let_donate(tree, pending)
    return pending


def _let_donate(tree: Any, pending: Pending | None) -> None:
    """On a GPU, wait until nothing of a tree is referred to any more.

    JAX refuses to donate what somebody else refers to ("Donation requested for
    buffer with external reference"), where on the host it takes other memory.
    """
    if pending is not None and any(map(_is_on_gpu, jax.tree.leaves(tree))):
        pending.staged.wait()


def _is_on_gpu(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return False
    return any(device.platform != "cpu" for device in leaf.sharding.device_set)


def restore(
    ckpt: engine.Checkpointer,
    tree: Any,
    step: int | None = None,
    *,
    strict: bool = True,
    fallback: bool = False,
) -> Any:
    """A new tree like `tree`, with the values of a committed step, the newest unless named.

    `tree` has arrays, or `jax.ShapeDtypeStruct`s in their places; it isn't
    changed, and its arrays may have been donated.  Each array gets the
    sharding that is there, whatever mesh it was saved from.  Without `strict`,
    what the checkpoint lacks stays as it is, and what it has beside is left.

    Raises:
        NotFoundError: no such step.
        MismatchError: the two don't fit.
        CorruptError: bytes aren't what was written, and with `fallback` no
            older step could be taken.
    """
    wanted = Wanted.of(tree)
    found = ckpt.restore(wanted.state, step, strict=strict, fallback=fallback)
    return wanted.tree(f"step {found} doesn't fit the tree", strict=strict)


def resume(ckpt: engine.Checkpointer, tree: Any, *, fallback: bool = False) -> tuple[int, Any]:
    """The newest committed step, and `tree` as it was then; 0 and `tree` if there is none."""
    wanted = Wanted.of(tree)
    found = ckpt.resume(wanted.state, fallback=fallback)
    if not found and wanted.is_untouched:
        return 0, tree
    return found, wanted.tree(f"step {found} doesn't fit the tree")


def load(
    root: Root | None,
    tree: Any,
    step: int | None = None,
    *,
    strict: bool = True,
    fallback: bool = False,
    memory: int | str = "256 MiB",
    store: Store | None = None,
    key: Key | None = None,
    tiers: Sequence[Root | Tier] = (),
) -> Any:
    """`restore` without a Checkpointer, and so beside one that writes; as `gpuckpt.load`."""
    seal, key = make_seal(key), None  # so that no traceback's locals have it
    wanted = Wanted.of(tree)
    stores = [one.open() for one in arranged(root, tiers, store=store)]
    resources = Resources(memory)
    restoration = Restoration(
        wanted.state, resources, names=None, rename=None, strict=strict, seal=seal
    )
    place, taken = take_nearest(stores, step, restoration.take, fallback=fallback, seal=seal)
    remark(taken.remarks, stacklevel=3)
    subject = f"{place.root}, step {taken.manifest.step} doesn't fit the tree"
    return wanted.tree(subject, strict=strict)
