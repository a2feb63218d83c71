"""Children of a process that has everything loaded, from the parent's side."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

from bench.durability.child import Said, live

PATIENCE_SECONDS = 120.0


def nursery() -> ForkServerContext:
    """Where children come from: a process that has loaded all they need, and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.durability.rank", "bench.durability.warm"])
    return context


class Child:
    """A process that trains, once it is told to."""

    def __init__(
        self, context: ForkServerContext, life: Any, work: Callable[..., None] = live
    ) -> None:
        """`work` is what it does with its `life`."""
        self._heard, said = context.Pipe(duplex=False)
        go, self._go = context.Pipe(duplex=False)
        self._process = context.Process(target=work, args=(life, said, go), daemon=True)
        self._process.start()
        said.close()
        go.close()

    def go(self) -> None:
        """Let it try to take the root."""
        self._go.send(True)

    def hear(self) -> Said:
        """The next thing that it says; waits for it."""
        if not self._heard.poll(PATIENCE_SECONDS):
            raise AssertionError("a child says nothing")
        said: Said = self._heard.recv()
        return said

    def kill(self) -> None:
        """SIGKILL; `last_words` has what it had said by then."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)

    def last_words(self) -> tuple[list[Said], bool]:
        """All that it still says until it ends, and whether it was killed."""
        words: list[Said] = []
        try:
            while True:
                words.append(self.hear())
        except EOFError:
            pass
        self._process.join()
        code: Any = self._process.exitcode
        for pipe in (self._heard, self._go, self._process):
            pipe.close()
        if code not in {0, -signal.SIGKILL}:
            raise AssertionError(f"a child failed: {words[-1:]}")
        return words, code != 0
