"""What must hold of any file system that a reboot finds, and how it is gone on from there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gpuckpt
from gpuckpt.commit import open_step, steps
from gpuckpt.fingerprint import checksum128
from gpuckpt.layout import manifest_name
from gpuckpt.resources import Resources
from gpuckpt.verify import verify_step
from tests.crash_histories import Life
from tests.crash_store import CrashStore, Image, Loss, Operation, Promise, losses
from tests.versions import CHUNK, version_of

RECOVERED, AFTERWARDS = 2, 3  # lives

Failures = (AssertionError, gpuckpt.CheckpointError)


class Checks:
    """Checks what reboots find, each file system once."""

    def __init__(self) -> None:
        self._resources = Resources("4 MiB", chunk_nbytes=CHUNK)
        self._found: dict[str, dict[int, int]] = {}
        self._gone_on: set[str] = set()

    @property
    def counts(self) -> dict[str, int]:
        """How many different file systems were read, and how many gone on from."""
        return {"read": len(self._found), "gone_on_from": len(self._gone_on)}

    def held(self, loss: Loss) -> Promise:
        """What was promised is there, or what would have been next; all that is visible is whole.

        Changes nothing.
        """
        found = self.found(loss.image)
        for promise in (loss.promise, loss.next):
            if all(found.get(step, -1) >= version for step, version in promise):
                return promise
        raise AssertionError(f"promised {set(loss.promise)}, found {found}")

    def found(self, image: Image) -> dict[int, int]:
        """The steps that a reader sees, each with its version, after all were checked."""
        key = _key(image)
        if key not in self._found:
            self._found[key] = self._read(image)
        return self._found[key]

    def goes_on(self, image: Image) -> None:
        """A checkpointer sweeps, finds the same, resumes, saves, and deletes; nothing is left."""
        if _key(image) in self._gone_on:
            return
        found = self.found(image)
        life = Life(CrashStore(image), AFTERWARDS)
        with life.alive(), life.open(gpuckpt.Keep(last=1), full_every=1) as run:
            assert run.ckpt.steps() == sorted(found)
            for step, version in found.items():
                assert run.resume(step) == step
                assert version_of(run.state) == version
            newest = run.resume()
            assert newest == max(found, default=0)
            run.save(newest + 1)
        store: Any = life.store
        assert steps(store) == [newest + 1]
        named = [manifest_name(newest + 1), *open_step(store).segments]
        assert store.names() == sorted(named), "something is left over"
        assert version_of(gpuckpt.load("", store=store, memory="64 MiB")) == life.version
        self._gone_on.add(_key(image))

    def lost_again(self, loss: Loss) -> Iterator[Loss]:
        """What a second loss of power leaves, while a run goes on from what the first one left."""
        store = CrashStore(loss.image)
        self._recover(store, loss)
        return losses(store.record, image=loss.image)

    def killed_and_lost(self, record: Sequence[Operation], at: int) -> Iterator[Loss]:
        """A process is killed before operation `at`; power is lost while the next one goes on.

        That one finds all that was done, of which much isn't durable.
        """
        store = CrashStore()
        for operation in record[:at]:
            store.do(operation)
        marks = [one.promise for one in record[:at] if one.kind == "promise"]
        later = [one.promise for one in record[at:] if one.kind == "promise"]
        promise = marks[-1] if marks else Promise()
        self._recover(store, Loss(store.image(), promise, later[0] if later else promise))
        return losses(store.record, at)

    def _recover(self, store: CrashStore, loss: Loss) -> None:
        """Open, resume and save twice, as a run does that was started again."""
        promise = self.held(loss)
        store.promise(promise)
        life = Life(store, RECOVERED, promise)
        with life.alive(), life.open(gpuckpt.Keep(last=1), codec="delta") as run:
            done = run.resume()
            assert done == max(self.found(loss.image), default=0)
            run.save(done + 1)
            run.save(done + 2)

    def _read(self, image: Image) -> dict[int, int]:
        store: Any = CrashStore(image)
        found = {}
        for step in steps(store):
            assert verify_step(store, step, self._resources) == [], step
            found[step] = version_of(gpuckpt.load("", step, store=store, memory="64 MiB"))
        if found:
            assert version_of(gpuckpt.load("", store=store, memory="64 MiB")) == found[max(found)]
        return found


def _key(image: Image) -> str:
    """What tells file systems apart; they themselves would fill the memory."""
    return checksum128(
        b"".join(b"%s %d " % (one.encode(), len(data)) + data for one, data in image)
    )
