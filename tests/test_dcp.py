"""torch.distributed.checkpoint with gpuckpt as its storage, in one process."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.commit import open_step, steps
from gpuckpt.errors import CheckpointError, CorruptError, InvalidError, StorageError
from gpuckpt.stores.local import LocalStore

torch = pytest.importorskip("torch", reason="torch isn't installed (make test-ranks)")

from torch.distributed import checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner  # noqa: E402
from torch.distributed.checkpoint.metadata import (  # noqa: E402
    BytesStorageMetadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import (  # noqa: E402
    _load_state_dict_from_keys,
)

from gpuckpt.adapters.dcp import StorageReader, StorageWriter  # noqa: E402
from gpuckpt.adapters.dcp.places import step_of  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@dataclasses.dataclass
class Position:
    """An object of the user's own, which only pickle knows."""

    file: str
    line: int


def state(seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(64, 33, generator=generator)
    return {
        "model": {
            "w": numbers,
            "turned": numbers.t(),
            "half": numbers.to(torch.bfloat16),
            "eighth": numbers.to(torch.float8_e4m3fn),
            "scalar": torch.tensor(0.5 + seed),
            "none_there": torch.empty(0, 4),
            "flags": numbers > 0,
            "complex": torch.complex(numbers, -numbers),
        },
        "optimizer": {
            "state": {"0": {"exp_avg": numbers * 2, "step": torch.tensor(3.0 + seed)}},
            "param_groups": [
                {"lr": 0.1 + seed, "betas": (0.9, 0.999), "params": [0, 1], "fused": None},
                {"lr": float("inf"), "names": ["a", "b"], "t": torch.arange(3) + seed},
            ],
        },
        "step": 300 + seed,
        "text": "ü" * seed,
        "big": 2**70 + seed,
    }


def same(one: Any, other: Any) -> bool:
    """Whether two states are the same, bit by bit."""
    if isinstance(one, torch.Tensor):
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and bool(torch.equal(*as_bytes))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def save(state: Any, place: Path, **options: Any) -> None:
    dcp.save(state, storage_writer=StorageWriter(place, **options))


def load(state: Any, place: Path, **options: Any) -> Any:
    dcp.load(state, storage_reader=StorageReader(place, **options))
    return state


def test_a_state_comes_back_bit_for_bit(tmp_path):
    save(state(), tmp_path / "a")
    other = state(1)
    assert not same(other, state())
    assert same(load(other, tmp_path / "a"), state())


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_state_comes_back_from_compressed_chunks_and_with_a_key(tmp_path, codec):
    big = {"w": torch.arange(3_000_000, dtype=torch.float32)}
    save(big, tmp_path, codec=codec, key=b"k" * 32)
    assert same(load({"w": torch.zeros(3_000_000)}, tmp_path, key=b"k" * 32), big)
    with pytest.raises(CheckpointException, match=r"its seal isn.t this key"):
        load({"w": torch.zeros(3_000_000)}, tmp_path, key=b"x" * 32)


def test_a_checkpoint_of_dcp_is_one_of_gpuckpt(tmp_path):
    place = tmp_path / "step-300"
    save(state(), place)
    loaded = gpuckpt.load(place)
    assert same(loaded, state())
    assert steps(LocalStore(place)) == [300]
    for command in ("verify", "show", "ls"):
        done = subprocess.run(
            [sys.executable, "-m", "gpuckpt", command, str(place)], capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert not [one for one in place.rglob("*") if one.name.endswith((".metadata", ".distcp"))]


def test_no_tensor_or_plain_value_is_stored_as_a_pickle(tmp_path):
    save(state(), tmp_path)
    manifest = open_step(LocalStore(tmp_path))
    assert {entry.spec.name for entry in manifest.tensors} == {
        *(f"model.{name}" for name in state()["model"]),
        *("optimizer.state.0.exp_avg", "optimizer.state.0.step", "optimizer.param_groups.1.t"),
    }
    for file in tmp_path.iterdir():
        assert b"data.pkl" not in file.read_bytes()


def test_a_manifest_says_what_dcp_wants_to_know(tmp_path):
    save(state(), tmp_path)
    found = StorageReader(tmp_path).read_metadata()
    torchs = dcp.FileSystemReader(tmp_path / "torch")
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path / "torch"))
    wanted = torchs.read_metadata()
    assert found.planner_data == wanted.planner_data
    assert found.state_dict_metadata.keys() == wanted.state_dict_metadata.keys()
    for name, theirs in wanted.state_dict_metadata.items():
        ours = found.state_dict_metadata[name]
        assert type(ours) is type(theirs)
        if isinstance(theirs, TensorStorageMetadata):
            assert (ours.size, ours.chunks) == (theirs.size, theirs.chunks)
            assert ours.properties.dtype == theirs.properties.dtype
        else:
            assert isinstance(ours, BytesStorageMetadata)


