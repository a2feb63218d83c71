"""`python -m bench.training.expected [RUN…]`: what is more likely than what was.

States of Adam, some steps apart, are coded as gpuckpt codes deltas, but with what
a rule makes of earlier checkpoints, and of other tensors of the same one, in
place of the base, or in place of both.  A line for each rule: the bytes of
parameters and both moments, against those of plain deltas (ADR 0030).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from bench.peers.cache import octets
from bench.training.cases import all_runs
from bench.training.runs import FULL, Array, Run, State
from gpuckpt.arena import AREAS, Slot
from gpuckpt.coding import choose_by_entropy, encode
from gpuckpt.deltacoding import encode_delta

CHUNK_NBYTES = 4 << 20
# The state in the middle, and those so many steps before and after it.
AT, APART = 100, (1, 10, 100)
WARMUP = 60
# Of each run: its parameters' names begin so, and how fast its second moments decay.
RUNS = {"adam-f32": ("model.", 0.99), "tune": ("trained.encoder.layer.0.", 0.999)}
MOMENTS = ("exp_avg.", "exp_avg_sq.")


class Three(NamedTuple):
    """float32 each, one after the other: parameters, and Adam's moments."""

    p: Array
    m: Array
    v: Array


class Look(NamedTuple):
    """What a rule may look at: the checkpoint to code, that before, and the one before that."""

    now: Three
    old: Three
    older: Three
    decay: float  # of v, over the steps between


# What is coded, and the base that it is coded from.
Rule = Callable[[Look], tuple[Array, Array]]


def main() -> None:
    """Train, and print a table for each run."""
    parser = argparse.ArgumentParser("python -m bench.training.expected", description=__doc__)
    parser.add_argument("runs", nargs="*", default=[], help=", ".join(RUNS))
    wanted = parser.parse_args().runs or list(RUNS)
    for run in all_runs():
        if run.name in wanted and run.name in RUNS:
            for line in _table(run):
                print(line, flush=True)


def _table(run: Run) -> Iterator[str]:
    states = _states(run)
    looks = [
        Look(states[AT + by], states[AT], states[AT - by], RUNS[run.name][1] ** by) for by in APART
    ]
    plain = [[delta_nbytes(one, two) for one, two in zip(*look[:2], strict=True)] for look in looks]
    yield f"| {run.name} | {' | '.join(f'{by} apart' for by in APART)} |"
    yield "| --- | " + " | ".join("---" for _ in APART) + " |"
    ratios = [
        ", ".join(f"{one.nbytes / nbytes:.2f}" for one, nbytes in zip(look.now, some, strict=True))
        for look, some in zip(looks, plain, strict=True)
    ]
    yield f"| plain deltas of p, m, v: state over bytes | {' | '.join(ratios)} |"
    for name, (part, rule) in RULES.items():
        cells = []
        for look, some in zip(looks, plain, strict=True):
            nbytes = delta_nbytes(*rule(look))
            cells.append(f"{100 * (nbytes - some[part]) / sum(some):+.1f} %")
        yield f"| {name} | {' | '.join(cells)} |"


def _states(run: Run) -> dict[int, Three]:
    """Those that are looked at, by steps since the first."""
    wanted = {AT, *(AT + by for by in APART), *(AT - by for by in APART)}
    scale = replace(FULL, warmup=WARMUP, intervals=(1,), saves=(max(wanted) + 1,))
    return {
        step: _three(state, RUNS[run.name][0])
        for step, state in enumerate(run.begin(scale))
        if step in wanted
    }


def _three(state: State, begin: str) -> Three:
    names = [name for name in state if name.startswith(begin)]
    _, _, rest = begin.partition(".")
    parts = [names] + [[name for name in state if name.startswith(part + rest)] for part in MOMENTS]
    return Three(*(np.concatenate([state[name].ravel() for name in some]) for some in parts))


def delta_nbytes(now: Array, base: Array) -> int:
    """What gpuckpt writes of `now`: a delta from `base`, or whole if that is less."""
    width, total = now.itemsize, 0
    slot, spare = (Slot(*np.empty((AREAS, CHUNK_NBYTES), np.uint8)) for _ in range(2))
    for at in range(0, now.nbytes, CHUNK_NBYTES):
        raw, before = (octets(one)[at : at + CHUNK_NBYTES] for one in (now, base))
        ways = (
            encode_delta(raw, before, width, slot, spare).planes,
            encode([raw], width, slot, choose_by_entropy).planes,
        )
        total += min(sum(plane.length for plane in planes) for planes in ways)
    return total


def _fitted(now: Array, base: Array, along: Array) -> Array:
    """The point on a line from `base` that is nearest to `now`."""
    way = along.astype(np.float64)
    factor = float(way @ (now - base)) / max(float(way @ way), 1e-300)
    return (base + np.float32(factor) * along).astype(np.float32)


def _direction(three: Three) -> Array:
    direction: Array = three.m / (np.sqrt(three.v) + np.float32(1e-8))
    return direction


def _median_factor(look: Look) -> Array:
    there = (look.old.v != 0) & (look.now.v != 0)
    factor = float(np.median(look.now.v[there] / look.old.v[there]))
    return (look.old.v * np.float32(factor)).astype(np.float32)


def _median_bits(look: Look) -> Array:
    now, old = look.now.v.view(np.int32), look.old.v.view(np.int32)
    return (old + np.int32(float(np.median(now - old)))).view(np.float32)


def _decayed(look: Look) -> Array:
    return (look.old.v * np.float32(look.decay)).astype(np.float32)


def _line(now: Array, old: Array, older: Array) -> tuple[Array, Array]:
    return now, _fitted(now, old, old - older)


def _turned(*both: Array) -> tuple[Array, Array]:
    """The sign after all other bits."""
    now, old = (one.view(np.uint32) << 1 | one.view(np.uint32) >> 31 for one in both)
    return now, old


RULES: dict[str, tuple[int, Rule]] = {
    "v, decayed: the least it can be": (2, lambda look: (look.now.v, _decayed(look))),
    "v times the median factor": (2, lambda look: (look.now.v, _median_factor(look))),
    "v's bits plus their median difference": (2, lambda look: (look.now.v, _median_bits(look))),
    "v on the line through the two before": (
        2,
        lambda look: _line(look.now.v, look.old.v, look.older.v),
    ),
    "m times the best factor": (
        1,
        lambda look: (look.now.m, _fitted(look.now.m, np.zeros_like(look.old.m), look.old.m)),
    ),
    "p along m/sqrt(v) of the same checkpoint": (
        0,
        lambda look: (look.now.p, _fitted(look.now.p, look.old.p, _direction(look.now))),
    ),
    "p along m/sqrt(v) of the one before": (
        0,
        lambda look: (look.now.p, _fitted(look.now.p, look.old.p, _direction(look.old))),
    ),
    "p on the line through the two before": (
        0,
        lambda look: _line(look.now.p, look.old.p, look.older.p),
    ),
    "p turned by a bit": (0, lambda look: _turned(look.now.p, look.old.p)),
    "m turned by a bit": (1, lambda look: _turned(look.now.m, look.old.m)),
    "v turned by a bit": (2, lambda look: _turned(look.now.v, look.old.v)),
}


if __name__ == "__main__":
    main()
