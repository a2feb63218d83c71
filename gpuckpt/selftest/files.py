"""Checks of what gpuckpt asks of a file system: by the very calls that a save makes."""

from __future__ import annotations

import os
import shutil
import statistics
import threading
import time
from pathlib import Path

from gpuckpt.errors import CheckpointError, LockedError
from gpuckpt.selftest.child import Child
from gpuckpt.selftest.verdicts import Verdict, failed, note, ok
from gpuckpt.stores import read_all, write_all
from gpuckpt.stores.local import LocalStore

RENAMES = 300
SYNCS = 15
LONG_NBYTES = 24 << 20
LEAST_FREE_NBYTES = 1 << 30
LOCK_PATIENCE_SECONDS = 5.0
# No disk, and no battery-backed controller, answers sooner.
_AT_ONCE_SECONDS = 20e-6


def check_space(directory: Path) -> Verdict:
    """How much room there is."""
    free = shutil.disk_usage(directory).free
    found = f"{free / 2**30:.1f} GiB free"
    if free < LEAST_FREE_NBYTES:
        return note("space", found, "a save that finds no room fails; the last checkpoint stays")
    return ok("space", found)


def check_rename(directory: Path) -> Verdict:
    """A name that is given to another file always names a whole one, for whoever reads it."""
    store = LocalStore(directory / "rename")
    size = 64 << 10
    write_all(store, "name", bytes(size))
    seen, over = [0], threading.Event()
    torn: list[str] = []

    def read() -> None:
        while not over.is_set() and not torn:
            try:
                data = read_all(store, "name")
                if len(data) != size or data.count(data[:1]) != size:
                    torn.append(f"{len(data)} bytes, of more than one version")
            except CheckpointError as error:
                torn.append(str(error))
            seen[0] += 1

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for at in range(RENAMES):
            write_all(store, "new", bytes([at % 251 + 1]) * size)
            store.rename("new", "name")
    finally:
        over.set()
        reader.join()
    if torn:
        return failed("rename", torn[0], "a commit isn't one step here: use another file system")
    return ok("rename", f"{RENAMES} replaced a file in one step, seen by {seen[0]} reads")


def check_sync(directory: Path) -> Verdict:
    """Syncing a file and its name answers, after a time in which a disk can have done it."""
    store, times = LocalStore(directory / "sync"), []
    for at in range(SYNCS):
        begun = time.perf_counter()
        write_all(store, f"file-{at}", os.urandom(4096))
        store.sync_names()
        times.append(time.perf_counter() - begun)
    median = statistics.median(times)
    found = f"a small file is durable after {median * 1e3:.2f} ms ({max(times) * 1e3:.2f} at most)"
    if median < _AT_ONCE_SECONDS:
        return note("sync", found, "too fast for a disk: syncs may be switched off")
    return ok("sync", found)


def check_direct(directory: Path) -> Verdict:
    """A long file can be written past the page cache, and is what was written."""
    store = LocalStore(directory / "direct")
    data = os.urandom(1 << 20)
    file = store.create("long")
    try:
        for _ in range(LONG_NBYTES >> 20):
            file.append([data])
        file.sync()
    finally:
        file.close()
    if read_all(store, "long") != data * (LONG_NBYTES >> 20):
        return failed("direct writes", "other bytes came back", "check the disk and its memory")
    if store.blocks.refused:
        advice = "files go through the page cache: saves use more CPU time, and are as safe"
        return note("direct writes", "not possible here", advice)
    return ok("direct writes", f"{LONG_NBYTES >> 20} MiB came back as written")


def check_lock(directory: Path) -> Verdict:
    """A second process can't write to a root, until the first one's death."""
    store = LocalStore(directory / "lock")
    with Child("hold", store.root) as holder:
        holder.hear()
        try:
            with store.lock():
                return failed("lock", "two processes have it", "see how it is mounted")
        except LockedError:
            pass
        holder.kill()
        waited = _wait_for_lock(store)
    if waited is None:
        seconds = f"{LOCK_PATIENCE_SECONDS:g} s after its owner's death"
        return failed("lock", f"still held {seconds}", "a killed run can't be resumed by itself")
    return ok("lock", f"excludes other processes; free {waited * 1e3:.0f} ms after a kill")


def _wait_for_lock(store: LocalStore) -> float | None:
    begun = time.perf_counter()
    while (waited := time.perf_counter() - begun) < LOCK_PATIENCE_SECONDS:
        try:
            with store.lock():
                return waited
        except LockedError:
            time.sleep(0.01)
    return None
