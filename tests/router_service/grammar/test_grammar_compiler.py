"""Compiling grammars: hostile schemas fail in bounded time and name their field, and nobody else waits for them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time

import psutil
import pytest

from cluster.errors import InvalidRequest, Overloaded
from cluster.messages import ToolCallGrammar
from gateway.request.text_grammar import MAX_BYTES, MAX_CHOICES, checked_choice
from router_service.grammar import trial
from router_service.grammar.compiler import GrammarCompiler
from router_service.grammar.cost import is_plain
from router_service.grammar.rules.schema import schema_grammar
from router_service.grammar.vocabulary import GrammarVocabulary, compile_tag, new_compiler
from tests.gateway.doubles import write_tokenizer
from tests.processes import has_ended
from tests.router_service.requests import make_request
from tests.router_service.schemas import LIKE_WORDS, WEATHER, as_schema
from tests.waiting import wait_for

TIMEOUT_S = 1.0
LONG_S = 600.0  # a test of ours waits no longer; the machine may be busy


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    directory = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return GrammarVocabulary(str(directory), "huggingface", 320, (1,))


@pytest.fixture(scope="module")
def compiler(vocabulary):
    compiler = GrammarCompiler(vocabulary, timeout_s=TIMEOUT_S, token_timeout_s=1.0, cache_bytes=2**24)
    yield compiler
    compiler.close()


def nested_repetition(times):
    return {"type": "string", "pattern": f"^(((a*){{1,{times}}}){{1,{times}}}){{1,{times}}}$"}


HOSTILE = {
    "a pattern that explodes": nested_repetition(100),
    "the same, out of a walk's reach": {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": nested_repetition(100)},
        "required": ["a", "b"],
    },
    "not a pattern": {"type": "string", "pattern": "(((("},
    "look-ahead": {"type": "string", "pattern": "^(?=a)b$"},
    "an unknown type": {"type": "banana"},
    "a reference to nothing": {"$ref": "#/$defs/nothing"},
    "a reference to itself": {"$ref": "#"},
    "nothing fits": {"enum": []},
    "a huge pattern": {"type": "string", "pattern": "^" + "((a|b?){1,99}c?){1,99}" * 20 + "$"},
}


async def state(compiler, grammar):
    async with asyncio.timeout(LONG_S):
        return await compiler.state(make_request([5], grammar=grammar))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused_in_bounded_time_and_others_go_on(compiler, name):
    async def scenario():
        hostile = asyncio.create_task(state(compiler, as_schema(HOSTILE[name])))
        for i in range(3):  # a plain one needs no trial, so it does not queue behind
            await state(compiler, as_schema({"const": f"{name} {i}"}))
        with pytest.raises(InvalidRequest) as raised:
            await hostile
        assert raised.value.param == "response_format.json_schema.schema"
        assert raised.value.message.startswith("response_format.json_schema.schema: ")

    asyncio.run(scenario())


@pytest.mark.parametrize("name", [*LIKE_WORDS, "pattern", "minLength", "anyOf", "properties", "propertyNames"])
def test_a_property_called_like_a_word_of_schemas_compiles(compiler, name):
    schema = {"type": "object", "properties": {name: {"type": "string", "default": {name: 1}}}, "required": [name]}
    assert is_plain([schema])
    asyncio.run(state(compiler, as_schema(schema)))
    asyncio.run(state(compiler, ToolCallGrammar(tools=(("f", as_schema(schema)),), required=False)))


def test_objects_that_may_have_other_properties_than_many_are_compiled_on_trial_first():
    """Other names have to be told from each of these, which costs; only a trial can be stopped."""
    properties = {f"{i}" * 8: {} for i in range(60)}
    assert is_plain([{"properties": properties, "additionalProperties": False}])
    assert not is_plain([{"properties": properties}])


def test_what_takes_long_to_spell_is_stopped_as_well(compiler, monkeypatch):
    """Only compiling was on trial. Spelling one schema took the coordinator's interpreter half a minute."""
    monkeypatch.setattr(compiler._trial, "_timeout_s", 0.5)
    multiples = {"type": "integer", "minimum": 0, "maximum": 10**15, "multipleOf": 113}
    started = time.process_time()
    with pytest.raises(InvalidRequest, match="takes longer than"):
        asyncio.run(state(compiler, as_schema({"prefixItems": [multiples] * 700})))
    assert time.process_time() - started < 4
    assert is_plain([{"prefixItems": [{"minimum": 1.5}] * 20}])
    assert not is_plain([{"prefixItems": [{"minimum": 1.5}] * 21}])


