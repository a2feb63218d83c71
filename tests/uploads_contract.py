"""What every `Device` promises of uploads: each device's tests inherit these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpuckpt.devices import Piece
from tests.shares import (
    CHUNK,
    OnDevice,
    begin_upload,
    checked,
    new_slot,
    print_of,
    share_of,
    tensor_of,
    upload,
)
from tests.views import DTYPES, FILLED, SHAPE, VIEWS, bytes_of, numbers


class UploadContract(OnDevice):
    """Tests of any device's uploads."""

    @pytest.mark.parametrize(("planes", "turned"), [(4, True), (4, False), (1, False)])
    @pytest.mark.parametrize("view", FILLED)
    def test_an_upload_undoes_a_download(self, device, view, planes, turned):
        source, target, expected = self.put(numbers(2)), self.put(numbers(1)), numbers(1)
        share = share_of(device, [VIEWS[view](source)])
        frozen, tensor = share.freeze(copy=True), tensor_of(VIEWS[view](target))
        for at, chunks in enumerate(share.plan.batches):
            arrived = frozen.download(at, new_slot(device, CHUNK)).wait()
            pieces = [
                Piece(chunk.nbytes, planes, chunk.start, (tensor,), turned=turned)
                for chunk in chunks
            ]
            rows = zip(chunks, arrived, strict=True)
            data = [checked(share.plan, chunk, one) for chunk, one in rows]
            upload(device, pieces, data, CHUNK)
        frozen.release()
        VIEWS[view](expected)[...] = VIEWS[view](numbers(2))
        assert bytes_of(self.get(target)) == bytes_of(expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_elements_of_any_type_are_uploaded(self, device, dtype):
        given = numbers(2, dtype, (41, 3))
        target, other = self.put(numbers(1, dtype, (41, 3))), self.put(numbers(1, dtype, (3, 41)))
        data, width = bytes_of(given), min(given.itemsize, 8)
        piece = Piece(len(data), width, 0, (tensor_of(target), tensor_of(other.T)))
        upload(device, [piece], [data])
        assert bytes_of(self.get(target)) == data
        assert bytes_of(self.get(other).T) == data

    @pytest.mark.parametrize("view", FILLED)
    def test_an_upload_of_a_part_leaves_the_rest_alone(self, device, view):
        target, expected = self.put(numbers(1)), numbers(1)
        inside = VIEWS[view](expected)
        flat = inside.ravel()
        first, last = flat.size // 3, flat.size // 2
        flat[first:last] = VIEWS[view](numbers(2)).ravel()[first:last]
        inside[...] = flat.reshape(inside.shape)
        data = flat[first:last].tobytes()
        piece = Piece(len(data), 4, 4 * first, (tensor_of(VIEWS[view](target)),))
        upload(device, [piece], [data])
        assert bytes_of(self.get(target)) == bytes_of(expected)

    @pytest.mark.parametrize("planes", [4, 1])
    def test_a_chunk_comes_to_all_its_targets_whatever_their_strides(self, device, planes):
        given, empty = numbers(), np.zeros(SHAPE, np.float32)
        kinds: list[Callable[[Any], Any]] = [
            lambda a: a,
            lambda a: a.reshape(SHAPE[::-1]).T,
            lambda a: a,
            lambda a: a[::-1],
            lambda a: a.reshape(10, 6, 14).transpose(1, 0, 2),
        ]
        targets = [self.put(empty) for _ in kinds]
        tensors = tuple(tensor_of(kind(one)) for kind, one in zip(kinds, targets, strict=True))
        data = bytes_of(given)
        for order in (tensors, tensors[1:]):
            for target in targets:
                self.clear(target)
            half = len(data) // 2
            pieces = [Piece(half, planes, start, order) for start in (0, half)]
            upload(device, pieces, [data[:half], data[half:]])
            for kind, target in zip(kinds[-len(order) :], targets[-len(order) :], strict=True):
                assert bytes_of(kind(self.get(target))) == data
        assert not self.get(targets[0]).any()

    def test_many_small_chunks_are_uploaded_together(self, device):
        given = [numbers(seed, "?Hfd"[seed % 4], (1 + seed * 7 % 5, 3)) for seed in range(12)]
        targets = [self.put(np.zeros_like(array)) for array in given]
        views = [target.T if at % 2 else target for at, target in enumerate(targets)]
        data = [bytes_of(array.T if at % 2 else array) for at, array in enumerate(given)]
        pieces = [
            Piece(len(one), array.itemsize, 0, (tensor_of(view),), turned=array.dtype == "f")
            for one, array, view in zip(data, given, views, strict=True)
        ]
        upload(device, pieces, data)
        for target, array in zip(targets, given, strict=True):
            assert bytes_of(self.get(target)) == bytes_of(array)

    def test_what_was_damaged_on_its_way_has_another_fingerprint(self, device):
        targets = tensor_of(self.put(numbers())), tensor_of(self.put(numbers()).T)
        damaged = bytearray(bytes_of(numbers(1)))
        damaged[1000] ^= 1
        device.begin_uploads(1 << 14)
        for target in targets:
            pieces = [Piece(len(damaged), 4, 0, (target,))]
            (found,) = begin_upload(device, pieces, [bytes(damaged)]).wait()
            assert set(found) == {print_of(bytes(damaged))}
            assert set(found) != {print_of(bytes_of(numbers(1)))}
        device.finish_uploads()

    def test_chunks_that_share_their_target_are_each_looked_at_by_themselves(self, device):
        target = self.put(numbers())
        views = [target, target[1:5], target.transpose(2, 0, 1)]
        data = [bytes_of(numbers(at, shape=view.shape)) for at, view in enumerate(views)]
        pieces = [
            Piece(len(one), 4, 0, (tensor_of(view),), shared=True)
            for one, view in zip(data, views, strict=True)
        ]
        upload(device, pieces, data)
