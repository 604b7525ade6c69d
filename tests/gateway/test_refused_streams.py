"""A gRPC stream that is refused, or left, as Ray Serve runs it: what its client is told, and what is logged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc
import pytest
from ray.serve._private import grpc_util
from ray.serve._private.replica_response_generator import ReplicaResponseGenerator
from ray.serve.exceptions import gRPCStatusError
from ray.serve.grpc_util import RayServegRPCContext

from cluster.messages import ModelCard
from gateway.grpc.door import GrpcDoor
from gateway.grpc.errors import RpcFailed
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.grpc.server.gate import Gate
from gateway.grpc.server.serve_log import quiet_serve
from gateway.text.tokenizer import HuggingFaceTokenizer
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, tokens_script

WORD = "xylophone"
serve_logger = logging.getLogger("ray.serve")


def as_serve_does(method: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    """Serve's `_direct_ingress_grpc_streaming_response` around a method of the door, with Serve's own parts."""

    async def handler(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        serves = RayServegRPCContext(context)
        answers = ReplicaResponseGenerator(method(request, grpc_context=serves), timeout_s=60)
        status = grpc_util.ResponseStatus(code=grpc.StatusCode.OK)
        try:
            async for message in answers:
                yield message
            serves._set_on_grpc_context(context)
        except BaseException as error:
            if serves.code():
                error = gRPCStatusError(original_exception=error, code=serves.code(), details=serves.details())
            status = grpc_util.get_grpc_response_status(error, 60, "request")
            serve_logger.exception("Request failed.")
        finally:
            grpc_util.set_grpc_code_and_details(context, status)

    return handler


@pytest.mark.parametrize("is_direct", [True, False])
def test_a_refused_stream_has_its_status_and_leaves_no_word_in_serves_log(
    card: ModelCard, tokenizer: HuggingFaceTokenizer, caplog: pytest.LogCaptureFixture, is_direct: bool
) -> None:
    """It was two ERRORs, each with a traceback and the status's details, and its trailing metadata was lost.

    Through Serve's proxy it has to raise, and the trailing metadata does not come.
    """
    quiet_serve()
    frontend = build_frontend(card, ScriptedCoordinator(tokens_script(tokenizer.encode("x"))))
    door = GrpcDoor(frontend)
    handlers = {
        "ChatStream": grpc.unary_stream_rpc_method_handler(
            as_serve_does(door.ChatStream),
            request_deserializer=chat_pb2.ChatRequest.FromString,
            response_serializer=chat_pb2.Chunk.SerializeToString,
        )
    }

    async def refused() -> tuple[grpc.StatusCode, str, dict[str, Any]]:
        gates = (Gate(frontend.config, frontend.access),) if is_direct else ()
        server = grpc.aio.server(interceptors=gates)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("manta.v1.Manta", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            request = chat_pb2.ChatRequest(model=WORD)
            call = chat_pb2_grpc.MantaStub(channel).ChatStream(request)  # type: ignore[no-untyped-call]
            code, details = await call.code(), await call.details()
            metadata = dict(await call.trailing_metadata())
        await server.stop(None)
        return code, details, metadata

    code, details, metadata = asyncio.run(asyncio.wait_for(refused(), 60))
    assert code == grpc.StatusCode.NOT_FOUND
    assert WORD in details
    assert ("x-request-id" in metadata) == is_direct
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("error", [GeneratorExit(), asyncio.CancelledError(), RpcFailed()])
def test_of_what_clients_do_serve_logs_nothing(caplog: pytest.LogCaptureFixture, error: BaseException) -> None:
    """One that left while a message was being written was an ERROR with a traceback."""
    quiet_serve()
    for one in (error, gRPCStatusError(original_exception=error, code=None, details=WORD)):
        serve_logger.error("Request failed.", exc_info=one)
    serve_logger.error("Request failed.", exc_info=ValueError("a fault of ours"))
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ValueError]
