"""The bodies of OpenAI's chat and completion requests, as clients send them. Knows types, and how long lists may be;
other bounds are the validator's.

Fields of other features are in `gateway.request.foreign_fields`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, WithJsonSchema

from cluster.errors import InvalidRequest
from gateway.request.foreign_fields import refuse_foreign

MAX_MESSAGES = 16_384  # the context's length may allow less


def _one_or_many(value: Any) -> Any:
    """`stop` is null, one string or a list of strings."""
    return [value] if isinstance(value, str) else value


def _whole(value: Any) -> Any:
    """16.0 is 16: some languages have no other numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole_numbers(value: Any) -> Any:
    """The same of a list's entries."""
    return list(map(_whole, value)) if isinstance(value, list) and float in set(map(type, value)) else value


_STRINGS: dict[str, Any] = {"type": "array", "items": {"type": "string"}}
_TOKEN_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}
_FIRST_ERROR = Field(fail_fast=True)  # for every list: nobody is told of a million wrong entries
Strings = Annotated[
    list[str],
    _FIRST_ERROR,
    BeforeValidator(_one_or_many),
    WithJsonSchema({"anyOf": [{"type": "string"}, _STRINGS]}),
]
Integer = Annotated[int, BeforeValidator(_whole)]
Integers = Annotated[list[int], _FIRST_ERROR, BeforeValidator(whole_numbers)]
Prompt = Annotated[  # checked by the validator
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                _TOKEN_IDS,
                {"type": "array", "items": {"anyOf": [{"type": "string"}, _TOKEN_IDS]}},
            ],
            "minItems": 1,
        }
    ),
]


class Body(BaseModel):
    """Any JSON body: strict types, unknown fields ignored."""

    MAX_LENGTHS: ClassVar[dict[str, int]] = {}  # of lists and objects, looked at before their contents

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    _num_bytes: int = PrivateAttr(0)

    @property
    def num_bytes(self) -> int:
        """As it was sent: what grows with it is not done on the event loop."""
        return self._num_bytes


class StreamOptions(Body):
    """Asks for a last chunk with the usage, and for the usage so far in each chunk before it."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(Body):
    """What chat and completions share; None is: not given."""

    MAX_LENGTHS: ClassVar = {"stop": 16, "stop_token_ids": 64, "logit_bias": 1024}

    model: str | None = None  # where one is served, or any name is taken
    max_tokens: Integer | None = None
    min_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Integer | None = None
    priority: Integer | None = None  # among the requests of one API key the lower is served earlier; 0 unless said
    random_seed: Integer | None = None  # Mistral's name
    n: Integer | None = None
    stop: Strings | None = None
    stop_token_ids: Integers | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Integer | None = None  # log-probabilities of the prompt's tokens, and so many of the most likely
    truncate_prompt_tokens: Integer | None = (
        None  # at most so many of the prompt stay; -1: as many as there is room for
    )
    truncation_side: Literal["left", "right"] | None = None  # where tokens go; left unless said
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None  # log-probabilities are of `token_id:5`, not of a token's text
    return_routed_experts: bool | None = None  # ours: `routed_experts` of each choice, [token][layer][top_k]

    @property
    def wants_usage(self) -> bool:
        """A last chunk with the usage, in a stream."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_each_usage(self) -> bool:
        """The usage so far in each chunk before that one."""
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class Message(Body):
    """One turn of a conversation. Unknown fields are kept, for `gateway.request.tools_history` to look at."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Any = None  # a string, or a list of ContentPart; checked by `text_of`
    tool_calls: Any = None  # these three: checked by `gateway.request.tools_history`
    tool_call_id: Any = None
    name: str | None = None
    refusal: str | None = None  # of an assistant, instead of content
    reasoning_content: str | None = None  # what an assistant thought before its content; and vLLM's newer name of it:
    reasoning: str | None = None
    prefix: bool | None = None  # Mistral's: the answer goes on from this message, the last one


Messages = Annotated[list[Message], _FIRST_ERROR]


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class TemplateFields(Body):
    """How a conversation becomes a prompt: what chats and /tokenize share."""

    MAX_LENGTHS: ClassVar = {"messages": MAX_MESSAGES, "chat_template_kwargs": 64}

    add_special_tokens: bool | None = None  # a BOS, where the chat template makes none; false unless said
    add_generation_prompt: bool | None = None  # true unless said
    continue_final_message: bool | None = None  # the last message, an assistant's, is open-ended
    chat_template_kwargs: dict[str, Any] | None = None  # variables that the chat template reads
    reasoning_effort: Effort | None = None  # the same, to templates that read it; `none` is `enable_thinking: false`


class AnswerFields(Body):
    """What an answer is held to, in everybody's words; checked by `gateway.request.structured_output`."""

    response_format: Any = None  # OpenAI's
    structured_outputs: Any = None  # vLLM's, and its older names:
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    json_schema: Any = None  # SGLang's, llama.cpp's
    regex: Any = None  # SGLang's
    ebnf: Any = None  # SGLang's
    grammar: Any = None  # llama.cpp's rules, or TGI's `{"type": …, "value": …}`


