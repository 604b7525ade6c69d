"""A server that sends traces: what a collector gets of one request, and the log's line as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.demo_model import DIRECTORY
from tests.collector import Collector, attributes, collector
from tests.conftest import Server, running_server
from tests.end_to_end.telemetry.test_processes import processes
from tests.ports import free_port
from tests.waiting import wait_for

WITH_STEPS, SAMPLED, UNSAMPLED = (f"4bf92f3577b34da6a3ce929d0e0e473{digit}" for digit in "678")  # traces of clients
PARENT = "00f067aa0ba902b7"


@pytest.mark.long
def test_spans_that_a_collector_does_not_take_are_told_in_the_logs() -> None:
    """Nothing was: Serve had what libraries warn of, and kept it back or left it out."""
    config = (
        f"models: [{{name: demo, path: {DIRECTORY}}}]\ngateway: {{otlp_endpoint: 'http://127.0.0.1:{free_port()}'}}\n"
    )
    with running_server(config) as server:
        body = {"model": "demo", "prompt": "Hello", "max_tokens": 5}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        [gateway] = processes(server, "ServeReplica:gateway")
        log = Path(os.readlink(f"/proc/{gateway.pid}/fd/1"))
        wait_for(lambda: "opentelemetry" in log.read_text(), 60, "the gateway's word")
        [of_coordinator] = (log.parent / "serve").glob("replica_*_coordinator_*.log")
        wait_for(lambda: "exporting span" in of_coordinator.read_text(), 60, "the coordinator's")


@pytest.fixture(scope="module")
def traced() -> Iterator[tuple[Server, Collector]]:
    """A server that has no trace begin with it, and what a collector gets of it."""
    with collector() as found, ExitStack() as servers:
        config = (
            f"models: [{{name: demo, path: {DIRECTORY}}}]\n"
            f"gateway: {{otlp_endpoint: '{found.url}', log_format: json}}\n"
        )
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
            environment.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
            server = servers.enter_context(running_server(config))
        yield server, found


def complete(server: Server, **headers: str) -> dict[str, Any]:
    body = {"model": "demo", "prompt": "Hello", "max_tokens": 5, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.long
def test_a_request_is_followed_from_the_client_to_the_engine_s_steps(traced: tuple[Server, Collector]) -> None:
    server, found = traced
    answer = complete(server, traceparent=f"00-{WITH_STEPS}-{PARENT}-01", tracestate="manta=layers")
    [gateway] = processes(server, "ServeReplica:gateway")
    log = Path(os.readlink(f"/proc/{gateway.pid}/fd/1"))
    wait_for(lambda: answer["id"] in log.read_text(), 30, "the line")
    [line] = [json.loads(line) for line in log.read_text().splitlines() if answer["id"] in line]
    wait_for(lambda: found.named("request") and found.named("generate"), 60, "the spans")
    wait_for(lambda: len(found.named("step")) >= 4, 60, "the steps")
    wait_for(lambda: len(found.named("layers")) >= 4, 60, "their layers")
    assert (line["status"], line["completion_tokens"], line["model"]) == ("200", 5, "demo")
    [request], [generate] = found.named("request"), found.named("generate")
    assert request.trace_id.hex() == generate.trace_id.hex() == WITH_STEPS
    assert generate.parent_span_id == request.span_id
    assert attributes(request)["manta.request_id"] == answer["id"]
    assert attributes(generate)["gen_ai.usage.output_tokens"] == 5
    assert all(step.parent_span_id == generate.span_id for step in found.named("step"))
    steps = {step.span_id for step in found.named("step")}
    assert all(span.parent_span_id in steps for span in found.named("layers"))
    assert any(attributes(span)["manta.experts_s"] > 0 for span in found.named("layers"))
    assert {service for service, _ in found.spans} == {"manta-gateway", "manta-coordinator"}


@pytest.mark.long
def test_a_sampler_of_the_environment_leaves_out_what_no_client_traces(traced: tuple[Server, Collector]) -> None:
    """Gateways and coordinators are Ray's processes, which have `manta serve`'s environment."""
    server, found = traced
    for headers in ({}, {"tracestate": "manta=layers"}, {"traceparent": f"00-{UNSAMPLED}-{PARENT}-00"}):
        complete(server, **headers)
    sampled = [complete(server, traceparent=f"00-{SAMPLED}-{PARENT}-01")["id"] for _ in range(2)]

    def spans() -> list[Any]:
        return [span for _, span in found.spans if span.trace_id.hex() != WITH_STEPS]

    wait_for(lambda: len(spans()) >= 4, 60, "the spans of gateway and coordinator")  # each sends its own in order
    assert {span.trace_id.hex() for span in spans()} == {SAMPLED}
    assert sorted(attributes(span)["manta.request_id"] for span in spans()) == sorted(2 * sampled)
