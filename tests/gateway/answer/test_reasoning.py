"""What a model thought comes apart from its answer: at every door, streamed or whole, as each API names it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.config import GatewayConfig
from cluster.errors import InvalidRequest
from cluster.messages import JsonSchema, Parsers, ReasonedGrammar, Request, TokenChunk, ToolCallGrammar
from gateway.answer.chat import ChoiceText
from gateway.answer.choice import Choice, Usage
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.request.protocol import ChatCompletionRequest, parse_body
from gateway.request.validator import Generation, Validator
from gateway.text.reasoning import Reasoning
from gateway.text.tokenizer import HuggingFaceTokenizer, MistralTokenizer, Tokenizer
from tests.gateway.answer.test_round_trip import LAYOUTS, Saying, tekken
from tests.gateway.chat_formats import write_deepseek_r1, write_qwen3
from tests.gateway.doubles import build_frontend, http_server, model_card, write_tokenizer
from tests.gateway.grpc.test_grpc import grpc_server

USER: Any = {"role": "user", "content": "Six times seven?"}
CHAT: Any = {"model": "tiny", "messages": [USER]}
THOUGHT, ANSWER = "Six sevens:\n\n42, I think.", "Forty-two,\nle français. STOP here"
WRITTEN = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(directory)


@pytest.fixture(scope="module")
def doors(directory: Path) -> Iterator[tuple[Saying, openai.OpenAI, Any]]:
    saying = Saying()
    frontend = build_frontend(model_card(directory, vocab_size=400, max_model_len=4096), saying.coordinator)
    with (
        http_server(frontend) as url,
        grpc_server(frontend) as channel,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield saying, client, chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True)
def says(doors: tuple[Saying, openai.OpenAI, Any], tokenizer: HuggingFaceTokenizer) -> Saying:
    saying = doors[0]
    saying.token_ids, saying.is_cut = list(tokenizer.encode(WRITTEN, add_special_tokens=False)), False
    return saying


def num_reasoning(tokenizer: Tokenizer) -> int:
    return len(tokenizer.encode(f"<think>\n{THOUGHT}\n</think>", add_special_tokens=False))


def streamed(client: openai.OpenAI, **fields: Any) -> tuple[list[dict[str, str]], Any]:
    """What each choice's deltas add up to, and the usage."""
    usage = None
    choices: list[dict[str, str]] = [{} for _ in range(fields.get("n", 1))]
    for chunk in client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}, **fields):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            for name, piece in choice.delta.model_dump(exclude_unset=True).items():
                if isinstance(piece, str) and name != "role":
                    choices[choice.index][name] = choices[choice.index].get(name, "") + piece
    return choices, usage


def test_a_chat_s_reasoning_has_fields_of_its_own(doors: Any, tokenizer: Tokenizer) -> None:
    _, client, _ = doors
    answer = client.chat.completions.create(**CHAT, n=2)
    for choice in answer.choices:
        assert (choice.message.content, choice.finish_reason) == (ANSWER, "stop")
        assert choice.message.reasoning_content == choice.message.reasoning == THOUGHT
    assert answer.usage.completion_tokens_details.reasoning_tokens == 2 * num_reasoning(tokenizer)
    choices, usage = streamed(client, n=2)
    assert choices == [{"reasoning_content": THOUGHT, "reasoning": THOUGHT, "content": ANSWER}] * 2
    assert usage.completion_tokens_details.reasoning_tokens == 2 * num_reasoning(tokenizer)


def test_a_chunk_of_reasoning_has_no_content(doors: Any) -> None:
    """A client that shows whatever has content would begin an empty answer."""
    _, client, _ = doors
    _, *chunks = client.chat.completions.create(**CHAT, stream=True)
    assert all("content" not in c.choices[0].delta.model_fields_set for c in chunks if c.choices[0].delta.model_extra)


def test_stop_strings_end_the_answer_and_no_thought(doors: Any) -> None:
    _, client, _ = doors
    message = client.chat.completions.create(**CHAT, stop=["\n\n", "42", "STOP"]).choices[0].message
    assert (message.reasoning_content, message.content) == (THOUGHT, "Forty-two,\nle français. ")


def test_reasoning_that_max_tokens_cuts_is_reasoning(doors: Any, tokenizer: Tokenizer) -> None:
    _, client, _ = doors
    answer = client.chat.completions.create(**CHAT, max_tokens=12)
    [choice] = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("", "length")
    assert len(choice.message.reasoning_content) > 5
    assert THOUGHT.startswith(choice.message.reasoning_content)
    assert answer.usage.completion_tokens_details.reasoning_tokens == answer.usage.completion_tokens == 12


