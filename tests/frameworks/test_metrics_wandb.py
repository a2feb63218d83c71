"""Figures in a run of Weights & Biases, offline."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import gpuckpt
from gpuckpt.metrics import Wandb

wandb = pytest.importorskip("wandb", reason="needs wandb")
pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="needs its reader")


def records(data: bytes) -> Iterator[bytes]:
    """The records of an offline run's file: LevelDB's log format behind a header of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:
            yield whole
            whole = b""


def history(path: Path) -> list[dict[str, float]]:
    """The rows that a run has written, in order; its process may write after `finish`."""
    kinds: list[str] = []
    for _ in range(200):
        rows, kinds = [], []
        for data in records(path.read_bytes()):
            record = pb2.Record()
            record.ParseFromString(data)
            kinds.append(record.WhichOneof("record_type"))
            if kinds[-1] == "history":
                items = record.history.item
                names = [one.key or "/".join(one.nested_key) for one in items]
                values = [json.loads(one.value_json) for one in items]
                rows.append(dict(zip(names, values, strict=True)))
        if "exit" in kinds:
            return rows
        time.sleep(0.1)
    raise AssertionError(f"the run hasn't ended: {kinds}")


def test_an_offline_run_has_the_figures_and_the_loops_own_steps_are_kept(tmp_path):
    run = wandb.init(
        project="test", dir=str(tmp_path), mode="offline", settings=wandb.Settings(silent=True)
    )
    with gpuckpt.Checkpointer(tmp_path / "root", observers=[Wandb(run)]) as ckpt:
        for step in (10, 20, 30):
            run.log({"loss": 1 / step}, step=step)
            ckpt.save(step, {"w": np.full(50_000, float(step))}).result()
        run.log({"loss": 0.0}, step=31)
    run.finish()
    (path,) = tmp_path.rglob("*.wandb")
    rows = history(path)
    assert [row["_step"] for row in rows] == [10, 20, 30, 31]
    assert [row["loss"] for row in rows] == [0.1, 0.05, 1 / 30, 0.0]
    told = [row for row in rows if "gpuckpt/step" in row]
    assert told[-1]["gpuckpt/step"] == 30
    assert all(row["gpuckpt/raw_nbytes"] == 400_000 for row in told)
