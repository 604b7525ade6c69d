"""Where a model's reasoning is: what it writes around it, and whether a prompt has begun or ended it already.

Knows tags and prompts; knows no request. `<think>` may be written by the model (Qwen3) or come last in the prompt
(DeepSeek-R1), and a prompt that ends with `</think>` asks for none (Qwen3 with `enable_thinking: false`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import takewhile
from typing import Literal, Protocol

from cluster.errors import CheckpointError
from cluster.messages import HarmonyTokens, Parsers, ReasoningTags

Stage = Literal["may come", "has begun", "is over"]
THINK = ("<think>", "</think>")
MISTRAL_THINK = ("[THINK]", "[/THINK]")
_HARMONY = tuple(f"<|{name}|>" for name in ("start", "channel", "message", "constrain", "end", "call"))
_TAIL = 16  # tokens of a prompt that may spell a tag, and blanks after it
_WITHOUT = {"enable_thinking": False, "thinking": False}  # as templates call it


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model reasons."""

    tags: ReasoningTags | HarmonyTokens
    always_first: bool = False  # an answer begins with reasoning, tag or not, as those of DeepSeek-R1

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The special tokens that it needs."""
        tags = self.tags
        ids = astuple(tags) if isinstance(tags, HarmonyTokens) else (tags.begin_id, tags.end_id)
        return tuple(token_id for token_id in ids if token_id is not None)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How an answer may begin; in harmony the stage is over once the answer's own message has begun."""

    tags: ReasoningTags | HarmonyTokens
    stage: Stage = "may come"


class _Decoding(Protocol):
    special_ids: frozenset[int]

    def decode(self, token_ids: Sequence[int]) -> str: ...


def reasoning_format(parsers: Parsers, template: str, special: dict[str, int]) -> ReasoningFormat | None:
    """The one of that name; with `auto`, that whose tags the chat template holds. `special`: ids of special tokens.

    Raises CheckpointError where harmony is asked for, and the vocabulary has no tokens for it.
    """
    parser = parsers.reasoning
    is_harmony = parser == "openai_gptoss" or parsers.tools == "openai"
    if is_harmony or (parser == "auto" and "<|channel|>" in template and "<|message|>" in template):
        tokens = _harmony(special)
        if tokens is None and is_harmony:
            raise CheckpointError(f"harmony needs special tokens that the tokenizer has not: {', '.join(_HARMONY)}")
        return tokens
    if parser == "none":
        return None
    if parser == "mistral" or (parser == "auto" and MISTRAL_THINK[1] in template):
        return ReasoningFormat(_tags(*MISTRAL_THINK, special))
    if parser == "auto" and THINK[1] not in template:
        return None
    return ReasoningFormat(_tags(*THINK, special), always_first=parser == "deepseek_r1")


def _harmony(special: dict[str, int]) -> ReasoningFormat | None:
    found = [special[name] for name in _HARMONY if name in special]
    return ReasoningFormat(HarmonyTokens(*found)) if len(found) == len(_HARMONY) else None


def _tags(begin: str, end: str, special: dict[str, int]) -> ReasoningTags:
    return ReasoningTags(begin, end, special.get(begin), special.get(end))


def begun_by(prompt: Sequence[int], format_: ReasoningFormat, tokenizer: _Decoding) -> Reasoning:
    """Where an answer to a prompt takes up, by how the prompt ends."""
    tags = format_.tags
    if isinstance(tags, HarmonyTokens):
        return Reasoning(tags)
    tail = prompt[-_TAIL:]
    if _ends_with(tail, tags.end, tags.end_id, tokenizer):
        return Reasoning(tags, "is over")
    if format_.always_first or _ends_with(tail, tags.begin, tags.begin_id, tokenizer):
        return Reasoning(tags, "has begun")
    return Reasoning(tags)


def _ends_with(tail: Sequence[int], tag: str, tag_id: int | None, tokenizer: _Decoding) -> bool:
    """Whether a prompt ends with a tag, and blanks. Words of a user before a special token, `[/INST]`, are no tag."""
    if tag_id is None:
        own = list(takewhile(lambda token_id: token_id not in tokenizer.special_ids, reversed(tail)))
        return tokenizer.decode(own[::-1]).rstrip().endswith(tag)
    last = next((i for i in reversed(tail) if i in tokenizer.special_ids or tokenizer.decode([i]).strip()), None)
    return last == tag_id


def continued(text: str, format_: ReasoningFormat) -> Reasoning:
    """Where the answer goes on that a message is the beginning of."""
    tags = format_.tags
    if isinstance(tags, HarmonyTokens):
        return Reasoning(tags, "is over")
    is_open = tags.begin_id is None and text.lstrip().startswith(tags.begin) and tags.end not in text
    return Reasoning(tags, "has begun" if is_open else "is over")


def effort_variables(effort: str | None) -> dict[str, str | bool]:
    """What OpenAI's `reasoning_effort` is to templates; each reads those that it knows."""
    if effort is None:
        return {}
    return {"reasoning_effort": effort, **(_WITHOUT if effort == "none" else {})}
