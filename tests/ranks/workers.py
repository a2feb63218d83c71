"""What the processes of tests do: see tests/launch.py."""

from __future__ import annotations

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from gpuckpt.errors import InvalidError, RankError
from gpuckpt.groups import Group
from gpuckpt.groups.detect import as_group
from gpuckpt.groups.meeting import Meeting
from gpuckpt.stores.local import LocalStore


def keeps_the_contract(group: Group, arguments: dict[str, Any]) -> dict[str, Any]:
    """Everything that a `Group` must do, one after the other."""
    timeout = 60.0
    given = bytes([group.rank]) * group.rank
    rounds = [group.all_gather(given, what=f"round {at}", timeout=timeout) for at in range(5)]
    large = group.all_gather(bytes([group.rank]) * 300_000, what="large", timeout=timeout)
    group.barrier(what="barrier", timeout=timeout)
    meeting = cast(Meeting, group)
    chosen = meeting.decide(
        *(given, lambda told: b"%d bytes" % len(b"".join(told))), what="decided", timeout=timeout
    )
    odd = _error(group, "parts of step 301" if group.rank == 1 else "parts of step 300", timeout)
    behind = _in_a_thread(lambda: group.all_gather(given, what="in a thread", timeout=timeout))
    late = _late(group)
    group.barrier(what="the end", timeout=timeout)
    return {
        "kind": type(meeting._board).__name__,
        "rounds": [[value.hex() for value in one] for one in rounds],
        "large": [[value[0], len(value), len(set(value))] for value in large],
        "chosen": chosen.decode(),
        "odd": odd,
        "thread": [value.hex() for value in behind],
        "late": late,
    }


def loses_a_rank(group: Group, arguments: dict[str, Any]) -> dict[str, Any]:
    """One is killed between two rounds; the others go on to the second."""
    for what in ("together", "at nearly the same time"):
        group.barrier(what=what, timeout=60)
    if group.rank == arguments["killed"]:
        cast(Meeting, group).close()  # else the others may not know of the round's end
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    said = _error(group, "commit of step 300", arguments["timeout"])
    again = _error(group, "commit of step 600", arguments["timeout"])
    return {"said": said, "again": again, "seconds": time.monotonic() - begin}


def loops_in_its_framework(group: Group, arguments: dict[str, Any]) -> dict[str, Any]:
    """Meets in a thread while the main thread uses the framework's own collectives."""
    import torch
    from torch import distributed

    def meets() -> list[list[bytes]]:
        return [group.all_gather(b"x", what=f"round {at}", timeout=60) for at in range(30)]

    sums = []
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(meets)
        for at in range(50):
            one = torch.tensor([group.rank + at])
            distributed.all_reduce(one)
            sums.append(int(one))
        assert meeting.result() == [[b"x"] * group.size] * 30
    return {"sums": sums}


def meets_in_a_part(group: Group, arguments: dict[str, Any]) -> list[str] | None:
    """Ranks 1 and 3 of four make a group of their own, from what their framework has for it."""
    store = LocalStore(arguments["directory"])
    if arguments["kind"] == "torch":
        from torch import distributed

        part = distributed.new_group([1, 3])
    else:
        from mpi4py import MPI

        part = MPI.COMM_WORLD.Split(group.rank % 2)
    found = None
    if group.rank % 2:
        both = as_group(part, store=store, environment=os.environ, modules=sys.modules)
        found = [one.decode() for one in both.all_gather(b"%d" % group.rank, what="a", timeout=60)]
    group.barrier(what="a", timeout=60)
    return found


def is_refused_by_mpi(group: Group, arguments: dict[str, Any]) -> str:
    """What is said where MPI lets one thread in."""
    try:
        as_group("mpi", store=LocalStore("."), environment=os.environ, modules=sys.modules)
    except InvalidError as error:
        return str(error)
    return ""


def _late(group: Group) -> list[Any]:
    """Rank 1 comes when the others have given up; all find the same, and meet again."""
    if group.rank == 1:
        time.sleep(2.5)
    said = _error(group, "late", 60.0 if group.rank == 1 else 1.2)
    after = group.all_gather(b"x", what="after", timeout=60)
    return [said and said[0], len(after)]


def _error(group: Group, what: str, timeout: float) -> list[Any] | None:
    try:
        group.barrier(what=what, timeout=timeout)
    except RankError as error:
        return [list(error.ranks), str(error)]
    return None


def _in_a_thread(work: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()
