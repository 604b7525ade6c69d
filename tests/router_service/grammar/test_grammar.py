"""Constrained output of an engine with random weights: it parses, it validates, it depends on no neighbour."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import jsonschema
import pytest
from transformers import PreTrainedTokenizerFast

from cluster.errors import InvalidRequest
from cluster.messages import ToolCallGrammar, ToolTokens
from gateway.answer.tools_reader import SpelledCallReader
from gateway.text.detokenizer import Detokenizer
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.checkpoints import write_checkpoint
from tests.gateway.doubles import write_tokenizer
from tests.router_service.engines import Bench, cut_by, follow
from tests.router_service.requests import make_request
from tests.router_service.schemas import BOUNDED, WEATHER, as_schema

EOS = 1
SIZE = 320  # of write_tokenizer's vocabulary


@pytest.fixture(scope="module")
def tokenizer(directory):
    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.fixture
def bench(directory):
    return Bench(directory)


def prompt(seed=0, length=12):
    return random.Random(seed).choices(range(3, 300), k=length)


def text_of(tokenizer, token_ids):
    assert token_ids[-1] == EOS
    return tokenizer.decode(token_ids[:-1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", BOUNDED)
def test_an_answer_within_a_schema_parses_and_validates(bench, tokenizer, name, temperature):
    for seed in range(4):
        request = make_request(
            prompt(seed), grammar=as_schema(BOUNDED[name]), temperature=temperature, seed=seed, max_tokens=300
        )
        [output] = bench.run(request)
        assert bench.chunks[request.key][-1].finish_reason == "stop", tokenizer.decode(output)
        jsonschema.validate(json.loads(text_of(tokenizer, output)), BOUNDED[name])


def calls_of(text):
    """What stands after the marker, as (name, arguments)."""
    match = re.fullmatch(r"\[TOOL_CALLS\] ?(\[.*\])", text, re.DOTALL)
    assert match, text
    return [(call["name"], call["arguments"]) for call in json.loads(match[1])]


def tools(**changes):
    two = (("weather", as_schema(WEATHER, "tools[0].function.parameters")), ("nothing", as_schema({}, "tools[1]")))
    return ToolCallGrammar(**{"tools": two[:1], "required": True, **changes})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_required_calls_parse_and_validate(bench, tokenizer, temperature):
    for seed in range(4):
        request = make_request(
            prompt(seed), grammar=tools(parallel=False), temperature=temperature, seed=seed, max_tokens=300
        )
        [output] = bench.run(request)
        [(name, arguments)] = calls_of(text_of(tokenizer, output))
        assert name == "weather"
        jsonschema.validate(arguments, WEATHER)


def test_several_calls_come_only_when_they_may_be_parallel(bench, tokenizer):
    # Another call is as likely as none here, and the bias makes it certain for a while.
    comma = tokenizer.convert_tokens_to_ids(",")
    request = make_request(prompt(), grammar=tools(), temperature=1.0, logit_bias=((comma, 30.0),), max_tokens=400)
    [output] = bench.run(request)
    text = tokenizer.decode(output)
    assert text.count('{"name": "weather"') > 1


def test_a_model_with_a_token_for_calls_may_speak_before_them(bench, tokenizer):
    marker = 0  # any special token
    grammar = tools(required=False, parallel=False, tokens=ToolTokens(calls=marker))
    state = bench.grammar_state(make_request(prompt(), grammar=grammar))
    follow(state, [*tokenizer.encode("Hello", add_special_tokens=False), marker])
    assert state.error is None
    follow(state, tokenizer.encode(" Hello", add_special_tokens=False))
    assert state.error is not None


@pytest.fixture(scope="module")
def spelling(tmp_path_factory):
    """The same with the special tokens of Mistral's later tokenizers."""
    directory = tmp_path_factory.mktemp("spelling")
    write_checkpoint(directory, vocab_size=SIZE + 16, bos_token_id=0, eos_token_id=EOS)
    template = "{{ tools }}{{ messages[0].tool_calls }}[ARGS][CALL_ID]"
    return write_tokenizer(directory, chat_template=template, special=["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"])


@pytest.mark.parametrize("has_call_id", [False, True])
def test_calls_spelled_in_special_tokens_parse_and_validate(spelling, has_call_id):
    """What the grammar lets through is what the gateway reads."""
    bench, tokenizer = Bench(spelling), HuggingFaceTokenizer(spelling)
    tokens = tokenizer.tool_tokens if has_call_id else replace(tokenizer.tool_tokens, call_id=None)
    grammar = tools(tokens=tokens)
    bias = ((tokens.calls, 3.0), (EOS, 3.0))
    read = []
    for seed in range(6):
        request = make_request(
            prompt(seed), grammar=grammar, temperature=1.0, seed=seed, max_tokens=400, logit_bias=bias
        )
        [output] = bench.run(request)
        assert bench.chunks[request.key][-1].finish_reason == "stop", tokenizer.decode(output)
        assert (tokenizer.tool_tokens.call_id in output) == has_call_id
        reader, detokenizer = SpelledCallReader(grammar), Detokenizer(tokenizer)
        assert "".join(reader.push(i, detokenizer.push(i)) for i in output[:-1]) == ""
        reader.flush(has_ended=True)
        calls = reader.calls.take()
        assert len(calls) == output.count(tokens.calls)
        read.append(len(calls))
        for call in calls:
            assert call.name == "weather"
            jsonschema.validate(json.loads(call.arguments), WEATHER)
    assert max(read) > 1


