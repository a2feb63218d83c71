"""Object stores: the contract on each client, the lease, lost answers, and struck requests.

Services are processes on loopback; those that aren't installed are skipped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import gpuckpt
from bench.durability.endpoints import (
    BUCKET,
    PART_NBYTES,
    AbsentError,
    Endpoint,
    azurite,
    environment,
    moto,
    s3rver,
)
from bench.durability.proxy import Fault, proxy_to
from bench.durability.requests import (
    Campaign,
    at,
    for_a_while,
    from_there,
    plans,
    same,
    state_at,
)
from gpuckpt.cli import app
from gpuckpt.commit import commit, open_step, steps
from gpuckpt.errors import InvalidError, LockedError, NotFoundError, StorageError
from gpuckpt.layout import LOCK, manifest_name
from gpuckpt.manifest import unpack_manifest
from gpuckpt.restore import READS_TOGETHER
from gpuckpt.stores import read_all, write_all
from gpuckpt.stores.clients import (
    ClashError,
    Client,
    ClientError,
    MissingError,
    Over,
    PassingError,
    RefusedError,
    Tag,
    UnableError,
)
from gpuckpt.stores.lease import SKEW_SECONDS, Holder
from gpuckpt.stores.objects import ObjectStore
from gpuckpt.stores.opening import open_store
from gpuckpt.stores.over_obstore import open_client
from gpuckpt.stores.retrying import Retries
from tests.stores_contract import StoreContract, small_manifest

HASTY = Retries(tries=3, first_seconds=0.001, most_seconds=0.002)
numbered = itertools.count()


def store_of(client: Client, root: str = "test://root") -> ObjectStore:
    return ObjectStore(client, root, retries=HASTY, part_nbytes=PART_NBYTES)


# The clients


class Conditional(StoreContract):
    """A service whose puts can depend on what is there."""

    def test_a_put_depends_on_what_is_there(self, store: ObjectStore):
        client = store._client
        first = client.put("f", b"1", "nothing")
        with pytest.raises(ClashError):
            client.put("f", b"x", "nothing")
        assert client.get("f") == (b"1", first)
        assert client.head("f") == (1, first)
        second = client.put("f", b"2", first)
        for over in (first, "nothing"):
            with pytest.raises(ClashError):
                client.put("f", b"x", over)
        assert client.get("f") == (b"2", second)
        client.put("f", b"3", "anything")
        client.delete("f")
        client.delete("f")
        with pytest.raises((ClashError, MissingError)):
            client.put("f", b"x", second)
        with pytest.raises(MissingError):
            client.head("f")


class TestObstoresMemory(Conditional):
    @pytest.fixture
    def root(self) -> str:
        return f"memory://bucket-{next(numbered)}/run"

    @pytest.fixture
    def store(self, root: str) -> ObjectStore:
        return self.opened(root)

    @pytest.fixture
    def again(self, root: str) -> ObjectStore:
        return self.opened(root)

    def opened(self, root: str) -> ObjectStore:
        pytest.importorskip("obstore")
        store = open_store(root)
        assert isinstance(store, ObjectStore)
        store._part_nbytes = PART_NBYTES
        return store


class TestObstoresFiles(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        stores = pytest.importorskip("obstore.store")
        from gpuckpt.stores.over_obstore import ObstoreClient

        return store_of(ObstoreClient(stores.LocalStore(tmp_path), "run"))

    @pytest.fixture
    def again(self, store: ObjectStore) -> ObjectStore:
        return store_of(store._client)


class Fsspecs(StoreContract):
    def test_a_put_can_depend_on_a_files_not_being_there_alone(self, store: ObjectStore):
        client = store._client
        first = client.put("f", b"1", "nothing")
        with pytest.raises(ClashError):
            client.put("f", b"x", "nothing")
        with pytest.raises(UnableError):
            client.put("f", b"x", first)
        assert client.get("f") == (b"1", first)
        second = client.put("f", b"2", "anything")
        assert second != first
        assert client.head("f") == (1, second)


class TestFsspecsMemory(Fsspecs):
    @pytest.fixture
    def store(self) -> ObjectStore:
        files = pytest.importorskip("fsspec").filesystem("memory")
        from gpuckpt.stores.over_fsspec import FsspecClient

        return store_of(FsspecClient(files, f"/root-{next(numbered)}/run"))

    @pytest.fixture
    def again(self, store: ObjectStore) -> ObjectStore:
        return store_of(store._client)


class TestFsspecsFiles(Fsspecs):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        files = pytest.importorskip("fsspec").filesystem("file")
        from gpuckpt.stores.over_fsspec import FsspecClient

        return store_of(FsspecClient(files, str(tmp_path / "not" / "there")))

    @pytest.fixture
    def again(self, store: ObjectStore) -> ObjectStore:
        return store_of(store._client)


def test_where_a_file_cannot_be_replaced_it_is_removed_first(tmp_path):
    """As on HDFS."""
    pytest.importorskip("fsspec")
    from fsspec.implementations.local import LocalFileSystem

    from gpuckpt.stores.over_fsspec import FsspecClient

    class Strict(LocalFileSystem):  # type: ignore[misc]
        cachable = False

        def mv(self, path1: str, path2: str, **_: Any) -> None:
            if self.exists(path2):
                raise OSError("the destination exists")
            super().mv(path1, path2)

    store = store_of(FsspecClient(Strict(), str(tmp_path)))
    for content in (b"old", b"new"):
        with store.lock():
            store.publish("m", content)
        assert read_all(store, "m") == content
    assert store.names() == ["lock", "m"]


def running(server: contextlib.AbstractContextManager[Endpoint]) -> Iterator[Endpoint]:
    pytest.importorskip("obstore")
    with contextlib.ExitStack() as stack:
        try:
            endpoint = stack.enter_context(server)
        except AbsentError as error:
            pytest.skip(str(error))
        yield endpoint


class OnService:
    """A service that `endpoint` gives; each test has a root of its own."""

    @pytest.fixture
    def root(self, endpoint: Endpoint) -> str:
        return f"{endpoint.scheme}://{BUCKET}/runs/{next(numbered)}"

    @pytest.fixture
    def store(self, endpoint: Endpoint, root: str) -> ObjectStore:
        return self.opened(endpoint, root)

    @pytest.fixture
    def again(self, endpoint: Endpoint, root: str) -> ObjectStore:
        return self.opened(endpoint, root)

    def opened(self, endpoint: Endpoint, root: str) -> ObjectStore:
        with environment(endpoint.environment):
            store = open_store(root)
        assert isinstance(store, ObjectStore)
        store._part_nbytes = PART_NBYTES
        return store


@pytest.fixture(scope="module")
def moto_server() -> Iterator[Endpoint]:
    yield from running(moto())


@pytest.fixture(scope="module")
def s3rver_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    yield from running(s3rver(tmp_path_factory.mktemp("s3rver")))


@pytest.fixture(scope="module")
def azurite_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    yield from running(azurite(tmp_path_factory.mktemp("azurite")))


class TestMoto(OnService, Conditional):
    @pytest.fixture
    def endpoint(self, moto_server: Endpoint) -> Endpoint:
        return moto_server

    def test_an_upload_that_is_given_up_leaves_nothing(self, endpoint, store):
        boto3 = pytest.importorskip("boto3")
        with environment(endpoint.environment):
            client = boto3.client("s3", endpoint_url=endpoint.url)
        file = store.create("f")
        file.append([bytes(5 * PART_NBYTES)])
        file.close()
        assert store.names() == []
        assert not client.list_multipart_uploads(Bucket=BUCKET).get("Uploads")
        with pytest.raises(NotFoundError):
            store.size("f")

    def test_a_listing_has_all_pages_and_no_other_prefix(self, endpoint, root, store):
        client = store._client
        names = [f"file-{at:04}" for at in range(1005)]
        threads = [
            threading.Thread(
                target=lambda some: [client.put(name, b"", "anything") for name in some],
                args=(names[at::4],),
            )
            for at in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        write_all(self.opened(endpoint, f"{root}/below"), "f", b"x")
        write_all(self.opened(endpoint, f"{root}0"), "f", b"x")
        assert store.names() == names

    def test_a_root_in_a_bucket_that_is_not_there_says_so(self, endpoint):
        store = self.opened(endpoint, "s3://nobodys-bucket/run")
        with pytest.raises(StorageError, match="make it first"), store.lock():
            pass


CHILD = """
import sys, gpuckpt
from bench.durability.requests import state_at
from gpuckpt.stores.opening import open_store
store = open_store(sys.argv[1])
store._part_nbytes = int(sys.argv[2])
with gpuckpt.Checkpointer("", store=store, keep=gpuckpt.Keep(last=2), codec="raw") as ckpt:
    step = ckpt.resume(state_at(1))
    while True:
        step += 1
        ckpt.save(step, state_at(step)).result()
        print(step, flush=True)
