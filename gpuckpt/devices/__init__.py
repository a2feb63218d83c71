"""Where tensor bytes live: the port through which the engine reaches any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from gpuckpt.arena import Slot
from gpuckpt.arrays import Tensor
from gpuckpt.errors import InvalidError, NotFoundError
from gpuckpt.plan import Plan
from gpuckpt.record import record
from gpuckpt.spec import Chunk
from gpuckpt.statistics import Statistics

Bytes = npt.NDArray[np.uint8]
# A plane of differences (`deltas`): as it is, or packed (`sparse`): a bitmap, and other bytes.
Folded = Bytes | tuple[Bytes, Bytes]
# uint16[2, width, 256]: of sampled elements' bytes, as they are and of their differences.
Histograms = npt.NDArray[np.uint16]


T_co = TypeVar("T_co", covariant=True)


@record(frozen=True, slots=True)
class Arrived:
    """A chunk on the host, in one piece or in planes, with what its device says of it.

    `planes` has one for each byte of an element, which is turned where the
    tensor's spec says so, or only one: the chunk as it is.  There are none of a
    chunk that wasn't brought since nobody wants it, and mostly none of one of
    which the planes of its difference from its base have come: `delta`, of
    elements that aren't turned.  These may lie in any part of the slot's `raw`,
    planes in its `planes`.
    """

    planes: tuple[Bytes, ...]
    fingerprint: str | None = None
    statistics: Statistics | None = None
    delta: tuple[Folded, ...] = ()
    delta_nbytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that have come, `delta_nbytes` of them for a difference."""
        return self.delta_nbytes + sum(plane.nbytes for plane in self.planes)


@record(frozen=True, slots=True)
class Piece:
    """A chunk on its way back: its bytes, how many planes it has, and the tensors to put it into.

    All of them lie on one device; the chunk begins at byte `start` of each.
    `shared` says that other pieces may be put into the same memory meanwhile,
    `turned` that the planes are of elements that are.
    """

    nbytes: int
    planes: int
    start: int
    targets: tuple[Tensor, ...]
    shared: bool = False
    turned: bool = False


class Transfer(Protocol[T_co]):
    """Work between device and host that may still be under way."""

    def wait(self) -> T_co:
        """Wait until it is done, in any thread; what came of it.  Call it once."""
        ...


class Wants(Protocol):
    """Which chunks of a snapshot must come to the host, and how, once it is known what they are."""

    def wanted(self, fingerprints: Mapping[Chunk, str]) -> frozenset[Chunk]:
        """The chunks whose bytes are wanted, of all those of a device, given what they are."""
        ...

    def base(self, chunk: Chunk) -> str | None:
        """The fingerprint of the bytes that a chunk's difference may be taken from, if it may."""
        ...

    def pays(self, chunk: Chunk, histograms: Histograms) -> bool:
        """Whether the difference is wanted in place of the chunk."""
        ...

    def rounds(self, chunk: Chunk) -> bool:
        """Whether the chunk is wanted beside its difference: others may be it, rounded."""
        ...


class Frozen(Protocol):
    """Tensors of one device as they were at one moment, until `release`."""

    @property
    def live(self) -> bool:
        """Whether it is the caller's own memory that is read, so that it must be read again."""
        ...

    def download(
        self, batch: int, slot: Slot, wants: Wants | None = None
    ) -> Transfer[Sequence[Arrived]]:
        """Begin to bring a batch of the plan to the host, all of it or what is wanted.

        They arrive in the slot or, where they are host memory already, stay
        where they are.  The first call may wait until the device knows what
        the snapshot's chunks are; what it wants is for all calls with it.  A copy
        may be downloaded once more, from its beginning, with other wants.
        """
        ...

    def peek(self, chunks: Sequence[Chunk], slot: Slot) -> list[bytes]:
        """A few bytes of some tensors, each from within its first chunk; waits for them.

        By way of the slot, which is the caller's again on return.  None of a
        tensor that would take more than a copy.  Call it before the downloads.
        """
        ...

    def reread(self, at: int, slot: Slot) -> Transfer[Sequence[str]]:
        """Begin to take the fingerprints of chunks, by one of the plan's `rereads`, once more."""
        ...

    def order_update(self) -> None:
        """Order what the caller's stream does next after all reads of live memory.

        Call it in the caller's thread.  Waits on the host only as long as the
        implementation says.
        """
        ...

    def bring(self, wants: Wants | None = None) -> None:
        """Begin to bring to the host what has host memory of its own.

        May wait until the device knows what the snapshot's chunks are.  Give
        it what downloads are given, and call it before them, or not at all.
        """
        ...

    def settle(self) -> bool:
        """Wait until a copy has been made, and let go of what it was made from.

        So if all was brought.  Whether nothing of the caller's is read any more.
        """
        ...

    def end_downloads(self) -> None:
        """Say that no more downloads and rereads will begin."""
        ...

    def release(self) -> None:
        """Let go of memory and of references; call it once all transfers have been waited for."""
        ...


