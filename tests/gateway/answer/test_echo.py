"""Completions that begin with their prompt, and its log-probabilities: what evaluation harnesses read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, model_card, tokens_script
from tests.gateway.http.test_http import sse

PROMPT = "Grüße 👩‍🚀, 你好"
ANSWER = " é STOP here"


@pytest.fixture(scope="module")
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    card = model_card(request.getfixturevalue("tokenizer_directory"))
    tokenizer = request.getfixturevalue("tokenizer")
    with http_server(build_frontend(card, ScriptedCoordinator(tokens_script(tokenizer.encode(ANSWER)[1:])))) as url:
        yield url


def complete(url: str, **fields: Any) -> Any:
    answer = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": PROMPT, "echo": True, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_text_begins_with_the_prompt(url: str, tokenizer: HuggingFaceTokenizer) -> None:
    ids = list(tokenizer.encode(PROMPT))
    for prompt, texts in (
        (PROMPT, [PROMPT]),
        (ids, [PROMPT]),
        (["Hello", "STOP"], ["Hello", "STOP"]),
        ([ids, ids], [PROMPT] * 2),
    ):
        assert [choice["text"] for choice in complete(url, prompt=prompt)["choices"]] == [t + ANSWER for t in texts]
    pairs = [choice["text"] for choice in complete(url, prompt=["Hello", "STOP"], n=2)["choices"]]
    assert pairs == ["Hello" + ANSWER] * 2 + ["STOP" + ANSWER] * 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 2, 100])
def test_scores_and_offsets_cover_prompt_and_output(
    url: str, tokenizer: HuggingFaceTokenizer, max_tokens: int, stream: bool
) -> None:
    fields = {"logprobs": 1, "max_tokens": max_tokens, "stream": stream, "return_token_ids": True}
    if stream:
        answer = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": PROMPT, "echo": True, **fields})
        choices = [chunk["choices"][0] for chunk in sse(answer.text)]
    else:
        choices = complete(url, **fields)["choices"]
    text = "".join(choice["text"] for choice in choices)
    logprobs = {
        key: [value for choice in choices for value in choice["logprobs"][key]] for key in choices[0]["logprobs"]
    }
    prompt = list(tokenizer.encode(PROMPT))
    output = [*tokenizer.encode(ANSWER)[1:], 1][:max_tokens]
    assert choices[0]["prompt_token_ids"] == prompt
    assert [i for choice in choices for i in choice["token_ids"]] == output
    assert text == PROMPT + ANSWER if max_tokens == 100 else text.startswith(PROMPT)
    assert logprobs["token_logprobs"] == [None, *(-float(i) for i in range(1, len(prompt)))] + [-0.25] * len(output)
    assert logprobs["top_logprobs"][0] is None
    assert all(isinstance(top, dict) and token in top for top, token in _scored(logprobs))
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(prompt) + len(output)
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if "\ufffd" not in token and token not in ("<s>", "</s>"):
            assert text[offset : offset + len(token)] == token
    assert choices[-1]["finish_reason"] == ("stop" if max_tokens == 100 else "length")


def _scored(logprobs: dict[str, Any]) -> list[tuple[Any, str]]:
    return list(zip(logprobs["top_logprobs"], logprobs["tokens"], strict=True))[1:]


def test_no_tokens_are_counted_when_only_the_prompt_is_scored(url: str, tokenizer: HuggingFaceTokenizer) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(model="tiny", prompt=PROMPT, echo=True, max_tokens=0, logprobs=5)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(tokenizer.encode(PROMPT)), 0)
    assert answer.choices[0].text == PROMPT
    assert complete(url, prompt=[5] * 256, max_tokens=0)["choices"][0]["finish_reason"] == "length"
