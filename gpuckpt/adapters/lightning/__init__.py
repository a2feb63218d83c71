"""Lightning with gpuckpt: a `CheckpointIO` for its `ModelCheckpoint`, and a callback that resumes.

```python
from gpuckpt.adapters import lightning as gpuckpt_lightning

# ModelCheckpoint decides when; gpuckpt writes, in the background.
Trainer(plugins=[gpuckpt_lightning.CheckpointIO()])
# Or gpuckpt decides, and a run that was killed goes on at the same batch.
Trainer(callbacks=[gpuckpt_lightning.Checkpoint("runs/a", every=gpuckpt.Every(steps=300))])
```

docs/guides/lightning.md says more.
"""

from gpuckpt.adapters.needs import missing

try:
    import lightning.pytorch as _  # noqa: F401
except ImportError as error:
    raise missing("lightning", error) from error

from gpuckpt.adapters.lightning.callback import Checkpoint
from gpuckpt.adapters.lightning.io import CheckpointIO, load

__all__ = ["Checkpoint", "CheckpointIO", "load"]
