"""Many small tensors: read, checked and compared together, and each as it would be alone."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt import layout
from gpuckpt.arrays import are_apart
from gpuckpt.commit import open_step
from gpuckpt.errors import CorruptError
from gpuckpt.fingerprint import LEAF_UNIT_NBYTES, checks_of, checksum, checksum128, fingerprint
from gpuckpt.layout import LEAF_NBYTES
from gpuckpt.manifest import Manifest, Part, pack_manifest, unpack_manifest
from gpuckpt.restore import READS_TOGETHER
from gpuckpt.spec import Extent
from gpuckpt.stores.cached import read_parts
from gpuckpt.stores.local import LocalStore
from gpuckpt.structure import absent_of, of_rank, walk_json
from tests.shares import tensor_of

COUNT = 2 * READS_TOGETHER + 7
SIZES = st.one_of(
    st.integers(1, LEAF_NBYTES),
    st.sampled_from([1, LEAF_UNIT_NBYTES - 1, LEAF_UNIT_NBYTES, LEAF_NBYTES - 1, LEAF_NBYTES]),
)


def many() -> dict[str, np.ndarray]:
    return {f"t{at}": np.full(10 + at % 3, at, np.float32) for at in range(COUNT)}


@given(st.lists(SIZES, max_size=8), st.integers(0, 2**32))
def test_what_is_looked_at_together_is_as_it_is_alone(sizes, seed):
    raws = [memoryview(np.random.default_rng(seed).bytes(size)) for size in sizes]
    assert checks_of(raws) == [(fingerprint(raw), checksum([raw])) for raw in raws]


@pytest.mark.parametrize("at", [0, 1, READS_TOGETHER - 1, READS_TOGETHER, COUNT - 1])
def test_a_damaged_byte_of_one_of_many_is_found_and_its_tensor_named(tmp_path, at):
    gpuckpt.save(tmp_path, many(), codec="raw")
    entry = open_step(LocalStore(tmp_path)).tensors[at]
    extent = entry.chunks[0].extent
    path = tmp_path / extent.segment
    data = bytearray(path.read_bytes())
    data[extent.offset + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=f"^{entry.spec.name} in .*{extent}: the checksum"):
        gpuckpt.load(tmp_path)


def test_what_is_in_a_target_is_compared_though_the_file_is_intact(tmp_path, monkeypatch):
    gpuckpt.save(tmp_path, many(), codec="raw")
    manifest = open_step(LocalStore(tmp_path))
    entry = manifest.tensors[5]
    changed = replace(entry, chunks=(replace(entry.chunks[0], fingerprint="0" * 32),))
    tensors = (*manifest.tensors[:5], changed, *manifest.tensors[6:])
    monkeypatch.setattr(
        "gpuckpt.fallback.open_step", lambda *_, **__: replace(manifest, tensors=tensors)
    )
    with (
        gpuckpt.Checkpointer(tmp_path) as ckpt,
        pytest.raises(CorruptError, match=r"^t5 in .*: the fingerprint"),
    ):
        ckpt.restore(many())


def test_a_file_that_ends_within_one_of_many_says_where(tmp_path):
    gpuckpt.save(tmp_path, many(), codec="raw")
    extent = open_step(LocalStore(tmp_path)).tensors[-1].chunks[0].extent
    os.truncate(tmp_path / extent.segment, extent.offset + 5)
    with pytest.raises(CorruptError, match=f"ends at {extent.offset + 5}, "):
        gpuckpt.load(tmp_path)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40), max_size=1200), st.integers(0, 50), st.integers(1, 60), st.data()
)
def test_parts_are_filled_as_far_as_the_file_goes_whatever_the_system_gives(
    tmp_path_factory, sizes, offset, most, data
):
    nbytes = data.draw(st.integers(0, offset + sum(sizes) + 9))
    path = tmp_path_factory.mktemp("parts") / "f"
    content = np.random.default_rng(1).bytes(nbytes)
    path.write_bytes(content)
    whole = os.preadv

    def short(descriptor: int, buffers: list[memoryview], at: int) -> int:
        left, some = most, []
        for buffer in buffers:
            some.append(buffer[:left])
            left -= len(some[-1])
        return whole(descriptor, some, at)

    buffers = [bytearray(size) for size in sizes]
    descriptor = os.open(path, os.O_RDONLY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", short)
        found = read_parts(descriptor, [memoryview(one) for one in buffers], offset)
    os.close(descriptor)
    expected = content[offset : offset + sum(sizes)]
    assert found == len(expected)
    assert b"".join(buffers)[:found] == expected


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=8))
def test_arrays_are_apart_if_each_has_bytes_of_its_own(places):
    memory = np.zeros(70, np.uint8)
    tensors = [tensor_of(memory[at : at + size]) for at, size in places]
    taken = [byte for at, size in places for byte in range(at, at + size)]
    alone = len(set(taken)) == len(taken) and all(size for _, size in places)
    assert are_apart(tensors) == alone


def test_arrays_with_others_between_their_elements_are_not_said_to_be_apart():
    memory = np.zeros((4, 4))
    assert not are_apart([tensor_of(memory[:, :2]), tensor_of(memory[:, 2:])])


def test_a_structure_in_which_nothing_is_a_ranks_own_is_the_same_for_each():
    node = {
        "dict": [["a", {"tensor": 0}], ["b", {"list": [{"value": 1}, {"object": {"dict": []}}]}]]
    }
    assert of_rank(node, 3) == node
    assert list(absent_of(node, 3)) == []
    own = {"list": [{"value": 2}, {"tuple": [{"object": {"ranks": [[0, {"tensor": 1}]]}}]}]}
    both = {"dict": [["a", node], ["c", own]]}
    assert of_rank(both, 0) != both
    assert list(absent_of(both, 1)) == [("c", 1, 0)]
    assert [path for path, _ in walk_json(both)][-1] == ("c", 1, 0, "@0")


def body_of(manifest: bytes) -> dict[str, Any]:
    text = manifest[layout.MANIFEST_HEAD_NBYTES :].removesuffix(layout.MANIFEST_TAIL)
    body: dict[str, Any] = json.loads(text)
    return body


def test_a_manifest_that_lists_tensors_beside_its_parts_is_refused(tmp_path):
    gpuckpt.save(tmp_path, {"w": np.arange(3)}, 1)
    rows = body_of(pack_manifest(open_step(LocalStore(tmp_path))))
    names = [layout.part_name(1, "0" * 8, rank) for rank in range(2)]
    parts = tuple(Part(name, 9, "0" * 32, 0, 0) for name in names)
    good = pack_manifest(Manifest(1, {"dict": []}, (), ranks=2, parts=parts))
    assert unpack_manifest(good, "it").parts == parts
    body = body_of(good) | {"tensors": rows["tensors"], "segments": rows["segments"]}
    text = json.dumps(body, separators=(",", ":")).encode()
    head = (layout.MANIFEST_HEAD % (layout.VERSION, checksum128(text))).encode()
    with pytest.raises(CorruptError, match="tensors beside them"):
        unpack_manifest(head + text + layout.MANIFEST_TAIL, "it")


def test_a_record_is_compared_hashed_and_replaced_as_a_dataclass():
    one, same = Extent("a", 1, 2), Extent("a", 1, 2)
    assert one == same
    assert len({one, same, replace(one, offset=3)}) == 2
    with pytest.raises(ValueError, match="negative"):
        replace(one, offset=-1)
