"""Copies of a rank's files on another machine: they are there, whole, and come back."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuckpt
from gpuckpt.groups import Alone
from gpuckpt.groups.meeting import Meeting
from gpuckpt.layout import manifest_name, segment_name
from gpuckpt.replicas import Replicas, wire
from gpuckpt.replicas.caller import Peer, calling
from gpuckpt.replicas.ring import keepers, rank_of
from gpuckpt.replicas.server import Server
from gpuckpt.replicas.shelf import Item, every_item, is_file, pack_items, unpack_items
from gpuckpt.stores.memory import MemoryStore
from tests.ranks import run_ranks

SECRET = b"s" * 32


def files_of(rank: int, step: int, nbytes: int = 1000) -> dict[str, bytes]:
    """What a rank has of a step: two segments, and the manifest that all have."""
    data = {
        segment_name(step, f"{step:08x}", rank, part): bytes([step, rank, part]) * nbytes
        for part in (0, 1)
    }
    return {**data, manifest_name(step): b"manifest of %d" % step}


class Node:
    """A rank with a disk."""

    def __init__(self, group: Any, disk: dict[str, MemoryStore], host: str = "") -> None:
        self.group, self.rank, self.disk = group, group.rank, disk
        host = host or f"host{group.rank}"
        self.replicas = Replicas(
            group, disk["root"], disk["spare"], address="127.0.0.1", host=host, timeout=20
        )

    def commit(self, step: int, nbytes: int = 1000) -> None:
        """Commit a step, and keep no other."""
        files = files_of(self.rank, step, nbytes)
        self.disk["root"].files |= {name: bytearray(data) for name, data in files.items()}
        self.replicas.after_commit(list(files))
        for name in set(self.disk["root"].files) - set(files):
            self.disk["root"].remove(name)
        assert self.replicas.is_kept(20)


def new_disk() -> dict[str, MemoryStore]:
    return {"root": MemoryStore(), "spare": MemoryStore()}


def copies_in(disk: dict[str, MemoryStore]) -> dict[str, bytes]:
    return {name: bytes(data) for name, data in disk["spare"].files.items()}


def lives(disks: list[dict[str, MemoryStore]], live: Callable[[Node], Any], **hosts: Any) -> list:
    def work(group: Meeting) -> Any:
        node = Node(group, disks[group.rank], **hosts)
        with node.replicas:
            done = live(node)
            group.barrier(what="done", timeout=20)
        return done

    return run_ranks(len(disks), work)


def test_the_next_machine_has_a_copy_of_every_file_and_no_older_ones():
    disks = [new_disk() for _ in range(4)]

    def live(node: Node) -> None:
        for step in (1, 2, 3):
            node.commit(step)
        node.group.barrier(what="done", timeout=20)

    lives(disks, live)
    for rank, disk in enumerate(disks):
        owner = (rank - 1) % 4
        assert copies_in(disk) == files_of(owner, 3)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("permuted", [False, True], ids=["same ranks", "other ranks"])
def test_a_machine_that_is_lost_gets_its_files_back_and_others_nothing(size, permuted):
    disks = [new_disk() for _ in range(size)]
    lives(disks, lambda node: node.commit(7))
    disks[1] = new_disk()
    if permuted:  # the new machine gets another number, and so does one that was there
        disks = [*disks[1:], disks[0]]
    brought = lives(disks, lambda node: sorted(node.replicas.recover()))
    for rank, names in enumerate(brought):
        found = {name: bytes(disks[rank]["root"].files[name]) for name in files_of(rank, 7)}
        assert found == files_of(rank, 7)
        if not permuted:
            assert names == (sorted(files_of(1, 7)) if rank == 1 else [])


def test_two_neighbours_that_are_lost_are_told_of_and_lack_what_nobody_has(caplog):
    disks = [new_disk() for _ in range(4)]
    lives(disks, lambda node: node.commit(7))
    disks[1], disks[2] = new_disk(), new_disk()
    brought = lives(disks, lambda node: sorted(node.replicas.recover()))
    assert brought == [[], [], sorted(files_of(2, 7)), []]


def test_a_file_that_is_gone_comes_back_and_of_older_steps_nothing_does():
    disks = [new_disk() for _ in range(2)]
    lives(disks, lambda node: node.commit(7))
    lost = segment_name(7, f"{7:08x}", 0, 1)
    del disks[0]["root"].files[lost]
    disks[1]["root"].files = {name: bytearray(data) for name, data in files_of(1, 9).items()}
    brought = lives(disks, lambda node: node.replicas.recover())
    assert brought == [[lost], []]


def test_a_step_that_was_saved_again_is_copied_again():
    disks = [new_disk() for _ in range(2)]

    def live(node: Node) -> None:
        node.commit(7)
        name = manifest_name(7)
        node.disk["root"].files[name] = bytearray(b"another of 7")
        node.replicas.after_commit([*files_of(node.rank, 7)])
        assert node.replicas.is_kept(20)

    lives(disks, live)
    assert all(disk["spare"].files[manifest_name(7)] == b"another of 7" for disk in disks)


def test_copies_stay_until_their_owner_has_committed_something_newer():
    disks = [new_disk() for _ in range(2)]
    lives(disks, lambda node: node.commit(7))
    before = [dict(disk["spare"].files) for disk in disks]
    lives(disks, lambda node: node.replicas.follow())
    assert [disk["spare"].files for disk in disks] == before


def test_a_rank_alone_keeps_no_copies():
    disk = new_disk()
    node = Node(Alone(), disk)
    with node.replicas:
        node.disk["root"].files |= {n: bytearray(d) for n, d in files_of(0, 1).items()}
        node.replicas.after_commit(list(files_of(0, 1)))
        assert node.replicas.recover() == []
    assert disk["spare"].files == {}


def test_ranks_of_one_machine_have_their_copies_on_the_next_each_its_share():
    disks = [new_disk() for _ in range(5)]
    hosts = ["a", "a", "a", "b", "b"]

    def work(group: Meeting) -> None:
        node = Node(group, disks[group.rank], hosts[group.rank])
        with node.replicas:
            node.commit(1)
            group.barrier(what="done", timeout=20)

    run_ranks(5, work)
    kept = [{rank_of(name) for name in disk["spare"].files} - {None} for disk in disks]
    assert kept == [{3}, {4}, set(), {0, 2}, {1}]


def test_a_keeper_that_dies_holds_up_no_commit(caplog, monkeypatch):
    monkeypatch.setattr("gpuckpt.replicas.follower.PAUSES_SECONDS", (0.01, 0.05))
    disks = [new_disk() for _ in range(2)]

    def work(group: Meeting) -> None:
        node = Node(group, disks[group.rank])
        with node.replicas:
            node.commit(1)
            group.barrier(what="done", timeout=20)
            if group.rank == 1:
                return
            files = files_of(0, 2)
            node.disk["root"].files |= {name: bytearray(data) for name, data in files.items()}
            node.replicas.after_commit(list(files))
            assert not node.replicas.is_kept(0.2)

    with caplog.at_level(logging.WARNING):
        run_ranks(2, work)


# Who keeps whose


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=24))
def test_a_copy_is_on_another_machine_if_there_is_one_and_no_rank_has_more_than_its_share(hosts):
    found = keepers(hosts)
    for rank, keeper in enumerate(found):
        assert (hosts[keeper] != hosts[rank]) == (len(set(hosts)) > 1)
        assert (keeper != rank) == (len(hosts) > 1)
    sizes = Counter(hosts)
    for keeper, count in Counter(found).items():
        assert count <= -(-max(sizes.values()) // sizes[hosts[keeper]])


@given(st.integers(0, 10**6 - 1), st.integers(0, 10**12 - 1), st.integers(0, 10**6 - 1))
def test_the_rank_of_a_file_is_in_its_name(rank, step, part):
    name = segment_name(step, "0badcafe", rank, part)
    assert rank_of(name) == rank
    assert is_file(name)
    assert rank_of(manifest_name(step)) is None


items = st.builds(
    Item,
    st.builds(segment_name, st.integers(0, 99), st.just("0badcafe"), st.integers(0, 9), st.just(0))
    | st.builds(manifest_name, st.integers(0, 99)),
    st.integers(0, 2**40),
    st.text("0123456789abcdef", max_size=32),
)


@given(st.lists(items))
def test_unpacking_items_undoes_packing_them(found):
    assert unpack_items(pack_items(found), "here") == found


@pytest.mark.parametrize(
    "rows",
    [None, 3, [3], [["x", 1, ""]], [["../step-000000000001.manifest.json", 1, ""]], [["a", 1]]]
    + [[[manifest_name(1), value, ""]] for value in (-1, 1.5, "1", None, True)]
    + [[[manifest_name(1), 1, 5]]],
)
def test_what_is_no_list_of_files_is_refused(rows):
    with pytest.raises(gpuckpt.CorruptError):
        unpack_items(rows, "rank 3")


# Nobody else is served


@contextlib.contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Peer]:
    server = Server({"root": MemoryStore(files), "spare": MemoryStore()}, "127.0.0.1")
    port = server.start()
    server.trust(SECRET)
    try:
        yield Peer(0, "here", "127.0.0.1", port)
    finally:
        server.close()


def test_a_file_comes_as_it_is_whatever_its_length():
    for nbytes in (0, 1, 5, wire.PART_NBYTES - 1, wire.PART_NBYTES, 2 * wire.PART_NBYTES + 7):
        data = os.urandom(nbytes)
        name = segment_name(1, "0badcafe", 0, 0)
        with serving({name: data}) as peer, calling(peer, SECRET) as caller:
            assert b"".join(bytes(p) for p in caller.fetch("root", Item(name, nbytes))) == data


def test_who_does_not_know_the_secret_is_told_nothing_and_learns_nothing():
    with serving(files_of(0, 1)) as peer:
        with pytest.raises(gpuckpt.StorageError, match="has gone"), calling(peer, b"x" * 32):
            pass
        with socket.create_connection((peer.address, peer.port), 5) as stranger:
            stranger.settimeout(5)
            assert len(wire.receive(stranger, wire.NONCE_NBYTES)) == wire.NONCE_NBYTES
            wire.send(stranger, {"ask": "root", "name": manifest_name(1)})
            stranger.sendall(bytes(64))
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(100) == b""
        with calling(peer, SECRET) as caller:
            assert len(list(caller.fetch("root", Item(manifest_name(1), 13)))) == 1


def test_a_server_that_does_not_know_the_secret_is_not_told_anything():
    with socket.create_server(("127.0.0.1", 0)) as other:

        def pretend() -> None:
            peer, _ = other.accept()
            with peer:
                peer.sendall(bytes(wire.NONCE_NBYTES))
                wire.receive(peer, 2 * wire.NONCE_NBYTES)
                peer.sendall(bytes(wire.NONCE_NBYTES))
                with contextlib.suppress(gpuckpt.StorageError, OSError):
                    wire.receive(peer, 1)

        thread = threading.Thread(target=pretend)
        thread.start()
        peer = Peer(0, "here", "127.0.0.1", other.getsockname()[1])
        with pytest.raises(gpuckpt.AuthenticationError), calling(peer, SECRET):
            pass
        thread.join(10)


@pytest.mark.parametrize(
    "asked",
    [
        {"ask": "root", "name": "secret.txt"},
        {"ask": "root", "name": "../secret.txt"},
        {"ask": "root", "name": "/etc/passwd"},
        {"ask": "root", "name": 3},
        {"ask": "root", "name": None},
        {"ask": "root", "name": manifest_name(5)},
    ],
)
def test_no_file_is_served_but_those_of_checkpoints(asked):
    files = {"secret.txt": b"x", manifest_name(1): b"m"}
    with serving(files) as peer, calling(peer, SECRET) as caller:
        wire.send(caller._connection, asked)
        with pytest.raises(gpuckpt.StorageError, match="doesn't have the file"):
            list(wire.take_file(caller._connection, 1, memoryview(bytearray(9))))


@pytest.mark.parametrize(
    "bytes_",
    [b"\xff\xff\xff\xff", b"\x03\0\0\0{]}", b"\x02\0\0\0{}", b"\x04\0\0\0null", b"\x01\0"],
)
def test_nonsense_from_one_who_knows_the_secret_ends_that_connection_alone(bytes_):
    with serving(files_of(0, 1)) as peer:
        with calling(peer, SECRET) as caller:
            caller._connection.sendall(bytes_)
            caller._connection.shutdown(socket.SHUT_WR)
            assert caller._connection.recv(10) == b""
        with calling(peer, SECRET) as caller:
            assert caller.fetch("root", Item(manifest_name(1), 13)) is not None


def test_bytes_that_change_on_the_way_are_found():
    here, there = socket.socketpair()
    with here, there:
        for one in (here, there):
            one.settimeout(5)
        wire.send_file(here, 3, [memoryview(b"abc")])
        sent = bytearray(wire.receive(there, 8 + 3 + 16))
        sent[9] ^= 1
        here.sendall(sent)
        with pytest.raises(gpuckpt.CorruptError, match="isn't what was sent"):
            list(wire.take_file(there, 3, memoryview(bytearray(2))))
        wire.send_file(here, 3, [memoryview(b"abc")])
        with pytest.raises(gpuckpt.CorruptError, match="3 bytes, 4 expected"):
            list(wire.take_file(there, 4, memoryview(bytearray(2))))


def test_a_copy_that_was_cut_short_is_begun_anew(monkeypatch):
    monkeypatch.setattr("gpuckpt.replicas.follower.PAUSES_SECONDS", (0.01, 0.05))
    taken, send_file = [0], wire.send_file

    def cut(peer: socket.socket, nbytes: int, parts: Any) -> None:
        taken[0] += 1
        if taken[0] in (1, 4):
            peer.sendall((nbytes).to_bytes(8, "little") + b"abc")
            peer.close()
            raise OSError("it broke")
        send_file(peer, nbytes, parts)

    monkeypatch.setattr(wire, "send_file", cut)
    disks = [new_disk() for _ in range(2)]
    lives(disks, lambda node: node.commit(3))
    for rank, disk in enumerate(disks):
        assert copies_in(disk) == files_of(1 - rank, 3)


# Real processes


def test_files_that_can_not_be_seen_are_not_offered():
    disk = MemoryStore({"lock": b"", "saves.jsonl": b"", **files_of(0, 1)})
    disk.files[manifest_name(2) + ".tmp"] = bytearray(b"half")
    assert {item.name for item in every_item(disk)} == set(files_of(0, 1))
