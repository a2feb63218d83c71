"""What is measured: all of it, or next to nothing for a test."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes in bytes; `rounds` are counted, one more is run first."""

    sizes: tuple[int, ...]
    tensors: int
    counts: tuple[int, ...]
    counted_nbytes: int
    restored_counts: int
    cores: tuple[int, ...]
    cores_nbytes: int
    memory_nbytes: int
    chain_nbytes: int
    links: int
    profile_nbytes: int
    rounds: int


FULL = Scale(
    sizes=tuple(MIB << power for power in range(4, 11)),
    tensors=100,
    counts=(10, 100, 1_000, 10_000, 100_000),
    counted_nbytes=64 * MIB,
    restored_counts=10_000,
    cores=(1, 2),
    cores_nbytes=256 * MIB,
    memory_nbytes=1024 * MIB,
    chain_nbytes=32 * MIB,
    links=8,
    profile_nbytes=128 * MIB,
    rounds=5,
)
QUICK = Scale(
    sizes=(8 * MIB, 16 * MIB),
    tensors=4,
    counts=(2, 20, 40),
    counted_nbytes=8 * MIB,
    restored_counts=20,
    cores=(1,),
    cores_nbytes=8 * MIB,
    memory_nbytes=8 * MIB,
    chain_nbytes=2 * MIB,
    links=3,
    profile_nbytes=8 * MIB,
    rounds=1,
)
