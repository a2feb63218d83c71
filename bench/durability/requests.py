"""Every request of a few saves, a prune and a restore on S3, struck by each fault in turn.

Each time a run goes on from step 1, saves steps 2 and 3, deletes what it
doesn't keep, and restores, through a proxy that does one thing to one request:
see `bench.durability.proxy`.  And once more with the service gone for good
from each request on.  Then what is there is looked at without the proxy: the
last step that was said to be durable, or a later one, is there, bit for bit;
every step is whole; and after the next save nothing is left over.

`python -m bench.durability requests [--every N]` takes every Nth of them;
`--count` only counts the requests of a run that nothing strikes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import gpuckpt
from bench.durability.endpoints import BUCKET, PART_NBYTES, Endpoint, environment, moto
from bench.durability.proxy import Choose, Fault, Proxy, proxy_to
from gpuckpt.commit import open_step, steps
from gpuckpt.layout import LOCK, manifest_name
from gpuckpt.resources import Resources
from gpuckpt.stores.objects import ObjectStore
from gpuckpt.stores.over_obstore import open_client
from gpuckpt.stores.retrying import Retries
from gpuckpt.verify import verify_step

State = dict[str, Any]
MEMORY = "64 MiB"
# As patient as it must be, without waiting long.
RETRIES = Retries(tries=4, first_seconds=0.001, most_seconds=0.01)
# So that a request that is never answered costs little.
TIMEOUT = "timeout=700ms"


def state_at(step: int) -> State:
    """A state that takes an upload of three parts, some of which never changes."""
    numbers = np.random.default_rng(step).standard_normal(40_000).astype(np.float32)
    frozen = np.random.default_rng(0).standard_normal(4_000).astype(np.float32)
    return {"numbers": numbers, "frozen": frozen, "few": np.arange(4) * step, "step": step}


def same(one: State, other: State) -> bool:
    """Whether two states are one, bit for bit."""
    arrays = all(np.array_equal(one[key], other[key]) for key in ("numbers", "frozen", "few"))
    return arrays and one["step"] == other["step"]


@dataclass(slots=True)
class Outcome:
    """What came of one run: the last step said to be durable, what it raised, what was wrong."""

    told: int = 1
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


class Campaign:
    """Runs on one service, each in a root of its own."""

    def __init__(self, endpoint: Endpoint, proxy: Proxy) -> None:
        """The proxy leads to the endpoint."""
        self._endpoint, self._proxy, self._number = endpoint, proxy, itertools.count()

    def run(self, choose: Choose) -> Outcome:
        """Do it once, with what `choose` says becoming of the requests."""
        root = f"s3://{BUCKET}/run-{next(self._number)}?{TIMEOUT}"
        direct, struck = self.store(root, self._endpoint.url), self.store(root, self._proxy.url)
        gpuckpt.save("", state_at(1), 1, store=direct, codec="raw", memory=MEMORY)
        outcome = Outcome()
        self._proxy.arm(choose)
        try:
            _train(struck, outcome, lambda what: outcome.ends.update({what: self.count}))
        except gpuckpt.CheckpointError as error:
            outcome.errors.append(f"{type(error).__name__}: {error}")
        outcome.requests = list(self._proxy.asked)
        self._proxy.arm(lambda _: None)
        outcome.wrong += _found_wrong(direct, outcome.told)
        return outcome

    @property
    def count(self) -> int:
        """How many requests there have been in this run."""
        return len(self._proxy.asked)

    def store(self, root: str, url: str) -> ObjectStore:
        """A root through one URL or the other."""
        with environment({**self._endpoint.environment, "AWS_ENDPOINT_URL": url}):
            client = open_client(root, RETRIES)
        return ObjectStore(client, root, retries=RETRIES, part_nbytes=PART_NBYTES)


def _train(store: ObjectStore, outcome: Outcome, ends: Callable[[str], object]) -> None:
    options: Any = {"keep": gpuckpt.Keep(last=1), "codec": "raw", "memory": MEMORY}
    with gpuckpt.Checkpointer("", store=store, **options) as ckpt:
        ends("open")
        for step in (2, 3):
            try:
                ckpt.save(step, state_at(step)).result()
                outcome.told = step
                ckpt.wait()
            except gpuckpt.CheckpointError as error:
                outcome.errors.append(f"step {step}: {type(error).__name__}: {error}")
            with contextlib.suppress(gpuckpt.CheckpointError):
                ckpt.wait()
            ends(f"save {step}")
        state = state_at(1)
        done = ckpt.resume(state)
        ends("resume")
        if done < outcome.told or not same(state, state_at(done)):
            outcome.wrong.append(f"resumed with {done} after {outcome.told}, or other bytes")


def _found_wrong(store: ObjectStore, told: int) -> Iterator[str]:
    """What isn't as it should be in a root that nobody writes to any more."""
    found = steps(store)
    if max(found, default=0) < told:
        yield f"step {told} is gone: {found}"
        return
    for step in found:
        yield from (f"step {step}: {one}" for one in verify_step(store, step, Resources(MEMORY)))
        if not same(gpuckpt.load("", step, store=store, memory=MEMORY), state_at(step)):
            yield f"step {step} isn't what was saved"
    store.remove(LOCK)  # as if it had run out
    options: Any = {"keep": gpuckpt.Keep(last=1), "memory": MEMORY}
    with gpuckpt.Checkpointer("", store=store, **options) as ckpt:
        ckpt.save(9, state_at(9)).result()
    wanted = {LOCK, manifest_name(9), *open_step(store, 9).segments}
    if set(store.names()) != wanted:
        yield f"left over: {set(store.names()) ^ wanted}"


