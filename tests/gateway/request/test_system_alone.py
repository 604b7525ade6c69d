"""A conversation without a user: what the system says is said to the model, whatever its template does with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mistral_common
import pytest

from cluster import demo_model
from gateway.text.tokenizer import HuggingFaceTokenizer, MistralTokenizer
from tests.gateway.doubles import write_tokenizer
from tests.gateway.request.test_tools import WEATHER
from tests.gateway.vocabularies import CHATML

SYSTEM = {"role": "system", "content": "Be brief."}
EMPTY = {"role": "user", "content": ""}
TOOL: Any = {**WEATHER, "function": {**WEATHER["function"], "description": ""}}
FIRST_USER = (  # as Mixtral's: the first user's message has what the system says
    "{% if messages[0]['role'] == 'system' %}{% set system, rest = messages[0]['content'] + '\n\n', messages[1:] %}"
    "{% else %}{% set system, rest = '', messages %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}{% if m['role'] == 'user' %}[INST] {{ system if loop.first else '' }}{{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
NEEDS_USER = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('no user') }}{% endif %}"
)
TOOLS_IN_USER = (
    "{% set tools_say = tools | map(attribute='function.name') | join if tools else '' %}"
    + FIRST_USER.replace("[INST] ", "[INST] {{ tools_say }}").replace("tool_calls", "")
)


def huggingface(path: Path, template: str) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(write_tokenizer(path, chat_template=template))


@pytest.mark.parametrize("template", [FIRST_USER, NEEDS_USER + CHATML], ids=["first user", "needs a user"])
def test_a_template_that_loses_the_system_s_message_gets_an_empty_one_of_a_user(tmp_path: Path, template: str) -> None:
    """The prompt was `<s>` and nothing else: a model that was asked nothing, and no error."""
    tokenizer = huggingface(tmp_path, template)
    token_ids = tokenizer.encode_chat([SYSTEM])
    assert token_ids == tokenizer.encode_chat([SYSTEM, EMPTY])
    assert "Be brief." in tokenizer.decode(token_ids)


def test_one_that_says_it_says_nothing_else(tmp_path: Path) -> None:
    tokenizer = huggingface(tmp_path, CHATML)
    assert tokenizer.decode(tokenizer.encode_chat([SYSTEM])).replace(" ", "") == (
        "<|im_start|>system\nBebrief.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_demo_model_is_told_it() -> None:
    tokenizer = HuggingFaceTokenizer(Path(demo_model.__file__).parent)
    assert "Be brief." in tokenizer.decode(tokenizer.encode_chat([SYSTEM]))


def test_tools_without_a_user_are_told_as_well(tmp_path: Path) -> None:
    tokenizer = huggingface(tmp_path, TOOLS_IN_USER)
    assert "weather" in tokenizer.decode(tokenizer.encode_chat([SYSTEM], [TOOL]))


@pytest.mark.parametrize(
    "file", ["mistral_instruct_tokenizer_240323.model.v3", "mistral_instruct_tokenizer_241114.model.v7"]
)
def test_mistral_s_tokenizers_are_told_both(tmp_path: Path, file: str) -> None:
    """Version 7 puts tools beside a user's message, and left them out where there was none."""
    shutil.copy(Path(mistral_common.__file__).parent / "data" / file, tmp_path)
    tokenizer = MistralTokenizer(tmp_path)
    pieces = [str(tokenizer._raw.id_to_piece(i)) for i in tokenizer.encode_chat([SYSTEM], [TOOL])]
    text = "".join(pieces).replace("▁", " ")
    assert "Be brief." in text
    assert '"name": "weather"' in text
    assert "[AVAILABLE_TOOLS]" in pieces
    alone = tokenizer.encode_chat([SYSTEM])
    assert tokenizer.decode(alone).strip() == "Be brief."
