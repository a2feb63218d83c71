"""Aligned blocks of memory, and a thread that writes full ones past the page cache.

Whoever needs a block whose turn hasn't come writes it himself: the thread makes
things faster, and nothing depends on its being there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import queue
import threading
import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gpuckpt.stores.cached import write_some

log = logging.getLogger("gpuckpt")

Bytes = npt.NDArray[np.uint8]

# Offsets, lengths and addresses: a multiple of every common disk's sector.
ALIGNMENT = 4096
# Beside a loop that holds the interpreter's lock, each block costs a wait for
# it; smaller ones cost more of them.
BLOCK_NBYTES = 8 << 20
BLOCKS = 2  # one is filled while one is written
# So much of a file goes through the page cache; only more is worth memory, a
# thread, and a flush of the disk's own.
BEGIN_NBYTES = 8 << 20
# Smaller copies are over before another thread could use the interpreter.
_COPY_NBYTES = 64 << 10
# A thread that nobody ends, since a file was never closed, ends itself.
_IDLE_SECONDS = 1.0


class Holder(Protocol):
    """The file that has the blocks."""

    def give_way(self) -> None:
        """Let another file have them; raises nothing."""
        ...


@dataclass(slots=True)
class Fate:
    """What has become of a file's direct writes.

    The first error, whether the file was given up, whether they had to be
    cached, and the thread's CPU seconds.
    """

    failure: BaseException | None = None
    given_up: bool = False
    refused: bool = False
    cpu_seconds: float = 0.0


class Blocks:
    """The memory and the thread with which a store writes; one file has them at a time.

    Hold `lock` to use them.  The memory is taken at the first use and kept;
    the thread ends when no file has the blocks.
    """

    def __init__(
        self,
        block_nbytes: int = BLOCK_NBYTES,
        count: int = BLOCKS,
        begin_nbytes: int = BEGIN_NBYTES,
    ) -> None:
        """Files are written directly from `begin_nbytes` on; both sizes are aligned."""
        assert block_nbytes % ALIGNMENT == begin_nbytes % ALIGNMENT == 0
        self.begin_nbytes = begin_nbytes
        self.lock = threading.Lock()
        self.holder: Holder | None = None
        self.refused = False  # whether the file system has refused direct writes
        self.process = os.getpid()
        self._block_nbytes, self._count = block_nbytes, count
        self._blocks: list[Block] = []
        self._at = 0
        self._thread: _Thread | None = None

    @property
    def nbytes(self) -> int:
        """Host memory that is kept."""
        return sum(block.memory.size for block in self._blocks)

    @property
    def waiting_nbytes(self) -> int:
        """Bytes in full blocks that haven't been written, about: other threads go on meanwhile."""
        return sum(block.waiting_nbytes for block in self._blocks)

    def here(self) -> Blocks:
        """These, or in a forked child, which has no thread of its parent's, others like them."""
        if self.process == os.getpid():
            return self
        return Blocks(self._block_nbytes, self._count, self.begin_nbytes)

    def current(self) -> Block:
        """The block to fill; waits until what it held has been written."""
        if not self._blocks:
            memory = aligned_memory(self._count * self._block_nbytes).reshape(self._count, -1)
            self._blocks = [Block(one) for one in memory]
        block = self._blocks[self._at]
        block.settle()
        return block

    def submit(self, write: Write) -> None:
        """Let the current block be written, and go on to the next one."""
        block = self._blocks[self._at]
        block.write, block.filled = write, 0
        self._at = (self._at + 1) % self._count
        if self._thread is None or not self._thread.is_alive():
            self._thread = _Thread()
            self._thread.begin()
        self._thread.writes.put(write)

    def settle(self) -> None:
        """Wait until everything has been written or, if the file was given up, what had begun."""
        for block in self._blocks:
            block.settle()

    def end(self) -> None:
        """Nobody has the blocks any more, all of which are settled."""
        self.holder = None
        for block in self._blocks:
            block.filled = 0
        if self._thread is not None:
            self._thread.end()
            self._thread = None


class Block:
    """Memory that is filled, and then being written, in turns."""

    def __init__(self, memory: Bytes) -> None:
        """The memory is aligned, and so is its size."""
        self.memory, self.filled = memory, 0
        self.write: Write | None = None

    @property
    def full(self) -> bool:
        """Whether there is no room left."""
        return self.filled == self.memory.size

    @property
    def waiting_nbytes(self) -> int:
        """Its bytes while it is full, and not written yet."""
        write = self.write
        return 0 if write is None or write.over else write.nbytes

    def fill(self, view: memoryview) -> int:
        """Take as many bytes as there is room for; how many."""
        count = min(view.nbytes, self.memory.size - self.filled)
        room = self.memory[self.filled : self.filled + count]
        if count < _COPY_NBYTES:
            room.data[:] = view[:count]
        else:  # without the interpreter's lock
            np.copyto(room, np.frombuffer(view, np.uint8, count))
        self.filled += count
        return count

    def settle(self) -> None:
        """Wait until it isn't being written; if nobody has begun to, do it here and now."""
        if self.write is not None:
            self.write.run()
            self.write = None


class Write:
    """A block on its way to a place in a file, once, whoever runs it first."""

    def __init__(self, descriptor: int, view: memoryview, offset: int, fate: Fate) -> None:
        """Length, address and offset are aligned; `fate` is that of the file."""
        self._descriptor, self._view, self._offset = descriptor, view, offset
        self.fate = fate
        self._running, self.over = threading.Lock(), False

    @property
    def nbytes(self) -> int:
        """How many bytes there are to be written."""
        return self._view.nbytes

    def run(self) -> None:
        """Write, or wait for him who does; nothing if the file has failed or was given up."""
        with self._running:
            if self.over:
                return
            try:
                if self.fate.failure is None and not self.fate.given_up:
                    self._write()
            except Exception as error:
                self.fate.failure = error
            self.over = True

    def _write(self) -> None:
        done, direct = 0, True
        while done < self._view.nbytes:
            try:
                done += write_some(self._descriptor, [self._view[done:]], self._offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                # The file system took the flag and refuses the write, or the
                # one before stopped at an odd place.
                set_direct(self._descriptor, on=False)
                direct, self.fate.refused = False, True


class _Thread(threading.Thread):
    """Runs writes until it is given None."""

    def __init__(self) -> None:
        super().__init__(name="gpuckpt-write", daemon=False)
        self.writes: queue.SimpleQueue[Write | None] = queue.SimpleQueue()

    def begin(self) -> None:
        """Start, if a thread can be had."""
        try:
            self.start()
        except RuntimeError as error:
            log.debug("blocks are written without a thread: %s", error)

    def end(self) -> None:
        """Let it end; an interrupted start may have left it on its way."""
        self.writes.put(None)
        if self.is_alive():
            self.join()

    def run(self) -> None:
        with contextlib.suppress(queue.Empty):
            while (write := self.writes.get(timeout=_IDLE_SECONDS)) is not None:
                begun = time.thread_time()
                write.run()
                write.fate.cpu_seconds += time.thread_time() - begun


def set_direct(descriptor: int, *, on: bool) -> None:
    """Write past the page cache from now on, or through it; `OSError` where that can't be."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    flags = flags | os.O_DIRECT if on else flags & ~os.O_DIRECT
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)


def lies_in_memory(descriptor: int) -> bool:
    """Whether a file is of tmpfs, where direct writes are copies, too; only there it has seals."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def aligned_memory(nbytes: int) -> Bytes:
    """Memory that begins at a page, in huge pages where there are any."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
