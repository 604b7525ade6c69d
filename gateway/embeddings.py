"""Embedding requests: a parsed body becomes a job for the coordinators, their vectors the answer. Knows no wire.

Knows the bounds of inputs and dimensions; how a vector comes about is the coordinator's.
"""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.config import GatewayConfig
from cluster.deadline import Deadline
from cluster.errors import ContextTooLong, InvalidRequest
from cluster.messages import Embedding, ModelCard, Request, SamplingParams
from gateway.bounds import between
from gateway.caller import current_caller
from gateway.prompts import PromptReader
from gateway.protocol import EmbeddingRequest
from gateway.tokenizer import Tokenizer

Vector = npt.NDArray[np.float32]  # [D], of length 1


@dataclass(frozen=True)
class EmbeddingJob:
    """One client request: what to ask a coordinator for, and how much of each vector is wanted."""

    id: str
    created: int  # Unix time in seconds
    card: ModelCard
    requests: tuple[Request, ...]  # one per input, in order
    num_prompt_tokens: int  # summed over inputs
    dimensions: int
    deadline: Deadline


class EmbeddingValidator:
    """Makes jobs for one model."""

    def __init__(self, card: ModelCard, tokenizer: Tokenizer, config: GatewayConfig) -> None:
        self._card = card
        self._config = config
        self._reader = PromptReader(card, tokenizer)

    def job(self, body: EmbeddingRequest, timeout_s: float | None = None) -> EmbeddingJob:
        """Raises InvalidRequest, which names the field."""
        if body.output_dtype not in (None, "float"):
            raise InvalidRequest("output_dtype: only 'float' is supported", param="output_dtype")
        field = "output_dimension" if body.dimensions is None else "dimensions"
        dimensions = body.output_dimension if body.dimensions is None else body.dimensions
        if dimensions is not None:
            between(field, dimensions, 1, self._card.hidden_size)
        prompts = self._reader.prompts(body.input, max_prompts=self._config.max_embedding_inputs, field="input")
        for i, prompt in enumerate(prompts):
            if len(prompt) > self._card.max_model_len:
                path = "input" if len(prompts) == 1 else f"input[{i}]"
                raise ContextTooLong(
                    f"{path}: {len(prompt)} tokens exceed the model's context of {self._card.max_model_len}", param=path
                )
        longest = self._config.request_timeout_s
        deadline = Deadline.after(longest if timeout_s is None else min(timeout_s, longest))
        job_id = f"embd-{uuid.uuid4().hex}"
        return EmbeddingJob(
            id=job_id,
            created=int(time.time()),
            card=self._card,
            requests=tuple(
                Request(
                    request_id=job_id,
                    prompt_token_ids=prompt,
                    sampling=SamplingParams(max_tokens=1),
                    seed=0,
                    choice_index=i,
                    deadline=deadline,
                    cache_salt=current_caller().id,
                    pooling=self._card.pooling,
                )
                for i, prompt in enumerate(prompts)
            ),
            num_prompt_tokens=sum(map(len, prompts)),
            dimensions=dimensions or self._card.hidden_size,
            deadline=deadline,
        )


def vectors(job: EmbeddingJob, embeddings: Sequence[Embedding]) -> list[Vector]:
    """One per input, in order: the first `dimensions` numbers of each, scaled to length 1 again."""
    shortened = [np.frombuffer(embedding.values, dtype="<f4")[: job.dimensions] for embedding in embeddings]
    return [(vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32) for vector in shortened]


def embeddings_body(job: EmbeddingJob, answer: Sequence[Vector], encoding_format: str | None) -> dict[str, Any]:
    """OpenAI's answer, with the id that Mistral's has; base64 is of the numbers as little-endian float32."""
    return {
        "id": job.id,
        "object": "list",
        "model": job.card.name,
        "data": [
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()
                if encoding_format == "base64"
                else vector.tolist(),
            }
            for i, vector in enumerate(answer)
        ],
        "usage": {
            "prompt_tokens": job.num_prompt_tokens,
            "completion_tokens": 0,
            "total_tokens": job.num_prompt_tokens,
        },
    }
