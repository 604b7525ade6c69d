"""What may be asked of a prompt itself: its log-probabilities, and to be cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import httpx
import pytest

from cluster.errors import Unavailable
from cluster.messages import Request, TokenChunk
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, model_card, tokens_script
from tests.gateway.grpc.test_grpc import grpc_server
from tests.gateway.http.test_http import sse

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hello, my name is Manta."}
LONG = "Hello, my name is Manta. " * 100  # more tokens than the context has


class Doors:
    """Both, and what they ask of the coordinator."""

    coordinator = ScriptedCoordinator(tokens_script([40, 41]))
    url: str
    stub: Any

    def post(self, path: str, **fields: Any) -> Any:
        body = {"model": "tiny", "max_tokens": 2} | fields
        return httpx.post(self.url + path, json=body, timeout=30)

    def prompt(self, path: str, **fields: Any) -> tuple[int, ...]:
        answer = self.post(path, **fields)
        assert answer.status_code == 200, answer.text
        return self.coordinator.requests[-1].prompt_token_ids


@pytest.fixture(scope="module")
def doors(request: pytest.FixtureRequest) -> Iterator[Doors]:
    doors = Doors()
    frontend = build_frontend(model_card(request.getfixturevalue("tokenizer_directory")), doors.coordinator)
    with http_server(frontend) as doors.url, grpc_server(frontend) as channel:
        doors.stub = chat_pb2_grpc.MantaStub(channel)  # type: ignore[no-untyped-call]
        yield doors


def test_log_probabilities_of_a_prompt_are_told_by_token_id(doors: Doors, tokenizer: HuggingFaceTokenizer) -> None:
    """As vLLM's: the token itself, then the most likely ones; the first token has none, for nothing comes before it."""
    ids = tokenizer.encode("Hello")
    chat = doors.post(CHAT, messages=[USER], prompt_logprobs=1, n=2).json()
    chat_ids = doors.coordinator.requests[-1].prompt_token_ids
    completion = doors.post(COMPLETIONS, prompt=["Hello", "Hello"], prompt_logprobs=1).json()
    several = [(chat["prompt_logprobs"], chat_ids)]
    several += [(choice["prompt_logprobs"], ids) for choice in completion["choices"]]
    for told, prompt in several:
        assert told[0] is None
        assert len(told) == len(prompt)
        for place, (entry, token_id) in enumerate(zip(told[1:], prompt[1:], strict=True), start=1):
            assert list(entry) == [str(token_id), "5"]
            assert entry[str(token_id)]["logprob"] == -float(place)
            assert entry["5"] == {"logprob": -0.125, "rank": 1, "decoded_token": tokenizer.token_bytes(5).decode()}
    assert "prompt_logprobs" not in doors.post(CHAT, messages=[USER]).json()
    assert doors.coordinator.requests[-1].sampling.prompt_logprobs is None
    by_id = doors.post(COMPLETIONS, prompt="Hello", prompt_logprobs=0, return_tokens_as_token_ids=True).json()
    assert by_id["choices"][0]["prompt_logprobs"][1]["5"]["decoded_token"] == "token_id:5"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_once_for_all_of_its_choices(
    doors: Doors, tokenizer: HuggingFaceTokenizer, stream: bool
) -> None:
    """Each choice had it computed whole, past the prefix cache: 128 times for `n: 128`."""
    doors.coordinator.requests.clear()
    fields = {"prompt": ["Hello", "STOP here"], "n": 3, "echo": True, "logprobs": 1, "stream": stream}
    answer = doors.post(COMPLETIONS, **fields)
    asked = [request.sampling.prompt_logprobs for request in doors.coordinator.requests]
    assert sorted(asked, key=str) == [1, 1, None, None, None, None]
    assert {r.choice_index for r in doors.coordinator.requests if r.sampling.prompt_logprobs is not None} == {0}
    bodies = sse(answer.text) if stream else [answer.json()]
    for index, text in enumerate(["Hello"] * 3 + ["STOP here"] * 3):
        told = [choice for body in bodies for choice in body["choices"] if choice["index"] == index]
        num_scores = len(tokenizer.encode(text)) - 1
        scores = told[0]["logprobs"]["token_logprobs"][: num_scores + 1]
        assert scores == [None, *(-float(place) for place in range(1, num_scores + 1))]
    sampling = chat_pb2.Sampling(prompt_logprobs=1, max_tokens=2, n=3)
    request = chat_pb2.GenerateRequest(model="tiny", text="Hello", sampling=sampling)
    for choice in doors.stub.Generate(request, timeout=30).choices:
        assert len(choice.prompt_logprobs) == len(tokenizer.encode("Hello")) - 1


