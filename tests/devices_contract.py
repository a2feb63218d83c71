"""What every `Device` promises of snapshots and memory: each device's tests inherit these.

What it promises of uploads is in uploads_contract.py.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest

from gpuckpt.spec import Chunk
from tests.shares import OnDevice, checked, download, prints_of, reread, share_of
from tests.views import DTYPES, FILLED, VIEWS, bytes_of, numbers

copy_and_hold = pytest.mark.parametrize("copy", [True, False], ids=["copy", "hold"])


class Owner:
    """Somebody who keeps memory alive."""


class DeviceContract(OnDevice):
    """Tests of any device's snapshots, and of the memory that it gives."""

    @copy_and_hold
    @pytest.mark.parametrize("split", [True, False], ids=["planes", "whole"])
    @pytest.mark.parametrize("view", VIEWS)
    def test_a_download_gives_the_bytes_in_c_order(self, device, view, split, copy):
        given = numbers()
        share = share_of(device, [VIEWS[view](self.put(given))], split=split)
        frozen = share.freeze(copy=copy)
        assert frozen.live is not copy
        assert download(frozen, share) == [bytes_of(VIEWS[view](given))]
        frozen.end_downloads()
        frozen.release()

    @copy_and_hold
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_download_gives_elements_of_any_type(self, device, dtype, copy):
        given = [numbers(1, dtype, (41, 3)), numbers(2, dtype, (41, 3))]
        arrays = [self.put(array) for array in given]
        share = share_of(device, [arrays[0], arrays[1].T[:, ::2]], chunk_nbytes=100)
        frozen = share.freeze(copy=copy)
        expected = [bytes_of(given[0]), bytes_of(given[1].T[:, ::2])]
        assert download(frozen, share) == expected
        frozen.end_downloads()
        frozen.release()

    @copy_and_hold
    @pytest.mark.parametrize("split", [True, False], ids=["planes", "whole"])
    def test_a_few_bytes_of_first_chunks_are_seen_before_any_download(self, device, split, copy):
        given = [numbers(seed, dtype, (50,)) for seed, dtype in enumerate("fedf")]
        share = share_of(device, [self.put(array) for array in given], split=split)
        frozen, slot = share.freeze(copy=copy), share.new_slot()
        runs = [Chunk(at, 8 * at, 16) for at in (3, 0, 1, 2)] * 20
        found = frozen.peek(runs, slot)
        assert found == [bytes_of(given[r.tensor])[r.start : r.start + 16] for r in runs]
        assert frozen.peek([], slot) == []
        assert download(frozen, share) == [bytes_of(array) for array in given]
        frozen.end_downloads()
        frozen.release()

    @copy_and_hold
    def test_a_few_bytes_of_a_strided_array_are_its_own_or_none(self, device, copy):
        given = numbers(1, "f", (8, 6))
        share = share_of(device, [self.put(given).T])
        frozen = share.freeze(copy=copy)
        assert frozen.peek([Chunk(0, 4, 8)], share.new_slot()) in ([bytes_of(given.T)[4:12]], [b""])
        frozen.end_downloads()
        frozen.release()

    @copy_and_hold
    def test_many_arrays_keep_their_places(self, device, copy):
        given = [
            numbers(seed, "?Hfd"[seed % 4], (seed * 7 % 40, 1 + seed % 3)) for seed in range(60)
        ]
        arrays = [self.put(array) for array in given]
        share = share_of(device, [array.T if array.size % 2 else array for array in arrays])
        assert len(share.plan.batches) > 3
        assert max(map(len, share.plan.batches)) > 1
        frozen = share.freeze(copy=copy)
        expected = [bytes_of(array.T if array.size % 2 else array) for array in given]
        assert download(frozen, share) == expected
        frozen.end_downloads()
        frozen.release()

    @copy_and_hold
    def test_arrays_that_share_their_memory_each_have_their_own_bytes(self, device, copy):
        given = numbers()
        array = self.put(given)
        share = share_of(device, [view(array) for view in VIEWS.values()])
        frozen = share.freeze(copy=copy)
        expected = [bytes_of(view(given)) for view in VIEWS.values()]
        assert download(frozen, share) == expected
        frozen.end_downloads()
        frozen.release()

    @copy_and_hold
    def test_batches_may_be_under_way_together_and_waited_for_in_any_order(self, device, copy):
        given = [numbers(seed, shape=(5, 40)) for seed in range(4)]
        share = share_of(device, [self.put(array) for array in given])
        plan = share.plan
        frozen = share.freeze(copy=copy)
        slots = [share.new_slot() for _ in plan.batches]
        transfers = [frozen.download(at, slot) for at, slot in enumerate(slots)]
        frozen.end_downloads()
        found = {}
        for at in reversed(range(len(transfers))):
            for chunk, arrived in zip(plan.batches[at], transfers[at].wait(), strict=True):
                found[chunk] = checked(plan, chunk, arrived)
        assert b"".join(found[chunk] for chunk in share.chunks) == b"".join(map(bytes_of, given))
        frozen.release()

    @copy_and_hold
    def test_a_plan_serves_again_for_arrays_that_lie_elsewhere(self, device, copy):
        given = [[numbers(2 * at), numbers(2 * at + 1)] for at in range(3)]
        shares = [share_of(device, [self.put(a), self.put(b).T]) for a, b in given]
        plan = shares[0].plan
        for share, (a, b) in zip(shares, given, strict=True):
            assert share.plan.batches == plan.batches
            frozen = replace(share, plan=plan).freeze(copy=copy)
            assert download(frozen, share) == [bytes_of(a), bytes_of(b.T)]
            frozen.end_downloads()
            frozen.release()

    @copy_and_hold
    def test_freezing_nothing(self, device, copy):
        share = share_of(device, [])
        frozen = share.freeze(copy=copy)
        assert share.plan.batches == share.plan.rereads == ()
        frozen.settle()
        frozen.end_downloads()
        frozen.release()
        frozen.order_update()

    @pytest.mark.parametrize("view", ["contiguous", "Fortran", "stepped"])
    def test_a_copy_stays_as_it_was_frozen(self, device, view):
        array = self.put(numbers())
        share = share_of(device, [VIEWS[view](array)])
        frozen = share.freeze(copy=True)
        frozen.order_update()
        self.clear(array)
        frozen.settle()
        assert download(frozen, share) == [bytes_of(VIEWS[view](numbers()))]
        assert not self.get(array).any()
        frozen.release()

    @pytest.mark.parametrize("view", ["contiguous", "Fortran", "stepped"])
    def test_an_update_comes_after_all_reads_of_what_is_held(self, device, view):
        array, expected = self.put(numbers()), bytes_of(VIEWS[view](numbers()))
        self.get(array)
        share = share_of(device, [VIEWS[view](array)])
        slot = share.new_slot()
        frozen = share.freeze(copy=False)

        def update() -> None:
            frozen.order_update()
            self.clear(array)

        updater = threading.Thread(target=update)
        updater.start()
        assert download(frozen, share, slot) == [expected]
        assert reread(frozen, share, slot) == prints_of(share, [expected])
        frozen.end_downloads()
        frozen.release()
        updater.join(30)
        assert not updater.is_alive()
        assert not self.get(array).any()

    def test_releasing_lets_a_waiting_update_go_on(self, device):
        array = self.put(numbers())
        frozen = share_of(device, [array]).freeze(copy=False)

        def update() -> None:
            frozen.order_update()
            self.clear(array)
            self.get(array)

        updater = threading.Thread(target=update)
        updater.start()
        updater.join(0.05)
        assert updater.is_alive()
        frozen.release()
        frozen.release()
        updater.join(30)
        assert not updater.is_alive()
        assert not self.get(array).any()

    @pytest.mark.parametrize("view", FILLED)
    def test_a_second_look_finds_what_has_changed_and_nothing_else(self, device, view):
        given = [numbers(seed) for seed in range(3)]
        arrays = [self.put(array) for array in given]
        share = share_of(device, [VIEWS[view](array) for array in arrays])
        frozen, slot = share.freeze(copy=False), share.new_slot()
        before = prints_of(share, [bytes_of(VIEWS[view](array)) for array in given])
        download(frozen, share, slot)
        assert reread(frozen, share, slot) == before
        self.clear(arrays[1])
        self.get(arrays[1])
        after = reread(frozen, share, slot)
        changed = {chunk for chunk, found in after.items() if found != before[chunk]}
        assert changed == {chunk for chunk in share.chunks if chunk.tensor == 1}
        given[1][...] = 0
        assert after == prints_of(share, [bytes_of(VIEWS[view](array)) for array in given])
        frozen.end_downloads()
        frozen.release()

    def test_a_copy_lets_go_of_its_sources_once_it_is_made(self, device):
        array, owner = self.put(numbers()), Owner()
        known = weakref.ref(owner)
        share = replace(share_of(device, [array]), owners=[owner])
        frozen = share.freeze(copy=True)
        share = replace(share, owners=[])
        del owner
        frozen.settle()
        assert known() is None
        assert download(frozen, share) == [bytes_of(numbers())]
        frozen.release()

    def test_what_is_held_is_let_go_of_at_its_release_and_not_before(self, device):
        array, owner = self.put(numbers()), Owner()
        known = weakref.ref(owner)
        share = replace(share_of(device, [array]), owners=[owner])
        frozen = share.freeze(copy=False)
        share = replace(share, owners=[])
        del owner
        frozen.settle()
        assert download(frozen, share) == [bytes_of(numbers())]
        frozen.end_downloads()
        assert known() is not None
        frozen.release()
        assert known() is None

    def test_the_next_copy_takes_the_same_memory(self, device):
        for seed in (3, 0, 2, 1):
            given = [numbers(seed, shape=(5 + seed, 300)), numbers(seed + 4, "B", (seed, 7))]
            share = share_of(device, [self.put(array) for array in given])
            frozen = share.freeze(copy=True)
            assert download(frozen, share) == [bytes_of(array) for array in given]
            frozen.release()

    def test_there_is_room_for_what_was_reserved(self, device):
        share = share_of(device, [self.put(numbers())])
        nbytes = device.copy_nbytes(share.plan)
        assert nbytes >= numbers().nbytes
        device.reserve(nbytes)
        assert device.has_room(nbytes)
        device.reserve(1)
        assert device.has_room(nbytes)
        frozen = share.freeze(copy=True)
        assert device.has_room(nbytes)
        frozen.release()

    @pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 100_001])
    def test_host_memory_has_the_size_that_was_asked_for(self, device, nbytes):
        memory = device.host_memory(nbytes)
        assert (memory.nbytes, memory.dtype, memory.ndim) == (nbytes, np.uint8, 1)
        memory[...] = 0x5A
        assert (memory == 0x5A).all()

    def test_host_memory_lives_as_long_as_a_part_of_it(self, device):
        memory = device.host_memory(1 << 16)
        memory[...] = 3
        part = memory[100:200].reshape(10, 10)
        del memory
        others = [device.host_memory(1 << 16) for _ in range(4)]
        for other in others:
            other[...] = 9
        assert (part == 3).all()
