"""Bits flipped in memory: on the way to the disk, in what is kept for deltas, and on the way back.

A bit is flipped by who stands between two stages of a save or a restore: the
one before has handed its bytes over, the one after hasn't looked at them yet.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

import gpuckpt
from bench.durability.flip_states import (
    CHUNK_NBYTES,
    MEMORY,
    exact,
    first_state,
    some_bit,
    train,
)
from bench.durability.outcomes import FOUND, PASSED, RIGHT, Outcome
from gpuckpt import layout
from gpuckpt.commit import open_step
from gpuckpt.encoder import Encoder
from gpuckpt.reading import read_chunks
from gpuckpt.stores import Buffer
from gpuckpt.stores.local import LocalStore

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Hit:
    """A tensor or a file, and the byte of it that was flipped (of a tensor: of what passed by)."""

    name: str
    byte: int


class Flipper:
    """Flips one bit of what passes by, once, and remembers whose it was."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._lock, self._left, self._where = rng, threading.Lock(), 0, ""
        self.hit: Hit | None = None

    @contextlib.contextmanager
    def armed(self, where: str, most: int) -> Iterator[None]:
        """Inside the block, flip a bit of one of the next `most` that pass by `where`."""
        self.hit, self._where, self._left = None, where, self._rng.randint(1, most)
        try:
            yield
        finally:
            self._left = 0

    def pass_by(self, where: str, name: str, data: Bytes, start: int = 0) -> None:
        """Maybe flip a bit of these bytes, which are `name`'s from `start` on."""
        with self._lock:
            if not data.size or self._left == 0 or where != self._where:
                return
            self._left -= 1
            if self._left:
                return
            at, bit = some_bit(self._rng, 0, data.size)
            data.reshape(-1)[at] ^= bit
            self.hit = Hit(name, start + at)


class FlippingStore(LocalStore):
    """A directory whose files get what has passed by a flipper."""

    def __init__(self, root: Path, flipper: Flipper) -> None:
        super().__init__(root)
        self.flipper = flipper

    def create(self, name: str) -> Any:
        """Begin a file."""
        return _FlippingAppender(super().create(name), name, self.flipper)


class _FlippingAppender:
    def __init__(self, file: Any, name: str, flipper: Flipper) -> None:
        self._file, self._name, self._flipper = file, name, flipper

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def append(self, parts: Sequence[Buffer]) -> None:
        """Append copies, of which a bit may be flipped."""
        copies = [np.frombuffer(bytes(part), np.uint8).copy() for part in parts]
        start = self._file.offset
        for copy in copies:
            self._flipper.pass_by("disk", self._name, copy, start)
            start += copy.size
        self._file.append([copy.data for copy in copies])


