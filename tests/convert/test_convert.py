"""`gpuckpt.convert`: what it does, what it reports, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import gpuckpt
from gpuckpt.commit import open_step
from gpuckpt.conversion.checkpoint import CHECKPOINT
from gpuckpt.errors import (
    AuthenticationError,
    CorruptError,
    InvalidError,
    NotFoundError,
    UnsupportedError,
)
from gpuckpt.fingerprint import fingerprint
from gpuckpt.groups import Group
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.opening import open_store
from tests.convert.states import read, training_state, written
from tests.ranks import run_ranks
from tests.strategies import same, states
from tests.test_real_model import weights as real_weights

weights = real_weights

THERE_AND_BACK = ["x.safetensors", "x.npz", "dir"]


@pytest.fixture
def root(tmp_path):
    gpuckpt.save(tmp_path / "run", training_state(), 3, epoch=2, metrics={"loss": 1.5})
    return tmp_path / "run"


@pytest.mark.parametrize("name", THERE_AND_BACK)
def test_a_state_goes_there_and_back_bit_for_bit(name, root, tmp_path):
    to = "safetensors" if name == "dir" else None
    gpuckpt.convert(root, tmp_path / name, to=to, verify=True)

    done = gpuckpt.convert(tmp_path / name, tmp_path / "back", verify=True)

    found = gpuckpt.load(tmp_path / "back")
    assert same(found, training_state())
    assert found["model"]["w"] is found["model"]["tied"]
    assert done.lost == ()
    manifest = open_step(open_store(tmp_path / "back"))
    assert (manifest.step, manifest.epoch, manifest.metrics) == (3, 2, {"loss": 1.5})


@pytest.mark.parametrize("name", THERE_AND_BACK)
def test_a_real_models_weights_go_there_and_back_bit_for_bit(name, weights, tmp_path):
    gpuckpt.save(tmp_path / "run", weights)
    to = "safetensors" if name == "dir" else None
    gpuckpt.convert(tmp_path / "run", tmp_path / name, to=to, shard_size="20 MB" if to else None)

    done = gpuckpt.convert(tmp_path / name, tmp_path / "back", verify=True)

    assert same(gpuckpt.load(tmp_path / "back"), weights)
    assert {one.name: one.digest for one in done.tensors} == {
        name: fingerprint(array.reshape(-1).view(np.uint8).data) for name, array in weights.items()
    }


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(states())
def test_any_state_goes_through_a_root(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("any") / "root"
    assert same(read(written(state, CHECKPOINT, path), CHECKPOINT), state)


def test_tensors_are_chunked_and_encoded_as_by_a_save(root, tmp_path):
    gpuckpt.convert(root, tmp_path / "copy")

    one, other = (open_step(open_store(place)) for place in (root, tmp_path / "copy"))

    assert one.structure == other.structure
    for ours, theirs in zip(one.tensors, other.tensors, strict=True):
        assert ours.spec == theirs.spec
        assert ours.statistics == theirs.statistics
        assert [c.fingerprint for c in ours.chunks] == [c.fingerprint for c in theirs.chunks]
    assert one.encoded_nbytes == other.encoded_nbytes
    derived = [row.spec.name for row in other.tensors if any(c.sources for c in row.chunks)]
    assert derived == ["model.half"]


def test_the_report_tells_each_tensors_digest_and_names(root, tmp_path):
    done = gpuckpt.convert(root, tmp_path / "x.npz")

    state = training_state()
    moved = {one.name: one for one in done.tensors}
    w = moved["model.w"]
    assert (w.dtype, w.shape, w.nbytes, w.aliases) == (
        *("float32", (300, 70), 84000),
        ("model.tied",),
    )
    assert w.digest == fingerprint(state["model"]["w"].reshape(-1).view(np.uint8).data)
    assert (done.source_format, done.target_format, done.step) == ("gpuckpt", "npz", 3)
    assert done.values == 4
    assert not done.verified
    assert "7 tensors" not in str(done)
    assert f"{len(moved)} tensors, {done.nbytes} bytes" in str(done)


def test_only_some_names_are_converted_as_a_flat_dict(root, tmp_path):
    gpuckpt.convert(root, tmp_path / "x.npz", names="model.w")
    gpuckpt.convert(root, tmp_path / "some", names=["model.half", "optimizer.*"])

    with np.load(tmp_path / "x.npz") as found:
        assert "model.w" in found.files
    some = gpuckpt.load(tmp_path / "some")
    assert list(some)[:3] == ["model.half", "optimizer.step", "optimizer.3.0"]


def test_a_step_is_chosen_and_kept(root, tmp_path):
    gpuckpt.save(root, {"w": np.ones(2)}, 9)

    gpuckpt.convert(root, tmp_path / "old", step=3)
    gpuckpt.convert(root, tmp_path / "new")
    gpuckpt.convert(tmp_path / "old", tmp_path / "new")

    assert sorted(json.loads(p.read_text())["manifest"]["step"] for p in manifests(tmp_path)) == [
        *(3, 9)
    ]
    with pytest.raises(NotFoundError, match="step 4"):
        gpuckpt.convert(root, tmp_path / "x.npz", step=4)


def manifests(tmp_path: Any) -> list[Any]:
    return sorted((tmp_path / "new").glob("*.manifest.json"))


def test_a_step_can_be_given_to_what_has_none(tmp_path):
    np.savez(tmp_path / "x.npz", w=np.arange(3))

    done = gpuckpt.convert(tmp_path / "x.npz", tmp_path / "run", step=41)
    assert open_step(open_store(tmp_path / "run")).step == done.step == 41

    np.savez(tmp_path / "y.npz", w=np.ones(3))
    done = gpuckpt.convert(tmp_path / "y.npz", tmp_path / "run", verify=True)  # not of step 41
    assert done.step == 0


def test_the_text_that_torchs_writer_puts_into_safetensors_is_no_loss(tmp_path):
    written({"w": np.zeros(2)}, CHECKPOINT, tmp_path / "run")
    gpuckpt.convert(tmp_path / "run", tmp_path / "x.safetensors")
    gpuckpt.convert(tmp_path / "x.safetensors", tmp_path / "again", strict=True)


def test_a_root_may_have_a_dot_in_its_name(root, tmp_path):
    gpuckpt.save(tmp_path / "run.v2", {"w": np.zeros(2)}, 1)
    gpuckpt.convert(root, tmp_path / "run.v2")
    gpuckpt.convert(root, tmp_path / "run.v3", to="gpuckpt")
    assert open_step(open_store(tmp_path / "run.v2")).step == 3


def test_a_manifest_and_a_single_data_file_are_sources_too(root, tmp_path):
    (manifest,) = root.glob("*.manifest.json")
    (segment,) = root.glob("*.segment")

    gpuckpt.convert(manifest, tmp_path / "a", verify=True)
    gpuckpt.convert(segment, tmp_path / "b", verify=True)

    assert same(gpuckpt.load(tmp_path / "a"), training_state())
    assert "model.w" in gpuckpt.load(tmp_path / "b")


def test_a_target_that_is_there_is_refused_unless_forced(root, tmp_path):
    (tmp_path / "x.npz").write_bytes(b"precious")
    (tmp_path / "dir").mkdir()
    gpuckpt.save(tmp_path / "other", {"w": np.zeros(1)}, 3)
    for name, to in (("x.npz", None), ("dir", "safetensors"), ("other", None)):
        with pytest.raises(InvalidError, match="force"):
            gpuckpt.convert(root, tmp_path / name, to=to)
    assert (tmp_path / "x.npz").read_bytes() == b"precious"

    for name, to in (("x.npz", None), ("dir", "safetensors"), ("other", None)):
        gpuckpt.convert(root, tmp_path / name, to=to, force=True, verify=True)
    assert same(gpuckpt.load(tmp_path / "other"), training_state())
    assert len(list((tmp_path / "other").glob("*.segment"))) == 1


def tree(place):
    return {
        str(one.relative_to(place)): one.is_file() and one.read_bytes() for one in place.rglob("*")
    }


def test_force_never_replaces_the_source_nor_a_directory_it_is_in(root, tmp_path):
    gpuckpt.save(tmp_path / "other", {"w": np.zeros(1)}, 3)
    (tmp_path / "link").symlink_to("run")
    gpuckpt.convert(root, tmp_path / "m", to="safetensors", shard_size=50_000)
    index, shard = (
        tmp_path / "m" / "model.safetensors.index.json",
        sorted((tmp_path / "m").iterdir()),
    )
    (manifest,) = root.glob("*.manifest.json")
    before = tree(tmp_path)
    for source, target, to in (
        (root, tmp_path, "fluid"),
        (root, root, "safetensors"),
        (root, root, "gpuckpt"),
        (root, tmp_path / "link", "safetensors"),
        (tmp_path / "link", root, "singa"),
        (root, root.as_uri(), "safetensors"),
        (manifest, root, "gpuckpt"),
        (manifest, root, "safetensors"),
        (index, tmp_path / "m", "safetensors"),
        (index, shard[0], "safetensors"),
        (tmp_path / "m", shard[0], "safetensors"),
        (shard[0], shard[0], "safetensors"),
    ):
        with pytest.raises(InvalidError, match=r"the source .* choose another target"):
            gpuckpt.convert(source, target, to=to, force=True, names="*")
    assert tree(tmp_path) == before


def test_force_replaces_a_directory_only_if_it_is_a_checkpoint_and_nothing_else(root, tmp_path):
    for name in ("two/step-1", "files"):
        (tmp_path / name).mkdir(parents=True)
    gpuckpt.save(tmp_path / "other", {"w": np.zeros(1)}, 3)
    (tmp_path / "link").symlink_to("files")
    (tmp_path / "files" / "notes.txt").write_text("precious")
    for name, to in (("mixed", "safetensors"), ("singa", "singa"), ("fluid", "fluid")):
        gpuckpt.convert(root, tmp_path / name, to=to, names="*model.w*")
        gpuckpt.convert(root, tmp_path / name, to=to, names="*model.w*", force=True)
    (tmp_path / "mixed" / "tokenizer.json").write_text("{}")
    (tmp_path / "singa" / "step9-worker0.bin").write_bytes(b"another step")
    (tmp_path / "fluid" / "checkpoint_9" / "__model__").mkdir(parents=True)
    before = tree(tmp_path)
    for name in ("two", "files", "other", "link", "mixed", "singa", "fluid"):
        for to in ("safetensors", "singa"):
            with pytest.raises(InvalidError, match=f"{'files' if name == 'link' else name} is a "):
                gpuckpt.convert(root, tmp_path / name, to=to, names="*model.w*", force=True)
    assert tree(tmp_path) == before


def test_what_was_exported_into_a_root_is_replaced_with_force(root):
    before = tree(root)
    for name, to in (("x.npz", None), ("export", "safetensors")):
        for force in (False, True):
            gpuckpt.convert(root, root / name, to=to, force=force, verify=True)
    assert before.items() <= tree(root).items()


def test_sealed_checkpoints_are_read_and_written_with_their_keys(tmp_path):
    one, other = b"a" * 32, b"b" * 32
    state = {"w": np.arange(9.0)}
    gpuckpt.save(tmp_path / "run", state, key=one)
    with pytest.raises(AuthenticationError):
        gpuckpt.convert(tmp_path / "run", tmp_path / "x.npz", key=other)
    assert not (tmp_path / "x.npz").exists()

    gpuckpt.convert(tmp_path / "run", tmp_path / "copy", key=one, target_key=other, verify=True)

    assert same(gpuckpt.load(tmp_path / "copy", key=other), state)


def test_damage_is_found_on_the_way_and_leaves_no_target(root, tmp_path):
    (segment,) = root.glob("*.segment")
    data = bytearray(segment.read_bytes())
    data[1000] ^= 1
    segment.write_bytes(data)

    for name in ("x.safetensors", "x.npz", "copy"):
        with pytest.raises(CorruptError, match="model"):
            gpuckpt.convert(root, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_verify_finds_a_target_that_isnt_what_was_written(root, tmp_path, monkeypatch):
    sync = LocalStore.sync_names

    def damaged(store: LocalStore) -> None:
        sync(store)
        path = tmp_path / "x.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(LocalStore, "sync_names", damaged)
    with pytest.raises(CorruptError, match="convert again"):
        gpuckpt.convert(root, tmp_path / "x.safetensors", verify=True)


def test_strict_refuses_what_would_be_lost_before_anything_is_written(root, tmp_path):
    def work(group: Group) -> None:
        own = {"n": group.rank, "seed": np.array([group.rank])}
        state = {"w": np.zeros(2), "own": gpuckpt.PerRank(own)}
        with gpuckpt.Checkpointer(tmp_path / "ranks", group=group, group_timeout=20) as ckpt:
            ckpt.save(1, state).result(20)

    run_ranks(2, work)
    with pytest.raises(UnsupportedError, match="ranks 1 have of their own"):
        gpuckpt.convert(tmp_path / "ranks", tmp_path / "x.npz", strict=True)
    assert not (tmp_path / "x.npz").exists()

    done = gpuckpt.convert(tmp_path / "ranks", tmp_path / "one")
    assert "ranks 1 have of their own" in done.lost[0]
    assert [one.name for one in done.tensors] == ["w", "own.seed"]
    own = {"n": 0, "seed": np.array([0])}
    assert same(gpuckpt.load(tmp_path / "one"), {"w": np.zeros(2), "own": own})


def test_what_ranks_saved_in_shards_is_converted_whole(tmp_path):
    whole = np.random.default_rng(1).standard_normal((512, 300)).astype(np.float32)

    def work(group: Group) -> None:
        half = whole[:, group.rank * 150 : group.rank * 150 + 150]
        shard = gpuckpt.Sharded(half.copy(), whole.shape, (0, group.rank * 150))
        with gpuckpt.Checkpointer(tmp_path / "ranks", group=group, group_timeout=20) as ckpt:
            ckpt.save(1, {"w": shard}).result(20)

    run_ranks(2, work)
    gpuckpt.convert(tmp_path / "ranks", tmp_path / "x.npz", verify=True)

    with np.load(tmp_path / "x.npz") as found:
        assert same(found["w"], whole)


def test_progress_tells_of_every_byte_read_and_verified(root, tmp_path):
    told: dict[str, int] = {}
    totals = set()

    def progress(what: str, nbytes: int, total: int) -> None:
        told[what] = told.get(what, 0) + nbytes
        totals.add(total)

    done = gpuckpt.convert(root, tmp_path / "x.npz", verify=True, progress=progress)

    assert told == {"reading": done.nbytes, "verifying": done.nbytes}
    assert totals == {done.nbytes}


def test_a_url_is_a_source_and_a_target(tmp_path):
    pytest.importorskip("obstore", reason="object stores are reached by obstore")
    place = f"file://{tmp_path}/run"
    gpuckpt.save(place, {"w": np.arange(4)})
    gpuckpt.convert(place, f"file://{tmp_path}/x.safetensors", verify=True)
    assert (tmp_path / "x.safetensors").is_file()
