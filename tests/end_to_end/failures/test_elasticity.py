"""One server that is asked for more than it can do, loses what it cannot replace, and is told to stop while it answers.

A small model scales from one coordinator and one gateway, in bf16; another one, `narrow`, cannot, and refuses what is
too much.
A third makes embeddings with two coordinators.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import httpx
import pytest

from cluster.demo_model import DIRECTORY as DEMO
from tests.checkpoints import write_checkpoint
from tests.conftest import Server, running_server
from tests.processes import command_line, processes
from tests.programs import REPOSITORY, program
from tests.steady_streams import SteadyStreams
from tests.waiting import wait_for

SCALING = "max_replicas: 2, upscale_delay_s: 1, downscale_delay_s: 2"
EXPERT_TIMEOUT_S = 10  # with 5, a shard that was not heard for so long failed the streams of a roll, once
RECOVERY_S = 120
NUM_TOKENS = 60  # of an answer that is one of many at a time
SILENT_S = 60.0  # ten times what it takes to ask another one; the request's own deadline is far beyond
COORDINATOR, GATEWAY, SHARD = ":coordinator", "ServeReplica:gateway:gateway", "ray::ExpertShard"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def elastic(directory) -> Iterator[Server]:
    for name, dense in (("wide", False), ("narrow", True)):
        write_checkpoint(directory / name, vocab_size=2048, head_dim=16, dense=dense)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (directory / name / file).write_bytes((DEMO / file).read_bytes())
    config = directory / "manta.yaml"
    config.write_text(f"""
models:
  - name: wide
    path: {directory / "wide"}
    coordinator_scaling: {{{SCALING}}}
    engine: {{dtype: bfloat16, batch_invariant: "on", max_num_seqs: 6, num_kv_blocks: 512, num_threads: 1}}
    experts: {{groups: [[0, 1, 2, 3]], num_threads: 1, expert_timeout_s: {EXPERT_TIMEOUT_S}}}
  - name: narrow
    path: {directory / "narrow"}
    engine: {{batch_invariant: "on", max_num_seqs: 4, max_waiting: 4, num_kv_blocks: 256, num_threads: 1}}
  - name: embed
    path: {directory / "narrow"}
    kind: embedding
    num_coordinators: 2
    engine: {{batch_invariant: "on", num_kv_blocks: 256, num_threads: 1}}