"""


def test_a_killed_run_goes_on_at_once_with_what_it_said_was_durable(moto_server):
    root = f"s3://{BUCKET}/runs/{next(numbered)}"
    told = 0
    for saves in (2, 3, 1):
        words = [sys.executable, "-c", CHILD, root, str(PART_NBYTES)]
        variables = {**os.environ, **moto_server.environment}
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=variables) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline() for _ in range(saves)]
            time.sleep(0.007 * told)
            child.kill()
            lines += [line for line in child.stdout if line.endswith("\n")]
        assert int(lines[0]) in (told + 1, told + 2)  # the last may have been saved, and not told
        told = int(lines[-1])
    with environment(moto_server.environment):
        state = state_at(1)
        with gpuckpt.Checkpointer(root) as ckpt:
            done = ckpt.resume(state)
        store = open_store(root)
    assert done in (told, told + 1)
    assert same(state, state_at(done))
    named = {name for step in steps(store) for name in open_step(store, step).segments}
    assert {name for name in store.names() if name.endswith(".segment")} == named


class TestS3rver(OnService, StoreContract):
    """It heeds no conditions: whoever comes second overwrites the first."""

    @pytest.fixture
    def endpoint(self, s3rver_server: Endpoint) -> Endpoint:
        return s3rver_server


class TestAzurite(OnService, Conditional):
    @pytest.fixture
    def endpoint(self, azurite_server: Endpoint) -> Endpoint:
        return azurite_server


# Roots that are URLs


def test_everything_that_takes_a_root_takes_a_url(tmp_path):
    pytest.importorskip("obstore")
    root, copy = f"memory://bucket-{next(numbered)}/run", f"memory://bucket-{next(numbered)}"
    key = bytes(range(32))
    (tmp_path / "key").write_bytes(key)
    state = {"w": np.arange(1000.0), "b": np.ones(3, "f4"), "n": 7}
    saved = gpuckpt.save(root, state, step=3, key=key)
    assert (saved.root, saved.path) == (root, f"{root}/{manifest_name(3)}")
    np.testing.assert_array_equal(gpuckpt.load(root, key=key)["w"], state["w"])
    segment = next(name for name in open_store(root).names() if name.endswith(".segment"))
    assert gpuckpt.load(f"{root}/{segment}")["b"].sum() == 3
    for source in (root, saved, (root, 3), saved.path, f"{root}/{segment}"):
        blank = {"w": np.zeros(1000), "b": np.zeros(3, "f4")}
        report = gpuckpt.warm_start(blank, source)
        assert set(report.matched) == {"w", "b"}
        np.testing.assert_array_equal(blank["w"], state["w"])
    with_key = ["--key-file", str(tmp_path / "key")]
    run = CliRunner()
    for words in (["ls", root], ["show", root], ["verify", root], ["repair", root, "--to", copy]):
        done = run.invoke(app, [*words, *with_key, "--json"])
        assert done.exit_code == 0, (words, done.output)
        json.loads(done.stdout)
    np.testing.assert_array_equal(gpuckpt.load(copy, key=key)["w"], state["w"])
    with pytest.raises(InvalidError, match="isn't changed"):
        run.invoke(app, ["repair", root, "--to", f"{root}/x"], catch_exceptions=False)


def test_a_damaged_step_is_passed_over(capsys):
    pytest.importorskip("obstore")
    root = f"memory://bucket-{next(numbered)}/run"
    for step in (1, 2):
        gpuckpt.save(root, {"w": np.full(100, step)}, step=step)
    store = open_store(root)
    segment = next(name for name in store.names() if name.startswith("step-000000000002."))
    data = bytearray(read_all(store, segment))
    data[70] ^= 1
    write_all(store, segment, bytes(data))
    with pytest.raises(gpuckpt.CorruptError, match="memory://"):
        gpuckpt.load(root)
    with pytest.warns(RuntimeWarning, match="step 2"):
        assert gpuckpt.load(root, fallback=True)["w"][0] == 1
    store.remove(segment)
    with pytest.warns(RuntimeWarning, match="step 2"):
        assert gpuckpt.load(root, fallback=True)["w"][0] == 1


@pytest.mark.parametrize(
    ("root", "match"),
    [
        ("s3://bucket/run?aws_secret_access_key=x", "doesn't belong into a URL"),
        ("s3://user:word@bucket/run", "a password doesn't belong"),
        ("az://c/run?sas_token=x", "doesn't belong into a URL"),
        ("s3://bucket/run?no_such_option=1", "no_such_option"),
        ("nonsense://x/y", "fsspec can't reach it"),
    ],
)
def test_a_url_that_makes_no_sense_says_so(root, match):
    pytest.importorskip("obstore")
    pytest.importorskip("fsspec")
    with pytest.raises(InvalidError, match=match) as found:
        open_store(root)
    assert "word@" not in str(found.value)
    assert "=x" not in str(found.value)


@pytest.mark.parametrize(
    ("module", "root"), [("obstore", "s3://b/run"), ("fsspec", "hdfs://host/run")]
)
def test_a_client_that_is_not_installed_is_named(module, root, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InvalidError, match=rf"{module}, which isn't installed: pip install"):
        open_store(root)


# A client in memory, whose answers can be made to fail


class Objects:
    """A `Client` on a dictionary; `strike` may raise before and after each request."""

    def __init__(self, *, able: bool = True, whole: bool = True) -> None:
        """If it isn't `able`, no put can depend on what is there."""
        self.able, self.whole = able, whole
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.asked: list[str] = []
        self.strike: Callable[[str, str], object] = lambda _, __: None
        self._tags = itertools.count()

    @contextlib.contextmanager
    def struck(self, request: str) -> Iterator[None]:
        self.asked.append(request)
        self.strike("before", request)
        yield
        self.strike("after", request)

    def put(self, name: str, data: Any, over: Over) -> Tag:
        with self.struck(f"put {name}"):
            if not self.able and over != "anything":
                raise UnableError("not implemented")
            found = self.objects.get(name)
            here = "nothing" if found is None else tag_of(found[1])
            if found is None and not isinstance(over, str):
                raise MissingError("404 NoSuchKey")  # as S3 answers
            if over not in ("anything", here):
                raise ClashError("it isn't")
            self.objects[name] = bytes(data), next(self._tags)
            return tag_of(self.objects[name][1])

    def put_parts(self, name: str, parts: Iterator[Any]) -> None:
        with self.struck(f"put_parts {name}"):
            whole = b"".join(bytes(part) for part in parts)
            self.objects[name] = whole, next(self._tags)

    def get(self, name: str) -> tuple[bytes, Tag]:
        with self.struck(f"get {name}"):
            if name not in self.objects:
                raise MissingError(name)
            data, tag = self.objects[name]
        return data, tag_of(tag)

    def get_range(self, name: str, offset: int, nbytes: int) -> bytes:
        return self.get(name)[0][offset : offset + nbytes]

    def head(self, name: str) -> tuple[int, Tag]:
        data, tag = self.get(name)
        return len(data), tag

    def list(self) -> dict[str, int]:
        with self.struck("list"):
            return {name: len(data) for name, (data, _) in self.objects.items()}

    def delete(self, name: str) -> None:
        with self.struck(f"delete {name}"):
            self.objects.pop(name, None)


