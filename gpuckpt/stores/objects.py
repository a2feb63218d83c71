"""A prefix of an object store as a `Store`, through any client that speaks the small port.

It has no rename and needs no sync: a put object is there, whole and durable,
when the service has said so, and so is its name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from gpuckpt.errors import CorruptError, LockedError, NotFoundError, StorageError
from gpuckpt.layout import LOCK
from gpuckpt.ordered import ordered_map
from gpuckpt.stores.clients import ClashError, Client, Over, PassingError, RefusedError
from gpuckpt.stores.conditions import put_over
from gpuckpt.stores.lease import LEASE_SECONDS, Lease
from gpuckpt.stores.retrying import Requests, Retries
from gpuckpt.stores.uploads import PART_NBYTES, ObjectAppender

# So much is asked for at once, and so many times at the same time, of what is longer.
RANGE_NBYTES = 16 << 20
RANGES_IN_FLIGHT = 4
# A step of a thousand ranks is two thousand objects, which one after the other take a minute.
REMOVALS_IN_FLIGHT = 16


class ObjectStore:
    """The objects below one prefix, as a `Store` that `Publishes` and `Opens`."""

    def __init__(
        self,
        client: Client,
        root: str,
        *,
        retries: Retries = Retries(),  # noqa: B008 - it is frozen
        part_nbytes: int = PART_NBYTES,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        """`root` is the URL that `open_store` would make this of."""
        self._client, self._root = client, root
        self._requests = Requests(root.partition("?")[0].rstrip("/"), retries)
        self._part_nbytes, self._lease_seconds = part_nbytes, lease_seconds
        self._lease: Lease | None = None

    @property
    def root(self) -> str:
        """Its URL."""
        return self._root

    def create(self, name: str) -> ObjectAppender:
        """Begin a new object, which must not exist; it appears when it is synced."""
        with contextlib.suppress(NotFoundError):
            self.size(name)
            raise StorageError(f"can't create {self._requests.place(name)}: it exists")
        return ObjectAppender(self._client, self._requests, name, self._part_nbytes)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[ObjectFile]:
        """An object, of which parts will be read; asks for nothing yet."""
        yield ObjectFile(self, name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on: by one request, or by several at once if it is long."""
        buffer = buffer.cast("B")
        parts = [
            (offset + at, buffer[at : at + RANGE_NBYTES])
            for at in range(0, buffer.nbytes, RANGE_NBYTES)
        ]
        if len(parts) < 2:
            for at, part in parts:
                self._read(name, at, part)
            return
        for _ in ordered_map(lambda part: self._read(name, *part), parts, workers=RANGES_IN_FLIGHT):
            pass

    def size(self, name: str) -> int:
        """Bytes in an object."""
        nbytes, _ = self._requests.run("read", name, lambda: self._client.head(name))
        return nbytes

    def remove(self, name: str) -> None:
        """Delete an object; nothing happens if it isn't there."""
        self._requests.run("remove", name, lambda: self._client.delete(name))

    def remove_all(self, names: Sequence[str]) -> None:
        """Delete objects, `REMOVALS_IN_FLIGHT` at the same time."""
        workers = min(REMOVALS_IN_FLIGHT, len(names))
        for _ in ordered_map(self.remove, names, workers=workers) if names else ():
            pass

    def names(self) -> list[str]:
        """The names of all objects directly below the prefix, sorted."""
        return sorted(self._requests.run("list", "", self._client.list))

    def sync_names(self) -> None:
        """Nothing: a name is durable when its object is."""

    def publish(self, name: str, data: bytes) -> None:
        """Put a whole object in the place of any that is there, in one step.

        The put is on the condition that nothing else has come there since it
        was looked at; so of two writers one at most has it.

        Raises:
            LockedError: the lease on this root, which this store had, is lost.
            StorageError: another writer has put something else there, or the service refused;
                if it is `maybe`, or nobody answered, it may be there all the same.
        """
        if self._lease is not None:
            self._lease.check()
        over: Over = "nothing"
        with contextlib.suppress(NotFoundError):
            _, over = self._requests.run("read", name, lambda: self._client.head(name))
        try:
            put_over(self._client, self._requests, name, data, over, check=self._check_fresh)
        except ClashError as error:
            raise StorageError(
                f"{self._requests.place(name)}: another writer has put something else there; "
                "nothing of it was changed: see that each run has a root of its own"
            ) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the root by a lease, which is renewed while it is held."""
        if self._lease is not None:
            raise LockedError(f"{self._requests.place(LOCK)}: this store has this lock already")
        lease = Lease(self._client, self._requests, LOCK, self._lease_seconds)
        lease.take()
        self._lease = lease
        try:
            yield
        finally:
            self._lease = None
            lease.give_back()

    def _check_fresh(self) -> None:
        if self._lease is not None and not self._lease.is_fresh():
            self._lease.check()

    def _read(self, name: str, offset: int, part: memoryview) -> None:
        def ask() -> bool:
            try:
                found = memoryview(self._client.get_range(name, offset, part.nbytes)).cast("B")
            except RefusedError:
                if self._ends_before(name, offset + part.nbytes):
                    return False
                raise
            if found.nbytes == part.nbytes:
                part[:] = found
                return True
            if self._ends_before(name, offset + part.nbytes):
                return False
            raise PassingError(f"{found.nbytes} bytes came of {part.nbytes} at {offset}")

        if part.nbytes and not self._requests.run("read", name, ask):
            wanted, end = offset + part.nbytes, self.size(name)
            raise CorruptError(
                self._requests.place(name), f"ends at {end}, {wanted} bytes expected"
            )

    def _ends_before(self, name: str, nbytes: int) -> bool:
        found, _ = self._client.head(name)
        return found < nbytes


class ObjectFile:
    """An object, of which parts are read, by as few requests as can be: an `Ahead` file."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        """Asks for nothing yet."""
        self._store, self._name = store, name
        self._begin, self._ahead = 0, memoryview(b"")

    def expect(self, offset: int, nbytes: int) -> None:
        """Read these bytes now, and keep them for what will be asked for."""
        room = memoryview(bytearray(nbytes))
        self._store.read_into(self._name, offset, room)
        self._begin, self._ahead = offset, room

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on."""
        at = offset - self._begin
        if at >= 0 and at + buffer.nbytes <= self._ahead.nbytes:
            buffer.cast("B")[:] = self._ahead[at : at + buffer.nbytes]
        else:
            self._store.read_into(self._name, offset, buffer)
