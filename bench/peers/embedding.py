"""An embedding table whose rows are learnt from real text by sparse updates, k and k+1.

A row stands for one sequence of `GRAM` bytes; two rows together predict the
byte that follows (softmax regression).  Adam touches only the rows that a
batch saw.  k is after one pass over the text, so that every row was seen; one
batch later, k+1 differs in the few rows of that batch.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.peers.cache import AFTER, BEFORE, Array, Arrays, Keep

GRAM, BACK = 6, 3
WIDTH = 128
BATCH = 8192
SYMBOLS = 256
RATE, DECAY1, DECAY2, EPSILON = 1e-2, 0.9, 0.99, 1e-8


def learn(nbytes: int, keep: Keep, batch: int = BATCH) -> dict[str, Any]:
    """Make a table that takes about `nbytes` with both its moments, and hand over k and k+1."""
    rows, nexts, count = grams(library_text(), max(2, nbytes // (3 * 4 * WIDTH)))
    table = Table.initial(count)
    generator = np.random.default_rng(20)
    order = generator.permutation(len(nexts))
    order = np.append(order, generator.choice(order, -len(order) % batch + batch))
    losses = []
    for begin in range(0, len(order), batch):
        last = begin + batch >= len(order)
        if last:
            keep(BEFORE, table.arrays())
        at = order[begin : begin + batch]
        losses.append(table.step(rows[at], nexts[at]))
        if last:
            keep(AFTER, table.arrays())
    return {
        "what": "an embedding table with sparse Adam; k+1 differs from k in one batch's rows",
        "rows": count,
        "width": WIDTH,
        "steps": len(losses),
        "rows_of_one_batch": len(np.unique(rows[at])),
        "loss_first": losses[0],
        "loss_last_10": float(np.mean(losses[-10:])),
    }


def library_text() -> npt.NDArray[np.uint8]:
    """The standard library's sources, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    return np.frombuffer(b"".join(path.read_bytes() for path in paths), np.uint8)


def grams(
    text: npt.NDArray[np.uint8], wanted: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], int]:
    """Rows int64[n, 2], next bytes uint8[n], and how many rows there are, at most `wanted`.

    Of the beginning of `text` that has `wanted` different sequences.
    """
    text = text[: 64 * wanted + 1024]
    codes = np.zeros(len(text) - GRAM, np.int64)
    for at in range(GRAM):
        codes = codes * SYMBOLS + text[at : at + len(codes)]
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    count = min(wanted, len(first))
    fit = np.sort(first)[count] if count < len(first) else len(codes)
    _, ids = np.unique(inverse[:fit], return_inverse=True)
    rows = np.stack([ids[BACK:], ids[:-BACK]], axis=1)
    return rows, text[GRAM + BACK : GRAM + fit], count


@dataclass(frozen=True, slots=True)
class Table:
    """Rows float32[count, WIDTH], the head float32[WIDTH, SYMBOLS], and moments of both."""

    rows: tuple[Array, Array, Array]
    head: tuple[Array, Array, Array]

    @classmethod
    def initial(cls, count: int) -> Table:
        """Small random numbers, and moments of zero: what the pass over the text changes."""
        generator = np.random.default_rng(7)

        def three(*shape: int) -> tuple[Array, Array, Array]:
            value = generator.standard_normal(shape, np.float32) * np.float32(0.05)
            return value, np.zeros_like(value), np.zeros_like(value)

        return cls(three(count, WIDTH), three(WIDTH, SYMBOLS))

    def arrays(self) -> Arrays:
        """By name."""
        parts = ("weight", "exp_avg", "exp_avg_sq")
        named = {"embedding": self.rows, "head": self.head}
        return {
            f"{name}.{part}": array
            for name, three in named.items()
            for part, array in zip(parts, three, strict=True)
        }

    def step(self, ids: Array, targets: Array) -> float:
        """One step of Adam on a batch; its loss."""
        count = len(targets)
        x = self.rows[0][ids[:, 0]] + self.rows[0][ids[:, 1]]
        logits = x @ self.head[0]
        logits -= logits.max(axis=1, keepdims=True)
        shares = np.exp(logits)
        shares /= shares.sum(axis=1, keepdims=True)
        at = np.arange(count)
        loss = -np.log(shares[at, targets] + 1e-12).mean()
        shares[at, targets] -= 1
        shares /= np.float32(count)
        dx = shares @ self.head[0].T
        touched, gradient = _sums(ids, dx)
        _adam(self.head, slice(None), x.T @ shares)
        _adam(self.rows, touched, gradient)
        return float(loss)


def _sums(ids: Array, dx: Array) -> tuple[Array, Array]:
    """The rows that a batch saw, once each, and the sum of the gradients of each."""
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    touched, begins = np.unique(flat[order], return_index=True)
    return touched, np.add.reduceat(dx[order // 2], begins, axis=0)


def _adam(three: tuple[Array, Array, Array], at: Any, gradient: Array) -> None:
    value, mean, square = three
    mean[at] = DECAY1 * mean[at] + (1 - DECAY1) * gradient
    square[at] = DECAY2 * square[at] + (1 - DECAY2) * gradient * gradient
    value[at] -= RATE * mean[at] / (np.sqrt(square[at]) + EPSILON)
