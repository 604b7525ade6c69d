"""lm-evaluation-harness over engines of the demo model, weights rounded to each format; its results as lines of JSON.

evaluate_formats.py DIRECTORY TASK — with the task there. In an environment that has lm-eval in front of ours.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from cluster.demo_model import DIRECTORY
from tests.router_service.engines import Bench
from tests.router_service.requests import make_request

FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"quantization": "int8"},
    "fp8": {"quantization": "fp8"},
    "int4": {"quantization": "int4"},
}
BATCH = 32


class EngineUnderTest(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods of an engine in this process."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self._bench = Bench(DIRECTORY, num_kv_blocks=2048, **config)
        self._tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)

    @property
    def eot_token_id(self) -> int:
        return int(self._tokenizer.eos_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        return list(self._tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        scored = []
        for first in range(0, len(requests), BATCH):
            asked = [(context, answer) for _, context, answer in requests[first : first + BATCH]]
            ours = [make_request([*context, *answer], max_tokens=1, prompt_logprobs=1) for context, answer in asked]
            self._bench.run(*ours)
            for request, (context, answer) in zip(ours, asked, strict=True):
                scores = [score for chunk in self._bench.chunks[request.key] for score in chunk.prompt_logprobs or ()]
                of_answer = list(zip(scores[len(context) :], answer, strict=True))
                likeliest = all(score.top[0][0] == token_id for score, token_id in of_answer)
                scored.append((sum(score.token_logprob for score, _ in of_answer), likeliest))
        return scored

    def loglikelihood_rolling(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def generate_until(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


def main(directory: str, task: str) -> None:
    tasks = TaskManager(include_path=directory, include_defaults=False)

    def tell(name: str, model: Any, **how: Any) -> None:
        found = lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=tasks, bootstrap_iters=0, **how)
        figures = found["results"][task]
        print(json.dumps([name, figures["perplexity,none"], figures["acc,none"], figures["sample_len"]]), flush=True)

    transformers = f"pretrained={DIRECTORY},dtype=float32,add_bos_token=True"
    tell("transformers fp32", "hf", model_args=transformers, device="cpu", batch_size=8)
    for name, config in FORMATS.items():
        tell(name, EngineUnderTest(**config))


if __name__ == "__main__":
    main(*sys.argv[1:])
