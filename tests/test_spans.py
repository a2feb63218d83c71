"""Where a save's time went, and when."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuckpt.spans import Lap, Span, Spans, pack_spans, unpack_spans
from gpuckpt.stats import Fastest, Stats

names = st.sampled_from(["copy", "filter", "gpuckpt-work-0", "Thread-1 (käse)"])
micros = st.integers(0, 10**12).map(lambda count: count / 1e6)
spans_of = st.lists(
    st.builds(
        lambda stage, thread, start, took, nbytes, cpu: Span(
            stage, thread, start, start + took, nbytes, cpu
        ),
        *(names, names, micros, micros, st.integers(0, 2**50), micros),
    )
)


def lap_of(*stages: str) -> Lap:
    lap = Lap()
    for stage in stages:
        lap.mark(stage)
    return lap


@given(spans_of)
def test_spans_come_back_to_the_microsecond(spans):
    found = unpack_spans(pack_spans(spans))
    assert [(one.stage, one.thread, one.nbytes) for one in found] == [
        (one.stage, one.thread, one.nbytes) for one in spans
    ]
    for one, other in zip(found, spans, strict=True):
        assert one[2:4] == pytest.approx(other[2:4], abs=1.1e-6)
        assert one.cpu_seconds == pytest.approx(other.cpu_seconds, abs=1.1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"stages": "copy"},
        {"stages": []},
        {"threads": [1]},
        {"rows": [[0, 0, 5, 4, 0, 0]]},
        {"rows": [[0, 0, 1.5, 4, 0, 0]]},
        {"rows": [[0, -1, 1, 4, 0, 0]]},
        {"rows": [[0, 0, 1, 4, 0]]},
        {"rows": 7},
    ],
)
def test_what_are_no_spans_are_refused(change):
    packed = pack_spans([Span("copy", "one", 1.0, 2.0, 3, 0.5)])
    with pytest.raises((ValueError, TypeError, IndexError)):
        unpack_spans(packed | change)


def test_a_lap_says_what_a_thread_did_from_mark_to_mark():
    lap = Lap()
    time.sleep(0.01)
    lap.mark("copy", 5)
    end = time.thread_time() + 0.01
    while time.thread_time() < end:
        pass
    lap.mark("filter", 6)
    copy, work = lap.spans
    assert (copy.stage, copy.nbytes, work.stage, work.nbytes) == ("copy", 5, "filter", 6)
    assert copy.end == work.start
    assert copy.seconds >= 0.01 > copy.cpu_seconds
    assert work.cpu_seconds >= 0.009
    assert copy.thread == threading.current_thread().name
    assert lap.seconds == pytest.approx(work.end - copy.start)


@given(st.integers(0, 200), st.integers(1, 16))
def test_of_many_laps_every_nth_is_kept_and_never_more_than_the_limit(count, most):
    spans, laps = Spans(most), [lap_of("write") for _ in range(count)]
    for lap in laps:
        spans.add(lap)
    kept = {id(span) for span in spans.all()}
    assert kept == {id(lap.spans[0]) for lap in laps[:: spans.every]}
    assert len(kept) <= most
    assert spans.every == 1 or count > most


def test_laps_that_take_turns_are_all_thinned_alike():
    spans = Spans(8)
    for _ in range(100):
        spans.add(lap_of("copy", "encode"))
        spans.add(lap_of("write"))
    stages = [span.stage for span in spans.all()]
    assert stages.count("copy") == stages.count("encode") == stages.count("write") == 7
    assert spans.every == 16


def test_a_lap_that_happens_once_is_always_kept():
    spans = Spans(1)
    first, *others = (lap_of("write") for _ in range(10))
    spans.add(first)
    spans.once(lap_of("inventory", "snapshot"))
    for lap in others:
        spans.add(lap)
    assert {"inventory", "snapshot"} < {span.stage for span in spans.all()}
    spans.once(early := lap_of("wait"))
    early.spans = [early.spans[0]._replace(start=0.0)]
    assert spans.all()[0].stage == "wait"


def test_marks_become_seconds_of_their_stage_and_of_what_it_is_part_of():
    stats, lap = Stats(1), Lap()
    lap.spans = [
        Span("wait", "a", 0.0, 1.0),
        Span("snapshot", "a", 1.0, 3.0, 100),
        Span("filter", "b", 0.0, 4.0, 100, 3.0),
        Span("encode", "b", 4.0, 6.0, 80, 2.5),
        Span("sync", "c", 0.0, 0.5),
        Span("manifest", "c", 0.5, 0.75),
    ]
    stats.add(lap)
    stats.add(lap)
    assert (stats.wait_seconds, stats.snapshot_seconds, stats.stall_seconds) == (2.0, 4.0, 6.0)
    assert (stats.filter_nbytes, stats.encode_nbytes, stats.off_cpu_seconds) == (200, 160, 2.0)
    assert (stats.sync_seconds, stats.manifest_seconds, stats.commit_seconds) == (1.0, 0.5, 1.5)
    assert stats.spans is None


def test_a_rate_is_a_share_of_the_highest_so_far():
    fastest = Fastest()
    slow = Stats(1, written_nbytes=2 << 20, write_seconds=1.0, sync_seconds=1.0)
    fast = Stats(2, written_nbytes=2 << 20, write_seconds=1.0)
    again = Stats(3, written_nbytes=2 << 20, write_seconds=2.0)
    little = Stats(4, written_nbytes=1 << 19, write_seconds=1e-9)
    for stats in (slow, fast, little, again):
        fastest.compare(stats)
    assert slow.rates == {"write": 1 << 20}
    assert little.rates == little.shares == {}
    assert [stats.shares["write"] for stats in (slow, fast, again)] == [1.0, 1.0, 0.5]


seconds = st.floats(0, 1e9)


@given(
    *(st.text(), seconds, st.integers(0, 2**60)),
    *(st.dictionaries(st.text(), st.floats(0, 1)), st.lists(st.text())),
)
def test_figures_come_back_from_a_dict(codec, took, nbytes, shares, remarks):
    stats = Stats(
        *(7, "copy", codec, took),
        raw_nbytes=nbytes,
        encoded_nbytes=nbytes // 2,
        shares=shares,
        remarks=remarks,
    )
    facts = stats.as_dict()
    assert Stats.from_dict(facts | {"of a newer version": 1}) == stats
    assert facts["ratio"] == stats.ratio


@pytest.mark.parametrize(
    "change",
    [
        *({"step": "1"}, {"step": True}, {"codec": 1}, {"write_seconds": "1"}, {"shares": []}),
        *({"raw_nbytes": 1.5}, {"remarks": {}}, {"shares": {"write": "x"}}, {"remarks": [1]}),
    ],
)
def test_figures_of_another_kind_are_refused(change):
    with pytest.raises(TypeError):
        Stats.from_dict(Stats(1).as_dict() | change)
    with pytest.raises(ValueError, match="no step"):
        Stats.from_dict({})
