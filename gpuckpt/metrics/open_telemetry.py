"""A span for each save, with its stages below, for OpenTelemetry."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpuckpt.errors import InvalidError
from gpuckpt.journal import Record
from gpuckpt.metrics.figures import figures
from gpuckpt.spans import Span


class OpenTelemetry:
    """Emits a span `gpuckpt.save` for each save and, with `trace=True`, one for each stage.

    A stage's span goes from its first lap to the end of its last; its attributes
    say how many laps in how many threads there were, and what they took in all.
    """

    def __init__(self, tracer: Any = None) -> None:
        """`tracer` is OpenTelemetry's, or else that of the global provider.

        Raises:
            InvalidError: OpenTelemetry isn't installed.
        """
        try:
            from opentelemetry import trace
        except ImportError as error:
            raise InvalidError(
                "OpenTelemetry() needs its package: pip install opentelemetry-sdk"
            ) from error
        self._trace = trace
        self._tracer = trace.get_tracer("gpuckpt") if tracer is None else tracer

    def saved(self, record: Record) -> None:
        """Emit a save's spans, with the times at which they were."""
        stats = record.stats
        begin = record.ended - stats.background_seconds - stats.stall_seconds
        begin = min([begin, *(span.start for span in record.spans)])
        end = max([record.ended, *(span.end for span in record.spans)])
        attributes = {
            "gpuckpt.step": stats.step,
            "gpuckpt.mode": stats.mode,
            "gpuckpt.codec": stats.codec,
            **{f"gpuckpt.{name}": value for name, value in figures(record).items()},
        }
        # A root of its own: in the loop's trace it would end after its parent.
        context = self._trace.set_span_in_context(self._trace.INVALID_SPAN)
        save = self._tracer.start_span(
            "gpuckpt.save", context=context, start_time=_ns(begin), attributes=attributes
        )
        context = self._trace.set_span_in_context(save, context)
        for name, own in _by_stage(record.spans).items():
            stage = self._tracer.start_span(
                f"gpuckpt.{name}",
                context=context,
                start_time=_ns(min(span.start for span in own)),
                attributes=_attributes(own),
            )
            stage.end(end_time=_ns(max(span.end for span in own)))
        if record.error is not None:
            code = self._trace.StatusCode.ERROR
            save.set_status(self._trace.Status(code, record.error))
        save.end(end_time=_ns(end))


def _attributes(own: list[Span]) -> dict[str, float]:
    return {
        "gpuckpt.laps": len(own),
        "gpuckpt.threads": len({span.thread for span in own}),
        "gpuckpt.seconds": sum(span.seconds for span in own),
        "gpuckpt.cpu_seconds": sum(span.cpu_seconds for span in own),
        "gpuckpt.nbytes": sum(span.nbytes for span in own),
    }


def _by_stage(spans: Iterable[Span]) -> dict[str, list[Span]]:
    found: dict[str, list[Span]] = {}
    for span in spans:
        found.setdefault(span.stage, []).append(span)
    return found


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
