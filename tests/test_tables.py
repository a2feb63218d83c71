"""The tables that kernels work by, tried with numpy in the kernels' place, on host memory.

What numpy does here for each row is what kernels/gather.cu, filter.cu and
digest.cu say in their contracts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.arrays import host_view
from gpuckpt.census import take_inventory
from gpuckpt.devices import Arrived, kernels
from gpuckpt.devices.ahead import Ahead
from gpuckpt.devices.merging import moved
from gpuckpt.devices.strided import RUN
from gpuckpt.devices.summaries import fingerprints
from gpuckpt.devices.tables import Table, Tables
from gpuckpt.dtypes import is_turned
from gpuckpt.fingerprint import fingerprint, leaf_digests
from gpuckpt.inventory import Inventory
from gpuckpt.layout import LEAF_NBYTES
from gpuckpt.plan import Plan, area_nbytes, make_plans
from gpuckpt.planes import join, split
from gpuckpt.spec import Chunk, Spec
from gpuckpt.statistics import kind_of, statistics_of
from tests.strategies import ITEM_NBYTES_MAX, Array, arrays
from tests.views import numbers

SIZES = st.one_of(st.integers(ITEM_NBYTES_MAX, 900), st.sampled_from((1 << 12, LEAF_NBYTES + 64)))


@dataclass(frozen=True)
class Case:
    """Arrays on the host, and a plan for them as a device would have it."""

    inventory: Inventory
    plan: Plan
    raw: list[bytes]

    def bytes_of(self, chunk: Chunk) -> Array:
        run = self.raw[chunk.tensor][chunk.start : chunk.start + chunk.nbytes]
        return np.frombuffer(run, np.uint8)

    def tables(self, groups: Sequence[Sequence[Chunk]], *, together: bool) -> Tables:
        return Tables(self.plan, groups, values_at, together=together)


def values_at(dtype: str) -> int:
    """Where a device would have a type's values: a number that stands for it."""
    return 1000 + len(dtype) if kind_of(dtype) == 5 else 0


@st.composite
def cases(draw: st.DrawFn) -> Case:
    some = draw(st.lists(arrays(), max_size=6))
    some = [misaligned(array) if draw(st.booleans()) else array for array in some]
    if draw(st.booleans()):
        large = numbers(draw(st.integers(0, 9)), "f4", (70, 601))
        some.insert(draw(st.integers(0, len(some))), large.T if draw(st.booleans()) else large)
    inventory = take_inventory(some)
    plans = make_plans(
        *(inventory.specs, inventory.roster.strides, {"cuda:0": range(len(some))}),
        chunk_nbytes=draw(SIZES),
        split=draw(st.booleans()),
    )
    return Case(inventory, plans["cuda:0"], [array.tobytes() for array in some])


def misaligned(array: Array) -> Array:
    """The same elements with strides as large, from an odd address on."""
    if not array.size:
        return array
    strides = [abs(stride) for stride in array.strides]
    span = sum((n - 1) * stride for n, stride in zip(array.shape, strides, strict=True))
    room = np.zeros(span + array.itemsize + 1, np.uint8)
    again = np.ndarray(array.shape, array.dtype, room.data, 1, strides)
    again[...] = array
    return again


def room_for(nbytes: int) -> Array:
    """Aligned memory in which each byte is something else than zero."""
    memory = np.full(nbytes + 64, 0xA5, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + nbytes]


def written(table: Table, room: Array) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """A table's rows and runs, as a device finds them in what was written."""
    data = table.write(room)
    assert data.nbytes == table.nbytes
    rows = data[: table.rows.nbytes].view(kernels.CHUNK)
    runs = data[table.runs_at : table.runs_at + table.runs.rows.nbytes].view(RUN)
    return rows, runs


