"""Orbax's CheckpointManager with gpuckpt behind it: change one import.

```python
import gpuckpt.adapters.orbax as ocp  # was: import orbax.checkpoint as ocp

with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=3)) as m:
    m.save(step, args=ocp.args.StandardSave(state))
    state = m.restore(m.latest_step(), args=ocp.args.StandardRestore(state))
```

Orbax needn't be installed; where it is, its own `args` and options are taken
as well.  The files are gpuckpt's.  docs/guides/orbax.md says what differs.
"""

from typing import NoReturn

from gpuckpt.adapters.orbax import args, utils
from gpuckpt.adapters.orbax.manager import CheckpointManager
from gpuckpt.adapters.orbax.options import CheckpointManagerOptions

__all__ = ["CheckpointManager", "CheckpointManagerOptions", "args", "utils"]

_ADVICE = {
    "Checkpointer": "gpuckpt.jax.save and gpuckpt.jax.load, or CheckpointManager",
    "Handler": "args: StandardSave for pytrees, JsonSave for JSON",
    "Policy": "CheckpointManagerOptions: save_interval_steps, should_save_fn, max_to_keep, best_fn",
    "Args": "the sharding of the abstract tree that StandardRestore is given",
}


def __getattr__(name: str) -> NoReturn:
    """What Orbax has, and this hasn't, says what to use in its place."""
    advice = next((use for end, use in _ADVICE.items() if end in name), "gpuckpt.jax")
    raise AttributeError(f"gpuckpt.adapters.orbax has no {name}; use {advice}")
