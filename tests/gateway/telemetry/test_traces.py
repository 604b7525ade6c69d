"""Traces over a real OTLP connection: from the client through the gateway to the engine's steps; none when off."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import httpx
import pytest

from cluster.errors import ExpertUnavailable, Overloaded
from cluster.messages import ModelCard, Request, TokenChunk
from cluster.telemetry.traces import Traces
from gateway.admission.caller import ANONYMOUS
from gateway.admission.recent_refusals import RecentRefusals
from gateway.coordinators.health import ModelHealth
from gateway.text.tokenizer import HuggingFaceTokenizer
from router_service.scheduling import sequence
from router_service.scheduling.scheduler import ScheduledSequence
from router_service.telemetry.engine_traces import EngineTraces
from tests.collector import attributes, collector
from tests.gateway.doubles import (
    ScriptedCoordinator,
    build_frontend,
    failing_script,
    http_server,
    ready,
    tokens_script,
)
from tests.programs import said_by

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "the prompt's own words"}]}


def traced_coordinator(traces: EngineTraces, tokens: tuple[int, ...]) -> ScriptedCoordinator:
    """Its spans are a coordinator's: one for the request and, where it asks for them, one for each token's step."""
    inner = tokens_script(tokens)

    async def script(request: Request) -> AsyncIterator[TokenChunk]:
        span = traces.begin(request)
        count = 0
        try:
            async for chunk in inner(request):
                traces.observe_step(0.01, [ScheduledSequence(sequence.Sequence(request), 0, 1)])
                count += len(chunk.token_ids)
                yield chunk
        finally:
            traces.end(request, span, count, None)

    return ScriptedCoordinator(script)


def test_a_request_is_one_trace_and_its_steps_are_in_it_where_it_asks(
    card: ModelCard, tokenizer: HuggingFaceTokenizer
) -> None:
    tokens = tokenizer.encode("Hello")[1:]
    with collector() as found:
        ours, engines = Traces("manta-gateway", found.url), EngineTraces(Traces("manta-coordinator", found.url))
        frontend = build_frontend(card, traced_coordinator(engines, tokens), traces=ours)
        with http_server(frontend) as url:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "manta=layers"}
            answer = httpx.post(url + "/v1/chat/completions", json=BODY | {"n": 2}, headers=headers).json()
            httpx.post(url + "/v1/chat/completions", json=BODY, headers={"traceparent": "nonsense"})
            unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00", "tracestate": "manta=layers"}
            httpx.post(url + "/v1/chat/completions", json=BODY, headers=unsampled)
        ours.close()
        engines.close()
    first, second = sorted(found.named("request"), key=lambda span: span.start_time_unix_nano)
    assert {service for service, span in found.spans if span.name == "request"} == {"manta-gateway"}
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes(first)["manta.request_id"] == answer["id"]
    assert attributes(first)["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"]
    assert attributes(first)["gen_ai.request.model"] == "tiny"
    assert second.trace_id.hex() != TRACE, "what cannot be read begins a trace of its own"
    assert not second.parent_span_id
    children = [span for span in found.named("generate") if span.parent_span_id == first.span_id]
    assert len(children) == 2
    assert {span.trace_id for span in children} == {first.trace_id}
    steps = [step.parent_span_id for step in found.named("step")]
    assert sorted(steps) == sorted(child.span_id for child in children for _ in range(len(tokens) + 1)), (
        "a collector that took the steps of all requests lost the requests"
    )
    assert all(first.start_time_unix_nano <= child.start_time_unix_nano for child in children)
    assert len(found.named("generate")) == 3, "the client that does not want to be traced is not"
    assert "own words" not in str(found.spans)


def test_a_failed_request_names_its_error(card: ModelCard) -> None:
    with collector() as found:
        traces = Traces("manta-gateway", found.url)
        frontend = build_frontend(
            card, ScriptedCoordinator(failing_script([], ExpertUnavailable("gone"))), traces=traces
        )
        with http_server(frontend) as url:
            assert httpx.post(url + "/v1/chat/completions", json=BODY).status_code == 503
        traces.close()
    [span] = found.named("request")
    assert attributes(span)["error.type"] == "ExpertUnavailable"
    assert attributes(span)["manta.reason"] == "experts_missing"
    assert span.status.code == 2


def test_what_is_refused_before_it_is_answered_has_a_span_that_says_why(
    card: ModelCard, tokenizer: HuggingFaceTokenizer
) -> None:
    """Load that was shed was in logs and figures; a client's trace ended at its own call."""

    def loading(cards: Sequence[ModelCard]) -> dict[str, ModelHealth]:
        return {card.application: ModelHealth("loading") for card in cards}

    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode("Hello")[1:]))
    parent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    with collector() as found:
        for probe, status in ((ready, 429), (loading, 503)):
            traces = Traces("manta-gateway", found.url)
            frontend = build_frontend(card, coordinator, probe=probe, traces=traces)
            if probe is ready:
                frontend._refusals = RecentRefusals(clock=lambda: 0.0)
                frontend._refusals.note("tiny", ANONYMOUS.id, Overloaded("full", reason="shed_queue"))
            with http_server(frontend) as url:
                answer = httpx.post(url + "/v1/chat/completions", json=BODY, headers=parent)
                assert answer.status_code == status
                httpx.post(url + "/v1/chat/completions", json=BODY | {"model": "other"}, headers=parent)
            traces.close()
    spans = [attributes(span) for span in found.named("request")]
    assert sorted(span["manta.reason"] for span in spans) == ["loading", "shed_queue"], "none of an unknown model"
    assert {(span.trace_id.hex(), span.parent_span_id.hex()) for span in found.named("request")} == {(TRACE, PARENT)}


def test_what_the_sampler_leaves_out_is_traced_nowhere(
    card: ModelCard, tokenizer: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode("Hello")[1:]))
    with collector() as found:
        traces = Traces("manta-gateway", found.url)
        with http_server(build_frontend(card, coordinator, traces=traces)) as url:
            for headers in ({"tracestate": "manta=layers"}, {"traceparent": f"00-{TRACE}-{PARENT}-01"}):
                assert httpx.post(url + "/v1/chat/completions", json=BODY, headers=headers).status_code == 200
        traces.close()
    [span] = found.named("request")
    assert span.trace_id.hex() == TRACE
    assert [bool(request.traceparent) for request in coordinator.requests] == [False, True]


def test_without_an_endpoint_nothing_is_sent_or_imported(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode("Hello")[1:]))
    with http_server(build_frontend(card, coordinator)) as url:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert httpx.post(url + "/v1/chat/completions", json=BODY, headers=headers).status_code == 200
    assert coordinator.requests[0].traceparent == ""
    assert "opentelemetry" not in said_by("gateway.silent_traces")