class ChatCompletionRequest(SamplingFields, TemplateFields, AnswerFields):
    """Body of POST /v1/chat/completions."""

    MAX_LENGTHS: ClassVar = SamplingFields.MAX_LENGTHS | TemplateFields.MAX_LENGTHS

    messages: Messages
    service_tier: Any = None  # OpenAI's; there is one tier, which the answer names as OpenAI's does
    safe_prompt: bool | None = None  # Mistral's: a fixed system prompt before the conversation
    echo: bool | None = None  # the answer begins with the message that it continues
    include_reasoning: bool | None = None  # vLLM's: true unless said
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    tools: Any = None  # this and `tool_choice`: checked by `gateway.request.tools`
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(SamplingFields, AnswerFields):
    """Body of POST /v1/completions."""

    prompt: Prompt = None  # string, token ids, or a list of strings and lists of token ids
    logprobs: Integer | None = None
    add_special_tokens: bool | None = None  # true unless said; a prompt that begins with a BOS gets no second one
    echo: bool | None = None  # the answer begins with the prompt; with logprobs, those of its tokens too


OutputDtype = Literal["float", "int8", "uint8", "binary", "ubinary"]


class EmbeddingRequest(Body):
    """Body of POST /v1/embeddings, with Mistral's names where they differ."""

    model: str | None = None
    input: Prompt = None  # string, token ids, or a list of strings and lists of token ids
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Integer | None = None
    output_dimension: Integer | None = None  # Mistral's name
    output_dtype: OutputDtype | None = None  # Mistral's, as Cohere and vLLM make them
    normalize: bool | None = None  # to length 1: true unless said
    priority: Integer | None = None  # as of chats


_BodyT = TypeVar("_BodyT", bound=Body)


def parse_body(cls: type[_BodyT], document: dict[str, Any], num_bytes: int) -> _BodyT:
    """A typed body, sent as so many bytes. Raises InvalidRequest, which names the first wrong field by its path."""
    refuse_foreign(document, cls.model_fields)
    for name, bound in cls.MAX_LENGTHS.items():
        check_length(name, document.get(name), bound)
    try:
        body = cls.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        path = field_path(first["loc"])
        message = "field required" if first["type"] == "missing" else _plain(str(first["msg"]))
        raise InvalidRequest(f"{path}: {message}", param=path) from None
    body._num_bytes = num_bytes
    return body


def has_forms(body: Body) -> bool:
    """Whether it has schemas or rules: to check them takes longer than their size says."""
    return any(getattr(body, name, None) is not None for name in (*AnswerFields.model_fields, "tools"))


def check_length(path: str, value: Any, bound: int) -> None:
    """Raises InvalidRequest for a list or an object of more entries."""
    if isinstance(value, list | dict) and len(value) > bound:
        raise InvalidRequest(f"{path}: at most {bound} entries, got {len(value)}", param=path)


def text_of(message: Message, path: str) -> str:
    """A message's content as one string. Raises InvalidRequest with the part's path."""
    if message.role == "function":
        raise InvalidRequest(f"{path}.role: {message.role!r} messages are not supported", param=f"{path}.role")
    content = message.content
    if content is None and message.role == "assistant":
        return message.refusal or ""
    if isinstance(content, str):
        return content
    where = f"{path}.content"
    if not isinstance(content, list):
        raise InvalidRequest(f"{where}: expected a string or a list of text parts", param=where)
    texts = []
    for i, part in enumerate(content):
        here = f"{where}[{i}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise InvalidRequest(f"{here}: expected an object with a type", param=here)
        kind = part["type"]
        if kind != "text" and (kind, message.role) != ("refusal", "assistant"):
            raise InvalidRequest(f"{here}.type: {kind!r} is not supported, only 'text'", param=f"{here}.type")
        if not isinstance(part.get(kind), str):
            raise InvalidRequest(f"{here}.{kind}: expected a string", param=f"{here}.{kind}")
        texts.append(part[kind])
    return "".join(texts)


def field_path(location: tuple[int | str, ...]) -> str:
    """('messages', 0, 'role') is `messages[0].role`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("function-before"):
            path += f".{part}" if path else part
    return path


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should be", "expected")
