"""JAX: pytrees saved in the background, and restored as new trees (docs/guides/jax.md).

```python
import gpuckpt.jax

with gpuckpt.jax.Checkpointer("runs/a", every=gpuckpt.Every(steps=100)) as ckpt:
    done, state = ckpt.resume(state)
```
"""

from gpuckpt.adapters.jax import Checkpointer, load, restore, resume, save, step

__all__ = ["Checkpointer", "load", "restore", "resume", "save", "step"]