class Upload(Protocol):
    """Chunks to be brought to a device: first fill the `rooms`, then `start`."""

    @property
    def rooms(self) -> Sequence[Sequence[Bytes]]:
        """For each chunk where its planes belong, or one room for all its bytes."""
        ...

    @property
    def wants_fingerprints(self) -> bool:
        """Whether `start` wants those of the chunks' rooms, one each, and takes none itself."""
        ...

    def start(self, known: Sequence[str | None] = ()) -> Transfer[Sequence[Sequence[str]]]:
        """Begin; in the end, for each chunk, the fingerprint of what each target now holds.

        `known` are the rooms' fingerprints, if they are wanted and were taken.
        """
        ...


class Device(Protocol):
    """A place for tensors.  Implementations: `cpu`, `cuda`.

    Tensors are addresses, shapes and strides (see `Plan`).  Nothing here waits
    for the device but where it says so.  Raises `DeviceError` and
    `DeviceMemoryError`, no other device's own errors.
    """

    @property
    def name(self) -> str:
        """`cpu`, `cuda:0`, …."""
        ...

    @property
    def kept_nbytes(self) -> int:
        """Bytes of its memory that it keeps for copies and for chunks on their way."""
        ...

    @property
    def ahead_nbytes(self) -> int:
        """Bytes of host memory that it keeps for what is held, and brought at once."""
        ...

    def host_memory(self, nbytes: int) -> Bytes:
        """Host memory for transfers, page-locked if the device wants it; kept while referenced."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """A new, uninitialised array in C order, allocated as the caller's own are."""
        ...

    def copy_nbytes(self, plan: Plan) -> int:
        """What a copy of a plan's tensors takes."""
        ...

    def has_room(self, nbytes: int) -> bool:
        """Whether a copy that takes so much fits beside the caller's own needs."""
        ...

    def reserve(self, nbytes: int) -> None:
        """Have memory for a copy that takes `nbytes`, ready for use; it is kept."""
        ...

    def keep_bases(self, plan: Plan) -> bool:
        """Keep two copies of a plan's tensors in turn, so that one is the base of the next.

        If there is room; whether it does.  Call it while nothing is frozen.
        """
        ...

    def freeze(
        self,
        plan: Plan,
        addresses: npt.NDArray[np.uint64],
        owners: Sequence[object],
        *,
        copy: bool,
        host_nbytes: int = 0,
    ) -> Frozen:
        """Freeze a plan's tensors at this point of the caller's stream.

        `addresses` are those of all the state's tensors, and `owners` keep
        them alive: both are held only as long as they are read.  With `copy`,
        into memory that the device keeps for the next time, after which the
        caller may change the tensors at once.  Else they are read where they
        are, and the caller must order its changes by `order_update`; a device
        may take `host_nbytes` bytes of host memory, and keep them, to have
        these reads behind it soon.
        """
        ...

    def begin_uploads(self, chunk_nbytes: int) -> None:
        """Order uploads, of chunks up to this size, after what the caller's stream was given."""
        ...

    def upload(self, pieces: Sequence[Piece], slot: Slot) -> Upload:
        """Make ready to bring chunks to their targets, by way of a slot.

        The slot's `planes` and `raw` are the upload's until it has been waited for.
        """
        ...

    def finish_uploads(self) -> None:
        """Order the caller's stream after all uploads so far."""
        ...


class Done(Generic[T_co]):
    """A transfer that needs no waiting."""

    def __init__(self, result: T_co) -> None:
        self._result = result

    def wait(self) -> T_co:
        """The result."""
        return self._result


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
    try:
        from gpuckpt.devices.cuda import CudaDevice
    except ImportError as error:
        raise NotFoundError(
            f"{name} needs cupy, which can't be imported ({error}): "
            "pip install 'gpuckpt[cuda13]' (or [cuda12]), or pass device='cpu'"
        ) from error
    return CudaDevice(int(name.partition(":")[2]))