def test_text_before_spelled_calls_is_free_and_one_call_is_all_without_parallel_ones(spelling):
    bench, tokenizer = Bench(spelling), PreTrainedTokenizerFast.from_pretrained(spelling)
    tokens = replace(HuggingFaceTokenizer(spelling).tool_tokens, call_id=None)
    grammar = tools(required=False, parallel=False, tokens=tokens)
    call = '[TOOL_CALLS]weather[ARGS]{"ville": "Paris", "days": 3}'
    for text, fits in ((f"Well. {call}", True), ("Well.", True), (call + call, False), ("[TOOL_CALLS]x[ARGS]", False)):
        state = bench.grammar_state(make_request(prompt(), grammar=grammar))
        follow(state, [*tokenizer.encode(text, add_special_tokens=False), EOS])
        assert (state.error is None) == fits, text


@pytest.mark.parametrize("text", ["", "Hello", " [TOOL", "[TOOL] x", "a [TOOL_CALLS] b", "Grüße", "[[TOOL_CALLS]"])
def test_text_is_free_when_calls_are_not_required(bench, tokenizer, text):
    request = make_request(prompt(), grammar=tools(required=False))
    state = bench.grammar_state(request)
    follow(state, [*tokenizer.encode(text, add_special_tokens=False), EOS])
    assert state.error is None
    assert state.mask is None, "it has ended"


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        ({"type": "object", "required": ["a"]}, '{"a": 1}', True),
        ({"type": "object", "required": ["a"]}, "{}", False),
        ({"type": "object", "required": ["a"], "additionalProperties": {"type": "null"}}, '{"a": 1}', False),
        ({"type": "string", "minLength": 2}, '"\n\n"', False),
        ({"type": "string", "format": "regex"}, '"\n"', False),
        ({"type": "object"}, '{"a":1,"b":[1, {}]}', True),
        ({"type": "object"}, '{\n"a": 1}', True),
        ({"type": "object"}, '{  "a": 1}', False),
        ({"type": "object"}, "[]", False),
        ({}, "[]", True),
    ],
)
def test_what_a_schema_allows(bench, tokenizer, schema, text, fits):
    state = bench.grammar_state(make_request(prompt(), grammar=as_schema(schema)))
    follow(state, [*tokenizer.encode(text, add_special_tokens=False), EOS])
    assert (state.error is None) == fits


@pytest.mark.parametrize("text", ["[TOOL_CALLS] Hello", " \n[TOOL_CALLS]", "[TOOL_CALLS] []"])
@pytest.mark.parametrize("may_call", [True, False])
def test_text_that_begins_as_a_call_must_be_one(bench, tokenizer, text, may_call):
    grammar = tools(required=False) if may_call else tools(required=False, tools=())
    state = bench.grammar_state(make_request(prompt(), grammar=grammar))
    follow(state, [*tokenizer.encode(text, add_special_tokens=False), EOS])
    assert isinstance(state.error, InvalidRequest)


def mixed_requests():
    """Grammars and none, greedy and sampled."""
    grammars = [None, as_schema(WEATHER), tools(), as_schema(BOUNDED["tree"]), None, tools(required=False)]
    return [
        make_request(
            prompt(i, 5 + 6 * i), grammar=grammars[i % 6], temperature=float(i % 2), seed=i, max_tokens=40, logprobs=2
        )
        for i in range(12)
    ]


@pytest.fixture(scope="module")
def alone(directory):
    return Bench(directory, prefix_caching=False).one_by_one(*mixed_requests())


@cut_by("together", "chunked-prefill", "preempted", "three-at-a-time")
def test_the_same_tokens_however_the_work_is_cut(directory, alone, config):
    bench = Bench(directory, **{"prefix_caching": False, **config})
    assert bench.run(*mixed_requests()) == alone
    if "num_kv_blocks" in config:
        assert bench.engine.stats().preemptions_total > 0, "the test is meant to preempt"


@pytest.mark.parametrize("cut", [1, 9, -1])
def test_a_sequence_continued_elsewhere_stays_in_its_grammar(directory, cut):
    whole = make_request(prompt(), grammar=as_schema(WEATHER), temperature=1.0, seed=3, max_tokens=200)
    [expected] = Bench(directory).run(whole)
    resumed = make_request(
        prompt(), output=expected[:cut], grammar=whole.grammar, temperature=1.0, seed=3, max_tokens=200
    )
    assert Bench(directory).run(resumed) == [expected[cut:]]