def gather(runs: npt.NDArray[Any], room: Array) -> None:
    """Pack each run to where it says, which lies in `room`."""
    for run in runs:
        axes, size = int(run["axes"]), int(run["itemsize"])
        shape = tuple(run["shape"][:axes].tolist())
        strides = tuple(run["strides"][:axes].tolist())
        assert not any(int(number) % size for number in (run["tensor"], run["packed"], *strides))
        items = host_view(int(run["tensor"]), Spec("", f"V{size}", shape), strides).reshape(-1)
        start, count = int(run["start"]), int(run["count"])
        packed = items[start : start + count].tobytes()
        begin = int(run["packed"]) - room.ctypes.data
        room[begin : begin + len(packed)] = np.frombuffer(packed, np.uint8)


def filter_chunks(rows: npt.NDArray[Any], dtypes: Sequence[str], staged: Array) -> None:
    """Put each chunk's planes, and summaries of its leaves, to where its row says."""
    for row, dtype in zip(rows, dtypes, strict=True):
        assert (row["kind"], row["values"]) == (kind_of(dtype), values_at(dtype))
        raw, width = at_address(row), int(row["width"])
        turned = bool(row["turned"])
        assert turned == (width > 1 and is_turned(dtype))
        for k, plane in enumerate(split(raw, width, np.empty_like(raw), turned=turned)):
            begin = int(row["planes"]) + k * int(row["stride"])
            assert begin % 16 == 0
            staged[begin : begin + plane.size] = plane
        for leaf, begin in enumerate(range(0, raw.size, LEAF_NBYTES)):
            at = int(row["summaries"]) + leaf * kernels.SUMMARY.itemsize
            summary = summary_of(raw[begin : begin + LEAF_NBYTES], dtype)
            staged[at : at + summary.nbytes] = summary


def at_address(row: Any) -> Array:
    return np.frombuffer(ctypes.string_at(int(row["tensor"]), int(row["nbytes"])), np.uint8)


def summary_of(leaf: Array, dtype: str) -> Array:
    summary = np.zeros(1, kernels.SUMMARY)
    summary["digest"] = np.frombuffer(leaf_digests(leaf.data), np.uint8)
    found = statistics_of(leaf, dtype) if kind_of(dtype) else None
    if found is not None:
        summary["squares"], summary["nans"] = found.squares, found.nans
        summary["infs"] = found.infs
    return summary.view(np.uint8)


def digest_chunks(rows: npt.NDArray[Any], leaves: int) -> bytes:
    digests = bytearray(leaves * kernels.DIGEST_NBYTES)
    for row in rows:
        found = leaf_digests(at_address(row).data)
        begin = int(row["first_leaf"]) * kernels.DIGEST_NBYTES
        digests[begin : begin + len(found)] = found
    return bytes(digests)


def check(case: Case, chunks: Sequence[Chunk], arrived: Sequence[Arrived]) -> None:
    """What has arrived is what the chunks are, and what is said of them is true."""
    for chunk, one in zip(chunks, arrived, strict=True):
        raw, dtype = case.bytes_of(chunk), case.plan.specs[chunk.tensor].dtype
        out = np.empty_like(raw)
        assert len(one.planes) == case.plan.width(chunk)
        join(one.planes, out, turned=case.plan.turned(chunk))
        assert out.tobytes() == raw.tobytes()
        assert one.fingerprint == fingerprint(raw.data)
        expected = statistics_of(raw, dtype) if kind_of(dtype) else None
        assert (one.statistics is None) == (expected is None)
        if one.statistics is not None and expected is not None:
            found = one.statistics
            assert (found.nans, found.infs) == (expected.nans, expected.infs)
            assert found.squares == pytest.approx(expected.squares, rel=3e-6)


def arrive(tables: Tables, group: int, data: Any) -> list[Arrived]:
    """A group's chunks out of its summaries, and its planes after them."""
    end = tables.spans(group)[0].nbytes
    found = data[:end].view(kernels.SUMMARY)
    return tables.arrived(group, found, data[end:], tables.starts(group))


def dtypes_of(case: Case, chunks: Sequence[Chunk]) -> list[str]:
    return [case.plan.specs[chunk.tensor].dtype for chunk in chunks]


