"""The Serve configs of overlays, deployed by Ray's own `serve deploy` on clusters laid out like the pods."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from cluster.config import load_config
from cluster.demo_model import DIRECTORY
from cluster.deploy.serve_config import serve_config
from cluster.kubernetes.names import API_KEYS_FILE, LANE_SECRET_FILE, METRICS_TOKEN_FILE
from cluster.kubernetes.pod_config import in_pods
from gateway.admission.api_keys import digest, new_key
from tests.pods import Pod, Pods, overlay, pods
from tests.ports import free_port
from tests.programs import REPOSITORY
from tests.waiting import wait_for

QUESTION = {
    "model": "mistral-small", "messages": [{"role": "user", "content": "What is the best French cheese?"}],
    "temperature": 0, "max_tokens": 60,
}  # fmt: skip
CLOSED = "without sending a response"
PAUSE_S = 0.5  # after each stream: two that never pause take a core from what is being started
DEMO_PODS = (Pod("head"), Pod("gateway", cpus=1), Pod("coordinator", cpus=1), Pod("expert", cpus=2))


@dataclass(frozen=True)
class Mounted:
    """What pods have mounted, here, and the ports that are free here."""

    directory: Path
    key: str = field(default_factory=new_key)
    http_port: int = field(default_factory=free_port)
    grpc_port: int = field(default_factory=free_port)

    def here(self, document: dict[str, Any]) -> dict[str, Any]:
        """The document with these files and ports for those of pods."""
        text = json.dumps(document)
        for path, content in (
            (API_KEYS_FILE, json.dumps([{"id": "test", "sha256": digest(self.key)}])),
            (METRICS_TOKEN_FILE, "a token of no use"),
            (LANE_SECRET_FILE, "0123456789abcdef" * 4),
        ):
            file = self.directory / path.replace("/", "-").lstrip("-")
            if not file.exists():
                file.write_text(content)
                file.chmod(0o600)
            text = text.replace(path, str(file))
        document = json.loads(text)
        document["http_options"]["port"] = self.http_port
        document["grpc_options"]["port"] = self.grpc_port
        return document


@dataclass
class Clients:
    """Streams that go on all the time, through the HAProxy of one pod; what became of each."""

    url: str
    key: str
    answers: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    reconnects: list[str] = field(default_factory=list)  # times at which a connection was closed without an answer
    stop: threading.Event = field(default_factory=threading.Event)

    def client(self) -> httpx.Client:
        """One that keeps its connection, as SDKs do."""
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=120)

    def get(self, path: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path)

    def ask(self, client: httpx.Client) -> str:
        """One stream to its end, which has to say that it is complete."""
        text, finished = "", False
        with client.stream("POST", "/v1/chat/completions", json={**QUESTION, "stream": True}) as response:
            if response.status_code != 200:
                raise AssertionError(f"{response.status_code}: {response.read().decode()}")
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    text += chunk["choices"][0]["delta"].get("content") or ""
                finished |= line == "data: [DONE]"
        assert finished, f"a stream was cut after {text!r}"
        return text

    @contextmanager
    def asking(self, number: int) -> Iterator[None]:
        """That many streams at any time until the block ends."""
        threads = [threading.Thread(target=self._go_on) for _ in range(number)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()

    def _go_on(self) -> None:
        with self.client() as client:
            while not self.stop.is_set():
                try:
                    self.answers.append(self._ask_twice(client))
                except (AssertionError, httpx.HTTPError) as error:
                    self.failures.append(f"{time.strftime('%X')} {type(error).__name__}: {error}")
                self.stop.wait(PAUSE_S)

    def _ask_twice(self, client: httpx.Client) -> str:
        """As the SDKs do by default: once more where the connection was closed before a byte of an answer.

        HAProxy does so when the gateway behind a connection that it kept is gone: on a machine so busy that the new
        HAProxy is up later than the old gateway is down. RFC 9112, 9.3.1, has the client ask again.
        """
        try:
            return self.ask(client)
        except httpx.RemoteProtocolError as error:
            if CLOSED not in str(error):
                raise
            self.reconnects.append(time.strftime("%X"))
            return self.ask(client)


def fingerprinted_anew(directory: Path) -> Path:
    """The demo's checkpoint with another fingerprint and the same answers: a token that is never used is another."""
    shutil.copytree(DIRECTORY, directory, ignore=shutil.ignore_patterns("dense", "questions", "*.py", "__pycache__"))
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][-1] += 1
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def but(replicas: dict[str, Any], deployment: str) -> dict[str, Any]:
    return {name: running for name, running in replicas.items() if name != deployment}


