"""How large and how often: for a GPU, and for a look at whether everything runs."""

from __future__ import annotations

from dataclasses import dataclass

MIB, GIB = 1 << 20, 1 << 30
STATE_NBYTES_MAX = 8 * GIB
_STATES = (64 * MIB, 512 * MIB, 4 * GIB)


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes are bytes; a round is one figure, and `warm_ups` of them aren't counted.

    `copy_nbytes` and `disk_nbytes` are copied, written and read to find the
    limits, `pieces_nbytes` the lengths of single copies between host and
    device.  A step of the training loop takes about `step_seconds`, on
    matrices of `step_side`²; `steps` of them are timed without a save.
    `memory_nbytes` of host memory come on top of a state that is saved,
    `slots_nbytes` are too few for any.
    """

    rounds: int
    warm_ups: int
    copy_nbytes: int
    disk_nbytes: int
    pieces_nbytes: tuple[int, ...]
    kernel_nbytes: int
    states_nbytes: tuple[int, ...]
    few: int
    many: int
    step_seconds: float
    step_side: int
    steps: int
    memory_nbytes: int
    slots_nbytes: int

    def rounds_of(self, nbytes: int) -> int:
        """Fewer of what takes long."""
        return self.rounds if nbytes < 2 * GIB else max(self.rounds // 2, 3)


TINY = Scale(
    rounds=2,
    warm_ups=1,
    copy_nbytes=1 << 18,
    disk_nbytes=1 << 18,
    pieces_nbytes=(1 << 16,),
    kernel_nbytes=1 << 18,
    states_nbytes=(1 << 18,),
    few=2,
    many=8,
    step_seconds=0.001,
    step_side=64,
    steps=2,
    memory_nbytes=64 * MIB,
    slots_nbytes=48 * MIB,
)


def full(device_free_nbytes: int, disk_free_nbytes: int) -> Scale:
    """For a GPU with so much free memory: two fifths of it at most are a state, beside its copy.

    The disk has to hold a state three times: two steps, and plain bytes.
    """
    room = min(device_free_nbytes * 2 // 5, disk_free_nbytes // 3, STATE_NBYTES_MAX)
    states = [nbytes for nbytes in _STATES if nbytes < room]
    return Scale(
        rounds=9,
        warm_ups=2,
        copy_nbytes=min(GIB, device_free_nbytes // 4),
        disk_nbytes=min(GIB, disk_free_nbytes // 3),
        pieces_nbytes=(1 * MIB, 4 * MIB, 16 * MIB, 64 * MIB),
        kernel_nbytes=min(GIB, device_free_nbytes // 8),
        states_nbytes=(*states, room // MIB * MIB),
        few=16,
        many=3000,
        step_seconds=0.010,
        step_side=4096,
        steps=50,
        memory_nbytes=2 * GIB,
        slots_nbytes=256 * MIB,
    )