@settings(max_examples=50, deadline=None)
@given(cases())
def test_each_batch_arrives_from_what_its_table_makes_kernels_write(case: Case):
    plan, room = case.plan, area_nbytes(case.plan.chunk_nbytes)
    tables = case.tables(plan.batches, together=False)
    for at, chunks in enumerate(plan.batches):
        packed, staged = room_for(room), room_for(room)
        table = tables.group(at, case.inventory.addresses, packed.ctypes.data)
        rows, runs = written(table, room_for(room))
        gather(runs, packed)
        filter_chunks(rows, dtypes_of(case, chunks), staged)
        summaries, planes = tables.spans(at)
        end = summaries.nbytes + planes.nbytes
        assert (staged[end:] == 0xA5).all(), "all lies at the beginning"
        check(case, chunks, arrive(tables, at, staged[:end]))


@settings(max_examples=50, deadline=None)
@given(cases())
def test_every_batch_arrives_from_what_one_table_for_all_makes_kernels_write(case: Case):
    plan = case.plan
    tables = case.tables(plan.batches, together=True)
    packed, staged = room_for(tables.packed_nbytes), room_for(tables.layout.staged_nbytes)
    table = tables.whole(case.inventory.addresses, packed.ctypes.data)
    rows, runs = written(table, room_for(tables.rows_nbytes))
    assert table.nbytes == tables.rows_nbytes
    gather(runs, packed)
    every = [chunk for chunks in plan.batches for chunk in chunks]
    filter_chunks(rows, dtypes_of(case, every), staged)
    for at, chunks in enumerate(plan.batches):
        spans = tables.spans(at)
        parts = [staged[span.start : span.start + span.nbytes] for span in spans]
        data = np.concatenate(parts)
        assert data.size <= area_nbytes(plan.chunk_nbytes)
        check(case, chunks, arrive(tables, at, data))


