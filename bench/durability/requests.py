"""Every request of a few saves, a prune and a restore on S3, struck by each fault in turn.

Each time a run goes on from step 1, saves steps 2 and 3, deletes what it
doesn't keep, and restores, through a proxy that does one thing to one request:
see `bench.durability.proxy`.  And again with the service gone from each request
on, for longer than one is tried, or for good.  Then what is there is looked at
without the proxy: the last step that was said to be durable, or a later one, is there, bit for bit;
every step is whole; and after the next save nothing is left over.

`python -m bench.durability requests [--every N]` takes every Nth of them;
`--count` only counts the requests of a run that nothing strikes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import gpuckpt
from bench.durability.endpoints import BUCKET, PART_NBYTES, Endpoint, environment, moto
from bench.durability.proxy import Choose, Fault, Proxy, proxy_to
from bench.machine import machine
from bench.timing import write_report
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


def for_a_while(index: int, fault: Fault) -> Choose:
    """So are more from one on than a request is tried: it is gone, and comes back."""
    return lambda number: fault if index <= number < index + RETRIES.tries + 2 else None


def plans(count: int) -> list[tuple[str, Choose]]:
    """Each request, of so many, with each fault; then the service gone from each on."""
    outages = {"gone from request": from_there, "gone for a while from request": for_a_while}
    one = [
        (f"request {index} {fault}", at(index, fault)) for index in range(count) for fault in Fault
    ]
    gone = [
        (f"{how} {index} on, {fault}", outage(index, fault))
        for how, outage in outages.items()
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
    """Run, print, write; 1 if anything was wrong."""
    parser = argparse.ArgumentParser("python -m bench.durability requests", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="take every Nth run (all)")
    parser.add_argument("--count", action="store_true", help="only count requests")
    parser.add_argument("--out", type=Path, help="write JSON here")
    given = parser.parse_args(words)
    logging.disable(logging.CRITICAL)  # each run's service goes away
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        where = machine(Path(name))
    with campaign() as runs:
        clean = runs.run(lambda _: None)
        by_stage = kinds(clean)
        for stage, found in by_stage.items():
            print(f"{stage}: {found.total()}: {dict(found)}")
        facts: dict[str, Any] = {"machine": where, "requests": by_stage}
        if not given.count:
            facts |= _struck(runs, plans(len(clean.requests))[:: given.every])
    where["seconds"] = round(time.monotonic() - begun)
    if given.out:
        write_report(given.out, facts)
    return 1 if facts.get("wrong") else 0


def _struck(runs: Campaign, chosen: Sequence[tuple[str, Choose]]) -> dict[str, Any]:
    """What came of all these runs."""
    tally, wrong = Counter[str](), []
    for name, choose in chosen:
        outcome = runs.run(choose)
        tally["raised an error" if outcome.errors else "went on"] += 1
        wrong += [f"{name}: {one}" for one in outcome.wrong]
    print(f"{len(chosen)} runs: {dict(tally)}; wrong: {wrong}")
    return {"runs": len(chosen), "came_of_them": tally, "wrong": wrong}
