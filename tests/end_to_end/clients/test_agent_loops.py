"""An agent's loop of 20 turns through Anthropic's client, unmodified: tools, streams, thinking, the prefix cache."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import anthropic
import pytest

from tests import families
from tests.conftest import running_server
from tests.end_to_end.models.test_other_families import CONTEXT, NO_IDS, vocab_size
from tests.gateway.chat_formats import write_qwen3

pytestmark = pytest.mark.long
TURNS = 20
LAST_TURN = 400  # tokens, of 3,200 in the end
CITIES = ("Paris", "Lyon")
TOOL: dict[str, Any] = {
    "name": "weather",
    "description": "Of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": list(CITIES)}, "days": {"enum": [1, 2, 3]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
FORCED = {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}}
GREEDY = {"extra_body": {"temperature": 0}}


def client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", timeout=300, max_retries=0)


def results(message: anthropic.types.Message, text: str) -> list[dict[str, Any]]:
    """What the agent answers each call with."""
    calls = [block for block in message.content if block.type == "tool_use"]
    return [{"type": "tool_result", "tool_use_id": call.id, "content": text} for call in calls]


def streamed(agent: anthropic.Anthropic, **asked: Any) -> anthropic.types.Message:
    """The whole message of a stream, whose events the client has put together."""
    with agent.messages.stream(**asked, **GREEDY) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(message.content)
    return message


def test_twenty_turns_with_a_tool(server: Any) -> None:
    """Each turn's prompt begins with all before it, which is computed once."""
    system = "Use the tool. " * 30
    with client(server.url) as agent:
        messages: list[Any] = [{"role": "user", "content": "How is the weather, city by city?"}]
        asked: dict[str, Any] = {"model": "mistral-small", "max_tokens": 200, "system": system, **FORCED}
        cached = []
        for turn in range(TURNS):
            counted = agent.messages.count_tokens(
                model=asked["model"], system=system, messages=messages, **FORCED
            ).input_tokens
            message = streamed(agent, messages=messages, **asked)
            assert message.stop_reason == "tool_use"
            [call] = message.content
            assert call.type == "tool_use"
            assert call.input["city"] in CITIES, turn
            assert call.input["days"] in (1, 2, 3)
            assert message.usage.input_tokens + message.usage.cache_read_input_tokens == counted
            cached.append((message.usage.cache_read_input_tokens, counted))
            messages.append({"role": "assistant", "content": message.content})  # as the client has it
            messages.append({"role": "user", "content": results(message, f"sunny, {turn} degrees")})
        plain = agent.messages.create(messages=messages, **asked, **GREEDY)
        again = streamed(agent, messages=messages, **asked)
        assert [block.to_dict() | {"id": ""} for block in plain.content] == [
            block.to_dict() | {"id": ""} for block in again.content
        ]
        last = agent.messages.create(
            model=asked["model"], max_tokens=40, messages=messages, tools=[TOOL], tool_choice={"type": "none"}, **GREEDY
        )
        assert [block.type for block in last.content] == ["text"]
    for (_, before), (hit, now) in pairwise(cached):
        # But for the tools and the last result: the demo model's template writes tools before the last of them.
        assert before - LAST_TURN <= hit < now


def test_thoughts_are_passed_back(tmp_path: Path) -> None:
    """Turns that think and are cut, and turns that call a tool and do not: a random model says no more than that."""
    write_qwen3(tmp_path)
    model = families.random_model(
        "qwen3_moe", vocab_size=vocab_size(tmp_path), max_position_embeddings=2 * CONTEXT, **NO_IDS
    )
    families.write_model(tmp_path, model)
    config = (
        f"models: [{{name: thinker, path: {tmp_path}, reasoning_parser: deepseek_r1, "
        f"engine: {{dtype: float32, max_model_len: {2 * CONTEXT}, kv_cache_gib: 0.1}}, "
        "experts: {groups: [[0, 1, 2, 3], [4, 5, 6, 7]]}}]"
    )
    with running_server(config) as server, client(server.url) as agent:
        messages: list[Any] = [{"role": "user", "content": "Hello, how is the weather?"}]
        thoughts = cached = 0
        for turn in range(TURNS):
            if turn % 2:
                message = streamed(
                    agent, model="thinker", max_tokens=60, messages=messages, thinking={"type": "disabled"}, **FORCED
                )
                [call] = message.content
                assert call.type == "tool_use"
                assert call.input["city"] in CITIES
                answer: Any = results(message, "sunny")
            else:
                message = streamed(
                    agent,
                    model="thinker",
                    max_tokens=24,
                    messages=messages,
                    thinking={"type": "enabled", "budget_tokens": 1024},
                )
                [thought] = message.content
                assert (thought.type, thought.signature) == ("thinking", "")
                assert thought.thinking
                assert message.stop_reason == "max_tokens"
                thoughts += 1
                answer = "Go on."
            cached += message.usage.cache_read_input_tokens
            messages.append({"role": "assistant", "content": message.content})
            messages.append({"role": "user", "content": answer})
        assert thoughts == TURNS // 2
        with_thoughts = agent.messages.count_tokens(model="thinker", messages=messages)
    assert cached > with_thoughts.input_tokens, "what came before is computed once"
