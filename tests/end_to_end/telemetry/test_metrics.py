"""`/metrics` of the running server: figures of every process, none of which can hold the page up."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
import yaml

from cluster.commands.plan.observed import Observed, observe
from tests.gateway.telemetry.test_metrics import samples, value, values
from tests.processes import processes
from tests.programs import REPOSITORY
from tests.waiting import wait_for

MODEL = "mistral-small"
# What dashboards made for vLLM ask for: the names that its own test of /metrics expects.
VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:iteration_tokens_total_count",
    "vllm:cache_config_info",
    "vllm:request_success_total",
} | {
    f"vllm:{name}_{part}"
    for part in ("sum", "bucket", "count")
    for name in (
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_params_n",
        "request_params_max_tokens",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_inference_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
    )
}


def page(server) -> str:
    answer = httpx.get(f"{server.url}/metrics", timeout=60)
    assert answer.status_code == 200
    return answer.text


def test_every_process_is_in_the_page(server, engine_stats):
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 5, "ignore_eos": True}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    wait_for(lambda: value(page(server), "manta_shard_rows_total") > 0, 60, "the experts' figures")
    time.sleep(1.1)  # the page is kept for a second
    text, stats = page(server), engine_stats()
    assert value(text, "vllm:generation_tokens_total", model=MODEL) == stats.generation_tokens_total
    assert value(text, "manta_expert_rows_total", model=MODEL) == sum(stats.rows_per_expert)
    observed = observe(server.url, None, MODEL, len(stats.rows_per_expert))
    assert observed == Observed(MODEL, tuple(stats.rows_per_expert)), "what `manta plan --observed` goes by"
    assert value(text, "manta_step_seconds_count", model=MODEL) > 0
    assert 0 < max(values(text, "manta_longest_step_seconds", model=MODEL)) < 60
    assert value(text, "manta_failed_steps_total", model=MODEL) == 0
    assert value(text, "manta_dispatch_seconds_count", model=MODEL, group="0") > 0
    assert value(text, "manta_dispatch_hedges_total", model=MODEL, group="0") == 0, "there is one replica"
    assert value(text, "vllm:request_success_total", model=MODEL) > 0
    assert value(text, "vllm:request_inference_time_seconds_sum", model=MODEL) > 0
    assert len(VLLM) == 44
    assert {name for name, _ in samples(text)} >= VLLM
    for deployment in ("gateway", "coordinator"):
        assert value(text, "manta_event_loop_block_seconds_count", deployment=deployment) > 0
        blocks = {"deployment": deployment, "window": "start", "time": "loop"}
        longest_s = max(values(text, "manta_event_loop_longest_block_seconds", **blocks))
        assert longest_s < 0.5, "ten times what is promised"
    replicas = {dict(labels)["deployment"]: dict(labels)["replica"] for _, labels in samples(text)}
    assert {"gateway", "coordinator", "expert-0", "expert-1"} <= set(replicas)
    assert len(set(replicas.values())) == len(replicas)


def test_a_shard_that_stands_still_is_left_out_and_counted(server):
    [shard, *_] = processes(server, "ExpertShard")
    failures = value(page(server), "manta_scrape_failures_total")
    shard.send_signal(signal.SIGSTOP)
    try:
        time.sleep(1.1)  # the page is kept for a second
        started = time.monotonic()
        text = page(server)
        assert time.monotonic() - started < 20, "ten times the limit"
        assert value(text, "manta_scrape_failures_total") > failures
        assert value(text, "vllm:kv_cache_usage_perc", model=MODEL) >= 0
    finally:
        shard.send_signal(signal.SIGCONT)


def test_every_figure_of_dashboard_alerts_and_runbooks_exists(server):
    """Also those that have no series yet; a histogram's are known by its type."""
    known = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", page(server), re.MULTILINE):
        known |= {name} if kind != "histogram" else {f"{name}_{part}" for part in ("bucket", "sum", "count")}
    repository = REPOSITORY
    kubernetes = repository / "k8s"
    dashboard = json.loads((kubernetes / "grafana/manta.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(expressions) > 20
    alerts = yaml.safe_load((kubernetes / "monitoring/prometheus-rule.yaml").read_text())
    rules = [rule["expr"] for group in alerts["spec"]["groups"] for rule in group["rules"]]
    assert len(rules) > 5
    named = {name for text in expressions + rules for name in re.findall(r"\b(?:vllm:|manta_|process_)\w+", text)}
    assert named - known == set()
    told = set(re.findall(r"`((?:vllm:|manta_)\w+)`", (repository / "docs" / "runbooks.md").read_text()))
    assert len(told) > 5
    assert {name for name in told if name not in known and f"{name}_count" not in known} == set()


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "file"])
def test_status_watches_the_load_of_every_expert(server, is_terminal):
    """In a file one sample is below the other, each written at once: nothing was, until the command ended."""
    command = [sys.executable, "-m", "cluster.cli", "status", "--watch", "--address", server.ray_address]
    environment = os.environ | {"COLUMNS": "120"} | ({"FORCE_COLOR": "1"} if is_terminal else {})
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as watching:
        seen: list[str] = []
        reader = threading.Thread(target=lambda: seen.extend(watching.stdout), daemon=True)
        reader.start()
        try:
            wait_for(lambda: "".join(seen).count("rows/s") >= 2, 120, "two samples")
        finally:
            watching.send_signal(signal.SIGINT)
            assert watching.wait(60) == 0
        reader.join(10)
    output = "".join(seen)
    assert MODEL in output
    assert "busy" in output
    assert ("Ctrl-C" in output) is is_terminal
    assert ("\x1b" in output) is is_terminal