def tag_of(number: int) -> Tag:
    return {"e_tag": str(number), "version": None}


def failing(
    which: str, when: str, times: int = 1, kind: type[ClientError] = PassingError
) -> Callable[[str, str], object]:
    """So many requests like `which` fail, before they are carried out or after."""
    count = itertools.count()

    def strike(at_: str, request: str) -> None:
        if at_ == when and request.startswith(which) and next(count) < times:
            raise kind("503 Slow Down")

    return strike


# What is published


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("there", [None, b"old"])
def test_a_lost_answer_to_a_conditional_put_is_known_for_a_success(when, there):
    client = Objects()
    store = store_of(client)
    if there:
        write_all(store, "m", there)
    client.strike = failing("put m", when)
    store.publish("m", b"new")
    assert client.objects["m"][0] == b"new"
    assert client.asked.count("put m") == (3 if there else 2)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_put_that_nobody_answers_may_have_been_made(when):
    client = Objects()
    store = store_of(client)
    client.strike = failing("put m", when, times=99)
    if when == "after":
        store.publish("m", b"new")  # it is there: that is seen
    else:
        with pytest.raises(StorageError, match=r"test://root/m: 503.*tried 3 times") as found:
            store.publish("m", b"new")
        assert found.value.maybe


def test_a_put_that_was_made_is_known_for_a_success_though_nothing_answered():
    client = Objects()
    struck = itertools.count()

    def strike(when: str, request: str) -> None:
        """The first put's answer is lost, and no later one arrives."""
        if request == "put m" and (when == "after" or next(struck)):
            raise PassingError("no answer")

    client.strike = strike
    store_of(client).publish("m", b"new")
    assert client.objects["m"][0] == b"new"
    assert client.asked.count("put m") == HASTY.tries