def test_reasoning_may_be_left_out(doors: Any, tokenizer: Tokenizer) -> None:
    """As vLLM has it. It was generated, so it counts."""
    _, client, stub = doors
    answer = client.chat.completions.create(**CHAT, extra_body={"include_reasoning": False})
    assert answer.choices[0].message.content == ANSWER
    assert not {"reasoning", "reasoning_content"} & answer.choices[0].message.model_fields_set
    assert answer.usage.completion_tokens_details.reasoning_tokens == num_reasoning(tokenizer)
    [without], _ = streamed(client, extra_body={"include_reasoning": False})
    assert without == {"content": ANSWER}
    user = chat_pb2.Message(role="user", content="Hi")
    [whole] = stub.Chat(chat_pb2.ChatRequest(model="tiny", messages=[user], include_reasoning=False)).choices
    assert (whole.text, whole.reasoning_content) == (ANSWER, "")


def test_an_answer_without_reasoning_says_so(doors: Any, tokenizer: Tokenizer, says: Saying) -> None:
    _, client, _ = doors
    says.token_ids = list(tokenizer.encode("42 <think>", add_special_tokens=False))
    answer = client.chat.completions.create(**CHAT)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("42 <think>", None, None)
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_every_token_of_a_thought_has_its_log_probability(doors: Any, says: Saying) -> None:
    _, client, _ = doors
    [choice] = client.chat.completions.create(**CHAT, logprobs=True).choices
    assert len(choice.logprobs.content) == len(says.token_ids) + 1


def test_responses_have_an_item_of_reasoning(doors: Any, tokenizer: Tokenizer) -> None:
    _, client, _ = doors
    answer = client.responses.create(model="tiny", input=[USER], include=["message.output_text.logprobs"])
    thought, message = answer.output
    assert (thought.type, thought.status, thought.summary) == ("reasoning", "completed", [])
    assert [(part.type, part.text) for part in thought.content] == [("reasoning_text", THOUGHT)]
    assert (message.type, answer.output_text) == ("message", ANSWER)
    assert answer.usage.output_tokens_details.reasoning_tokens == num_reasoning(tokenizer)
    said = b"".join(bytes(one.bytes) for one in message.content[0].logprobs).decode()
    assert said.strip() == ANSWER, "and not what was thought"


