"""`/metrics` over a real socket: what is counted of requests, and how the figures of other processes join it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from cluster.messages import ModelCard
from cluster.telemetry.metrics import PowerOfTwoBuckets, ProcessFigures
from gateway.telemetry.metrics import GatewayMetrics
from gateway.telemetry.metrics_page import MetricsPage, Source
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, failing_script, http_server, tokens_script
from tests.raw_http import asking
from tests.waiting import wait_for

USER = [{"role": "user", "content": "Hello"}]


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by its name and its labels but for the replica; no series comes twice, no family either."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    found = {}
    for family in families:
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, key
            found[key] = sample.value
    return found


def values(text: str, name: str, **labels: str) -> list[float]:
    """Of the samples of that name that have these labels: one for each replica, if no other label differs."""
    wanted = set(labels.items())
    return [number for (sample, pairs), number in samples(text).items() if sample == name and wanted <= set(pairs)]


def value(text: str, name: str, **labels: str) -> float:
    """The sum of these samples; of what is a time or a share, take the highest of `values`."""
    return sum(values(text, name, **labels))


def test_requests_are_counted(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    tokens = tokenizer.encode("Hello STOP")[1:]
    with http_server(build_frontend(card, ScriptedCoordinator(tokens_script(tokens)))) as url:
        for stream in (False, True):
            body = {"model": "tiny-latest", "messages": USER, "n": 2, "stream": stream}
            assert httpx.post(url + "/v1/chat/completions", json=body).status_code == 200
        httpx.post(url + "/v1/chat/completions", json={"model": "tiny", "messages": USER, "max_tokens": 1})
        answer = httpx.get(url + "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    page = answer.text
    assert value(page, "vllm:request_success_total", model="tiny", finished_reason="stop") == 4
    assert value(page, "vllm:request_success_total", model="tiny", finished_reason="length") == 1
    assert value(page, "vllm:time_to_first_token_seconds_count", model="tiny") == 3
    assert value(page, "vllm:e2e_request_latency_seconds_count", model="tiny") == 3
    assert value(page, "vllm:inter_token_latency_seconds_count", model="tiny") == 4 * len(tokens)
    assert value(page, "vllm:request_generation_tokens_sum", model="tiny") == 4 * (len(tokens) + 1) + 1
    assert value(page, "vllm:request_params_n_count", model="tiny") == 3
    assert value(page, "vllm:request_params_n_sum", model="tiny") == 2 + 2 + 1
    room = card.max_model_len - len(tokenizer.encode_chat(USER))
    assert value(page, "vllm:request_params_max_tokens_sum", model="tiny") == 2 * room + 1
    assert value(page, "manta_requests_ongoing", model="tiny") == 0
    assert value(page, "process_resident_memory_bytes", deployment="gateway") > 0


def test_failures_and_clients_that_left_are_counted(card: ModelCard) -> None:
    frontend = build_frontend(card, ScriptedCoordinator(failing_script([], KeyError("x"))))
    with http_server(frontend) as url:
        httpx.post(url + "/v1/chat/completions", json={"model": "tiny", "messages": USER})
        assert value(httpx.get(url + "/metrics").text, "manta_request_failures_total", error="InternalError") == 1
    slow = ScriptedCoordinator(tokens_script([40], pause_s=60))
    with http_server(build_frontend(card, slow)) as url:
        with asking(url, "/v1/chat/completions", {"model": "tiny", "messages": USER}):
            wait_for(lambda: slow.running == 1, 60, "its sequence")

        def cancelled() -> float:
            return value(httpx.get(url + "/metrics").text, "manta_request_failures_total", error="RequestCancelled")

        wait_for(lambda: cancelled() == 1, 60, "the client that left to be counted")


def prompt_tokens(count: int) -> Metric:
    return CounterMetricFamily("vllm:prompt_tokens", "Prompt tokens computed.", value=count)


def test_figures_of_all_processes_are_one_page(card: ModelCard) -> None:
    asked: list[Source] = []

    async def ask(source: Source, timeout_s: float) -> tuple[list[ProcessFigures], int]:
        asked.append(source)
        if source.deployment == "coordinator":
            return [ProcessFigures("a", (prompt_tokens(3),)), ProcessFigures("b", (prompt_tokens(4),))], 1
        if source.deployment == "expert-0":
            raise TimeoutError
        return [ProcessFigures("me", (prompt_tokens(99),)), ProcessFigures("other", (prompt_tokens(5),))], 0

    card = replace(card, deployments=("coordinator", "expert-0"))
    page = MetricsPage(GatewayMetrics(), (card,), ask, "me")

    async def at_once() -> set[str]:
        return {one.decode() for one in await asyncio.gather(*(page.page() for _ in range(9)))}

    [first] = asyncio.run(at_once())
    assert len(asked) == 3, "nine readers at once are one gathering"
    assert value(first, "vllm:prompt_tokens_total", model="tiny", deployment="coordinator", replica="a") == 3
    assert value(first, "vllm:prompt_tokens_total", model="tiny", deployment="coordinator", replica="b") == 4
    assert value(first, "vllm:prompt_tokens_total") == 3 + 4 + 5, "our own figures come once, and not by way of Serve"
    assert value(first, "manta_scrape_failures_total", deployment="coordinator") == 1
    assert value(first, "manta_scrape_failures_total", model="tiny", deployment="expert-0") == 1


def test_powers_of_two_cover_every_duration() -> None:
    from prometheus_client.core import HistogramMetricFamily

    buckets = PowerOfTwoBuckets()
    for seconds in (0.0, 1e-6, 1.5e-6, 50e-6, 3600.0):
        buckets.observe(seconds)
    family = HistogramMetricFamily("manta_dispatch_seconds", "", labels=["group"])
    buckets.add_to(family, ["0"])
    counts = {sample.labels.get("le"): sample.value for sample in family.samples}
    assert counts["1e-06"] == 1
    assert counts["2e-06"] == 3
    assert counts["6.4e-05"] == 4
    assert counts["+Inf"] == 5
