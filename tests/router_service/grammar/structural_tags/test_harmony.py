"""Answers in harmony: the grammar's messages are those that the gateway reads."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import pytest

from cluster.messages import HarmonyGrammar, ToolCallGrammar, ToolTokens
from gateway.answer.calls import joined
from gateway.answer.harmony_reader import HarmonyReader
from gateway.text.detokenizer import Detokenizer
from gateway.text.tokenizer import HuggingFaceTokenizer
from router_service.grammar.grammar import param
from router_service.grammar.structural_tags.format import parts
from tests.checkpoints import write_checkpoint
from tests.gateway.chat_formats import write_gpt_oss
from tests.router_service.engines import Bench, follow
from tests.router_service.requests import make_request
from tests.router_service.schemas import WEATHER, as_schema

EOS = 1
OBJECT = as_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
TOOLS = ToolCallGrammar((("weather", as_schema(WEATHER)), ("f", OBJECT)), True, tokens=ToolTokens(format="openai"))
THOUGHT = "<|channel|>analysis<|message|>Hm: {}.<|end|><|start|>assistant"
PREAMBLE = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
FINAL = '<|channel|>final<|message|>{"a": 1}'
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}'


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("harmony")
    write_checkpoint(directory, vocab_size=336, bos_token_id=0, eos_token_id=EOS)
    return write_gpt_oss(directory)


@pytest.fixture(scope="module")
def bench(directory):
    return Bench(directory)


@pytest.fixture(scope="module")
def tokenizer(directory):
    return HuggingFaceTokenizer(directory)


def fits(bench, tokenizer, answer, text):
    grammar = HarmonyGrammar(tokenizer.reasoning.tags, answer)
    state = bench.grammar_state(make_request((5, 6, 7), grammar=grammar))
    follow(state, [*tokenizer.encode(text, add_special_tokens=False), EOS])
    return state.error is None


@pytest.mark.parametrize(
    ("text", "as_json", "required", "auto"),
    [
        (FINAL, True, False, True),
        (THOUGHT + FINAL, True, False, True),
        (THOUGHT + PREAMBLE + THOUGHT + FINAL, True, False, True),
        (THOUGHT + "<|channel|>final<|message|>Well.", False, False, True),
        (CALL, False, True, True),
        (THOUGHT + PREAMBLE + CALL, False, True, True),
        (THOUGHT + CALL.replace(" <|constrain|>json", "<|constrain|>json"), False, True, True),
        (THOUGHT + CALL.replace(" <|constrain|>json", " json"), False, True, True),
        (' to=functions.f<|channel|>commentary json<|message|>{"a": 1}', False, True, True),
        (CALL.replace("1", '"x"'), False, False, False),
        (CALL.replace("functions.f", "functions.g"), False, False, False),
        (CALL + "<|call|><|start|>assistant" + CALL, False, False, False),
        (THOUGHT, False, False, False),
        ("Well.", False, False, False),
        ("<|channel|>analysis<|message|>Hm.", False, False, False),
    ],
)
def test_the_last_message_is_held_to_something(bench, tokenizer, text, as_json, required, auto):
    assert fits(bench, tokenizer, OBJECT, text) == as_json
    assert fits(bench, tokenizer, TOOLS, text) == required
    assert fits(bench, tokenizer, replace(TOOLS, required=False), text) == auto
    held = replace(TOOLS, required=False, answer=OBJECT)
    assert fits(bench, tokenizer, held, text) == (as_json or required)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_required_calls_are_read_and_validate(bench, tokenizer, temperature):
    tokens = tokenizer.reasoning.tags
    bias = ((tokens.channel, -30.0),)  # no thought, of which a random model has no end
    tools = replace(TOOLS, tools=TOOLS.tools[:1])
    for seed in range(3):
        request = make_request(
            (9, 8, 7, seed + 5),
            grammar=HarmonyGrammar(tokens, tools),
            temperature=temperature,
            seed=seed,
            max_tokens=400,
            logit_bias=bias,
        )
        [output] = bench.run(request)
        assert bench.chunks[request.key][-1].finish_reason == "stop", tokenizer.decode(output)
        reader, detokenizer = HarmonyReader(tokens, frozenset({"weather"})), Detokenizer(tokenizer)
        for token_id in output[:-1]:
            reader.push(token_id, detokenizer.push(token_id))
        reader.tool_calls.flush(has_ended=True)
        [call] = joined(reader.tool_calls.calls.take())
        assert reader.tool_calls.is_complete
        jsonschema.validate(json.loads(call.arguments), WEATHER)


def test_an_error_names_the_field_of_the_answer(tokenizer):
    grammar = HarmonyGrammar(tokenizer.reasoning.tags, OBJECT)
    assert (param(grammar), parts(grammar)) == (OBJECT.param, (OBJECT,))
