"""Reads a Mistral tokenizer so that text before calls is history to every version. Knows mistral-common's classes.

mistral-common refuses a message that has both before version 7, but models of versions 2 and 3 may write both here. It
is encoded as version 7 encodes it: the text, then the calls. Slow to import, as mistral-common is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mistral_common.protocol.instruct.messages import AssistantMessage
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV2, InstructTokenizerV3
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer


def mistral_reader(file: Path) -> Any:
    """`MistralTokenizer.from_file`, but for that."""
    reader: Any = MistralTokenizer.from_file(str(file))
    version = str(reader.version.value)
    if not version.startswith(("v2", "v3")):
        return reader
    validator, normalizer = get_validator(reader.version, ValidationMode.test), get_normalizer(reader.version)
    validator._allow_tool_call_and_content = normalizer._allow_tool_call_and_content = True
    instruct: Any = _V2 if version.startswith("v2") else _V3
    return MistralTokenizer(instruct(reader.instruct_tokenizer.tokenizer), validator, normalizer)


class _TextBeforeCalls:
    def encode_assistant_message(self, message: AssistantMessage, is_before_last_user_message: bool) -> list[int]:
        own: Any = super()
        if not (message.content and message.tool_calls):
            return list(own.encode_assistant_message(message, is_before_last_user_message))
        alone = {"prefix": True}  # without the token that ends an answer
        text = message.model_copy(update={"tool_calls": None, **alone})
        calls = message.model_copy(update={"content": None, **alone})
        return [
            *own.encode_assistant_message(text, is_before_last_user_message),
            *own.encode_assistant_message(calls, is_before_last_user_message),
            *([] if message.prefix else [self.tokenizer.eos_id]),  # type: ignore[attr-defined]
        ]


class _V2(_TextBeforeCalls, InstructTokenizerV2):  # type: ignore[misc]
    pass


class _V3(_TextBeforeCalls, InstructTokenizerV3):  # type: ignore[misc]
    pass
