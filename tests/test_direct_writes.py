"""Long files are written past the page cache: the same bytes, the same errors, nothing left behind.

Most tests use blocks of a few KiB, so that every short file takes the way of a long one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuckpt
from gpuckpt import layout, segments
from gpuckpt.errors import StorageError
from gpuckpt.segments import Writer
from gpuckpt.stores import read_all
from gpuckpt.stores.blocks import ALIGNMENT, Blocks, lies_in_memory, set_direct
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryAppender, MemoryStore
from tests.often import some
from tests.test_interrupts import interrupted_after, own_threads

KIB = 1 << 10


def small_blocks(count: int = 3, begin: int = ALIGNMENT) -> Blocks:
    return Blocks(2 * ALIGNMENT, count, begin)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    with (tmp_path / "probe").open("wb") as file:
        try:
            set_direct(file.fileno(), on=True)
        except OSError as error:
            pytest.skip(f"the file system takes no direct writes: {error}")
        if lies_in_memory(file.fileno()):
            pytest.skip("the directory lies in memory")
    (tmp_path / "probe").unlink()
    return LocalStore(tmp_path, blocks=small_blocks())


def noise(nbytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def open_files(below: Path) -> list[str]:
    """The files in a directory that this process has open."""
    targets = []
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            targets.append(str(Path(entry.path).readlink()))
    return [target for target in targets if target.startswith(str(below))]


class System:
    """The system's writes, each of which a test may see, shorten or refuse."""

    def __init__(self, rule: Callable[[int, bool, int], int]) -> None:
        """`rule` gets the number of a write, whether it is direct, and its bytes; says how many."""
        self.rule, self.calls = rule, list[tuple[bool, int]]()
        self._pwritev = os.pwritev
        self._lock = threading.Lock()

    def pwritev(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        nbytes = sum(view.nbytes for view in views)
        with self._lock:
            number = len(self.calls)
            self.calls.append((direct, nbytes))
        count = self.rule(number, direct, nbytes)
        return (
            self._pwritev(descriptor, [memoryview(b"".join(views))[:count]], offset)
            if (count < nbytes)
            else self._pwritev(descriptor, views, offset)
        )


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, bool, int], int]], System]:
    def install(rule: Callable[[int, bool, int], int]) -> System:
        made = System(rule)
        monkeypatch.setattr(os, "pwritev", made.pwritev)
        return made

    return install


def as_asked(number: int, direct: bool, nbytes: int) -> int:
    return nbytes


# The bytes


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30_000), max_size=4), max_size=8),
    st.integers(1, 4),
    st.integers(0, 5),
    st.sets(st.integers(0, 8)),
)
def test_a_long_file_has_the_bytes_that_were_appended(lengths, count, begin, syncs):
    with tempfile.TemporaryDirectory() as root:
        store = LocalStore(root, blocks=small_blocks(count, begin * ALIGNMENT))
        file, whole = store.create("f"), b""
        for at, parts in enumerate(lengths):
            data = [noise(nbytes, at) for nbytes in parts]
            room = [bytearray(part) for part in data]
            file.append([memoryview(part) for part in room])
            for part in room:  # it is the caller's again
                part[:] = bytes(len(part))
            whole += b"".join(data)
            assert file.offset == len(whole)
            if at in syncs:
                file.sync()
                assert (Path(root) / "f").read_bytes() == whole
        file.sync()
        file.close()
        assert (Path(root) / "f").read_bytes() == whole
    assert own_threads() == []


def test_the_middle_of_a_long_file_is_written_directly_and_only_its_ends_are_cached(store, system):
    seen = system(as_asked)
    file, data = store.create("f"), noise(50 * KIB)
    file.append([data[:10], data[10:]])
    file.sync()
    file.close()
    block = 2 * ALIGNMENT
    assert [nbytes for direct, nbytes in seen.calls if not direct] == [ALIGNMENT, 2 * KIB]
    assert [nbytes for direct, nbytes in seen.calls if direct] == [block] * 5 + [ALIGNMENT]
    assert read_all(store, "f") == data


def test_a_short_file_needs_no_blocks_and_no_thread(tmp_path, system):
    seen, store = system(as_asked), LocalStore(tmp_path)
    file = store.create("f")
    for _ in range(8):
        file.append([bytes(1 << 20)])
    assert own_threads() == []
    file.sync()
    file.close()
    assert store.blocks.nbytes == 0
    assert not any(direct for direct, _ in seen.calls)


