"""Objects that are written from their beginning to their end: in parts, if they are long."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator, Sequence

import numpy as np

from gpuckpt.errors import CheckpointError, StorageError
from gpuckpt.stores import Buffer, Bytes
from gpuckpt.stores.clients import ClashError, Client, ClientError
from gpuckpt.stores.conditions import put_over
from gpuckpt.stores.retrying import Requests

# S3 takes parts of 5 MiB to 5 GiB, 10,000 of them; a segment has 4 GiB.
PART_NBYTES = 8 << 20


class ObjectAppender:
    """A new object, which appears when it is synced.

    What is appended is copied to a part's memory, `PART_NBYTES` of it.  A full
    part goes to a thread that hands it to the client, which sends its memory
    as it is.  One is being filled, one waits, and the client has one in its
    hand beside those that it sends at a time: with obstore's four that makes
    seven, 56 MiB, the bound on what an upload takes.  An object that fits into
    one part is put in one request, by `sync`, in the caller's thread.
    """

    def __init__(
        self, client: Client, requests: Requests, name: str, part_nbytes: int = PART_NBYTES
    ) -> None:
        """Begins nothing yet."""
        self._client, self._requests, self._name = client, requests, name
        self._part_nbytes, self._filled = part_nbytes, 0
        self._part: Bytes = np.empty(0, np.uint8)
        self._upload: _Upload | None = None
        self._given_up: StorageError | None = None
        self._closed = False
        self.offset = 0

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the thread that hands parts on; the client's own threads don't say."""
        return 0.0 if self._upload is None else self._upload.cpu_seconds

    @property
    def waiting_nbytes(self) -> int:
        """Bytes in full parts that aren't sent yet."""
        return 0 if self._upload is None else self._upload.waiting_nbytes

    def append(self, parts: Sequence[Buffer]) -> None:
        """Copy `parts`; waits for the service if too many bytes wait for it."""
        assert not self._closed, self._name
        if self._given_up is not None:
            raise self._given_up
        for part in parts:
            view = memoryview(part).cast("B")
            while view.nbytes:
                view = view[self._fill(view) :]

    def sync(self) -> None:
        """Let the object appear, whole and durable."""
        if self._given_up is not None:
            raise self._given_up
        last = self._part[: self._filled]
        if self._upload is None:
            self._put(last)
            return
        if last.nbytes:
            self._hand_on(last)
        self._part, self._filled = np.empty(0, np.uint8), 0
        self._upload.end()
        self._see()

    def close(self) -> None:
        """Undo the upload, if it wasn't synced; safe to call twice."""
        self._closed = True
        self._part = np.empty(0, np.uint8)
        if self._upload is not None:
            self._upload.give_up()

    def _fill(self, view: memoryview) -> int:
        if self._filled == self._part.nbytes:
            if self._filled:
                self._hand_on(self._part)
            # Its memory is the client's until it was sent; so each part has its own.
            self._part, self._filled = np.empty(self._part_nbytes, np.uint8), 0
        count = min(view.nbytes, self._part.nbytes - self._filled)
        room = self._part[self._filled : self._filled + count]
        np.copyto(room, np.frombuffer(view, np.uint8, count))  # without the interpreter's lock
        self._filled += count
        self.offset += count
        return count

    def _hand_on(self, part: Bytes) -> None:
        if self._upload is None:
            self._upload = _Upload(self._client, self._name)
        if not self._upload.take(part):
            self._see()

    def _see(self) -> None:
        """See whether the upload went well.

        The answer to its last request may have been lost, so that the next was
        told that there is no such upload.  Nobody else writes an object of this
        name; where it appears whole or not at all, its length is proof.
        """
        assert self._upload is not None
        failure = self._upload.failure
        if failure is None:
            return
        lost = isinstance(failure, ClientError) and self._upload.ended and self._client.whole
        if lost and self._is_there():
            return
        self._given_up = StorageError(
            f"can't write {self._requests.place(self._name)}: {failure}; see whether the service "
            "and the network are up, and save again"
        )
        raise self._given_up from failure

    def _is_there(self) -> bool:
        try:
            nbytes, _ = self._requests.run(
                "read", self._name, lambda: self._client.head(self._name)
            )
        except CheckpointError:
            return False
        return nbytes == self.offset

    def _put(self, data: Bytes) -> None:
        try:
            put_over(self._client, self._requests, self._name, data.tobytes(), "nothing")
        except ClashError as error:
            where = self._requests.place(self._name)
            raise StorageError(f"can't create {where}: it exists") from error


class _Upload:
    """A thread in which the client takes parts, one after the other, as they come."""

    def __init__(self, client: Client, name: str) -> None:
        self.failure: BaseException | None = None
        self.ended, self.cpu_seconds = False, 0.0
        self._client, self._name = client, name
        self._known: list[weakref.ref[Bytes]] = []
        self._next: Bytes | None = None
        self._given_up, self._over = False, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="gpuckpt-upload", daemon=True)
        self._thread.start()

    @property
    def waiting_nbytes(self) -> int:
        """Bytes in parts whose memory is still in use."""
        parts = [ref() for ref in tuple(self._known)]
        return sum(part.nbytes for part in parts if part is not None)

    def take(self, part: Bytes) -> bool:
        """Wait until the part before was taken, then leave this one; False if all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._next is None or self._over)
            if self._over:
                return False
            self._next = part
            self._known = [ref for ref in self._known if ref() is not None]
            self._known.append(weakref.ref(part))
            self._changed.notify_all()
        return True

    def end(self) -> None:
        """There are no more parts: wait until the object is there, or it failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._next is None or self._over)
            self.ended = True
            self._changed.notify_all()
        self._thread.join()

    def give_up(self) -> None:
        """Wait until the upload is undone, if it hasn't ended."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        begun = time.thread_time()
        try:
            self._client.put_parts(self._name, self._parts())
        except BaseException as error:
            self.failure = error
        with self._changed:
            self._over, self._next = True, None
            self._changed.notify_all()
        self.cpu_seconds = time.thread_time() - begun

    def _parts(self) -> Iterator[Bytes]:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._next is not None or self.ended or self._given_up
                )
                if self._given_up:
                    raise _GivenUpError
                part, self._next = self._next, None
                self._changed.notify_all()
            if part is None:
                return
            yield part
            del part


class _GivenUpError(Exception):
    """An upload that its writer doesn't want any more."""