def test_choices_that_are_ahead_of_their_prompts_scores_wait_for_them(
    doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tokens_script([40, 41])

    async def first_is_last(request: Request) -> AsyncIterator[TokenChunk]:
        if request.choice_index == 0:
            await asyncio.sleep(0.3)
        async for chunk in script(request):
            yield chunk

    monkeypatch.setattr(doors.coordinator, "_script", first_is_last)
    answer = doors.post(COMPLETIONS, prompt="Hello", n=3, echo=True, logprobs=1).json()
    assert all(choice["logprobs"]["token_logprobs"][1] == -1.0 for choice in answer["choices"])


def test_an_error_of_the_choice_that_is_scored_ends_those_that_wait_for_it(
    doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tokens_script([40, 41])

    async def first_fails(request: Request) -> AsyncIterator[TokenChunk]:
        if request.choice_index == 0:
            await asyncio.sleep(0.2)
            raise Unavailable("no expert")
        async for chunk in script(request):
            yield chunk

    monkeypatch.setattr(doors.coordinator, "_script", first_fails)
    assert doors.post(COMPLETIONS, prompt="Hello", n=3, echo=True, logprobs=1).status_code == 503
    assert doors.coordinator.running == 0


def test_nothing_is_generated_where_only_the_prompt_is_scored(doors: Doors) -> None:
    for path, fields in ((CHAT, {"messages": [USER]}), (COMPLETIONS, {"prompt": "Hello"})):
        answer = doors.post(path, **fields, prompt_logprobs=0, max_tokens=0).json()
        assert answer["usage"]["completion_tokens"] == 0
        assert (answer.get("prompt_logprobs") or answer["choices"][0]["prompt_logprobs"])[1]


def test_grpc_has_them_with_the_prompts_tokens(doors: Doors, tokenizer: HuggingFaceTokenizer) -> None:
    sampling = chat_pb2.Sampling(prompt_logprobs=1, max_tokens=1)
    ids = tokenizer.encode("Hello")
    whole = doors.stub.Generate(
        chat_pb2.GenerateRequest(model="tiny", text="Hello", sampling=sampling), timeout=30
    ).choices[0]
    assert (whole.text, tuple(whole.prompt_token_ids)) == (tokenizer.decode([40]), ids)
    assert [(at.token_id, at.logprob) for at in whole.prompt_logprobs] == [
        (i, -float(n)) for n, i in enumerate(ids) if n
    ]
    messages = [chat_pb2.Message(**USER)]
    request = chat_pb2.ChatRequest(model="tiny", messages=messages, sampling=sampling)
    chunks = list(doors.stub.ChatStream(request, timeout=30))
    assert len(chunks[0].choice.prompt_logprobs) == len(chunks[0].choice.prompt_token_ids) - 1 > 0


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"truncate_prompt_tokens": 5}, slice(-5, None)),
        ({"truncate_prompt_tokens": 5.0, "truncation_side": "left"}, slice(-5, None)),
        ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, slice(5)),
        ({"truncate_prompt_tokens": -1}, slice(-254, None)),  # the context has 256, and two are generated
        ({"truncate_prompt_tokens": -1, "max_tokens": 56}, slice(-200, None)),
    ],
)
def test_a_prompt_is_cut_to_what_is_asked_for(
    doors: Doors, tokenizer: HuggingFaceTokenizer, asked: dict[str, Any], kept: slice
) -> None:
    """Whatever its length was, which was an error."""
    whole = tokenizer.encode(LONG)
    assert len(whole) > 256
    assert doors.prompt(COMPLETIONS, prompt=LONG, **asked) == whole[kept]
    for prompt in (list(whole), [list(whole)], ["Hello", list(whole)]):
        assert doors.prompt(COMPLETIONS, prompt=prompt, **asked) == whole[kept]
    chat = doors.prompt(CHAT, messages=[USER | {"content": LONG}], **asked)
    assert chat == tokenizer.encode(f"[INST] {LONG} [/INST]")[kept]
    fields = {name: int(value) if isinstance(value, float) else value for name, value in asked.items()}
    sampling = chat_pb2.Sampling(**{"max_tokens": 2} | fields)
    doors.stub.Generate(chat_pb2.GenerateRequest(model="tiny", text=LONG, sampling=sampling), timeout=30)
    assert doors.coordinator.requests[-1].prompt_token_ids == whole[kept]


def test_what_is_echoed_is_what_was_kept(doors: Doors, tokenizer: HuggingFaceTokenizer) -> None:
    whole = tokenizer.encode(LONG)
    answer = doors.post(COMPLETIONS, prompt=LONG, truncate_prompt_tokens=5, echo=True, max_tokens=0).json()
    assert answer["choices"][0]["text"] == tokenizer.decode(whole[-5:])
    fields = {"prompt": [LONG, list(whole)], "truncate_prompt_tokens": 5, "echo": True, "max_tokens": 0, "n": 2}
    choices = doors.post(COMPLETIONS, **fields).json()["choices"]  # of several prompts it was a 500
    assert [choice["text"] for choice in choices] == [tokenizer.decode(whole[-5:])] * 4


