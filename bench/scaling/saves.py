"""Saves and restores of one state in several ways, in turn, beside the machine's limits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpuckpt
from bench.disk import drop_cache, fill_cache
from bench.scaling import limits
from bench.scaling.states import State, like
from bench.timing import spread, spreads
from gpuckpt.retention import prune

BUFFERS_NBYTES = 256 << 20
_STAGES = (
    *("inventory", "snapshot", "copy", "filter", "encode", "reread", "off_cpu", "starved"),
    *("write", "index", "sync", "manifest"),
)
Row = dict[str, float]


class Way(NamedTuple):
    """How a state is saved."""

    mode: str
    codec: str


COPIED = tuple(Way("copy", codec) for codec in ("raw", "auto", "zstd"))


def in_turn(
    directory: Path,
    state: State,
    ways: Sequence[Way],
    rounds: int,
    *,
    restored: bool = True,
    limited: bool = True,
) -> list[dict[str, Any]]:
    """A row for each way, of `rounds` rounds; in each round every way has its turn.

    `restored`: with a cold and a warm restore after each save.  `limited`:
    with memcpy, write and read of as many bytes in each round, and the ratios
    to them within a round.
    """
    nbytes = sum(array.nbytes for array in state.values())
    warm = like(state)
    found: dict[Way, list[Row]] = {way: [] for way in ways}
    with contextlib.ExitStack() as stack:
        opened = {way: stack.enter_context(_opened(directory, way, nbytes, state)) for way in ways}
        for at in range(rounds + 1):
            alone = {"memcpy_s": limits.memcpy(state, warm)}
            if limited:
                alone |= limits.write_and_read(directory / "limit.bin", nbytes)
            for way in (*ways[at % len(ways) :], *ways[: at % len(ways)]):
                row = one_save(opened[way], state, at + 1)
                if restored:
                    row |= _restores(opened[way], _root(directory, way), warm)
                    assert at or _equal(state, warm)
                found[way].append(alone | row)
    facts = {"state_nbytes": nbytes, "tensors": len(state), "rounds": rounds}
    return [facts | way._asdict() | _summary(rows[1:], nbytes) for way, rows in found.items()]


def one_save(ckpt: gpuckpt.Checkpointer, state: State, step: int) -> Row:
    """Seconds and bytes of one background save, waited for, of a state that has changed.

    Then the save before is deleted, which isn't part of it: with `keep`, a save
    ends only after that.
    """
    with ckpt.update():
        state["w0"][0] = step * 1e-3
    begun, cpu = time.perf_counter(), time.process_time()
    pending = ckpt.step(step, state)
    stalled = time.perf_counter() - begun
    assert pending is not None
    with ckpt.update():
        free = time.perf_counter() - begun
    pending.result()
    durable, cpu = time.perf_counter() - begun, time.process_time() - cpu
    stats, begun = pending.stats, time.perf_counter()
    prune(ckpt._store, gpuckpt.Keep(last=1))
    deleted = time.perf_counter() - begun
    return {
        "stall_s": stalled,
        "free_s": free,
        "durable_s": durable,
        "background_s": stats.background_seconds,
        "cpu_s": cpu,
        "delete_s": deleted,
        "written_nbytes": float(stats.written_nbytes),
        "delta_nbytes": float(stats.delta_nbytes),
        "chunks": float(stats.chunks),
        **{f"stage_{name}_s": getattr(stats, f"{name}_seconds") for name in _STAGES},
    }


@contextlib.contextmanager
def _opened(directory: Path, way: Way, nbytes: int, state: State) -> Iterator[gpuckpt.Checkpointer]:
    memory = BUFFERS_NBYTES + (nbytes if way.mode == "copy" else 0)
    with gpuckpt.Checkpointer(
        _root(directory, way),
        every=gpuckpt.Every(steps=1),
        codec=way.codec,
        snapshot=way.mode,
        memory=memory,
        full_every=1,
    ) as ckpt:
        ckpt.resume(state)
        yield ckpt


def _root(directory: Path, way: Way) -> Path:
    return directory / f"{way.mode}-{way.codec}"


def _restores(ckpt: gpuckpt.Checkpointer, root: Path, target: State) -> Row:
    drop_cache(root)
    begun = time.perf_counter()
    ckpt.restore(target)
    cold = time.perf_counter() - begun
    fill_cache(root)
    begun = time.perf_counter()
    ckpt.restore(target)
    return {"restore_cold_s": cold, "restore_warm_s": time.perf_counter() - begun}


def _equal(state: State, other: State) -> bool:
    return all((other[name] == array).all() for name, array in state.items())


def _summary(rows: Sequence[Mapping[str, float]], nbytes: int) -> dict[str, Any]:
    """Spreads, and those of ratios within a round."""
    pairs = {
        "stall_over_memcpy": ("stall_s", "memcpy_s"),
        "durable_over_write": ("durable_s", "write_s"),
        "restore_cold_over_read": ("restore_cold_s", "read_cold_s"),
        "restore_warm_over_memcpy": ("restore_warm_s", "memcpy_s"),
    }
    ratios = {
        name: spread([row[one] / row[other] for row in rows])
        for name, (one, other) in pairs.items()
        if one in rows[0] and other in rows[0]
    }
    written = spread([row["written_nbytes"] / nbytes for row in rows])
    return {**spreads(rows), **ratios, "written_over_state": written}
