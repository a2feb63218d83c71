"""Ranks that need no channel but the store of their checkpoints: they meet by records in it.

A record is a small file `ranks-<run>.<key>`, durable once it is put: a line of
JSON with its date and checksum, and the value.  One that is still being written
fails its checksum, and isn't there yet.  Records of processes that have died
can't be taken for those of others (see `roll`); rank 0 sweeps them away once all
ranks of a later run have met: those of the same name at once, others when they
are a day old.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import time
from collections.abc import Mapping

import xxhash

from gpuckpt import layout
from gpuckpt.errors import CorruptError, NotFoundError, StorageError
from gpuckpt.groups.board import Patience
from gpuckpt.groups.meeting import Meeting
from gpuckpt.stores import Store, read_all, write_all

log = logging.getLogger("gpuckpt")

VERSION = 1
_SHORTEST, _LONGEST = 0.005, 1.0
_OLD_SECONDS = 86_400.0

# Of these all ranks of a run have the same (of MASTER_ADDR and SLURM_STEP_ID they may not), and
# other runs mostly another.
_JOB = (
    *("GPUCKPT_RUN", "TORCHELASTIC_RUN_ID", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
    *("PMIX_NAMESPACE", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID"),
)


class StoreBoard:
    """Values in records of a `Store`."""

    for_threads = True

    def __init__(self, store: Store, *, list_seconds: float = 5.0) -> None:
        """The store's other files are left alone.

        A listing, each `list_seconds`, is what makes an NFS client ask its
        server again for names that weren't there.
        """
        self._store, self._list_seconds = store, list_seconds
        self._patience = Patience(_SHORTEST, _LONGEST)
        self._listed = time.monotonic()

    def put(self, key: str, value: bytes) -> None:
        """Put a value there, in the place of any that is; durable on return.

        Raises:
            StorageError: the storage refuses.
        """
        record = pack_record(value, time.time())
        for last in (False, False, True):
            try:
                write_all(self._store, _name(key), record)
                break
            except StorageError as error:
                # Several ranks may put the same key at the same moment: any of them will do.
                if last or error.errno != errno.EEXIST:
                    raise
        self._store.sync_names()

    def wait(self, key: str, timeout: float) -> bytes | None:
        """The value, once it is there; None if it isn't in time."""
        return self._patience.wait(key, timeout, lambda: self._look(key))

    def remove(self, key: str) -> None:
        """Take a value away, if it is there."""
        self._store.remove(_name(key))

    def sweep(self, run: str, session: str) -> None:
        """Take away what earlier runs left; a failure is noted in the log."""
        own, live = _name(f"{run}/"), _name(f"{run}/{session}/")
        try:
            for name in self._store.names():
                left = name.startswith(own) and not name.startswith(live)
                if left or (not name.startswith(own) and self._is_old(name)):
                    self._store.remove(name)
        except StorageError as error:
            log.warning("records of earlier runs stay: %s", error)

    def _look(self, key: str) -> bytes | None:
        if time.monotonic() - self._listed > self._list_seconds:
            self._store.names()
            self._listed = time.monotonic()
        found = self._record(_name(key))
        return None if found is None else found[1]

    def _record(self, name: str) -> tuple[float, bytes] | None:
        """A record's date and value; None if it isn't there, or not whole."""
        try:
            if self._store.size(name) > layout.RECORD_NBYTES_MAX:
                return None
            return unpack_record(read_all(self._store, name))
        except (NotFoundError, CorruptError, ValueError):
            return None
        except StorageError as error:
            if error.errno == errno.ESTALE:  # it was replaced meanwhile, on a network file system
                return None
            raise

    def _is_old(self, name: str) -> bool:
        if not name.startswith(layout.RANKS):
            return False
        found = self._record(name)
        return found is not None and time.time() - found[0] > _OLD_SECONDS


def store_ranks(
    store: Store, rank: int, size: int, environment: Mapping[str, str], name: str = "gpuckpt"
) -> Meeting:
    """Ranks that can all reach a store, and know their numbers.

    `environment` tells this run from others that use the same root at the same
    time; where no launcher's variables do, `GPUCKPT_RUN` can.
    """
    job = json.dumps([size, *(environment.get(one) for one in _JOB)])
    run = f"{name}-{hashlib.sha256(job.encode()).hexdigest()[:8]}"
    return Meeting(StoreBoard(store), rank, size, run)


def pack_record(value: bytes, date: float) -> bytes:
    """A record's bytes; `date` is in seconds since 1970."""
    head = {"gpuckpt_record": VERSION, "date": date, "check": xxhash.xxh3_128_hexdigest(value)}
    return json.dumps(head).encode() + b"\n" + value


def unpack_record(data: bytes) -> tuple[float, bytes]:
    """The inverse of `pack_record`; `ValueError` if it is none, or not whole."""
    line, newline, value = data.partition(b"\n")
    head = json.loads(line)
    try:
        date, check, version = float(head["date"]), head["check"], head["gpuckpt_record"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no record: {error!r}") from error
    if not newline or version != VERSION or check != xxhash.xxh3_128_hexdigest(value):
        raise ValueError("the record isn't whole")
    return date, value


def _name(key: str) -> str:
    return layout.RANKS + key.replace("/", ".")