def test_segments_stay_if_their_manifest_may_be_there_and_go_if_it_is_not():
    manifest = unpack_manifest(small_manifest(), "m")
    for kind, stay in ((PassingError, True), (RefusedError, False)):
        client, undone = Objects(), list[bool]()
        client.strike = failing("put step", "before", 99, kind)
        with pytest.raises(StorageError):
            commit(store_of(client), manifest, abandon=partial(undone.append, True))
        assert bool(undone) is not stay


@pytest.mark.parametrize("able", [True, False])
def test_of_two_writers_of_one_object_one_is_told(able):
    client = Objects(able=able)
    store, other = store_of(client), store_of(client)
    write_all(store, "m", b"old")

    def other_was_faster(at_: str, request: str) -> None:
        if (at_, request) == ("before", "put m"):
            client.strike = lambda _, __: None
            other.publish("m", b"other's")

    client.strike = other_was_faster
    with pytest.raises(StorageError, match="another writer has put something else there") as found:
        store.publish("m", b"ours")
    assert not found.value.maybe
    assert client.objects["m"][0] == b"other's"


# The lease


def lease_of(holder: Holder, ends: float) -> bytes:
    return json.dumps({**asdict(holder), "ends": ends}).encode()


def test_a_lease_that_has_run_out_is_taken_over_and_no_other():
    client = Objects()
    store, other = store_of(client), Holder("token", "pid 1 on elsewhere", "elsewhere", "1 1")
    for late, free in ((-20, False), (SKEW_SECONDS - 5, False), (SKEW_SECONDS + 1, True)):
        client.objects[LOCK] = lease_of(other, time.time() - late), 77
        if free:
            with store.lock():
                assert Holder.here().who in client.objects[LOCK][0].decode()
        else:
            with pytest.raises(LockedError, match="pid 1 on elsewhere, for"), store.lock():
                pass
            assert client.objects[LOCK][1] == 77


