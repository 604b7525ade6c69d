"""The gRPC server that Serve makes.

Where it listens, what it answers to a wrong key and to the right one, and then what where Serve's proxy has no gateway.
"""

import asyncio
from types import SimpleNamespace

import grpc
import psutil
from ray.serve._private import grpc_util
from ray.serve._private.proxy import gRPCProxy
from ray.serve.config import gRPCOptions

from gateway.edge.client_headers import middlewares
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from tests.ports import free_port


async def answer(message, context):
    context.set_trailing_metadata([(name, str(value)) for name, value in context.invocation_metadata()])
    return b""


async def say_that_there_is_no_application(context):
    async for status in gRPCProxy.not_found_response(None, SimpleNamespace(app_name="")):
        grpc_util.set_grpc_code_and_details(context, status)


async def chat(_message, context):
    await say_that_there_is_no_application(context)
    return b""


async def chat_stream(_message, context):
    await say_that_there_is_no_application(context)
    if False:
        yield b""


def handler(service_method, streaming_type):
    """Serve asks for one of every type for each method."""
    if streaming_type == grpc_util.gRPCStreamingType.UNARY_STREAM:
        return chat_stream
    return chat if service_method.endswith("/Chat") else answer


async def run():
    middlewares()
    middlewares()
    port = free_port()
    servicer = "gateway.grpc.proto.chat_pb2_grpc.add_MantaServicer_to_server"
    options = gRPCOptions(port=port, grpc_servicer_functions=[servicer])
    loop = asyncio.get_running_loop()
    _, server = await grpc_util.start_grpc_server(handler, options, event_loop=loop)
    listening = [one.laddr.ip for one in psutil.Process().net_connections("tcp") if one.laddr.port == port]
    print(*{ip.removeprefix("::ffff:") for ip in listening})
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for key in ("wrong", "right"):
            metadata = (("authorization", f"Bearer {key}"), ("application", "another"))
            call = chat_pb2_grpc.MantaStub(channel).ListModels(chat_pb2.ListModelsRequest(), metadata=metadata)
            print(await call.code(), "another" in str(await call.trailing_metadata()))
        metadata = (("authorization", "Bearer right"),)
        stub = chat_pb2_grpc.MantaStub(channel)
        for call in (
            stub.Chat(chat_pb2.ChatRequest(), metadata=metadata),
            stub.ChatStream(chat_pb2.ChatRequest(), metadata=metadata),
        ):
            print(await call.code(), dict(await call.trailing_metadata())["retry-after"], await call.details())
    await server.stop(0)


asyncio.run(asyncio.wait_for(run(), 60))