def test_a_checkpoint_says_which_save_it_is_of(tmp_path):
    writer, reader = StorageWriter(tmp_path), StorageReader(tmp_path)
    dcp.save({"a": torch.ones(1)}, storage_writer=writer)
    found = reader.read_metadata().storage_meta
    assert (found.checkpoint_id, found.save_id) == (tmp_path, writer.save_id)
    assert found.load_id == reader.load_id
    gpuckpt.save(tmp_path / "other", {"a": torch.ones(1)})
    assert StorageReader(tmp_path / "other").read_metadata().storage_meta.save_id is None


def test_keys_are_loaded_without_a_state(tmp_path):
    save(state(), tmp_path)
    found = _load_state_dict_from_keys(storage_reader=StorageReader(tmp_path))
    assert same(found, state())
    some = _load_state_dict_from_keys({"model.w", "step"}, storage_reader=StorageReader(tmp_path))
    assert same(some, {"model": {"w": state()["model"]["w"]}, "step": 300})


def test_dcp_reads_what_a_checkpointer_has_saved(tmp_path):
    gpuckpt.save(tmp_path, {**state(), "tuple": (1, torch.ones(3))}, step=7)
    gpuckpt.save(tmp_path, state(2), step=9)
    assert same(load(state(1), tmp_path), state(2))
    assert same(load(state(1), tmp_path, step=7), state())


def test_tensors_are_converted_to_the_type_of_the_target(tmp_path):
    save({"w": torch.arange(100.0)}, tmp_path)
    found = load({"w": torch.zeros(100, dtype=torch.float64)}, tmp_path)
    assert torch.equal(found["w"], torch.arange(100, dtype=torch.float64))


def test_targets_of_any_layout_are_filled(tmp_path):
    save({"w": torch.arange(24.0).reshape(4, 6)}, tmp_path)
    target = torch.zeros(12, 8)[::3, :6]
    assert torch.equal(load({"w": target}, tmp_path)["w"], torch.arange(24.0).reshape(4, 6))
    assert torch.equal(target, torch.arange(24.0).reshape(4, 6))


def test_objects_that_only_pickle_knows_are_loaded_only_if_trusted(tmp_path):
    save({"at": Position("a", 3), "w": torch.ones(2)}, tmp_path)
    with pytest.raises(CheckpointException, match=r"at in .* only unpickling.*unpickle=True"):
        load({"at": None, "w": torch.zeros(2)}, tmp_path)
    found = load({"at": None, "w": torch.zeros(2)}, tmp_path, unpickle=True)
    assert found["at"] == Position("a", 3)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("sprung"),))


def test_a_pickle_of_a_stranger_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save({"at": Trap()}, tmp_path / "a")
    with pytest.raises(CheckpointException, match="unpickling"):
        load({"at": None}, tmp_path / "a")
    assert not Path("sprung").exists()
    load({"at": None}, tmp_path / "a", unpickle=True)
    assert Path("sprung").exists()


def test_objects_that_torch_reads_safely_come_back(tmp_path):
    objects = {"set": {1, 2}, "dicts": [{"a": torch.ones(3)}], "pair": (torch.ones(2), 1)}
    save(objects, tmp_path)
    found = load({"set": 0, "dicts": [{"a": torch.zeros(3)}], "pair": 0}, tmp_path)
    assert found["set"] == {1, 2}
    assert torch.equal(found["pair"][0], torch.ones(2))
    assert torch.equal(found["dicts"][0]["a"], torch.ones(3))


def test_long_values_lie_in_segments_and_come_back(tmp_path):
    long = {"text": "abc" * 100_000, "list": list(range(50_000))}
    save(long, tmp_path)
    assert load({"text": "", "list": []}, tmp_path) == long
    assert (tmp_path / "step-000000000000.manifest.json").stat().st_size < 10_000


def test_a_planner_of_the_users_own_has_its_bytes_written(tmp_path):
    class Upper(DefaultSavePlanner):  # type: ignore[misc]
        def transform_object(self, write_item, object):  # noqa: A002
            return super().transform_object(
                write_item, object.upper() if isinstance(object, str) else object
            )

    dcp.save({"s": "abc", "n": 3}, storage_writer=StorageWriter(tmp_path), planner=Upper())
    assert load({"s": "", "n": 0}, tmp_path) == {"s": "ABC", "n": 3}


