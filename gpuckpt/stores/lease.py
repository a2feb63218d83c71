"""The lock of an object store: an object that says who writes there, and until when.

1. Read it.  If it is somebody's, and hasn't run out, stop.
2. Put our own in its place, on the condition that it is what was read, or still isn't there.
   Of two that do so at once, one finds its condition broken.
3. Every third of its duration, put it again with a later end, on the condition that it is
   what we put last.  If it isn't, the lease is lost, and nothing is published any more.
4. Before a manifest is put, do so once more: then it was ours a moment ago.
5. In the end, put one that has run out, on the same condition.

A lease runs out by its holder's clock; whoever takes it over waits for `SKEW_SECONDS`
more by his own.  A holder that died on this machine is seen to be dead, and not waited for.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from gpuckpt.errors import CheckpointError, LockedError, NotFoundError
from gpuckpt.stores.clients import ClashError, Client, Over, Tag
from gpuckpt.stores.conditions import put_over
from gpuckpt.stores.retrying import Requests

log = logging.getLogger("gpuckpt")

LEASE_SECONDS = 60.0
# So much may two machines' clocks differ.
SKEW_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has a lease: a token that nobody else has, and words for people.

    `machine` and `process` tell whether it is a process of this machine's, and which.
    """

    token: str
    who: str
    machine: str
    process: str

    @classmethod
    def here(cls) -> Holder:
        """This process, with a new token."""
        pid = os.getpid()
        who = f"pid {pid} on {socket.gethostname()}"
        return cls(secrets.token_hex(16), who, _machine(), f"{pid} {_begun(pid)}")

    def is_dead(self) -> bool:
        """Whether it surely is: a process of this machine, and this container, that has ended."""
        if not self.machine or self.machine != _machine():
            return False
        pid, _, begun = self.process.partition(" ")
        return pid.isdecimal() and _begun(int(pid)) != begun


class Lease:
    """The lease on one root, held by this process from `take` to `give_back`."""

    def __init__(
        self, client: Client, requests: Requests, name: str, seconds: float = LEASE_SECONDS
    ) -> None:
        """`name` is the object's."""
        self._client, self._requests, self._name = client, requests, name
        self._seconds, self._holder = seconds, Holder.here()
        self._tag: Over = "nothing"
        self._end = 0.0  # by the monotonic clock
        self._lost: str | None = None
        self._mutex, self._over = threading.Lock(), threading.Event()
        self._process = os.getpid()

    def take(self) -> None:
        """Take it, and renew it from now on.

        Raises:
            LockedError: somebody else has it.
        """
        self._tag = self._free()
        try:
            self._put(self._seconds)
        except ClashError:
            self._free()  # says whose it is, if it has come to be another's just now
            raise self._locked("another writer") from None
        thread = threading.Thread(target=self._renew, name="gpuckpt-lease", daemon=True)
        thread.start()

    def check(self) -> None:
        """See that it is ours, and will be for its whole duration from now on.

        Raises:
            LockedError: it isn't.
            StorageError: nobody answers.
        """
        with self._mutex:
            if self._lost is None:
                try:
                    self._put(self._seconds)
                except ClashError as error:
                    self._lost = f"it was taken over, or removed ({error})"
            if self._lost is not None:
                raise LockedError(
                    f"{self._requests.place(self._name)}: this writer has lost its lease: "
                    f"{self._lost}; nothing was published: open the root anew"
                )

    def is_fresh(self) -> bool:
        """Whether it hasn't run out, by the clock alone."""
        return self._lost is None and time.monotonic() < self._end

    def give_back(self) -> None:
        """Let others have it at once; raises nothing: else it runs out."""
        self._over.set()
        if self._process != os.getpid():
            return  # it is our parent's
        with self._mutex:
            try:
                if self._lost is None:
                    self._put(0.0)
            except (CheckpointError, ClashError) as error:
                log.warning("a lease wasn't given back, and runs out by itself: %s", error)
            self._lost = "it was given back"

    def _renew(self) -> None:
        while not self._over.wait(self._seconds / 3):
            try:
                self.check()
            except LockedError as error:
                if not self._over.is_set():
                    log.error("%s", error)  # noqa: TRY400 - it has said all
                return
            except CheckpointError as error:
                log.warning("a lease can't be renewed just now: %s", error)

    def _free(self) -> Over:
        """What must be there when it is taken; `LockedError` if it is somebody's."""
        try:
            found, tag = self._requests.run(
                "read", self._name, lambda: self._client.get(self._name)
            )
        except NotFoundError:
            return "nothing"
        holder, ends = _read(found, self._requests.place(self._name))
        left = ends + SKEW_SECONDS - time.time()
        if holder.token == self._holder.token or not ends or left <= 0 or holder.is_dead():
            return tag
        raise self._locked(f"{holder.who}, for {left:.0f} s more unless it is renewed")

    def _locked(self, who: str) -> LockedError:
        return LockedError(
            f"{self._requests.place(self._name)}: another writer has this root ({who}); "
            "stop it or wait for it, or give this run a root of its own"
        )

    def _put(self, seconds: float) -> None:
        """Put ours, which ends in so many seconds, in the place of what must be there.

        That may be one of ours of which nobody had answered whether it was put.

        Raises:
            ClashError: something else is.
        """
        try:
            self._put_over(seconds)
        except ClashError:
            self._tag = self._ours()
            self._put_over(seconds)

    def _ours(self) -> Tag:
        """What is there, if it is ours; else raises a `ClashError`."""
        try:
            found, tag = self._requests.run(
                "read", self._name, lambda: self._client.get(self._name)
            )
            holder, _ = _read(found, self._requests.place(self._name))
        except (NotFoundError, LockedError) as error:
            raise ClashError(str(error)) from error
        if holder.token != self._holder.token:
            raise ClashError(f"it is that of {holder.who}")
        return tag

    def _put_over(self, seconds: float) -> None:
        begun = time.monotonic()
        ends = time.time() + seconds if seconds else 0.0
        data = json.dumps({**asdict(self._holder), "ends": ends, "try": secrets.token_hex(4)})
        content = data.encode("ascii")
        self._tag = put_over(self._client, self._requests, self._name, content, self._tag)
        self._end = begun + seconds


def _read(content: bytes, where: str) -> tuple[Holder, float]:
    """A lease's holder and end.

    Raises:
        StorageError: that is none.
    """
    try:
        found = json.loads(content)
        words = (found[name] for name in ("token", "who", "machine", "process"))
        return Holder(*(str(word)[:200] for word in words)), float(found["ends"])
    except (ValueError, KeyError, TypeError) as error:
        raise LockedError(
            f"{where} isn't a lease ({error}); see what it is, and remove it"
        ) from error


def _machine() -> str:
    """This boot of this machine, and this container's numbering of processes; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _begun(pid: int) -> str:
    """When a process began, in ticks since the boot; empty if it isn't there."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]