def test_a_holder_that_died_on_this_machine_is_not_waited_for():
    code = (
        "import json; from dataclasses import asdict; from gpuckpt.stores.lease import Holder; "
        "print(json.dumps(asdict(Holder.here())))"
    )
    words = [sys.executable, "-c", code]
    told = subprocess.run(words, capture_output=True, check=True, timeout=60)
    dead, alive, client = Holder(**json.loads(told.stdout)), Holder.here(), Objects()
    store = store_of(client)
    client.objects[LOCK] = lease_of(alive, time.time() + 60), 1
    with pytest.raises(LockedError), store.lock():
        pass
    client.objects[LOCK] = lease_of(dead, time.time() + 60), 1
    with store.lock():
        pass


def test_a_service_that_knows_no_conditions_is_looked_at_before():
    client = Objects(able=False)
    store = store_of(client)
    for _ in range(2):
        with store.lock():
            with pytest.raises(LockedError, match="another writer"), store_of(client).lock():
                pass
            store.publish("m", b"x")
    with pytest.raises(StorageError, match="it exists"):
        write_all_over(store, "m")


def write_all_over(store: ObjectStore, name: str) -> None:
    """Another puts an object while it is being written."""
    file = store.create("new")
    file._name = name
    file.append([b"y"])
    file.sync()


