"""Keras 3 with gpuckpt: a callback that saves a `fit`, and has it go on at the same batch.

```python
from gpuckpt.adapters import keras as gpuckpt_keras

model.fit(x, y, callbacks=[gpuckpt_keras.Checkpoint("runs/a", every=gpuckpt.Every(epochs=1))])
```

docs/guides/keras.md says more.
"""

from gpuckpt.adapters.needs import missing

try:
    import keras as _  # noqa: F401
except ImportError as error:
    raise missing("keras", error) from error

from gpuckpt.adapters.keras.callback import Checkpoint

__all__ = ["Checkpoint"]
