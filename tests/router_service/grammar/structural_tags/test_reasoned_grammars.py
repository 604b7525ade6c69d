"""An answer that is held to something, by a model that thinks first: the thought is free, what follows it is not."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerFast

from cluster.messages import ReasonedGrammar, ReasoningTags, TextGrammar, ToolCallGrammar
from router_service.grammar.grammar import param
from router_service.grammar.structural_tags.format import parts
from tests.checkpoints import write_checkpoint
from tests.gateway.doubles import write_tokenizer
from tests.router_service.engines import Bench, follow
from tests.router_service.requests import make_request
from tests.router_service.schemas import as_schema

EOS = 1
THINK = ReasoningTags("<think>", "</think>")
OBJECT = as_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("thinking")
    write_checkpoint(directory, vocab_size=336, bos_token_id=0, eos_token_id=EOS)
    return write_tokenizer(directory, special=["[THINK]", "[/THINK]"], added=["<think>"])  # one tag is a token


@pytest.fixture(scope="module")
def bench(directory):
    return Bench(directory)


@pytest.fixture(scope="module")
def tokenizer(directory):
    return PreTrainedTokenizerFast.from_pretrained(directory)


def fits(bench, tokenizer, grammar, text):
    """Whether it may be the whole of an output."""
    state = bench.grammar_state(make_request((5, 6, 7), grammar=grammar))
    follow(state, [*tokenizer.encode(text, add_special_tokens=False), EOS])
    return state.error is None


@pytest.mark.parametrize(
    ("text", "may_come", "has_begun"),
    [
        ('{"a": 1}', True, False),
        ('<think>\nHm: {"b": <think> [1.\n</think>\n\n{"a": 1}', True, True),
        ('Hm.</think>{"a": 1}', False, True),
        ("<think>Hm.</think>Well.", False, False),
        ("<think>Hm.", False, False),
        ('<think>Hm.</think>\n\n{"b": 1}', False, False),
        ('<think>Hm.</think>{"a": 1}</think>{"a": 1}', False, False),
    ],
)
def test_a_schema_holds_after_the_thought(bench, tokenizer, text, may_come, has_begun):
    assert fits(bench, tokenizer, ReasonedGrammar(THINK, False, OBJECT), text) == may_come
    assert fits(bench, tokenizer, ReasonedGrammar(THINK, True, OBJECT), text) == has_begun


def test_tags_that_are_tokens_are_no_text(bench, tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["[THINK]", "[/THINK]"])
    grammar = ReasonedGrammar(ReasoningTags("[THINK]", "[/THINK]", *ids), False, OBJECT)
    assert fits(bench, tokenizer, grammar, '[THINK]Hm.[/THINK]{"a": 1}')
    assert not fits(bench, tokenizer, grammar, '[THINK]Hm.[/THINK]Hm.[/THINK]{"a": 1}')
    spelled = [*tokenizer.encode("[TH", add_special_tokens=False), *tokenizer.encode("INK]", add_special_tokens=False)]
    state = bench.grammar_state(make_request((5, 6, 7), grammar=grammar))
    follow(state, spelled)
    assert state.error is not None


def test_calls_and_texts_hold_as_well(bench, tokenizer):
    tools = ToolCallGrammar((("f", OBJECT),), required=True)
    call = '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]'
    assert fits(bench, tokenizer, ReasonedGrammar(THINK, False, tools), f"<think>f?</think>\n\n{call}")
    assert not fits(bench, tokenizer, ReasonedGrammar(THINK, False, tools), f"<think>{call}</think>No.")
    choice = ReasonedGrammar(THINK, True, TextGrammar("choice", json.dumps(["yes", "no"]), "guided_choice"))
    assert fits(bench, tokenizer, choice, "Is it?\n</think>\n\nyes")
    assert not fits(bench, tokenizer, choice, "Is it?\n</think>\n\nperhaps")


def test_an_error_names_the_field_of_the_answer():
    text = TextGrammar("regex", "a", "guided_regex")
    grammar = ReasonedGrammar(THINK, True, text)
    assert (param(grammar), parts(grammar)) == ("guided_regex", (text,))
