"""Adam, in place: parameters and moments keep their memory for the whole run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpuckpt.demo.layers import Array


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam with a linear warm-up; what it remembers lives in the state, not here."""

    xp: Any
    rate: float = 1e-3
    warmup: int = 20  # steps
    decay1: float = 0.9
    decay2: float = 0.99
    epsilon: float = 1e-8

    def initial(self, parameters: dict[str, Array]) -> dict[str, Any]:
        """Return the optimizer's part of the state, for zero steps."""
        return {
            "exp_avg": {name: self.xp.zeros_like(array) for name, array in parameters.items()},
            "exp_avg_sq": {name: self.xp.zeros_like(array) for name, array in parameters.items()},
            "step": 0,
        }

    def update(
        self, parameters: dict[str, Array], moments: dict[str, Any], gradients: dict[str, Array]
    ) -> None:
        """Take one step down the `gradients`, whose arrays are used up."""
        moments["step"] += 1
        step = moments["step"]
        rate = self.rate * min(1.0, step / self.warmup) / (1 - self.decay1**step)
        root = (1 - self.decay2**step) ** 0.5
        for name, parameter in parameters.items():
            mean, square = moments["exp_avg"][name], moments["exp_avg_sq"][name]
            self._one(parameter, mean, square, gradients[name], rate=rate, root=root)

    def _one(
        self, p: Array, mean: Array, square: Array, g: Array, *, rate: float, root: float
    ) -> None:
        xp = self.xp
        change = xp.multiply(g, 1 - self.decay1)
        mean *= self.decay1
        mean += change
        xp.multiply(g, g, out=g)
        g *= 1 - self.decay2
        square *= self.decay2
        square += g
        xp.sqrt(square, out=g)
        g += self.epsilon * root
        xp.divide(mean, g, out=change)
        change *= rate * root
        p -= change
