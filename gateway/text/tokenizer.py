"""Text to token ids and back, for one model. Knows the two checkpoint layouts; knows nothing of requests or streams.

The chat template comes from the checkpoint, never from a client, and is rendered in transformers' sandbox. What callers
say never becomes a control token in a chat; in a raw prompt it does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from cluster.checkpoint.vocabulary import byte_level_alphabet, is_byte_level, piece_bytes, tokenizer_file
from cluster.errors import InvalidRequest
from cluster.messages import AUTO, HarmonyTokens, Parsers, ToolTokens
from gateway.json_bounds import check_bounds
from gateway.text.chat_template import ANSWER, REFUSALS, ChatTemplate, Rendering, refusal
from gateway.text.control_tokens import ControlTokens
from gateway.text.reasoning import ReasoningFormat, reasoning_format
from gateway.text.tool_format import ARGS, CALL_ID, TOOL_CALLS, tool_tokens
from gateway.text.unlocked_tokenizer import UnlockedTokenizer

ChatMessage = dict[str, Any]  # role, content; tool_calls, tool_call_id and name as OpenAI has them

_USER, _ASSISTANT = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
_SAMPLES: list[list[ChatMessage]] = [  # harmless chats of every shape; some templates refuse some
    [_USER],
    [_USER, _ASSISTANT, _USER],
    [{"role": "system", "content": "Be brief."}, _USER, _ASSISTANT, _USER],
    [
        _USER,
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "f", "content": "{}"},
        _ASSISTANT,
        _USER,
    ],
]


class Tokenizer(Protocol):
    """What the gateway asks of a tokenizer. Every method is safe to call from several threads."""

    vocab_size: int  # ids that have a text; the model's own vocabulary may be padded beyond it
    special_ids: frozenset[int]  # never shown as text
    max_token_chars: int  # no token stands for more characters, so a longer text needs more tokens
    begin_ids: tuple[int, ...]  # what the checkpoint puts before a raw prompt: a BOS, for Mixtral

    continues_assistants: bool  # whether a conversation that ends with an assistant's message can only be continued
    renders_tools: bool  # whether `encode_chat` takes tools, calls and their results
    tool_tokens: ToolTokens  # how calls are spelled, and with which special tokens
    reasoning: ReasoningFormat | None  # how the model reasons before it answers; None: it does not

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a raw prompt, with what the checkpoint puts around one, unless it begins with that itself."""

    def encode_chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]] = (), how: Rendering = ANSWER
    ) -> tuple[int, ...]:
        """Token ids of a conversation, up to where the assistant answers, or goes on. Raises InvalidRequest.

        Control tokens are those that the chat format puts there: no text of a message or tool becomes one.
        """

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of these ids alone; bytes that are no character become U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for."""

    def piece(self, token_id: int) -> str:
        """The vocabulary's entry: `▁the`, `Ġthe`, `<0x0A>`. Empty for an id that has none."""


