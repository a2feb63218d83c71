"""With a key, nothing is read that somebody without it has made or changed."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import logging
import os
import pickle
import shutil
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import gpuckpt
from gpuckpt import layout, reading
from gpuckpt.cli import app
from gpuckpt.commit import open_step, steps
from gpuckpt.errors import (
    AuthenticationError,
    CheckpointError,
    CorruptError,
    InvalidError,
    NotFoundError,
)
from gpuckpt.fingerprint import checksum, fingerprint
from gpuckpt.resources import Resources
from gpuckpt.seal import INDEX, MANIFEST, Seal, make_seal
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryStore
from gpuckpt.verify import verify_step
from tests import hostile
from tests.golden.describe import describe
from tests.golden.states import KEY as GOLDEN_KEY
from tests.golden.states import SEALED

KEY, OTHER = (hashlib.sha256(text).digest() for text in (b"mine", b"another's"))
GOLDEN = hostile.GOLDEN / "v1.sealed"
ROOTS = [root for root in hostile.golden_roots() if b'"seal"' in b"".join(root.files.values())]
STATE: dict[str, Any] = {"w": np.arange(50_000, dtype=np.float32), "lr": 0.5}
TEXTS = st.dictionaries(st.text(max_size=5), st.integers(), max_size=5).map(
    lambda body: json.dumps({"a": body}).encode()
)
KEYS = st.binary(min_size=32, max_size=80)


def saved(root: Path, key: bytes | None = KEY, **options: Any) -> Path:
    gpuckpt.save(root, STATE, 7, key=key, **options)
    return root


def only(root: Path, ending: str) -> Path:
    (found,) = root.glob(f"*{ending}")
    return found


def rewritten(root: Path, change: Callable[[Any], object]) -> None:
    """The manifest as somebody without the key can change it: checksums fit."""
    path = only(root, ".manifest.json")
    body = hostile.body_of(path.read_bytes())
    change(body)
    text = json.dumps(body, separators=(",", ":")).encode()
    path.write_bytes(hostile.sealed_manifest(text))


class Collision:
    """What every checksum seems to be, for who has found a collision of XXH3."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


def collide(monkeypatch: pytest.MonkeyPatch) -> None:
    def every(parts: Any) -> Collision:
        deque(parts, 0)
        return Collision()

    monkeypatch.setattr("gpuckpt.stores.opened.native", lambda: None)  # which takes them itself
    monkeypatch.setattr(reading, "checksum", every)
    monkeypatch.setattr(reading, "root", lambda _digests, _nbytes: Collision())


# Seals.


@given(TEXTS, KEYS)
def test_what_a_key_sealed_it_finds_sealed_and_the_text_is_still_json(text, key):
    sealed = Seal(key).sealed(text, MANIFEST)
    Seal(key).check(sealed, MANIFEST, "here")
    found = json.loads(sealed)
    assert len(found.pop("seal")) == 64
    assert found == json.loads(text)
    expected = hmac.new(key, b"gpuckpt 1 manifest\0" + text[:-1], "sha256").hexdigest()
    assert sealed == text[:-1] + f',"seal":"{expected}"}}'.encode()


