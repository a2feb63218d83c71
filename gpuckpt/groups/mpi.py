"""Ranks of MPI, which meet by messages in a communicator of their own.

MPI has no place where values lie: what rank 0 puts up is sent to all, and what
others put up to rank 0, where each keeps what it hasn't looked at yet.
"""

from __future__ import annotations

import struct
import time
from typing import Any

from gpuckpt.errors import InvalidError
from gpuckpt.groups.board import Patience
from gpuckpt.groups.meeting import Meeting

_SHORTEST, _LONGEST = 0.0002, 0.05
_LENGTH = struct.Struct("<I")
# Long messages go only while both sides call MPI, and rank 0 may not call it again for long.
_SEND_SECONDS = 5.0


class MpiBoard:
    """Values that ranks send each other."""

    def __init__(self, communicator: Any, mpi: Any) -> None:
        """`communicator` is used for nothing else; `mpi` is the module `mpi4py.MPI`."""
        self._communicator, self._mpi = communicator, mpi
        self._patience = Patience(_SHORTEST, _LONGEST)
        self._values: dict[str, bytes] = {}
        self._sending: list[tuple[Any, bytes]] = []

    def put(self, key: str, value: bytes) -> None:
        """Send a value to rank 0, or from there to all.

        Waits until it has gone, 5 s at most, if this is rank 0.
        """
        communicator = self._communicator
        data = _LENGTH.pack(len(key)) + key.encode() + value
        to = range(1, communicator.size) if communicator.rank == 0 else (0,)
        self._sending += [(communicator.Isend([data, self._mpi.BYTE], rank), data) for rank in to]
        end = time.monotonic() + (_SEND_SECONDS if communicator.rank == 0 else 0.0)
        pause = _SHORTEST
        while self._sends() and time.monotonic() < end:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)

    def wait(self, key: str, timeout: float) -> bytes | None:
        """The value, once it has come; None if it hasn't in time."""
        return self._patience.wait(key, timeout, lambda: self._look(key))

    def remove(self, key: str) -> None:
        """Forget a value, if it is there."""
        self._values.pop(key, None)

    def sweep(self, run: str, session: str) -> None:
        """Nothing: what is here lives as long as the process."""

    def _look(self, key: str) -> bytes | None:
        """Each value is looked at once, and then forgotten."""
        self._sends()
        status = self._mpi.Status()
        while (found := self._communicator.Improbe(status=status)) is not None:
            data = bytearray(status.Get_count(self._mpi.BYTE))
            found.Recv([data, self._mpi.BYTE])
            begin = _LENGTH.size + _LENGTH.unpack_from(data)[0]
            self._values[data[_LENGTH.size : begin].decode()] = bytes(data[begin:])
        return self._values.pop(key, None)

    def _sends(self) -> bool:
        """Whether something is still on its way."""
        self._sending = [one for one in self._sending if not one[0].Test()]
        return bool(self._sending)


def mpi_ranks(communicator: Any = None, name: str = "gpuckpt") -> Meeting:
    """The ranks of a communicator: all of the job's, unless given.

    Every rank of it calls this at the same time, since it is duplicated; MPI
    frees the duplicate at its end.

    Raises:
        InvalidError: MPI isn't initialised, or doesn't let several threads in.
    """
    from mpi4py import MPI

    mpi: Any = MPI
    if not mpi.Is_initialized() or mpi.Is_finalized():
        raise InvalidError("MPI isn't initialised, or is finalised; call MPI.Init_thread first")
    if mpi.Query_thread() < mpi.THREAD_MULTIPLE:
        raise InvalidError(
            "saves run in a thread of their own, which needs MPI_THREAD_MULTIPLE; set "
            "mpi4py.rc.thread_level = 'multiple' before `from mpi4py import MPI`, or pass "
            "group='store'"
        )
    own = (mpi.COMM_WORLD if communicator is None else communicator).Dup()
    return Meeting(MpiBoard(own, mpi), own.rank, own.size, name)
