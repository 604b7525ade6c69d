"""The gRPC door over a real socket: the servicer that Serve calls by name, here behind a plain grpc.aio server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc_tools
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_tools import protoc

import gateway
from cluster.config import GatewayConfig
from cluster.errors import EngineDead, Overloaded, StepFailed
from cluster.messages import JsonSchema, ModelCard, ToolCallGrammar
from gateway.coordinators.health import ModelHealth
from gateway.frontend import Frontend
from gateway.grpc.door import GrpcDoor
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.grpc.server.gate import Gate
from gateway.grpc.server.options import server_options
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, failing_script, tokens_script
from tests.waiting import wait_for

ANSWER = "Grüße 👩‍🚀, 你好"
USER = [chat_pb2.Message(role="user", content="Hello")]


@contextlib.contextmanager
def grpc_server(frontend: Frontend) -> Iterator[grpc.Channel]:
    with grpc_address(frontend) as address, grpc.insecure_channel(address) as channel:
        yield channel


@contextlib.contextmanager
def grpc_address(frontend: Frontend) -> Iterator[str]:
    """The gRPC door on a real socket, behind the gate as behind Serve."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[Any, int]:
        gate = Gate(frontend.config, frontend.access, frontend.ends)
        server = grpc.aio.server(interceptors=(gate,), options=server_options(frontend.config))
        door = GrpcDoor(frontend)
        chat_pb2_grpc.add_MantaServicer_to_server(door, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(door, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def coordinator(tokenizer: HuggingFaceTokenizer) -> ScriptedCoordinator:
    return ScriptedCoordinator(tokens_script(tokenizer.encode(ANSWER)[1:]))


@pytest.fixture
def channel(card: ModelCard, coordinator: ScriptedCoordinator) -> Iterator[grpc.Channel]:
    with grpc_server(build_frontend(card, coordinator)) as channel:
        yield channel


def test_streamed_chat_is_the_whole_chat(channel: grpc.Channel, tokenizer: HuggingFaceTokenizer) -> None:
    stub = chat_pb2_grpc.MantaStub(channel)
    sampling = chat_pb2.Sampling(n=2, logprobs=1, seed=3)
    request = chat_pb2.ChatRequest(model="tiny", messages=USER, sampling=sampling)
    whole, call = stub.Chat.with_call(request)
    assert dict(call.trailing_metadata())["x-request-id"] == whole.id
    assert [choice.text for choice in whole.choices] == [ANSWER] * 2
    assert {choice.finish_reason for choice in whole.choices} == {chat_pb2.FINISH_REASON_STOP}
    assert list(whole.choices[0].token_ids) == [*tokenizer.encode(ANSWER)[1:], 1]
    assert len(whole.choices[0].logprobs) == len(whole.choices[0].token_ids)
    chunks = list(stub.ChatStream(request))
    for index in range(2):
        assert "".join(c.choice.text for c in chunks if c.choice.index == index) == ANSWER
    assert [chunk.HasField("usage") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage == whole.usage


def test_generate_takes_text_or_ids(
    channel: grpc.Channel, coordinator: ScriptedCoordinator, tokenizer: HuggingFaceTokenizer
) -> None:
    stub = chat_pb2_grpc.MantaStub(channel)
    ids = tokenizer.encode("Hello")
    for prompt in ({"text": "Hello"}, {"token_ids": chat_pb2.TokenIds(ids=ids)}):
        request = chat_pb2.GenerateRequest(model="tiny", **prompt)
        assert stub.Generate(request).choices[0].text == ANSWER
        assert "".join(chunk.choice.text for chunk in stub.GenerateStream(request)) == ANSWER
    assert {request.prompt_token_ids for request in coordinator.requests} == {ids}


def test_several_prompts_are_echoed_with_their_scores_as_over_http(
    channel: grpc.Channel, tokenizer: HuggingFaceTokenizer
) -> None:
    stub = chat_pb2_grpc.MantaStub(channel)
    ids = tokenizer.encode("Hello")
    prompts = chat_pb2.Prompts(prompts=[{"text": "STOP"}, {"token_ids": {"ids": ids}}])
    sampling = chat_pb2.Sampling(n=2, logprobs=1)
    request = chat_pb2.GenerateRequest(model="tiny", prompts=prompts, sampling=sampling, echo=True)
    choices = stub.Generate(request).choices
    assert [choice.text for choice in choices] == ["STOP" + ANSWER] * 2 + ["Hello" + ANSWER] * 2
    assert list(choices[2].prompt_token_ids) == list(ids)
    scores = [(at.token_id, at.logprob, at.top[0].token_id) for at in choices[2].prompt_logprobs]
    assert scores == [(token_id, -float(i), 5) for i, token_id in enumerate(ids) if i]
    assert len(choices[2].logprobs) == len(choices[2].token_ids) == len(tokenizer.encode(ANSWER))
    joined = [chat_pb2.Choice() for _ in choices]
    for chunk in stub.GenerateStream(request):
        joined[chunk.choice.index].text += chunk.choice.text
        joined[chunk.choice.index].prompt_token_ids.extend(chunk.choice.prompt_token_ids)
        joined[chunk.choice.index].prompt_logprobs.extend(chunk.choice.prompt_logprobs)
    for one, other in zip(joined, choices, strict=True):
        assert one.text == other.text
        assert one.prompt_token_ids == other.prompt_token_ids
        assert one.prompt_logprobs == other.prompt_logprobs


@pytest.mark.parametrize("revision", [None, "5c79a376139be989ef1838f360bf4f1f256d7aec"])
def test_models_are_listed_with_the_hubs_commit(
    card: ModelCard, coordinator: ScriptedCoordinator, revision: str | None
) -> None:
    with grpc_server(build_frontend(replace(card, revision=revision), coordinator)) as channel:
        [model] = chat_pb2_grpc.MantaStub(channel).ListModels(chat_pb2.ListModelsRequest()).models
    assert (model.name, model.revision) == ("tiny", revision or "")


def test_zero_and_unset_differ(channel: grpc.Channel, coordinator: ScriptedCoordinator) -> None:
    stub = chat_pb2_grpc.MantaStub(channel)
    stub.Chat(chat_pb2.ChatRequest(model="tiny", messages=USER))
    stub.Chat(chat_pb2.ChatRequest(model="tiny", messages=USER, sampling=chat_pb2.Sampling(temperature=0, seed=0)))
    assert [request.sampling.temperature for request in coordinator.requests] == [1.0, 0.0]
    assert coordinator.requests[1].seed == 0


BAD: list[tuple[dict[str, Any], Any, str]] = [
    ({"model": "absent"}, grpc.StatusCode.NOT_FOUND, "absent"),
    ({"messages": []}, grpc.StatusCode.INVALID_ARGUMENT, "messages"),
    ({"messages": [chat_pb2.Message(role="king", content="x")]}, grpc.StatusCode.INVALID_ARGUMENT, "messages[0].role"),
    ({"sampling": chat_pb2.Sampling(temperature=-1)}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
    ({"sampling": chat_pb2.Sampling(temperature=float("nan"))}, grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
    ({"sampling": chat_pb2.Sampling(max_tokens=0)}, grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
    ({"sampling": chat_pb2.Sampling(max_tokens=999)}, grpc.StatusCode.INVALID_ARGUMENT, "256"),
    ({"sampling": chat_pb2.Sampling(n=129)}, grpc.StatusCode.INVALID_ARGUMENT, "n"),
    ({"sampling": chat_pb2.Sampling(logit_bias={999: 1})}, grpc.StatusCode.INVALID_ARGUMENT, "logit_bias.999"),
    ({"sampling": chat_pb2.Sampling(logprobs=21)}, grpc.StatusCode.INVALID_ARGUMENT, "top_logprobs"),
    ({"messages": [chat_pb2.Message(role="user", content="x" * 4096)]}, grpc.StatusCode.RESOURCE_EXHAUSTED, "2048"),
]


@pytest.mark.parametrize(("change", "code", "named"), BAD, ids=range(len(BAD)))
def test_a_wrong_field_is_named(
    card: ModelCard, coordinator: ScriptedCoordinator, change: dict[str, Any], code: Any, named: str
) -> None:
    with grpc_server(build_frontend(card, coordinator, GatewayConfig(max_body_bytes=2048))) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)
        request = chat_pb2.ChatRequest(**({"model": "tiny", "messages": USER} | change))
        for call in (stub.Chat, lambda message: list(stub.ChatStream(message))):
            with pytest.raises(grpc.RpcError) as refused:
                call(request)
            assert refused.value.code() == code  # type: ignore[attr-defined]
            assert named in refused.value.details()  # type: ignore[attr-defined]
            assert "x-request-id" in dict(refused.value.trailing_metadata())  # type: ignore[attr-defined]


def test_errors_of_the_engine_have_their_codes(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    begun = tokenizer.encode("Hello")[1:]
    for tokens in ((), begun):
        for error, code in (
            (Overloaded("full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
            (EngineDead("dead"), grpc.StatusCode.UNAVAILABLE),
            (KeyError("secret"), grpc.StatusCode.INTERNAL),
            (StepFailed("secret"), grpc.StatusCode.INTERNAL),
        ):
            coordinator = ScriptedCoordinator(failing_script(tokens, error))
            frontend = build_frontend(card, coordinator, GatewayConfig(resume_timeout_s=0.1))
            with grpc_server(frontend) as channel:
                stub = chat_pb2_grpc.MantaStub(channel)
                request = chat_pb2.ChatRequest(model="tiny", messages=USER)
                with pytest.raises(grpc.RpcError) as failed:
                    list(stub.ChatStream(request))
                assert failed.value.code() == code  # type: ignore[attr-defined]
                details = failed.value.details()  # type: ignore[attr-defined]
                assert "secret" not in details
                [request_id] = (v for k, v in failed.value.trailing_metadata() if k == "x-request-id")  # type: ignore[attr-defined]
                assert request_id in details or code is not grpc.StatusCode.INTERNAL


def test_cancellation_and_deadline_abort(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    coordinator = ScriptedCoordinator(tokens_script([40] * 200, pause_s=0.5, eos=None))
    with grpc_server(build_frontend(card, coordinator)) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)
        request = chat_pb2.ChatRequest(model="tiny", messages=USER)
        stream = stub.ChatStream(request)
        next(stream)
        assert coordinator.running == 1
        left = time.monotonic()
        stream.cancel()
        wait_for(lambda: coordinator.running == 0, 60, "the end of its sequence")
        assert coordinator.closed_at[-1] - left < 10, "promised 0.25 s, and its tokens would take 100 s"
        for call in (stub.Chat, lambda message, timeout: list(stub.ChatStream(message, timeout=timeout))):
            left = time.monotonic()
            with pytest.raises(grpc.RpcError) as expired:
                call(request, timeout=0.3)
            assert expired.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
            wait_for(lambda: coordinator.running == 0, 60, "the end of its sequence")
            assert coordinator.closed_at[-1] - left < 10, "promised 0.25 s after its deadline"


def test_models_and_health(card: ModelCard, coordinator: ScriptedCoordinator) -> None:
    state = {card.application: ModelHealth("loading")}
    frontend = build_frontend(card, coordinator, probe=lambda cards: dict(state))
    with grpc_server(frontend) as channel:
        stub, health = chat_pb2_grpc.MantaStub(channel), health_pb2_grpc.HealthStub(channel)
        check = health_pb2.HealthCheckRequest
        assert health.Check(check()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not stub.ListModels(chat_pb2.ListModelsRequest()).models[0].ready
        with pytest.raises(grpc.RpcError) as loading:
            stub.Chat(chat_pb2.ChatRequest(model="tiny", messages=USER))
        assert loading.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        watch = health.Watch(check(service="manta.v1.Manta"))
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        state[card.application] = ModelHealth("ready")
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        assert health.Check(check(service="manta.v1.Manta")).status == health_pb2.HealthCheckResponse.SERVING
        assert set(health.List(health_pb2.HealthListRequest()).statuses) == {"", "manta.v1.Manta"}
        with pytest.raises(grpc.RpcError) as unknown:
            health.Check(check(service="absent"))
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


def test_tools_and_formats_mean_what_they_mean_over_http(card: ModelCard, tokenizer: HuggingFaceTokenizer) -> None:
    text = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]'
    coordinator = ScriptedCoordinator(tokens_script(tokenizer.encode(text)[1:]))
    schema = '{"type": "object", "properties": {"city": {"type": "string"}}}'
    call = chat_pb2.ToolCall(id="abcdefghi", name="weather", arguments="{}")
    request = chat_pb2.ChatRequest(
        model="tiny",
        messages=[
            *USER,
            chat_pb2.Message(role="assistant", tool_calls=[call]),
            chat_pb2.Message(role="tool", content="rain", tool_call_id="abcdefghi"),
        ],
        tools=[chat_pb2.Tool(name="weather", parameters=schema), chat_pb2.Tool(name="time")],
        tool_choice="weather",
    )
    with grpc_server(build_frontend(replace(card, max_model_len=4096), coordinator)) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)
        [choice] = stub.Chat(request).choices
        assert (choice.text, choice.finish_reason) == ("", chat_pb2.FINISH_REASON_TOOL_CALLS)
        assert [(call.name, call.arguments) for call in choice.tool_calls] == [("weather", '{"city": "Paris"}')]
        grammar = coordinator.requests[0].grammar
        assert isinstance(grammar, ToolCallGrammar)
        assert [(name, json.loads(one.text)) for name, one in grammar.tools] == [("weather", json.loads(schema))]
        assert grammar.required
        streamed = [call.name for chunk in stub.ChatStream(request) for call in chunk.choice.tool_calls]
        assert [name for name in streamed if name] == ["weather"]
        request.tool_choice = "required"
        request.allowed_tools.append("time")
        stub.Chat(request)
        allowed = coordinator.requests[-1].grammar
        assert isinstance(allowed, ToolCallGrammar)
        assert ([name for name, _ in allowed.tools], allowed.required) == (["time"], True)
        response_format = chat_pb2.ResponseFormat(type="json_schema", json_schema=schema)
        stub.Chat(chat_pb2.ChatRequest(model="tiny", messages=USER, response_format=response_format))
        assert isinstance(coordinator.requests[-1].grammar, JsonSchema)
        wrong = chat_pb2.ChatRequest(model="tiny", messages=USER, tools=[chat_pb2.Tool(name="f", parameters="[")])
        with pytest.raises(grpc.RpcError, match=r"tools\[0\].function.parameters"):
            stub.Chat(wrong)


PROTO = "gateway/grpc/proto"


def test_the_generated_files_are_those_of_the_proto(tmp_path: Path) -> None:
    root = Path(gateway.__file__).parent.parent
    flags = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    well_known = str(Path(grpc_tools.__file__).parent / "_proto")
    assert protoc.main(["protoc", f"-I{root}", f"-I{well_known}", *flags, f"{PROTO}/chat.proto"]) == 0
    for name in ("chat_pb2.py", "chat_pb2.pyi", "chat_pb2_grpc.py"):
        assert (root / PROTO / name).read_text() == (tmp_path / PROTO / name).read_text()
