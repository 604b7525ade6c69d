"""One validator for both doors: a parsed body becomes a Generation, or an InvalidRequest that names the field.

Knows defaults, seeds, deadlines and the context's length; knows nothing of HTTP, gRPC or streams.
"""

from __future__ import annotations

import secrets
import time
import uuid
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cluster.config import GatewayConfig
from cluster.deadline import Deadline
from cluster.errors import ContextTooLong, InvalidRequest
from cluster.messages import (
    Answer,
    Grammar,
    HarmonyGrammar,
    HarmonyTokens,
    ModelCard,
    ReasonedGrammar,
    Request,
    SamplingParams,
    TextGrammar,
    ToolCallGrammar,
)
from gateway.admission.caller import current_caller
from gateway.request.continuation import begin_of_answer, read_rendering
from gateway.request.prompts import PromptReader, TokenIds
from gateway.request.protocol import ChatCompletionRequest, CompletionRequest, SamplingFields, text_of
from gateway.request.sampling_options import MAX_TOP_LOGPROBS, between, sampling_options
from gateway.request.structured_output import read_answer, refuse_beside_calls
from gateway.request.tools import answer_grammar, read_tools
from gateway.request.truncation import cut_ids, newest_turns, read_cut
from gateway.text.chat_template import Rendering
from gateway.text.reasoning import Reasoning, begun_by, continued
from gateway.text.tokenizer import Tokenizer

MAX_PROMPT_SCORES = 2**20  # of one request: about 120 MB in a gateway


@dataclass(frozen=True)
class Generation:
    """One client request: what to ask the coordinators for, and how the answer is shaped."""

    id: str
    created: int  # Unix time in seconds
    card: ModelCard
    requests: tuple[Request, ...]  # one per choice; choice = position here
    num_prompt_tokens: int  # summed over prompts
    stop: tuple[str, ...]
    min_tokens: int
    continues_prompt: bool  # the text goes on from the prompt's, so its first space counts
    deadline: Deadline
    echo: tuple[str, ...] = ()  # the prompt's text of each choice, when it is to be echoed
    begin: str = ""  # what each choice repeats of the message that it continues
    reasoning: Reasoning | None = None  # what a choice may begin with; None: the model does not reason apart
    tells_reasoning: bool = True
    tells_prompt_logprobs: bool = False  # of the prompt, in a field of their own
    is_prompt_only: bool = False  # the one token that a coordinator generates at least is dropped
    system_fingerprint: str = ""  # of what will answer


@dataclass(frozen=True)
class _Asked:
    """Where chat and completions differ."""

    id: str
    prompts: list[TokenIds]
    prompt_field: str
    max_tokens: int | None
    max_tokens_field: str
    logprobs: int | None
    echo: tuple[str, ...] = ()  # of each prompt
    prompt_logprobs: int | None = None
    continues: bool = False
    begin: str = ""
    grammar: Grammar | None = None
    reasoning: Reasoning | None = None
    tells_reasoning: bool = True


