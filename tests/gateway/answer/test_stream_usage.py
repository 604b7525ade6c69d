"""Where a stream's token counts come, and that no client can add them up twice."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from mistralai.client import Mistral

from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator
from tests.gateway.http.test_http import sse

ANSWER = "Hello, my name is Manta."
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
PATHS = ("/v1/chat/completions", "/v1/completions")


def stream(url: str, path: str, **fields: Any) -> list[dict[str, Any]]:
    answer = httpx.post(url + path, json=CHAT | {"prompt": "Hi", "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    return sse(answer.text)


@pytest.mark.parametrize("path", PATHS)
def test_the_usage_comes_once(door: tuple[str, ScriptedCoordinator], path: str) -> None:
    """With the last choice's end, or in an event of its own for those who ask; nobody gets both."""
    whole = httpx.post(door[0] + path, json=CHAT | {"prompt": "Hi", "n": 2}).json()["usage"]
    assert whole["completion_tokens"] == 8
    for options, in_end, in_event in (
        (None, True, False),
        ({}, True, False),
        ({"include_usage": True}, False, True),
        ({"include_usage": False}, False, False),
    ):
        chunks = stream(door[0], path, stream_options=options, n=2)
        counted = [i for i, chunk in enumerate(chunks) if chunk.get("usage")]
        assert counted == [len(chunks) - 1] * (in_end or in_event)
        assert (chunks[-1]["choices"] == []) == in_event
        assert [chunk["usage"] for chunk in chunks if chunk.get("usage")] == [whole] * len(counted)
        if in_end:
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("path", PATHS)
def test_the_usage_so_far_comes_with_every_chunk_where_it_is_asked_for(
    door: tuple[str, ScriptedCoordinator], path: str
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = stream(door[0], path, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4]
    assert last["usage"] == chunks[-1]["usage"]
    assert last["choices"] == []
    chunks = stream(door[0], path, stream_options={"continuous_usage_stats": True})
    assert [bool(chunk.get("usage")) for chunk in chunks] == [False, False, False, True]


@pytest.mark.parametrize("path", PATHS)
def test_stream_options_without_stream_are_400(door: tuple[str, ScriptedCoordinator], path: str) -> None:
    """As OpenAI has it: whoever asks for the usage of a stream forgot to ask for the stream."""
    for fields in ({}, {"stream": False}, {"stream": None}):
        for options in ({}, {"include_usage": True}, {"include_usage": False}):
            body = CHAT | {"prompt": "Hi", "stream_options": options, **fields}
            answer = httpx.post(door[0] + path, json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream_options")
            assert answer.json()["error"]["message"] == "stream_options: only with stream"
    assert httpx.post(door[0] + path, json=CHAT | {"prompt": "Hi", "stream_options": None}).status_code == 200


def test_mistrals_client_learns_the_usage_of_a_stream(door: tuple[str, ScriptedCoordinator]) -> None:
    """It cannot send `stream_options`, and got none."""
    with (
        Mistral(api_key="none", server_url=door[0]) as client,
        client.chat.stream(model="tiny", messages=CHAT["messages"], max_tokens=4) as events,
    ):
        chunks = [event.data for event in events]
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


def test_openais_client_puts_the_usage_together(client: openai.OpenAI, tokenizer: HuggingFaceTokenizer) -> None:
    for options in ({}, {"stream_options": {"include_usage": True}}):
        with client.chat.completions.stream(**CHAT | {"max_tokens": 100}, **options) as events:
            final = events.get_final_completion()
        assert final.usage is not None
        assert final.usage.completion_tokens == len(tokenizer.encode(ANSWER))  # an end, and no beginning