def test_a_lease_is_renewed_while_it_is_held():
    client = Objects()
    store = ObjectStore(client, "test://root", retries=HASTY, lease_seconds=0.06)
    with store.lock():
        first, end = client.objects[LOCK][1], time.monotonic() + 10
        while client.objects[LOCK][1] < first + 3 and time.monotonic() < end:
            time.sleep(0.01)
        assert client.objects[LOCK][1] >= first + 3
    with store.lock():
        pass


@pytest.mark.parametrize("how", ["taken", "removed"])
def test_who_has_lost_the_lease_publishes_nothing(how):
    client = Objects()
    store = store_of(client)
    with store.lock():
        if how == "taken":
            other = Holder("token", "pid 1 on elsewhere", "elsewhere", "1 1")
            client.objects[LOCK] = lease_of(other, time.time() + 60), 77
        else:
            del client.objects[LOCK]
        for _ in range(2):
            with pytest.raises(LockedError, match="has lost its lease") as found:
                store.publish("m", b"x")
            assert not found.value.maybe
    assert "m" not in client.objects
    if how == "taken":
        assert client.objects[LOCK][1] == 77  # and it isn't given back for the other


def test_a_save_whose_lease_is_lost_makes_no_checkpoint_and_says_so():
    client = Objects()
    store = store_of(client)
    with gpuckpt.Checkpointer("", store=store) as ckpt:
        client.objects[LOCK] = b"{}", 77
        with pytest.raises(LockedError, match="step 1 was not saved"):
            ckpt.save(1, {"w": np.ones(3)}).result()
        with pytest.raises(LockedError):
            ckpt.wait()
    assert set(client.objects) == {LOCK}


def test_what_is_no_lease_is_left_alone():
    client = Objects()
    store = store_of(client)
    for content in (b"", b"{}", b"[1]", b"\xff", b'{"token": 1, "ends": "x"}', b'{"ends": NaN}'):
        client.objects[LOCK] = content, 1
        with pytest.raises(LockedError, match="isn't a lease"), store.lock():
            pass
        assert client.objects[LOCK][0] == content


def test_a_lease_whose_answers_are_lost_is_held_all_the_same():
    client = Objects()
    store = store_of(client)
    client.strike = failing("put lock", "after")
    with store.lock():
        client.strike = failing("put lock", "after")
        store.publish("m", b"x")
        client.strike = failing("put lock", "after")
    with store.lock():
        pass