def test_states_that_arent_taken_apart_come_back(tmp_path):
    flat = {"a.b": torch.ones(3), "d": {"x": 1}, "l": [1, {"y": torch.ones(2)}], "v": 3}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(flat, storage_writer=StorageWriter(tmp_path), planner=planner)
    target = {"a.b": torch.zeros(3), "d": None, "l": None, "v": None}
    dcp.load(
        target,
        storage_reader=StorageReader(tmp_path),
        planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
    )
    assert same(target, flat)


def test_an_overwritten_checkpoint_is_replaced_in_one_instant(tmp_path):
    place = tmp_path / "last"
    save(state(), place)
    before = set(place.iterdir())
    with pytest.raises(CheckpointException, match=r"already exists.*overwrite=True"):
        save(state(1), place, overwrite=False)
    assert same(load(state(2), place), state())
    save(state(1), place)
    assert same(load(state(2), place), state(1))
    assert len(set(place.iterdir()) - {place / "lock"}) == len(before - {place / "lock"})


def test_a_checkpoint_under_another_name_is_replaced_whole(tmp_path):
    save(state(), tmp_path / "step-300")
    (tmp_path / "step-300").rename(tmp_path / "step-200")
    save(state(1), tmp_path / "step-200")
    assert steps(LocalStore(tmp_path / "step-200")) == [200]
    assert same(load(state(2), tmp_path / "step-200"), state(1))


def test_a_runs_root_is_never_overwritten(tmp_path):
    gpuckpt.save(tmp_path, state(), step=7)
    with pytest.raises(CheckpointException, match=r"step 7 of a run.*a path of its own"):
        save(state(1), tmp_path)
    assert same(gpuckpt.load(tmp_path), state())


def test_a_save_that_fails_commits_nothing_and_the_next_one_sweeps(tmp_path):
    class Failing(StorageWriter):
        def finish(self, metadata, results):
            raise RuntimeError("power cut")

    save(state(), tmp_path)
    with pytest.raises(CheckpointException, match="power cut"):
        dcp.save(state(1), storage_writer=Failing(tmp_path))
    assert same(load(state(2), tmp_path), state())
    assert len(list(tmp_path.glob("*.segment"))) == 2
    with pytest.raises(CheckpointException, match="power cut"):
        dcp.save(state(2), storage_writer=Failing(tmp_path))
    assert len(list(tmp_path.glob("*.segment"))) == 2
    save(state(1), tmp_path)
    assert len(list(tmp_path.glob("*.segment"))) == 1
    assert same(load(state(2), tmp_path), state(1))


def test_a_save_whose_files_another_swept_away_fails(tmp_path):
    class Overtaken(StorageWriter):
        def finish(self, metadata, results):
            save(state(5), tmp_path)
            super().finish(metadata, results)

    with pytest.raises(CheckpointException, match="another save wrote there"):
        dcp.save(state(1), storage_writer=Overtaken(tmp_path))
    assert same(load(state(2), tmp_path), state(5))


def test_a_root_that_somebody_writes_to_is_locked(tmp_path):
    with (
        gpuckpt.Checkpointer(tmp_path),
        pytest.raises(CheckpointException, match="another writer"),
    ):
        save(state(), tmp_path)


def test_a_damaged_chunk_is_named(tmp_path):
    save({"one": torch.ones(1000), "two": torch.arange(1000.0)}, tmp_path, codec="raw")
    (segment,) = tmp_path.glob("*.segment")
    data = bytearray(segment.read_bytes())
    data[data.index(torch.arange(1000.0).numpy().tobytes()) + 77] ^= 1
    segment.write_bytes(data)
    load({"one": torch.zeros(1000)}, tmp_path)
    with pytest.raises(CheckpointException, match=r"CorruptError: two in .*segment at offset"):
        load({"two": torch.zeros(1000)}, tmp_path)


def test_what_is_missing_is_named(tmp_path):
    save({"one": torch.ones(10)}, tmp_path)
    with pytest.raises(CheckpointException, match="other"):
        load({"other": torch.zeros(10)}, tmp_path)
    with pytest.raises(CheckpointException, match="no committed checkpoint"):
        load({"one": torch.zeros(10)}, tmp_path / "nowhere")


def test_leaves_that_cant_be_saved_are_named(tmp_path):
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(CheckpointException, match=r"UnsupportedError: model\.s: "):
        save({"model": {"s": sparse}}, tmp_path)
    assert not list(tmp_path.glob("*.segment"))


