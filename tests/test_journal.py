"""The log of saves, and what the command line makes of it."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import gpuckpt
from gpuckpt.commit import sweep
from gpuckpt.diagnosis import diagnose
from gpuckpt.journal import Journal, Record, read_journal
from gpuckpt.layout import LOG
from gpuckpt.stats import Stats
from gpuckpt.stores.local import LocalStore
from gpuckpt.stores.memory import MemoryStore
from tests.test_checkpointer import FullStore
from tests.test_cli import run


def new_state() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {f"w{at}": rng.standard_normal(100_000, np.float32) for at in range(4)}


@pytest.fixture
def root(tmp_path):
    state = new_state()
    for codec, more in (("raw", 0), ("auto", 2)):
        with gpuckpt.Checkpointer(
            tmp_path, log=True, trace=True, codec=codec, chunk_nbytes=1 << 17
        ) as ckpt:
            for step in (1, 2):
                with ckpt.update():
                    for array in state.values():
                        np.negative(array, out=array)
                ckpt.save(step + more, state).result()
    return tmp_path


def test_each_save_is_a_line_and_the_root_keeps_it(root):
    records = read_journal(root)
    assert [one.stats.step for one in records] == [1, 2, 3, 4]
    assert [one.stats.codec for one in records] == ["raw", "raw", "auto", "auto"]
    assert sweep(LocalStore(root)) == []
    assert (root / LOG).exists()
    assert gpuckpt.Checkpointer(root).steps() == [1, 2, 3, 4]
    for one in records:
        assert one.error is None
        assert one.stats.raw_nbytes == 1_600_000
        assert one.stats.background_seconds > 0
        assert {span.stage for span in one.spans} >= {"snapshot", "filter", "encode", "write"}
        assert all(abs(span.end - one.ended) < 60 for span in one.spans)


def test_stages_fit_into_the_whole(root):
    for one in read_journal(root):
        stats = one.stats
        own = stats.write_seconds + stats.commit_seconds
        assert 0 < own < stats.background_seconds
        parts = ("wait", "inventory", "snapshot", "held", "index", "sync", "manifest", "write")
        assert all(getattr(stats, f"{name}_seconds") > 0 for name in parts)
        assert stats.stall_seconds == pytest.approx(
            stats.wait_seconds
            + stats.inventory_seconds
            + stats.snapshot_seconds
            + stats.held_seconds
        )
        assert stats.filter_nbytes == stats.encode_nbytes == stats.raw_nbytes
        assert stats.encoded_nbytes == stats.written_nbytes
        assert stats.commit_seconds == pytest.approx(
            stats.index_seconds + stats.sync_seconds + stats.manifest_seconds
        )
        assert all(0 < share <= 1 for share in stats.shares.values())
        assert stats.shares.keys() == {"filter", "encode", "write"}


def test_without_trace_no_spans_are_kept(tmp_path):
    path = tmp_path / "elsewhere.jsonl"
    with gpuckpt.Checkpointer(tmp_path / "root", log=path) as ckpt:
        pending = ckpt.save(1, new_state())
        pending.result()
        (record,) = read_journal(path)
    assert record.spans == []
    assert pending.stats.spans is None
    assert not (tmp_path / "root" / LOG).exists()


def test_a_failed_save_is_a_line_too(tmp_path):
    store = FullStore()
    store.full = True
    log = tmp_path / "log"
    with gpuckpt.Checkpointer(tmp_path, store=store, log=log, on_error="warn") as ckpt:
        pending = ckpt.save(1, new_state())
        with pytest.raises(gpuckpt.StorageError):
            pending.result()
        with pytest.warns(RuntimeWarning, match="not saved"):
            ckpt.wait()
    (record,) = read_journal(log)
    assert record.error is not None
    assert "StorageError" in record.error
    assert "no space left" in diagnose([record])[0].sentence


def test_a_log_that_cannot_be_written_fails_no_save(tmp_path, caplog):
    log = tmp_path / "nothing" / "here" / "log"
    with caplog.at_level(logging.WARNING), gpuckpt.Checkpointer(tmp_path, log=log) as ckpt:
        ckpt.save(1, new_state()).result()
    assert "step 1 isn't in the log" in caplog.text
    assert gpuckpt.load(tmp_path).keys() == new_state().keys()


def test_a_line_that_a_crash_cut_short_costs_only_itself(root):
    path = root / LOG
    path.write_bytes(path.read_bytes()[:-40])
    Journal(path).append(Stats(9), None)
    assert [one.stats.step for one in read_journal(root)] == [1, 2, 3, 9]


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"gpuckpt_log":1}'),
        *(b'{"gpuckpt_log":1,"ended":1,"error":null,"stats":{"step":"x"}}',),
        *(b'{"gpuckpt_log":1,"ended":1,"error":null,"stats":[]}', b'{"gpuckpt_log":[1]}'),
        *(b'{"gpuckpt_log":1,"ended":1,"error":null,"stats":{"step":1},"spans":7,"clock":0}',),
        *(b'{"gpuckpt_log":1,"ended":"x","error":null,"stats":{"step":1}}',),
    ],
)
def test_lines_that_are_not_a_logs_are_left_out(tmp_path, line):
    path = tmp_path / "log"
    path.write_bytes(line + b"\n")
    with pytest.raises(gpuckpt.NotFoundError, match="no save"):
        read_journal(path)
    Journal(path).append(Stats(9), None)
    assert [one.stats.step for one in read_journal(path)] == [9]


def test_a_newer_log_is_said_to_be_one(tmp_path):
    path = tmp_path / "log"
    path.write_text('{"gpuckpt_log":2}\n')
    with pytest.raises(gpuckpt.FormatError, match="newer"):
        read_journal(path)


def test_how_much_a_save_slowed_the_loop_down_stands_in_the_next_line(tmp_path):
    journal, first = Journal(tmp_path / "log"), Stats(1)
    journal.append(first, None)
    first.slowdown_seconds = 0.25  # known once the loop goes on
    journal.append(Stats(2), None)
    assert [one.stats.slowdown_seconds for one in read_journal(tmp_path / "log")] == [0.25, 0.0]
    lines = (tmp_path / "log").read_bytes().splitlines(keepends=True)
    other = Journal(tmp_path / "other")
    other.append(Stats(5), None)
    with (tmp_path / "other").open("ab") as file:
        file.write(lines[1])
    assert [one.stats.slowdown_seconds for one in read_journal(tmp_path / "other")] == [0.0, 0.0]


def test_a_log_needs_a_place(tmp_path):
    with pytest.raises(gpuckpt.InvalidError, match="log=True needs"):
        gpuckpt.Checkpointer(tmp_path, log=True, store=MemoryStore())
    with pytest.raises(gpuckpt.InvalidError, match="is a directory"):
        gpuckpt.Checkpointer(tmp_path / "root", log=tmp_path)
    assert not (tmp_path / "root").exists()


def test_a_trace_is_in_the_trace_event_format(root, tmp_path):
    out = tmp_path / "trace.json"
    finished = run("trace", root, "--step", 4, "--out", out)
    assert (finished.returncode, finished.stderr) == (0, "")
    events = json.loads(out.read_text())["traceEvents"]
    named = {one["tid"]: one["args"]["name"] for one in events if one["name"] == "thread_name"}
    assert {"MainThread", "gpuckpt", "gpuckpt-work-0"} <= set(named.values())
    spans = [one for one in events if one["ph"] == "X"]
    assert {one["ph"] for one in events} == {"M", "X"}
    assert min(one["ts"] for one in spans) == 0
    for one in spans:
        assert all(isinstance(one[key], int) for key in ("ts", "dur", "pid", "tid"))
        assert one["dur"] >= 0
        assert one["tid"] in named
        assert one["args"]["step"] == 4
    (whole,) = [one for one in spans if one["name"] == "background"]
    took = read_journal(root)[-1].stats.background_seconds
    assert whole["dur"] == pytest.approx(took * 1e6, abs=2)
    facts = json.loads(run("trace", root, "--out", out, "--json").stdout)
    assert facts["steps"] == [1, 2, 3, 4]


def test_a_threads_spans_of_one_save_lie_one_after_the_other_or_inside_the_whole(root):
    for record in read_journal(root):
        by_thread: dict[str, list] = {}
        for span in record.spans:
            if span.stage != "background":
                by_thread.setdefault(span.thread, []).append(span)
        for spans in by_thread.values():
            for one, following in pairwise(spans):
                assert one.end <= following.start + 2e-6


def test_why_slow_says_a_sentence_and_shows_the_last_saves(root):
    finished = run("why-slow", root, "--last", 2)
    assert (finished.returncode, finished.stderr) == (0, "")
    sentence, titles, *rows = finished.stdout.splitlines()
    assert sentence.startswith("step 4: ")
    assert "codec='raw' (step 2) took" in sentence
    assert titles.split()[0] == "step"
    assert [row.split()[0] for row in rows] == ["3", "4"]
    facts = json.loads(run("why-slow", root, "--json").stdout)["saves"]
    assert [one["step"] for one in facts] == [1, 2, 3, 4]
    assert facts[-1]["sentence"] == sentence
    assert facts[0]["write_seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("why-slow", "nothing"), "there is no log"),
        (("why-slow", "root", "--last", 0), "--last is 1 or more"),
        (("trace", "root", "--step", 7, "--out", "x"), "no spans of step 7"),
        (("trace", "root", "--out", "."), "can't write"),
        (("why-slow", "empty"), "no save in it"),
    ],
)
def test_what_cannot_be_told_is_one_line_on_stderr(root, tmp_path, arguments, message):
    (tmp_path / "empty").write_text("")
    places = {"root": root, "nothing": root / "nothing", ".": root, "empty": tmp_path / "empty"}
    finished = run(*(places.get(one, one) for one in arguments))
    assert finished.returncode == 2
    assert message in finished.stderr
    assert len(finished.stderr.splitlines()) == 1


def record(**figures: Any) -> Record:
    facts: dict[str, Any] = {"step": 7, "workers": 2, "background_seconds": 2.0, **figures}
    return Record(0.0, Stats(**facts))


@pytest.mark.parametrize(
    ("figures", "bottleneck", "words"),
    [
        (
            {"write_seconds": 1.0, "sync_seconds": 0.5, "written_nbytes": 3 * 10**9},
            "disk",
            "took 1.5 s (2 GB/s)",
        ),
        (
            {"write_seconds": 1.5, "written_nbytes": 10**9, "shares": {"write": 0.5}},
            "disk",
            "50% of the fastest",
        ),
        ({"index_seconds": 1.2, "chunks": 10**5}, "index", "100000 chunks"),
        ({"encode_seconds": 3.0, "filter_seconds": 0.5}, "encode", "coding is"),
        ({"filter_seconds": 3.0, "encode_seconds": 0.5}, "filter", "fingerprints"),
        ({"copy_seconds": 3.0}, "copy", "to the host"),
        ({"encode_seconds": 3.0, "off_cpu_seconds": 2.0}, "off-cpu", "no CPU for 2 s of 3 s"),
        ({"encode_seconds": 0.1}, "unknown", "no stage explains"),
        (
            {"encode_seconds": 3.0, "stall_seconds": 1.0, "wait_seconds": 0.9},
            "encode",
            "900 ms waiting for the save before",
        ),
        ({"encode_seconds": 3.0, "slowdown_seconds": 0.5}, "encode", "took 500 ms longer"),
    ],
)
def test_the_bottleneck_is_what_took_the_time(figures, bottleneck, words):
    (found,) = diagnose([record(**figures)])
    assert found.bottleneck == bottleneck
    assert words in found.sentence
    assert found.sentence.startswith("step 7: 2 s in the background")


def test_only_saves_of_the_same_state_are_compared():
    own = record(codec="raw", raw_nbytes=100, encoded_nbytes=100, encode_seconds=3.0)
    alike = record(step=5, codec="zstd", raw_nbytes=100, encoded_nbytes=83)
    other = record(step=6, codec="auto", raw_nbytes=200, encoded_nbytes=83)
    found = diagnose([alike, other, own])
    assert "codec='zstd' (step 5) took 2 s for 17% fewer bytes" in found[-1].sentence
    assert "codec=" not in found[1].sentence
