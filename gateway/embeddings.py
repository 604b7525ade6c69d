"""Embedding requests: a parsed body becomes a job for the coordinators, their vectors the answer. Knows no wire.

Knows the bounds of inputs and dimensions; how a vector comes about is the coordinator's. As numbers it is

    float            as it is, or of length 1
    int8, uint8      a byte a number: 127 times the number by the largest one of the vector; uint8 is 128 more
    binary, ubinary  a bit a number, 1 where it is over 0, eight to a byte, the first in its highest; binary is 128 less
"""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.config import GatewayConfig
from cluster.deadline import Deadline
from cluster.errors import ContextTooLong, InvalidRequest
from cluster.messages import Embedding, ModelCard, Request, SamplingParams
from gateway.admission.caller import current_caller
from gateway.request.prompts import PromptReader
from gateway.request.protocol import EmbeddingRequest, OutputDtype
from gateway.request.sampling_options import between, read_priority
from gateway.text.tokenizer import Tokenizer

Vector = npt.NDArray[Any]  # [D] of float32, int8 or uint8; of bits [D / 8]


@dataclass(frozen=True)
class EmbeddingJob:
    """One client request: what to ask a coordinator for, and what is wanted of each vector."""

    id: str
    created: int  # Unix time in seconds
    card: ModelCard
    requests: tuple[Request, ...]  # one per input, in order
    num_prompt_tokens: int  # summed over inputs
    dimensions: int
    deadline: Deadline
    normalizes: bool
    dtype: OutputDtype


class EmbeddingValidator:
    """Makes jobs for one model."""

    def __init__(self, card: ModelCard, tokenizer: Tokenizer, config: GatewayConfig) -> None:
        self._card = card
        self._config = config
        self._reader = PromptReader(card, tokenizer)

    def job(self, body: EmbeddingRequest, timeout_s: float | None = None) -> EmbeddingJob:
        """Raises InvalidRequest, which names the field."""
        field = "output_dimension" if body.dimensions is None else "dimensions"
        dimensions = body.output_dimension if body.dimensions is None else body.dimensions
        if dimensions is not None:
            between(field, dimensions, 1, self._card.hidden_size)
        most = self._config.max_embedding_tokens
        prompts = self._reader.prompts(
            body.input, max_prompts=self._config.max_embedding_inputs, field="input", max_tokens=most
        )
        for i, prompt in enumerate(prompts):
            if len(prompt) > self._card.max_model_len:
                path = "input" if len(prompts) == 1 else f"input[{i}]"
                raise ContextTooLong(
                    f"{path}: {len(prompt)} tokens exceed the model's context of {self._card.max_model_len}", param=path
                )
        num_tokens = sum(map(len, prompts))
        if num_tokens > most:
            raise InvalidRequest(f"input: {num_tokens} tokens in all, at most {most} in this request", param="input")
        priority = read_priority(body.priority)
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
                    priority=priority,
                    num_siblings=len(prompts) - 1,
                    pooling=self._card.pooling,
                )
                for i, prompt in enumerate(prompts)
            ),
            num_prompt_tokens=num_tokens,
            dimensions=dimensions or self._card.hidden_size,
            deadline=deadline,
            normalizes=body.normalize is not False,
            dtype=body.output_dtype or "float",
        )


def vectors(job: EmbeddingJob, embeddings: Sequence[Embedding]) -> list[Vector]:
    """One per input, in order, of the first `dimensions` numbers of each."""
    return [_vector(job, np.frombuffer(embedding.values, dtype="<f4")[: job.dimensions]) for embedding in embeddings]


def _vector(job: EmbeddingJob, values: npt.NDArray[np.float32]) -> Vector:
    match job.dtype:
        case "float":
            scale = max(float(np.linalg.norm(values)), 1e-12) if job.normalizes else 1.0
            whole: Vector = np.asarray(values / scale, np.float32)
            return whole
        case "int8" | "uint8":
            largest = max(float(np.abs(values).max()), 1e-12)
            scaled: Vector = np.rint(values * (127 / largest)).astype(np.int8)
            return scaled if job.dtype == "int8" else scaled.view(np.uint8) ^ 0x80
        case "binary" | "ubinary":
            bits: Vector = np.packbits(values > 0)
            return bits if job.dtype == "ubinary" else (bits ^ 0x80).view(np.int8)


def embeddings_body(job: EmbeddingJob) -> dict[str, Any]:
    """OpenAI's answer, with the id that Mistral's has, without its `data`."""
    return {
        "id": job.id,
        "object": "list",
        "model": job.card.name,
        "usage": {
            "prompt_tokens": job.num_prompt_tokens,
            "completion_tokens": 0,
            "total_tokens": job.num_prompt_tokens,
        },
    }


def embedding_items(answer: Sequence[Vector], encoding_format: str | None) -> Iterator[dict[str, Any]]:
    """Its `data`, one by one: of thousands of vectors there are millions of numbers. Base64 is of them as they lie in
    memory.
    """
    for i, vector in enumerate(answer):
        if encoding_format == "base64":
            raw = vector.astype(vector.dtype.newbyteorder("<")).tobytes()
            numbers: str | list[float] = base64.b64encode(raw).decode()
        else:
            numbers = vector.tolist()
        yield {"object": "embedding", "index": i, "embedding": numbers}