def test_log_probabilities_are_those_of_the_raw_logits(directory):
    """The first token of the mask is forced, and its own log-probability is nevertheless the model's."""
    bench = Bench(directory)
    request = make_request(prompt(), grammar=as_schema({"const": "x"}), max_tokens=10, logprobs=1)
    [output] = bench.run(request)
    first = bench.chunks[request.key][0].logprobs[0]
    assert first.token_logprob < first.top[0][1]
    assert first.top[0][0] != output[0]


@pytest.mark.parametrize(
    "sampling",
    [
        {"ignore_eos": True},
        {"min_tokens": 100},
        {"logit_bias": ((EOS, -100.0),)},
        {"logit_bias": tuple((i, 100.0) for i in range(3, 40))},
        {"repetition_penalty": 3.0, "presence_penalty": 2.0},
    ],
    ids=str,
)
def test_a_complete_answer_ends_whatever_else_is_asked(bench, tokenizer, sampling):
    request = make_request(prompt(), grammar=as_schema({"const": "xyz"}), max_tokens=100, **sampling)
    [output] = bench.run(request)
    assert text_of(tokenizer, output) == '"xyz"'
    assert bench.chunks[request.key][-1].finish_reason == "stop"


@pytest.mark.parametrize("sampling", [{"min_tokens": 12}, {"ignore_eos": True, "max_tokens": 12}], ids=str)
def test_an_answer_that_may_go_on_does_until_it_is_long_enough(bench, sampling):
    request = make_request(prompt(), grammar=tools(required=False), logit_bias=((EOS, 100.0),), **sampling)
    [output] = bench.run(request)
    assert len(output) >= 12


def test_a_grammar_that_lets_everything_through_keeps_ignore_eos(tmp_path):
    """Text beside calls between tags that are words, of a vocabulary that is not padded: its answer ended at an end."""
    vocab_size = 313
    write_checkpoint(tmp_path, vocab_size=vocab_size, bos_token_id=0, eos_token_id=EOS)
    write_tokenizer(tmp_path)
    bench = Bench(tmp_path)
    grammar = tools(required=False, tokens=ToolTokens(format="hermes"))
    request = make_request(prompt(), grammar=grammar, temperature=2.0, max_tokens=400, ignore_eos=True)
    assert bench.grammar_state(request).mask is None
    [output] = bench.run(request)
    assert (len(output), EOS in output) == (400, False)


def test_a_user_s_stop_token_ends_within_a_grammar(bench, tokenizer):
    [quote] = tokenizer.encode('"', add_special_tokens=False)
    request = make_request(prompt(), grammar=as_schema({"type": "string"}), stop_token_ids=(quote,))
    assert bench.run(request) == [[quote]]
    assert bench.chunks[request.key][-1].finish_reason == "stop"


def test_max_tokens_cuts(bench):
    request = make_request(prompt(), grammar=as_schema(WEATHER), max_tokens=5)
    [output] = bench.run(request)
    assert len(output) == 5
    assert bench.chunks[request.key][-1].finish_reason == "length"


def test_a_dead_end_fails_its_own_sequence_only(bench, tokenizer):
    """`x` can never be satisfied, which shows only when it is reached."""
    endless = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}}
    endless["required"] = ["x"]
    dead, fine = make_request(prompt(), grammar=as_schema(endless)), make_request(prompt(), grammar=as_schema(WEATHER))
    bench.run(dead, fine)
    assert bench.errors[dead.key].param == "response_format.json_schema.schema"
    assert bench.chunks[fine.key][-1].finish_reason in ("stop", "length")
    assert bench.engine.stats().num_kv_blocks_used == 0


@pytest.mark.parametrize("grammar", [tools(parallel=False), as_schema(BOUNDED["weather"])], ids=["call", "schema"])
def test_a_model_without_an_end_token_ends_where_nothing_may_follow(tmp_path, tokenizer, grammar):
    """It was told that nothing could satisfy the grammar from there on: a call that was forced was answered by 400."""
    write_checkpoint(tmp_path, vocab_size=SIZE + 16, bos_token_id=0, eos_token_id=None)
    file = write_tokenizer(tmp_path) / "tokenizer_config.json"
    told = json.loads(file.read_text())
    del told["eos_token"]
    file.write_text(json.dumps(told))
    bench = Bench(tmp_path)
    request = make_request(prompt(), grammar=grammar, temperature=1.0, max_tokens=300)
    [output] = bench.run(request)
    assert bench.errors == {}
    assert bench.chunks[request.key][-1].finish_reason == "stop"
    assert bench.chunks[request.key][-1].stop_token_id is None
    text = tokenizer.decode(output)
    read = calls_of(text)[0][1] if "TOOL_CALLS" in text else json.loads(text)
    jsonschema.validate(read, WEATHER)
    resumed = make_request(prompt(), output=output, grammar=grammar, temperature=1.0, max_tokens=300)
    assert bench.run(resumed) == [[]]
    assert bench.chunks[resumed.key][-1].finish_reason == "stop"