def test_blocks_are_kept_from_file_to_file(store):
    kept = set()
    for name in "abc":
        file = store.create(name)
        file.append([noise(40 * KIB)])
        kept.add(id(store.blocks.current().memory.base))
        file.sync()
        file.close()
        assert store.blocks.nbytes == 6 * ALIGNMENT
    assert len(kept) == 1


def test_segments_of_a_save_take_turns_with_the_blocks(store):
    writer = Writer(store, lambda part: f"s{part}", segment_nbytes=40 * KIB)
    chunks = [noise(nbytes, nbytes) for nbytes in (35_000, 5, 30_000, 9_999, 45_000, 41_000, 1)]
    extents = [writer.write([[memoryview(chunk)]])[0] for chunk in chunks]
    writer.finish([], 3)
    assert len(writer.names) > 3
    for chunk, extent in zip(chunks, extents, strict=True):
        with segments.open_segment(store, extent.segment) as reader:
            room = np.empty(extent.length, np.uint8)
            assert b"".join(bytes(part) for part in reader.read(extent, room)) == chunk
    for name in writer.names:
        assert segments.read_index(store, name) == (3, ())
    assert own_threads() == []


def test_two_files_that_are_written_at_once_by_two_threads_have_their_own_bytes(store):
    def write(name: str, seed: int) -> None:
        file = store.create(name)
        for at in range(30):
            file.append([noise(3000 + at, seed + at)])
        file.sync()
        file.close()

    threads = [threading.Thread(target=write, args=(f"f{at}", 100 * at)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at in range(3):
        expected = b"".join(noise(3000 + i, 100 * at + i) for i in range(30))
        assert read_all(store, f"f{at}") == expected
    assert own_threads() == []


def test_no_sync_comes_before_a_write_has_ended(store, system, monkeypatch):
    going, fsync = set[int](), os.fsync

    def slow(number: int, direct: bool, nbytes: int) -> int:
        going.add(number)
        if direct:
            threading.Event().wait(0.01)
        going.discard(number)
        return nbytes

    seen = system(slow)

    def watching(descriptor: int) -> None:
        assert not going
        counts.append(sum(nbytes for _, nbytes in seen.calls))
        fsync(descriptor)

    counts = list[int]()
    monkeypatch.setattr(os, "fsync", watching)
    file = store.create("f")
    file.append([noise(30 * KIB)])
    file.sync()
    file.close()
    assert counts[-1] == 30 * KIB


# File systems that refuse direct writes


def test_where_the_flag_is_refused_files_are_cached(store, system, monkeypatch):
    seen, plain = system(as_asked), fcntl.fcntl
    tries = list[int]()

    def refusing(descriptor: int, command: int, argument: int = 0) -> Any:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            tries.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    for name in "ab":
        file = store.create(name)
        file.append([noise(50 * KIB)])
        file.append([b"end"])
        file.sync()
        file.close()
        assert read_all(store, name) == noise(50 * KIB) + b"end"
    assert not any(direct for direct, _ in seen.calls)
    assert len(tries) == 1, "a store asks once"
    assert (store.blocks.nbytes, own_threads()) == (0, [])


@pytest.mark.parametrize("first", [1, 2, 4])
def test_where_a_direct_write_is_refused_files_are_cached(store, system, first):
    def refusing(number: int, direct: bool, nbytes: int) -> int:
        if direct and number >= first:
            raise OSError(errno.EINVAL, "Invalid argument")
        return nbytes

    system(refusing)
    for name in "ab":
        file = store.create(name)
        for at in range(6):
            file.append([noise(10 * KIB, at)])
        file.sync()
        file.close()
        assert read_all(store, name) == b"".join(noise(10 * KIB, at) for at in range(6))
    assert store.blocks.refused
    assert own_threads() == []


@pytest.mark.parametrize("directory", ["/dev/shm", "/tmp", "."])
def test_a_long_file_is_the_same_on_any_file_system(directory):
    if not os.access(directory, os.W_OK):
        pytest.skip(f"can't write to {directory}")
    with tempfile.TemporaryDirectory(dir=directory) as root:
        data = noise(21_000_001)
        for name, store in (
            ("one", LocalStore(root)),
            ("small", LocalStore(root, blocks=small_blocks())),
        ):
            file = store.create(name)
            file.append([data[:1000], data[1000:20_000_000], data[20_000_000:]])
            file.sync()
            file.close()
            assert read_all(store, name) == data


def test_files_in_memory_are_written_without_a_second_copy():
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("there is no /dev/shm")
    with tempfile.TemporaryDirectory(dir=shared) as root:
        store = LocalStore(root, blocks=small_blocks())
        file, data = store.create("f"), noise(50 * KIB)
        file.append([data])
        assert (store.blocks.refused, store.blocks.nbytes) == (True, 0)
        file.sync()
        file.close()
        assert read_all(store, "f") == data


# Errors


def test_a_refusal_that_only_the_last_write_meets_is_remembered(store, system):
    def refusing(number: int, direct: bool, nbytes: int) -> int:
        if direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return nbytes

    system(refusing)
    file = store.create("f")
    file.append([noise(3 * ALIGNMENT - 1)])
    file.sync()
    file.close()
    assert store.blocks.refused
    assert read_all(store, "f") == noise(3 * ALIGNMENT - 1)


def refuse_write(at: int, code: int) -> Callable[[int, bool, int], int]:
    def rule(number: int, direct: bool, nbytes: int) -> int:
        if number >= at:
            raise OSError(code, os.strerror(code))
        return nbytes

    return rule


@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_an_error_of_any_write_is_raised_with_its_remedy_and_none_is_lost(store, system, at, code):
    system(refuse_write(at, code))
    file, told = store.create("f"), list[StorageError]()
    for _ in range(6):
        try:
            file.append([noise(10 * KIB)])
        except StorageError as error:
            told.append(error)
    with pytest.raises(StorageError) as caught:
        file.sync()
    file.close()
    for one in (*told, caught.value):
        assert one.errno == code
        assert str(store.root) in str(one)
        assert os.strerror(code) in str(one)
        assert ";" in str(one), "what to do"
    assert (own_threads(), open_files(Path(store.root))) == ([], [])


def test_an_error_that_nobody_has_heard_of_is_raised_by_close(store, system):
    system(refuse_write(1, errno.ENOSPC))
    file = store.create("f")
    file.append([noise(3 * ALIGNMENT)])  # the beginning, and one block in the background
    store.blocks.settle()
    with pytest.raises(StorageError, match="full"):
        file.close()
    file.close()
    assert (own_threads(), open_files(Path(store.root))) == ([], [])


@pytest.mark.parametrize("which", [1, 2], ids=["its last blocks", "its end"])
def test_an_error_of_a_file_that_gave_way_is_its_own(store, system, which):
    refused = set[int]()

    def rule(number: int, direct: bool, nbytes: int) -> int:
        if number in refused:
            raise OSError(errno.EIO, "Input/output error")
        return nbytes

    seen = system(rule)
    one = store.create("one")
    one.append([noise(ALIGNMENT + 6 * KIB)])
    other = store.create("other")
    refused.add(len(seen.calls) + which)  # after the other's beginning, what is left of this one
    other.append([noise(20 * KIB)])
    other.sync()
    other.close()
    with pytest.raises(StorageError, match="disk reports an error"):
        one.append([noise(20 * KIB)])
    with pytest.raises(StorageError, match="disk reports an error"):
        one.sync()
    one.close()
    assert read_all(store, "other") == noise(20 * KIB)


def test_a_real_limit_of_a_file_is_an_error(tmp_path):
    program = """
        import resource, sys, threading
        from gpuckpt.errors import StorageError
        from gpuckpt.stores.local import LocalStore
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, 20 << 20))
        file = LocalStore(sys.argv[1]).create("f")
        try:
            for _ in range(40):
                file.append([bytes(1 << 20)])
            file.sync()
        except StorageError as error:
            print(error.errno)
        file.close()
        print(threading.active_count())
    """
    assert run(program, tmp_path).split() == [str(errno.EFBIG), "1"]


@pytest.mark.parametrize("odd", [1, 511, 512, ALIGNMENT, 5000])
def test_writes_that_stop_short_are_gone_on_with(store, system, odd):
    system(lambda number, direct, nbytes: min(nbytes, odd) if number % 2 else nbytes)
    for name in "ab":
        file = store.create(name)
        file.append([noise(60 * KIB)])
        file.sync()
        file.close()
        assert read_all(store, name) == noise(60 * KIB)


def test_a_write_of_nothing_is_an_error_and_not_for_ever(store, system):
    system(lambda number, direct, nbytes: 0 if number == 3 else nbytes)
    file = store.create("f")
    with contextlib.suppress(StorageError):
        file.append([noise(60 * KIB)])
    with pytest.raises(StorageError, match="wrote nothing"):
        file.sync()
    file.close()


def test_a_save_onto_a_full_disk_fails_leaves_nothing_and_the_next_one_works(
    store, tmp_path, system
):
    full, state = [False], {"w": np.arange(50_000.0), "step": 1}

    def rule(number: int, direct: bool, nbytes: int) -> int:
        if full[0] and direct:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return nbytes

    system(rule)
    with gpuckpt.Checkpointer(tmp_path, store=store, codec="raw", full_every=1) as ckpt:
        ckpt.save(1, state).result()
        full[0] = True
        with pytest.raises(StorageError, match="full"):
            ckpt.save(2, state).result()
        with pytest.raises(StorageError, match="full"):
            ckpt.wait()
        full[0] = False
        assert len(store.names()) == 3, "the lock, one manifest, one segment"
        ckpt.save(3, state).result()
    assert (gpuckpt.load(tmp_path)["w"] == state["w"]).all()
    assert own_threads() == []


# Ends that aren't the usual one


def test_a_file_that_is_given_up_is_closed_without_writing_what_waits(store, system):
    gate, begun = threading.Event(), threading.Event()

    def rule(number: int, direct: bool, nbytes: int) -> int:
        if direct:
            begun.set()
            gate.wait(30)
        return nbytes

    seen = system(rule)
    file = store.create("f")
    file.append([noise(7 * ALIGNMENT)])
    begun.wait(30)

    def open_when_given_up() -> None:
        while not file._file._fate.given_up:
            time.sleep(0.001)
        gate.set()

    opener = threading.Thread(target=open_when_given_up)
    opener.start()
    file.close()
    opener.join()
    assert sum(direct for direct, _ in seen.calls) == 1, "the one that had begun"
    assert (own_threads(), open_files(Path(store.root))) == ([], [])


def test_append_waits_only_when_every_block_waits(store, system):
    gate = threading.Event()

    def rule(number: int, direct: bool, nbytes: int) -> int:
        if direct:
            gate.wait(30)
        return nbytes

    system(rule)
    file, data = store.create("f"), noise(12 * ALIGNMENT)
    file.append([data[: 7 * ALIGNMENT]])  # three blocks, and the disk stands still
    assert file.offset == 7 * ALIGNMENT
    rest = threading.Thread(target=file.append, args=([data[7 * ALIGNMENT :]],))
    rest.start()
    rest.join(0.1)
    assert rest.is_alive()
    gate.set()
    rest.join()
    file.sync()
    file.close()
    assert read_all(store, "f") == data


def test_without_a_thread_files_are_written_all_the_same(store, monkeypatch):
    def refusing(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refusing)
    file, data = store.create("f"), noise(100 * KIB)
    file.append([data])
    file.sync()
    file.close()
    assert read_all(store, "f") == data


def test_an_interrupt_of_append_leaves_no_thread_no_open_file_and_a_store_that_works(store):
    data = noise(3 * ALIGNMENT)
    for at in some(range(40)):
        file = store.create(f"f{at}")
        with contextlib.suppress(KeyboardInterrupt), interrupted_after(0.0005 + at * 0.0002):
            while True:
                file.append([data])
        try:
            file.sync()
        except StorageError as error:
            assert "cut short" in str(error)  # noqa: PT017 - or none, between two appends
        else:
            assert read_all(store, f"f{at}") == data * (file.offset // len(data))
        file.close()
        assert open_files(Path(store.root)) == []
        assert_no_thread_is_left()
    file = store.create("after")
    file.append([data])
    file.sync()
    file.close()
    assert read_all(store, "after") == data


def test_an_interrupted_close_is_raised_when_no_write_goes_on_any_more(store, system):
    gate, begun, ended, closing = (threading.Event() for _ in range(4))

    def open_a_little_later() -> None:
        closing.wait(30)
        time.sleep(0.2)
        gate.set()

    def rule(number: int, direct: bool, nbytes: int) -> int:
        if direct:
            begun.set()
            gate.wait(30)
            ended.set()
        return nbytes

    system(rule)
    file = store.create("f")
    file.append([noise(5 * ALIGNMENT)])
    begun.wait(30)
    opener = threading.Thread(target=open_a_little_later)
    opener.start()
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.05, 0.05):  # noqa: PT012
        closing.set()
        file.close()
    assert ended.is_set()
    assert open_files(Path(store.root)) == []
    assert_no_thread_is_left()
    opener.join()


def run(program: str, root: Path) -> str:
    """What a program prints that ends by itself and complains of nothing."""
    command = [sys.executable, "-c", textwrap.dedent(program), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_process_ends_though_a_file_was_never_closed(tmp_path):
    program = """
        import sys
        from gpuckpt.stores.local import LocalStore
        file = LocalStore(sys.argv[1]).create("f")
        file.append([bytes(30 << 20)])
        print(file.offset)
    """
    assert run(program, tmp_path) == f"{30 << 20}\n"


def test_a_forked_child_can_neither_write_the_parents_file_nor_hang_on_it(store, tmp_path):
    program = """
        import os, sys, threading
        from gpuckpt.errors import StorageError
        from gpuckpt.stores.local import LocalStore

        gate, pwritev = threading.Event(), os.pwritev

        def waiting(*arguments):
            gate.wait()
            return pwritev(*arguments)

        store = LocalStore(sys.argv[1])
        file = store.create("parent")
        file.append([b"x" * (9 << 20)])
        os.pwritev = waiting
        file.append([b"x" * (10 << 20)])
        child = os.fork()
        if child == 0:
            os.pwritev = pwritev
            for use in (lambda: file.append([b"y"]), file.sync):
                try:
                    use()
                except StorageError as error:
                    assert "not this one" in str(error)
                else:
                    os._exit(1)
            file.close()
            own = store.create("child")
            own.append([b"z" * (20 << 20)])
            own.sync()
            own.close()
            os._exit(0)
        print(os.waitpid(child, 0)[1])
        gate.set()
        file.sync()
        file.close()
    """
    assert run(program, tmp_path) == "0\n"
    store = LocalStore(tmp_path)
    assert read_all(store, "parent") == b"x" * (19 << 20)
    assert read_all(store, "child") == b"z" * (20 << 20)


def test_a_kill_in_the_middle_of_direct_writing_leaves_only_what_is_swept_away(tmp_path):
    gpuckpt.save(tmp_path, {"w": np.arange(10.0)}, 1)
    program = """
        import os, signal, sys
        import numpy as np
        import gpuckpt

        pwritev, count = os.pwritev, 0

        def killed(*arguments):
            global count
            count += 1
            if count == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            return pwritev(*arguments)

        os.pwritev = killed
        gpuckpt.save(sys.argv[1], {"w": np.ones(10_000_000)}, 2, codec="raw")
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    killed = subprocess.run(command, check=False, timeout=60)
    assert killed.returncode == -9
    left = [path for path in tmp_path.iterdir() if layout.segment_step(path.name) == 2]
    assert [path.stat().st_size > 8 << 20 for path in left] == [True]
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        assert ckpt.steps() == [1]
        assert not left[0].exists()
    assert (gpuckpt.load(tmp_path)["w"] == np.arange(10.0)).all()


class Costly(MemoryAppender):
    cpu_seconds = 1000.0


class CostlyStore(MemoryStore):
    def create(self, name: str) -> Costly:
        super().create(name)
        return Costly(self.files[name])


def test_a_save_counts_the_cpu_seconds_of_the_stores_own_threads():
    with gpuckpt.Checkpointer("", store=CostlyStore()) as ckpt:
        pending = ckpt.save(1, {"w": np.ones(10)})
        pending.result()
    assert pending.stats.cpu_seconds > 1000


def test_a_long_file_counts_the_cpu_seconds_of_its_thread(store):
    file = store.create("f")
    assert file.cpu_seconds == 0
    for _ in range(20):
        file.append([noise(100 * KIB)])
    file.sync()
    file.close()
    assert 0 < file.cpu_seconds < 10


def assert_no_thread_is_left() -> None:
    """None is left, nor one that will end in a second for want of work."""
    soon = time.monotonic() + 0.5
    while own_threads() and time.monotonic() < soon:
        time.sleep(0.001)
    assert own_threads() == []