def test_what_is_echoed_has_the_control_tokens_that_the_text_has(doors: Doors, tokenizer: HuggingFaceTokenizer) -> None:
    """Those of a text that was to be cut were lost, also where it was short enough, and a BOS is no part of it."""
    text = "Hi </s>Hello</s> STOP"
    whole = tokenizer.encode(text)
    last, first = {"truncate_prompt_tokens": 3}, {"truncate_prompt_tokens": 3, "truncation_side": "right"}
    for prompt, fields, echoed in (
        (text, {"truncate_prompt_tokens": 200}, text),
        (text, last, tokenizer.decode(whole[-3:])),
        (text, first, tokenizer.decode(whole[1:3])),
        (f"<s>{text}", first, tokenizer.decode(whole[:3])),
    ):
        answer = doors.post(COMPLETIONS, prompt=prompt, echo=True, max_tokens=0, **fields)
        assert answer.json()["choices"][0]["text"] == echoed
    assert "</s>" in tokenizer.decode(whole[-5:])
    kept = doors.post(COMPLETIONS, prompt=text, truncate_prompt_tokens=5, echo=True, max_tokens=0)
    assert kept.json()["choices"][0]["text"] == tokenizer.decode(whole[-5:])


def test_token_ids_may_be_written_as_fractions(doors: Doors) -> None:
    """`[5.0, 6]` was refused, though `max_tokens: 16.0` is taken: some languages have no other numbers."""
    assert doors.prompt(COMPLETIONS, prompt=[5.0, 6]) == (5, 6)
    assert doors.prompt(COMPLETIONS, prompt=[[5, 6.0]]) == (5, 6)
    assert doors.prompt(COMPLETIONS, prompt=["Hi", [7.0, 8.0]], echo=True) == (7, 8)
    assert doors.prompt(COMPLETIONS, prompt=[5.0, 6, 7.0], truncate_prompt_tokens=2, echo=True) == (6, 7)
    for wrong, param in (([5.5, 6], "prompt"), ([True, 6], "prompt"), ([[5, 6.5]], "prompt[0][1]")):
        assert doors.post(COMPLETIONS, prompt=wrong).json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 257}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 5, "truncation_side": "middle"}, "truncation_side"),
    ],
)
def test_what_is_wrong_is_named(doors: Doors, fields: dict[str, Any], param: str) -> None:
    for path in (CHAT, COMPLETIONS):
        error = doors.post(path, messages=[USER], prompt="Hello", **fields).json()["error"]
        assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_grpc_names_it_as_well(doors: Doors) -> None:
    sampling = chat_pb2.Sampling(truncate_prompt_tokens=-2)
    with pytest.raises(grpc.RpcError, match="truncate_prompt_tokens"):
        doors.stub.Generate(chat_pb2.GenerateRequest(model="tiny", text="Hello", sampling=sampling), timeout=30)


def test_scores_of_an_answer_that_would_fill_a_gateway_are_streamed_or_refused(
    doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`n: 128` with 20 candidates a token was held until it was whole: gigabytes."""
    monkeypatch.setattr("gateway.answer.held_scores.MAX_SCORES", 2 * 2 * (1 + 3))
    fields = {"messages": [USER], "logprobs": True, "top_logprobs": 3}
    assert doors.post(CHAT, n=2, **fields).status_code == 200
    refused = doors.post(CHAT, n=3, **fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprobs")
    assert "ask for a stream" in refused.json()["error"]["message"]
    assert doors.coordinator.running == 0
    assert len(sse(doors.post(CHAT, n=3, stream=True, **fields).text)) == 6
    sampling = chat_pb2.Sampling(logprobs=3, max_tokens=2, n=3)
    request = chat_pb2.GenerateRequest(model="tiny", text="Hello", sampling=sampling)
    with pytest.raises(grpc.RpcError, match="logprobs: at most 16 scores"):
        doors.stub.Generate(request, timeout=30)
    assert len(list(doors.stub.GenerateStream(request, timeout=30))) == 6


def test_scores_that_would_fill_a_gateway_are_refused(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred choices each had the scores of a long prompt: 150 KB of body asked for ten gigabytes."""
    monkeypatch.setattr("gateway.request.validator.MAX_PROMPT_SCORES", 100)
    prompt = {"prompt": [5, 6, 7, 8]}
    for fields, param in (({"prompt_logprobs": 4}, "prompt_logprobs"), ({"echo": True, "logprobs": 4}, "logprobs")):
        assert doors.post(COMPLETIONS, n=5, **prompt, **fields).status_code == 200
        refused = doors.post(COMPLETIONS, n=6, **prompt, **fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        assert "not 120" in refused.json()["error"]["message"]