@given(TEXTS, KEYS, st.data())
def test_no_text_but_the_sealed_one_passes(text, key, data):
    sealed = bytearray(Seal(key).sealed(text, MANIFEST))
    at = data.draw(st.integers(0, len(sealed) - 1))
    sealed[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(AuthenticationError, match="here"):
        Seal(key).check(bytes(sealed), MANIFEST, "here")


@given(TEXTS, KEYS, KEYS)
def test_no_other_key_and_no_other_kind_of_text_passes(text, key, other):
    sealed = Seal(key).sealed(text, MANIFEST)
    with pytest.raises(AuthenticationError, match="isn't this key's"):
        Seal(key).check(sealed, INDEX, "here")
    if other.rstrip(b"\0") != key.rstrip(b"\0"):  # HMAC fills short keys up with zeros
        with pytest.raises(AuthenticationError, match="isn't this key's"):
            Seal(other).check(sealed, MANIFEST, "here")


@pytest.mark.parametrize("text", [b"", b"{}", b'{"seal":"x"}', b'{"a":1,"seal":"' + b"0" * 63])
def test_a_text_without_a_seal_is_told_so(text):
    with pytest.raises(AuthenticationError, match="has no seal"):
        Seal(KEY).check(text, MANIFEST, "here")


def test_seals_are_compared_in_constant_time(monkeypatch):
    compared = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    Seal(KEY).check(Seal(KEY).sealed(b'{"a":1}', INDEX), INDEX, "here")
    assert len(compared) == 1


# Keys.


def test_a_key_is_bytes_or_a_file_of_them(tmp_path):
    (tmp_path / "key").write_bytes(KEY)
    sealed = Seal(KEY).sealed(b'{"a":1}', INDEX)
    forms: list[Any] = [KEY, bytearray(KEY), tmp_path / "key", str(tmp_path / "key")]
    for key in forms:
        seal = make_seal(key)
        assert seal is not None
        seal.check(sealed, INDEX, "here")
    assert make_seal(None) is None


@pytest.mark.parametrize("odd", [b"", b"x" * 31, b"x" * 4097, 7, ["x"], True])
def test_what_is_no_key_is_refused(odd, tmp_path):
    with pytest.raises(InvalidError):
        gpuckpt.save(tmp_path / "root", STATE, key=odd)
    assert not (tmp_path / "root").exists()
    if isinstance(odd, bytes):
        (tmp_path / "key").write_bytes(odd)
        with pytest.raises(InvalidError, match="32 to 4096 bytes"):
            make_seal(tmp_path / "key")


@pytest.mark.parametrize("secret", ["correct horse battery staple", "a\0b", "x" * 5000])
def test_a_key_given_where_a_path_belongs_is_not_shown(secret, tmp_path):
    with pytest.raises(NotFoundError) as caught:
        gpuckpt.load(tmp_path, key=secret)
    shown = "".join(traceback.format_exception(caught.value))
    assert secret not in shown
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    with pytest.raises(NotFoundError, match="no-such-key"):
        gpuckpt.load(tmp_path, key=tmp_path / "no-such-key")


def test_a_key_is_in_no_file_no_log_no_repr_and_no_traceback_s_locals(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with gpuckpt.Checkpointer(tmp_path, key=KEY, log=True, trace=True) as ckpt:
        ckpt.save(1, STATE).result()
        shown = repr(ckpt) + repr(vars(ckpt)) + repr(vars(ckpt._saves))
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    only(tmp_path, ".segment").unlink()
    for use in (
        lambda: gpuckpt.load(tmp_path, key=KEY),
        lambda: gpuckpt.warm_start(copy.deepcopy(STATE), tmp_path, key=KEY),
        lambda: gpuckpt.save(tmp_path, {"f": object()}, key=KEY),
        lambda: gpuckpt.Checkpointer(tmp_path, key=KEY, codec="none"),
    ):
        with pytest.raises(CheckpointError) as caught:
            use()
        own = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
        frames = [frame for frame in own.stack if "/tests/" not in frame.filename]
        assert frames
        shown += "".join(text for frame in frames for text in (frame.locals or {}).values())
        shown += str(caught.value)
    for form in (repr(KEY)[2:-1], KEY.hex(), repr(list(KEY))):
        assert form not in shown + caplog.text
        assert form.encode() not in written
    assert KEY not in written


def test_a_seal_is_neither_shown_nor_copied():
    assert repr(Seal(KEY)) == repr(Seal(OTHER))
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="isn't pickled"):
            take(Seal(KEY))


# Checkpoints.


@pytest.mark.parametrize("codec", ["auto", "raw", "zstd", "delta"])
def test_what_a_key_sealed_is_loaded_with_it_and_without_one(codec, tmp_path):
    saved(tmp_path, codec=codec)
    for key in (KEY, None):
        found = gpuckpt.load(tmp_path, key=key)
        assert describe(found) == describe(STATE)
        assert not verify_step(LocalStore(tmp_path), 7, Resources("64 MiB"), seal=make_seal(key))


def test_a_state_without_bytes_is_sealed_too(tmp_path):
    gpuckpt.save(tmp_path, {"none": np.zeros((0, 3)), "n": 1}, key=KEY)
    assert gpuckpt.load(tmp_path, key=KEY)["none"].shape == (0, 3)


def every_reader(root: Path, key: Any) -> list[Callable[[], object]]:
    fresh = {"w": np.zeros(50_000, np.float32), "lr": 0.0}
    segment, manifest = only(root, ".segment"), only(root, ".manifest.json")

    def resume() -> None:
        with gpuckpt.Checkpointer(root, key=key) as ckpt:
            ckpt.resume(fresh)

    def latest() -> None:
        with gpuckpt.Checkpointer(root, key=key) as ckpt:
            ckpt.latest()

    return [
        *(resume, latest),
        lambda: gpuckpt.load(root, key=key),
        lambda: gpuckpt.load(root, 7, names="w", key=key),
        lambda: gpuckpt.load(segment, key=key),
        *(
            lambda one=one: gpuckpt.warm_start(fresh, one, key=key)
            for one in (root, (root, 7), manifest, segment)
        ),
    ]


def test_every_way_to_read_asks_for_the_key(tmp_path):
    for read in every_reader(saved(tmp_path / "sealed"), KEY):
        read()
    for root, key in (("sealed", OTHER), ("unsealed", KEY)):
        if root == "unsealed":
            saved(tmp_path / root, None)
        for read in every_reader(tmp_path / root, key):
            with pytest.raises(AuthenticationError):
                read()


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(metrics={"loss": 0.0}),
        lambda body: body["structure"]["dict"][1][1].update(value=0.25),
        lambda body: body["tensors"][0].update(dtype="int32"),
        lambda body: body.pop("digests"),
        lambda body: body.pop("seal"),
        lambda body: body.update(seal="0" * 64),
        lambda body: body.update(more=1),
        lambda body: body.update(requires=[]),
    ],
)
def test_a_manifest_that_was_changed_without_the_key_is_not_read(change, tmp_path):
    rewritten(saved(tmp_path), change)
    gpuckpt.load(tmp_path)
    with pytest.raises(AuthenticationError, match="manifest"):
        gpuckpt.load(tmp_path, key=KEY)


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_bytes_that_were_changed_to_fit_their_checksums_are_not_read(codec, tmp_path, monkeypatch):
    """The manifest stays: XXH3 is no match for who wants a collision."""
    saved(tmp_path, codec=codec)
    (entry,) = open_step(LocalStore(tmp_path)).tensors
    segment = only(tmp_path, ".segment")
    data = bytearray(segment.read_bytes())
    data[entry.chunks[0].extent.offset + (40_000 if codec == "raw" else 0)] ^= 1
    segment.write_bytes(data)
    collide(monkeypatch)
    with pytest.raises(AuthenticationError, match=r"w in .*segment at offset 64"):
        gpuckpt.load(tmp_path, key=KEY)
    if codec == "raw":
        assert gpuckpt.load(tmp_path)["w"][10_000] != 10_000
    damage = verify_step(LocalStore(tmp_path), 7, Resources("64 MiB"), seal=make_seal(KEY))
    assert [one.tensor for one in damage] == ["w"]


