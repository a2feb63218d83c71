"""Every wait, order, reference and release of the engine is needed: without it a scenario fails.

The places are found by their syntax, so that a new one can't be forgotten: it must be noticed by a
scenario, or be named below with the reason why nothing can notice it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

import pytest

from tests.cuda import mutants
from tests.cuda.forked import Parent
from tests.cuda.gates import mode_of
from tests.often import LONG

AT_ONCE = 3
LIMIT_S = 10  # for one that hangs
PATIENCE_S = 120  # for the others, which end long before unless the machine is busy
TRIES = 5
SETTINGS = {
    "lazy": "mode=lazy",
    "async": "mode=async",
    "two devices": "mode=lazy,devices=2",
}


class By(NamedTuple):
    """The scenario that goes wrong, in a mode of the stand-in; some may hang instead."""

    scenario: str
    mode: str = "lazy"
    hangs: bool = False


HOLD, TRANSFER = (f"devices/cuda_freeze: Cuda{name}" for name in ("Hold", "Transfer"))
COPY, DELTAS = "devices/cuda_copy: CudaCopy", "devices/cuda_deltas: Deltas"
CPU, DEVICE, DRIVER = "devices/cpu_freeze: CpuHold", "devices/cuda: CudaDevice", "devices/driver"
STREAM, UPLOAD = "devices/stream: OwnStream", "devices/cuda_upload: CudaUpload.start"

NOTICED = {
    f"{DEVICE}._values_at: self._values[dtype] keeps data": By(
        "tables of another device", "two devices"
    ),
    f"{CPU}.__init__: self._owners keeps owners": By("host arrays dropped after a hold"),
    f"{CPU}.order_update: self._released.wait_out()": By("host arrays updated after a hold"),
    f"{CPU}.release: self._released.set()": By("host arrays updated after a hold", hangs=True),
    f"{DEVICE}.reserve: self._copy.settle()": By("a copy that nobody saves", "async"),
    f"{DEVICE}.freeze: self._stream.follow_callers() (no. 1)": By("copy after the caller"),
    f"{DEVICE}.freeze: self._stream.follow_callers() (no. 2)": By("hold after the caller"),
    f"{DEVICE}.begin_uploads: self._stream.follow_callers()": By("uploads after the caller"),
    f"{DEVICE}.finish_uploads: self._stream.lead_callers(self._stream.mark())": By(
        "caller after uploads"
    ),
    f"{TRANSFER}.__init__: self._keep keeps keep": By("dropped after an upload"),
    f"{TRANSFER}.wait: self._stream.synchronize(self._event)": By("copy after the caller"),
    f"{COPY}.__init__: self._owners keeps owners": By("dropped after a copy"),
    f"{COPY}.download: self._stream.steps('copy to the host')": By(
        "slot reused after a refused download"
    ),
    f"{COPY}.peek: self._stream.steps('look at some bytes')": By(
        "slot reused after a refused look at a copy"
    ),
    f"{HOLD}.peek: self._stream.steps('look at some bytes')": By(
        "slot reused after a refused look"
    ),
    f"{COPY}._look: self._stream.synchronize(event)": By("update after a copy"),
    f"{DELTAS}.survey: self._stream.synchronize(event)": By("differences of copies"),
    f"{COPY}.order_update: self._stream.lead_callers(self._made)": By("update after a copy"),
    f"{COPY}.settle: self._stream.synchronize(self._made or self._stream.stream)": By(
        "a copy that nobody saves", "async"
    ),
    f"{COPY}.settle: self._owners = ()": By("copy staged before it is written"),
    f"{HOLD}.__init__: self._owners keeps owners": By("dropped after a hold"),
    f"{HOLD}._by_slot: stream.steps('read')": By("slot reused after a refused read"),
    f"{HOLD}.bring: self.end_downloads()": By("update of a hold while the disk is stuck"),
    f"{HOLD}.settle: self._stream.synchronize(self._last)": By("update once a hold is staged"),
    f"{HOLD}.settle: self._owners = ()": By("hold staged at once"),
    f"{HOLD}.order_update: self._ended.wait_out()": By("update after a hold"),
    f"{HOLD}.order_update: self._stream.lead_callers(self._last)": By("update after given reads"),
    f"{HOLD}.end_downloads: self._last = self._stream.mark()": By("update after given reads"),
    f"{HOLD}.end_downloads: self._ended.set()": By("hold lets the host go on"),
    f"{HOLD}.release: self._ended.set()": By("update goes on without threads", hangs=True),
    f"{HOLD}.release: self._owners = ()": By("hold staged before it is written"),
    f"{UPLOAD}: with stream.turn": By("uploads after the caller"),
    f"{UPLOAD}: stream.steps('copy from the host')": By("dropped after a refused upload", "async"),
    f"{UPLOAD}: CudaTransfer keeps (self._pieces, scratch.memory)": By("dropped after an upload"),
    f"{DRIVER}: caller_streams: streams.append(torch.cuda.current_stream(ordinal).cuda_stream)": By(
        "copy after torch"
    ),
    f"{STREAM}.steps: self.stream.synchronize()": By("slot reused after a refused download"),
    f"{STREAM}.mark: event.record(self.stream)": By("copy after the caller"),
    f"{STREAM}.follow_callers: cupy.cuda.runtime.eventRecord(event.ptr, stream)": By(
        "copy after the caller"
    ),
    f"{STREAM}.follow_callers: self.stream.wait_event(event)": By("copy after the caller"),
    f"{STREAM}.lead_callers: cupy.cuda.runtime.streamWaitEvent(stream, event.ptr)": By(
        "update after a copy"
    ),
    f"{STREAM}.synchronize: event.synchronize()": By("copy after the caller"),
    "arena: Arena.take: self._changed.wait_for(lambda: self._free)": By("copy after the caller"),
    "arena: Arena.give: self._changed.notify()": By("copy after the caller", hangs=True),
    "background: BackgroundSave.join: self._apart.ended.wait()": By("slots after a full disk"),
    "background: BackgroundSave._fail: self.snapshot.release()": By(
        "update goes on without any thread", hangs=True
    ),
    "checkpointer: Checkpointer.update: self._saves.order_update()": By("update after a copy"),
    "saving: Saves.order_update: self.save.snapshot.order_update()": By("update after a copy"),
    "saving: Saves._capture: snapshot.order_update()": By("update after a copy, unannounced"),
    "saving: Saves.begin: snapshot.staged.wait_out(self.save.start_or_fail)": By(
        "update after a hold, unannounced", hangs=True
    ),
    "saving: Saves._end: save.join()": By("slots after a full disk"),
    "saving: Saves._end: save.pending.committed.wait()": By("two saves, one after the other"),
    "inventory: Snapshot.order_update: frozen.order_update()": By("update after a copy"),
    "inventory: Snapshot.settle: self._set_staged()": By("copy staged before it is written"),
    "inventory: Snapshot.release: frozen.release()": By(
        "host arrays updated after a hold", hangs=True
    ),
    "inventory: Snapshot.release: self._set_staged()": By("hold staged before it is written"),
    "inventory: Snapshot._set_staged: self.staged.set()": By("copy staged before it is written"),
    "restore: restore_tensors: resources.devices[name].begin_uploads(arena.chunk_nbytes)": By(
        "uploads after the caller"
    ),
    "restore: _restore_all: ordered_map(drop=drop)": By("slots after a refused upload"),
    "restore: _restore_all: arena.give(batch.slot)": By("slots after a restore"),
    "restore: _check_filled: arena.give(slot)": By("slots after overlapping targets"),
    "restore: _drop: batch.transfer.wait()": By("dropped after a failed restore"),
    "restore: _drop: arena.give(batch.slot)": By("slots after a refused upload"),
    "save: _write_chunks: ordered_map(drop=drop)": By("slots after a full disk"),
    "save: _write_chunks: arena.give(done.staged.slot)": By("slots after a copy"),
    "encoder: Encoder.work: self._arrived() (no. 1)": By("hold staged before it is written"),
    "encoder: Encoder.work: self._arrived() (no. 2)": By("hold staged before it is written"),
    "encoder: countdown.fewer: finish()": By("hold staged before it is written"),
    "staging: _slot: snapshot.settle()": By("hold staged at once"),
    "staging: _stage: with _given_back(slot, arena) (no. 1)": By("slots after a refused download"),
    "staging: _stage: with _given_back(slot, arena) (no. 2)": By(
        "slots after a refused second look"
    ),
    "staging: stage: snapshot.end_downloads()": By("hold lets the host go on"),
    "inventory: Snapshot.end_downloads: frozen.end_downloads()": By("hold lets the host go on"),
    "staging: give_back: staged.transfer.wait()": By("slot reused after a failed save"),
    "staging: give_back: arena.give(staged.slot)": By("slots after a full disk"),
    "staging: _given_back: arena.give(slot)": By("slots after a refused download"),
}

PLAYED = sorted({(by.mode, by.scenario) for by in NOTICED.values()})

ITS_OWN = "the memory is the own stream's: whoever gets it next uses it after this"
DROPPED = "what was frozen is dropped: at worst, memory of a pool is read for nothing"
ONE_DRAWS = "one thread at a time gives reads to a device"
LISTED = "a checkpoint that is about to be deleted is listed: no bytes depend on it"
# Nothing can notice these; each with the reason.
EQUIVALENT = {
    "checkpointer: Checkpointer.steps: self._saves.steps()": LISTED,
    "saving: Saves.steps: save.join()": LISTED,
    "saving: Saves.latest: self.steps()": LISTED,
    "saving: Saves.settle: save.join()": "of ranks that meet in one thread alone",
    "saving: Saves._end_tail: self._tail.join()": (
        "of files alone: tests/test_schedule_and_retention.py"
    ),
    f"{TRANSFER}.wait: self._keep = None": "transfers live hardly longer",
    f"{COPY}.begin: stream.steps('take a snapshot')": DROPPED,
    f"{COPY}.download: CudaTransfer keeps self._shadow": ITS_OWN,
    f"{COPY}._look: self._stream.steps('look at a snapshot')": (
        "the save has failed, and nobody reads the summaries that come too late"
    ),
    f"{COPY}.peek: CudaTransfer keeps self._shadow": ITS_OWN,
    f"{COPY}.release: self.settle()": DROPPED,
    f"{DELTAS}.survey: self._stream.steps('look for differences')": (
        "the save has failed, and nobody reads what comes too late"
    ),
    f"{COPY}.release: self._owners, self._shadow, self._deltas = ((), None, None)": (
        "snapshots live hardly longer"
    ),
    f"{HOLD}._by_slot: with stream.turn": ONE_DRAWS,
    f"{HOLD}._begin: with stream.turn": ONE_DRAWS,
    f"{HOLD}.release: self._stream.synchronize(self._stream.stream)": (
        "of saves that fail on another device: test_hold has one"
    ),
    f"{HOLD}._begin: stream.steps('read at once')": (
        "what was begun writes to the device's own memory, before the next save does"
    ),
    f"{HOLD}._transfer: CudaTransfer keeps self._scratch.memory": ITS_OWN,
    f"{CPU}.release: self._owners = ()": "snapshots live hardly longer",
    "devices/cpu_freeze: CpuCopy.release: self._owners = ()": "snapshots live hardly longer",
    "devices/stream: _give_back: stream.synchronize()": (
        "page-locked memory goes with it, and to free that waits for the device"
    ),
    "background: BackgroundSave.give_up: self._given_up.set()": "without it a save is only slower",
    "background: BackgroundSave._run: self.snapshot.release()": "save_snapshot has done it",
    "inventory: Snapshot.kept: self.release()": "BackgroundSave does it a moment later",
    "restore: restore_tensors: resources.devices[name].finish_uploads()": (
        "the host has waited for every upload"
    ),
    "restore: _check_filled: frozen.release()": "nobody updates while a restore runs",
    "save: save_snapshot: snapshot.release()": "BackgroundSave does it a moment later",
    "saving: Saves.__init__: self._keep keeps keep": "these are the checkpoints to keep, no memory",
    "snapshot: capture: snapshot.release()": DROPPED,
    "staging: _stage: snapshot.settle()": "the last chunk's arrival does it, a little later",
}


def play(mutant: str, parents: Mapping[str, Parent]) -> str:
    """How a mutant fares in its scenario: `right`, `wrong` or `hangs`.

    Whether it is noticed may be a matter of moments, where streams run by themselves or several
    threads of the host have a hand in it: it gets more than one try.
    """
    by = NOTICED[mutant]
    limit_s = LIMIT_S if by.hangs else PATIENCE_S
    fates = (parents[by.mode].play(by.scenario, mutant, limit_s) for _ in range(TRIES))
    return next((fate for fate in fates if fate != "right"), "right")


@pytest.fixture(scope="module")
def parents(standin_settings, tmp_path_factory) -> Iterator[dict[str, Parent]]:
    if mode_of(standin_settings) != "lazy" or (standin_settings or {}).get("devices", 1) > 1:
        pytest.skip("one mode of the stand-in does it, and starts the others that it needs")
    sockets = tmp_path_factory.mktemp("sockets")
    with contextlib.ExitStack() as opened:
        yield {
            mode: opened.enter_context(Parent(sockets / str(at), f"mem_mb=512,{settings}"))
            for at, (mode, settings) in enumerate(SETTINGS.items())
        }


@pytest.fixture(scope="module")
def fates(parents) -> dict[str, str]:
    known = [mutant for mutant in NOTICED if mutant in mutants.find()]
    hanging = [mutant for mutant in known if NOTICED[mutant].hangs]
    others = [mutant for mutant in known if not NOTICED[mutant].hangs]
    with ThreadPoolExecutor(AT_ONCE) as busy, ThreadPoolExecutor(len(hanging)) as idle:
        play_one = functools.partial(play, parents=parents)
        found = busy.map(play_one, others), idle.map(play_one, hanging)
        return dict(zip([*others, *hanging], chain(*found), strict=True))


def test_every_place_is_known():
    known, found = NOTICED.keys() | EQUIVALENT.keys(), mutants.find().keys()
    assert not NOTICED.keys() & EQUIVALENT.keys()
    assert sorted(found - known) == [], "name a scenario that fails without these"
    assert sorted(known - found) == [], "these are gone"


@pytest.mark.parametrize("mutant", NOTICED)
def test_without_it_something_goes_wrong(mutant, fates):
    assert fates[mutant] in (("wrong", "hangs") if NOTICED[mutant].hangs else ("wrong",))


@pytest.mark.parametrize(("mode", "scenario"), PLAYED if LONG else dict(PLAYED).items())
def test_with_nothing_left_out_a_forked_process_finds_nothing_wrong(mode, scenario, parents):
    assert parents[mode].play(scenario, "", PATIENCE_S) == "right"
