"""The adapter for PyTorch, by its short name: `import gpuckpt.torch`."""

from gpuckpt.adapters.torch import (
    Attached,
    Batches,
    Generator,
    Model,
    Optimizer,
    Scheduler,
    Training,
    attach,
    load,
    save,
    training,
)

__all__ = [
    "Attached",
    "Batches",
    "Generator",
    "Model",
    "Optimizer",
    "Scheduler",
    "Training",
    "attach",
    "load",
    "save",
    "training",
]
