"""gpuckpt: checkpoints of training state, asynchronous, durable, and proven bit for bit."""

from gpuckpt._version import __version__
from gpuckpt.api import load, save
from gpuckpt.checkpointer import Checkpointer
from gpuckpt.conversion import Conversion, convert
from gpuckpt.errors import (
    AuthenticationError,
    BusyError,
    CheckpointError,
    ClosedError,
    CorruptError,
    DeviceError,
    DeviceMemoryError,
    FormatError,
    InvalidError,
    LockedError,
    MismatchError,
    NotFoundError,
    PreemptedError,
    RankError,
    StorageError,
    TornError,
    UnsupportedError,
)
from gpuckpt.groups import Alone, Group
from gpuckpt.opening import open  # noqa: A004 - `gpuckpt.open`
from gpuckpt.pending import Checkpoint, Pending
from gpuckpt.perrank import PerRank
from gpuckpt.preemption import PREEMPTED, Preemption
from gpuckpt.retention import Keep
from gpuckpt.rng import RNG
from gpuckpt.schedule import Every
from gpuckpt.sharded import Sharded
from gpuckpt.stats import Stats
from gpuckpt.tiers import Tier
from gpuckpt.tierstats import TierStats
from gpuckpt.warm import Report, warm_start

__all__ = [
    "PREEMPTED",
    "RNG",
    "Alone",
    "AuthenticationError",
    "BusyError",
    "Checkpoint",
    "CheckpointError",
    "Checkpointer",
    "ClosedError",
    "Conversion",
    "CorruptError",
    "DeviceError",
    "DeviceMemoryError",
    "Every",
    "FormatError",
    "Group",
    "InvalidError",
    "Keep",
    "LockedError",
    "MismatchError",
    "NotFoundError",
    "Pending",
    "PerRank",
    "PreemptedError",
    "Preemption",
    "RankError",
    "Report",
    "Sharded",
    "Stats",
    "StorageError",
    "Tier",
    "TierStats",
    "TornError",
    "UnsupportedError",
    "__version__",
    "convert",
    "load",
    "open",
    "save",
    "warm_start",
]