def test_who_can_write_the_files_can_make_all_but_the_seal_fit(tmp_path):
    saved(tmp_path, codec="raw")
    segment = only(tmp_path, ".segment")
    data = bytearray(segment.read_bytes())
    data[64:68] = b"evil"
    segment.write_bytes(data)

    def fit(body: Any) -> None:
        row = body["tensors"][0]["chunks"][0]
        chunk = memoryview(data)[row[3] : row[3] + row[4]]
        row[5], row[6] = fingerprint(chunk), checksum([chunk])

    rewritten(tmp_path, fit)
    assert gpuckpt.load(tmp_path)["w"][:1].tobytes() == b"evil"
    with pytest.raises(AuthenticationError):
        gpuckpt.load(tmp_path, key=KEY)


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.name)
def test_every_part_of_a_file_that_is_read_is_sealed_bases_and_sources_too(
    root, tmp_path, monkeypatch
):
    collide(monkeypatch)
    for step in sorted(filter(None, map(layout.manifest_step, root.files))):
        body = hostile.body_of(root.files[layout.manifest_name(step)])
        for segment, offset, _, _ in body["digests"]:
            name = body["segments"][segment]
            data = bytearray(root.files[name])
            data[offset] ^= 1
            hostile.write(tmp_path / "root", root.files | {name: bytes(data)})
            with pytest.raises(AuthenticationError, match=name):
                gpuckpt.load(tmp_path / "root", step, key=GOLDEN_KEY)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(root=st.sampled_from(ROOTS), data=st.data())
