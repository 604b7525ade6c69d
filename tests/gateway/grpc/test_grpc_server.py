"""The gRPC server that Serve makes is ours, in a process of its own, as in Serve's proxies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.config import GatewayConfig
from cluster.ray_variables import DOORS, doors
from gateway.admission.api_keys import digest
from tests.gateway.test_service import run_python

SERVES_SERVER = """
import asyncio, os
import grpc
import psutil
os.environ["{variable}"] = {value!r}
from ray.serve._private import grpc_util
from ray.serve.config import gRPCOptions
from gateway.grpc.proto import chat_pb2, chat_pb2_grpc
from gateway.edge.client_headers import middlewares
from grpc_health.v1 import health_pb2, health_pb2_grpc
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
    print(*{{ip.removeprefix("::ffff:") for ip in listening}})
    async with grpc.aio.insecure_channel(f"127.0.0.1:{{port}}") as channel:
        for key in ("wrong", "right"):
            metadata = (("authorization", f"Bearer {{key}}"), ("application", "another"))
            call = chat_pb2_grpc.MantaStub(channel).ListModels(chat_pb2.ListModelsRequest(), metadata=metadata)
            print(await call.code() , "another" in str(await call.trailing_metadata()))
    await server.stop(0)

asyncio.run(asyncio.wait_for(run(), 60))
"""


@pytest.mark.parametrize("is_readable", [True, pytest.param(False, marks=pytest.mark.long)])
def test_serves_server_is_ours_in_a_proxy_too(tmp_path: Path, is_readable: bool) -> None:
    """It listened on every interface, read messages of any size before a key was asked for, and obeyed `application`.

    Where a proxy cannot read the keys, the replica asks for them."""
    keys = tmp_path / "keys.json"
    config = GatewayConfig(api_keys_file=keys, max_choices=3)
    assert json.loads(doors(config)[DOORS]) == {"api_keys_file": str(keys)}
    if is_readable:
        keys.write_text(json.dumps([{"id": "alice", "sha256": digest("right")}]))
        keys.chmod(0o600)
    lines = run_python(SERVES_SERVER.format(variable=DOORS, value=doors(config)[DOORS])).splitlines()
    assert lines == [
        "127.0.0.1",
        "StatusCode.UNAUTHENTICATED False" if is_readable else "StatusCode.OK False",
        "StatusCode.OK False",
    ]
