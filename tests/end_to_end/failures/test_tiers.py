"""Two groups on a host that says it has GPUs, six on one without in 8 bits, and a hot one on both while it serves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.checkpoint.quantization.rounding import Rounding
from cluster.demo_model import DIRECTORY
from experts_service.kernels.experts import expert_tensor_names
from experts_service.quantization.weight import dense
from experts_service.weights import read_tensors
from tests.hosts import Host, NotPossible, hosts
from tests.ray_hosts import CONFIG, PORT, RayHosts, frames, ray_hosts
from tests.waiting import wait_for

pytestmark = [pytest.mark.root, pytest.mark.long]

PROMPT, NUM_TOKENS = "What is the best French cheese?", 40
BODY = {"model": "demo", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "return_token_ids": True}
PLAIN, ROUNDED = (2, 5), (0, 1, 3, 4, 6, 7)
# The GPUs are reserved, and the maths runs on the CPU. Group 2 is hot: it is never idle enough, and group 5 always is.
# The second tier of group 2 has its numbers, that of group 5 has not.
TIERS = """    experts:
      groups: [[0], [1], [2], [3], [4], [5], [6], [7]]
      expert_timeout_s: 300
      mixed_replicas: true
      tiers:
        - {groups: [2], gpus_per_shard: 1, label_selector: {tier: gpu}, scaling: {target_busy_fraction: 0.001}}
        - groups: [5]
          gpus_per_shard: 1
          label_selector: {tier: gpu}
          scaling: {target_busy_fraction: 1, max_queue_s: 100}
        - {label_selector: {tier: cpu}, quantization: int8, quantization_group_size: 64}
        - {groups: [2], label_selector: {tier: cpu}, scaling: {min_replicas: 0, upscale_delay_s: 2}}
        - groups: [5]
          label_selector: {tier: cpu}
          quantization: int8
          quantization_group_size: 64
          scaling: {min_replicas: 0, upscale_delay_s: 2}
"""
FORMAT = "INT8, groups of 64"
PATIENCE_S = 300
T = TypeVar("T")


class Served:
    """The model, as a client on the head's host sees it."""

    def __init__(self, cluster: RayHosts) -> None:
        self._cluster = cluster

    def _on_head(self, ask: Callable[[httpx.Client], T]) -> T:
        def run() -> T:
            with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=PATIENCE_S) as client:
                return ask(client)

        return self._cluster.head.run(run)

    def tokens(self, meanwhile: Callable[[], object] | None = None) -> list[int]:
        """Of one stream; `meanwhile` is done after its first token."""

        def ask(client: httpx.Client) -> list[int]:
            ids: list[int] = []
            done = meanwhile is None
            with client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer:
                assert answer.status_code == 200, answer.read()
                for line in answer.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    ids += [token for choice in json.loads(line[6:])["choices"] for token in choice["token_ids"]]
                    if ids and not done:
                        done = True
                        assert meanwhile is not None
                        meanwhile()
            return ids

        return self._on_head(ask)

    def model(self) -> dict[str, Any]:
        """What /v1/models says of it."""
        return self._on_head(lambda client: client.get("/v1/models/demo").json())

    def formats(self) -> dict[str, set[str]]:
        """Of the experts' deployments."""
        kernels = self.model()["kernels"]
        return {name: {one["weights"] for one in told} for name, told in kernels.items() if name != "coordinator"}

    def frames_of(self, deployment: str) -> float:
        """Dispatches over lanes."""
        return sum(count for labels, count in self._cluster.head.run(frames).items() if f'"{deployment}"' in labels)


def expected_tokens() -> list[int]:
    """Those of transformers with the weights that six groups have in 8 bits."""
    checkpoint = open_checkpoint(DIRECTORY).rounded(Rounding("int8", 64, "experts"))
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
    for layer, block in enumerate(model.model.layers):
        for expert in ROUNDED:
            names = expert_tensor_names(layer, expert)
            w1, w2, w3 = map(dense, read_tensors(checkpoint, names, dtype=torch.float32).values())
            block.mlp.experts.gate_up_proj.data[expert] = torch.cat([w1, w3])
            block.mlp.experts.down_proj.data[expert] = w2
    inputs = tokenizer(PROMPT, return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    ids: list[int] = outputs[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


def kill_replica(host: Host, deployment: str) -> None:
    """The process that supervises it; its shard goes with it."""
    title = re.compile(rf"ray::ServeReplica:demo-\w+:{deployment}\b(?!-)")
    for process_id in host.process_ids():
        try:
            process = psutil.Process(process_id)
            if title.match(process.cmdline()[0]):
                process.kill()
                return
        except (psutil.Error, IndexError):
            continue
    raise AssertionError(f"no {deployment} there")


def test_busy_groups_are_on_gpus_the_others_on_cpus_and_a_hot_one_on_both() -> None:
    head, rest = CONFIG.split("    experts:\n")
    config = head.replace("engine: {", "engine: {device: cpu, ") + TIERS + rest[rest.index("gateway:") :]
    expected = expected_tokens()
    try:
        with hosts(3) as network, ray_hosts(network, gpus=(2, 0)) as cluster, cluster.manta(config):
            gpu_host, cpu_host = cluster.others
            served = Served(cluster)
            of_cpus = [f"expert-{group}" for group in ROUNDED]
            assert cluster.experts_on(gpu_host) == ["expert-2", "expert-5"]
            assert [name for name in cluster.experts_on(cpu_host) if "tier" not in name] == of_cpus
            before = served.model()
            assert before["mixed_replicas"] == [], "each group has one format"
            assert served.formats() == {f"expert-{g}": {"" if g in PLAIN else FORMAT} for g in range(8)}

            def is_on_both() -> bool:
                assert served.tokens() == expected, "of weights rounded as the tier says, with one replica or two"
                return served.frames_of("expert-2-tier3") > 0

            wait_for(is_on_both, PATIENCE_S, "the hot group to have a replica on the other tier")
            assert cluster.experts_on(cpu_host) == sorted([*of_cpus, "expert-2-tier3"])
            assert served.model()["mixed_replicas"] == [], "its replicas are alike"

            assert served.tokens(lambda: kill_replica(gpu_host, "expert-2")) == expected, "the other tier serves on"

            # The other group's tier stands in with other numbers, until the first one is back; and all say so.
            kill_replica(gpu_host, "expert-5")
            wait_for(lambda: "expert-5-tier4" in cluster.experts_on(cpu_host), PATIENCE_S, "a replica to stand in")
            wait_for(lambda: served.model()["mixed_replicas"] == ["expert-5"], PATIENCE_S, "two formats to be told")
            after = served.model()
            assert served.formats()["expert-5-tier4"] == {FORMAT}
            assert after["system_fingerprint"] != before["system_fingerprint"]
            assert after["fingerprint"] == before["fingerprint"]
            assert served.tokens(), "whatever they are"
    except NotPossible as reason:
        pytest.skip(str(reason))