def test_with_the_key_a_stranger_s_changes_are_refused_or_change_nothing(
    root, data, tmp_path_factory
):
    place = tmp_path_factory.getbasetemp() / "strange"
    files = hostile.changed(root.files, lambda n: data.draw(st.integers(0, n - 1)))
    hostile.write(place, files)
    expected = json.loads((GOLDEN / f"{root.name.partition('.')[0]}.json").read_text())
    for step in steps(LocalStore(place)):
        try:
            found = gpuckpt.load(place, step, key=GOLDEN_KEY)
        except CheckpointError:
            continue
        assert describe(found) == expected[str(step)]


def test_a_manifest_under_another_step_s_name_is_refused(tmp_path):
    saved(tmp_path)
    path = only(tmp_path, ".manifest.json")
    path.rename(tmp_path / layout.manifest_name(8))
    with pytest.raises(CorruptError, match="the manifest of step 7"):
        gpuckpt.load(tmp_path, key=KEY)


def test_a_segment_under_another_name_is_refused_with_a_key(tmp_path):
    segment = only(saved(tmp_path), ".segment")
    other = segment.rename(tmp_path / "step-000000000009.00000000.r0.0.segment")
    assert describe(gpuckpt.load(other)["w"]) == describe(STATE["w"])
    with pytest.raises(AuthenticationError, match=f"it is '{segment.name}'"):
        gpuckpt.load(other, key=KEY)


def test_two_roots_with_keys_of_their_own_are_not_exchanged(tmp_path):
    saved(tmp_path / "a", KEY)
    saved(tmp_path / "b", OTHER)
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AuthenticationError):
        gpuckpt.load(tmp_path / "b", key=OTHER)


# Runs.


@pytest.mark.parametrize("codec", ["auto", "delta"])
def test_a_run_goes_on_from_sealed_chunks_and_seals_what_it_takes_over(codec, tmp_path):
    w = np.random.default_rng(1).normal(size=300_000).astype(np.float32)
    state: dict[str, Any] = {"w": w, "kept": np.arange(100_000), "n": 0}
    for turn in range(3):
        with gpuckpt.Checkpointer(
            tmp_path, key=KEY, codec=codec, chunk_nbytes=1 << 18, memory="256 MiB"
        ) as ckpt:
            assert ckpt.resume(state) == 2 * turn
            unchanged = 0
            for step in (2 * turn + 1, 2 * turn + 2):
                state["w"][100_000:] += np.float32(1e-3)
                state["n"] = step
                pending = ckpt.save(step, state)
                pending.result()
                unchanged += pending.stats.unchanged_nbytes
            assert unchanged >= state["kept"].nbytes
    for step in range(1, 7):
        for link in (
            link
            for entry in open_step(LocalStore(tmp_path), step, make_seal(KEY)).tensors
            for chunk in entry.chunks
            for link in chunk.links
        ):
            assert len(link.digest) == 64
        assert gpuckpt.load(tmp_path, step, key=KEY)["n"] == step
    assert describe(gpuckpt.load(tmp_path, key=KEY)["w"]) == describe(state["w"])