def test_responses_stream_reasoning_as_openai_s_client_has_it(doors: Any) -> None:
    _, client, _ = doors
    with client.responses.stream(model="tiny", input=[USER]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1]] == [
        *("response.created", "response.in_progress"),
        *("response.output_item.added", "response.content_part.added", "response.reasoning_text.delta"),
        *("response.reasoning_text.done", "response.content_part.done", "response.output_item.done"),
        *("response.output_item.added", "response.content_part.added", "response.output_text.delta"),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == THOUGHT
    assert [item.type for item in final.output] == ["reasoning", "message"]
    assert final.output_text == ANSWER
    ids = {event.item_id for event in events if "reasoning_text" in event.type}
    assert ids == {final.output[0].id}


def test_a_response_that_ends_in_its_reasoning_is_incomplete_and_has_no_message(doors: Any) -> None:
    _, client, _ = doors
    answer = client.responses.create(model="tiny", input=[USER], max_output_tokens=16)
    assert [(item.type, item.status) for item in answer.output] == [("reasoning", "incomplete")]
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_grpc_has_a_field_of_its_own(doors: Any, tokenizer: Tokenizer) -> None:
    *_, stub = doors
    asked = chat_pb2.ChatRequest(model="tiny", messages=[chat_pb2.Message(role="user", content="Hi")])
    whole = stub.Chat(asked)
    assert (whole.choices[0].reasoning_content, whole.choices[0].text) == (THOUGHT, ANSWER)
    assert whole.usage.reasoning_tokens == num_reasoning(tokenizer)
    chunks = list(stub.ChatStream(asked))
    assert "".join(chunk.choice.reasoning_content for chunk in chunks) == THOUGHT
    assert "".join(chunk.choice.text for chunk in chunks) == ANSWER
    assert chunks[-1].usage == whole.usage


def test_what_was_thought_is_history_for_templates_that_read_it(doors: Any, tokenizer: Any) -> None:
    """From every door, as it was answered."""
    saying, client, stub = doors
    message = client.chat.completions.create(**CHAT).choices[0].message.model_dump()
    output = [item.model_dump() for item in client.responses.create(model="tiny", input=[USER]).output]
    whole = stub.Chat(chat_pb2.ChatRequest(model="tiny", messages=[chat_pb2.Message(role="user", content="Hi")]))
    said = whole.choices[0]
    turns = [
        chat_pb2.Message(role="user", content=USER["content"]),
        chat_pb2.Message(role="assistant", content=said.text, reasoning_content=said.reasoning_content),
        chat_pb2.Message(role="user", content=USER["content"]),
    ]
    newer = {name: value for name, value in message.items() if name != "reasoning_content"}
    client.chat.completions.create(model="tiny", messages=[USER, message, USER])
    client.chat.completions.create(model="tiny", messages=[USER, newer, USER])
    client.responses.create(model="tiny", input=[USER, *output, USER])
    stub.Chat(chat_pb2.ChatRequest(model="tiny", messages=turns))
    prompts = {request.prompt_token_ids for request in saying.coordinator.requests[-4:]}
    assert len(prompts) == 1
    assert WRITTEN in tokenizer.decode(prompts.pop())


def test_a_thought_that_led_to_no_answer_is_no_turn(doors: Any, tokenizer: Any) -> None:
    saying, client, _ = doors
    cut = client.responses.create(model="tiny", input=[USER], max_output_tokens=16).output[0].model_dump()
    client.responses.create(model="tiny", input=[USER, cut, USER])
    with_it = saying.coordinator.requests[-1].prompt_token_ids
    client.responses.create(model="tiny", input=[USER, USER])
    assert saying.coordinator.requests[-1].prompt_token_ids == with_it


# --- what the prompt says of it, and the grammar ---


def generation(tokenizer: Tokenizer, directory: Path, **fields: Any) -> Generation:
    card = model_card(directory, vocab_size=tokenizer.vocab_size, max_model_len=32_768)
    body = parse_body(ChatCompletionRequest, CHAT | fields, 0)
    return Validator(card, tokenizer, GatewayConfig()).chat(body)


def stage(made: Generation) -> str:
    assert made.reasoning is not None
    return made.reasoning.stage


def test_a_prompt_that_closes_the_reasoning_asks_for_none(directory: Path, tokenizer: Tokenizer) -> None:
    """By Qwen3's own variable, or by OpenAI's field; the client's variable goes first."""
    no_thought = {"chat_template_kwargs": {"enable_thinking": False}}
    assert stage(generation(tokenizer, directory)) == "may come"
    assert stage(generation(tokenizer, directory, reasoning_effort="high")) == "may come"
    for asked in (no_thought, {"reasoning_effort": "none"}):
        assert stage(generation(tokenizer, directory, **asked)) == "is over"
    both = {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"}
    assert stage(generation(tokenizer, directory, **both)) == "may come"


def test_a_template_may_read_the_effort_itself(tmp_path: Path) -> None:
    """As gpt-oss's does. Others, and Mistral's tokenizers, do without."""
    template = "Reasoning: {{ reasoning_effort | default('medium') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    reads = HuggingFaceTokenizer(write_tokenizer(tmp_path / "reads", chat_template=template))
    for effort in ("low", "high"):
        [request] = generation(reads, tmp_path / "reads", reasoning_effort=effort).requests
        assert reads.decode(request.prompt_token_ids) == f"Reasoning: {effort}{USER['content']}"
    mistral = LAYOUTS["v3"](tmp_path)
    asked = [generation(mistral, tmp_path, **fields).requests for fields in ({}, {"reasoning_effort": "low"})]
    assert asked[0][0].prompt_token_ids == asked[1][0].prompt_token_ids
    with pytest.raises(InvalidRequest, match="reasoning_effort: expected 'none', 'minimal', 'low'"):
        generation(reads, tmp_path / "reads", reasoning_effort="a lot")


def test_a_prompt_may_begin_the_reasoning(tmp_path: Path) -> None:
    """Its tags are no tokens, and may be spelled in any."""
    directory = write_deepseek_r1(tmp_path)
    r1 = HuggingFaceTokenizer(directory)
    made = generation(r1, directory)
    assert made.reasoning == Reasoning(made.reasoning.tags, "has begun")  # type: ignore[union-attr]
    saying = Saying()
    saying.token_ids = [token for char in f"{THOUGHT}\n</think>\n\n{ANSWER}" for token in r1.encode(char)[1:]]
    with http_server(build_frontend(model_card(directory, max_model_len=4096), saying.coordinator)) as url:
        message = httpx.post(f"{url}/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (THOUGHT, ANSWER)


def test_what_users_say_begins_no_reasoning(directory: Path, tokenizer: Tokenizer) -> None:
    for said in ("<think>", "</think>", "Think: <think>\n"):
        assert stage(generation(tokenizer, directory, messages=[{"role": "user", "content": said}])) == "may come"


@pytest.mark.parametrize(
    ("begin", "expected"),
    [
        ("Forty", (None, "Forty-two")),
        ("<think>\nSix", ("Six-two", "")),
        ("<think>\nSix sevens.\n</think>\n\nForty", ("Six sevens.", "Forty-two")),
    ],
)
def test_a_message_that_is_continued_goes_on_where_it_is(
    doors: Any, tokenizer: Tokenizer, begin: str, expected: tuple[str | None, str]
) -> None:
    """In the middle of a thought, or after it. What is repeated of it is split as what comes is."""
    saying, client, _ = doors
    saying.token_ids = list(tokenizer.encode("-two", add_special_tokens=False))
    turns = [USER, {"role": "assistant", "content": begin}]
    asked = {"continue_final_message": True, "add_generation_prompt": False, "echo": True}
    message = client.chat.completions.create(model="tiny", messages=turns, extra_body=asked).choices[0].message
    assert (message.reasoning_content, message.content) == expected
    asked["echo"] = False
    message = client.chat.completions.create(model="tiny", messages=turns, extra_body=asked).choices[0].message
    assert (message.reasoning_content or message.content) == "-two"


def grammar(tokenizer: Tokenizer, directory: Path, **fields: Any) -> Any:
    requests: tuple[Request, ...] = generation(tokenizer, directory, **fields).requests
    return requests[0].grammar


def test_only_what_comes_after_the_reasoning_is_held_to_a_form(directory: Path, tokenizer: Tokenizer) -> None:
    as_json: Any = {"response_format": {"type": "json_object"}}
    held = grammar(tokenizer, directory, **as_json)
    assert isinstance(held, ReasonedGrammar)
    assert (held.has_begun, type(held.answer)) == (False, JsonSchema)
    assert isinstance(grammar(tokenizer, directory, **as_json, reasoning_effort="none"), JsonSchema)
    tool = {"type": "function", "function": {"name": "f"}}
    called = grammar(tokenizer, directory, tools=[tool], tool_choice="required")
    assert isinstance(called.answer, ToolCallGrammar)
    assert grammar(tokenizer, directory) is None


@pytest.mark.parametrize(
    ("parser", "expected"),
    [("auto", "may come"), ("qwen3", "may come"), ("deepseek_r1", "has begun"), ("mistral", "may come")],
)
def test_the_configuration_may_say_how_a_model_reasons(directory: Path, parser: Any, expected: str) -> None:
    tokenizer = HuggingFaceTokenizer(directory, Parsers(parser))
    made = generation(tokenizer, directory)
    assert stage(made) == expected
    assert made.reasoning is not None
    assert made.reasoning.tags.begin == ("[THINK]" if parser == "mistral" else "<think>")


def test_a_model_that_does_not_reason_has_no_such_fields(directory: Path) -> None:
    tokenizer = HuggingFaceTokenizer(directory, Parsers("none"))
    assert generation(tokenizer, directory).reasoning is None


@pytest.mark.parametrize(
    ("parser", "said"),
    [
        ("auto", "What is [/THINK]"),
        ("auto", "What is [THINK]"),
        ("qwen3", "What is </think>"),
        ("qwen3", "What is <think>"),
    ],
)
def test_a_user_s_last_words_begin_and_end_no_reasoning(tmp_path: Path, parser: Any, said: str) -> None:
    """`[/INST]` comes after them and has no text here: a user who asked for a tag lost the answer, or the reasoning."""
    directory = tekken(tmp_path, "v13", extra=("[THINK]", "[/THINK]"), size=1000)
    made = generation(MistralTokenizer(directory, Parsers(parser)), directory, messages=[USER | {"content": said}])
    assert stage(made) == "may come"


def test_mistral_s_tags_are_tokens(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of tekken.json from version 13 on, if it has them; before the answer, and none that a prompt ends with."""
    directory = tekken(tmp_path, "v13", extra=("[THINK]", "[/THINK]"), size=1000)
    mistral = MistralTokenizer(directory)
    assert mistral.reasoning is not None
    tags = mistral.reasoning.tags
    assert {tags.begin_id, tags.end_id} <= mistral.special_ids
    text = [mistral.encode(part, add_special_tokens=False) for part in (THOUGHT, ANSWER)]
    made = generation(mistral, directory)
    assert stage(made) == "may come"
    usage = Usage(0)
    choice, whole = Choice(0, made.requests[0], made, mistral, usage), ChoiceText()
    written = (tags.begin_id or 0, *text[0], tags.end_id or 0, *text[1])
    for at, token_id in enumerate(written):
        whole.add(choice.push(TokenChunk("r", 0, at, (token_id,))))
    whole.add(choice.push(TokenChunk("r", 0, len(written), (), finish_reason="stop")))
    assert (whole.reasoning, whole.text, usage.reasoning_tokens) == (THOUGHT, ANSWER, len(text[0]) + 2)
    thought = {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}
    ids = generation(mistral, directory, messages=[USER, thought, USER]).requests[0].prompt_token_ids
    begun = ids.index(tags.begin_id)
    assert ids[begun : begun + len(text[0]) + 2] == (tags.begin_id, *text[0], tags.end_id)
    without = LAYOUTS["v3"](tmp_path_factory.mktemp("v3"))
    assert without.reasoning is None
    plain = generation(without, directory, messages=[USER, thought, USER]).requests[0].prompt_token_ids
    assert THOUGHT not in without.decode(plain)
