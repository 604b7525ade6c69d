"""chat.proto's messages to and from the doors' own types. Knows fields only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from cluster.errors import InvalidRequest
from cluster.messages import TokenLogprobs
from cluster.telemetry.kernels import ModelKernels
from gateway.answer.chat import ChoiceText
from gateway.answer.choice import Delta, Usage
from gateway.embeddings import EmbeddingJob, Vector
from gateway.grpc.chat import answer_fields, call_messages, set_fields
from gateway.grpc.proto import chat_pb2
from gateway.json_bounds import MAX_VALUES
from gateway.request.validator import Generation

Echoed = tuple[str, Sequence[int]]  # a prompt's text and ids

FINISH = {
    None: chat_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": chat_pb2.FINISH_REASON_STOP,
    "length": chat_pb2.FINISH_REASON_LENGTH,
    "tool_calls": chat_pb2.FINISH_REASON_TOOL_CALLS,
}


def sampling_fields(sampling: chat_pb2.Sampling) -> dict[str, Any]:
    """Only the fields that are set, under the bodies' names."""
    document: dict[str, Any] = {}
    for field, value in sampling.ListFields():
        if field.name == "logit_bias":
            document["logit_bias"] = {str(token_id): bias for token_id, bias in value.items()}
        elif field.name == "stop":
            document["stop"] = list(value)
        elif field.name == "stop_token_ids":
            document["stop_token_ids"] = numbers(value, "stop_token_ids")
        else:
            document[field.name] = value
    return document


def numbers(values: Collection[int], path: str) -> list[int]:
    """A list of them, which lets no other thread run. Raises InvalidRequest for more than a JSON body may hold."""
    if len(values) > MAX_VALUES:
        raise InvalidRequest(f"{path}: at most {MAX_VALUES} numbers, got {len(values)}", param=path)
    return list(values)


def completion_fields(request: chat_pb2.GenerateRequest) -> dict[str, Any]:
    """The body of the same request over HTTP."""
    fields = {"model": request.model, **sampling_fields(request.sampling)}
    match request.WhichOneof("prompt"):
        case "text":
            fields["prompt"] = request.text
        case "token_ids":
            fields["prompt"] = numbers(request.token_ids.ids, "prompt")
        case "prompts":
            fields["prompt"] = _prompts(request.prompts.prompts, "prompt")
    return fields | set_fields(request, "echo", "add_special_tokens") | answer_fields(request)


def embedding_fields(request: chat_pb2.EmbedRequest) -> dict[str, Any]:
    """The body of the same request over HTTP."""
    fields: dict[str, Any] = {"model": request.model, "input": _prompts(request.inputs, "input")}
    fields |= set_fields(request, "dimensions", "normalize", "priority")
    if request.output_dtype:
        fields["output_dtype"] = request.output_dtype
    return fields


def _prompts(prompts: Iterable[chat_pb2.Prompt | chat_pb2.EmbedInput], path: str) -> list[str | list[int]]:
    return [
        item.text if item.WhichOneof("input") == "text" else numbers(item.token_ids.ids, f"{path}[{i}]")
        for i, item in enumerate(prompts)
    ]


def head(job: Generation | EmbeddingJob) -> dict[str, Any]:
    """What every answer and chunk begins with."""
    return {"id": job.id, "model": job.card.name, "created": job.created}


def kernel_fields(kernels: ModelKernels | None) -> dict[str, Any]:
    """Those of a Model."""
    if kernels is None:
        return {}
    told = [
        chat_pb2.Kernels(deployment=deployment, **one.names, batch_invariant=one.batch_invariant)
        for deployment in kernels.deployments
        for one in kernels.distinct(deployment)
    ]
    return {"batch_invariant": kernels.batch_invariant, "kernels": told, "mixed_replicas": kernels.mixed}


def choice(index: int, piece: ChoiceText | Delta, echoed: Echoed | None = None) -> chat_pb2.Choice:
    """One choice, whole or a piece of it; the first piece has what is echoed of its prompt."""
    text, prompt_token_ids = echoed or ("", ())
    return chat_pb2.Choice(
        index=index,
        text=text + piece.text,
        token_ids=piece.token_ids,
        logprobs=_logprobs(piece.token_ids, piece.logprobs or ()),
        prompt_token_ids=prompt_token_ids,
        prompt_logprobs=_logprobs(prompt_token_ids, piece.prompt_logprobs or ()),
        finish_reason=FINISH[piece.finish_reason],
        tool_calls=call_messages(piece.tool_calls),
        routed_experts=[
            chat_pb2.TokenExperts(layers=[chat_pb2.LayerExperts(experts=experts) for experts in layers])
            for layers in piece.routed_experts or ()
        ],
        reasoning_content=piece.reasoning,
    )


def echoed(generation: Generation, index: int) -> Echoed | None:
    """What the answer of a choice begins with; None where nothing is to be told of the prompt."""
    if not generation.echo and not generation.tells_prompt_logprobs:
        return None
    return (generation.echo[index] if generation.echo else "", generation.requests[index].prompt_token_ids)


def num_echoed_bytes(generation: Generation, index: int) -> int:
    """About how much that is."""
    text, token_ids = echoed(generation, index) or ("", ())
    return len(text) + 4 * len(token_ids)


def _logprobs(token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> list[chat_pb2.TokenLogprob]:
    """One per token that has any: a prompt's first has none."""
    return [
        chat_pb2.TokenLogprob(
            token_id=token_id,
            logprob=at.token_logprob,
            top=[chat_pb2.TopLogprob(token_id=top_id, logprob=logprob) for top_id, logprob in at.top],
        )
        for token_id, at in zip(token_ids, logprobs, strict=False)
        if at is not None
    ]


def embedding_message(index: int, vector: Vector) -> chat_pb2.Embedding:
    """One input's."""
    if vector.dtype == np.float32:
        return chat_pb2.Embedding(index=index, values=vector)
    return chat_pb2.Embedding(index=index, packed=vector.tobytes())


def usage_message(usage: Usage) -> chat_pb2.Usage:
    """Token counts."""
    return chat_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        reasoning_tokens=usage.reasoning_tokens or 0,
    )
