"""Every field, item, part, tool and choice that openai's client can send to the Responses API: what becomes of each.

The lists are read from the installed client. A new version's new item fails here until somebody decides.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai.types import responses
from openai.types.responses import (
    response_create_params,
    response_includable,
    response_input_item_param,
    response_input_message_content_list_param,
    response_output_message_param,
    tool_param,
)
from openai.types.shared import reasoning_effort
from typing_extensions import get_type_hints

from gateway.responses.fields import REFUSED, Includable, ReasoningOptions, ResponsesRequest
from tests.gateway.doubles import ScriptedCoordinator

ANSWER = "Hello"
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}}

HONOURED = {
    "include",
    "input",
    "instructions",
    "max_output_tokens",
    "metadata",
    "model",
    "parallel_tool_calls",
    "stream",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "truncation",
}
SAID_BACK = {"max_tool_calls", "reasoning", "service_tier"}
HINTS: dict[str, Any] = {  # change nothing: a value of each
    "access_programs": {"cyber": "standard"},
    "image": {"context_compression": "auto"},  # of images, which are refused
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit", "ttl": "30m"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "store": True,  # the answer says that it was not
    "stream_options": {"include_obfuscation": False},
    "user": "u",
}

# Item → whether it is taken, and what it needs beside its type.
ITEMS: dict[str, tuple[bool, dict[str, Any]]] = {
    "message": (True, {"role": "user", "content": "Hi"}),
    "function_call": (True, {"call_id": "c1", "name": "f", "arguments": "{}"}),
    "function_call_output": (True, {"call_id": "c1", "output": "x"}),
    "reasoning": (True, {"id": "rs_1", "summary": [], "encrypted_content": "x"}),
    "item_reference": (False, {"id": "msg_1"}),  # nothing is stored
    "additional_tools": (False, {}),
    "apply_patch_call": (False, {}),
    "apply_patch_call_output": (False, {}),
    "code_interpreter_call": (False, {}),
    "compaction": (False, {}),
    "compaction_trigger": (False, {}),
    "computer_call": (False, {}),
    "computer_call_output": (False, {}),
    "configuration_update": (False, {}),
    "custom_tool_call": (False, {}),
    "custom_tool_call_output": (False, {}),
    "file_search_call": (False, {}),
    "image_generation_call": (False, {}),
    "local_shell_call": (False, {}),
    "local_shell_call_output": (False, {}),
    "mcp_approval_request": (False, {}),
    "mcp_approval_response": (False, {}),
    "mcp_call": (False, {}),
    "mcp_list_tools": (False, {}),
    "program": (False, {}),
    "program_output": (False, {}),
    "shell_call": (False, {}),
    "shell_call_output": (False, {}),
    "tool_search_call": (False, {}),
    "tool_search_output": (False, {}),
    "web_search_call": (False, {}),
}
PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal", "input_image": None, "input_file": None}
TOOLS = {
    "function": True,
    "apply_patch": False,
    "code_interpreter": False,
    "computer": False,
    "computer_use_preview": False,
    "custom": False,
    "file_search": False,
    "image_generation": False,
    "local_shell": False,
    "mcp": False,
    "namespace": False,
    "programmatic_tool_calling": False,
    "shell": False,
    "tool_search": False,
    "web_search": False,
    "web_search_2025_08_26": False,
    "web_search_preview": False,
    "web_search_preview_2025_03_11": False,
}
CHOICES = {  # objects by type; the words are none, auto and required
    "function": True,
    "allowed_tools": True,
    "apply_patch": False,
    "code_interpreter": False,
    "computer": False,
    "computer_use": False,
    "computer_use_preview": False,
    "custom": False,
    "file_search": False,
    "image_generation": False,
    "mcp": False,
    "programmatic_tool_calling": False,
    "shell": False,
    "web_search_preview": False,
    "web_search_preview_2025_03_11": False,
}


def types_of(union: Any) -> set[str]:
    """The values that `type` may have in the members of a union."""

    def literals(annotation: Any) -> Iterator[str]:
        if typing.get_origin(annotation) is typing.Literal:
            yield from (value for value in typing.get_args(annotation) if isinstance(value, str))
        else:
            for part in typing.get_args(annotation):
                yield from literals(part)

    return {value for member in typing.get_args(union) for value in literals(_hints(member).get("type"))}


def _hints(member: Any) -> dict[str, Any]:
    return get_type_hints(member) if isinstance(member, type) else {}


def ask(url: str, **change: Any) -> httpx.Response:
    return httpx.post(url + "/v1/responses", json={"model": "tiny", "input": "Hello", "max_output_tokens": 2} | change)


def test_every_field_has_its_place() -> None:
    fields = set(get_type_hints(response_create_params.ResponseCreateParamsBase)) | {"stream"}
    places = [HONOURED, SAID_BACK, set(HINTS), set(REFUSED)]
    assert set().union(*places) == fields
    assert sum(map(len, places)) == len(fields), "one place each"
    assert set(ResponsesRequest.model_fields) >= HONOURED | SAID_BACK


def test_hints_are_taken_and_what_is_not_served_is_refused(door: tuple[str, ScriptedCoordinator]) -> None:
    answer = ask(door[0], **HINTS)
    assert (answer.status_code, answer.json()["store"]) == (200, False)
    for name, harmless in REFUSED.items():
        refused = ask(door[0], **{name: "something"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
        for value in (None, *harmless):
            assert ask(door[0], **{name: value}).status_code == 200


def test_words_are_those_of_the_client() -> None:
    """What may be included, and how much a model may be asked to think."""
    assert set(typing.get_args(Includable)) == set(typing.get_args(response_includable.ResponseIncludable))
    efforts = {value for part in typing.get_args(reasoning_effort.ReasoningEffort) for value in typing.get_args(part)}
    ours = ReasoningOptions.model_fields["effort"].annotation
    assert {value for part in typing.get_args(ours) for value in typing.get_args(part)} == efforts


def test_the_table_has_every_item() -> None:
    assert types_of(response_input_item_param.ResponseInputItemParam) == set(ITEMS)


@pytest.mark.parametrize("kind", ITEMS)
def test_an_item_is_taken_or_refused_by_name(door: tuple[str, ScriptedCoordinator], kind: str) -> None:
    is_taken, fields = ITEMS[kind]
    answer = ask(door[0], input=[{"role": "user", "content": "Hi"}, {"type": kind, **fields}])
    if is_taken:
        assert answer.status_code == 200, answer.text
    else:
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[1].type")


def test_a_part_is_taken_or_refused_by_name(door: tuple[str, ScriptedCoordinator]) -> None:
    said, answered = (
        response_input_message_content_list_param.ResponseInputContentParam,
        response_output_message_param.Content,
    )
    assert types_of(said) | types_of(answered) == set(PARTS)
    for kind, field in PARTS.items():
        content = [{"type": kind} | ({field: "Hi"} if field else {})]
        outcomes = {
            "input[0].content[0].type": ask(door[0], input=[{"role": "user", "content": content}]),
            "input[1].output[0].type": ask(
                door[0],
                input=[
                    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "c1", "output": content},
                ],
            ),
        }
        for path, answer in outcomes.items():
            if field:
                assert answer.status_code == 200, answer.text
            else:
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, path)


def test_a_tool_is_taken_or_refused_by_name(door: tuple[str, ScriptedCoordinator]) -> None:
    assert types_of(tool_param.ToolParam) == set(TOOLS)
    for kind, is_taken in TOOLS.items():
        answer = ask(door[0], tools=[FUNCTION | {"type": kind}])
        if is_taken:
            assert answer.status_code == 200, answer.text
        else:
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools[0].type")


def test_a_choice_is_taken_or_refused_by_name(door: tuple[str, ScriptedCoordinator]) -> None:
    assert types_of(response_create_params.ToolChoice) == set(CHOICES)
    assert set(typing.get_args(responses.ToolChoiceOptions)) == {"none", "auto", "required"}
    named = {"mode": "auto", "tools": [{"type": "function", "name": "f"}], "name": "f"}
    choices: list[tuple[Any, bool]] = [(word, True) for word in ("none", "auto", "required")]
    choices += [({"type": kind, **named}, is_taken) for kind, is_taken in CHOICES.items()]
    for choice, is_taken in choices:
        answer = ask(door[0], tools=[FUNCTION], tool_choice=choice)
        if is_taken:
            assert answer.status_code == 200, answer.text
        else:
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_choice")
