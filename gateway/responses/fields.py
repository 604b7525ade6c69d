"""The body of OpenAI's Responses API, as the chat that it asks for. Text and functions; nothing is stored.

Knows fields; the conversation is `input`'s, the answer's shape `shape`'s. A field that is not named
here is a hint (to caches, to billing, to models that reason) and changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from cluster.errors import InvalidRequest
from gateway.request.foreign_fields import without_refused
from gateway.request.protocol import MAX_MESSAGES, Body, ChatCompletionRequest, Effort, Integer, parse_body
from gateway.request.sampling_options import MAX_TOP_LOGPROBS, between
from gateway.request.tools import MAX_TOOLS
from gateway.responses.input import chat_messages
from gateway.responses.tools import chat_tool_choice, chat_tools, flat_path

Json = dict[str, Any]
LOGPROBS = "message.output_text.logprobs"
Includable = Literal[  # all but the first are parts of items that no answer has here
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]

# Field → values that ask for nothing; as in `gateway.request.foreign_fields`, null always does.
REFUSED: dict[str, tuple[Any, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "background_options": ({},),
    "prompt": (),
    "context_management": ([],),
    "moderation": (),
}
_RENAMED = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "logprobs": "top_logprobs",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}


class TextOptions(Body):
    """How the text is constrained: `{"type": "json_schema", "name": …, "schema": {…}}`, or type json_object or text."""

    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None  # a hint


class ReasoningOptions(Body):
    """How much the model shall reason, where its chat template asks; there is no summary, but all that it thought."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class PromptCacheOptions(Body):
    """All other options are hints."""

    prewarm: Literal[False] | None = None  # an answer without any text


class ResponsesRequest(Body):
    """Body of POST /v1/responses."""

    MAX_LENGTHS: ClassVar = {"input": MAX_MESSAGES, "tools": MAX_TOOLS, "metadata": 16, "include": 64}

    model: str | None = None
    input: Any = None  # a string, or a list of items; checked by `input`
    instructions: str | None = None
    max_output_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: Any = None  # this and `tool_choice`: checked by `tools` and the chat
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Integer | None = None  # of tools that OpenAI runs: none here
    include: Annotated[list[Includable], Field(fail_fast=True)] | None = None
    top_logprobs: Integer | None = None
    truncation: Literal["auto", "disabled"] | None = None
    reasoning: ReasoningOptions | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    metadata: dict[str, str] | None = None
    priority: Integer | None = None  # as of chats
    service_tier: Any = None  # there is one, which the answer names

    @property
    def wants_logprobs(self) -> bool:
        """Of the tokens of the answer's text."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)


def parse_responses_body(document: Json, num_bytes: int) -> tuple[ResponsesRequest, ChatCompletionRequest]:
    """The typed body, and the chat that it asks for. Raises InvalidRequest; `renamed` gives it the client's field."""
    body = parse_body(ResponsesRequest, without_refused(document, REFUSED), num_bytes)
    between("top_logprobs", body.top_logprobs or 0, 0, MAX_TOP_LOGPROBS)
    chat = {
        "model": body.model,
        "messages": chat_messages(body.instructions, body.input),
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "priority": body.priority,
        "top_p": body.top_p,
        "response_format": _response_format(body),
        "tools": chat_tools(body.tools),
        "tool_choice": chat_tool_choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "logprobs": body.wants_logprobs,
        "top_logprobs": body.top_logprobs if body.wants_logprobs else None,
    }
    return body, parse_body(ChatCompletionRequest, chat, num_bytes)


def renamed(error: InvalidRequest) -> InvalidRequest:
    """The same about the field as the client wrote it."""
    for ours, theirs in _RENAMED.items():
        if error.param is not None and error.param.startswith(ours):
            return _at(error, theirs + error.param.removeprefix(ours))
    return error if error.param is None else _at(error, flat_path(error.param))


def _at(error: InvalidRequest, param: str) -> InvalidRequest:
    return type(error)(str(error).replace(str(error.param), param, 1), param=param)


def _response_format(body: ResponsesRequest) -> Json | None:
    """As a chat has it: what describes a schema is one level deeper there."""
    given = body.text.format if body.text else None
    if given is None or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}
