"""Ranks that meet by records in the store of their checkpoints."""

from __future__ import annotations

import errno
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.errors import NotFoundError, RankError, StorageError
from gpuckpt.groups.instore import StoreBoard, pack_record, store_ranks, unpack_record
from gpuckpt.groups.meeting import Meeting
from gpuckpt.stores import Store
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryStore

DAY = 86_400.0


def meet(stores: list[Store], rounds: int = 3) -> None:
    """As many ranks as stores, all of which are one place."""

    def work(rank: int) -> list[list[bytes]]:
        group = store_ranks(stores[rank], rank, len(stores), {})
        return [group.all_gather(b"%d" % rank, what=f"{at}", timeout=60) for at in range(rounds)]

    with ThreadPoolExecutor(len(stores)) as pool:
        found = list(pool.map(work, range(len(stores))))
    assert found == [[[b"%d" % rank for rank in range(len(stores))]] * rounds] * len(stores)


def test_ranks_meet_in_a_directory(tmp_path):
    meet([LocalStore(tmp_path / "root") for _ in range(4)])
    (left,) = LocalStore(tmp_path / "root").names()
    assert left.startswith("ranks-gpuckpt-")
    assert left.endswith(".answer-3")


def test_ranks_meet_in_any_store():
    meet([MemoryStore()] * 3)


def test_checkpoints_beside_the_records_are_left_alone_by_them(tmp_path):
    mine = {"lock", "step-000000000001.manifest.json", "notes"}
    for name in mine:
        (tmp_path / name).write_bytes(name.encode())
    meet([LocalStore(tmp_path) for _ in range(2)])
    assert all((tmp_path / name).read_bytes() == name.encode() for name in mine)


def test_records_of_dead_runs_are_swept_away_and_those_of_others_that_may_live_are_not():
    store = MemoryStore()
    board = StoreBoard(store)
    name = store_ranks(store, 1, 2, {})._member._run  # type: ignore[union-attr]
    board.put(f"{name}/dead/message-1-1", b"")
    board.put(f"{name}/hello-1", b"stale")
    store.files["ranks-other.live.answer-1"] = bytearray(pack_record(b"", time.time()))
    store.files["ranks-other.dead.answer-1"] = bytearray(pack_record(b"", time.time() - 2 * DAY))
    store.files["ranks-mine"] = bytearray(b"a user's file")
    meet([store] * 2)
    assert set(store.names()) - {"ranks-mine"} == {
        "ranks-other.live.answer-1",
        *(one for one in store.names() if one.endswith("answer-3")),
    }
    assert len(store.names()) == 3


def test_a_record_that_is_still_being_written_is_not_there_yet():
    store = MemoryStore()
    record = pack_record(b"value", 0.0)
    for end in range(len(record)):
        store.files["ranks-a"] = bytearray(record[:end])
        assert StoreBoard(store).wait("a", 0) is None
    store.files["ranks-a"] = bytearray(record)
    assert StoreBoard(store).wait("a", 0) == b"value"


class CachingStore(MemoryStore):
    """As an NFS client: what wasn't there isn't there until the directory is listed."""

    def __init__(self) -> None:
        super().__init__()
        self._absent: set[str] = set()

    def size(self, name: str) -> int:
        if name in self._absent or name not in self.files:
            self._absent.add(name)
            raise NotFoundError(name)
        return super().size(name)

    def names(self) -> list[str]:
        self._absent.clear()
        return super().names()


def test_a_client_that_remembers_what_was_not_there_is_made_to_ask_again():
    store = CachingStore()
    board = StoreBoard(store, list_seconds=0.2)
    assert board.wait("a", 0) is None
    store.files["ranks-a"] = bytearray(pack_record(b"x", 0.0))
    assert board.wait("a", 0) is None
    assert board.wait("a", 30) == b"x"


class StaleStore(MemoryStore):
    """A file was replaced on the server while a client had it open."""

    code = errno.ESTALE

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        error = StorageError(f"can't read {name}")
        error.errno = self.code
        raise error


def test_a_file_that_was_replaced_meanwhile_is_looked_at_again_and_other_refusals_are_told():
    store = StaleStore()
    store.files["ranks-a"] = bytearray(pack_record(b"x", 0.0))
    assert StoreBoard(store).wait("a", 0.01) is None
    store.code = errno.EIO
    with pytest.raises(StorageError, match="can't read ranks-a"):
        StoreBoard(store).wait("a", 0)


def test_who_is_missing_is_named_with_what_to_do():
    with pytest.raises(RankError, match=r"rank 1: not there after 0.1 s, for 'it'"):
        store_ranks(MemoryStore(), 0, 2, {}).barrier(what="it", timeout=0.1)
    group = Meeting(StoreBoard(MemoryStore()), 1, 2, grace=0.1)
    with pytest.raises(RankError, match=r"rank 0: not there .* group=gpuckpt.Alone\(\)"):
        group.barrier(what="it", timeout=0.1)


@settings(deadline=None)
@given(st.binary(), st.floats(0, 2**40))
def test_unpacking_a_record_undoes_packing_it(value, date):
    assert unpack_record(pack_record(value, date)) == (date, value)


@settings(deadline=None)
@given(st.binary(), st.data())
def test_a_record_with_a_changed_byte_of_its_value_is_none(value, data):
    record = bytearray(pack_record(value + b"x", 0.0))
    record[data.draw(st.integers(len(record) - len(value) - 1, len(record) - 1))] ^= 0x40
    with pytest.raises(ValueError, match="isn't whole"):
        unpack_record(bytes(record))
