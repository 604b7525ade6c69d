"""One server with a family of ours and one by transformers' code, both with reasoning, tools and experts elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import PreTrainedTokenizerFast

from tests import families, transformers_families
from tests.conftest import Server, running_server
from tests.gateway.chat_formats import write_gpt_oss, write_qwen3
from tests.processes import processes, status
from tests.transformers_families import generated

pytestmark = pytest.mark.long

NATIVE, BY_TRANSFORMERS = "qwen3-moe", "gpt-oss"
MODELS = (NATIVE, BY_TRANSFORMERS)
GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7]]
NUM_TOKENS = 48
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"where": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 3]}},
            "required": ["where", "days"],
            "additionalProperties": False,
        },
    },
}
MESSAGES = [{"role": "user", "content": "Hello, how is the weather?"}]
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
CONTEXT = 2048


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def references(directory: Path) -> dict[str, Any]:
    """Random models in fp32, whose tokenizers and chat templates are in the formats of their families."""
    write_qwen3(directory / NATIVE)
    ours = families.random_model(
        "qwen3_moe", vocab_size=vocab_size(directory / NATIVE), max_position_embeddings=CONTEXT, **NO_IDS
    )
    families.write_model(directory / NATIVE, ours)
    write_gpt_oss(directory / BY_TRANSFORMERS)
    config = transformers_families.tiny_config("gpt_oss")
    config.vocab_size = vocab_size(directory / BY_TRANSFORMERS)
    config.max_position_embeddings = CONTEXT
    theirs = transformers_families.random_model(config)
    theirs.save_pretrained(directory / BY_TRANSFORMERS)
    for name, ends in ((NATIVE, ["<|im_end|>", "</s>"]), (BY_TRANSFORMERS, ["<|return|>", "<|call|>"])):
        file = directory / name / "config.json"  # not in the references, which are to go on
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / name)
        eos = {"eos_token_id": tokenizer.convert_tokens_to_ids(ends)}
        file.write_text(json.dumps(json.loads(file.read_text()) | eos))
    return {NATIVE: ours, BY_TRANSFORMERS: theirs}


def vocab_size(directory: Path) -> int:
    return len(PreTrainedTokenizerFast.from_pretrained(directory))


@pytest.fixture(scope="module")
def server(directory: Path, references: dict[str, Any]) -> Iterator[Server]:
    models = [
        {
            "name": name,
            "path": str(directory / name),
            "engine": {"dtype": "float32", "max_model_len": CONTEXT, "kv_cache_gib": 0.05},
            "experts": {"groups": GROUPS, "transport": "lane", "expert_timeout_s": 150.0},  # shards start on two cores
        }
        for name in references
    ]
    with running_server(json.dumps({"models": models})) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0) as client:
        yield client


def prompt(length: int = 40) -> list[int]:
    return [*range(2, 2 + length)]


def completion_ids(client: openai.OpenAI, model: str, on_first: Any = None) -> list[int]:
    stream = client.completions.create(
        model=model,
        prompt=prompt(),
        max_tokens=NUM_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    ids: list[int] = []
    for chunk in stream:
        for choice in chunk.choices:
            if on_first is not None:
                on_first()
                on_first = None
            ids += choice.to_dict().get("token_ids") or []
    return ids


@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_are_those_of_transformers(client: openai.OpenAI, references: dict[str, Any], model: str) -> None:
    assert completion_ids(client, model) == generated(references[model], prompt(), NUM_TOKENS)


@pytest.mark.parametrize("model", MODELS)
def test_a_killed_shard_changes_no_token(
    server: Server, client: openai.OpenAI, references: dict[str, Any], model: str
) -> None:
    def kill() -> None:
        shards = processes(server, "ray::ExpertShard")
        assert len(shards) == 2 * len(GROUPS)
        for shard in shards:
            shard.kill()

    assert completion_ids(client, model, kill) == generated(references[model], prompt(), NUM_TOKENS)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}, "max_tokens": 200},
        {"reasoning_effort": "none"},
        {"reasoning_effort": "low", "n": 2, "temperature": 0.8},
        {"logprobs": True, "top_logprobs": 3},
        {"response_format": {"type": "json_object"}},
    ],
    ids=["plain", "tools", "required", "named", "no-reasoning", "sampled", "logprobs", "json"],
)
def test_a_stream_says_what_a_whole_answer_says(client: openai.OpenAI, model: str, options: dict[str, Any]) -> None:
    asked = {"model": model, "messages": MESSAGES, "temperature": 0, "seed": 7, "max_tokens": NUM_TOKENS} | options
    whole = client.chat.completions.create(**asked)
    streamed: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            add(streamed.setdefault(choice.index, {"content": "", "reasoning": "", "calls": []}), choice)
    for choice in whole.choices:
        message = choice.message
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
        assert streamed[choice.index] == {
            "content": message.content or "",
            "reasoning": message.to_dict().get("reasoning_content") or "",
            "calls": [list(call) for call in calls],
            "finish_reason": choice.finish_reason,
        }
        if options.get("tool_choice") and choice.finish_reason != "length":
            assert calls
            for name, arguments in calls:
                assert name == "weather"
                assert json.loads(arguments).keys() == {"where", "days"}
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.completion_tokens_details == whole.usage.completion_tokens_details


def add(answer: dict[str, Any], choice: Any) -> None:
    answer["content"] += choice.delta.content or ""
    answer["reasoning"] += choice.delta.to_dict().get("reasoning_content") or ""
    for call in choice.delta.tool_calls or []:
        if call.index == len(answer["calls"]):
            answer["calls"].append([call.function.name, ""])
        answer["calls"][call.index][1] += call.function.arguments or ""
    if choice.finish_reason:
        answer["finish_reason"] = choice.finish_reason


@pytest.mark.parametrize("model", MODELS)
def test_a_required_call_of_a_tool_has_arguments_that_parse(directory: Path, client: openai.OpenAI, model: str) -> None:
    """Qwen3's reasoning is switched off; gpt-oss always thinks, here until it may stop."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / model)
    end = tokenizer.convert_tokens_to_ids("<|end|>") if model == BY_TRANSFORMERS else None
    answer = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        temperature=0,
        max_tokens=400,
        tools=[TOOL],
        tool_choice="required",
        reasoning_effort="none",
        parallel_tool_calls=False,
        logit_bias={} if end is None else {str(end): 100},
    )
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert json.loads(call.function.arguments).keys() == {"where", "days"}


def test_what_there_is_and_what_computes_is_told(server: Server, client: openai.OpenAI) -> None:
    cards = {card.id: card.to_dict() for card in client.models.list()}
    assert cards.keys() == set(MODELS)
    for model in MODELS:
        assert cards[model]["kernels"].keys() == {"coordinator", "expert-0", "expert-1"}
    said, kernels = status(server), status(server, "--kernels")
    for model in MODELS:
        assert model in said
        assert model in kernels
    answer = httpx.get(f"{server.url}/metrics", timeout=60)
    assert answer.status_code == 200
    for model in MODELS:
        assert f'model="{model}"' in answer.text