class HuggingFaceTokenizer:
    """`tokenizer.json` and `tokenizer_config.json`, read by transformers without torch."""

    def __init__(self, directory: Path, parsers: Parsers = AUTO) -> None:
        from transformers import PreTrainedTokenizerFast  # slow to import

        self._hf: Any = PreTrainedTokenizerFast.from_pretrained(str(directory))
        self._rust: Any = UnlockedTokenizer(self._hf.backend_tokenizer)
        self._rust.no_padding()
        self._rust.no_truncation()
        vocabulary = self._rust.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.max_token_chars = max(map(len, vocabulary))
        around = self._rust.encode("a", add_special_tokens=True)
        self.begin_ids = tuple(around.ids[: (*around.special_tokens_mask, 0).index(0)])
        added = self._hf.added_tokens_decoder
        self.added_tokens: dict[int, str] = {i: token.content for i, token in added.items()}
        self.special_ids = frozenset([i for i, token in added.items() if token.special] + self._hf.all_special_ids)
        self.continues_assistants = False
        template = str(self._hf.chat_template)
        self.renders_tools = "tools" in template and "tool_calls" in template
        special = {token: i for token, i in vocabulary.items() if i in self.special_ids}
        self.reasoning = reasoning_format(parsers, template, special)
        if self.reasoning is not None and isinstance(self.reasoning.tags, HarmonyTokens):
            self.tool_tokens = ToolTokens(format="openai")  # calls are messages as well
        else:
            self.tool_tokens = tool_tokens(parsers.tools, template, special, renders_tools=self.renders_tools)
        self._byte_of = byte_level_alphabet() if is_byte_level(self._rust) else None
        self._control_tokens = ControlTokens(self._rust)
        self._template = ChatTemplate(self._hf, self._control_tokens.texts)
        self._can_trace = bool(self._hf.chat_template) and all(
            self._traces(chat, tools) for chat in _SAMPLES for tools in ((), (_TOOL,))
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        ids = tuple(self._rust.encode(text, add_special_tokens=add_special_tokens).ids)
        num_begin = len(self.begin_ids)
        is_doubled = add_special_tokens and ids[num_begin : 2 * num_begin] == self.begin_ids
        return ids[num_begin:] if is_doubled else ids

    def encode_chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]] = (), how: Rendering = ANSWER
    ) -> tuple[int, ...]:
        if not self._hf.chat_template:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        for name in how.variables:
            if name in self._template.reserved:
                path = f"chat_template_kwargs.{name}"
                raise InvalidRequest(f"{path}: is not the client's to set", param=path)
        chat, definitions = _with_objects(messages), list(tools) or None
        try:
            text, own = self._render(chat, definitions, how)
        except REFUSALS as error:
            message = f"the model's chat template refuses these messages: {refusal(error)}"
            raise InvalidRequest(message, "messages") from error
        if self._can_trace and own is not None:
            return tuple(self._control_tokens.encode(text, own))
        self._control_tokens.refuse([{**message, "role": ""} for message in chat], "messages")
        self._control_tokens.refuse(definitions, "tools")
        self._control_tokens.refuse(dict(how.variables), "chat_template_kwargs")
        return tuple(self._rust.encode(text, add_special_tokens=False).ids)

    def _render(
        self, chat: list[ChatMessage], tools: list[Any] | None, how: Rendering
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """As the template does. Messages of one role in a row that it refuses are joined, as mistral-common does."""
        try:
            return self._render_as_sent(chat, tools, how)
        except REFUSALS:
            joined = _joined(chat)
            if len(joined) == len(chat):
                raise
        return self._render_as_sent(joined, tools, how)

    def _render_as_sent(
        self, chat: list[ChatMessage], tools: list[Any] | None, how: Rendering
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """Many templates write a system message into the first or the last user's, and lose it without one.

        There an empty message of a user is put after it, as mistral-common does.
        """
        if _has_user(chat):
            return self._template.render(chat, tools, how)
        try:
            text, own = self._template.render(chat, tools, how)
        except REFUSALS:
            return self._template.render(_with_user(chat), tools, how)
        said = [message["content"].strip() for message in chat if message["role"] == "system"]
        said += [tool["function"]["name"] for tool in tools or ()]
        return (text, own) if all(one in text for one in said) else self._template.render(_with_user(chat), tools, how)

    def check_templates(self) -> None:
        """Raises jinja2's TemplateSyntaxError where the checkpoint's own does not compile."""
        self._template.check()

    def _traces(self, chat: Sequence[ChatMessage], tools: Sequence[dict[str, Any]]) -> bool:
        """Whether the template's own control tokens are found in a harmless chat."""
        try:
            text, own = self._template.render(_with_objects(chat), list(tools) or None)
        except REFUSALS:
            return True  # such chats are refused
        expected = self._rust.encode(text, add_special_tokens=False).ids
        return own is not None and self._control_tokens.encode(text, own) == expected

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._rust.decode(list(token_ids), skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        token = self._rust.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_of is not None and token_id not in self.special_ids:
            return bytes(self._byte_of.get(char, 0x3F) for char in token)
        return piece_bytes(token)

    def piece(self, token_id: int) -> str:
        return self._rust.id_to_token(token_id) or ""


class MistralTokenizer:
    """`tokenizer.model*` or `tekken.json`, read by mistral-common; its own code is the chat template.

    Nothing begins an assistant's turn in it: there is no generation prompt that could be left out.
    """

    def __init__(self, directory: Path, parsers: Parsers = AUTO) -> None:
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy  # slow to import

        from gateway.text.mistral_reader import mistral_reader

        self._reader: Any = mistral_reader(tokenizer_file(directory))
        self._raw: Any = self._reader.instruct_tokenizer.tokenizer
        self._ignore = SpecialTokenPolicy.IGNORE
        self.vocab_size: int = self._raw.n_words
        self.max_token_chars = max(map(len, self._raw.vocab()))
        self.begin_ids: tuple[int, ...] = (int(self._raw.bos_id),)
        self._bos = str(self._raw.id_to_piece(self._raw.bos_id))
        self.special_ids = frozenset(int(i) for i in self._raw.special_ids)
        version = int(re.match(r"v(\d+)", str(self._raw.version.value))[1])  # type: ignore[index]
        self.continues_assistants = True
        self.renders_tools = version > 1
        special = {self._raw.id_to_piece(i): i for i in self.special_ids}
        self.tool_tokens = ToolTokens(
            calls=special.get(TOOL_CALLS),
            args=special.get(ARGS) if version >= 11 else None,
            call_id=special.get(CALL_ID) if 11 <= version < 13 else None,
        )
        self.reasoning = reasoning_format(parsers, "".join(special), special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        bos = add_special_tokens or text.startswith(self._bos)
        return tuple(self._raw.encode(text.removeprefix(self._bos), bos=bos, eos=False))

    def encode_chat(
        self, messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]] = (), how: Rendering = ANSWER
    ) -> tuple[int, ...]:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        if how.variables:
            path = "chat_template_kwargs"
            raise InvalidRequest(f"{path}: this model's chat format is no template, and reads no variables", param=path)
        chat = list(map(_for_mistral, messages))
        for message in chat:
            message.pop("thinking", None)
        if self.reasoning is None:
            for message in chat:
                message.pop("reasoning_content", None)  # before version 13 there is none
        if tools and not _has_user(chat):
            chat = _with_user(chat)  # which the tools stand beside
        try:
            continues = how.continues and bool(messages[-1]["content"])
            if how.continues and not continues:
                chat.pop()  # mistral-common has no message without a text
            request = ChatCompletionRequest.from_openai(
                chat, tools=list(tools) or None, continue_final_message=continues
            )
            return tuple(self._reader.encode_chat_completion(request).tokens)
        except (MistralCommonException, ValueError) as error:  # the latter is pydantic's, say, and of our insides
            said = error.message if isinstance(error, MistralCommonException) else type(error).__name__
            raise InvalidRequest(f"the model's chat format refuses these messages: {said}", "messages") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._raw.decode(list(token_ids), special_token_policy=self._ignore))

    def token_bytes(self, token_id: int) -> bytes:
        if token_id >= self.vocab_size:
            return b""
        if hasattr(self._raw, "id_to_byte_piece") and token_id not in self.special_ids:
            return bytes(self._raw.id_to_byte_piece(token_id))
        return piece_bytes(self._raw.id_to_piece(token_id))

    def piece(self, token_id: int) -> str:
        return str(self._raw.id_to_piece(token_id)) if token_id < self.vocab_size else ""


def _with_objects(chat: Sequence[ChatMessage]) -> list[ChatMessage]:
    """The same with every call's arguments parsed, as Hugging Face's templates expect them."""
    return [
        {
            **message,
            "tool_calls": [
                {**call, "function": {**call["function"], "arguments": parsed_json(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ],
        }
        if "tool_calls" in message
        else dict(message)
        for message in chat
    ]


def _joined(chat: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Messages of one role in a row are one, texts two lines apart and calls one after the other; no tools' results."""
    joined: list[ChatMessage] = []
    for message in chat:
        if not joined or message["role"] != joined[-1]["role"] or message["role"] == "tool":
            joined.append(message)
            continue
        both = (joined[-1], message)
        one = {**joined[-1], "content": "\n\n".join(said["content"] for said in both if said["content"])}
        if calls := [call for said in both for call in said.get("tool_calls", ())]:
            one["tool_calls"] = calls
        joined[-1] = one
    return joined


def _has_user(chat: Sequence[ChatMessage]) -> bool:
    return any(message["role"] == "user" for message in chat)


def _with_user(chat: Sequence[ChatMessage]) -> list[ChatMessage]:
    """An empty message of a user after what the system says."""
    at = next((i for i, message in enumerate(chat) if message["role"] != "system"), len(chat))
    return [*chat[:at], {"role": "user", "content": ""}, *chat[at:]]


def _for_mistral(message: ChatMessage) -> ChatMessage:
    """As mistral-common takes it. Raises InvalidRequest."""
    if message["role"] == "tool":
        _check_result(message["content"])
    if "tool_calls" in message:
        return {**message, "tool_calls": [_with_readable_arguments(call) for call in message["tool_calls"]]}
    if message["role"] == "assistant" and not message["content"]:
        return {**message, "content": " "}  # it refuses an empty answer, and strips this one but in version 1
    return dict(message)


def _with_readable_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """What is no JSON to Python, a number of thousands of digits for one, is a string."""
    arguments = call["function"]["arguments"]
    if parsed_json(arguments) is not arguments:
        return call
    return {**call, "function": {**call["function"], "arguments": json.dumps(arguments)}}


def _check_result(content: str) -> None:
    """Mistral's tokenizers parse a tool's result that may be JSON, whatever it holds. Raises InvalidRequest."""
    if content.lstrip()[:1] in ("[", "{"):
        try:
            check_bounds(content.encode(), "it")
        except InvalidRequest as error:
            raise InvalidRequest(f"messages: a tool's content: {error.message}", param="messages") from None
    if is_json_of_no_text(content):
        raise InvalidRequest("messages: a tool's content is JSON with a lone surrogate", param="messages")


def parsed_json(text: str) -> Any:
    """The JSON, or the string that it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def is_json_of_no_text(text: str) -> bool:
    """Whether JSON spells a lone surrogate, which no tokenizer takes."""
    if "\\ud" not in text.lower():
        return False
    try:
        json.dumps(parsed_json(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
