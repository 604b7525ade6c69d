"""pydantic-ai through its three models that speak to Manta: tools, each kind of typed output, streams, history."""

import os
from dataclasses import dataclass
from typing import Literal

import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelRetry, NativeOutput, ToolOutput
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.messages import ToolCallPart, ToolReturnPart
from pydantic_ai.models.mistral import MistralModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.mistral import MistralProvider
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "What is the best French cheese?"
SETTINGS = {"temperature": 0, "max_tokens": 200, "parallel_tool_calls": False}


class Visit(BaseModel):
    city: Literal["Paris", "Lyon"]
    days: int = Field(ge=1, le=9)


def chat():
    return OpenAIChatModel("manta-demo", provider=OpenAIProvider())


def responses():
    return OpenAIResponsesModel("manta-demo", provider=OpenAIProvider())


def mistral():
    return MistralModel("manta-demo", provider=MistralProvider(base_url=os.environ["MANTA_URL"]))


@pytest.fixture(params=[chat, responses, mistral], ids=lambda make: make.__name__)
def model(request):
    return request.param()


@dataclass
class ToolFirst(AbstractCapability):
    """A tool is called on the first step and none on the next."""

    def get_model_settings(self):
        return lambda context: {"tool_choice": "required" if context.run_step == 1 else "none"}


def parts(result, kind):
    return [part for message in result.all_messages() for part in message.parts if isinstance(part, kind)]


async def test_text(model):
    result = await Agent(model, instructions="Be short.", model_settings=SETTINGS).run(QUESTION)
    assert result.output
    assert result.usage.output_tokens > 0


async def test_streamed_text(model):
    agent = Agent(model, model_settings=SETTINGS)
    whole = await agent.run(QUESTION)
    async with agent.run_stream(QUESTION) as stream:
        pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
    assert "".join(pieces) == whole.output
    assert len(pieces) > 1
    assert stream.usage.output_tokens == whole.usage.output_tokens


@pytest.mark.parametrize("mode", [ToolOutput, NativeOutput], ids=lambda mode: mode.__name__)
async def test_typed_output(model, mode):
    if mode is NativeOutput and isinstance(model, MistralModel):
        pytest.skip("pydantic-ai itself refuses it")
    result = await Agent(model, output_type=mode(Visit), model_settings=SETTINGS).run(QUESTION)
    assert isinstance(result.output, Visit)


@pytest.mark.parametrize("mode", [ToolOutput, NativeOutput], ids=lambda mode: mode.__name__)
async def test_streamed_typed_output(model, mode):
    if mode is NativeOutput and isinstance(model, MistralModel):
        pytest.skip("pydantic-ai itself refuses it")
    agent = Agent(model, output_type=mode(Visit), model_settings=SETTINGS)
    async with agent.run_stream(QUESTION) as stream:
        outputs = [output async for output in stream.stream_output(debounce_by=None)]
    assert isinstance(outputs[-1], Visit)


async def test_a_choice_of_output_types(model):
    class Refusal(BaseModel):
        reason: Literal["busy", "ill"]

    result = await Agent(model, output_type=[Visit, Refusal], model_settings=SETTINGS).run(QUESTION)
    assert isinstance(result.output, Visit | Refusal)


async def test_a_tool_and_its_history(model):
    agent = Agent(model, model_settings=SETTINGS, capabilities=[ToolFirst()])

    @agent.tool_plain
    def population(city: Literal["Paris", "Lyon"]) -> int:
        """How many people live in a city."""
        return {"Paris": 2_100_000, "Lyon": 520_000}[city]

    result = await agent.run(QUESTION)
    [call] = parts(result, ToolCallPart)
    [returned] = parts(result, ToolReturnPart)
    assert call.tool_name == "population"
    assert returned.content in (2_100_000, 520_000)
    assert result.output
    again = await Agent(model, model_settings=SETTINGS).run(QUESTION, message_history=result.all_messages())
    assert again.output


async def test_a_streamed_run_with_a_tool(model):
    agent = Agent(model, model_settings=SETTINGS, capabilities=[ToolFirst()])

    @agent.tool_plain
    def places(city: Literal["Paris", "Lyon"]) -> list[dict[str, str]]:
        """What there is to see."""
        return [{"name": "the river"}, {"name": f"the centre of {city}"}]

    async with agent.run_stream(QUESTION) as stream:
        assert await stream.get_output()
    [_] = parts(stream, ToolReturnPart)


async def test_an_output_that_is_sent_back(model):
    """The validator's complaint goes to the model as the tool's result."""
    tries = []
    agent = Agent(model, output_type=ToolOutput(Visit), model_settings=SETTINGS, retries=2)

    @agent.output_validator
    def check(visit: Visit) -> Visit:
        tries.append(visit)
        if len(tries) == 1:
            raise ModelRetry("Another one, please.")
        return visit

    result = await agent.run(QUESTION)
    assert len(tries) == 2
    assert isinstance(result.output, Visit)


async def test_twenty_turns_with_a_tool(model):
    agent = Agent(model, model_settings=SETTINGS | {"max_tokens": 64}, capabilities=[ToolFirst()])

    @agent.tool_plain
    def population(city: Literal["Paris", "Lyon"]) -> int:
        """How many people live in a city."""
        return {"Paris": 2_100_000, "Lyon": 520_000}[city]

    history = []
    for turn in range(20):
        async with agent.run_stream(f"Which city, {turn}?", message_history=history) as stream:
            assert await stream.get_output()
        history = stream.all_messages()
        assert len(parts(stream, ToolReturnPart)) == turn + 1
