"""What an `Accelerator` has prepared, as one object in a state.

```python
from gpuckpt.adapters.accelerate import AcceleratorState

state = {"run": AcceleratorState(accelerator)}
with gpuckpt.Checkpointer("runs/a", every=gpuckpt.Every(steps=300)) as ckpt:
    step = ckpt.resume(state)
```

docs/guides/transformers.md says more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from gpuckpt.adapters.needs import missing

try:
    from accelerate import Accelerator, skip_first_batches
except ImportError as error:
    raise missing("accelerate", error) from error

from gpuckpt.adapters.bridge import OWN, pack, unpack
from gpuckpt.adapters.plain import forms_of
from gpuckpt.adapters.torches import TORCH_FORMS
from gpuckpt.perrank import PerRank
from gpuckpt.rng import RNG

__all__ = ["AcceleratorState"]


class AcceleratorState:
    """The counterpart of `accelerator.save_state` and `load_state`, for a `Checkpointer`.

    It has what was prepared (models, optimizers, schedulers), what was
    registered by `register_for_checkpointing`, the scaler, the accelerator's
    step, and the generators of Python, numpy and torch.  Nothing is pickled.

    ```python
    state = {"run": AcceleratorState(accelerator)}
    done = ckpt.resume(state)
    epoch, passed = divmod(done, len(loader))
    for batch in state["run"].batches(loader, epoch, passed): …
    ```
    """

    def __init__(self, accelerator: Accelerator, types: Iterable[type] = ()) -> None:
        """Make it after `prepare`; `types` are enums and the like in what was registered."""
        self._accelerator, self._forms = accelerator, forms_of(types, TORCH_FORMS)
        self._rng: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """All parts' states at this moment; tensors are the live ones."""
        parts = {
            kind: [part.state_dict() for part in found] for kind, found in self._parts().items()
        }
        packed = pack({**parts, "step": self._accelerator.step}, self._forms)
        return {**packed, OWN: PerRank(RNG().state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give all parts their states back; the generators' wait for the first of `batches`."""
        saved = unpack(state, self._forms)
        for kind, found in self._parts().items():
            for part, one in zip(found, saved[kind], strict=True):
                part.load_state_dict(one)
        self._accelerator.step = saved["step"]
        own = state[OWN]
        self._rng = dict(own.value if isinstance(own, PerRank) else own)

    def batches(self, loader: Any, epoch: int, passed: int = 0) -> Iterator[Any]:
        """An epoch's batches without the first `passed`, which a resumed run has trained on.

        The generators are set to what was saved before the first of them that
        is trained on.  For the same order in each run, the accelerator needs
        `DataLoaderConfiguration(use_seedable_sampler=True)`.
        """
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        if not passed:
            self._set_generators()
        for batch in skip_first_batches(loader, passed) if passed else loader:
            self._set_generators()
            yield batch

    def _set_generators(self) -> None:
        if self._rng is not None:
            RNG().load_state_dict(self._rng)
            self._rng = None

    def _parts(self) -> dict[str, list[Any]]:
        one = self._accelerator
        models = [one.unwrap_model(model) for model in one._models]  # noqa: SLF001
        scaler = getattr(one, "scaler", None)
        return {
            "models": models,
            "optimizers": list(one._optimizers),  # noqa: SLF001
            "schedulers": list(one._schedulers),  # noqa: SLF001
            "registered": list(one._custom_objects),  # noqa: SLF001
            "scalers": [] if scaler is None else [scaler],
        }
