"""Where tensor bytes live: the port through which the engine reaches any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpuckpt.errors import InvalidError

Bytes = npt.NDArray[np.uint8]


class Transfer(Protocol):
    """A copy between device and host that may still be under way."""

    def wait(self) -> Bytes:
        """Wait until it has been made, in any thread; its bytes on the host.  Call it once."""
        ...


class Frozen(Protocol):
    """Tensors of one device as they were at one moment, until `release`."""

    @property
    def arrays(self) -> Sequence[Any]:
        """One array for each tensor, to be handed to `Device.download`."""
        ...

    def order_update(self) -> None:
        """Order what the caller's stream does next after all reads of live memory.

        Call it in the caller's thread.  Waits on the host only as long as the
        implementation says.
        """
        ...

    def settle(self) -> None:
        """Wait until a copy has been made, and let go of what it was made from."""
        ...

    def end_downloads(self) -> None:
        """Say that no more downloads will begin."""
        ...

    def release(self) -> None:
        """Let go of memory and of references; call it once all transfers have been waited for."""
        ...


class Device(Protocol):
    """A place for tensors.  Implementations: `cpu`, `cuda`.

    Arrays are numpy's or cupy's (see `arrays.Tensor`).  Nothing here waits for
    the device but where it says so.  Raises `DeviceError` and
    `DeviceMemoryError`, no other device's own errors.
    """

    @property
    def name(self) -> str:
        """`cpu`, `cuda:0`, …."""
        ...

    def host_memory(self, nbytes: int) -> Bytes:
        """Host memory for transfers, page-locked if the device wants it; kept while referenced."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """A new, uninitialised array in C order, allocated as the caller's own are."""
        ...

    def room(self) -> int:
        """Bytes of its memory that a copy of the state may take, beside what it already keeps."""
        ...

    def reserve(self, nbytes: int) -> None:
        """Have memory for copies of `nbytes` in all, ready for use; it is kept."""
        ...

    def freeze(self, arrays: Sequence[Any], *, copy: bool) -> Frozen:
        """Freeze `arrays` at this point of the caller's stream.

        With `copy`, into memory that the device keeps for the next time, after
        which the caller may change them at once.  Else they are read where
        they are, and the caller must order its changes by `order_update`.
        """
        ...

    def download(self, array: Any, start: int, slot: Bytes) -> Transfer:
        """Begin to copy bytes `start` … of a frozen array, in C order, to the host.

        They arrive in `slot`, whose length says how many, or, where the frozen
        array is host memory already, stay where they are.
        """
        ...

    def begin_uploads(self) -> None:
        """Order uploads after what the caller's stream has been given so far."""
        ...

    def upload(self, data: Bytes, array: Any, start: int) -> Transfer:
        """Begin to copy `data` to bytes `start` … of `array`, in C order.

        `data` stays as it is until the transfer has been waited for.
        """
        ...

    def finish_uploads(self) -> None:
        """Order the caller's stream after all uploads so far."""
        ...


class Done:
    """A transfer that needs no waiting."""

    def __init__(self, data: Bytes) -> None:
        self._data = data

    def wait(self) -> Bytes:
        """The bytes."""
        return self._data


class Devices:
    """The devices that one user of the engine has opened, by name."""

    def __init__(self) -> None:
        self._open: dict[str, Device] = {}

    def __getitem__(self, name: str) -> Device:
        """The device called `name`, opened if this is its first use.

        Raises:
            NotFoundError: there is no such device on this machine.
        """
        if name not in self._open:
            self._open[name] = _open(name)
        return self._open[name]


def parse_name(name: str) -> str:
    """`cuda` as `cuda:0`; any other valid name as it is."""
    kind, _, ordinal = name.partition(":")
    if name == "cpu":
        return name
    if kind == "cuda" and (ordinal.isdecimal() or ordinal == ""):
        return f"cuda:{int(ordinal or 0)}"
    raise InvalidError(f"a device is 'cpu', 'cuda' or 'cuda:<n>', got {name!r}")


def _open(name: str) -> Device:
    name = parse_name(name)
    if name == "cpu":
        from gpuckpt.devices.cpu import CpuDevice

        return CpuDevice()
    from gpuckpt.devices.cuda import CudaDevice

    return CudaDevice(int(name.partition(":")[2]))