def test_a_busy_machine_makes_no_grammar_too_costly(vocabulary, monkeypatch):
    """The limit was of the clock alone: what takes a tenth of it was refused for good where the machine was busy."""
    hold, timeout_s, before = trial._hold, 0.4, {child.pid for child in psutil.Process().children()}

    def held(*arguments):
        os.kill(os.getpid(), signal.SIGSTOP)
        hold(*arguments)

    def go_on():
        def stopped():
            children = [child for child in psutil.Process().children() if child.pid not in before]
            return [child for child in children if child.status() == psutil.STATUS_STOPPED]

        wait_for(stopped, 60, "the trial")
        time.sleep(timeout_s + 0.3)
        stopped()[0].resume()

    monkeypatch.setattr(trial, "_hold", held)
    machine = threading.Thread(target=go_on)
    machine.start()
    verdict = trial._trial(vocabulary.tokenizer_info(), as_schema({"type": "string", "pattern": "^a$"}), timeout_s)
    machine.join()
    assert (verdict["error"], verdict["is_late"]) == (None, False)


def test_a_trial_that_gets_no_time_says_nothing_of_its_grammar(compiler, monkeypatch):
    monkeypatch.setattr(trial, "_GRACE_S", 0.2)
    monkeypatch.setattr(trial, "_hold", lambda *_: time.sleep(LONG_S))
    verdict = trial._trial(None, as_schema({}), 0.4)
    assert verdict["is_late"]
    monkeypatch.setattr(compiler._trial, "_ask", lambda _: verdict)
    starved = as_schema({"type": "string", "pattern": "^[g-k]{2}$"})
    with pytest.raises(Overloaded, match="too busy"):
        asyncio.run(state(compiler, starved))
    monkeypatch.undo()
    assert asyncio.run(state(compiler, starved)) is not None, "it is not kept"