def test_a_lease_of_which_nobody_knew_whether_it_was_renewed_is_still_ours():
    """The service was gone for longer than a request is tried, and had carried one out."""
    client = Objects()
    store = store_of(client)
    count = itertools.count()

    def strike(when: str, _: str) -> None:
        if when == "after" or next(count):
            raise PassingError("no answer")

    with store.lock():
        before = client.objects[LOCK]
        client.strike = strike
        with pytest.raises(StorageError, match="no answer"):
            store.publish("m", b"x")
        client.strike = lambda _, __: None
        assert client.objects[LOCK] != before
        store.publish("m", b"x")
    assert client.objects["m"][0] == b"x"
    with store.lock():
        pass


# Retries


@given(st.integers(1, 12), st.floats(0.001, 2), st.floats(0.001, 20))
def test_waits_lie_between_nothing_and_a_bound_that_doubles(tries, first, most):
    slept: list[float] = []
    bounds: list[tuple[float, float]] = []

    def choose(low: float, high: float) -> float:
        bounds.append((low, high))
        return high / 2

    def ask() -> None:
        raise PassingError("down")

    with pytest.raises(PassingError):
        Retries(tries, first, most, sleep=slept.append, choose=choose).run(ask)
    assert bounds == [(0.0, min(most, first * 2**at)) for at in range(tries - 1)]
    assert slept == [high / 2 for _, high in bounds]


