"""Spans of one process, sent to an OpenTelemetry collector, or to nobody: then nothing is imported and nothing costs.

A span goes from process to process as W3C's `traceparent`. Nothing is put into OpenTelemetry's own current context:
Ray looks there, and spans of ours would change what it sends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from cluster.errors import ConfigError

EXPORT_TIMEOUT_S = 5.0


class Span:
    """One span, or none: then every method does nothing."""

    __slots__ = ("_span",)

    def __init__(self, span: Any = None) -> None:
        self._span = span

    def __bool__(self) -> bool:
        return self._span is not None

    @property
    def traceparent(self) -> str:
        """What a child's process is told; empty for none."""
        if self._span is None:
            return ""
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(self._span))
        return carrier.get("traceparent", "")

    @property
    def context(self) -> Any:
        """OpenTelemetry's SpanContext."""
        return self._span.get_span_context()

    def end(self, attributes: Mapping[str, Any], error: str = "", ended_ns: int | None = None) -> None:
        """`error` is a class's name; without it all went well. `ended_ns`: None is now."""
        if self._span is None:
            return
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes(dict(attributes))
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(ended_ns)


NO_SPAN = Span()


class Traces:
    """Starts spans. Attributes are counts, names and ids: never a prompt, an answer or a key."""

    def __init__(self, service: str, endpoint: str | None, exporter: Any = None) -> None:
        """`endpoint` is a collector's base URL for OTLP over HTTP; None, without an `exporter` of one's own: no traces.

        Raises ConfigError when OpenTelemetry is not installed.
        """
        self._provider: Any = None
        if endpoint is None and exporter is None:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                "gateway.otlp_endpoint: OpenTelemetry is not installed: pip install 'manta-serve[otel]'"
            ) from error
        if endpoint is not None:
            exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_S)
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("manta")

    def start(
        self,
        name: str,
        attributes: Mapping[str, Any],
        *,
        kind: Literal["server", "internal"] = "internal",
        parent: str = "",
        started_ns: int | None = None,
        links: Iterable[Span] = (),
    ) -> Span:
        """`parent` is a traceparent, whoever sent it; a wrong one, or none, begins a new trace.

        No span where the sampler does not want it: by `OTEL_TRACES_SAMPLER`, or as the parent's flag says.
        """
        if self._provider is None:
            return NO_SPAN
        from opentelemetry.context import Context
        from opentelemetry.trace import Link, SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": parent}, Context()) if parent else Context()
        span = self._tracer.start_span(
            name,
            context=context,
            kind=SpanKind.SERVER if kind == "server" else SpanKind.INTERNAL,
            links=[Link(span.context) for span in links],
            start_time=started_ns,
            attributes=dict(attributes),
        )
        return Span(span) if span.is_recording() else NO_SPAN

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()
