"""Bits that flip on the disk and in memory: found, blamed, and never handed out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuckpt
from bench.durability.flips import run
from gpuckpt.devices.cpu_freeze import CpuHold, Places
from tests.saving import save

FLIPS = 160


def test_a_flipped_bit_is_found_and_blamed_or_the_data_is_right(tmp_path):
    results = run(FLIPS, 11, tmp_path)
    assert results["faults"] == []
    assert len(results["places"]) >= 16
    assert results["count"] > 0.9 * FLIPS


def test_a_kept_base_that_has_changed_in_memory_is_not_used(tmp_path, caplog):
    rng = np.random.default_rng(0)
    state = {"w": rng.standard_normal(40_000).astype("f4")}
    with gpuckpt.Checkpointer(tmp_path, codec="delta", memory="64 MiB") as ckpt:
        save(ckpt, 1, state)
        ckpt._resources.bases._memory[1000] ^= 16
        state["w"].view("u4")[::9] += 1
        assert save(ckpt, 2, state).delta_nbytes == 0
        assert "w: the bytes kept of it have changed" in caplog.text
        state["w"].view("u4")[::9] += 1
        assert save(ckpt, 3, state).delta_nbytes == state["w"].nbytes
    assert np.array_equal(gpuckpt.load(tmp_path)["w"], state["w"])


@pytest.mark.parametrize("tied", [False, True])
def test_what_changes_in_a_slot_before_it_is_scattered_is_found(tmp_path, monkeypatch, tied):
    """An array that isn't contiguous, or that has the bytes of another one, gets them by copy."""
    array = np.random.default_rng(0).standard_normal((60, 50))
    gpuckpt.save(tmp_path, {"a": array, "b": array}, codec="raw")
    from gpuckpt import reading

    def read(every, slot, arena):
        found = reading.read_chunks(every, slot, arena)
        every[0].rooms[0][77] ^= 2
        return found

    monkeypatch.setattr("gpuckpt.restore.read_chunks", read)
    into = {"a": np.zeros((60, 50)), "b": np.zeros((60, 50), order="C" if tied else "F")}
    if not tied:
        into["a"] = np.zeros((60, 50), order="F")
    with (
        gpuckpt.Checkpointer(tmp_path) as ckpt,
        pytest.raises(gpuckpt.CorruptError, match=r"^a in .*fingerprint of the decoded"),
    ):
        ckpt.restore(into)


def test_bytes_of_a_host_copy_that_change_before_they_are_looked_at_are_what_is_saved(
    tmp_path, monkeypatch
):
    """As docs/DURABILITY.md says: of host arrays nothing is known before that."""
    original = Places.copy

    def copy(places, addresses, room):
        original(places, addresses, room)
        room[4] ^= 1

    monkeypatch.setattr(Places, "copy", copy)
    with gpuckpt.Checkpointer(tmp_path, snapshot="copy") as ckpt:
        save(ckpt, 1, {"w": np.zeros(1000, "u1")})
    assert gpuckpt.load(tmp_path)["w"].tolist() == [0] * 4 + [1] + [0] * 995


def test_bytes_that_change_on_their_way_while_the_state_is_held_fail_the_save(
    tmp_path, monkeypatch
):
    """What is held is looked at twice."""
    original = CpuHold.download

    class Flipping:
        def __init__(self, transfer: Any) -> None:
            self.transfer = transfer

        def wait(self) -> Any:
            arrived = self.transfer.wait()
            arrived[0].planes[0][4] ^= 1
            return arrived

    monkeypatch.setattr(CpuHold, "download", lambda *arguments: Flipping(original(*arguments)))
    with gpuckpt.Checkpointer(tmp_path, snapshot="hold") as ckpt:
        pending = ckpt.save(1, {"w": np.zeros(1000, "u1")})
        with pytest.raises(gpuckpt.TornError, match=r"^w "):
            pending.result(60)
        with pytest.raises(gpuckpt.TornError):
            ckpt.wait()
    assert not list(tmp_path.glob("*.segment"))


def test_a_version_that_is_one_bit_off_says_that_the_file_may_be_damaged(tmp_path):
    saved = gpuckpt.save(tmp_path, {"w": np.zeros(5)}, 1)
    path = Path(saved.path)
    path.write_bytes(path.read_bytes().replace(b'{"gpuckpt":1,', b'{"gpuckpt":3,'))
    with pytest.raises(gpuckpt.FormatError, match=r"upgrade it, or.* the file is damaged"):
        gpuckpt.load(tmp_path)