class Validator:
    """Makes Generations for one model."""

    def __init__(self, card: ModelCard, tokenizer: Tokenizer, config: GatewayConfig) -> None:
        self._card = card
        self._config = config
        self._reader = PromptReader(card, tokenizer)
        self._tokenizer = tokenizer

    def chat(
        self, body: ChatCompletionRequest, timeout_s: float | None = None, *, drops_oldest: bool = False
    ) -> Generation:
        """Raises InvalidRequest. With `drops_oldest` a conversation that is too long loses its oldest turns."""
        _check_stream(body)
        options = sampling_options(body, self._card, self._config.max_choices)
        if body.top_logprobs is not None:
            if not body.logprobs:
                raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
            between("top_logprobs", body.top_logprobs, 0, MAX_TOP_LOGPROBS)
        max_tokens, max_tokens_field = body.max_tokens, "max_tokens"
        if body.max_completion_tokens is not None:
            max_tokens, max_tokens_field = body.max_completion_tokens, "max_completion_tokens"
        tools = read_tools(body.tools)
        answer = read_answer(body)
        held_to = answer_grammar(tools, body.tool_choice, body.parallel_tool_calls, answer, self._tokenizer.tool_tokens)
        grammar: Grammar | None = held_to
        if isinstance(held_to, ToolCallGrammar) and held_to.required:
            refuse_beside_calls(body)
        how = read_rendering(body, body.messages, continues_assistants=self._tokenizer.continues_assistants)
        encode = partial(
            self._reader.chat,
            how=how,
            safe_prompt=bool(body.safe_prompt),
            tools=tools,
            add_special_tokens=bool(body.add_special_tokens),
        )
        if drops_oldest:
            room = self._card.max_model_len - (max_tokens or 1)
            prompt = newest_turns(body.messages, room, encode, self._reader.count)
        else:
            prompt = encode(body.messages)
        cut = read_cut(body, self._card.max_model_len, max_tokens)
        if cut is not None:
            prompt = cut(prompt)
        reasoning = self._reasoning(body, prompt, how)
        if reasoning is not None and reasoning.stage != "is over" and held_to is not None:
            grammar = _after_reasoning(held_to, reasoning)
        asked = _Asked(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            prompts=[prompt],
            prompt_field="messages",
            max_tokens=max_tokens,
            max_tokens_field=max_tokens_field,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=grammar,
            prompt_logprobs=body.prompt_logprobs,
            continues=how.continues or isinstance(answer, TextGrammar),  # in which a space counts as well
            begin=begin_of_answer(body, how),
            reasoning=reasoning,
            tells_reasoning=body.include_reasoning is not False,
        )
        return self._generation(body, asked, options, timeout_s)

    def _reasoning(self, body: ChatCompletionRequest, prompt: TokenIds, how: Rendering) -> Reasoning | None:
        """What the answer begins with."""
        format_ = self._tokenizer.reasoning
        if format_ is None:
            return None
        if how.continues:
            return continued(text_of(body.messages[-1], "messages[-1]"), format_)
        return begun_by(prompt, format_, self._tokenizer)

    def completion(self, body: CompletionRequest, timeout_s: float | None = None) -> Generation:
        """Raises InvalidRequest."""
        _check_stream(body)
        options = sampling_options(body, self._card, self._config.max_choices)
        if body.logprobs is not None:
            between("logprobs", body.logprobs, 0, MAX_TOP_LOGPROBS)
        prompt = body.prompt
        cut = read_cut(body, self._card.max_model_len, body.max_tokens)
        if cut is not None:
            prompt = cut_ids(prompt, cut)
        prompts = self._reader.prompts(
            prompt,
            max_prompts=self._config.max_choices // (body.n or 1),
            add_special_tokens=body.add_special_tokens is not False,
        )
        kept = prompts if cut is None else list(map(cut, prompts))
        asked = _Asked(
            id=f"cmpl-{uuid.uuid4().hex}",
            prompts=kept,
            prompt_field="prompt",
            max_tokens=body.max_tokens,
            max_tokens_field="max_tokens",
            logprobs=body.logprobs,
            echo=self._reader.texts(prompt, prompts, kept) if body.echo else (),
            prompt_logprobs=body.prompt_logprobs,
            continues=True,
            grammar=read_answer(body),
        )
        return self._generation(body, asked, options, timeout_s)

    def _generation(
        self, body: SamplingFields, asked: _Asked, options: dict[str, Any], timeout_s: float | None
    ) -> Generation:
        seed = body.random_seed if body.seed is None else body.seed
        if seed is None:
            seed = secrets.randbits(63)
        longest = self._config.request_timeout_s
        deadline = Deadline.after(longest if timeout_s is None else min(timeout_s, longest))
        scores = asked.logprobs if asked.echo and body.prompt_logprobs is None else body.prompt_logprobs
        if scores is not None:
            field = "prompt_logprobs" if body.prompt_logprobs is not None else "logprobs"
            _check_prompt_scores(field, sum(map(len, asked.prompts)) * (1 + scores) * (body.n or 1))
        requests = []
        for i, prompt in enumerate(asked.prompts):
            max_tokens = self._max_tokens(len(prompt), asked)
            if options["min_tokens"] > max_tokens:
                raise InvalidRequest(
                    f"min_tokens: must not be over max_tokens ({max_tokens}), got {options['min_tokens']}", "min_tokens"
                )
            first = SamplingParams(
                max_tokens=max(1, max_tokens),
                logprobs=asked.logprobs,
                prompt_logprobs=scores,
                **options,
            )
            others = replace(first, prompt_logprobs=None)  # they get the scores of the first, and share its prompt
            requests += [
                Request(
                    # A seeded prompt gets the same answer alone and in a list: each counts its choices from 0.
                    request_id=asked.id if len(asked.prompts) == 1 else f"{asked.id}-{i}",
                    prompt_token_ids=prompt,
                    sampling=others if choice else first,
                    seed=seed & (2**63 - 1),
                    choice_index=choice,
                    deadline=deadline,
                    cache_salt=current_caller().id,
                    priority=body.priority or 0,
                    num_siblings=len(asked.prompts) * (body.n or 1) - 1,
                    grammar=asked.grammar,
                )
                for choice in range(body.n or 1)
            ]
        return Generation(
            id=asked.id,
            created=int(time.time()),
            card=self._card,
            requests=tuple(requests),
            num_prompt_tokens=sum(len(prompt) for prompt in asked.prompts),
            stop=tuple(text for text in body.stop or () if text),  # an empty one asks for nothing
            min_tokens=options["min_tokens"],
            continues_prompt=asked.continues,
            begin=asked.begin,
            reasoning=asked.reasoning,
            tells_reasoning=asked.tells_reasoning,
            deadline=deadline,
            echo=tuple(text for text in asked.echo for _ in range(body.n or 1)),
            tells_prompt_logprobs=asked.prompt_logprobs is not None,
            is_prompt_only=asked.max_tokens == 0,
        )

    def _max_tokens(self, num_prompt: int, asked: _Asked) -> int:
        """What is asked for, or what is left of the context."""
        context, max_tokens = self._card.max_model_len, asked.max_tokens
        least = 0 if asked.echo or asked.prompt_logprobs is not None else 1
        if max_tokens is not None and max_tokens < least:
            raise InvalidRequest(
                f"{asked.max_tokens_field}: must be at least {least}, got {max_tokens}", param=asked.max_tokens_field
            )
        if num_prompt > context or (num_prompt == context and max_tokens != 0):
            raise ContextTooLong(
                f"{asked.prompt_field}: the prompt has {num_prompt} tokens, which leaves no room in the model's "
                f"context of {context}",
                param=asked.prompt_field,
            )
        if max_tokens is None:
            return context - num_prompt
        if num_prompt + max_tokens > context:
            raise ContextTooLong(
                f"{asked.max_tokens_field}: {num_prompt} prompt tokens and {max_tokens} to generate exceed the "
                f"model's context of {context}",
                param=asked.max_tokens_field,
            )
        return max_tokens


def _after_reasoning(held_to: Answer | ToolCallGrammar, reasoning: Reasoning) -> Grammar:
    if isinstance(reasoning.tags, HarmonyTokens):
        return HarmonyGrammar(reasoning.tags, held_to)
    return ReasonedGrammar(reasoning.tags, has_begun=reasoning.stage == "has begun", answer=held_to)


def _check_prompt_scores(field: str, number: int) -> None:
    """Raises InvalidRequest where the scores of all prompts and choices would not fit a gateway's memory."""
    if number > MAX_PROMPT_SCORES:
        raise InvalidRequest(
            f"{field}: at most {MAX_PROMPT_SCORES} scores of prompts (tokens × candidates × choices), not {number}",
            param=field,
        )


def _check_stream(body: SamplingFields) -> None:
    """Raises InvalidRequest for what only a stream has, or only a whole answer."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options: only with stream", param="stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("prompt_logprobs: not with stream", param="prompt_logprobs")
