"""The gRPC server that Serve makes: where it listens, and what it answers to a wrong key and to the right one."""

import asyncio

import grpc
import psutil
from ray.serve._private import grpc_util
from ray.serve.config import gRPCOptions

from gateway.edge.client_headers import middlewares
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from tests.ports import free_port


async def answer(message, context):
    context.set_trailing_metadata([(name, str(value)) for name, value in context.invocation_metadata()])
    return b""


async def run():
    middlewares()
    middlewares()
    port = free_port()
    servicer = "gateway.grpc.proto.chat_pb2_grpc.add_MantaServicer_to_server"
    options = gRPCOptions(port=port, grpc_servicer_functions=[servicer])
    loop = asyncio.get_running_loop()
    _, server = await grpc_util.start_grpc_server(lambda **_: answer, options, event_loop=loop)
    listening = [one.laddr.ip for one in psutil.Process().net_connections("tcp") if one.laddr.port == port]
    print(*{ip.removeprefix("::ffff:") for ip in listening})
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for key in ("wrong", "right"):
            metadata = (("authorization", f"Bearer {key}"), ("application", "another"))
            call = chat_pb2_grpc.MantaStub(channel).ListModels(chat_pb2.ListModelsRequest(), metadata=metadata)
            print(await call.code(), "another" in str(await call.trailing_metadata()))
    await server.stop(0)


asyncio.run(asyncio.wait_for(run(), 60))
