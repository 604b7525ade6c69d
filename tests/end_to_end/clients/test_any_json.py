"""Arbitrary JSON at both doors of the running server: a valid answer or a 4xx, from the same engine to the end."""

from __future__ import annotations

import grpc
import httpx
import psutil
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.grpc.proto import chat_pb2_grpc
from tests.gateway.http.test_any_json import CALLS, CODES, GOOD, bodies
from tests.processes import command_line

FEW = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MODEL = "manta-demo"


def coordinators(server):
    """(process id, start time) of each."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    titles = {child: command_line(child) for child in children}
    found = [child for child, title in titles.items() if "ServeReplica:" in title and ":coordinator" in title]
    assert found
    return sorted((child.pid, child.create_time()) for child in found)


def test_http(server):
    before = coordinators(server)

    @FEW
    @given(data=st.data(), path=st.sampled_from(sorted(GOOD)))
    def send(data, path):
        body = data.draw(bodies(path))
        if isinstance(body, dict) and body.get("model") == "tiny":
            body["model"] = MODEL
        answer = http.post(path, json=body)
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text

    with httpx.Client(base_url=server.url, timeout=600) as http:
        send()
    assert coordinators(server) == before


def test_grpc(server):
    before = coordinators(server)

    @FEW
    @given(call=CALLS)
    def send(call):
        rpc, request = call
        if request.model == "tiny":
            request.model = MODEL
        code = None
        try:
            answer = getattr(stub, rpc)(request, timeout=600)
            if rpc.endswith("Stream"):
                assert list(answer)[-1].HasField("usage")
        except grpc.RpcError as error:
            code = error.code()
        assert code is None or code in CODES

    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = chat_pb2_grpc.MantaStub(channel)
        send()
    assert coordinators(server) == before
