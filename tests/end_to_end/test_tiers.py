"""Two groups on a host that says it has GPUs, six on one without: each is where it belongs, and no token changes."""

from __future__ import annotations

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.demo_model import DIRECTORY
from tests.hosts import NotPossible, hosts
from tests.ray_hosts import CONFIG, PORT, frames, ray_hosts

pytestmark = [pytest.mark.root, pytest.mark.long]

PROMPT, NUM_TOKENS = "What is the best French cheese?", 40
# The GPUs are reserved, and the maths runs on the CPU.
TIERS = """    experts:
      groups: [[0], [1], [2], [3], [4], [5], [6], [7]]
      tiers:
        - {groups: [2, 5], gpus_per_shard: 1, label_selector: {tier: gpu}}
        - {label_selector: {tier: cpu}}
"""


def test_busy_groups_are_on_gpus_and_the_others_on_cpus() -> None:
    head, rest = CONFIG.split("    experts:\n")
    config = head.replace("engine: {", "engine: {device: cpu, ") + TIERS + rest[rest.index("gateway:") :]
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "return_token_ids": True}
    try:
        with hosts(3) as network, ray_hosts(network, gpus=(2, 0)) as cluster, cluster.manta(config):
            gpu_host, cpu_host = cluster.others
            assert cluster.experts_on(gpu_host) == ["expert-2", "expert-5"]
            assert cluster.experts_on(cpu_host) == [f"expert-{group}" for group in (0, 1, 3, 4, 6, 7)]
            url = f"http://127.0.0.1:{PORT}/v1/completions"
            answer = cluster.head.run(lambda: httpx.post(url, json=body, timeout=120)).json()
            assert len(cluster.head.run(frames)) == 8, "rows went to every group"
    except NotPossible as reason:
        pytest.skip(str(reason))
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    choice = answer["choices"][0]
    assert choice["token_ids"] == outputs[0, inputs["input_ids"].shape[1] :].tolist()
