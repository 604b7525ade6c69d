"""`structured_outputs` and its like in everybody's words: done at both doors, for both routes, or refused by name."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import grpc
import httpx
import pytest

from cluster.messages import Answer, JsonSchema, TextGrammar, ToolCallGrammar
from gateway.frontend import Frontend
from gateway.grpc.proto import chat_pb2
from gateway.request.ebnf import MAX_RULES, read_rules
from gateway.request.text_grammar import MAX_BYTES, MAX_CHOICES, MAX_REGEX_CHARS
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, model_card, tokens_script
from tests.gateway.grpc.test_grpc import USER
from tests.gateway.http.test_http import sse

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi"}
PATHS = ("/v1/chat/completions", "/v1/completions")
SCHEMA = {"type": "object", "properties": {"a": {"type": "null"}}}
OBJECT = '{"type": "object"}'
RULES = 'root ::= "yes" | "no"'
READ = 'root ::= r0\nr0 ::= ("yes" | "no")'
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def schema(param: str, **options: Any) -> JsonSchema:
    return JsonSchema(json.dumps(SCHEMA), param, **options)


def outputs(**options: Any) -> dict[str, Any]:
    return {"structured_outputs": options}


DONE: list[tuple[dict[str, Any], Answer | None]] = [
    # vLLM's
    (outputs(json=SCHEMA), schema("structured_outputs.json")),
    (outputs(json=json.dumps(SCHEMA)), schema("structured_outputs.json")),
    (outputs(json_object=True), JsonSchema(OBJECT, "structured_outputs.json_object")),
    (outputs(regex="[a-z]+"), TextGrammar("regex", "[a-z]+", "structured_outputs.regex")),
    (outputs(choice=["é", "no", "é"]), TextGrammar("choice", '["é", "no"]', "structured_outputs.choice")),
    (outputs(grammar=RULES), TextGrammar("ebnf", READ, "structured_outputs.grammar")),
    (outputs(json=SCHEMA, disable_any_whitespace=True), schema("structured_outputs.json", any_whitespace=False)),
    (
        outputs(regex="a", json=None, json_object=False, disable_any_whitespace=True, disable_fallback=True),
        TextGrammar("regex", "a", "structured_outputs.regex"),
    ),
    (outputs(), None),
    (outputs(disable_additional_properties=False, whitespace_pattern=None), None),
    ({"guided_json": SCHEMA, "guided_decoding_backend": "outlines"}, schema("guided_json")),
    ({"guided_json": json.dumps(SCHEMA)}, schema("guided_json")),
    ({"guided_regex": r"\d+"}, TextGrammar("regex", r"\d+", "guided_regex")),
    ({"guided_choice": ["", "a"]}, TextGrammar("choice", '["", "a"]', "guided_choice")),
    ({"guided_grammar": RULES}, TextGrammar("ebnf", READ, "guided_grammar")),
    # SGLang's
    ({"regex": "a|b"}, TextGrammar("regex", "a|b", "regex")),
    ({"ebnf": RULES}, TextGrammar("ebnf", READ, "ebnf")),
    ({"json_schema": json.dumps(SCHEMA)}, schema("json_schema")),
    # llama.cpp's
    ({"json_schema": SCHEMA}, schema("json_schema")),
    ({"grammar": RULES}, TextGrammar("ebnf", READ, "grammar")),
    ({"grammar": "", "json_schema": SCHEMA}, schema("json_schema")),
    ({"grammar": "", "json_schema": "", "regex": "", "ebnf": ""}, None),
    # TGI's
    ({"grammar": {"type": "json", "value": SCHEMA}}, schema("grammar.value")),
    ({"grammar": {"type": "json_schema", "value": {"schema": SCHEMA}}}, schema("grammar.value.schema")),
    ({"grammar": {"type": "regex", "value": "a"}}, TextGrammar("regex", "a", "grammar.value")),
    # OpenAI's, which of completions was refused
    ({"response_format": {"type": "json_object"}}, JsonSchema(OBJECT, "response_format")),
    ({"response_format": {"type": "text"}, "regex": "a"}, TextGrammar("regex", "a", "regex")),
]

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    # Not enforced exactly, so not taken.
    (outputs(regex="(?=a)b"), "structured_outputs.regex", "only plain groups"),
    (outputs(regex=r"\bword\b"), "structured_outputs.regex", "is not supported"),
    (outputs(regex=r"(a)\1"), "structured_outputs.regex", "is not supported"),
    (outputs(regex="("), "structured_outputs.regex", "ends too early|without its"),
    (outputs(regex="a{100001}"), "structured_outputs.regex", "at most 100000 repetitions"),
    (outputs(regex=""), "structured_outputs.regex", "expected a regular expression"),
    (outputs(regex=5), "structured_outputs.regex", "expected a regular expression"),
    (outputs(json={"not": {}}), "structured_outputs.json", "not supported"),
    (outputs(json="{"), "structured_outputs.json", "expected a JSON Schema"),
    (outputs(json="[" * 5000), "structured_outputs.json", "expected a JSON Schema"),
    (outputs(json="[]"), "structured_outputs.json", "expected a JSON Schema"),
    (outputs(json_object=1), "structured_outputs.json_object", "expected true or false"),
    (outputs(choice=[]), "structured_outputs.choice", "expected a list of texts"),
    (outputs(choice="yes"), "structured_outputs.choice", "expected a list of texts"),
    (outputs(choice=["a", 1]), "structured_outputs.choice", "expected a list of texts"),
    (outputs(grammar="start: /a/"), "structured_outputs.grammar", "line 1: "),  # Lark's
    (outputs(grammar='root ::= "a" (="b")'), "structured_outputs.grammar", "is not supported"),
    (outputs(grammar='root ::= Regex("a")'), "structured_outputs.grammar", "no rule 'Regex'"),
    (outputs(structural_tag="{}"), "structured_outputs.structural_tag", "not supported"),
    (outputs(json=SCHEMA, whitespace_pattern=" *"), "structured_outputs.whitespace_pattern", "not supported"),
    (outputs(disable_additional_properties=True), "structured_outputs.disable_additional_properties", "not supported"),
    (outputs(disable_any_whitespace="yes"), "structured_outputs.disable_any_whitespace", "expected true or false"),
    (outputs(reg_ex="a"), "structured_outputs.reg_ex", "not supported"),
    ({"structured_outputs": "json"}, "structured_outputs", "expected an object"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "not supported"),
    ({"structural_tag": "{}"}, "structural_tag", "not supported"),
    ({"grammar": {"type": "lark", "value": ""}}, "grammar", "expected rules"),
    ({"grammar": ["root"]}, "grammar", "expected rules"),
    # Too large.
    ({"regex": "a" * (MAX_REGEX_CHARS + 1)}, "regex", "at most 4096 characters"),
    ({"guided_choice": ["a"] * (MAX_CHOICES + 1)}, "guided_choice", "at most 2000 entries"),
    ({"guided_choice": ["a" * (MAX_BYTES // 2)] * 3}, "guided_choice", "at most 65536 bytes"),
    ({"ebnf": "#" * (MAX_BYTES + 1)}, "ebnf", "at most 65536 bytes"),
    # Two at once: both are named.
    (outputs(json=SCHEMA, regex="a"), "structured_outputs.regex", "not together with structured_outputs.json"),
    ({"regex": "a", "ebnf": RULES}, "ebnf", "not together with regex"),
    ({"guided_choice": ["a"], "response_format": {"type": "json_object"}}, "guided_choice", "with response_format"),
    ({**outputs(regex="a"), "grammar": RULES}, "grammar", "not together with structured_outputs"),
]


@pytest.fixture(scope="module")
def coordinator() -> ScriptedCoordinator:
    return ScriptedCoordinator(tokens_script([40, 41, 42]))


@pytest.fixture(scope="module")
def frontend(request: pytest.FixtureRequest, coordinator: ScriptedCoordinator) -> Frontend:
    card = model_card(request.getfixturevalue("tokenizer_directory"), max_model_len=512)
    return build_frontend(card, coordinator)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("fields", "expected"), DONE, ids=lambda one: str(one)[:50])
def test_every_spelling_holds_the_answer(
    url: str, coordinator: ScriptedCoordinator, path: str, fields: dict[str, Any], expected: Answer | None
) -> None:
    """They were refused by name."""
    assert httpx.post(url + path, json=CHAT | fields).status_code == 200
    assert coordinator.requests[-1].grammar == expected
    assert sse(httpx.post(url + path, json=CHAT | fields | {"stream": True}).text)
    assert coordinator.requests[-1].grammar == expected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("fields", "param", "message"), REFUSED, ids=lambda one: str(one)[:50])
def test_what_cannot_be_held_to_is_refused_by_name(
    url: str, coordinator: ScriptedCoordinator, path: str, fields: dict[str, Any], param: str, message: str
) -> None:
    before = len(coordinator.requests)
    answer = httpx.post(url + path, json=CHAT | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(f"{param}")
    assert re.search(message, error["message"]), error["message"]
    assert len(coordinator.requests) == before, "nothing was generated"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_beside_calls_that_are_required_there_is_no_text_to_hold(url: str, choice: object) -> None:
    asked = CHAT | {"tools": TOOLS, "tool_choice": choice}
    for fields, param in ((outputs(regex="a"), "structured_outputs"), ({"ebnf": RULES}, "ebnf")):
        answer = httpx.post(url + PATHS[0], json=asked | fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert "tool_choice" in answer.json()["error"]["message"]
    assert httpx.post(url + PATHS[0], json=asked | {"response_format": {"type": "json_object"}}).status_code == 200


def test_beside_tools_that_may_be_called_a_text_is_held_to_it(url: str, coordinator: ScriptedCoordinator) -> None:
    assert httpx.post(url + PATHS[0], json=CHAT | {"tools": TOOLS, "regex": "a"}).status_code == 200
    grammar = coordinator.requests[-1].grammar
    assert isinstance(grammar, ToolCallGrammar)
    assert grammar.answer == TextGrammar("regex", "a", "regex")
    asked = CHAT | {"tools": TOOLS, "tool_choice": "none", "regex": "a"}
    assert httpx.post(url + PATHS[0], json=asked).status_code == 200
    assert coordinator.requests[-1].grammar == TextGrammar("regex", "a", "regex")


def test_grpc_holds_answers_as_http_does(stub: Any, coordinator: ScriptedCoordinator) -> None:
    def ask(expected: Answer | None, **fields: Any) -> None:
        held = chat_pb2.StructuredOutputs(**fields)
        stub.Chat(chat_pb2.ChatRequest(messages=USER, structured_outputs=held), timeout=30)
        chat = coordinator.requests[-1].grammar
        stub.Generate(chat_pb2.GenerateRequest(text="Hi", structured_outputs=held), timeout=30)
        assert coordinator.requests[-1].grammar == chat == expected

    for fields, expected in DONE:
        options = {name: value for name, value in fields.get("structured_outputs", {}).items() if value is not None}
        if "choice" in options:
            options["choice"] = chat_pb2.Choices(choices=options["choice"])
        if options and not options.keys() - {field.name for field in chat_pb2.StructuredOutputs.DESCRIPTOR.fields}:
            ask(expected, **options | ({"json": json.dumps(SCHEMA)} if "json" in options else {}))
    any_object = chat_pb2.ResponseFormat(type="json_object")
    stub.Generate(chat_pb2.GenerateRequest(text="Hi", response_format=any_object), timeout=30)
    assert coordinator.requests[-1].grammar == JsonSchema(OBJECT, "response_format")
    for wrong, message in (
        ({"regex": "("}, "structured_outputs.regex: "),
        ({"json": "{"}, "structured_outputs.json: "),
    ):
        with pytest.raises(grpc.RpcError, match=message) as raised:
            ask(None, **wrong)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    both = chat_pb2.ChatRequest(
        messages=USER, response_format=any_object, structured_outputs=chat_pb2.StructuredOutputs(regex="a")
    )
    with pytest.raises(grpc.RpcError, match="structured_outputs: not together with response_format"):
        stub.Chat(both, timeout=30)


def test_a_space_that_an_answer_begins_with_is_text(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Chats drop the space that a vocabulary puts before a first word; an expression has asked for it."""
    directory = _vocabulary_of_words(tmp_path_factory.mktemp("words"))
    tokenizer = HuggingFaceTokenizer(directory)
    [oui] = tokenizer.encode("oui", add_special_tokens=False)
    assert tokenizer.token_bytes(oui) == b" oui"
    coordinator = ScriptedCoordinator(tokens_script([oui]))
    with http_server(build_frontend(model_card(directory), coordinator)) as url:
        for fields, text in (({}, "oui"), ({"regex": " oui"}, " oui"), ({"json_schema": SCHEMA}, "oui")):
            asked = CHAT | {"messages": [{"role": "user", "content": "oui"}]} | fields
            answer = httpx.post(url + PATHS[0], json=asked).json()
            assert answer["choices"][0]["message"]["content"] == text


