"""Text or messages to token ids and back, as clients ask for it; vLLM's shapes. Knows no HTTP, gRPC or sampling."""

from __future__ import annotations

from functools import partial
from typing import Any

from cluster.errors import InvalidRequest
from gateway.frontend import Frontend, ServedModel
from gateway.request.continuation import read_rendering
from gateway.request.prompts import PromptReader, TokenIds
from gateway.request.protocol import Body, Integers, Messages, TemplateFields
from gateway.request.tools import read_tools


class TokenizeRequest(TemplateFields):
    """Body of POST /tokenize: either a prompt or messages; without a model the first one."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Any = None  # with messages; checked by `gateway.request.tools`
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Integers


async def tokenize(frontend: Frontend, body: TokenizeRequest) -> tuple[ServedModel, TokenIds]:
    """The model asked for, and its token ids. Raises InvalidRequest or ModelNotFound."""
    model = frontend.route(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("prompt: expected a prompt or messages, and not both", param="prompt")
    return model, await frontend.read(body, partial(_tokenize, model, body))


async def detokenize(frontend: Frontend, body: DetokenizeRequest) -> str:
    """The text of the ids, special tokens included. Raises InvalidRequest or ModelNotFound."""
    model = frontend.route(body.model)
    return await frontend.worker.run(body.num_bytes, _detokenize, model, body)


def tokenize_body(model: ServedModel, token_ids: TokenIds, *, with_strings: bool) -> dict[str, Any]:
    """vLLM's answer."""
    return {
        "count": len(token_ids),
        "max_model_len": model.card.max_model_len,
        "tokens": token_ids,
        "token_strs": token_strings(model, token_ids) if with_strings else None,
    }


def token_strings(model: ServedModel, token_ids: TokenIds) -> list[str]:
    """The vocabulary's entries."""
    return list(map(model.tokenizer.piece, token_ids))


def _tokenize(model: ServedModel, body: TokenizeRequest) -> TokenIds:
    reader = PromptReader(model.card, model.tokenizer)
    if body.messages is not None:
        how = read_rendering(body, body.messages, continues_assistants=model.tokenizer.continues_assistants)
        return reader.chat(
            body.messages, tools=read_tools(body.tools), add_special_tokens=bool(body.add_special_tokens), how=how
        )
    return reader.text(body.prompt or "", "prompt", add_special_tokens=body.add_special_tokens is not False)


def _detokenize(model: ServedModel, body: DetokenizeRequest) -> str:
    token_ids = PromptReader(model.card, model.tokenizer).token_ids(body.tokens, "tokens")
    # The embeddings may be padded beyond the vocabulary: those ids have no text.
    return model.tokenizer.decode([token_id for token_id in token_ids if token_id < model.tokenizer.vocab_size])
