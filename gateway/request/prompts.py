"""A client's messages or prompts become token ids. Knows shapes and lengths; knows nothing of sampling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cluster.errors import ContextTooLong, InvalidRequest
from cluster.messages import ModelCard
from gateway.request.protocol import Message, whole_numbers
from gateway.request.sampling_options import check_token_id
from gateway.request.tools import Tool
from gateway.request.tools_history import plain_rendering, read_messages, speaks_of_tools
from gateway.text.chat_template import ANSWER, Rendering
from gateway.text.detokenizer import detokenize
from gateway.text.tokenizer import ChatMessage, Tokenizer

TokenIds = tuple[int, ...]
SAFE_PROMPT = (  # as Mistral's documentation of `safe_prompt` has it
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. Avoid harmful, unethical, "
    "prejudiced, or negative content. Ensure replies promote fairness and positivity."
)


class PromptReader:
    """Reads the prompts of one model. Everything raises InvalidRequest with the path of what is wrong."""

    def __init__(self, card: ModelCard, tokenizer: Tokenizer) -> None:
        self._card = card
        self._tokenizer = tokenizer

    def chat(
        self,
        messages: Sequence[Message],
        *,
        safe_prompt: bool = False,
        tools: Sequence[Tool] = (),
        add_special_tokens: bool = False,
        how: Rendering = ANSWER,
    ) -> TokenIds:
        """A conversation, up to where the assistant answers, or goes on; after Mistral's guardrails with `safe_prompt`.

        `add_special_tokens` puts before it what raw prompts begin with, unless the template has.
        """
        if not messages:
            raise InvalidRequest("messages: must not be empty", param="messages")
        check_count(len(messages), self._card, "messages", "messages")
        chat = read_messages(messages)
        if safe_prompt:
            chat = _guarded(chat)
        if not self._tokenizer.renders_tools and (tools or speaks_of_tools(chat)):
            chat, tools = plain_rendering(chat, tools), ()
        said = (message[name] for message in chat for name in ("content", "reasoning_content") if name in message)
        self._check_length(sum(map(len, said)), "messages")
        self._check_length(len(json.dumps(how.variables)) if how.variables else 0, "chat_template_kwargs")
        token_ids = self._tokenizer.encode_chat(chat, [tool.definition for tool in tools], how)
        if not token_ids:
            raise InvalidRequest("messages: the chat template makes an empty prompt of them", param="messages")
        begin = self._tokenizer.begin_ids
        if add_special_tokens and token_ids[: len(begin)] != begin:
            token_ids = begin + token_ids
        self._check_embedded(token_ids, "messages")
        return token_ids

    def prompts(
        self,
        prompt: Any,
        max_prompts: int,
        field: str = "prompt",
        *,
        max_tokens: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[TokenIds]:
        """A string, token ids, or a list of strings and token-id lists; `field` is what the body calls it.

        `max_tokens`: of a whole list. What is past it is not tokenized.
        """
        if prompt is None:
            raise InvalidRequest(f"{field}: field required", param=field)
        if isinstance(prompt, str):
            return [self.text(prompt, field, add_special_tokens=add_special_tokens)]
        expected = f"{field}: expected a string, token ids, or a list of strings and token-id lists"
        if not isinstance(prompt, list):
            raise InvalidRequest(expected, param=field)
        if not prompt:
            raise InvalidRequest(f"{field}: must not be empty", param=field)
        prompt = whole_numbers(prompt)
        if set(map(type, prompt)) == {int}:
            return [self._token_ids(prompt, field)]
        if len(prompt) > max_prompts:
            raise InvalidRequest(f"{field}: at most {max_prompts} in this request, got {len(prompt)}", field)
        if not all(isinstance(item, str | list) for item in prompt):
            raise InvalidRequest(expected, param=field)
        prompts: list[TokenIds] = []
        num_tokens = 0
        for i, item in enumerate(prompt):
            path = f"{field}[{i}]"
            if isinstance(item, str):
                prompts.append(self.text(item, path, add_special_tokens=add_special_tokens))
            else:
                prompts.append(self._token_ids(whole_numbers(item), path))
            num_tokens += len(prompts[-1])
            if max_tokens is not None and num_tokens > max_tokens:
                raise InvalidRequest(f"{field}: over {max_tokens} tokens in all, the most in one request", field)
        return prompts

    def texts(self, prompt: Any, whole: Sequence[TokenIds], kept: Sequence[TokenIds]) -> tuple[str, ...]:
        """The text of what is `kept` of each prompt: as it was sent, or that of its ids without special ones."""
        own = prompt if isinstance(prompt, list) and isinstance(prompt[0], str | list) else [prompt]
        return tuple(map(self._text_of, own, whole, kept))

    def _text_of(self, sent: str | list[int], whole: TokenIds, kept: TokenIds) -> str:
        if not isinstance(sent, str):
            return detokenize(self._tokenizer, kept)
        if kept == whole:
            return sent
        begin = self._tokenizer.begin_ids
        is_added = kept[: len(begin)] == begin and not sent.startswith(self._tokenizer.decode(begin))
        return self._tokenizer.decode(kept[len(begin) :] if is_added else kept)

    def text(self, text: str, path: str, *, add_special_tokens: bool = True) -> TokenIds:
        """A raw prompt, as it is; `path` is its field."""
        self._check_length(len(text), path)
        token_ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if not token_ids:
            raise InvalidRequest(f"{path}: must not be empty", param=path)
        self._check_embedded(token_ids, path)
        return token_ids

    def token_ids(self, token_ids: list[Any], path: str) -> TokenIds:
        """The same, if there are no more of them than the context has room for, and all are in the vocabulary."""
        check_count(len(token_ids), self._card, path, "tokens")
        if token_ids and set(map(type, token_ids)) != {int}:
            i = next(i for i, token_id in enumerate(token_ids) if type(token_id) is not int)
            raise InvalidRequest(f"{path}[{i}]: expected a token id", param=f"{path}[{i}]")
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._card.vocab_size:
            for i, token_id in enumerate(token_ids):
                check_token_id(token_id, self._card, f"{path}[{i}]")
        return tuple(token_ids)

    def _check_embedded(self, token_ids: TokenIds, path: str) -> None:
        """Refuses a token that the tokenizer has and the model has not, which would fail a step of the engine."""
        rows = self._card.vocab_size
        if self._tokenizer.vocab_size > rows and max(token_ids) >= rows:
            token_id = next(token_id for token_id in token_ids if token_id >= rows)
            raise InvalidRequest(
                f"{path}: {self._tokenizer.decode([token_id])!r} is token {token_id} to the tokenizer, and the model "
                f"has no embedding for it: its vocabulary is of {rows}",
                param=path,
            )

    def _check_length(self, num_chars: int, path: str) -> None:
        """Refuses a text that is too long whatever its tokens are, before it is tokenized."""
        least = num_chars // self._tokenizer.max_token_chars
        if least > self._card.max_model_len:
            raise ContextTooLong(
                f"{path}: {num_chars} characters are at least {least} tokens, over the model's context of "
                f"{self._card.max_model_len}",
                param=path,
            )

    def count(self, message: Message) -> int:
        """How many tokens a message's text is; not tokenized, and one too many, if it cannot fit the context."""
        text = str(message.content)
        if len(text) // self._tokenizer.max_token_chars > self._card.max_model_len:
            return self._card.max_model_len + 1
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def _token_ids(self, token_ids: list[Any], path: str) -> TokenIds:
        if not token_ids:
            raise InvalidRequest(f"{path}: must not be empty", param=path)
        return self.token_ids(token_ids, path)


def check_count(count: int, card: ModelCard, path: str, things: str) -> None:
    """Refuses more things than fit the context, each being a token at least. Raises ContextTooLong."""
    if count > card.max_model_len:
        raise ContextTooLong(
            f"{path}: {count} {things} are over the model's context of {card.max_model_len} tokens", param=path
        )


def _guarded(chat: list[ChatMessage]) -> list[ChatMessage]:
    """The same with SAFE_PROMPT at the start of its system message."""
    if chat[0]["role"] != "system":
        return [{"role": "system", "content": SAFE_PROMPT}, *chat]
    return [{"role": "system", "content": f"{SAFE_PROMPT}\n\n{chat[0]['content']}"}, *chat[1:]]
