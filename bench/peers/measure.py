"""One peer, one workload, one process: two saves, of which the second is measured, and a restore.

The first save is of checkpoint k, so that memory that a peer keeps is there and
warm; then the state becomes k+1, in place, and that is saved and measured.
Beside a loop more are: of k, k+1, k, and so on.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.cache import AFTER, BEFORE, Arrays, Workload, octets
from bench.peers.files import forget, nbytes_below, read_all, sync_tree
from bench.peers.loops import Figures, beside, middle
from bench.peers.peer import Description, Peer
from bench.peers.process import (
    OthersWatch,
    descendants,
    memory_nbytes,
    reset_peak,
    tree_cpu_seconds,
)


def measure(
    description: Description, workload: Workload, directory: Path, loop: str = "", saves: int = 1
) -> Figures:
    """All figures of a save and a restore, or, with `loop`, of so many saves beside it.

    Raises:
        ValueError: what came back isn't bit for bit what was saved.
        Exception: whatever the peer raised.
    """
    for module in description.modules:
        importlib.import_module(module)
    arrays = workload.load(BEFORE)
    directory.mkdir()
    resident = memory_nbytes("VmRSS")
    peer = description.make(arrays, directory)

    def settle() -> None:
        if not description.syncs:
            sync_tree(directory)

    try:
        first = _first_save(peer, workload)
        if loop:
            return middle(_saves_beside(peer, workload, loop, settle, saves))
        with OthersWatch() as others:
            figures = _save(peer, resident, settle)
            figures |= _restore(peer, workload)
        return figures | {"first_blocked_s": first, "others_share": others.share}
    finally:
        peer.close()


def _saves_beside(
    peer: Peer, workload: Workload, loop: str, settle: Callable[[], None], saves: int
) -> Iterator[Figures]:
    """The state is the other one at each save, so that every byte is written."""
    for at in range(saves):
        if at:
            _change(peer, workload, BEFORE if at % 2 else AFTER)
        with OthersWatch() as others:
            figures = beside(peer, loop, 2 + at, settle)
        yield figures | {"others_share": others.share}


def _first_save(peer: Peer, workload: Workload) -> float:
    """Save k, then make the state k+1; seconds that the caller was blocked."""
    with peer.update():
        pass  # as in a loop, whose updates come before its saves
    begun = time.perf_counter()
    peer.begin(1)
    blocked = time.perf_counter() - begun
    peer.finish()
    _change(peer, workload, AFTER)
    return blocked


def _change(peer: Peer, workload: Workload, which: str) -> None:
    """Leave nothing to write of the save before, and let the state be another."""
    sync_tree(peer.directory)
    forget(peer.directory)
    with peer.update():
        workload.fill(peer.arrays, which)
    peer.changed()


def _save(peer: Peer, resident: int, settle: Callable[[], None]) -> dict[str, Any]:
    there = nbytes_below(peer.directory)
    reset_peak()
    cpu = tree_cpu_seconds()
    begun = time.perf_counter()
    peer.begin(2)
    blocked = time.perf_counter()
    with peer.update():
        free = time.perf_counter()
    peer.finish()
    finished = time.perf_counter()
    settle()
    durable = time.perf_counter()
    return {
        "blocked_s": blocked - begun,
        "free_s": free - begun,
        "finished_s": finished - begun,
        "durable_s": durable - begun,
        "cpu_s": tree_cpu_seconds() - cpu,
        "disk_nbytes": nbytes_below(peer.directory) - there,
        "peak_nbytes": memory_nbytes("VmHWM") - resident,
        "children_peak_nbytes": sum(memory_nbytes("VmHWM", pid) for pid in descendants()),
    }


def _restore(peer: Peer, workload: Workload) -> dict[str, float]:
    sync_tree(peer.directory)
    figures = {}
    for cache in ("cold", "warm"):
        with peer.update():
            for array in peer.arrays.values():
                octets(array)[:] = 0xA5
        if cache == "cold":
            forget(peer.directory)
        else:
            read_all(peer.directory)
        begun = time.perf_counter()
        restored = peer.restore(2)
        returned = time.perf_counter()
        put(restored, peer)
        ended = time.perf_counter()
        figures[f"restore_{cache}_s"] = ended - begun
        figures[f"restore_{cache}_put_s"] = ended - returned
        wrong = workload.different(restored if peer.adopts else peer.arrays, AFTER)
        if wrong:
            raise ValueError(f"{len(wrong)} tensors didn't come back as saved, {wrong[0]} first")
        del restored
    return figures


def put(restored: Arrays, peer: Peer) -> None:
    """Have the run's arrays hold what was restored.

    What isn't there yet is copied, as `load_state_dict` does; where a run goes
    on with new arrays, a byte of each page is read: to map a file isn't to
    restore it.
    """
    for name, array in peer.arrays.items():
        if peer.adopts:
            octets(restored[name])[::4096].sum()
        elif not np.shares_memory(restored[name], array):
            np.copyto(array, restored[name])
