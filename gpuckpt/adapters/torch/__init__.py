"""PyTorch: a training loop with checkpoints by a few lines, and `torch.save`'s like.

```python
import gpuckpt.torch

with gpuckpt.torch.training("runs/a", model=model, optimizer=optimizer) as run:
    while run.done < 1000:
        ...  # forward, backward, optimizer.step()
        run.step()
```

docs/guides/torch.md is the guide.
"""

from gpuckpt.adapters.torch.attaching import Attached, attach
from gpuckpt.adapters.torch.batches import Batches
from gpuckpt.adapters.torch.files import load, save
from gpuckpt.adapters.torch.modules import Model
from gpuckpt.adapters.torch.objects import Generator, Optimizer, Scheduler
from gpuckpt.adapters.torch.training import Training, training

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
