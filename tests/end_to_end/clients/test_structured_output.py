"""Structured output and tool calls of the running server, through unmodified clients. The demo model knows neither."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Literal

import httpx
import jsonschema
import openai
import pytest
from mistralai.client import Mistral
from pydantic import BaseModel, ConfigDict, Field

from tests.router_service.schemas import BOUNDED, WEATHER

MODEL = "manta-demo"
ASK = {"role": "user", "content": "What is the best French cheese?"}
ID = re.compile(r"[a-zA-Z0-9]{9}")
LONG_S = 240.0


class Cheese(BaseModel):
    model_config = ConfigDict(extra="forbid")  # a model that knows no JSON would add properties for ever

    name: Literal["Comté", "Roquefort", "Camembert"]
    months: int = Field(ge=0, le=48)
    wine: Literal["red", "white"] | None
    format: Literal["whole", "sliced"]  # called like a word of schemas
    holes: list[Literal["small", "large"]] = Field(max_length=2)


def tool(name, parameters):
    return {"type": "function", "function": {"name": name, "description": "A tool", "parameters": parameters}}


LONG = {"type": "object", "properties": {"note": BOUNDED["long"]}, "required": ["note"], "additionalProperties": False}
TOOLS = [tool("weather", WEATHER), tool("ripen", Cheese.model_json_schema())]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=LONG_S, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def mistral(server):
    with Mistral(server_url=server.url, api_key="none", timeout_ms=int(LONG_S * 1000)) as client:
        yield client


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("name", BOUNDED)
def test_an_answer_within_a_schema_validates(client, name, temperature):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[ASK],
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": BOUNDED[name]}},
        temperature=temperature,
        seed=5,
        max_tokens=400,
    )
    assert answer.choices[0].finish_reason == "stop", answer.choices[0].message.content
    jsonschema.validate(json.loads(answer.choices[0].message.content), BOUNDED[name])


def test_openai_s_parse_makes_a_pydantic_model(client):
    parsed = client.chat.completions.parse(
        model=MODEL, messages=[ASK], response_format=Cheese, temperature=0, max_tokens=400
    )
    assert isinstance(parsed.choices[0].message.parsed, Cheese)


def test_mistral_s_parse_makes_a_pydantic_model(mistral):
    parsed = mistral.chat.parse(
        response_format=Cheese, model=MODEL, messages=[ASK], temperature=1, random_seed=3, max_tokens=400
    )
    assert isinstance(parsed.choices[0].message.parsed, Cheese)


def test_json_object_begins_an_object(client):
    """The demo model writes no JSON by itself and may not come to an end."""
    text = client.chat.completions.create(
        model=MODEL, messages=[ASK], response_format={"type": "json_object"}, temperature=0, max_tokens=40
    ).choices[0]
    assert text.message.content.lstrip().startswith("{")
    if text.finish_reason == "stop":
        assert isinstance(json.loads(text.message.content), dict)


def check_calls(calls, names):
    assert [call.function.name for call in calls] == names
    for call in calls:
        assert ID.fullmatch(call.id)
        assert call.type == "function"
        arguments = json.loads(call.function.arguments)
        jsonschema.validate(arguments, WEATHER if call.function.name == "weather" else Cheese.model_json_schema())


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("name", ["weather", "ripen"])
def test_openai_forces_a_tool(client, name, temperature):
    asked = {
        "model": MODEL,
        "messages": [ASK],
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": name}},
        "temperature": temperature,
        "seed": 1,
        "max_tokens": 400,
    }
    [choice] = client.chat.completions.create(**asked).choices
    assert (choice.message.content, choice.finish_reason) == ("", "tool_calls")
    check_calls(choice.message.tool_calls, [name])
    with client.chat.completions.stream(**asked) as stream:
        pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        [streamed] = stream.get_final_completion().choices
    assert len(pieces) > 1, "as they are written"
    check_calls(streamed.message.tool_calls, [name])
    assert streamed.message.tool_calls[0].function.arguments == choice.message.tool_calls[0].function.arguments
    assert streamed.finish_reason == "tool_calls"


def test_a_forced_call_with_a_long_string_is_read(client):
    """Its raw line breaks made the reader of calls raise, and the answer was a 500."""
    forced = {"type": "function", "function": {"name": "note"}}
    [choice] = client.chat.completions.create(
        model=MODEL, messages=[ASK], tools=[tool("note", LONG)], tool_choice=forced, temperature=1, max_tokens=400
    ).choices
    assert choice.finish_reason == "tool_calls"
    jsonschema.validate(json.loads(choice.message.tool_calls[0].function.arguments), LONG)


def test_mistral_is_answered_with_calls_and_sends_the_results(mistral):
    asked = {"model": MODEL, "tools": TOOLS, "tool_choice": "any", "parallel_tool_calls": False}
    sampling = {"temperature": 1, "random_seed": 2, "max_tokens": 400}
    [choice] = mistral.chat.complete(messages=[ASK], **asked, **sampling).choices
    [call] = choice.message.tool_calls
    check_calls([call], [call.function.name])
    with mistral.chat.stream(messages=[ASK], **asked, **sampling) as events:
        streamed = [one for event in events for one in event.data.choices[0].delta.tool_calls or ()]
    check_calls(streamed, [call.function.name])
    assert streamed[0].function.arguments == call.function.arguments
    result = {"role": "tool", "name": call.function.name, "tool_call_id": call.id, "content": "It is ripe."}
    [answer] = mistral.chat.complete(
        model=MODEL, messages=[ASK, choice.message, result], tools=TOOLS, tool_choice="none", max_tokens=10
    ).choices
    assert answer.message.content
    assert not answer.message.tool_calls
    assert answer.finish_reason in ("stop", "length")


def test_auto_leaves_the_choice_to_the_model(client):
    """The demo model has never seen a tool, and answers with text."""
    [choice] = client.chat.completions.create(
        model=MODEL, messages=[ASK], tools=TOOLS, temperature=0, max_tokens=20
    ).choices
    assert choice.message.content
    assert choice.message.tool_calls is None


HOSTILE = {
    "a pattern that explodes": {"type": "string", "pattern": "^(((a*){1,100}){1,100}){1,100}$"},
    "a deep one": json.loads('{"items":' * 40 + "{}" + "}" * 40),
    "a huge enumeration": {"enum": list(range(50_000))},
    "a reference to itself": {"$ref": "#"},
    "a reference outside": {"$ref": "http://127.0.0.1/schema"},
    "no schema": {"type": "banana"},
}


def test_hostile_schemas_are_refused_while_other_streams_go_on(server):
    async def refused(http, schema):
        answers = [
            await http.post("/v1/chat/completions", json={"model": MODEL, "messages": [ASK], "max_tokens": 5, **change})
            for change in (
                {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
                {"tools": [tool("f", {}), tool("x", schema)], "tool_choice": "required"},
            )
        ]
        assert [answer.status_code for answer in answers] == [400, 400], [answer.text for answer in answers]
        params = [answer.json()["error"]["param"] for answer in answers]
        assert params == ["response_format.json_schema.schema", "tools[1].function.parameters"]

    async def ask_until(http, done):
        """Plain answers, one after the other, as long as the hostile ones are worked on."""
        count = 0
        while not done.is_set():
            answer = await http.post(
                "/v1/chat/completions", json={"model": MODEL, "messages": [ASK], "temperature": 0, "max_tokens": 5}
            )
            assert answer.status_code == 200
            count += 1
        return count

    async def scenario():
        async with httpx.AsyncClient(base_url=server.url, timeout=LONG_S) as http:
            done = asyncio.Event()
            others = asyncio.create_task(ask_until(http, done))
            async with asyncio.timeout(LONG_S):
                await asyncio.gather(*(refused(http, schema) for schema in HOSTILE.values()))
            done.set()
            assert await others > 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "expression"),
    [
        ({"structured_outputs": {"choice": ["Comté", "Brie"]}}, "Comté|Brie"),
        ({"guided_regex": r"[A-Z][a-z]{2,6}, \d{2} ans"}, r"[A-Z][a-z]{2,6}, \d{2} ans"),
        ({"grammar": 'root ::= item (", " item)? "."\nitem ::= "Comté" | "Brie"'}, r"(Comté|Brie)(, (Comté|Brie))?\."),
    ],
)
def test_an_answer_is_a_text_of_its_grammar(server, client, fields, expression):
    """In both routes, and whole as well as in a stream."""
    asked = {"model": MODEL, "max_tokens": 60, "temperature": 1}
    chat = client.chat.completions.create(**asked, messages=[ASK], extra_body=fields).choices[0].message.content
    assert re.fullmatch(expression, chat)
    stream = client.chat.completions.create(**asked, messages=[ASK], stream=True, extra_body=fields)
    assert re.fullmatch(expression, "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))
    text = client.completions.create(**asked, prompt="Cheese: ", extra_body=fields).choices[0].text
    assert re.fullmatch(expression, text)


def test_rules_that_take_too_long_are_a_client_s_mistake(client):
    nested = 'root ::= ((((("a"{1,100}){1,100}){1,100}){1,100}){1,100}){1,100}'
    with pytest.raises(openai.BadRequestError, match="ebnf: ") as raised:
        client.chat.completions.create(model=MODEL, messages=[ASK], extra_body={"ebnf": nested})
    assert raised.value.param == "ebnf"