def is_healthy(clients: Clients) -> bool:
    try:
        return clients.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def answers_while_no_gateway_lives(cluster: Pods, clients: Clients) -> list[str]:
    """All gateways are killed at once. Until there is one again, who asks is told to try again, as at other doors.

    Or not told, where HAProxy finds its connection to the gateway closed only when it has sent the question.
    """
    for replica in cluster.details()["gateway"]["deployments"]["gateway"]["replicas"]:
        os.kill(replica["pid"], signal.SIGKILL)
    refused: list[str] = []

    def answered() -> bool:
        try:
            with clients.client() as client:
                answer = client.post("/v1/chat/completions", json=QUESTION)
        except httpx.RemoteProtocolError as error:
            if CLOSED not in str(error):
                raise
            refused.append(f"{time.strftime('%X')} {CLOSED}")
            return False
        if answer.status_code == 200:
            return True
        refused.append(f"{time.strftime('%X')} {answer.status_code} {answer.headers}: {answer.text}")
        assert answer.status_code == 503, refused
        assert answer.headers["content-type"] == "application/json", refused
        assert int(answer.headers["retry-after"]) >= 1, refused
        assert answer.json()["error"]["type"] == "service_unavailable", refused
        return False

    wait_for(answered, 120, "a new gateway")
    return refused


def roles(cluster: Pods, layout: tuple[Pod, ...], replicas: dict[str, Any]) -> dict[str, list[str]]:
    """By deployment, the roles of the pods that its replicas are on."""
    role = dict(zip(cluster.node_ids, (pod.role for pod in layout), strict=True))
    return {name: sorted(role[node] for _, node in running) for name, running in replicas.items()}


