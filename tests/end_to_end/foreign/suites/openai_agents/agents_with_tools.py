"""openai-agents with a local MCP server, function tools, handoffs and typed outputs, through both of OpenAI's APIs.

The first turn is made to call a tool; on the second the tool's output goes back, from MCP as a list of parts.
"""

import json
import sys
from pathlib import Path
from typing import Literal

import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    ToolCallItem,
    ToolCallOutputItem,
    function_tool,
    handoff,
    set_tracing_disabled,
)
from agents.mcp import MCPServerStdio
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)
QUESTION = "What is the best French cheese?"
CITIES = ("Paris", "Lyon")
CALL = ModelSettings(tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=1000)
TALK = ModelSettings(temperature=0, max_tokens=1000)


class Visit(BaseModel):
    city: Literal["Paris", "Lyon"]
    days: Literal[1, 2, 3]


@function_tool
def population(city: Literal["Paris", "Lyon"]) -> int:
    """How many people live in a city."""
    return {"Paris": 2_100_000, "Lyon": 520_000}[city]


@pytest.fixture(params=[OpenAIResponsesModel, OpenAIChatCompletionsModel], ids=["responses", "chat"])
async def model(request):
    async with AsyncOpenAI(max_retries=0) as client:
        yield request.param("manta-demo", client)


@pytest.fixture
async def mcp():
    file = Path(__file__).with_name("mcp_server.py")
    parameters = {"command": sys.executable, "args": [str(file)]}
    async with MCPServerStdio(parameters, client_session_timeout_seconds=60) as server:
        yield server


def calls_and_outputs(result):
    calls = [item.raw_item for item in result.new_items if isinstance(item, ToolCallItem)]
    outputs = [item for item in result.new_items if isinstance(item, ToolCallOutputItem)]
    return calls, outputs


@pytest.mark.parametrize("tool", ["weather", "forecast"])
async def test_a_tool_of_the_mcp_server(model, mcp, tool):
    settings = ModelSettings(tool_choice=tool, parallel_tool_calls=False, temperature=0, max_tokens=1000)
    agent = Agent("traveller", instructions="Use the tools.", model=model, model_settings=settings, mcp_servers=[mcp])
    result = await Runner.run(agent, QUESTION)
    [call], [output] = calls_and_outputs(result)
    assert call.name == tool
    assert json.loads(call.arguments)["city"] in CITIES
    assert "sunny" in str(output.output) or "rain" in str(output.output)
    assert isinstance(result.final_output, str)
    assert result.final_output
    assert result.context_wrapper.usage.requests == 2
    # All of it is the next conversation's beginning.
    again = await Runner.run(agent, [*result.to_input_list(), {"role": "user", "content": QUESTION}])
    assert again.final_output


async def test_a_stream_with_a_tool_of_the_mcp_server(model, mcp):
    agent = Agent("traveller", instructions="Use the tools.", model=model, model_settings=CALL, mcp_servers=[mcp])
    result = Runner.run_streamed(agent, QUESTION)
    kinds = [event.data.type async for event in result.stream_events() if event.type == "raw_response_event"]
    [_], [_] = calls_and_outputs(result)
    assert kinds.count("response.created") == kinds.count("response.completed") == 2
    assert "response.function_call_arguments.delta" in kinds
    assert "response.output_text.delta" in kinds
    assert result.final_output


async def test_a_function_tool(model):
    agent = Agent("traveller", model=model, model_settings=CALL, tools=[population])
    result = await Runner.run(agent, QUESTION)
    [_], [output] = calls_and_outputs(result)
    assert output.output in (2_100_000, 520_000)
    assert result.final_output


async def test_a_typed_output(model):
    agent = Agent("traveller", model=model, model_settings=TALK, output_type=Visit)
    result = await Runner.run(agent, QUESTION)
    assert isinstance(result.final_output, Visit)


async def test_a_handoff(model):
    expert = Agent("expert", model=model, model_settings=TALK, instructions="Answer.")
    clerk = Agent("clerk", model=model, model_settings=CALL, handoffs=[handoff(expert)])
    result = await Runner.run(clerk, QUESTION)
    assert result.last_agent is expert
    assert result.final_output


async def test_an_agent_as_a_tool(model):
    expert = Agent("expert", model=model, model_settings=TALK)
    tool = expert.as_tool("ask_the_expert", "Asks somebody who knows.", parameters=Visit)  # a string might never end
    clerk = Agent("clerk", model=model, model_settings=CALL, tools=[tool])
    result = await Runner.run(clerk, QUESTION)
    [_], [output] = calls_and_outputs(result)
    assert isinstance(output.output, str)
    assert result.final_output


async def test_twenty_turns_that_stream(model):
    """Each goes on from all before it, and ends with its tool, as the demo model's talk may not."""
    settings = ModelSettings(tool_choice="population", parallel_tool_calls=False, temperature=0, max_tokens=1000)
    agent = Agent(
        "traveller",
        instructions="Use the tool.",
        model=model,
        model_settings=settings,
        tools=[population],
        tool_use_behavior="stop_on_first_tool",
    )
    history, cached = [], 0
    for turn in range(20):
        result = Runner.run_streamed(agent, [*history, {"role": "user", "content": f"Which city, {turn}?"}])
        async for _ in result.stream_events():
            pass
        [_], [output] = calls_and_outputs(result)
        assert output.output in (2_100_000, 520_000)
        usage = result.context_wrapper.usage
        assert usage.requests == 1
        cached += usage.input_tokens_details.cached_tokens
        history = result.to_input_list()
    assert len(history) >= 3 * 20
    assert cached > usage.input_tokens, "what came before was in the prefix cache"