def test_a_save_takes_nothing_over_from_a_root_that_is_not_sealed(tmp_path):
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, STATE).result()
    with gpuckpt.Checkpointer(tmp_path, key=KEY) as ckpt:
        with pytest.raises(AuthenticationError, match="has no seal"):
            ckpt.resume(copy.deepcopy(STATE))
        assert ckpt.save(2, STATE).result().step == 2
    gpuckpt.save(tmp_path, STATE, 3, key=KEY)
    assert describe(gpuckpt.load(tmp_path, key=KEY)) == describe(STATE)
    assert {layout.segment_step(n) for n in open_step(LocalStore(tmp_path), 2).segments} == {2}


def test_a_version_is_not_taken_over_from_what_is_not_sealed(tmp_path):
    saved(tmp_path, None)
    gpuckpt.save(tmp_path, STATE, 8, key=KEY)
    gpuckpt.save(tmp_path, STATE, 9, key=KEY)
    versions = [open_step(LocalStore(tmp_path), step).tensors[0].version for step in (7, 8, 9)]
    assert versions == [7, 8, 8]


def test_a_run_without_the_key_goes_on_unsealed(tmp_path):
    saved(tmp_path)
    with gpuckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.resume(state := copy.deepcopy(STATE))
        ckpt.save(8, state).result()
    assert describe(gpuckpt.load(tmp_path)) == describe(STATE)
    with pytest.raises(AuthenticationError):
        gpuckpt.load(tmp_path, key=KEY)
    assert describe(gpuckpt.load(tmp_path, 7, key=KEY)) == describe(STATE)


def test_what_a_manifest_without_a_seal_says_decides_nothing_about_pruning(tmp_path, caplog):
    best = gpuckpt.Keep(best=("loss", "min", 1))
    with gpuckpt.Checkpointer(tmp_path, key=KEY, keep=best) as ckpt:
        ckpt.save(1, STATE, metrics={"loss": 0.1}).result()
    gpuckpt.save(tmp_path, STATE, 2, metrics={"loss": -1e9})
    with gpuckpt.Checkpointer(tmp_path, key=KEY, keep=best) as ckpt:
        ckpt.save(3, STATE, metrics={"loss": 0.2}).result()
        ckpt.wait()
        assert ckpt.steps() == [1, 2, 3]
    assert "could not be deleted" in caplog.text


def test_any_store_is_sealed_alike():
    store = MemoryStore()
    gpuckpt.save("", STATE, 7, store=store, key=KEY)
    assert describe(gpuckpt.load("", store=store, key=KEY)) == describe(STATE)
    with pytest.raises(AuthenticationError):
        gpuckpt.load("", store=store, key=OTHER)


@pytest.mark.parametrize("case", SEALED, ids=lambda case: case.name)
def test_golden_checkpoints_are_read_with_no_other_key(case):
    with pytest.raises(AuthenticationError):
        gpuckpt.load(GOLDEN / case.name, key=GOLDEN_KEY + b"\1")


# The command line.


def test_the_commands_take_the_path_of_a_key_file(tmp_path):
    root = str(saved(tmp_path / "root"))
    for name, key in (("mine", KEY), ("other", OTHER)):
        (tmp_path / name).write_bytes(key)
    run = CliRunner().invoke
    for command, refused in (("ls", 1), ("show", 1), ("verify", 1)):
        mine, other = str(tmp_path / "mine"), str(tmp_path / "other")
        assert run(app, [command, root]).exit_code == 0
        assert run(app, [command, root, "--key-file", mine]).exit_code == 0
        assert run(app, [command, root], env={"GPUCKPT_KEY_FILE": mine}).exit_code == 0
        assert run(app, [command, root, "--key-file", other]).exit_code == refused
        assert run(app, [command, root], env={"GPUCKPT_KEY_FILE": other}).exit_code == refused
    assert isinstance(
        run(app, ["show", root, "--key-file", str(tmp_path / "none")]).exception, NotFoundError
    )


def test_a_key_file_may_be_a_pipe(tmp_path):
    saved(tmp_path)
    read, write = os.pipe()
    os.write(write, KEY)
    os.close(write)
    try:
        assert gpuckpt.load(tmp_path, key=f"/dev/fd/{read}")["lr"] == 0.5
    finally:
        os.close(read)
