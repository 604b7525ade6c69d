"""chat.proto's messages to and from the doors' own types. Knows fields only."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from cluster.errors import InvalidRequest
from gateway import chat_pb2
from gateway.choice import Delta, Usage
from gateway.embeddings import EmbeddingJob
from gateway.grpc_chat import call_messages
from gateway.json_bounds import MAX_VALUES
from gateway.responses import ChoiceText
from gateway.validator import Generation

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


def embedding_fields(request: chat_pb2.EmbedRequest) -> dict[str, Any]:
    """The body of the same request over HTTP; texts and token ids may not be mixed there."""
    inputs = [
        item.text if item.WhichOneof("input") == "text" else numbers(item.token_ids.ids, f"input[{i}]")
        for i, item in enumerate(request.inputs)
    ]
    dimensions = request.dimensions if request.HasField("dimensions") else None
    return {"model": request.model, "input": inputs, "dimensions": dimensions}


def head(job: Generation | EmbeddingJob) -> dict[str, Any]:
    """What every answer and chunk begins with."""
    return {"id": job.id, "model": job.card.name, "created": job.created}


def choice(index: int, piece: ChoiceText | Delta) -> chat_pb2.Choice:
    """One choice, whole or a piece of it."""
    return chat_pb2.Choice(
        index=index,
        text=piece.text,
        token_ids=piece.token_ids,
        logprobs=[
            chat_pb2.TokenLogprob(
                token_id=token_id,
                logprob=at.token_logprob,
                top=[chat_pb2.TopLogprob(token_id=top_id, logprob=logprob) for top_id, logprob in at.top],
            )
            for token_id, at in zip(piece.token_ids, piece.logprobs or (), strict=False)
        ],
        finish_reason=FINISH[piece.finish_reason],
        tool_calls=call_messages(piece.tool_calls),
        routed_experts=[
            chat_pb2.TokenExperts(layers=[chat_pb2.LayerExperts(experts=experts) for experts in layers])
            for layers in piece.routed_experts or ()
        ],
    )


def usage_message(usage: Usage) -> chat_pb2.Usage:
    """Token counts."""
    return chat_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )
