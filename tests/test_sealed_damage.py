"""Damage of sealed checkpoints: passed over and salvaged as that of others, by the key's owner."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import gpuckpt
from gpuckpt import layout
from gpuckpt.cli import app
from gpuckpt.errors import AuthenticationError, NotFoundError
from gpuckpt.repair import repair
from gpuckpt.seal import make_seal
from gpuckpt.stores.local import LocalStore
from tests import hostile

KEY, OTHER = (hashlib.sha256(text).digest() for text in (b"mine", b"another's"))


def state_at(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {"a": rng.standard_normal(9000), "b": rng.standard_normal(700)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1 and 2, sealed."""
    for step in (1, 2):
        gpuckpt.save(tmp_path / "root", state_at(step), step, codec="raw", key=KEY)
    return tmp_path / "root"


def rot(root: Path, step: int) -> None:
    """Flip a bit of the step's first tensor."""
    (path,) = root.glob(f"step-{step:012}.*.segment")
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


def forge(root: Path, step: int) -> None:
    """Change the manifest as somebody without the key can: its check value fits."""
    path = root / layout.manifest_name(step)
    body = hostile.body_of(path.read_bytes()) | {"epoch": 7777}
    path.write_bytes(hostile.sealed_manifest(json.dumps(body, separators=(",", ":")).encode()))


def test_a_damaged_step_is_passed_over_with_the_key_as_without_one(root):
    rot(root, 2)
    with pytest.warns(RuntimeWarning, match="step 1 was taken"):
        found = gpuckpt.load(root, fallback=True, key=KEY)
    assert np.array_equal(found["a"], state_at(1)["a"])
    state = state_at(9)
    with (
        gpuckpt.Checkpointer(root, key=KEY) as ckpt,
        pytest.warns(RuntimeWarning, match="step 1 was taken"),
    ):
        assert ckpt.resume(state, fallback=True) == 1
    assert np.array_equal(state["b"], state_at(1)["b"])


def test_nobody_falls_back_from_what_somebody_without_the_key_wrote(root):
    gpuckpt.save(root, state_at(3), 3, key=OTHER)
    with pytest.raises(AuthenticationError):
        gpuckpt.load(root, fallback=True, key=KEY)
    with gpuckpt.Checkpointer(root, key=KEY) as ckpt, pytest.raises(AuthenticationError):
        ckpt.resume(state_at(9), fallback=True)


def test_nor_falls_back_to_it(root):
    gpuckpt.save(root, state_at(1), 1, codec="raw", key=OTHER)
    rot(root, 2)
    with pytest.raises(gpuckpt.CorruptError, match="no older step could be taken"):
        gpuckpt.load(root, fallback=True, key=KEY)


def test_what_is_salvaged_with_the_key_is_sealed_with_it(root, tmp_path):
    rot(root, 2)
    (tmp_path / "key").write_bytes(KEY)
    command = ["repair", str(root), "--to", str(tmp_path / "to")]
    assert CliRunner().invoke(app, [*command, "--key-file", str(tmp_path / "key")]).exit_code == 1
    found = gpuckpt.load(tmp_path / "to", key=KEY)
    assert found.keys() == {"b"}
    assert np.array_equal(found["b"], state_at(2)["b"])


def test_without_the_manifest_only_sealed_data_files_are_salvaged(root, tmp_path):
    (root / layout.manifest_name(2)).write_bytes(b"lost")
    done = repair(LocalStore(root), 2, LocalStore(tmp_path / "to"), seal=make_seal(KEY))
    assert {entry.spec.name for entry in done.written.tensors} == {"a", "b"}
    with pytest.raises(NotFoundError, match="nothing can be salvaged"):
        repair(LocalStore(root), 2, LocalStore(tmp_path / "no"), seal=make_seal(OTHER))
    assert not list((tmp_path / "no").glob("*.json"))


def test_a_forged_manifest_is_not_what_is_salvaged_by(root, tmp_path):
    forge(root, 2)
    assert repair(LocalStore(root), 2, LocalStore(tmp_path / "all")).written.epoch == 7777
    done = repair(LocalStore(root), 2, LocalStore(tmp_path / "to"), seal=make_seal(KEY))
    assert "seal" in done.found.unread
    assert done.written.epoch is None
    assert {entry.spec.name for entry in done.written.tensors} == {"a", "b"}
