"""Calls in the formats of Hermes and of Llama 3: the grammar's are those that the gateway reads."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import pytest

from cluster.messages import ReasonedGrammar, ReasoningTags, ToolCallGrammar, ToolTokens
from gateway.answer.calls import joined
from gateway.answer.tools_reader import tool_call_reader
from gateway.text.detokenizer import Detokenizer
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.checkpoints import write_checkpoint
from tests.gateway.doubles import write_tokenizer
from tests.router_service.engines import Bench, follow
from tests.router_service.requests import make_request
from tests.router_service.schemas import WEATHER, as_schema

EOS = 1
ANY = as_schema({"type": "object"})
TOOLS = (("weather", as_schema(WEATHER)), ("time", as_schema({"type": "object", "properties": {}})))
TOOLS_SCHEMAS = {"weather": WEATHER, "time": {"type": "object"}}
THINK = ReasoningTags("<think>", "</think>")
TIME = {
    "hermes": '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
    "hermes in tokens": '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
    "llama3_json": '{"name": "time", "parameters": {}}',
}
SEPARATOR = {"hermes": "\n", "hermes in tokens": "\n", "llama3_json": "; "}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("calls")
    write_checkpoint(directory, vocab_size=336, bos_token_id=0, eos_token_id=EOS)
    return write_tokenizer(directory, special=["<tool_call>", "</tool_call>"], added=["<think>", "</think>"])


@pytest.fixture(scope="module")
def bench(directory):
    return Bench(directory)


@pytest.fixture(scope="module")
def tokenizer(directory):
    return HuggingFaceTokenizer(directory)


def tokens_of(name, tokenizer):
    if name == "hermes in tokens":
        begin, end = sorted(tokenizer.special_ids)[-2:]
        return ToolTokens(calls=begin, end=end, format="hermes")
    return ToolTokens(format=name)


def encoded(tokenizer, name, text):
    """Tags as words, or as tokens."""
    if name == "hermes in tokens":
        return list(tokenizer.encode(text, add_special_tokens=False))
    parts = text.replace("tool_call>", "tool_call\0>").split("\0")
    return [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False)]


def fits(bench, grammar, ids):
    state = bench.grammar_state(make_request((5, 6, 7), grammar=grammar))
    follow(state, [*ids, EOS])
    return state.error is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", TIME)
def test_required_calls_are_read_and_validate(bench, tokenizer, name, temperature):
    grammar = ToolCallGrammar(TOOLS, required=True, parallel=False, tokens=tokens_of(name, tokenizer))
    for seed in range(3):
        request = make_request((9, 8, 7, seed + 5), grammar=grammar, temperature=temperature, seed=seed, max_tokens=300)
        [output] = bench.run(request)
        assert bench.chunks[request.key][-1].finish_reason == "stop"
        reader, detokenizer = tool_call_reader(grammar), Detokenizer(tokenizer)
        text = "".join(reader.push(i, detokenizer.push(i)) for i in output[:-1]) + reader.flush(has_ended=True)
        [call] = joined(reader.calls.take())
        assert (text, reader.is_complete) == ("", True)
        jsonschema.validate(json.loads(call.arguments), TOOLS_SCHEMAS[call.name])


@pytest.mark.parametrize("name", TIME)
def test_text_goes_on_around_calls_that_may_be(bench, tokenizer, name):
    grammar = ToolCallGrammar(TOOLS, required=False, tokens=tokens_of(name, tokenizer))
    call = TIME[name]
    for text, allowed in (
        ("It rains: {}", True),
        (f"I look. {call}", True),
        (SEPARATOR[name].join([call, call]), True),
        (call.replace("time", "x"), name == "llama3_json"),  # a tool that there is not: there it is some JSON
        (call.replace("{}", '{"a": 1}'), False),
        (call.replace("{}", "3"), False),
    ):
        assert fits(bench, grammar, encoded(tokenizer, name, text)) == allowed, text
    single = replace(grammar, parallel=False)
    assert fits(bench, single, encoded(tokenizer, name, call))
    assert not fits(bench, single, encoded(tokenizer, name, SEPARATOR[name].join([call, call])))


@pytest.mark.parametrize("name", TIME)
def test_calls_that_are_required_are_all_of_an_answer(bench, tokenizer, name):
    grammar = ToolCallGrammar(TOOLS, required=True, tokens=tokens_of(name, tokenizer))
    two = SEPARATOR[name].join([TIME[name], TIME[name]])
    assert fits(bench, grammar, encoded(tokenizer, name, two))
    assert not fits(bench, replace(grammar, parallel=False), encoded(tokenizer, name, two))
    assert not fits(bench, grammar, encoded(tokenizer, name, f"I look. {TIME[name]}"))
    assert not fits(bench, grammar, [])


@pytest.mark.parametrize("name", TIME)
def test_a_text_beside_calls_may_be_held_to_a_schema(bench, tokenizer, name):
    held = as_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    grammar = ToolCallGrammar(TOOLS, required=False, answer=held, tokens=tokens_of(name, tokenizer))
    assert fits(bench, grammar, encoded(tokenizer, name, '{"a": 1}'))
    assert fits(bench, grammar, encoded(tokenizer, name, TIME[name]))
    assert not fits(bench, grammar, encoded(tokenizer, name, "Well."))
    without = replace(grammar, tools=())
    assert fits(bench, without, encoded(tokenizer, name, '{"a": 1}'))
    assert not fits(bench, without, encoded(tokenizer, name, "Well."))


def test_tools_that_may_not_be_called_are_not(bench, tokenizer):
    """With `tool_choice: none` nobody reads calls, so none may come."""
    grammar = ToolCallGrammar((), required=False, tokens=ToolTokens(format="hermes"))
    assert fits(bench, grammar, encoded(tokenizer, "hermes", "Well. <tool_ "))
    assert not fits(bench, grammar, encoded(tokenizer, "hermes", TIME["hermes"]))


@pytest.mark.parametrize("name", TIME)
def test_calls_come_after_the_thought(bench, tokenizer, name):
    """What a model only thinks of calling it does not call, and it answers in some way once it has thought."""
    tools = ToolCallGrammar(TOOLS, required=False, tokens=tokens_of(name, tokenizer))
    for required in (False, True):
        grammar = ReasonedGrammar(THINK, has_begun=False, answer=replace(tools, required=required))
        assert fits(bench, grammar, encoded(tokenizer, name, f"<think>\nThe time?\n</think>\n\n{TIME[name]}"))
        assert fits(bench, grammar, encoded(tokenizer, name, TIME[name]))
        if name != "hermes in tokens":  # there text may hold anything
            assert not fits(bench, grammar, encoded(tokenizer, name, "<think>\nThe time?"))
        if name == "hermes":
            assert not fits(bench, grammar, encoded(tokenizer, name, f"<think>\n{TIME[name]}</think>No."))
    begun = ReasonedGrammar(THINK, has_begun=True, answer=tools)
    assert fits(bench, begun, encoded(tokenizer, name, f"The time?\n</think>\n\nI look. {TIME[name]}"))
