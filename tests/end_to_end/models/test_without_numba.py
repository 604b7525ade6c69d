"""A server in whose processes numba cannot be imported: torch computes, and answers have all that they have with it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import httpx
import pytest

from cluster.demo_model import DIRECTORY as DEMO
from tests.conftest import Server, running_server
from tests.processes import processes

CONFIG = f"""
models:
  - name: demo
    path: {DEMO}
    engine: {{dtype: bfloat16, max_model_len: 1024, kv_cache_gib: 0.1}}
    experts: {{groups: [[0, 1, 2, 3], [4, 5, 6, 7]]}}
"""
CHEESE = [{"role": "user", "content": "What is the best French cheese?"}]

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its processes find a numba that cannot be imported before the real one, as where it was not installed."""
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "numba.py").write_text("raise ImportError('hidden')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(hidden), os.environ.get("PYTHONPATH")))))
        with running_server(CONFIG) as server:
            yield server


def test_it_answers_as_with_numba_and_says_what_computes(without: Server) -> None:
    def chat(**fields: object) -> dict[str, object]:
        body = {"model": "demo", "messages": CHEESE, "max_tokens": 40, **fields}
        answer = httpx.post(f"{without.url}/v1/chat/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["choices"][0])

    greedy = chat(temperature=0, logprobs=True, top_logprobs=3)
    assert greedy["finish_reason"] == "stop"
    assert all(len(token["top_logprobs"]) == 3 for token in greedy["logprobs"]["content"])  # type: ignore[index]
    wishes = {"top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "logit_bias": {"5": -100}}
    drawn = chat(seed=7, temperature=1.0, **wishes)
    assert drawn == chat(seed=7, temperature=1.0, **wishes)
    assert chat(response_format={"type": "json_object"})["message"]["content"][:1] == "{"  # type: ignore[index]
    kernels = httpx.get(f"{without.url}/v1/models/demo").json()["kernels"]
    [coordinator] = kernels["coordinator"]
    assert (coordinator["sampling"], coordinator["batch_invariant"]) == ("torch", False)
    assert {kind["matmuls"] for kinds in kernels.values() for kind in kinds} <= {"torch", "onednn"}
    [process] = processes(without, ":coordinator")
    assert not any("llvmlite" in mapped.path for mapped in process.memory_maps()), "nothing compiles"
