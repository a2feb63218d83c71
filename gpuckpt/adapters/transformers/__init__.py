"""Transformers' Trainer and Accelerate's loops with gpuckpt.

```python
from gpuckpt.adapters import transformers as gpuckpt_transformers

checkpoint = gpuckpt_transformers.Checkpoint("runs/a", every=gpuckpt.Every(steps=300))
trainer = Trainer(…, callbacks=[checkpoint])
trainer.train(resume_from_checkpoint=checkpoint.resume(trainer))
```

docs/guides/transformers.md says more.
"""

from gpuckpt.adapters.needs import missing

try:
    import accelerate as _  # noqa: F401
    import transformers as __  # noqa: F401
except ImportError as error:
    raise missing("transformers", error) from error

from gpuckpt.adapters.accelerate import AcceleratorState
from gpuckpt.adapters.transformers.callback import Checkpoint

__all__ = ["AcceleratorState", "Checkpoint"]
