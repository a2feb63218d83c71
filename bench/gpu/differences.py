"""Saves of what has changed since the save before: what crosses the bus, and how long it takes.

`python -m bench.gpu.differences [--cache DIR]` counts what crosses, of the
peers' states too where they are kept; bytes are the same on the stand-in, which
is used where there is no GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import gpuckpt
from bench.device import NoGpuError, open_gpu, open_stand_in
from bench.gpu.scale import MIB
from bench.peers.workloads import workload
from bench.timing import show, spread

Arrays = dict[str, Any]
MODES = ("copy", "hold")
CODECS = ("auto", "delta")
_WARM_UPS = 1
_TENSORS = 16
_RATE = 2e-5  # of a fine-tuning step
_PEERS = ("trained-bf16", "trained-f32", "embedding")
_PEERS_NBYTES = 10**9


def difference_rows(directory: Path, nbytes: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Each kind of change, in each mode, with differences and without."""
    for name, make in MAKERS.items():
        for mode in MODES:
            for codec in CODECS:
                steps = make(nbytes)
                root = directory / f"{name}-{mode}-{codec}"
                yield {"change": name} | _row(root, steps, rounds, mode=mode, codec=codec)


def frozen(nbytes: int) -> Iterator[Arrays]:
    """Of sixteen float32 tensors fifteen stay as they are."""
    state = _normal(nbytes, 1)
    rng = np.random.default_rng(2)
    while True:
        yield state
        last = state["w15"]
        state = state | {"w15": last + rng.standard_normal(last.shape, np.float32)}


def fine_tuned(nbytes: int) -> Iterator[Arrays]:
    """bfloat16 weights, whose float32 ones each take a step of Adam's size, up or down."""
    whole = {name: array * np.float32(0.05) for name, array in _normal(2 * nbytes, 3).items()}
    rng = np.random.default_rng(4)
    while True:
        yield {name: array.astype(ml_dtypes.bfloat16) for name, array in whole.items()}
        for name, array in whole.items():
            steps = rng.standard_normal(array.shape, np.float32).clip(-1, 1)
            whole[name] = array - np.float32(_RATE) * steps


def adam(nbytes: int) -> Iterator[Arrays]:
    """float32 weights and Adam's moments, of one step each with other gradients."""
    weights = {f"w.{name}": array for name, array in _normal(nbytes // 3, 5).items()}
    first = {f"m.{name}": array * np.float32(1e-3) for name, array in weights.items()}
    second = {f"v.{name}": array * array * np.float32(1e-6) for name, array in weights.items()}
    rng = np.random.default_rng(6)
    while True:
        yield weights | first | second
        first, second = dict(first), dict(second)
        for name, array in weights.items():
            gradient = rng.standard_normal(array.shape, np.float32) * np.float32(1e-3)
            m = first[f"m.{name}"] * np.float32(0.9) + np.float32(0.1) * gradient
            v = second[f"v.{name}"] * np.float32(0.999) + np.float32(1e-3) * gradient * gradient
            first[f"m.{name}"], second[f"v.{name}"] = m, v
            weights = weights | {name: array - np.float32(1e-3) * m / (np.sqrt(v) + 1e-8)}


MAKERS: dict[str, Callable[[int], Iterator[Arrays]]] = {
    "one tensor of sixteen": frozen,
    "bfloat16, fine-tuned": fine_tuned,
    "float32 with Adam's moments": adam,
}


def _normal(nbytes: int, seed: int) -> Arrays:
    count, rng = max(nbytes // _TENSORS // 4, 64), np.random.default_rng(seed)
    return {f"w{at}": rng.standard_normal(count, np.float32) for at in range(_TENSORS)}


def _row(
    root: Path, steps: Iterator[Arrays], rounds: int, *, mode: str, codec: str
) -> dict[str, Any]:
    """`crossed` is a share of the state's bytes, as are all that begin so."""
    import cupy

    state = {name: cupy.asarray(_bits(array)) for name, array in next(steps).items()}
    found = []
    with gpuckpt.Checkpointer(
        root, snapshot=mode, codec=codec, memory="2 GiB", keep=gpuckpt.Keep(last=1)
    ) as ckpt:
        ckpt.save(0, state).result()
        for step in range(1, rounds + _WARM_UPS + 1):
            arrays = next(steps)
            with ckpt.update():
                for name, array in arrays.items():
                    state[name].set(_bits(array))
            pending = ckpt.save(step, state)
            pending.result()
            found.append(pending.stats)
    measured = found[_WARM_UPS:]
    return {
        "case": "difference",
        "mode": mode,
        "codec": codec,
        "state_nbytes": measured[0].raw_nbytes,
        "crossed": spread(one.brought_nbytes / one.raw_nbytes for one in measured),
        "written": spread(one.written_nbytes / one.raw_nbytes for one in measured),
        "as_differences": spread(one.delta_nbytes / one.raw_nbytes for one in measured),
        "stall_s": spread(one.stall_seconds for one in measured),
        "staged_s": spread(one.staged_seconds for one in measured),
        "durable_s": spread(one.stall_seconds + one.background_seconds for one in measured),
    }


def _bits(array: Any) -> Any:
    """What CuPy has no type for, as integers."""
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def _of_peers(name: str, cache: Path, limit: int) -> Iterator[Arrays]:
    """Two checkpoints of a peers' state, in turn; of each tensor as much as makes `limit` bytes."""
    found = workload(name, _PEERS_NBYTES, cache)
    share = min(limit / found.nbytes, 1)
    both = []
    for which in ("before", "after"):
        flat = {tensor: array.reshape(-1) for tensor, array in found.load(which).items()}
        both.append({one: array[: int(array.size * share)].copy() for one, array in flat.items()})
        del flat
    while True:
        yield from both


def main() -> int:
    """Count, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="where the peers' states are kept")
    parser.add_argument("--size", type=int, default=48 * MIB, help="bytes of each state, at most")
    options = parser.parse_args()
    try:
        open_gpu()
    except NoGpuError:
        open_stand_in()
    with tempfile.TemporaryDirectory() as name:
        for row in difference_rows(Path(name), options.size, rounds=2):
            show(row)
        for peer in _PEERS if options.cache else ():
            for codec in CODECS:
                steps = _of_peers(peer, options.cache, options.size)
                root = Path(name) / f"{peer}-{codec}"
                show({"change": peer} | _row(root, steps, 2, mode="copy", codec=codec))
    return 0


if __name__ == "__main__":
    sys.exit(main())
