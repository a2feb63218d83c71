"""What one training run is: the same values give the same bits."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of the model, of a batch and of the run, all of them counts."""

    steps: int = 100
    every: int = 10  # steps between two saves
    batch: int = 4  # sequences a step
    context: int = 64  # characters a sequence
    width: int = 256
    depth: int = 4
    heads: int = 4
    seed: int = 20
    threads: int = 1  # of the BLAS library: the other core is the saves', as beside a GPU
    corpus_nbytes: int = 2_000_000

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads must share the width evenly, got {self.width=}, {self.heads=}")
        if self.steps < 2 * self.every:
            raise ValueError(f"a run needs room for two saves, got {self.steps=}, {self.every=}")
        for name, value in dataclasses.asdict(self).items():
            if value < (0 if name == "seed" else 1):
                raise ValueError(f"{name} must be positive, got {value}")

    def arguments(self) -> list[str]:
        """Return the command line that `parse` reads back to these settings."""
        return [f"--{name}={value}" for name, value in dataclasses.asdict(self).items()]

    def environment(self) -> dict[str, str]:
        """Return the variables that give every BLAS library the same number of threads."""
        libraries = ("OPENBLAS", "OMP", "MKL", "BLIS", "VECLIB")
        return {f"{library}_NUM_THREADS": str(self.threads) for library in libraries}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let `parser` take an option for each of the settings."""
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)


def parse(options: argparse.Namespace) -> Settings:
    """Pick the settings out of the parsed `options`."""
    names = [field.name for field in dataclasses.fields(Settings)]
    return Settings(**{name: getattr(options, name) for name in names})