def test_no_try_is_begun_after_the_time_for_all_of_them():
    client = Objects()
    store = ObjectStore(client, "test://root", retries=Retries(total_seconds=-1.0))
    client.strike = failing("list", "before", 99)
    with pytest.raises(StorageError, match=r"can't list test://root: 503.*tried 1 times"):
        store.names()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((500, PassingError), (503, PassingError), (429, PassingError), (408, PassingError)),
        *((400, RefusedError), (403, RefusedError), (404, MissingError), (412, ClashError)),
        *((409, ClashError), (501, UnableError)),
    ],
)
def test_what_a_service_answers_is_known_for_what_it_is(status, kind):
    pytest.importorskip("obstore")
    body = b"<?xml version='1.0'?><Error><Code>Why</Code><Message>so</Message></Error>"

    class Answer(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        with environment({"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}):
            client = open_client(f"s3://bucket/run?endpoint={url}&allow_http=true", HASTY)
        with pytest.raises(kind, match=r"Why \(so\)"):
            client.put("m", b"x", "nothing")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_what_will_not_go_well_next_time_is_not_tried_again():
    client = Objects()
    asked = []

    def strike(_: str, request: str) -> None:
        asked.append(request)
        raise RefusedError("403 Forbidden")

    client.strike = strike
    with pytest.raises(StorageError, match="can't list test://root: 403"):
        store_of(client).names()
    assert len(asked) == 1


def test_an_answer_that_is_cut_short_is_asked_for_again():
    client = Objects()
    store, cut = store_of(client), iter([10, 100])
    write_all(store, "f", bytes(range(100)))
    whole = client.get_range
    client.get_range = lambda *words: whole(*words)[: next(cut)]  # type: ignore[method-assign]
    assert read_all(store, "f") == bytes(range(100))


def test_a_long_buffer_is_filled_by_several_requests():
    client = Objects()
    store = store_of(client)
    data = np.random.default_rng(1).integers(0, 256, (32 << 20) + 5, np.uint8)
    client.objects["f"] = data.tobytes(), 1
    room = np.empty(data.size - 3, np.uint8)
    store.read_into("f", 3, room.data)
    np.testing.assert_array_equal(room, data[3:])
    assert client.asked.count("get f") == 3


# Uploads


def test_an_upload_has_a_bounded_number_of_parts_in_memory():
    class Slow(Objects):
        def put_parts(self, name: str, parts: Iterator[Any]) -> None:
            first = next(parts)
            taken.wait(10)
            super().put_parts(name, itertools.chain([first], parts))

    taken, client = threading.Event(), Slow()
    file = store_of(client).create("f")
    done = threading.Thread(target=lambda: file.append([bytes(20 * PART_NBYTES)]))
    done.start()
    done.join(0.2)
    assert done.is_alive()  # it waits for the service
    assert file.waiting_nbytes <= 3 * PART_NBYTES
    taken.set()
    done.join()
    file.sync()
    assert client.objects["f"][0] == bytes(20 * PART_NBYTES)


def test_an_upload_that_fails_says_so_from_then_on():
    client = Objects()
    store = store_of(client)
    client.strike = failing("put_parts", "before", 99)
    file = store.create("f")
    file.append([bytes(PART_NBYTES)])
    parts = [bytes(PART_NBYTES)] * 100
    with pytest.raises(StorageError, match=r"test://root/f: 503"):
        file.append(parts)
    with pytest.raises(StorageError, match="503"):
        file.append([b"x"])
    with pytest.raises(StorageError, match="503"):
        file.sync()
    file.close()
    assert client.objects == {}


def test_an_upload_whose_last_answer_was_lost_is_known_for_a_success():
    client = Objects()
    store = store_of(client)
    client.strike = failing("put_parts", "after")
    write_all(store, "f", bytes(3 * PART_NBYTES))
    assert client.objects["f"][0] == bytes(3 * PART_NBYTES)
    client.whole = False  # then its length proves nothing
    client.strike = failing("put_parts", "after")
    with pytest.raises(StorageError, match="503"):
        write_all(store, "f", bytes(3 * PART_NBYTES))


# How many requests there are


def test_small_chunks_that_follow_each_other_are_read_by_few_requests():
    client = Objects()
    store = store_of(client)
    state = {str(at): np.full(50, at) for at in range(500)}
    gpuckpt.save("", state, store=store)
    client.asked.clear()
    found = gpuckpt.load("", store=store)
    assert all(np.array_equal(found[name], array) for name, array in state.items())
    reads = [one for one in client.asked if ".segment" in one]
    assert len(reads) == math.ceil(len(state) / READS_TOGETHER)


# Requests that are struck


@pytest.fixture(scope="module")
def campaign(moto_server: Endpoint) -> Iterator[Campaign]:
    with proxy_to(moto_server.url) as proxy:
        yield Campaign(moto_server, proxy)


def requests_of(campaign: Campaign) -> list[str]:
    outcome = campaign.run(lambda _: None)
    assert (outcome.told, outcome.errors, outcome.wrong) == (3, [], [])
    return outcome.requests


def test_a_struck_request_costs_nothing(campaign):
    """A sample: `python -m bench.durability requests` does all of them."""
    count = len(requests_of(campaign))
    for index in range(0, count, 2):
        fault = list(Fault)[index // 2 % len(Fault)]
        outcome = campaign.run(at(index, fault))
        assert (outcome.wrong, outcome.errors) == ([], []), (index, fault)
        assert outcome.told == 3


def test_lost_answers_of_a_manifests_put_cost_nothing(campaign):
    requests = requests_of(campaign)
    puts = [
        index
        for index, request in enumerate(requests)
        if request.startswith("PUT") and request.endswith((".manifest.json", f"/{LOCK}"))
    ]
    assert len(puts) == 6
    for index in puts:
        outcome = campaign.run(at(index, Fault.LOST))
        assert (outcome.wrong, outcome.errors, outcome.told) == ([], [], 3)


@pytest.mark.slow
def test_a_service_that_goes_away_takes_no_checkpoint_with_it(campaign):
    count = len(requests_of(campaign))
    for index in range(1, count, 4):
        fault = Fault.LOST if index % 8 == 1 else Fault.BUSY
        outcome = campaign.run(from_there(index, fault))
        assert outcome.wrong == [], (index, fault)
        assert outcome.errors or index > count - 3
        assert all("s3://" in error for error in outcome.errors)


@pytest.mark.slow
def test_a_service_that_goes_away_and_comes_back_takes_no_checkpoint_with_it(campaign):
    count = len(requests_of(campaign))
    for index in range(3, count, 5):
        outcome = campaign.run(for_a_while(index, Fault.LOST if index % 2 else Fault.BUSY))
        assert outcome.wrong == [], index
        assert not any("lost its lease" in error for error in outcome.errors)


def test_the_plans_have_every_request_with_every_fault():
    assert len(plans(10)) == 10 * (len(Fault) + 4)
