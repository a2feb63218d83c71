"""Saves as OpenTelemetry's spans, by its SDK."""

from __future__ import annotations

import numpy as np
import pytest

import gpuckpt
from gpuckpt.journal import Record
from gpuckpt.metrics import OpenTelemetry
from gpuckpt.stats import Stats

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs opentelemetry-sdk")
export = pytest.importorskip("opentelemetry.sdk.trace.export", reason="needs opentelemetry-sdk")
memory = pytest.importorskip(
    "opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="needs opentelemetry-sdk"
)


@pytest.fixture
def exported():
    exporter, provider = memory.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    yield exporter, provider.get_tracer("test")
    provider.shutdown()


@pytest.mark.parametrize("trace", [False, True])
def test_a_save_is_a_span_and_its_stages_are_below_it(tmp_path, exported, trace):
    exporter, tracer = exported
    observers = [OpenTelemetry(tracer)]
    with gpuckpt.Checkpointer(tmp_path, observers=observers, trace=trace) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"w": np.full(50_000, float(step))})
    spans = exporter.get_finished_spans()
    saves = [one for one in spans if one.name == "gpuckpt.save"]
    assert [one.attributes["gpuckpt.step"] for one in saves] == [1, 2]
    for save in saves:
        assert save.parent is None
        assert save.status.is_ok or save.status.status_code.name == "UNSET"
        assert save.attributes["gpuckpt.raw_nbytes"] == 400_000
        below = [one for one in spans if one.parent and one.parent.span_id == save.context.span_id]
        assert all(save.start_time <= one.start_time <= one.end_time <= save.end_time
                   for one in below)  # fmt: skip
        names = {one.name for one in below}
        assert names >= {"gpuckpt.snapshot", "gpuckpt.encode"} if trace else not names
        assert len(names) == len(below)


def test_a_failed_save_is_a_span_with_an_error(exported):
    exporter, tracer = exported
    OpenTelemetry(tracer).saved(Record(1000.0, Stats(7), "StorageError: full"))
    (save,) = exporter.get_finished_spans()
    assert save.status.status_code.name == "ERROR"
    assert save.status.description == "StorageError: full"
    assert save.end_time == 1000 * 10**9


def test_without_a_tracer_that_of_the_global_provider_is_used():
    OpenTelemetry().saved(Record(1000.0, Stats(7)))