gateway: {{scaling: {{target_requests: 6, {SCALING}}}}}
""")
    with running_server(config.read_text()) as server:
        yield server


def steady(server: Server, clients: int, num_tokens: int = 80) -> SteadyStreams:
    prompts = [f"Question {index}: what is a cheese?" for index in range(clients)]
    return SteadyStreams(server.url, "wide", prompts, num_tokens)


def completion(server: Server, model: str, **fields: object) -> httpx.Response:
    asked = {"model": model, "prompt": "What is a good cheese?", "max_tokens": 10, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{server.url}/v1/completions", json={**asked, **fields}, timeout=120)


def wide_coordinators(server: Server) -> set[int]:
    """Their process ids."""
    return {process.pid for process in processes(server, COORDINATOR) if "wide" in command_line(process)}


def test_coordinators_and_gateways_come_with_the_load_and_go(elastic):
    clients = steady(elastic, 12, 400)  # so long that they are mostly in the engine, however fast it is
    clients.learn()

    def number() -> tuple[int, int]:
        return len(wide_coordinators(elastic)), len(processes(elastic, GATEWAY))

    assert number() == (1, 1)
    with clients.running() as seen:
        wait_for(lambda: number() == (2, 2), RECOVERY_S, "a second coordinator and a second gateway")
        at_two = seen.num_complete
        wait_for(lambda: seen.num_complete >= at_two + 12, RECOVERY_S, "answers of both")
    assert (seen.failures, seen.num_wrong) == ([], 0)
    few = steady(elastic, 1)
    few.learn()
    with few.running() as seen:
        wait_for(lambda: number() == (1, 1), RECOVERY_S, "one of each")
    assert (seen.failures, seen.num_wrong) == ([], 0)


def test_goodput_holds_at_four_times_the_load(elastic):
    """Half of what comes is refused at once, and asked again; what is taken is answered as fast as ever."""

    num_refused = {4: 0, 16: 0}

    def goodput(clients: int, seconds: float) -> float:
        answered = []

        async def again_and_again(client: httpx.AsyncClient) -> None:
            while time.monotonic() < stop_at:
                body = {"model": "narrow", "prompt": "A cheese", "max_tokens": NUM_TOKENS, "ignore_eos": True}
                response = await client.post("/v1/completions", json=body)
                if response.status_code == 429:
                    assert float(response.headers["retry-after"]) >= 1
                    num_refused[clients] += 1
                    await asyncio.sleep(0.2)
                    continue
                assert response.json()["usage"]["completion_tokens"] == NUM_TOKENS, response.text
                answered.append(time.monotonic())

        async def run() -> None:
            async with httpx.AsyncClient(base_url=elastic.url, timeout=120) as client, asyncio.TaskGroup() as tasks:
                for _ in range(clients):
                    tasks.create_task(again_and_again(client))

        stop_at = time.monotonic() + seconds
        asyncio.run(run())
        return len(answered) / seconds

    goodput(4, 0.5)
    rounds = [(goodput(4, 1), goodput(16, 1)) for _ in range(3)]  # in turn: others use the machine as well
    print("answers a second from 4 clients and from 16:", rounds, "refused:", num_refused)
    assert num_refused[4] == 0
    assert num_refused[16] > 0
    assert median(crowded / alone for alone, crowded in rounds) > 0.3, "promised 0.95 on a quiet machine"


def test_a_group_that_cannot_come_back_ends_in_503_and_is_waited_for(elastic, directory):
    """Its only shard dies while nobody can read the weights. Nothing hangs, nothing is admitted, nothing else dies."""
    expected = completion(elastic, "wide").json()["choices"][0]["text"]
    before = {process.pid for process in processes(elastic, COORDINATOR)}
    [shard] = processes(elastic, SHARD)
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(completion(elastic, "wide"))

    in_flight = [threading.Thread(target=ask) for _ in range(3)]
    shard.suspend()  # they are in a step when it dies
    for thread in in_flight:
        thread.start()
    time.sleep(0.5)
    (directory / "wide").rename(directory / "elsewhere")
    try:
        killed_at = time.monotonic()
        shard.kill()
        for thread in in_flight:
            thread.join(10 * EXPERT_TIMEOUT_S)
        assert time.monotonic() - killed_at < 10 * EXPERT_TIMEOUT_S
        assert [response.status_code for response in answers] == [503] * 3, [r.text for r in answers]
        wait_for(lambda: health(elastic)[0] == 503, 20, "/health to say so")
        assert "expert-0" in health(elastic)[1]["models"]["wide"]["waiting_for"]
        started = time.monotonic()
        refused = completion(elastic, "wide")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_loading")
        assert time.monotonic() - started < 10 * EXPERT_TIMEOUT_S, "it is refused at once"
        assert completion(elastic, "narrow").status_code == 200, "the other model answers"
    finally:
        (directory / "elsewhere").rename(directory / "wide")
    wait_for(lambda: health(elastic)[0] == 200, RECOVERY_S, "the group to be back")
    assert completion(elastic, "wide").json()["choices"][0]["text"] == expected
    # Another one may have come meanwhile: to the scaling policy, requests that wait are load.
    assert before <= {process.pid for process in processes(elastic, COORDINATOR)}


def test_an_only_shard_that_stands_still_is_said_to_and_answers_again(elastic):
    """`/health` stayed 200, and each request waited out the timeout of a shard that nobody suspected."""
    expected = completion(elastic, "wide").json()["choices"][0]["text"]
    [shard] = processes(elastic, SHARD)
    shard.suspend()
    try:
        assert completion(elastic, "wide").status_code == 503, "it was in a step"
        wait_for(lambda: health(elastic)[0] == 503, 20, "/health to say so")
        assert health(elastic)[1]["models"]["wide"]["waiting_for"] == ["expert-0"]
        started = time.monotonic()
        refused = completion(elastic, "wide")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_loading")
        assert float(refused.headers["retry-after"]) > 0
        assert time.monotonic() - started < EXPERT_TIMEOUT_S, "it is refused at once"
        time.sleep(3)
        assert health(elastic)[0] == 503, "it stays away until it goes on"
    finally:
        shard.resume()
    resumed_at = time.monotonic()
    wait_for(lambda: health(elastic)[0] == 200, RECOVERY_S, "the shard to be trusted")
    print(f"/health was 200 {time.monotonic() - resumed_at:.1f} s after it went on")
    assert completion(elastic, "wide").json()["choices"][0]["text"] == expected


def health(server: Server) -> tuple[int, dict]:
    response = httpx.get(f"{server.url}/health", timeout=60)
    return response.status_code, response.json()


def test_a_rolling_update_of_coordinator_and_experts_fails_no_stream(elastic, directory):
    """There is one of each: the new one starts beside it, and the old one ends when its streams have."""
    wait_for(lambda: len(wide_coordinators(elastic)) == 1, RECOVERY_S, "what an earlier load asked for to go")
    clients = steady(elastic, 4)
    clients.learn()

    def wide() -> set[int]:
        return wide_coordinators(elastic) | {process.pid for process in processes(elastic, SHARD)}

    before = wide()
    others = {process.pid for process in processes(elastic, COORDINATOR)} - before
    with clients.running() as seen:
        subprocess.run(
            program("end_to_end.renew_model", directory / "manta.yaml", elastic.ray_address),
            check=True,
            timeout=RECOVERY_S,
            cwd=REPOSITORY,
        )

        def renewed() -> bool:
            now = wide()
            return len(now) >= len(before) and not now & before

        wait_for(renewed, RECOVERY_S, "new processes in place of the old ones")
        complete = seen.num_complete
        wait_for(lambda: seen.num_complete >= complete + 8, RECOVERY_S, "answers of the new ones")
    assert (seen.failures, seen.num_wrong) == ([], 0)
    assert others < {process.pid for process in processes(elastic, COORDINATOR)}, "the other models' stayed"


def test_no_embedding_waits_for_a_stopped_coordinator(elastic):
    """It falls silent, and what was asked of it comes from the other one."""

    def embed(_: int = 0) -> list[float]:
        body = {"model": "embed", "input": ["a", "b"]}
        answer = httpx.post(f"{elastic.url}/v1/embeddings", json=body, timeout=2 * SILENT_S)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["data"][0]["embedding"])

    expected = embed()
    stopped, _ = processes(elastic, "ray::ServeReplica:embed")
    stopped.suspend()
    try:
        asked_at = time.monotonic()
        with ThreadPoolExecutor(10) as clients:
            answers = list(clients.map(embed, range(10)))
        assert time.monotonic() - asked_at < SILENT_S
        assert answers == [expected] * 10
    finally:
        stopped.resume()


def test_sigterm_lets_streams_end(elastic):
    """The last test of this server."""
    body = {"model": "wide", "prompt": "A cheese", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    expected = httpx.post(f"{elastic.url}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"]
    text, finish_reason = "", None
    with httpx.stream("POST", f"{elastic.url}/v1/completions", json={**body, "stream": True}, timeout=120) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            if not text:
                elastic.process.send_signal(signal.SIGTERM)
            [choice] = json.loads(line[6:])["choices"]
            text += choice["text"]
            finish_reason = choice["finish_reason"] or finish_reason
    assert (finish_reason, text) == ("length", expected)
    assert elastic.process.wait(60) == 0