def at(index: int, fault: Fault) -> Choose:
    """One request is struck."""
    return lambda number: fault if number == index else None


def from_there(index: int, fault: Fault) -> Choose:
    """So are all from one on: the service is gone."""
    return lambda number: fault if number >= index else None


@contextlib.contextmanager
def campaign() -> Iterator[Campaign]:
    """A campaign on moto's server."""
    with moto() as endpoint, proxy_to(endpoint.url) as proxy:
        yield Campaign(endpoint, proxy)


def plans(count: int) -> list[tuple[str, Choose]]:
    """Each request, of so many, with each fault; then the service gone from each on."""
    one = [
        (f"request {index} {fault}", at(index, fault)) for index in range(count) for fault in Fault
    ]
    gone = [
        (f"from request {index} on {fault}", from_there(index, fault))
        for index in range(count)
        for fault in (Fault.BUSY, Fault.LOST)
    ]
    return one + gone


def kinds(outcome: Outcome) -> dict[str, Counter[str]]:
    """The requests of each stage of a run, by their kinds."""
    begin, found = 0, {}
    for stage, end in [*outcome.ends.items(), ("close", len(outcome.requests))]:
        found[stage] = Counter(map(_kind, outcome.requests[begin:end]))
        begin = end
    return found


def _kind(request: str) -> str:
    method, _, place = request.partition(" ")
    path, _, query = place.partition("?")
    what = "list" if "list-type" in query else path.rpartition(".")[2].rpartition("/")[2]
    how = {"uploads=": " (begin)", "delete": " (delete)"}.get(query, "")
    how = " (part)" if "partNumber" in query else " (end)" if query.startswith("uploadId") else how
    return f"{method} {what}{how}"


def main(words: list[str]) -> int:
    """Run them, and say what was found; 1 if anything was wrong."""
    parser = argparse.ArgumentParser("python -m bench.durability requests", description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--count", action="store_true")
    given = parser.parse_args(words)
    begun, tally = time.monotonic(), Counter[str]()
    with campaign() as runs:
        clean = runs.run(lambda _: None)
        requests = clean.requests
        if given.count:
            for stage, found in kinds(clean).items():
                print(f"{stage}: {found.total()}: {dict(found)}")
            return 0
        chosen = plans(len(requests))[:: given.every]
        for name, choose in chosen:
            outcome = runs.run(choose)
            tally["raised an error" if outcome.errors else "went on"] += 1
            for wrong in outcome.wrong:
                tally["WRONG"] += 1
                print(f"{name}: {wrong}")
    seconds = time.monotonic() - begun
    print(f"{len(requests)} requests, {len(chosen)} runs in {seconds:.0f} s: {dict(tally)}")
    return 1 if tally["WRONG"] else 0