@settings(max_examples=50, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_what_is_wanted_of_a_batch_arrives_from_the_parts_that_have_it(case: Case, drawn: int):
    plan = case.plan
    tables = case.tables(plan.batches, together=True)
    packed, staged = room_for(tables.packed_nbytes), room_for(tables.layout.staged_nbytes)
    rows, runs = written(
        tables.whole(case.inventory.addresses, packed.ctypes.data), room_for(tables.rows_nbytes)
    )
    gather(runs, packed)
    every = [chunk for chunks in plan.batches for chunk in chunks]
    filter_chunks(rows, dtypes_of(case, every), staged)
    found = staged[: tables.summaries_nbytes].view(kernels.SUMMARY)
    prints = tables.fingerprints(found)
    assert prints == [fingerprint(case.bytes_of(chunk).data) for chunk in every]
    for at, chunks in enumerate(plan.batches):
        wanted = [bool(drawn >> place % 32 & 1) for place in tables.positions(at)]
        planes = tables.spans(at)[1]
        parts = tables.parts(at, wanted)
        data = np.concatenate(
            [room_for(0), *(staged[planes.start + part.start :][: part.nbytes] for part in parts)]
        )
        places = [
            moved(start, parts) if one else None
            for start, one in zip(tables.starts(at), wanted, strict=True)
        ]
        arrived = tables.arrived(at, tables.own(at, found), data, places)
        pairs = list(zip(chunks, arrived, strict=True))
        there = [pair for pair, one in zip(pairs, wanted, strict=True) if one]
        check(case, [chunk for chunk, _ in there], [one for _, one in there])
        assert [bool(one.planes) for one in arrived] == wanted
        assert [one.fingerprint for one in arrived] == [prints[p] for p in tables.positions(at)]


@settings(max_examples=50, deadline=None)
@given(cases())
def test_a_second_look_gives_the_fingerprints_of_every_chunk(case: Case):
    plan, room = case.plan, area_nbytes(case.plan.chunk_nbytes)
    tables = case.tables(plan.rereads, together=False)
    for at, chunks in enumerate(plan.rereads):
        packed = room_for(room)
        table = tables.group(at, case.inventory.addresses, packed.ctypes.data)
        rows, runs = written(table, room_for(room))
        gather(runs, packed)
        digests = digest_chunks(rows, table.leaves)
        assert len(digests) <= room
        firsts, nbytes = rows["first_leaf"].tolist(), rows["nbytes"].tolist()
        expected = [fingerprint(case.bytes_of(chunk).data) for chunk in chunks]
        assert fingerprints(digests, firsts, nbytes) == expected


@settings(max_examples=50, deadline=None)
@given(cases(), st.data())
def test_several_tables_made_at_once_are_those_that_are_made_one_by_one(case: Case, data):
    tables = case.tables(case.plan.batches, together=False)
    start = data.draw(st.integers(0, tables.groups))
    groups = range(start, data.draw(st.integers(start, tables.groups)))
    addresses = case.inventory.addresses
    for at, table in zip(groups, tables.each(groups, addresses, 640), strict=True):
        one, room = tables.group(at, addresses, 640), room_for(table.nbytes)
        assert table.nbytes == tables.table_nbytes(at)
        assert (table.leaves, table.runs.pieces) == (one.leaves, one.runs.pieces)
        assert table.write(room).tobytes() == one.write(room_for(table.nbytes)).tobytes()


@settings(max_examples=50, deadline=None)
@given(cases(), st.integers(0, 1 << 18))
def test_as_many_of_the_last_batches_as_fit_have_room_of_their_own(case: Case, nbytes: int):
    batches = case.tables(case.plan.batches, together=False)
    looks = case.tables(case.plan.rereads, together=False)
    ahead = Ahead.within(nbytes, batches, looks)
    assert ahead.nbytes <= nbytes
    assert ahead.is_whole == (len(ahead.batches.groups) == batches.groups > 0)
    if not ahead.batches.groups:
        assert ahead == Ahead()
        return
    assert ahead.batches.groups.stop == batches.groups
    assert list(ahead.looks.groups) == list(range(looks.groups))
    taken = np.zeros(ahead.nbytes, np.uint8)
    for rooms in (ahead.batches, ahead.looks):
        taken[rooms.table.start : rooms.table.end] += np.uint8(1)
        for group in rooms.groups:
            rooms.at(group, taken)[...] += np.uint8(1)
    assert taken.max(initial=0) <= 1, "no two share a byte"
    for at in ahead.batches.groups:
        sizes = [span.nbytes for span in batches.spans(at)]
        assert ahead.batches.at(at, taken).size == sum(sizes)
    if not ahead.is_whole:
        more = Ahead.within(ahead.nbytes, batches, looks)
        assert more == ahead, "no more fit what these take"


def test_a_table_is_made_again_for_other_addresses():
    pairs = [[numbers(at, "f4", (30, 7)).T, numbers(at, "f8", (40,))] for at in range(2)]
    inventories = [take_inventory(pair) for pair in pairs]
    plan = make_plans(
        *(inventories[0].specs, inventories[0].roster.strides, {"cuda:0": range(2)}),
        chunk_nbytes=200,
        split=True,
    )["cuda:0"]
    tables = Tables(plan, plan.batches, values_at, together=True)
    for pair, inventory in zip(pairs, inventories, strict=True):
        packed, staged = room_for(tables.packed_nbytes), room_for(tables.layout.staged_nbytes)
        table = tables.whole(inventory.addresses, packed.ctypes.data)
        gather(table.runs.rows, packed)
        case = Case(inventory, plan, [array.tobytes() for array in pair])
        every = [chunk for chunks in plan.batches for chunk in chunks]
        filter_chunks(table.rows, dtypes_of(case, every), staged)
        for at, chunks in enumerate(plan.batches):
            parts = [staged[span.start :][: span.nbytes] for span in tables.spans(at)]
            check(case, chunks, arrive(tables, at, np.concatenate(parts)))
