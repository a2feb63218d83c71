"""torch.distributed.checkpoint (DCP) with gpuckpt as its storage: change one argument.

```python
from gpuckpt.adapters import dcp as gpuckpt_dcp

dcp.save(state, storage_writer=gpuckpt_dcp.StorageWriter("runs/a/step-300"))
dcp.load(state, storage_reader=gpuckpt_dcp.StorageReader("runs/a/step-300"))
```

docs/DCP.md says what is where.
"""

from gpuckpt.adapters.dcp.reader import StorageReader
from gpuckpt.adapters.dcp.writer import StorageWriter

__all__ = ["StorageReader", "StorageWriter"]