def test_an_asynchronous_save_in_a_thread(tmp_path):
    saved = state()
    writer = StorageWriter(tmp_path)
    dcp.async_save(saved, storage_writer=writer).result()
    assert same(load(state(1), tmp_path), state())
    saved["model"]["w"].add_(1)
    dcp.async_save(saved, storage_writer=writer, checkpoint_id=tmp_path / "b").result()
    assert same(load(state(1), tmp_path / "b"), saved)


def test_writer_and_reader_go_to_other_processes(tmp_path):
    writer = StorageWriter(tmp_path / "a", codec="zstd")
    dcp.save(state(), storage_writer=writer)
    copy = pickle.loads(pickle.dumps(writer))
    dcp.save(state(1), storage_writer=copy, checkpoint_id=tmp_path / "b")
    reader = StorageReader(tmp_path / "a")
    dcp.load(state(3), storage_reader=reader)
    target = state(3)
    dcp.load(target, storage_reader=pickle.loads(pickle.dumps(reader)))
    assert same(target, state())
    assert same(load(state(3), tmp_path / "b"), state(1))


def test_a_key_goes_to_no_other_process(tmp_path):
    file = tmp_path / "key"
    file.write_bytes(b"k" * 32)
    for made in (StorageWriter(tmp_path, key=b"k" * 32), StorageReader(tmp_path, key=b"k" * 32)):
        with pytest.raises(InvalidError, match="the path of a key file"):
            pickle.dumps(made)
    assert b"kkkk" not in pickle.dumps(StorageWriter(tmp_path, key=file))


def test_errors_go_to_other_processes():
    cases = [CorruptError("a", "b"), InvalidError("no"), gpuckpt.MismatchError("x", missing=["y"])]
    refusal = StorageError("the disk is full")
    refusal.errno = 28
    for error in [*cases, refusal]:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.__dict__ == error.__dict__
    assert pickle.loads(pickle.dumps(refusal)).errno == 28
    assert isinstance(pickle.loads(pickle.dumps(refusal)), CheckpointError)


@pytest.mark.parametrize(
    ("place", "step"),
    [
        *(("runs/step-300", 300), ("a/step_7", 7), ("a/global_step12/", 12), ("iter_0000040", 40)),
        *(("epoch=1-step=9.ckpt", 9), ("/tmp/tmp8w7v", 0), ("final", 0), ("file:///a/step-3", 3)),
    ],
)
def test_a_path_says_its_step(place, step):
    assert step_of(place) == step


def test_places_are_told_from_others(tmp_path):
    assert StorageWriter.validate_checkpoint_id(tmp_path / "a" / "b")
    assert not StorageWriter.validate_checkpoint_id("ftp://localhost:9/a")
    (tmp_path / "file").write_text("")
    assert not StorageWriter.validate_checkpoint_id(tmp_path / "file" / "a")
    assert not StorageReader.validate_checkpoint_id(tmp_path)
    save({"a": torch.ones(1)}, tmp_path / "a")
    assert StorageReader.validate_checkpoint_id(tmp_path / "a")


def test_a_writer_without_a_path_asks_for_one():
    with pytest.raises(CheckpointException, match="a path is needed"):
        dcp.save({"a": torch.ones(1)}, storage_writer=StorageWriter())
    with pytest.raises(InvalidError, match="codec"):
        StorageWriter("a", codec="zip")


def test_only_the_chunks_of_what_is_asked_for_are_read(tmp_path):
    """All other bytes of the file are damaged, and nobody notices."""
    rows = np.random.default_rng(0).integers(0, 256, (64, 1 << 20), np.uint8)
    gpuckpt.save(tmp_path, {"w": rows}, codec="raw")
    (segment,) = tmp_path.glob("*.segment")
    manifest = json.loads((tmp_path / "step-000000000000.manifest.json").read_text())
    assert len(manifest["manifest"]["tensors"][0]["chunks"]) == 16
    data = bytearray(segment.read_bytes())
    first = data.index(rows.tobytes()[:64])
    damaged = data[:first] + bytes(40 << 20) + data[first + (40 << 20) :]
    segment.write_bytes(damaged)

    class Part(dcp.DefaultLoadPlanner):  # type: ignore[misc]
        def create_local_plan(self):
            plan = super().create_local_plan()
            (item,) = plan.items
            where = {name: torch.Size((40, 0)) for name in ("dest_offsets", "storage_offsets")}
            items = [dataclasses.replace(item, **where, lengths=torch.Size((24, 1 << 20)))]
            return dataclasses.replace(plan, items=items)

    target = {"w": torch.zeros(64, 1 << 20, dtype=torch.uint8)}
    dcp.load(target, storage_reader=StorageReader(tmp_path), planner=Part())
    assert np.array_equal(target["w"][40:].numpy(), rows[40:])
    assert not target["w"][:40].any()
