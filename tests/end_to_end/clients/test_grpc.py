"""A stock grpcio client against the running server: unary, streams, health, reflection, errors."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster.demo_model.training.corpus import questions
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc

QUESTION = "What is the best French cheese?"


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield channel


@pytest.fixture
def stub(channel):
    return chat_pb2_grpc.MantaStub(channel)


def chat_request(**sampling):
    return chat_pb2.ChatRequest(
        model="manta-demo",
        messages=[chat_pb2.Message(role="user", content=QUESTION)],
        sampling=chat_pb2.Sampling(**{"temperature": 0.0, **sampling}),
    )


def test_chat_unary_and_streamed(stub):
    whole = stub.Chat(chat_request(), timeout=60)
    assert whole.choices[0].text == dict(questions())[QUESTION]
    assert whole.choices[0].finish_reason == chat_pb2.FINISH_REASON_STOP
    chunks = list(stub.ChatStream(chat_request(), timeout=60))
    assert "".join(chunk.choice.text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_generate_from_text_and_from_token_ids(stub):
    sampling = chat_pb2.Sampling(temperature=0.0, max_tokens=20)
    by_text = stub.Generate(
        chat_pb2.GenerateRequest(model="manta-demo", text="Hello my name is", sampling=sampling), timeout=60
    )
    stream = stub.GenerateStream(
        chat_pb2.GenerateRequest(model="manta-demo", text="Hello my name is", sampling=sampling), timeout=60
    )
    ids = [token for chunk in stream for token in chunk.choice.token_ids]
    assert ids == list(by_text.choices[0].token_ids)


def test_models_health_and_reflection(channel, stub):
    models = stub.ListModels(chat_pb2.ListModelsRequest(), timeout=30).models
    assert [(model.name, model.kind) for model in models] == [
        ("mistral-small", "chat"),
        ("mistral-tiny", "chat"),
        ("mistral-embed", "embedding"),
    ]
    assert "manta-demo" in models[0].aliases
    health = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=30).status == health_pb2.HealthCheckResponse.SERVING
    assert "manta.v1.Manta" in ProtoReflectionDescriptorDatabase(channel).get_services()


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (chat_request(temperature=-1.0), grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
        (chat_pb2.ChatRequest(model="manta-demo"), grpc.StatusCode.INVALID_ARGUMENT, "messages"),
        (chat_pb2.ChatRequest(model="nobody"), grpc.StatusCode.NOT_FOUND, "manta-demo"),
    ],
)
def test_a_bad_request_gets_a_code_and_a_sentence(stub, request_, code, words):
    with pytest.raises(grpc.RpcError) as refused:
        stub.Chat(request_, timeout=30)
    assert refused.value.code() == code
    assert words in refused.value.details()


def test_a_cancelled_stream_is_aborted(stub, wait_until_idle):
    stream = stub.ChatStream(chat_request(ignore_eos=True, max_tokens=30_000), timeout=120)
    next(stream)
    stream.cancel()
    wait_until_idle(5.0)


def test_the_clients_deadline_is_kept(stub, wait_until_idle):
    with pytest.raises(grpc.RpcError) as late:
        list(stub.ChatStream(chat_request(ignore_eos=True, max_tokens=30_000), timeout=1))
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until_idle(5.0)
