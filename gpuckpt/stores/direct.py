"""Write to a file past the page cache, while the bytes that follow are gathered.

`O_DIRECT` takes aligned lengths at aligned offsets from aligned memory, and so
bytes are copied into blocks.  What fills none at the end goes through the page
cache, by the same descriptor: the file never has a byte that isn't its own.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from gpuckpt.stores.blocks import ALIGNMENT, Block, Blocks, Fate, Write, lies_in_memory, set_direct
from gpuckpt.stores.cached import CachedFile


class DirectFile:
    """An open file that is written directly from `offset` on, until it is flushed.

    From then on, or once another file needs the blocks, through the page cache.
    """

    def __init__(self, descriptor: int, offset: int, blocks: Blocks) -> None:
        """`descriptor` stays the caller's, who drops this and then closes it.

        `offset` is aligned.  Raises `OSError` if the file system can't write
        so, or gains nothing by it.
        """
        assert offset % ALIGNMENT == 0, offset
        if lies_in_memory(descriptor):
            raise OSError(errno.EOPNOTSUPP, "the file lies in memory")
        self._descriptor, self._blocks = descriptor, blocks
        self._fate = Fate()
        self._written = offset  # where the current block begins
        self._filled = 0
        self._cached: CachedFile | None = None
        set_direct(descriptor, on=True)
        with blocks.lock:
            if blocks.holder is not None:
                blocks.holder.give_way()
            blocks.holder = self

    @property
    def offset(self) -> int:
        """Bytes in the file, with those that wait to be written."""
        return self._cached.offset if self._cached is not None else self._written + self._filled

    @property
    def failure(self) -> BaseException | None:
        """The first error of a write, raised by whatever is called next but `drop`."""
        return self._fate.failure

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the thread that writes, so far."""
        return self._fate.cpu_seconds

    @property
    def waiting_nbytes(self) -> int:
        """Bytes in full blocks that wait or are being written."""
        return 0 if self._cached is not None else self._blocks.waiting_nbytes

    def append(self, views: Sequence[memoryview]) -> None:
        """Take bytes, one view after the other; waits only if every block is being written."""
        self._check()
        with self._blocks.lock:
            if self._cached is None and self._fate.refused:
                self._finish()
            for view in views if self._cached is None else ():
                self._fill(view)
            if self._cached is not None:
                self._cached.append(views)

    def flush(self) -> None:
        """Bring every byte to the system; raises the first error of those before."""
        self._check()
        with self._blocks.lock:
            if self._cached is None:
                self._finish()

    def drop(self) -> None:
        """Let go of the blocks; what hasn't been begun to be written, won't be.

        Raises nothing but an interrupt, and that when no write goes on any more.
        """
        self._fate.given_up = True
        first: BaseException | None = None
        while self._blocks.process == os.getpid():  # in a forked child, they are the parent's
            try:
                self._let_go()
                break
            except BaseException as error:
                first = first or error
        if first is not None:
            raise first

    def give_way(self) -> None:
        """Flush for another file, to which an error means nothing: this one will raise it."""
        try:
            self._finish()
        except Exception as error:
            self._fate.failure = self._fate.failure or error

    def _check(self) -> None:
        if self._blocks.process != os.getpid():
            raise OSError(errno.EBADF, f"process {self._blocks.process} writes it, not this one")
        if self._fate.failure is not None:
            raise self._fate.failure

    def _fill(self, view: memoryview) -> None:
        while view.nbytes:
            block = self._blocks.current()
            self._check()
            count = block.fill(view)
            self._filled += count
            if block.full:
                self._submit(block, block.memory.size)
            view = view[count:]

    def _submit(self, block: Block, nbytes: int) -> None:
        write = Write(self._descriptor, block.memory[:nbytes].data, self._written, self._fate)
        self._written += nbytes
        self._filled -= nbytes
        self._blocks.submit(write)

    def _finish(self) -> None:
        """Write what waits, and its end, which isn't aligned, through the page cache."""
        end = b""
        if self._filled:
            block = self._blocks.current()
            aligned = self._filled - self._filled % ALIGNMENT
            end = block.memory[aligned : self._filled].tobytes()
            if aligned:
                self._submit(block, aligned)
        self._blocks.settle()
        self._blocks.end()
        self._blocks.refused = self._blocks.refused or self._fate.refused
        self._check()
        set_direct(self._descriptor, on=False)
        cached = CachedFile(self._descriptor, self._written)
        cached.append([memoryview(end)] if end else [])
        self._filled, self._cached = 0, cached

    def _let_go(self) -> None:
        with self._blocks.lock:
            if self._blocks.holder is self:
                self._blocks.settle()
                self._blocks.end()