def test_the_demo_is_deployed_scaled_and_rolled_without_a_failed_request(tmp_path: Path) -> None:
    """What an operator does to the overlay `cpu-demo`, while streams go on."""
    mounted = Mounted(tmp_path)
    document = mounted.here(overlay("cpu-demo"))
    assert document["proxy_location"] == "EveryNode"
    old = document["applications"][1]["name"]
    with pods(*DEMO_PODS) as cluster:
        cluster.deploy(document)
        cluster.wait_until_running("gateway", old)
        clients = Clients(f"http://127.0.0.1:{cluster.http_ports[1]}", mounted.key)  # the gateway's pod, as the Service
        wait_for(lambda: is_healthy(clients), 60, "the gateway pod's HAProxy to know the gateway")
        head = Clients(f"http://127.0.0.1:{mounted.http_port}", mounted.key)
        wait_for(lambda: is_healthy(head), 60, "the head's HAProxy to know it, too")
        with clients.client() as client:
            answer = clients.ask(client)
        assert len(answer) > 10
        first = cluster.replicas(old)
        assert roles(cluster, DEMO_PODS, first | cluster.replicas("gateway")) == {
            "gateway": ["gateway"], "coordinator": ["coordinator"], "root": [],
            "expert-0": ["expert"], "expert-1": ["expert"], "expert-2": ["expert"], "expert-3": ["expert"],
        }  # fmt: skip

        with clients.asking(2):
            # `kubectl edit`: one number.
            [expert] = [one for one in document["applications"][1]["deployments"] if one["name"] == "expert-3"]
            expert["autoscaling_config"]["min_replicas"] = 2
            cluster.deploy(document)
            wait_for(lambda: len(cluster.replicas(old)["expert-3"]) == 2, 300, "a second expert-3")
            scaled = cluster.replicas(old)
            assert first["expert-3"] < scaled["expert-3"], "the first one stays"
            assert but(scaled, "expert-3") == but(first, "expert-3"), "the others are not touched"

            # A new version beside the old one, laid out otherwise, and once it is up the old one goes.
            config = load_config(REPOSITORY / "k8s" / "overlays" / "cpu-demo" / "manta.yaml")
            [demo] = config.models
            one_group = demo.experts.model_copy(update={"groups": (tuple(range(8)),), "group_scaling": {}})
            newer = demo.model_copy(update={"path": str(fingerprinted_anew(tmp_path / "newer")), "experts": one_group})
            both = config.model_copy(
                update={"models": (newer, demo.model_copy(update={"version": old.split("-")[-1]}))}
            )
            document = mounted.here(serve_config(in_pods(both)))
            new = document["applications"][1]["name"]
            assert [one["name"] for one in document["applications"]] == ["gateway", new, old]
            cluster.deploy(document)
            cluster.wait_until_running("gateway", old, new)
            cluster.deploy(mounted.here(serve_config(in_pods(config.model_copy(update={"models": (newer,)})))))
            wait_for(lambda: old not in cluster.details(), 300, "the old version to be gone")
            cluster.wait_until_running("gateway", new)
            seen = len(clients.answers)
            wait_for(lambda: len(clients.answers) >= seen + 4, 120, "answers of the new version")
        assert clients.failures == []
        assert set(clients.answers) == {answer}
        refused = answers_while_no_gateway_lives(cluster, clients)
        print(f"while no gateway lived: {refused}")
        print(f"{len(clients.answers)} streams, none failed; connections opened again at {clients.reconnects}")


@pytest.mark.long
def test_eight_gpus_have_an_expert_each_and_coordinators_are_apart(tmp_path: Path) -> None:
    """The overlay `mixtral-8x7b-8gpu` on nodes with a GPU each, unused: the weights are the demo's, on CPU."""
    layout = (
        Pod("head"), Pod("gateway", cpus=1),
        *[Pod("coordinator", cpus=1, gpus=1)] * 2, *[Pod("expert", cpus=1, gpus=1)] * 9,
    )  # fmt: skip
    document = Mounted(tmp_path).here(overlay("mixtral-8x7b-8gpu")) | {"proxy_location": "HeadOnly"}
    gateway, model = document["applications"]
    for arguments in (gateway["args"]["models"][0]["model"], model["args"]["model"]):
        arguments["path"] = "demo"
        arguments["engine"] = {"device": "cpu", "kv_cache_gib": 0.0625, "num_threads": 1}
        arguments["experts"]["num_threads"] = 1
    numbers = {one["name"]: one for one in model["deployments"]}
    numbers["coordinator"]["num_replicas"] = numbers["expert-0"]["num_replicas"] = 2
    gateway["deployments"][0]["autoscaling_config"]["min_replicas"] = 1
    with pods(*layout) as cluster:
        cluster.deploy(document)
        cluster.wait_until_running(model["name"], "gateway", timeout_s=540)
        replicas = cluster.replicas(model["name"])
        experts = [node for name, running in replicas.items() if name.startswith("expert-") for _, node in running]
        coordinators = [node for _, node in replicas["coordinator"]]
        assert len(experts) == len(set(experts)) == 9, "each shard has a GPU, two replicas of a group have two nodes"
        assert len(coordinators) == len(set(coordinators)) == 2
        assert roles(cluster, layout, replicas) == {
            "root": [], "coordinator": ["coordinator"] * 2, "expert-0": ["expert"] * 2,
            **{f"expert-{group}": ["expert"] for group in range(1, 8)},
        }  # fmt: skip