def _vocabulary_of_words(directory: Any) -> Any:
    """A tokenizer in SentencePiece's manner: ▁ before a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.gateway.doubles import CHAT_TEMPLATE

    rust = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "▁oui": 3}, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Metaspace()
    rust.add_special_tokens(["<s>", "</s>", "<unk>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(directory))
    return directory


# ── Rules ──


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('root ::= "a"', '"a"'),
        (
            'root ::=\n  "a" # a comment\n  | [b-d^] .?\nunused ::= "x"',
            '("a" | [\\u005eb-d] [\\u0000-\\ud7ff\\ue000-\\U0010ffff]{0,1})',
        ),
        (r'root ::= "\"\\\n\t\x41é\u00e9\U0001F600"', '"\\u0022\\u005c\\u000a\\u0009A\\u00e9\\u00e9\\U0001f600"'),
        ('root ::= "a\nb"', '"a\\u000ab"'),  # what a Python string made of a line's end
        ('root ::= ("a" | "bc"){2,} "d"{3} root*', '("a" | "bc"){2,} "d"{3,3} r0{0,}'),
        ('root ::= "" | ()', '("" | "")'),
        (r"root ::= [^\]\-x]", "[\\u0000-\\u002c\\u002e-\\u005c\\u005e-wy-\\ud7ff\\ue000-\\U0010ffff]"),
    ],
)
def test_rules_are_read_as_gbnf(text: str, expected: str) -> None:
    assert read_rules(text) == f"root ::= r0\nr0 ::= {expected}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rule 'root'"),
        ('start ::= "a"', "no rule 'root'"),
        ("root ::= x", "no rule 'x', to which 'root' refers"),
        ("root ::= root", "'root' never ends"),
        ('root ::= "a" | "b" x\nx ::= "c" x', "'x' never ends"),
        ('root ::= "a"\nroot ::= "b"', "line 2: a second rule"),
        ('root ::= ("a"', "a group without its '\\)'"),
        ('root ::= "a")', "closes nothing"),
        ('root ::= "a', "is not supported"),
        ("root ::= 'a'", "is not supported"),
        ("root ::= [z-a]", "a range of characters that is none"),
        ("root ::= []", "a set of characters that is empty"),
        (r'root ::= "\d"', "escape"),
        (r'root ::= "\x414"', "escape"),  # two digits to some, three to others
        (r'root ::= "\ud800"', "is no character"),
        ('root ::= "a"{3,1}', "more than its most"),
        ('root ::= "a"{100001}', "at most 100000 repetitions"),
        ("root ::= *", "repeats nothing"),
        ('root ::= "a"**', "needs a group"),
        ('root ::= "a"\n::= "b"', "without a name"),
        ("root ::= <[1000]>", "is not supported"),
        (f"root ::= {'(' * 41}", "groups deeper than 40"),
        ("".join(f'r{i} ::= "a"\n' for i in range(MAX_RULES + 1)), "at most 2000 rules"),
    ],
)
def test_what_are_no_rules_is_told_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rules(text)


def test_no_rules_recurse_in_python() -> None:
    chain = "\n".join(f'r{i} ::= "a" r{i + 1}' for i in range(MAX_RULES - 2))
    assert read_rules(f'root ::= r0\n{chain}\nr{MAX_RULES - 2} ::= "b"').count("\n") == MAX_RULES
    with pytest.raises(ValueError, match="line 1: "):
        read_rules("(" * MAX_BYTES)


def test_rules_that_one_rule_waits_for_in_turn_are_read_at_once() -> None:
    """44 KB took minutes: whenever one of a chain was known to end, the long rule that uses all was gone through."""
    num = 1900
    chain = "\n".join(f"r{i} ::= r{i + 1}" for i in range(num - 1))
    rules = f'root ::= {" | ".join(f"root r{i}" for i in range(num))}\n{chain}\nr{num - 1} ::= "a"'
    started = time.process_time()
    with pytest.raises(ValueError, match="'root' never ends"):
        read_rules(rules)
    assert read_rules(rules.replace("root r7 ", "r7 ")).count("\n") == num + 1
    assert time.process_time() - started < 10