def test_as_many_texts_as_may_be_are_compiled_without_a_trial(compiler, monkeypatch):
    """2,000 timed out on a busy machine: they were tried as an expression is. What they cost grows with their bytes."""
    monkeypatch.setattr(compiler._trial, "run", lambda _: pytest.fail("it was on trial"))
    draw = random.Random(0)
    for texts in (
        ["".join(draw.choices("abcdefghij ", k=32)) for _ in range(MAX_CHOICES)],
        ["a" * i for i in range(1, 360)],
        ["ab" * (MAX_BYTES // 2)],
    ):
        started = time.process_time()
        assert asyncio.run(state(compiler, checked_choice(texts, "guided_choice"))) is not None
        assert time.process_time() - started < 10, "it takes half a second"


def test_no_client_reads_the_words_of_the_library(vocabulary):
    """`Failed to build the automaton for rule root_0 …`: of names and places that are ours."""
    tag = json.dumps({"type": "structural_tag", "format": {"type": "grammar", "grammar": 'root ::= Regex("(")'}})
    with pytest.raises(ValueError, match=r"^no grammar can be made of it$"):
        compile_tag(new_compiler(vocabulary.tokenizer_info()), tag)


def test_a_long_name_costs_a_grammar_no_more_than_a_short_one():
    """Each beginning of it was spelled by itself: 60,000 characters took gigabytes."""
    one = schema_grammar({"properties": {"a" * 60_000: {"const": 1}}})
    assert len(one) < 2 * 60_000 + 5_000


def test_a_refusal_is_kept_so_that_the_same_schema_costs_nothing_again(compiler):
    async def scenario():
        with pytest.raises(InvalidRequest):
            await state(compiler, as_schema(nested_repetition(99)))
        started = time.thread_time()
        for _ in range(50):
            with pytest.raises(InvalidRequest):
                await state(compiler, as_schema(nested_repetition(99)))
        assert time.thread_time() - started < TIMEOUT_S

    asyncio.run(scenario())


def test_a_costly_schema_that_is_fine_compiles_after_a_hostile_one(compiler):
    async def scenario():
        with pytest.raises(InvalidRequest):
            await state(compiler, as_schema(nested_repetition(98)))
        fine = as_schema({"type": "object", "properties": {"code": {"type": "string", "pattern": "^[A-Z]{2,9}$"}}})
        assert await state(compiler, fine) is not None

    asyncio.run(scenario())


def test_the_choices_of_a_request_share_one_compilation(compiler):
    async def scenario():
        grammar = as_schema({"const": "shared"})
        states = await asyncio.gather(*(state(compiler, grammar) for _ in range(8)))
        assert len({id(one) for one in states}) == 8
        assert not compiler._pending

    asyncio.run(scenario())


def test_a_wrong_tool_is_named(compiler):
    tools = (
        ("a", as_schema(WEATHER, "tools[0].function.parameters")),
        ("b", as_schema({"type": "banana"}, "tools[1].function.parameters")),
        ("c", as_schema(nested_repetition(100), "tools[2].function.parameters")),
    )

    async def scenario(tools, index):
        with pytest.raises(InvalidRequest) as raised:
            await state(compiler, ToolCallGrammar(tools=tools, required=True))
        assert raised.value.param == f"tools[{index}].function.parameters"

    itself = ("d", as_schema({"$ref": "#"}, "tools[1].function.parameters"))
    asyncio.run(scenario(tools[:2], 1))
    asyncio.run(scenario((tools[0], itself), 1))
    asyncio.run(scenario((tools[0], tools[2]), 2))


def test_a_killed_trial_process_is_started_again(compiler):
    grammars = [as_schema({"type": "string", "pattern": f"^[a-z]{{{i}}}$"}) for i in (3, 4, 5)]

    async def scenario():
        await state(compiler, grammars[0])
        psutil.Process(compiler._trial._process.pid).kill()
        compiler._trial._process.wait()
        with pytest.raises(Exception, match="does not answer"):
            await state(compiler, grammars[1])
        assert await state(compiler, grammars[1]) is not None
        assert await state(compiler, grammars[2]) is not None

    asyncio.run(scenario())


def test_the_cache_is_bounded_by_bytes(vocabulary):
    compiler = GrammarCompiler(vocabulary, timeout_s=TIMEOUT_S, token_timeout_s=1.0, cache_bytes=200_000)

    async def scenario():
        for i in range(30):
            await state(compiler, as_schema({**WEATHER, "title": str(i)}))
        assert compiler._cached_bytes <= 200_000
        assert compiler._cached_bytes == sum(size for size, _ in compiler._cache.values())
        assert 0 < len(compiler._cache) < 30

    asyncio.run(scenario())
    compiler.close()


def test_past_the_bound_of_pending_grammars_more_are_refused(vocabulary):
    compiler = GrammarCompiler(vocabulary, timeout_s=TIMEOUT_S, token_timeout_s=1.0, cache_bytes=2**20)

    async def scenario():
        results = await asyncio.gather(
            *(state(compiler, as_schema({"const": i})) for i in range(100)), return_exceptions=True
        )
        assert {type(result) for result in results if isinstance(result, Exception)} == {Overloaded}

    asyncio.run(scenario())
    compiler.close()


def test_one_key_s_grammars_do_not_keep_another_s_waiting(vocabulary, monkeypatch):
    """64 costly ones of one key, ten seconds each, and everybody else was refused or waited for all of them."""
    compiler = GrammarCompiler(vocabulary, timeout_s=TIMEOUT_S, token_timeout_s=1.0, cache_bytes=2**20)
    order: list[str] = []
    compile_here = compiler._compile_here
    monkeypatch.setattr(
        compiler, "_compile_here", lambda one, plain: order.append(one.text) or compile_here(one, plain)
    )

    async def scenario():
        burst = [
            asyncio.create_task(compiler.state(make_request([5], grammar=as_schema({"const": i}), cache_salt="alice")))
            for i in range(100)
        ]
        await asyncio.sleep(0)
        other = as_schema({"const": "bob's"})
        await compiler.state(make_request([5], grammar=other, cache_salt="bob"))
        assert order.index(other.text) <= 2, "after the one that was at work"
        results = await asyncio.gather(*burst, return_exceptions=True)
        assert sum(isinstance(result, Overloaded) for result in results) == 36
        assert not compiler._pending

    asyncio.run(scenario())
    compiler.close()


def test_closing_leaves_no_process(vocabulary):
    compiler = GrammarCompiler(vocabulary, timeout_s=TIMEOUT_S, token_timeout_s=1.0, cache_bytes=2**20)
    asyncio.run(state(compiler, as_schema({"type": "string", "pattern": "^a{3}$"})))
    child = psutil.Process(compiler._trial._process.pid)
    compiler.close()
    assert has_ended(child)
