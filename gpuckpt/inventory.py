"""What a state consists of, and the same frozen at one moment: the nouns between the layers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from gpuckpt.apart import Flag
from gpuckpt.arrays import Tensor
from gpuckpt.devices import Frozen
from gpuckpt.spec import Spec
from gpuckpt.values import Json


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a state consists of: its structure, and its tensors, each array once."""

    structure: Json
    tensors: tuple[Tensor, ...]

    @property
    def specs(self) -> list[Spec]:
        """The tensors' specs."""
        return [tensor.spec for tensor in self.tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.spec.nbytes for tensor in self.tensors)

    def by_device(self) -> dict[str, list[int]]:
        """The positions of each device's tensors."""
        found: dict[str, list[int]] = {}
        for position, tensor in enumerate(self.tensors):
            found.setdefault(tensor.spec.device, []).append(position)
        return found


@dataclass(slots=True)
class Snapshot:
    """A state's tensors as they were at one moment, until `release`.

    `sources` has for each of `specs` what its device's `download` takes; the
    state's own arrays are held by `frozen` alone, and no longer than needed.
    `staged` is set once nothing of the state is read any more, which was
    `staged_seconds` after the snapshot began.
    """

    structure: Json
    specs: list[Spec]
    mode: str
    sources: list[Any] = field(default_factory=list)
    frozen: dict[str, Frozen] = field(default_factory=dict)
    staged: Flag = field(default_factory=Flag)
    staged_seconds: float = 0.0
    begun: float = field(default_factory=time.perf_counter)

    def order_update(self) -> None:
        """Order what the caller does next after all reads of the state's live memory."""
        if not self.staged.is_set():
            for frozen in self.frozen.values():
                frozen.order_update()

    def settle(self) -> None:
        """Wait until copies have been made; then what they were made from may go."""
        for frozen in self.frozen.values():
            frozen.settle()
        if self.mode == "copy":
            self._set_staged()

    def end_downloads(self) -> None:
        """Say that no more downloads will begin."""
        for frozen in self.frozen.values():
            frozen.end_downloads()

    def release(self) -> None:
        """Let go of the state; safe to call twice."""
        try:
            for frozen in self.frozen.values():
                frozen.release()
        finally:
            self.sources.clear()
            self._set_staged()

    def _set_staged(self) -> None:
        if not self.staged.is_set():
            self.staged_seconds = time.perf_counter() - self.begun
            self.staged.set()
