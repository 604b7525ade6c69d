"""Models that were saved without their output head, as Qwen3-Embedding is: names lack what all others begin with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cluster.checkpoint.checkpoint import open_checkpoint
from cluster.config import ModelConfig
from cluster.deploy.app import Cluster, plan_model
from cluster.errors import ConfigError
from cluster.planning.placement import Node
from tests.families import random_model
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request

PROMPT = list(range(7, 31))
CLUSTER = Cluster(2, (Node("laptop", 8 * 2**30),))


@pytest.mark.parametrize("architectures", [["Qwen3Model"], ["Qwen3ForCausalLM"]], ids=lambda names: names[0])
@pytest.mark.parametrize("tied", [True, False])
def test_it_makes_embeddings_and_answers_nothing_without_a_head(
    tmp_path: Path, tied: bool, architectures: list[str]
) -> None:
    base = random_model("qwen3", tie_word_embeddings=tied).model
    base.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": architectures}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.has_head is tied
    bench = Bench(tmp_path)
    request = make_request(PROMPT, pooling="last")
    bench.run(request)
    with torch.inference_mode():
        expected = base(torch.tensor([PROMPT])).last_hidden_state[0, -1]
    torch.testing.assert_close(bench.embeddings[request.key], expected, atol=1e-5, rtol=0)
    plan_model(ModelConfig(name="m", path=str(tmp_path), kind="embedding"), checkpoint, CLUSTER)
    chats = ModelConfig(name="m", path=str(tmp_path))
    if tied:
        plan_model(chats, checkpoint, CLUSTER)
    else:
        with pytest.raises(ConfigError, match=r"was saved without its output head.*with `kind: embedding`"):
            plan_model(chats, checkpoint, CLUSTER)
