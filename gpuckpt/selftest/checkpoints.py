"""Checks of whole checkpoints: kills, flipped bits, and how fast they are here."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

import gpuckpt
from gpuckpt import layout
from gpuckpt.errors import CheckpointError
from gpuckpt.resources import Resources
from gpuckpt.selftest.child import Child, state_at
from gpuckpt.selftest.verdicts import Verdict, failed, ok
from gpuckpt.stores.local import LocalStore
from gpuckpt.verify import verify_step

KILLS = 8
FLIPS = 64
TENSORS = 64
REPORT = "the files are kept: report it, with them"


def check_kills(directory: Path, kills: int = KILLS) -> Verdict:
    """A process that is killed at any moment leaves what it said is committed, or newer."""
    root, rng = directory / "kills", np.random.default_rng(7)
    committed = 0
    for _ in range(kills):
        with Child("save", str(root)) as child:
            committed = int(child.hear())
            time.sleep(rng.uniform(0.0, 0.1))
            committed = max([committed, *map(int, child.kill().split())])
        try:
            with gpuckpt.Checkpointer(root) as ckpt:
                state = {name: np.zeros_like(array) for name, array in state_at(0).items()}
                step = ckpt.resume(state)
        except CheckpointError as error:
            return failed("kill and resume", str(error), REPORT)
        whole = all(np.array_equal(state[name], one) for name, one in state_at(step).items())
        if step < committed or not whole:
            return failed(
                "kill and resume", f"step {step} after {committed}, whole: {whole}", REPORT
            )
    return ok("kill and resume", f"{kills} kills, each resumed at what was committed, or newer")


def check_flips(directory: Path, flips: int = FLIPS) -> Verdict:
    """A bit that changes anywhere in a checkpoint's files is found."""
    root, rng = directory / "flips", np.random.default_rng(7)
    gpuckpt.save(root, state_at(1), 1)
    store, resources = LocalStore(root), Resources("64 MiB")
    paths = [root / name for name in store.names() if name != layout.LOCK]
    for at in range(flips):
        path = paths[at % len(paths)]
        bit = int(rng.integers(8 * path.stat().st_size))
        _flip(path, bit)
        if not verify_step(store, 1, resources):
            return failed("bit flips", f"bit {bit} of {path.name} changed, unnoticed", REPORT)
        _flip(path, bit)
    if verify_step(store, 1, resources):
        return failed("bit flips", "the bytes that were put back aren't there", "check the disk")
    return ok("bit flips", f"{flips} of {flips} found")


def check_speed(directory: Path, nbytes: int) -> Verdict:
    """How fast a state of about `nbytes` is saved, durably, and restored."""
    rng, count = np.random.default_rng(7), nbytes // TENSORS // 4
    state = {f"w{at}": rng.standard_normal(count, np.float32) for at in range(TENSORS)}
    total, told = sum(one.nbytes for one in state.values()), []
    for codec in ("auto", "raw"):
        root = directory / f"speed-{codec}"
        with gpuckpt.Checkpointer(root, codec=codec, every=gpuckpt.Every(steps=1)) as ckpt:
            ckpt.resume(state)
            ckpt.save(1, state).result()  # takes the memory that later saves use
            for one in state.values():
                np.add(one, 1, out=one)
            begun = time.perf_counter()
            ckpt.save(2, state).result()
            saved = time.perf_counter() - begun
            begun = time.perf_counter()
            ckpt.restore(state)
            restored = time.perf_counter() - begun
        rates = f"{total / saved / 1e9:.2f} saved, {total / restored / 1e9:.2f} restored"
        told.append(f"{codec} {rates}")
    return ok("speed", f"{total / 1e6:.0f} MB, GB/s: {'; '.join(told)}")


def _flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