class Run:
    """A training run of which each save, or each restore, has one bit flipped."""

    def __init__(self, directory: Path, codec: str, snapshot: str, rng: random.Random) -> None:
        seed = rng.randrange(2**32)
        self.rng, self.flipper = rng, Flipper(rng)
        self.state, self.numpy_rng = first_state(seed), np.random.default_rng(seed)
        self.told = f"{codec}, {snapshot}"
        self.root, self.step = directory, 0
        self.store = FlippingStore(directory, self.flipper)
        self.checkpointer = gpuckpt.Checkpointer(
            directory,
            codec=codec,
            snapshot=snapshot,
            memory=MEMORY,
            chunk_nbytes=CHUNK_NBYTES,
            keep=gpuckpt.Keep(last=1),
            store=self.store,
        )
        self.save()

    def save(self) -> None:
        """Train a step, and save it."""
        self.step += 1
        with self.checkpointer.update():
            train(self.state, self.numpy_rng)
        self.checkpointer.save(self.step, self.state).result(60)

    def judge(self, place: str, *, named: bool) -> Outcome:
        """Read the newest step: it is right, or an error names what was hit."""
        found, failure = None, None
        try:
            found = gpuckpt.load(self.root, self.step)
        except Exception as error:
            failure = error
        hit = self.flipper.hit
        if hit is None:
            return Outcome(place, PASSED, "" if failure is None else f"{self.told}: {failure}")
        fault = self._fault(hit, found, failure, named=named)
        if failure is not None:
            self.put_right()
        verdict = RIGHT if failure is None else FOUND
        return Outcome(place, verdict, fault and f"{self.told}: {hit}: {fault}")

    def _fault(self, hit: Hit, found: Any, failure: Exception | None, *, named: bool) -> str:
        """What is wrong with what was read of the newest step, or with the error; else nothing."""
        tensors = self._tensors_at(hit)
        if failure is None:
            whole = exact(found, self.state)
            return "nothing was found" if tensors else "" if whole else "the step is wrong"
        told = str(failure)
        clear = isinstance(failure, gpuckpt.CorruptError | gpuckpt.FormatError)
        clear &= hit.name.removesuffix(layout.TEMPORARY) in told
        if named or tensors:
            names = tensors or {hit.name}
            clear &= told.startswith(tuple(f"{name} {word}" for name in names for word in "i("))
        return "" if clear else f"{type(failure).__name__}: {told}"

    def _tensors_at(self, hit: Hit) -> set[str]:
        """The tensors of the newest step that are made of a byte of a segment."""
        if layout.segment_step(hit.name) is None:
            return set()
        return {
            entry.spec.name
            for entry in open_step(self.store, self.step).tensors
            for chunk in entry.chunks
            for link in chunk.links
            if link.extent.segment == hit.name
            and 0 <= hit.byte - link.extent.offset < link.extent.length
        }

    def put_right(self) -> None:
        """After damage was found, the next save refers to nothing of it, and is whole."""
        with contextlib.suppress(gpuckpt.CorruptError, gpuckpt.FormatError):
            self.checkpointer.restore(_zeros(self.state))
        self.save()
        found = gpuckpt.load(self.root, self.step)
        assert exact(found, self.state), "the save after a damaged one is damaged"

    def flipped_while_encoding(self) -> Outcome:
        """Between what was looked at and its encoding."""
        original = Encoder._known

        def known(encoder: Encoder, chunk: Any, arrived: Any, spec: Any, part: Any) -> Any:
            seen, tries = original(encoder, chunk, arrived, spec, part)
            every = [*arrived.planes, *(seen.planes or ())]
            if every:
                self.flipper.pass_by("encoder", spec.name, self.rng.choice(every))
            return seen, tries

        place = "a slot, between the look and encoding"
        with mock.patch.object(Encoder, "_known", known), self.flipper.armed("encoder", 20):
            self.save()
        return self.judge(place, named=True)

    def flipped_while_writing(self) -> Outcome:
        """Between the checksum and the disk."""
        with self.flipper.armed("disk", 12):
            self.save()
        return self.judge("encoded bytes, before they are written", named=False)

    def flipped_base(self) -> Outcome:
        """In the bytes that are kept for the next delta."""
        memory = self.checkpointer._resources.bases._memory
        with self.flipper.armed("base", 1):
            self.flipper.pass_by("base", "the base", memory)
        self.save()
        return self.judge("the base that is kept for a delta", named=False)

    def flipped_while_restoring(self) -> Outcome:
        """Between decoding and the array, which isn't contiguous: so it goes by way of a slot."""

        def read(every: Any, slot: Any, arena: Any) -> Any:
            found = read_chunks(every, slot, arena)
            for one in every:
                if np.may_share_memory(one.rooms[0], slot.raw):
                    self.flipper.pass_by("slot", one.job.entry.spec.name, one.rooms[0])
            return found

        with mock.patch("gpuckpt.restore.read_chunks", read), self.flipper.armed("slot", 1):
            outcome = self.judge("a slot, between decoding and the array", named=True)
        if outcome.verdict == RIGHT and not outcome.fault:
            return Outcome(outcome.place, RIGHT, f"{self.told}: nothing was found")
        return outcome


def flips(directory: Path, rng: random.Random) -> Iterator[Outcome]:
    """Flips without end, by codec and snapshot in turn."""
    ways = [
        (codec, mode) for codec in ("auto", "raw", "zstd", "delta") for mode in ("copy", "hold")
    ]
    runs = [Run(directory / f"{codec}-{mode}", codec, mode, rng) for codec, mode in ways]
    while True:
        for run in runs:
            kinds = [run.flipped_while_encoding, run.flipped_while_writing]
            if "delta" in run.told:
                kinds += [run.flipped_base] * 2
            kinds.append(run.flipped_while_restoring)
            yield rng.choice(kinds)()


def _zeros(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _zeros(child) for key, child in tree.items()}
    if isinstance(tree, list):
        return [_zeros(child) for child in tree]
    return np.zeros_like(tree) if isinstance(tree, np.ndarray) else tree
